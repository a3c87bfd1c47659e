"""Strangers before anything is kept of them: who is half-open, who needs a cookie, and what a flood costs.

An IKE_SA_INIT request costs a few microseconds while there is a crowd: its header and the generic headers up to its
nonce are looked at, and the answer is a cookie (RFC 7296 section 2.6). `screen` is that path by itself, so that whoever
reads the socket may ask it first.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from p2pvpn.core.errors import WireError
from p2pvpn.core.ports import Entropy

from .codes import Exchange, PayloadType
from .config import IkeSettings
from .cookies import MAX_COOKIE_BYTES, CookieJar
from .message import (
    FLAG_INITIATOR,
    FLAG_RESPONSE,
    GENERIC_BYTES,
    HEADER_BYTES,
    MAJOR_VERSION,
    NO_SPI,
    SPI_BYTES,
)
from .notifies import NotifyType
from .payloads import MAX_NONCE_BYTES, MIN_NONCE_BYTES

if TYPE_CHECKING:
    from .sa import IkeSa

_NOTIFY_BYTES = 4
"""Of a notification before its data: protocol, SPI size, type."""
_FIRST = bytes((MAJOR_VERSION << 4, Exchange.IKE_SA_INIT))
_COOKIE_HEAD = bytes((0, 0)) + int(NotifyType.COOKIE).to_bytes(2, "big")

Source = tuple[str, int]
"""Host in its normal form, and port; an `Endpoint` is one."""
InitKey = tuple[Source, bytes]


@dataclass(slots=True)
class InitCounts:
    """IKE_SA_INIT requests of strangers that came, and how many of them were asked for a cookie."""

    requests: int = 0
    cookies_asked: int = 0


class Doorstep:
    """The half-open SAs of an endpoint by source and by first message."""

    def __init__(self, settings: IkeSettings, entropy: Entropy) -> None:
        self.counts = InitCounts()
        self._settings = settings
        self._cookies = CookieJar(entropy)
        self._inits: dict[InitKey, IkeSa] = {}
        self._key_of: dict[bytes, InitKey] = {}
        self._sources: Counter[Source] = Counter()
        self._half_open: Counter[str] = Counter()
        self._source_of: dict[int, str] = {}

    @property
    def half_open(self) -> int:
        """How many there are."""
        return len(self._source_of)

    def known(self, source: Source, data: bytes) -> IkeSa | None:
        """The SA that this very message made."""
        return self._inits.get((source, hashlib.sha256(data).digest())) if source in self._sources else None

    def is_crowded(self, host: str) -> bool:
        """Whether a request from there needs a cookie."""
        settings = self._settings
        if len(self._source_of) >= settings.cookie_total:
            return True
        return self._half_open[network_of(host)] >= settings.cookie_per_source if self._half_open else False

    def is_full(self, host: str) -> bool:
        """Whether nobody from there gets in, cookie or not."""
        settings = self._settings
        crowd, here = len(self._source_of), self._half_open[network_of(host)]
        return crowd >= settings.half_open_max or here >= settings.half_open_per_source

    def screen(self, source: Source, data: bytes, now: float) -> bytes | None:
        """What to send back to a datagram without its marker, when a cookie is all that it gets; empty for nothing.

        None when the endpoint has to look at it: it is something else, or there is no crowd, or it has its cookie.
        """
        if data[17:19] != _FIRST or data[8:16] != NO_SPI or len(data) < HEADER_BYTES:
            return None
        if not self.is_crowded(source[0]) or data[19] & (FLAG_INITIATOR | FLAG_RESPONSE) != FLAG_INITIATOR:
            return None
        try:
            cookie = self.cookie_untrusted(source[0], data, now)
        except WireError:
            return b""
        if cookie is None or self.known(source, data) is not None:
            return None
        self.counts.requests += 1
        return cookie_answer(data, cookie)

    def cookie_untrusted(self, host: str, data: bytes, now: float) -> bytes | None:
        """The cookie to ask for; None when the request carries it. Looks at no more than it must. Raises WireError."""
        if len(data) < HEADER_BYTES or int.from_bytes(data[24:28], "big") != len(data):
            raise WireError("a length that lies")
        nonce, cookie = _nonce_and_cookie_untrusted(data)
        spi_i = data[:SPI_BYTES]
        if cookie and self._cookies.holds(cookie, host, spi_i, nonce, now):
            return None
        self.counts.cookies_asked += 1
        return self._cookies.make(host, spi_i, nonce, now)

    def enter(self, sa: IkeSa, source: Source, data: bytes) -> None:
        """A half-open SA that this message made."""
        key = (source, hashlib.sha256(data).digest())
        self._inits[key] = sa
        self._sources[key[0]] += 1
        self._key_of[sa.local_spi] = key
        network = self._source_of[sa.id] = network_of(source[0])
        self._half_open[network] += 1

    def leave(self, sa: IkeSa) -> None:
        """It is half-open no more."""
        network = self._source_of.pop(sa.id, None)
        if network is not None:
            self._half_open[network] -= 1
            if not self._half_open[network]:
                del self._half_open[network]

    def forget(self, sa: IkeSa) -> None:
        """The SA is gone."""
        key = self._key_of.pop(sa.local_spi, None)
        if key is not None:
            del self._inits[key]
            self._sources[key[0]] -= 1
            if not self._sources[key[0]]:
                del self._sources[key[0]]


def network_of(host: str) -> str:
    """What counts as one source: an IPv4 address, or an IPv6 /64."""
    return ipaddress.ip_address(host).packed[:8].hex() if ":" in host else host


def cookie_answer(request: bytes, cookie: bytes) -> bytes:
    """The whole message that asks for a cookie in answer to an IKE_SA_INIT request."""
    size = HEADER_BYTES + GENERIC_BYTES + _NOTIFY_BYTES + len(cookie)
    head = request[:SPI_BYTES] + NO_SPI + bytes((PayloadType.NOTIFY,)) + _FIRST + bytes((FLAG_RESPONSE,))
    body = bytes(2) + (size - HEADER_BYTES).to_bytes(2, "big") + _COOKIE_HEAD + cookie
    return head + request[20:24] + size.to_bytes(4, "big") + body


def _nonce_and_cookie_untrusted(data: bytes) -> tuple[bytes, bytes]:
    """The nonce, and the cookie if it is the first payload, else nothing. Raises WireError."""
    kind, at, size = data[16], HEADER_BYTES, len(data)
    cookie = b""
    while kind:
        if at + GENERIC_BYTES > size:
            break
        end = at + (data[at + 2] << 8 | data[at + 3])
        if end < at + GENERIC_BYTES or end > size:
            break
        body = at + GENERIC_BYTES
        if kind == PayloadType.NONCE:
            if not MIN_NONCE_BYTES <= end - body <= MAX_NONCE_BYTES:
                break
            return data[body:end], cookie
        if at == HEADER_BYTES and kind == PayloadType.NOTIFY and data[body + 2 : body + 4] == _COOKIE_HEAD[2:]:
            cookie = data[body + _NOTIFY_BYTES : end]
            if not 1 <= len(cookie) <= MAX_COOKIE_BYTES or data[body + 1]:
                raise WireError("a cookie of a length that cannot be")
        kind, at = data[at], end
    raise WireError("no nonce")
