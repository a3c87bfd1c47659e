"""AES-CBC with HMAC-SHA2 (RFC 3602, RFC 4868): the ciphers of built-in clients. IKE alone uses them here.

    | IV 16 | ciphertext, whole blocks | ICV |        the ICV is over everything before it, the IKE header included

The IV must be unpredictable: it is the encryption of a counter under the same key (NIST SP 800-38A appendix C).
"""

from __future__ import annotations

import hmac
from enum import Enum

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from p2pvpn.core.errors import TrustError

BLOCK_BYTES = 16


class CbcSuite(Enum):
    """Key bits and hash; from them the IANA numbers (types 1 and 3) and all sizes in bytes."""

    AES_CBC_256_HMAC_SHA2_256 = (256, "sha256")
    AES_CBC_256_HMAC_SHA2_384 = (256, "sha384")
    AES_CBC_256_HMAC_SHA2_512 = (256, "sha512")
    AES_CBC_128_HMAC_SHA2_256 = (128, "sha256")

    def __init__(self, key_bits: int, hash_name: str) -> None:
        self.transform = 12
        self.key_bits = key_bits
        self.keymat_bytes = key_bits // 8
        self.iv_bytes = BLOCK_BYTES
        self.hash_name = hash_name
        self.integrity, self.integrity_bytes = {"sha256": (12, 32), "sha384": (13, 48), "sha512": (14, 64)}[hash_name]
        self.icv_bytes = self.integrity_bytes // 2


class CbcHmac:
    """One direction: encrypt, then authenticate."""

    __slots__ = ("_aes", "_integrity_key", "suite")

    def __init__(self, suite: CbcSuite, key: bytes, integrity_key: bytes) -> None:
        self.suite = suite
        self._aes = algorithms.AES(key)
        self._integrity_key = integrity_key

    def iv(self, counter: int) -> bytes:
        """Never the same for two counters, and not to be guessed."""
        return Cipher(self._aes, modes.ECB()).encryptor().update(counter.to_bytes(BLOCK_BYTES, "big"))  # noqa: S305

    def seal(self, iv: bytes, plain: bytes, aad: bytes) -> bytes:
        """Ciphertext and ICV; `plain` is whole blocks."""
        encryptor = Cipher(self._aes, modes.CBC(iv)).encryptor()
        sealed = encryptor.update(plain) + encryptor.finalize()
        return sealed + self._icv(aad + iv + sealed)

    def open(self, iv: bytes, sealed: bytes, aad: bytes) -> bytes:
        """The plaintext. Raises TrustError before anything is decrypted."""
        body, icv = sealed[: -self.suite.icv_bytes], sealed[-self.suite.icv_bytes :]
        if not hmac.compare_digest(icv, self._icv(aad + iv + body)) or len(body) % BLOCK_BYTES:
            raise TrustError("the integrity check value does not hold")
        decryptor = Cipher(self._aes, modes.CBC(iv)).decryptor()
        return decryptor.update(body) + decryptor.finalize()

    def _icv(self, data: bytes) -> bytes:
        return hmac.digest(self._integrity_key, data, self.suite.hash_name)[: self.suite.icv_bytes]
