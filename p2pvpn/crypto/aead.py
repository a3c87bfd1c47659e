"""Authenticated ciphers as IKE (RFC 5282) and ESP (RFC 4106, RFC 7634) use them: explicit IV, implicit salt."""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from p2pvpn.core.child import EspSuite
from p2pvpn.core.errors import TrustError

SALT_BYTES = 4
RawCipher = AESGCM | ChaCha20Poly1305
"""Has encrypt(nonce, data, aad), decrypt(nonce, data, aad), encrypt_into and decrypt_into."""
BadIcv = InvalidTag
"""What a raw cipher raises when the integrity check value does not hold."""


def raw_cipher(suite: EspSuite, keymat: bytes) -> tuple[RawCipher, bytes]:
    """The cipher object and the 4-byte salt from keying material; for per-packet code. Decryption raises InvalidTag."""
    if len(keymat) != suite.keymat_bytes:
        raise ValueError(f"{suite.name} takes {suite.keymat_bytes} bytes of keying material, not {len(keymat)}")
    if not suite.is_combined:
        raise ValueError(f"{suite.name} is no combined cipher")
    key, salt = keymat[:-SALT_BYTES], keymat[-SALT_BYTES:]
    if suite is EspSuite.CHACHA20_POLY1305:
        return ChaCha20Poly1305(key), salt
    return AESGCM(key), salt


class Aead:
    """One direction of a cipher: `seal` and `open` with the 8-byte explicit IV that travels in front."""

    __slots__ = ("_cipher", "_salt", "suite")

    def __init__(self, suite: EspSuite, keymat: bytes) -> None:
        self.suite = suite
        self._cipher, self._salt = raw_cipher(suite, keymat)

    def seal(self, iv: bytes, plain: bytes, aad: bytes) -> bytes:
        """Ciphertext and ICV. An IV must never repeat under one key."""
        return self._cipher.encrypt(self._salt + iv, plain, aad)

    def open(self, iv: bytes, sealed: bytes, aad: bytes) -> bytes:
        """The plaintext. Raises TrustError."""
        try:
            return self._cipher.decrypt(self._salt + iv, sealed, aad)
        except InvalidTag:
            raise TrustError("the integrity check value does not hold") from None
