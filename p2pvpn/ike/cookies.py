"""Stateless cookies against floods of half-open SAs (RFC 7296 section 2.6).

    cookie: | generation u32 | HMAC-SHA256(secret of that generation, address | 0 | SPIi | Ni), first 16 bytes |

A cookie proves that its bearer receives packets at the address it sends from. The secret changes once a minute, and
the one before stays good, so a cookie lives one to two minutes.
"""

from __future__ import annotations

import hmac

from p2pvpn.core.ports import Entropy

MAX_COOKIE_BYTES = 64
"""RFC 7296 section 2.6: 1 to 64 octets."""
SECRET_S = 60.0
_SECRET_BYTES = 32
_GENERATION_BYTES = 4
_TAG_BYTES = 16


class CookieJar:
    """Makes and checks cookies; the two newest secrets are all that it remembers."""

    __slots__ = ("_entropy", "_generation", "_made_at", "_secrets")

    def __init__(self, entropy: Entropy) -> None:
        self._entropy = entropy
        self._generation = 0
        self._made_at: float | None = None
        self._secrets: dict[int, bytes] = {}

    def _rotate(self, now: float) -> None:
        if self._made_at is not None and now - self._made_at < SECRET_S:
            return
        stale = self._made_at is not None and now - self._made_at >= 2 * SECRET_S
        self._generation += 2 if stale else 1
        self._secrets[self._generation] = self._entropy(_SECRET_BYTES)
        for old in [number for number in self._secrets if number < self._generation - 1]:
            del self._secrets[old]
        self._made_at = now

    def make(self, host: str, spi_i: bytes, nonce_i: bytes, now: float) -> bytes:
        """The cookie to ask for."""
        self._rotate(now)
        return self._cookie(self._generation, host, spi_i, nonce_i)

    def holds(self, cookie: bytes, host: str, spi_i: bytes, nonce_i: bytes, now: float) -> bool:
        """Whether we made this cookie for this request lately."""
        self._rotate(now)
        generation = int.from_bytes(cookie[:_GENERATION_BYTES], "big")
        if generation not in self._secrets:
            return False
        return hmac.compare_digest(cookie, self._cookie(generation, host, spi_i, nonce_i))

    def _cookie(self, generation: int, host: str, spi_i: bytes, nonce_i: bytes) -> bytes:
        text = host.encode("ascii") + b"\0" + spi_i + nonce_i
        tag = hmac.digest(self._secrets[generation], text, "sha256")[:_TAG_BYTES]
        return generation.to_bytes(_GENERATION_BYTES, "big") + tag
