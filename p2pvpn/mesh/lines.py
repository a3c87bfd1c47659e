"""The streams of one machine as the engine uses them: what each stands for, and who is told when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from p2pvpn.core.address import Endpoint
from p2pvpn.core.ids import PeerId

from .ports import StreamFailed, Streams, StreamTrouble


@dataclass(slots=True, eq=False)
class Line:
    """A stream: `stream` is our loopback endpoint, `udp` the hub's endpoint that it stands for, `tcp` where it goes."""

    stream: Endpoint
    udp: Endpoint
    tcp: Endpoint
    on_lost: Callable[[Line], None]
    is_leaving: bool = False


class Lines:
    """All streams that we opened. Without a `Streams` there are none, and none can be had."""

    def __init__(self, streams: Streams | None, linger_s: float) -> None:
        self._streams = streams
        self._linger_s = linger_s
        self._lines: dict[Endpoint, Line] = {}
        if streams is not None:
            streams.on_lost = self._on_lost

    @property
    def can_open(self) -> bool:
        return self._streams is not None

    async def open(
        self,
        hub_id: PeerId,
        ways: Iterable[tuple[Endpoint, Endpoint]],
        on_lost: Callable[[Line], None],
        *,
        relay: bool = False,
        look_for_portal: bool = False,
    ) -> Line:
        """A stream by the first way that works, each the hub's TLS endpoint and the UDP endpoint that is wanted.

        The UDP port is that of IKE unless it is one of the `relay`. Raises StreamFailed.
        """
        tcp = None
        failure = StreamFailed(StreamTrouble.SILENT, "no address of the hub is known")
        for tcp, udp in ways:
            if self._streams is None:
                break
            try:
                stream = await self._streams.open(tcp, hub_id, udp.port if relay else 0)
            except StreamFailed as problem:
                failure = problem
                continue
            line = self._lines[stream] = Line(stream, udp, tcp, on_lost)
            return line
        if look_for_portal and tcp is not None and self._streams is not None:
            is_intercepted = failure.trouble is StreamTrouble.INTERCEPTED
            portal = await self._streams.find_portal(tcp, intercepted=is_intercepted)
            if portal is not None:
                raise StreamFailed(StreamTrouble.PORTAL, portal)
        raise failure

    def at(self, stream: Endpoint) -> Line | None:
        return self._lines.get(stream)

    def udp_of(self, endpoint: Endpoint) -> Endpoint:
        """The hub's own endpoint that a stream stands for; any other endpoint stands for itself."""
        line = self._lines.get(endpoint)
        return endpoint if line is None else line.udp

    def show(self, endpoint: Endpoint) -> str:
        """An endpoint for a person."""
        line = self._lines.get(endpoint)
        return str(endpoint) if line is None else f"{line.tcp} (TCP)"

    def leave(self, stream: Endpoint) -> None:
        """Nothing will be sent over it any more; what is in flight still arrives."""
        line = self._lines.get(stream)
        if line is not None and not line.is_leaving:
            line.is_leaving = True
            asyncio.get_running_loop().call_later(self._linger_s, self._close, line)

    def vouch(self, stream: Endpoint) -> None:
        """A member is behind a stream that came to us."""
        if self._streams is not None and stream.is_stream:
            self._streams.vouch(stream)

    def _close(self, line: Line) -> None:
        if self._streams is not None and self._lines.get(line.stream) is line:
            del self._lines[line.stream]
            self._streams.close(line.stream)

    def _on_lost(self, stream: Endpoint) -> None:
        line = self._lines.get(stream)
        if line is not None and not line.is_leaving:
            line.on_lost(line)  # It is known what it stood for until somebody leaves it.

    def close(self) -> None:
        """End all."""
        for line in list(self._lines.values()):
            self._close(line)
