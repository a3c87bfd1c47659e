"""Sealing and opening of protected messages (RFC 7296 section 3.14, RFC 5282, RFC 7383).

    SK:    | header 28 | next u8 | 0 | length u16 |                              | IV | ciphertext ... | ICV |
    SKF:   | header 28 | next u8 | 0 | length u16 | number u16 | total u16       | IV | ciphertext ... | ICV |
    plain: | chain, or a piece of one | padding ... | pad length u8 |

Everything before the IV is authenticated too. An encrypted payload is the only one of its message; anything before or
behind it is refused. The IV comes from a counter, so it never repeats under one key.
"""

from __future__ import annotations

from dataclasses import dataclass

from p2pvpn.core.errors import WireError
from p2pvpn.core.secret import Secret
from p2pvpn.core.wire import Reader
from p2pvpn.crypto.aead import Aead
from p2pvpn.crypto.cbc import BLOCK_BYTES, CbcHmac

from .codes import PayloadType
from .keys import IkeKeys
from .message import GENERIC_BYTES, HEADER_BYTES, Header, parse_header_untrusted
from .proposals import IkeCipher

FRAGMENT_HEAD_BYTES = 4
PAD_LENGTH_BYTES = 1


def fragment_overhead_bytes(cipher: IkeCipher) -> int:
    """What a fragment is at most larger than the piece of the chain that it carries."""
    padding = PAD_LENGTH_BYTES if cipher.is_combined else BLOCK_BYTES
    return HEADER_BYTES + GENERIC_BYTES + FRAGMENT_HEAD_BYTES + cipher.iv_bytes + padding + cipher.icv_bytes


@dataclass(frozen=True, slots=True)
class Opened:
    """A decrypted message, or one fragment of it: the first payload's type, the plaintext, and which piece it is."""

    first: int
    plain: bytes
    number: int = 1
    total: int = 1


class _Combined(Aead):
    """A combined cipher with the counter itself as IV."""

    __slots__ = ()

    def iv(self, counter: int) -> bytes:
        return counter.to_bytes(self.suite.iv_bytes, "big")


def _direction(cipher: IkeCipher, key: Secret, integrity_key: Secret) -> _Combined | CbcHmac:
    if not cipher.is_combined:
        return CbcHmac(cipher, key.reveal() + integrity_key.reveal())
    return _Combined(cipher, key.reveal())


class Protection:
    """Both directions of SK_e and SK_a of one IKE SA."""

    __slots__ = ("_inbound", "_next_iv", "_outbound", "cipher")

    def __init__(self, keys: IkeKeys, initiator: bool) -> None:
        forth = _direction(keys.cipher, keys.ei, keys.ai)
        back = _direction(keys.cipher, keys.er, keys.ar)
        self._outbound, self._inbound = (forth, back) if initiator else (back, forth)
        self._next_iv = 0
        self.cipher = keys.cipher

    @property
    def fragment_overhead_bytes(self) -> int:
        return fragment_overhead_bytes(self.cipher)

    def seal(self, header: Header, first: int, chain: bytes) -> bytes:
        """A whole message with one SK payload."""
        return self._seal(header, PayloadType.SK, first, b"", chain)

    def seal_fragment(self, header: Header, first: int, piece: bytes, number: int, total: int) -> bytes:
        """A whole message with one SKF payload. Only the first fragment says which payload comes first."""
        head = number.to_bytes(2, "big") + total.to_bytes(2, "big")
        return self._seal(header, PayloadType.SKF, first if number == 1 else PayloadType.NONE, head, piece)

    def _seal(self, header: Header, kind: int, first: int, head: bytes, plain: bytes) -> bytes:
        cipher = self.cipher
        padding = 0 if cipher.is_combined else -(len(plain) + PAD_LENGTH_BYTES) % BLOCK_BYTES
        plain += bytes(padding) + bytes([padding])
        payload_bytes = GENERIC_BYTES + len(head) + cipher.iv_bytes + len(plain) + cipher.icv_bytes
        aad = header.build(kind, HEADER_BYTES + payload_bytes)
        aad += bytes([first, 0]) + payload_bytes.to_bytes(2, "big") + head
        iv = self._outbound.iv(self._next_iv)
        self._next_iv += 1
        return aad + iv + self._outbound.seal(iv, plain, aad)

    def open_untrusted(self, data: bytes) -> Opened:
        """Decrypts. Raises WireError when the form is wrong, TrustError when the integrity does not hold."""
        _, kind = parse_header_untrusted(data)
        reader = Reader(data)
        reader.take(HEADER_BYTES)
        first, _, length = reader.u8(), reader.u8(), reader.u16()
        if length != len(data) - HEADER_BYTES:
            raise WireError("the encrypted payload is not the only one")
        number = total = 1
        if kind == PayloadType.SKF:
            number, total = reader.u16(), reader.u16()
        elif kind != PayloadType.SK:
            raise WireError("a message that should be encrypted is not")
        aad = data[: reader.position]
        iv = reader.take(self.cipher.iv_bytes)
        plain = self._inbound.open(iv, reader.rest(), aad)
        if not plain or plain[-1] >= len(plain):
            raise WireError("more padding than plaintext")
        return Opened(first, plain[: len(plain) - 1 - plain[-1]], number, total)
