"""The hub's one TCP port, 443 if it can be had: enrolments and streams, of every network that the hub is in.

    first bytes    "p2e1", "p2f1"     an enrolment (`enrol_server`); the issuer's peer ID follows
                   a TLS handshake    a stream inside of TLS (RFC 9329 appendix A); the server name says whose key
                   "IKETCP"           a plain stream (RFC 9329), for IKE of other makes
                   anything else      hung up on

Strangers cost little: as long as nobody proved to be a member, a connection is one of MAX_PENDING in all and of
MAX_PENDING_PER_SOURCE from its source, and TLS handshakes are rationed. When all places are taken the oldest of those
that wait goes: who is slow on purpose makes room for who is not.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable

from p2pvpn.core.errors import Fault, LocalError
from p2pvpn.core.ids import PeerId
from p2pvpn.core.limits import SourceLimiter, TokenBucket
from p2pvpn.ike.stream import PREFIX

from .enrol_server import Desk, EnrolmentServer
from .enrol_wire import CHUNK_BYTES, MAGIC, MAGIC_FORWARDED
from .sources import source_of
from .stream_end import StreamEnd
from .streams import HostStreams
from .tls import TlsPipe, choose_by_name

MAX_PENDING = 256
"""Connections that nobody proved to be a member's: some 50 KB each in TLS."""
MAX_PENDING_PER_SOURCE = 32
"""Of one address: an office behind one NAT whose laptops all come up at once."""
GREETING_S = 10.0
"""From the connection to the end of its handshake and head."""
HANDSHAKES_PER_S, HANDSHAKE_BURST = 200.0, 400.0
"""In all; one costs about 1 ms of this process."""
SOURCE_HANDSHAKES_PER_S, SOURCE_BURST = 20.0, 40.0
LIMITED_SOURCES = 4096
BACKLOG = 256
TLS_HANDSHAKE = b"\x16"
"""Content type of the first record (RFC 8446 section 5.1)."""


class Listener:
    """One TCP port. `add` and `remove` its networks, `listen` before use, `close` at the end."""

    def __init__(
        self,
        streams: HostStreams | None,
        enrolment: EnrolmentServer | None = None,
        *,
        greeting_s: float = GREETING_S,
    ) -> None:
        self.greeting_s = greeting_s
        self.enrolment = enrolment or EnrolmentServer()
        self._streams = streams
        self._server: asyncio.Server | None = None
        self._contexts: dict[PeerId, ssl.SSLContext] = {}
        self._pending: dict[_Greeter, str] = {}
        """What waits, oldest first, with its source."""
        self._handshakes = TokenBucket(HANDSHAKES_PER_S, HANDSHAKE_BURST)
        self._by_source: SourceLimiter[str] = SourceLimiter(SOURCE_HANDSHAKES_PER_S, SOURCE_BURST, LIMITED_SOURCES)

    @property
    def port(self) -> int:
        """The TCP port it listens on."""
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def pending(self) -> int:
        """Connections that nobody proved to be a member's."""
        return len(self._pending)

    def add(self, desk: Desk) -> None:
        """Serve this network too."""
        self.enrolment.desks[desk.peer_id] = desk

    def remove(self, desk: Desk) -> None:
        """Serve it no more; what is under way goes on."""
        self.enrolment.desks.pop(desk.peer_id, None)

    @property
    def is_idle(self) -> bool:
        """Whether no network is served."""
        return not self.enrolment.desks

    async def listen(self, host: str | None, port: int) -> None:
        """At `host` (None: everywhere) and `port` (0: any free one). Raises LocalError when it cannot be had."""
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(lambda: _Greeter(self), host, port, backlog=BACKLOG)
        except OSError as problem:
            raise LocalError(
                f"TCP port {port} cannot be had for enrolment: {problem.strerror or problem}",
                hint="grant the hub another one (--enrol-port), or stop what listens there: ss -tlnp",
                fault=Fault.MACHINE,
            ) from None

    async def close(self) -> None:
        """Stop listening and end what is under way, but for streams of members: those are their owner's to end."""
        if self._server is not None:
            self._server.close()
        for greeter in list(self._pending):
            greeter.abort()
        await self.enrolment.close()
        if self._server is not None:
            await self._server.wait_closed()

    # What the greeter of a connection asks.

    def admit(self, greeter: _Greeter, source: str) -> bool:
        """Whether there is a place for one more connection of this source; another one may have to go for it."""
        if sum(other == source for other in self._pending.values()) >= MAX_PENDING_PER_SOURCE:
            return False
        if len(self._pending) >= MAX_PENDING:
            next(iter(self._pending)).abort()
        self._pending[greeter] = source
        return True

    def leave(self, greeter: _Greeter) -> None:
        """Its connection is over, or a member's."""
        self._pending.pop(greeter, None)

    def take_handshake(self, source: str) -> bool:
        """Whether one more TLS handshake may be done for this source."""
        now = asyncio.get_running_loop().time()
        return self._by_source.take(source, now) and self._handshakes.take(now)

    def tls(self) -> TlsPipe | None:
        """The server's end of TLS, with the key that the client will name; None when no network is served."""
        desks = self.enrolment.desks
        if self._streams is None or not desks:
            return None
        context = next(iter(desks.values())).context()
        if context.sni_callback is None:
            choose_by_name(context, lambda peer_id: desks[peer_id].context() if peer_id in desks else None)
        return TlsPipe(context, server=True)

    def accept(self, end: StreamEnd, port: int, source: str, settled: Callable[[], None]) -> bool:
        """A client wants a stream; whether it gets it. `settled`: it is a member's, or over."""
        return self._streams is not None and self._streams.accept(end, port, source, settled)


class _Greeter(asyncio.Protocol):
    """A connection until it is known what it wants."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._transport: asyncio.Transport | None = None
        self._source = ""
        self._begun = b""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._source = source_of(transport.get_extra_info("peername"))
        if not self._listener.admit(self, self._source):
            transport.abort()
            return
        self._timer = asyncio.get_running_loop().call_later(self._listener.greeting_s, self.abort)

    def data_received(self, data: bytes) -> None:
        self._begun += data
        first = self._begun[: len(MAGIC)]
        if self._begun[:1] == TLS_HANDSHAKE:
            self._begin_stream(self._listener.tls() if self._listener.take_handshake(self._source) else None, tls=True)
        elif len(first) < len(MAGIC):
            if not any(known.startswith(first) for known in (MAGIC, MAGIC_FORWARDED, PREFIX)):
                self.abort()
        elif first in (MAGIC, MAGIC_FORWARDED):
            self._begin_enrolment()
        elif PREFIX.startswith(first):
            self._begin_stream(None, tls=False)
        else:
            self.abort()

    def connection_lost(self, problem: Exception | None) -> None:
        self._done()

    def abort(self) -> None:
        """Hang up."""
        self._done()
        if self._transport is not None:
            self._transport.abort()

    def _done(self) -> None:
        self._stop_timer()
        self._listener.leave(self)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _begin_enrolment(self) -> None:
        """It has its own time limit and its own places."""
        assert self._transport is not None
        self._done()
        reader = asyncio.StreamReader(limit=CHUNK_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader, self._listener.enrolment.handle)
        self._hand_over(protocol)

    def _begin_stream(self, pipe: TlsPipe | None, *, tls: bool) -> None:
        if tls and pipe is None:
            self.abort()
            return
        end = StreamEnd(pipe, server=True)
        end.on_closed = self._done

        def wanted(port: int) -> None:
            self._stop_timer()  # The stream has its own time limit now, but not a place of its own before it is proven.
            if not self._listener.accept(end, port, self._source, self._done):
                end.close()

        end.on_head = wanted
        self._hand_over(end)

    def _hand_over(self, protocol: asyncio.Protocol) -> None:
        assert self._transport is not None
        begun, self._begun = self._begun, b""
        self._transport.set_protocol(protocol)
        protocol.connection_made(self._transport)
        protocol.data_received(begun)
