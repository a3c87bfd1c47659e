"""Requests and answers over UDP between overlay addresses, inside the tunnels.

A tunnel's selectors authenticate the source address of what comes out of it, so an overlay address says who asks. Each
node uses one port for everything, and takes nothing from other source ports: an ordinary program on a member's machine
could send from those, and would speak with the machine's voice.

A request is sent again until it is answered or its time is over; how soon is learned for each destination. The one
who answers remembers what it answered for a while, so that a request runs once however often it arrives. Handlers are
registered by name; there is no other way to reach code from the wire. Bad input is counted and otherwise ignored.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Any

from p2pvpn.core.errors import Fault, LocalError, RemoteError, WireError
from p2pvpn.core.limits import BoundedTable, SourceLimiter
from p2pvpn.core.ports import Entropy

from . import messages
from .answers import MAX_ANSWERS_PER_PEER, AnswerMemory
from .background import Background
from .messages import MAX_MESSAGE_BYTES, Message, Refusal, Request, Result
from .rtt import BACKOFF, MAX_RTO_S, RoundTrip

DHT_PORT = 4510
REQUEST_S = 3.0
"""How long a request is tried unless its caller says otherwise."""
ID_BYTES = 12
MAX_IN_FLIGHT = 64
"""Requests to one destination at a time; more wait their turn."""
MAX_WAITING = 4096
"""Requests under way or waiting, over all destinations; more are refused at once."""
MAX_RUNNING = 1024
"""Requests of others that handlers work on at a time, and how many of them for one source."""
MAX_RUNNING_PER_SOURCE = 64
RECEIVE_BUFFER_BYTES = 4 << 20
"""The usual 208 KB hold 90 answers, and a sync asks for more at a time."""
MAX_DESTINATIONS = 4096
PEER_RATE, PEER_BURST = 100.0, 300.0
"""Requests per second from a peer; a busy one makes ten."""
HUB_RATE, HUB_BURST = 4000.0, 8000.0
"""Requests per second from a hub, which hands on the records of everybody and fills an empty store."""
SOURCES = 65536

_SO_RCVBUFFORCE = 33
"""asm-generic/socket.h; the socket module does not name it."""

_log = logging.getLogger(__name__)


class Code:
    """Refusal codes of the engine itself; methods use numbers from APPLICATION on."""

    UNKNOWN_METHOD = 1
    BAD_ARGUMENTS = 2
    BUSY = 3
    INTERNAL = 4
    TOO_LARGE = 5
    APPLICATION = 16


class RpcError(RemoteError):
    """A request that had no result."""


class RpcTimeoutError(RpcError):
    """Nobody answered in time."""


class RpcOverloadedError(RpcError):
    """Too many requests of ours are under way."""


class RpcClosedError(RpcError):
    """The node was closed."""


class RpcRefusedError(RpcError):
    """The other side answered that it will not. Handlers raise it too."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{text} ({code})")
        self.code = code
        self.text = text


Handler = Callable[[IPv6Address, list[Any]], object | Awaitable[object]]
"""(who asks, arguments) -> result. Raises RpcRefusedError to refuse, WireError for arguments that do not parse."""


@dataclass(slots=True)
class RpcCounters:
    """What happened, since the start."""

    sent: int = 0
    retransmitted: int = 0
    answered: int = 0
    timeouts: int = 0
    malformed: int = 0
    limited: int = 0
    duplicates: int = 0
    strays: int = 0
    """Answers that nobody waits for: late, repeated or made up."""
    refused: int = 0
    failures: int = 0
    """Handlers that broke: a fault of ours."""


@dataclass(slots=True)
class _Pending:
    peer: IPv6Address
    answer: asyncio.Future[Result | Refusal | None]
    """None when the node was closed."""
    sent_at: list[float]


@dataclass(slots=True)
class _Working:
    """A request of somebody else's that a handler works on, and its last transmission."""

    attempt: int
    attempt_at: float


class _Lane:
    """Turns for one destination."""

    __slots__ = ("turns", "users")

    def __init__(self) -> None:
        self.turns = asyncio.Semaphore(MAX_IN_FLIGHT)
        self.users = 0


class RpcNode:
    """One end of the channel. `is_hub` says whose requests come at a hub's rate; set it before `open`."""

    def __init__(self, local: IPv6Address, port: int, entropy: Entropy) -> None:
        self.local = local
        self.port = port
        self.entropy = entropy
        self.is_hub: Callable[[IPv6Address], bool] = lambda address: False
        self.counters = RpcCounters()
        self._handlers: dict[str, tuple[Handler, bool]] = {}
        self._pending: dict[bytes, _Pending] = {}
        self._working: dict[tuple[IPv6Address, bytes], _Working] = {}
        self._answers = AnswerMemory()
        self._running: dict[IPv6Address, int] = {}
        self._lanes: dict[IPv6Address, _Lane] = {}
        self._waiting = 0
        self._trips: BoundedTable[IPv6Address, RoundTrip] = BoundedTable(MAX_DESTINATIONS)
        self._peers: SourceLimiter[IPv6Address] = SourceLimiter(PEER_RATE, PEER_BURST, SOURCES)
        self._hubs: SourceLimiter[IPv6Address] = SourceLimiter(HUB_RATE, HUB_BURST, SOURCES)
        self._background = Background()
        self._transport: asyncio.DatagramTransport | None = None

    async def open(self) -> None:
        """Bind the port on the overlay address. Raises LocalError when it cannot be had."""
        try:
            self._transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
                lambda: _Socket(self._receive_untrusted), local_addr=(str(self.local), self.port)
            )
        except OSError as problem:
            raise LocalError(
                f"UDP port {self.port} cannot be had for the DHT: {problem.strerror or problem}",
                hint=f"stop what has it: ss -ulpn sport = :{self.port}",
                fault=Fault.MACHINE,
            ) from None
        raw = self._transport.get_extra_info("socket")
        if raw is not None:
            with suppress(OSError):
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
                raw.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)

    async def close(self) -> None:
        """End every handler and every request of ours (RpcClosedError), and let go of the port."""
        if self._transport is not None:
            self._transport.close()
        for pending in self._pending.values():
            if not pending.answer.done():
                pending.answer.set_result(None)
        await self._background.close()

    def register(self, method: str, handler: Handler, *, repeatable: bool = False) -> None:
        """Serve `method`. One that is `repeatable` may run again when a request is repeated, and costs no memory."""
        if method in self._handlers:
            raise LocalError(f"{method} is registered already")
        self._handlers[method] = (handler, repeatable)

    def unregister(self, method: str) -> None:
        """Serve `method` no more."""
        self._handlers.pop(method, None)

    def is_silent(self, peer: IPv6Address) -> bool:
        """Whether the last request to `peer` went unanswered and nothing came from it since."""
        trip = self._trips.peek(peer)
        return trip is not None and trip.silent

    async def request(
        self, peer: IPv6Address, method: str, args: Sequence[object] = (), *, timeout: float = REQUEST_S
    ) -> Any:
        """Run `method` at `peer` and return its result, which is untrusted: nested lists of bytes, text and integers.

        Raises RpcTimeoutError after `timeout` seconds, RpcRefusedError, RpcOverloadedError, RpcClosedError, and
        LocalError for a request that is too large. Cancelling it leaves nothing behind.
        """
        if self._background.closed:
            raise RpcClosedError("the node was closed")
        request = Request(self.entropy(ID_BYTES), 0, method, list(args))
        if len(messages.build(request)) > MAX_MESSAGE_BYTES:
            raise LocalError(f"a request of more than {MAX_MESSAGE_BYTES} bytes")
        trip = self._trip(peer)
        try:
            async with asyncio.timeout(timeout), self._turn(peer):
                answer = await (
                    self._ask_myself(request) if peer == self.local else self._exchange(peer, request, trip)
                )
        except TimeoutError:
            trip.silent = True
            self.counters.timeouts += 1
            raise RpcTimeoutError(f"{method}: no answer from {peer} in {timeout:g} s") from None
        if isinstance(answer, Refusal):
            raise RpcRefusedError(answer.code, answer.text)
        return answer.value

    # Asking

    async def _exchange(self, peer: IPv6Address, request: Request, trip: RoundTrip) -> Result | Refusal:
        loop = asyncio.get_running_loop()
        pending = _Pending(peer, loop.create_future(), [])
        self._pending[request.id] = pending
        wait_s = trip.rto_s
        try:
            while True:
                attempt = min(len(pending.sent_at), messages.MAX_ATTEMPT)
                pending.sent_at.append(loop.time())
                self._send(peer, Request(request.id, attempt, request.method, request.args))
                self.counters.sent += 1
                self.counters.retransmitted += attempt > 0
                await asyncio.wait((pending.answer,), timeout=wait_s)
                if pending.answer.done():
                    answer = pending.answer.result()
                    if answer is None:
                        raise RpcClosedError("the node was closed")
                    return answer
                wait_s = min(wait_s * BACKOFF, MAX_RTO_S)
        finally:
            del self._pending[request.id]

    async def _ask_myself(self, request: Request) -> Result | Refusal:
        sent = messages.parse_untrusted(messages.build(request))
        assert isinstance(sent, Request)
        answer: Message = await self._run(self.local, sent)
        answer = messages.parse_untrusted(messages.build(answer))
        assert not isinstance(answer, Request)
        return answer

    @asynccontextmanager
    async def _turn(self, peer: IPv6Address) -> AsyncIterator[None]:
        if self._waiting >= MAX_WAITING:
            raise RpcOverloadedError("too many requests are under way")
        lane = self._lanes.setdefault(peer, _Lane())
        lane.users += 1
        self._waiting += 1
        try:
            async with lane.turns:
                yield
        finally:
            self._waiting -= 1
            lane.users -= 1
            if not lane.users:
                del self._lanes[peer]

    def _trip(self, peer: IPv6Address) -> RoundTrip:
        trip = self._trips.get(peer)
        if trip is None:
            trip = RoundTrip()
            self._trips.put(peer, trip)
        return trip

    def _send(self, peer: IPv6Address, message: Message) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.sendto(messages.build(message), (str(peer), self.port))

    # Answering

    def _receive_untrusted(self, data: bytes, host: str, port: int) -> None:
        try:
            source = IPv6Address(host.partition("%")[0])
            if port != self.port:
                raise WireError("from another port than ours")
            message = messages.parse_untrusted(data)
        except (WireError, ValueError):
            self.counters.malformed += 1
            return
        if isinstance(message, Request):
            self._on_request(source, message)
        else:
            self._on_answer(source, message)

    def _on_answer(self, source: IPv6Address, answer: Result | Refusal) -> None:
        pending = self._pending.get(answer.id)
        if pending is None or pending.peer != source or pending.answer.done():
            self.counters.strays += 1
            return
        trip = self._trip(source)
        trip.silent = False
        if isinstance(answer, Result) and answer.attempt < len(pending.sent_at):
            elapsed_s = asyncio.get_running_loop().time() - pending.sent_at[answer.attempt]
            # The other side says how long it held the request; a sixteenth of the time bounds what a false word does.
            trip.sample(max(elapsed_s - answer.held_ms / 1000, elapsed_s / 16))
        pending.answer.set_result(answer)

    def _on_request(self, source: IPv6Address, request: Request) -> None:
        now = asyncio.get_running_loop().time()
        limiter = self._hubs if self.is_hub(source) else self._peers
        if self._background.closed or not limiter.take(source, now):
            self.counters.limited += 1
            return
        trip = self._trips.peek(source)
        if trip is not None:
            trip.silent = False
        asked = (source, request.id)
        known = self._answers.recall(asked, now)
        working = self._working.get(asked)
        if known is not None or working is not None:
            self.counters.duplicates += 1
            if known is not None:
                self._answer(source, known, request.attempt, 0)
            elif working is not None:
                working.attempt, working.attempt_at = request.attempt, now
            return
        self._start(source, request, now)

    def _start(self, source: IPv6Address, request: Request, now: float) -> None:
        handler, repeatable = self._handlers.get(request.method, (_no_such_method, True))
        many = len(self._working) >= MAX_RUNNING or self._running.get(source, 0) >= MAX_RUNNING_PER_SOURCE
        if not repeatable and not self.is_hub(source):
            many = many or self._answers.count(source) >= MAX_ANSWERS_PER_PEER
        outcome = self._begin(_too_many if many else handler, source, request)
        repeatable = repeatable or many
        if isinstance(outcome, Result | Refusal):
            if not repeatable:
                self._answers.remember((source, request.id), outcome, now)
            self._answer(source, outcome, request.attempt, 0)
            return
        working = _Working(request.attempt, now)
        self._working[source, request.id] = working
        self._running[source] = self._running.get(source, 0) + 1
        self._background.spawn(self._serve(source, request, working, outcome, repeatable), f"rpc {request.method}")

    async def _serve(
        self, source: IPv6Address, request: Request, working: _Working, outcome: Awaitable[object], repeatable: bool
    ) -> None:
        try:
            answer = await self._complete(request, outcome)
        finally:
            del self._working[source, request.id]
            self._running[source] -= 1
            if not self._running[source]:
                del self._running[source]
        now = asyncio.get_running_loop().time()
        if not repeatable:
            self._answers.remember((source, request.id), answer, now)
        self._answer(source, answer, working.attempt, int((now - working.attempt_at) * 1000))

    async def _run(self, source: IPv6Address, request: Request) -> Result | Refusal:
        handler, _ = self._handlers.get(request.method, (_no_such_method, True))
        outcome = self._begin(handler, source, request)
        return outcome if isinstance(outcome, Result | Refusal) else await self._complete(request, outcome)

    def _begin(self, handler: Handler, source: IPv6Address, request: Request) -> Result | Refusal | Awaitable[object]:
        try:
            outcome = handler(source, request.args)
        except Exception as problem:  # noqa: BLE001 (whatever breaks in a handler is answered and counted)
            return self._failed(request, problem)
        return outcome if inspect.isawaitable(outcome) else self._fitting(request, outcome)

    async def _complete(self, request: Request, outcome: Awaitable[object]) -> Result | Refusal:
        try:
            return self._fitting(request, await outcome)
        except Exception as problem:  # noqa: BLE001 (as above)
            return self._failed(request, problem)

    def _fitting(self, request: Request, value: object) -> Result | Refusal:
        result = Result(request.id, 0, 0, value)
        try:
            size = len(messages.build(result))
        except (TypeError, ValueError, OverflowError) as problem:
            return self._failed(request, problem)
        if size <= MAX_MESSAGE_BYTES - 16:
            return result
        return self._failed(request, RpcRefusedError(Code.TOO_LARGE, "the result is too large"))

    def _failed(self, request: Request, problem: Exception) -> Refusal:
        self.counters.refused += 1
        if isinstance(problem, RpcRefusedError):
            return Refusal(request.id, 0, problem.code, problem.text)
        if isinstance(problem, WireError):
            return Refusal(request.id, 0, Code.BAD_ARGUMENTS, str(problem))
        self.counters.failures += 1
        if self.counters.failures & (self.counters.failures - 1) == 0:
            _log.error("handler of %s failed (%d so far)", request.method, self.counters.failures, exc_info=problem)
        return Refusal(request.id, 0, Code.INTERNAL, "internal error")

    def _answer(self, source: IPv6Address, answer: Result | Refusal, attempt: int, held_ms: int) -> None:
        self.counters.answered += 1
        if isinstance(answer, Result):
            self._send(source, Result(answer.id, attempt, held_ms, answer.value))
        else:
            self._send(source, Refusal(answer.id, attempt, answer.code, answer.text))


def _no_such_method(sender: IPv6Address, args: list[Any]) -> object:
    raise RpcRefusedError(Code.UNKNOWN_METHOD, "no such method")


def _too_many(sender: IPv6Address, args: list[Any]) -> object:
    raise RpcRefusedError(Code.BUSY, "too many at once")


class _Socket(asyncio.DatagramProtocol):
    """Hands datagrams on; what the network says of ours that were lost is no news."""

    def __init__(self, receive: Callable[[bytes, str, int], None]) -> None:
        self._receive = receive

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        self._receive(data, addr[0], addr[1])
