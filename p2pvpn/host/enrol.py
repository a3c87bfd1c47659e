"""Enrolment over TCP: TLS pinned to the issuer, through whichever hub answers.

    client > hub   magic (4 bytes), peer ID of the issuer (20 bytes)        in the clear
    client > hub   TLS 1.3 to the issuer; its key must have that peer ID
    inside         length (4 bytes), request;   back: length (4 bytes), answer;   then close

A hub that is the issuer answers. Any other hub connects to the issuer's hub, says the same with the magic that
forbids forwarding once more, and copies bytes both ways, so that a token works while some of its hubs are out of
reach. It sees nothing, and pretending to be the issuer fails at the pin before a request is sent.

Everything a stranger can cause is bounded: connections in all and per address, seconds, and bytes each way. TLS runs
over memory buffers, so that bytes which arrive right behind the prelude are not lost between two layers.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv6Address

from p2pvpn.core.address import Endpoint, normal_ip
from p2pvpn.core.errors import Fault, LocalError, P2pvpnError, RemoteError, TrustError, WireError
from p2pvpn.core.ids import PEER_ID_BYTES, PeerId
from p2pvpn.core.ports import WallClock
from p2pvpn.identity.certificates import parse_untrusted
from p2pvpn.identity.document import ENROL_PORT, split_address
from p2pvpn.identity.enrolment import MAX_ANSWER_BYTES, MAX_REQUEST_BYTES, Issuer, issuer_of_untrusted
from p2pvpn.identity.profile import Profile

MAGIC = b"p2e1"
MAGIC_FORWARDED = b"p2f1"
PRELUDE_BYTES = len(MAGIC) + PEER_ID_BYTES
LENGTH_BYTES = 4

TIMEOUT_S = 10.0
"""A whole enrolment takes four round trips and some milliseconds of signatures."""
STAGGER_S = 0.3
"""Between attempts at the hubs: longer than a round trip anywhere, short for a person who waits (RFC 8305 section 5
suggests 250 ms)."""
MAX_CONNECTIONS = 64
"""On one hub at once; each holds some 100 KB."""
MAX_PER_SOURCE = 8
"""From one address: several machines behind one NAT may join together."""
TLS_OVERHEAD_BYTES = 16384
"""Handshake and record headers in a forwarded stream."""
CHUNK_BYTES = 65536
MAX_ATTEMPTS = 8
"""Addresses that one call tries."""

HubResolver = Callable[[PeerId], Sequence[str]]
"""`host:port` of the enrolment servers of a hub; empty when it is unknown."""


class _Tls:
    """TLS 1.3 over a pair of streams."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, context: ssl.SSLContext, *, server: bool
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._in = ssl.MemoryBIO()
        self._out = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=server)

    async def handshake(self) -> None:
        await self._run(self._tls.do_handshake)
        await self._flush()

    async def send(self, message: bytes) -> None:
        """One message with its length in front."""
        data = len(message).to_bytes(LENGTH_BYTES, "big") + message
        for start in range(0, len(data), CHUNK_BYTES):
            self._tls.write(data[start : start + CHUNK_BYTES])
            await self._flush()

    async def receive(self, limit: int) -> bytes:
        """One message. Raises WireError when it is longer than `limit`, or cut off."""
        length = int.from_bytes(await self._exactly(LENGTH_BYTES), "big")
        if length > limit:
            raise WireError(f"a message of {length} bytes where {limit} are allowed")
        return await self._exactly(length)

    def peer_id_untrusted(self) -> PeerId:
        """The peer ID of the key that the other side proved to have. Raises WireError."""
        der = self._tls.getpeercert(binary_form=True)
        if der is None:
            raise WireError("the server showed no certificate")
        return parse_untrusted(der).peer_id

    async def close(self) -> None:
        """Say goodbye, without waiting for the other side's."""
        with contextlib.suppress(ssl.SSLError):
            self._tls.unwrap()
        with contextlib.suppress(OSError):
            await self._flush()

    async def _exactly(self, count: int) -> bytes:
        out = bytearray()
        while len(out) < count:
            wanted = min(CHUNK_BYTES, count - len(out))
            out += await self._run(partial(self._tls.read, wanted))
        return bytes(out)

    async def _run(self, step: Callable[[], bytes | None]) -> bytes:
        """Repeat a step of TLS until it has got the bytes that it waits for."""
        while True:
            try:
                result = step()
            except ssl.SSLWantReadError:
                await self._flush()
                data = await self._reader.read(CHUNK_BYTES)
                if not data:
                    raise WireError("the connection ended early") from None
                self._in.write(data)
                continue
            except ssl.SSLError as problem:
                await self._flush()
                raise WireError(f"TLS failed: {problem.reason or problem}") from None
            if result == b"":
                raise WireError("the connection ended early")
            return result or b""

    async def _flush(self) -> None:
        data = self._out.read()
        if data:
            self._writer.write(data)
            await self._writer.drain()


class EnrolmentServer:
    """Answers for the issuer on this machine, if there is one, and forwards to the other hubs. `port` is where."""

    def __init__(
        self,
        profile: Profile,
        issuer: Issuer | None,
        resolve_hub: HubResolver | None = None,
        *,
        wall: WallClock = time.time,
        timeout: float = TIMEOUT_S,
        max_connections: int = MAX_CONNECTIONS,
        max_per_source: int = MAX_PER_SOURCE,
    ) -> None:
        self._profile = profile
        self._issuer = issuer
        self._resolve = resolve_hub or document_resolver(profile)
        self._wall = wall
        self._timeout = timeout
        self._max_connections = max_connections
        self._max_per_source = max_per_source
        self._sources: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._context: tuple[tuple[bytes, ...], ssl.SSLContext] | None = None

    @property
    def port(self) -> int:
        """The TCP port it listens on."""
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def connections(self) -> int:
        """How many are under way."""
        return len(self._tasks)

    async def listen(self, host: str | None, port: int) -> None:
        """Raises LocalError when the port cannot be had."""
        try:
            self._server = await asyncio.start_server(self.handle, host, port, limit=CHUNK_BYTES)
        except OSError as problem:
            raise LocalError(
                f"TCP port {port} cannot be had for enrolment: {problem.strerror or problem}",
                hint="grant the hub another one (--enrol-port), or stop what listens there: ss -tlnp",
                fault=Fault.MACHINE,
            ) from None

    async def close(self) -> None:
        """Stop listening and end what is under way."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from the prelude on; for listeners that share the port with something else too."""
        source = _source(str(writer.get_extra_info("peername", ("::",))[0]))
        if self._sources.total() >= self._max_connections or self._sources[source] >= self._max_per_source:
            writer.transport.abort()
            return
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._sources[source] += 1
        try:
            async with asyncio.timeout(self._timeout):
                await self._serve(reader, writer)
        except (OSError, EOFError, TimeoutError, P2pvpnError):
            pass  # the stranger's fault or the network's: there is nobody to tell
        except asyncio.CancelledError:
            pass  # the server closes; the stream's own callback must not see this as a failure
        finally:
            self._sources[source] -= 1
            self._sources += Counter()
            self._tasks.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        prelude = await reader.readexactly(PRELUDE_BYTES)
        magic, target = prelude[: len(MAGIC)], PeerId(prelude[len(MAGIC) :])
        if magic not in (MAGIC, MAGIC_FORWARDED):
            return
        if self._issuer is not None and target == self._profile.key.peer_id:
            await self._answer(self._issuer, reader, writer)
        elif magic == MAGIC and target != self._profile.key.peer_id:
            await self._forward(target, reader, writer)

    async def _answer(self, issuer: Issuer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tls = _Tls(reader, writer, self._server_context(), server=True)
        await tls.handshake()
        request = await tls.receive(MAX_REQUEST_BYTES)
        await tls.send(issuer.handle_untrusted(request, self._wall()))
        await tls.close()

    async def _forward(self, target: PeerId, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await self._connect(target)
        try:
            there_writer.write(MAGIC_FORWARDED + target)
            async with asyncio.TaskGroup() as group:
                up = group.create_task(_copy(reader, there_writer, MAX_REQUEST_BYTES + TLS_OVERHEAD_BYTES))
                await _copy(there_reader, writer, MAX_ANSWER_BYTES + TLS_OVERHEAD_BYTES)
                up.cancel()
        except* (OSError, P2pvpnError):
            pass  # either side hung up, or said too much
        finally:
            there_writer.close()

    async def _connect(self, target: PeerId) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        for text in list(self._resolve(target))[:MAX_ATTEMPTS]:
            host, port = split_address(text)
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(self._timeout / 3):
                    return await asyncio.open_connection(host, port or ENROL_PORT, limit=CHUNK_BYTES)
        raise RemoteError(f"the hub {target} cannot be reached")

    def _server_context(self) -> ssl.SSLContext:
        """For today's certificate: made once and again after each renewal."""
        chain = self._profile.chain
        if self._context is None or self._context[0] != chain:
            self._context = chain, _server_context(self._profile)
        return self._context[1]


def _source(host: str) -> str:
    """What counts as one source: an IPv4 address, or the /64 that an IPv6 host has to itself."""
    ip = normal_ip(host)
    return str(IPv6Address(int(ip) >> 64 << 64)) if isinstance(ip, IPv6Address) else str(ip)


async def serve_enrolment(
    profile: Profile,
    issuer: Issuer | None,
    host: str | None,
    port: int,
    resolve_hub: HubResolver | None = None,
    *,
    wall: WallClock = time.time,
) -> EnrolmentServer:
    """Listen for enrolments at `host` (None: everywhere) and `port` (0: any free one). Raises LocalError.

    `resolve_hub` says where other issuers answer; left out, the profile's network document does.
    """
    server = EnrolmentServer(profile, issuer, resolve_hub, wall=wall)
    await server.listen(host, port)
    return server


def document_resolver(profile: Profile) -> HubResolver:
    """Hubs as the newest network document lists them."""

    def resolve(peer_id: PeerId) -> Sequence[str]:
        hub = profile.document.hub(peer_id)
        return hub.enrol_addresses if hub else ()

    return resolve


async def enrol(
    addresses: Sequence[str],
    issuer_id: PeerId,
    request: bytes,
    *,
    timeout: float = TIMEOUT_S,
    stagger: float = STAGGER_S,
) -> bytes:
    """The answer of issuer `issuer_id`, asked through the hubs at `addresses` (`host` or `host:port`).

    The hubs are tried `stagger` seconds apart, the first whose TLS key has the issuer's peer ID gets the request.
    Raises P2pvpnError, with what went wrong at each hub, when none answers within `timeout` seconds.
    """
    attempts = [_Attempt(text, *split_address(text)) for text in addresses[:MAX_ATTEMPTS]]
    if not attempts:
        raise LocalError("there is no hub to enrol at", hint="ask for a new token")
    turn = asyncio.Lock()
    answer: list[bytes] = []

    async def run(index: int, attempt: _Attempt) -> None:
        await asyncio.sleep(index * stagger)
        try:
            async with _pinned(attempt, issuer_id) as tls, turn:
                if not answer:
                    # Half of the time, so that a hub which takes the request and goes silent leaves some to others.
                    async with asyncio.timeout(timeout / 2):
                        await tls.send(request)
                        answer.append(await tls.receive(MAX_ANSWER_BYTES))
        except (OSError, P2pvpnError) as problem:
            attempt.failure = problem

    tasks = [asyncio.create_task(run(index, attempt)) for index, attempt in enumerate(attempts)]
    try:
        async with asyncio.timeout(timeout):
            for done in asyncio.as_completed(tasks):
                await done
                if answer:
                    return answer[0]
    except TimeoutError:
        pass
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    raise _failure(attempts)


async def renew(endpoint: Endpoint, request: bytes) -> bytes:
    """As `mesh.ports.Renew`: the issuer is the one that the request names. Raises P2pvpnError."""
    return await enrol([str(endpoint)], issuer_of_untrusted(request), request)


@dataclass(slots=True)
class _Attempt:
    text: str
    host: str
    port: int | None
    failure: Exception | None = None


@contextlib.asynccontextmanager
async def _pinned(attempt: _Attempt, issuer_id: PeerId) -> AsyncIterator[_Tls]:
    """A TLS connection to the issuer. Raises TrustError when the other end has another key."""
    reader, writer = await asyncio.open_connection(attempt.host, attempt.port or ENROL_PORT, limit=CHUNK_BYTES)
    try:
        writer.write(MAGIC + issuer_id)
        tls = _Tls(reader, writer, _client_context(), server=False)
        await tls.handshake()
        if tls.peer_id_untrusted() != issuer_id:
            raise TrustError("somebody else answers in place of the issuer")
        yield tls
        await tls.close()
    finally:
        writer.close()


def _failure(attempts: Sequence[_Attempt]) -> P2pvpnError:
    reasons = "; ".join(f"{a.text}: {_reason(a.failure)}" for a in attempts)
    if any(isinstance(a.failure, TrustError) for a in attempts):
        return TrustError(
            f"the issuer was not reached, and nothing was sent: {reasons}",
            hint="something on the way intercepts the connection; try from another network",
            fault=Fault.UNREACHABLE,
        )
    return RemoteError(
        f"the issuer was not reached: {reasons}",
        hint="check that this machine reaches the hub on that TCP port; the token is still good",
        fault=Fault.UNREACHABLE,
    )


def _reason(failure: Exception | None) -> str:
    if failure is None:
        return "no answer in time"
    if isinstance(failure, OSError):
        return failure.strerror or str(failure) or type(failure).__name__
    return str(failure)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: int) -> None:
    """Until the end, or until `limit` bytes have passed. Raises WireError for more."""
    passed = 0
    while data := await reader.read(CHUNK_BYTES):
        passed += len(data)
        if passed > limit:
            raise WireError("a forwarded enrolment is too long")
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()


def _client_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # No authority vouches for the issuer's name: its key is pinned instead, right after the handshake.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _server_context(profile: Profile) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    chain = "".join(ssl.DER_cert_to_PEM_cert(der) for der in profile.chain).encode()
    # The ssl module reads keys from files only: this one is in memory and has no name that others could open.
    fd = os.memfd_create("p2pvpn-enrolment", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(chain + profile.key.to_pem().reveal())
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    return context
