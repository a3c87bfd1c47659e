"""A Child SA as the planes see it: what IKE negotiated, ready to be installed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from .address import Path
from .secret import Secret
from .selector import Selector


class EspSuite(Enum):
    """ESP transforms: IANA transform ID, key bits, bytes of keying material (key and salt), IV bytes, ICV bytes."""

    AES_GCM_16_256 = (20, 256, 36, 8, 16)
    """RFC 4106."""
    AES_GCM_16_128 = (20, 128, 20, 8, 16)
    """RFC 4106."""
    CHACHA20_POLY1305 = (28, 0, 36, 8, 16)
    """RFC 7634."""

    def __init__(self, transform: int, key_bits: int, keymat_bytes: int, iv_bytes: int, icv_bytes: int) -> None:
        self.transform = transform
        self.key_bits = key_bits
        self.keymat_bytes = keymat_bytes
        self.iv_bytes = iv_bytes
        self.icv_bytes = icv_bytes


@dataclass(frozen=True, slots=True)
class ChildSa:
    """Both directions of one Child SA (RFC 7296 section 2.17).

    `id` names it on this machine for ever (a counter: never used again); `network` names whose TUN it belongs to.
    `key_in` and `key_out` are keying material of `suite.keymat_bytes` bytes, salt last. Selectors are from our side:
    `local` are our addresses, `remote` the peer's. Inbound packets are accepted from any outer address, since ESP
    authenticates them; `path` is where outbound packets go.
    """

    id: int
    network: str
    suite: EspSuite
    spi_in: int
    spi_out: int
    key_in: Secret
    key_out: Secret
    local: tuple[Selector, ...]
    remote: tuple[Selector, ...]
    path: Path
    esn: bool = False
    transport_mode: bool = False
    mtu: int = 1280
    """Largest inner packet that fits the path without outer fragmentation, in bytes."""
