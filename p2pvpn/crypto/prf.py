"""Pseudo-random functions of IKEv2 (RFC 7296 section 2.13, RFC 4868)."""

from __future__ import annotations

import hmac
from enum import Enum

from p2pvpn.core.errors import LocalError


class Prf(Enum):
    """IANA transform ID (type 2), hash name, output bytes (which is also the preferred key length)."""

    HMAC_SHA2_256 = (5, "sha256", 32)
    HMAC_SHA2_384 = (6, "sha384", 48)
    HMAC_SHA2_512 = (7, "sha512", 64)

    def __init__(self, transform: int, hash_name: str, size: int) -> None:
        self.transform = transform
        self.hash_name = hash_name
        self.size = size

    def __call__(self, key: bytes, data: bytes) -> bytes:
        return hmac.digest(key, data, self.hash_name)

    def plus(self, key: bytes, seed: bytes, length: int) -> bytes:
        """prf+(key, seed), the first `length` bytes (RFC 7296 section 2.13)."""
        if length > 255 * self.size:
            raise LocalError("prf+ ends after 255 blocks")
        out = b""
        block = b""
        counter = 0
        while len(out) < length:
            counter += 1
            block = self(key, block + seed + bytes([counter]))
            out += block
        return out[:length]
