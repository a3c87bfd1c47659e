"""Simulated streams: mesh.ports.Streams over a lossless, ordered, delayed way that no NAT and no filter of UDP stops.

    engine -> 127.64.0.1:40001 -> the way to the hub, as long as there is one -> 127.64.0.9:40007 -> the hub's engine

TCP and TLS are three round trips at the beginning. A way that breaks ends the stream at both ends after a while; a
machine that leaves its network, or is given another outside address, loses its streams at once. A router's `portal` is
a captive portal: it answers in the hub's place until somebody logs in (sets it to nothing).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, NamedTuple

from p2pvpn.core.address import STREAM_NETWORK, Endpoint
from p2pvpn.core.ids import PeerId
from p2pvpn.mesh.ports import StreamFailed, StreamTrouble

from .internet import SERIALISATION_S, Segment
from .router import Router

if TYPE_CHECKING:
    from .host import SimHost

CONNECT_S = 3.0
"""How long a connection is tried."""
BROKEN_S = 5.0
"""After this without a way TCP gives up (RFC 5482)."""
MAX_HOPS = 8
FIRST_PORT = 40_000
LOOPBACK = "127.0.0.1"


class Way(NamedTuple):
    """From a host to a hub, as it is now: where it ends, one way's time, the address that the hub sees."""

    hub: SimHost
    delay_s: float
    outside: str
    portal: str


@dataclass(eq=False, slots=True)
class _End:
    """One end of a stream: `near` stands for it on this host, `port` is the local UDP port that uses it."""

    host: SimHost
    near: Endpoint
    port: int
    far: _End | None = None
    arrives_at: float = 0.0


@dataclass(eq=False, slots=True)
class _Stream:
    client: _End
    server: _End
    hub_host: str
    outside: str
    broken: asyncio.TimerHandle | None = field(default=None)


class SimStreams:
    """mesh.ports.Streams of one host."""

    def __init__(self, host: SimHost) -> None:
        self.on_lost: Callable[[Endpoint], None] = lambda stream: None
        self.may_reach: Callable[[int], bool] = lambda port: False
        self.vouched: set[Endpoint] = set()
        self._host = host
        self._streams: dict[Endpoint, _Stream] = {}
        self._hosts: dict[str, str] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._streams)

    async def open(self, hub: Endpoint, hub_id: PeerId, port: int) -> Endpoint:
        way = self._way(hub.host)
        if way is None or (not way.portal and not way.hub.is_running):
            await asyncio.sleep(CONNECT_S)
            raise StreamFailed(StreamTrouble.SILENT)
        await asyncio.sleep(6.0 * way.delay_s)
        if way.portal:
            raise StreamFailed(StreamTrouble.INTERCEPTED, "another certificate")
        there = way.hub.streams
        if not way.hub.is_running or not there.may_reach(port):
            raise StreamFailed(StreamTrouble.REFUSED)
        client = _End(self._host, self._endpoint(""), self._host.underlay.port)
        server = _End(way.hub, there._endpoint(way.outside), port or way.hub.underlay.port)
        client.far, server.far = server, client
        stream = _Stream(client, server, hub.host, way.outside)
        self._streams[client.near] = there._streams[server.near] = stream
        return client.near

    async def find_portal(self, hub: Endpoint, *, intercepted: bool) -> str | None:
        way = self._way(hub.host)
        return way.portal if way is not None and way.portal else None

    def close(self, stream: Endpoint) -> None:
        known = self._streams.get(stream)
        if known is not None:
            self._end(known, tell=known.server if known.client.host is self._host else known.client)

    def vouch(self, stream: Endpoint) -> None:
        self.vouched.add(stream)

    def send(self, port: int, stream: Endpoint, data: bytes) -> None:
        """What a socket of this host sends to a stream's endpoint."""
        known = self._streams.get(stream)
        if known is None:
            return
        end = known.client if known.client.near == stream and known.client.host is self._host else known.server
        far = end.far
        way = known.client.host.streams._way(known.hub_host)
        if far is None or end.port != port:
            return
        if way is None or way.outside != known.outside or not far.host.is_running:
            if known.broken is None:
                known.broken = self._host.loop.call_later(BROKEN_S, self._give_up, known)
            return
        if known.broken is not None:
            known.broken.cancel()
            known.broken = None
        far.arrives_at = max(self._host.loop.time() + way.delay_s, far.arrives_at + SERIALISATION_S)
        self._host.loop.call_at(far.arrives_at, _deliver, known, far, data, context=far.host.context)

    def changed(self) -> None:
        """The host is in another network: connections from the former address are dead."""
        for known in list(self._streams.values()):
            if known.client.host is self._host:
                way = self._way(known.hub_host)
                if way is None or way.outside != known.outside:
                    self._end(known, tell=known.client)

    def crash(self) -> None:
        """The host is gone without a word; the other ends find out."""
        for known in list(self._streams.values()):
            other = known.server.host if known.client.host is self._host else known.client.host
            other.loop.call_later(BROKEN_S, other.streams._give_up, known, context=other.context)
        self._streams.clear()

    def _give_up(self, known: _Stream) -> None:
        for end in (known.client, known.server):
            streams = end.host.streams
            if streams._streams.pop(end.near, None) is not None and end.host.is_running:
                end.host.loop.call_soon(streams.on_lost, end.near, context=end.host.context)

    def _end(self, known: _Stream, tell: _End) -> None:
        for end in (known.client, known.server):
            end.host.streams._streams.pop(end.near, None)
        if tell.host.is_running:
            tell.host.loop.call_soon(tell.host.streams.on_lost, tell.near, context=tell.host.context)

    def _endpoint(self, outside: str) -> Endpoint:
        """A new one; streams from one outside address share a host address."""
        self._next += 1
        first = int(STREAM_NETWORK.network_address)
        host = str(IPv4Address(first + self._next))
        if outside:
            host = self._hosts.setdefault(outside, host)
        return Endpoint(host, FIRST_PORT + self._next % 20_000)

    def _way(self, host: str) -> Way | None:
        """The way that TCP to a public host takes now."""
        internet, outside, portal, delay_s = self._host.internet, "", "", 0.0
        is_ipv6 = ":" in host
        near = next((one for one in self._host.interfaces if one.is_up and one.host(ipv6=is_ipv6)), None)
        for _ in range(MAX_HOPS):
            if near is None:
                return None
            segment: Segment = near.segment
            hop = segment.next_hop(host)
            if hop is None or hop is near or not hop.is_up or internet.is_cut(near.node, hop.node):
                return None
            delay_s += near.quality.delay_s + hop.quality.delay_s
            outside = near.host(ipv6=is_ipv6) or outside
            if host in hop.hosts and not isinstance(hop.node, Router):
                return Way(hop.node, delay_s, outside, portal)  # type: ignore[arg-type]  # what is no router is a host
            if not isinstance(hop.node, Router) or hop is not hop.node.inside:
                return None
            portal = portal or hop.node.portal
            near = hop.node.outside
        return None


def _deliver(known: _Stream, end: _End, data: bytes) -> None:
    """A datagram comes out at this end."""
    host = end.host
    local = Endpoint(LOOPBACK, end.port)
    receiver = host.sockets.find(local)
    if host.is_running and receiver is not None and end.near in host.streams._streams:
        receiver(local, end.near, data)
