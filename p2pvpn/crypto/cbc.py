"""AES-CBC with HMAC-SHA2 (RFC 3602, RFC 4868): the ciphers of built-in clients, in IKE and ESP.

    | IV 16 | ciphertext, whole blocks | ICV |       the ICV is over everything before it, with the header of IKE or ESP

The IV must be unpredictable: it is the encryption of a counter under the same key (NIST SP 800-38A appendix C).
"""

from __future__ import annotations

import hmac

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from p2pvpn.core.child import EspSuite
from p2pvpn.core.errors import TrustError

BLOCK_BYTES = 16


_HASHES = {12: "sha256", 13: "sha384", 14: "sha512"}
"""By IANA transform ID (type 3); ICVs are their first halves (RFC 4868 section 2.6)."""


def hash_name(suite: EspSuite) -> str:
    """Of its HMAC."""
    return _HASHES[suite.integrity]


class CbcHmac:
    """One direction: encrypt, then authenticate."""

    __slots__ = ("_aes", "_hash", "_icv_bytes", "_integrity_key")

    def __init__(self, suite: EspSuite, keymat: bytes) -> None:
        """`keymat` is the key of the cipher, then that of the HMAC."""
        if len(keymat) != suite.keymat_bytes:
            raise ValueError(f"{suite.name} takes {suite.keymat_bytes} bytes of keying material, not {len(keymat)}")
        self._aes = algorithms.AES(keymat[: suite.key_bits // 8])
        self._integrity_key = keymat[suite.key_bits // 8 :]
        self._hash = hash_name(suite)
        self._icv_bytes = suite.icv_bytes

    def iv(self, counter: int) -> bytes:
        """Never the same for two counters, and not to be guessed."""
        return Cipher(self._aes, modes.ECB()).encryptor().update(counter.to_bytes(BLOCK_BYTES, "big"))  # noqa: S305

    def seal(self, iv: bytes, plain: bytes, aad: bytes, behind: bytes = b"") -> bytes:
        """Ciphertext and ICV; `plain` is whole blocks, and `behind` is authenticated after it, but not sent."""
        encryptor = Cipher(self._aes, modes.CBC(iv)).encryptor()
        sealed = encryptor.update(plain) + encryptor.finalize()
        return sealed + self._icv(aad + iv + sealed + behind)

    def open(self, iv: bytes, sealed: bytes, aad: bytes, behind: bytes = b"") -> bytes:
        """The plaintext. Raises TrustError before anything is decrypted."""
        body, icv = sealed[: -self._icv_bytes], sealed[-self._icv_bytes :]
        if not hmac.compare_digest(icv, self._icv(aad + iv + body + behind)) or len(body) % BLOCK_BYTES:
            raise TrustError("the integrity check value does not hold")
        decryptor = Cipher(self._aes, modes.CBC(iv)).decryptor()
        return decryptor.update(body) + decryptor.finalize()

    def _icv(self, data: bytes) -> bytes:
        return hmac.digest(self._integrity_key, data, self._hash)[: self._icv_bytes]
