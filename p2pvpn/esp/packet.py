"""The ESP packet (RFC 4303) with combined-mode ciphers (RFC 4106, RFC 7634), as it travels behind a UDP header.

     0                   1                   2                   3
    +---------------------------------------------------------------+
    |                 SPI (the two top bits are set)                |  AAD: SPI and sequence number; with ESN
    +---------------------------------------------------------------+  the high 32 bits stand between them
    |                 low 32 bits of the sequence number            |
    +---------------------------------------------------------------+
    |                                                               |
    +                 IV, 8 bytes: the whole sequence number        +  nonce: 4 bytes of salt, then the IV
    |                                                               |
    +---------------------------------------------------------------+
    |  inner packet, padding 1, 2, 3 .. to 4 bytes                  |  encrypted
    +                               +---------------+---------------+
    |                               |  pad length   |  next header  |
    +---------------------------------------------------------------+
    |                 ICV, 16 bytes                                 |
    +---------------------------------------------------------------+

A counter is a fine IV for these ciphers: it need not be secret, only never repeat under one key (RFC 4106 section 3.1).
"""

from __future__ import annotations

from p2pvpn.core.child import EspSuite
from p2pvpn.core.errors import TrustError, WireError
from p2pvpn.crypto.aead import BadIcv, raw_cipher

HEADER_BYTES = 8
IV_BYTES = 8
ICV_BYTES = 16
TRAILER_BYTES = 2
OVERHEAD_BYTES = HEADER_BYTES + IV_BYTES + TRAILER_BYTES + ICV_BYTES
"""What ESP adds to an inner packet, without padding."""
SHORTEST_BYTES = HEADER_BYTES + IV_BYTES + 4 + ICV_BYTES
"""One aligned word of ciphertext: nothing shorter can be ESP."""
UDP_HEADER_BYTES = 8

NEXT_IPV4 = 4
NEXT_IPV6 = 41
NEXT_NONE = 59
"""A dummy packet for traffic-flow confidentiality (RFC 4303 section 2.6)."""

PADDING = bytes(range(1, 256))
"""As much of it as there is to fill (RFC 4303 section 2.4)."""


def _trailers(next_header: int) -> tuple[bytes, ...]:
    return tuple(PADDING[:pad] + bytes([pad, next_header]) for pad in range(4))


_TRAILERS = {version: _trailers(version) for version in (NEXT_IPV4, NEXT_IPV6, NEXT_NONE)}


def trailer_of(size: int, next_header: int) -> bytes:
    """Padding, its length and the next header for a packet of `size` bytes."""
    return _TRAILERS[next_header][-(size + TRAILER_BYTES) & 3]


def unpadded_untrusted(plain: bytes) -> tuple[int, bytes]:
    """Next header and payload of a decrypted text of four bytes at least. Raises WireError for wrong padding."""
    pad = plain[-2]
    end = len(plain) - TRAILER_BYTES - pad
    # RFC 4303 section 2.4: 1, 2, 3 .., and the receiver should look.
    if end < 0 or (pad and plain[end:-2] != PADDING[:pad]):
        raise WireError("the padding is not 1, 2, 3 ..")
    return plain[-1], plain[:end]


def inner_mtu(outer_mtu: int, *, outer_ipv6: bool, suite: EspSuite = EspSuite.AES_GCM_16_256) -> int:
    """The largest inner packet whose ESP-in-UDP packet fits `outer_mtu` bytes, IP header included."""
    room = outer_mtu - (40 if outer_ipv6 else 20) - UDP_HEADER_BYTES - HEADER_BYTES - suite.iv_bytes - suite.icv_bytes
    block = 4 if suite.is_combined else suite.iv_bytes
    return room // block * block - TRAILER_BYTES


class Sealer:
    """The outbound direction of an SA: key, salt and SPI. It counts nothing."""

    __slots__ = ("_encrypt", "_spi", "encrypt_into", "esn", "salt", "spi")

    def __init__(self, suite: EspSuite, keymat: bytes, spi: int, *, esn: bool) -> None:
        cipher, self.salt = raw_cipher(suite, keymat)
        self._encrypt = cipher.encrypt
        self.encrypt_into = cipher.encrypt_into
        self.spi = spi
        self._spi = spi.to_bytes(4, "big")
        self.esn = esn

    def seal(self, sequence: int, packet: bytes, next_header: int) -> bytes:
        """The datagram for an inner packet. A `sequence` (64 bits) must never be given twice."""
        iv = sequence.to_bytes(8, "big")
        header = self._spi + iv[4:]
        trailer = trailer_of(len(packet), next_header)
        sealed = self._encrypt(self.salt + iv, packet + trailer, self._spi + iv if self.esn else header)
        return header + iv + sealed


class Opener:
    """The inbound direction of an SA: key, salt. It remembers nothing."""

    __slots__ = ("_decrypt", "decrypt_into", "esn", "salt")

    def __init__(self, suite: EspSuite, keymat: bytes, *, esn: bool) -> None:
        cipher, self.salt = raw_cipher(suite, keymat)
        self._decrypt = cipher.decrypt
        self.decrypt_into = cipher.decrypt_into
        self.esn = esn

    def open_untrusted(self, sequence: int, data: bytes) -> tuple[int, bytes]:
        """Next header and payload of a datagram; `sequence` is its whole number, with ESN the estimated one.

        Raises TrustError when the ICV does not hold, WireError for what is too short or wrongly padded.
        """
        if len(data) < SHORTEST_BYTES or len(data) & 3:
            raise WireError(f"an ESP packet of {len(data)} bytes")
        aad = data[:4] + sequence.to_bytes(8, "big") if self.esn else data[:8]
        try:
            plain = self._decrypt(self.salt + data[8:16], data[16:], aad)
        except BadIcv:
            raise TrustError("the integrity check value does not hold") from None
        return unpadded_untrusted(plain)
