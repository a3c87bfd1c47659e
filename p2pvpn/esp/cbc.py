"""ESP with AES-CBC and HMAC-SHA2 (RFC 3602, RFC 4868), for the clients that other systems have built in.

    | SPI | low 32 bits of the sequence number | IV, 16 bytes | inner packet, padding to whole blocks | ICV |

The ICV is over all before it and, with ESN, the high 32 bits of the number behind (RFC 4303 section 2.2.1). The IV is
the encryption of the number under the same key, which nobody can guess (NIST SP 800-38A appendix C). Packets go one by
one: batches are for combined ciphers.
"""

from __future__ import annotations

from p2pvpn.core.child import EspSuite
from p2pvpn.core.errors import TrustError
from p2pvpn.crypto.cbc import BLOCK_BYTES, CbcHmac

from .packet import HEADER_BYTES, PADDING, TRAILER_BYTES, unpadded_untrusted


class CbcSealer:
    """The outbound direction of an SA, as `packet.Sealer` is for combined ciphers."""

    __slots__ = ("_cipher", "_spi", "esn", "spi")

    def __init__(self, suite: EspSuite, keymat: bytes, spi: int, *, esn: bool) -> None:
        self._cipher = CbcHmac(suite, keymat)
        self.spi = spi
        self._spi = spi.to_bytes(4, "big")
        self.esn = esn

    def seal(self, sequence: int, packet: bytes, next_header: int) -> bytes:
        """The datagram for an inner packet. A `sequence` (64 bits) must never be given twice."""
        number = sequence.to_bytes(8, "big")
        header = self._spi + number[4:]
        pad = -(len(packet) + TRAILER_BYTES) % BLOCK_BYTES
        plain = packet + PADDING[:pad] + bytes((pad, next_header))
        iv = self._cipher.iv(sequence)
        return header + iv + self._cipher.seal(iv, plain, header, number[:4] if self.esn else b"")


class CbcOpener:
    """The inbound direction of an SA, as `packet.Opener` is for combined ciphers."""

    __slots__ = ("_cipher", "_shortest_bytes", "esn")

    def __init__(self, suite: EspSuite, keymat: bytes, *, esn: bool) -> None:
        self._cipher = CbcHmac(suite, keymat)
        self._shortest_bytes = HEADER_BYTES + 2 * BLOCK_BYTES + suite.icv_bytes
        self.esn = esn

    def open_untrusted(self, sequence: int, data: bytes) -> tuple[int, bytes]:
        """Next header and payload of a datagram; `sequence` is its whole number, with ESN the estimated one.

        Raises TrustError when the ICV does not hold, WireError for wrong padding.
        """
        if len(data) < self._shortest_bytes:
            raise TrustError("too short for an integrity check value")
        behind = (sequence >> 32).to_bytes(4, "big") if self.esn else b""
        at = HEADER_BYTES + BLOCK_BYTES
        return unpadded_untrusted(self._cipher.open(data[HEADER_BYTES:at], data[at:], data[:HEADER_BYTES], behind))
