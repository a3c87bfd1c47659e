"""The simulated relay forwarder: pairs of ports on a hub, bytes in at one leave unchanged from the other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from p2pvpn.core.address import Endpoint
from p2pvpn.core.errors import LocalError
from p2pvpn.relay.wire import is_bind

from .sockets import Sender, SocketTable

FIRST_PORT = 61_000
LAST_PORT = 65_535
"""Relay ports: above the range that other sockets of the host get theirs from."""


class _Side:
    """One port of a pair."""

    __slots__ = ("port", "source", "twin")

    def __init__(self, port: int) -> None:
        self.port = port
        self.source: Endpoint | None = None
        self.twin = self


class _Pair:
    """What both sides share: the time of the last packet, and bytes so far."""

    __slots__ = ("bytes", "sides", "used_at")

    def __init__(self, sides: tuple[_Side, _Side], now: float) -> None:
        self.sides = sides
        self.used_at = now
        self.bytes = 0


class SimForwarder:
    """mesh.ports.Forwarder."""

    on_unbound: Callable[[int, Endpoint, bytes], None]

    def __init__(self, sockets: SocketTable, send: Sender) -> None:
        self.on_unbound = _ignore_unbound
        self._sockets = sockets
        self._send = send
        self._sides: dict[int, _Side] = {}
        self._pairs: dict[int, _Pair] = {}
        self._next = FIRST_PORT

    async def open_pair(self) -> tuple[int, int]:
        sides = (_Side(self._open()), _Side(self._open()))
        sides[0].twin, sides[1].twin = sides[1], sides[0]
        pair = _Pair(sides, asyncio.get_running_loop().time())
        for side in sides:
            self._sides[side.port] = side
            self._pairs[side.port] = pair
        return sides[0].port, sides[1].port

    def bind(self, port: int, source: Endpoint) -> None:
        if port not in self._sides:
            raise LocalError(f"{port} is no relay port")
        self._sides[port].source = source

    def answer(self, port: int, to: Endpoint, data: bytes) -> None:
        if port in self._sides:
            self._send_from(port, to, data)

    def used_at(self, port: int) -> tuple[float, int]:
        pair = self._pairs.get(port)
        if pair is None:
            raise LocalError(f"{port} is no relay port")
        return pair.used_at, pair.bytes

    def close_pair(self, port: int) -> None:
        pair = self._pairs.get(port)
        if pair is not None:
            for side in pair.sides:
                self._sockets.unbind(None, side.port)
                del self._sides[side.port], self._pairs[side.port]

    def _open(self) -> int:
        for _ in range(FIRST_PORT, LAST_PORT + 1):
            port = self._next
            self._next = port + 1 if port < LAST_PORT else FIRST_PORT
            try:
                return self._sockets.bind(None, port, self._receive)
            except OSError:
                continue
        raise LocalError("no relay port is left")

    def _receive(self, local: Endpoint, source: Endpoint, data: bytes) -> None:
        side = self._sides[local.port]
        onward = side.twin.source
        if side.source != source or onward is None or is_bind(data):
            self.on_unbound(local.port, source, data)
            return
        pair = self._pairs[local.port]
        pair.used_at = asyncio.get_running_loop().time()
        pair.bytes += len(data)
        self._send_from(side.twin.port, onward, data)

    def _send_from(self, port: int, to: Endpoint, data: bytes) -> None:
        if self._sockets.is_open:
            self._send(Endpoint("::" if to.is_ipv6 else "0.0.0.0", port), to, data)  # noqa: S104 (routing picks it)


def _ignore_unbound(port: int, source: Endpoint, data: bytes) -> None:
    """Until the relay server listens."""
