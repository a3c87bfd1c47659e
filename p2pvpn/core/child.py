"""A Child SA as the planes see it: what IKE negotiated, ready to be installed."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from .address import Path
from .secret import Secret
from .selector import Selector


class EspSuite(Enum):
    """Ciphers of ESP and IKE: IANA transform ID, key bits, bytes of keying material.

    Combined ciphers have a salt behind their key. The others need integrity besides: its IANA transform ID and the
    bytes of its key follow, and that key is the end of the keying material (RFC 7296 section 2.17).
    """

    AES_GCM_16_256 = (20, 256, 36)
    """RFC 4106."""
    AES_GCM_16_128 = (20, 128, 20)
    """RFC 4106."""
    CHACHA20_POLY1305 = (28, 0, 36)
    """RFC 7634."""
    AES_CBC_256_HMAC_SHA2_256 = (12, 256, 64, 12, 32)
    """RFC 3602 and RFC 4868, as those below: for clients that are built into other systems."""
    AES_CBC_256_HMAC_SHA2_384 = (12, 256, 80, 13, 48)
    AES_CBC_256_HMAC_SHA2_512 = (12, 256, 96, 14, 64)
    AES_CBC_128_HMAC_SHA2_256 = (12, 128, 48, 12, 32)

    def __init__(
        self, transform: int, key_bits: int, keymat_bytes: int, integrity: int = 0, integrity_bytes: int = 0
    ) -> None:
        self.transform = transform
        self.key_bits = key_bits
        self.keymat_bytes = keymat_bytes
        self.integrity = integrity
        self.integrity_bytes = integrity_bytes
        self.is_combined = integrity == 0
        self.iv_bytes = 8 if self.is_combined else 16
        self.icv_bytes = 16 if self.is_combined else integrity_bytes // 2


COMBINED_SUITES = tuple(suite for suite in EspSuite if suite.is_combined)
CBC_SUITES = tuple(suite for suite in EspSuite if not suite.is_combined)


@dataclass(frozen=True, slots=True)
class ChildSa:
    """Both directions of one Child SA (RFC 7296 section 2.17).

    `id` names it on this machine for ever (a counter: never used again); `network` names whose TUN it belongs to.
    `key_in` and `key_out` are keying material of `suite.keymat_bytes` bytes, salt or integrity key last. Selectors are
    from our side: `local` are our addresses, `remote` the peer's. Inbound packets are accepted from any outer address,
    since ESP authenticates them; `path` is where outbound packets go.
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
