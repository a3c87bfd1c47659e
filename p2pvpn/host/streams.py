"""Streams of this machine: `mesh.ports.Streams` over TLS, and on hubs the streams that the listener takes in.

    client   127.64.1.2:40001 --UDP--> our port 4500      the endpoint stands for the hub's port
    hub      127.64.3.4:50001 --UDP--> its port 4500      the endpoint stands for the client

Only sockets of ours are bound there, each connected to the one port that it talks to, so no other process of the
machine can put a word in; what anybody could send to port 4500 from a loopback address of his own is a datagram like
any stranger's. On a hub all streams from one outside address have one loopback address, so that whatever counts or
compares sources (half-open IKE SAs, cookies, relay bindings) means for streams what it means for UDP.

A stream that no member proved to be behind within UNPROVEN_S is closed, and one that says nothing for SILENT_S.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import secrets
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from p2pvpn.core.address import STREAM_NETWORK, Endpoint
from p2pvpn.core.errors import P2pvpnError
from p2pvpn.core.ids import PeerId
from p2pvpn.ike.stream import build_head
from p2pvpn.mesh.ports import StreamFailed, StreamTrouble

from .netlink import Netlink
from .portal import find_portal
from .stream_end import StreamEnd
from .tls import TlsPipe, client_context, name_of

CONNECT_S = 4.0
"""TCP and TLS together: three round trips."""
UNPROVEN_S = 15.0
"""From a stream's head to IKE_AUTH: four round trips and retransmissions; a relay binding takes one."""
SILENT_S = 900.0
"""Twice as long as a hub's tunnel may be idle before either side asks whether the other lives."""
MAX_STREAMS = 2048
"""On one hub: a tunnel and some relays each for several hundred members."""
LOOK_S = 5.0
LOOPBACK = "127.0.0.1"
DRAWS = 32

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Stream:
    """`source` is the outside address on a hub, empty for streams that we opened; `local` where TCP leaves from."""

    end: StreamEnd
    near: Endpoint
    source: str
    local: str
    began_at: float
    settled: Callable[[], None]
    """Told once, when a member is behind it or it is over."""
    is_proven: bool = False


class HostStreams:
    """Implements `mesh.ports.Streams`. `port` is our own UDP port; `close_all` at the end."""

    def __init__(self, port: int, *, unproven_s: float = UNPROVEN_S, look_s: float = LOOK_S) -> None:
        self._unproven_s = unproven_s
        self._look_s = look_s
        self.on_lost: Callable[[Endpoint], None] = lambda stream: None
        self.may_reach: Callable[[int], bool] = lambda port: False
        self._port = port
        self._streams: dict[Endpoint, _Stream] = {}
        self._host_of: dict[str, str] = {}
        """The loopback address of all streams from one outside address."""
        self._loop = asyncio.get_running_loop()
        self._looking: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._streams)

    # mesh.ports.Streams

    async def open(self, hub: Endpoint, hub_id: PeerId, port: int) -> Endpoint:
        end = StreamEnd(TlsPipe(client_context(), server=False, name=name_of(hub_id)), server=False)
        try:
            await self._connect(end, hub, hub_id)
            sock, near = self._socket(None, self._port)
        except BaseException:
            end.close()
            raise
        end.write(build_head(port))
        self._keep(_Stream(end, near, "", end.local_host, self._loop.time(), lambda: None, is_proven=True), sock)
        return near

    async def find_portal(self, hub: Endpoint, *, intercepted: bool) -> str | None:
        return await find_portal(hub.host, intercepted=intercepted)

    def close(self, stream: Endpoint) -> None:
        known = self._forget(stream)
        if known is not None:
            known.end.on_closed = lambda: None
            known.end.close()
            if not known.is_proven:
                known.settled()

    def vouch(self, stream: Endpoint) -> None:
        known = self._streams.get(stream)
        if known is not None and not known.is_proven:
            known.is_proven = True
            known.settled()

    # The hub's side.

    def accept(self, end: StreamEnd, port: int, source: str, settled: Callable[[], None]) -> bool:
        """A client wants a stream to `port`, 0 for that of IKE; whether it gets it. `settled` is called once, when a
        member proved to be behind it or it is over.
        """
        if not self.may_reach(port) or len(self._streams) >= MAX_STREAMS:
            return False
        try:
            sock, near = self._socket(source, port or self._port)
        except StreamFailed as problem:
            log.warning("no stream for %s: %s", source, problem)
            return False
        self._keep(_Stream(end, near, source, "", self._loop.time(), settled), sock)
        return True

    # Both.

    @contextlib.contextmanager
    def watching(self, netlink: Netlink) -> Iterator[None]:
        """Connections from an address that the machine has no more are dead: know it at once."""
        netlink.watch(self._on_change)
        try:
            yield
        finally:
            netlink.unwatch(self._on_change)

    def _on_change(self) -> None:
        gone = {local for local in {known.local for known in self._streams.values()} if local and not _is_ours(local)}
        for known in list(self._streams.values()):
            if known.local in gone:
                known.end.close()

    def close_all(self) -> None:
        """The daemon goes down."""
        for stream in list(self._streams):
            self.close(stream)
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None

    async def _connect(self, end: StreamEnd, hub: Endpoint, hub_id: PeerId) -> None:
        """TCP and TLS to the hub itself. Raises StreamFailed."""
        ready: asyncio.Future[None] = self._loop.create_future()

        def settle() -> None:
            if not ready.done():
                ready.set_result(None)

        end.on_ready = end.on_closed = settle
        try:
            async with asyncio.timeout(CONNECT_S):
                await self._loop.create_connection(lambda: end, hub.host, hub.port)
                await ready
        except (OSError, TimeoutError) as problem:
            raise StreamFailed(StreamTrouble.SILENT, _reason(problem)) from None
        assert end.tls is not None
        if end.is_closed or not end.tls.is_ready:
            if end.failure is None:
                raise StreamFailed(StreamTrouble.SILENT, "the connection is cut off")
            said = "it speaks HTTP" if end.tls.answers_http else str(end.failure)
            raise StreamFailed(StreamTrouble.INTERCEPTED, said)
        try:
            is_hub = end.tls.peer_id_untrusted() == hub_id
        except P2pvpnError:
            is_hub = False
        if not is_hub:
            raise StreamFailed(StreamTrouble.INTERCEPTED, "another certificate")

    def _socket(self, source: str | None, port: int) -> tuple[socket.socket, Endpoint]:
        """A UDP socket of a stream, connected to a port of ours. Raises StreamFailed."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            known = self._host_of.get(source) if source is not None else None
            for _ in range(DRAWS):
                host = known or str(STREAM_NETWORK[secrets.randbelow(STREAM_NETWORK.num_addresses - 2) + 1])
                if known or host not in {stream.near.host for stream in self._streams.values()}:
                    break
            sock.bind((host, 0))
            sock.connect((LOOPBACK, port))
        except OSError as problem:
            sock.close()
            raise StreamFailed(StreamTrouble.REFUSED, _reason(problem)) from None
        if source is not None:
            self._host_of[source] = host
        return sock, Endpoint(host, sock.getsockname()[1])

    def _keep(self, stream: _Stream, sock: socket.socket) -> None:
        self._streams[stream.near] = stream
        stream.end.on_closed = lambda: self._on_closed(stream)
        stream.end.attach(sock)
        if self._looking is None:
            self._looking = self._loop.call_later(self._look_s, self._look)

    def _on_closed(self, stream: _Stream) -> None:
        if not stream.is_proven:
            stream.settled()
        if self._forget(stream.near) is not None and not stream.source:
            self.on_lost(stream.near)

    def _forget(self, stream: Endpoint) -> _Stream | None:
        known = self._streams.pop(stream, None)
        if known is not None and known.source and all(one.source != known.source for one in self._streams.values()):
            self._host_of.pop(known.source, None)
        return known

    def _look(self) -> None:
        """End what nobody proved to be a member's, and what has fallen silent."""
        self._looking = None
        now = self._loop.time()
        for known in list(self._streams.values()):
            if (not known.is_proven and now - known.began_at > self._unproven_s) or now - known.end.heard_at > SILENT_S:
                known.end.close()
        if self._streams:
            self._looking = self._loop.call_later(self._look_s, self._look)


def _reason(problem: BaseException) -> str:
    if isinstance(problem, OSError):
        return problem.strerror or errno.errorcode.get(problem.errno or 0, "no connection")
    return "no answer"


def _is_ours(host: str) -> bool:
    """Whether the machine has this address."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True
