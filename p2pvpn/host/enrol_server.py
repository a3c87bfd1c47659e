"""The hub's side of enrolment (`enrol`): answers for the issuers on this machine, and forwards to other hubs.

A hub may be in several networks; whom a client means, it says by the issuer's peer ID before anything else. Everything
a stranger can cause is bounded: connections in all and per address, seconds, and bytes each way.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections import Counter
from collections.abc import Callable, Sequence

from p2pvpn.core.errors import P2pvpnError, RemoteError, WireError
from p2pvpn.core.ids import PeerId
from p2pvpn.core.ports import WallClock
from p2pvpn.identity.document import ENROL_PORT, split_address
from p2pvpn.identity.enrolment import MAX_ANSWER_BYTES, MAX_REQUEST_BYTES, Issuer
from p2pvpn.identity.profile import Profile

from .enrol import MAX_ATTEMPTS, TIMEOUT_S
from .enrol_wire import CHUNK_BYTES, MAGIC, MAGIC_FORWARDED, PRELUDE_BYTES, Messages
from .sources import source_of
from .tls import server_context

MAX_CONNECTIONS = 64
"""On one hub at once; each holds some 100 KB."""
MAX_PER_SOURCE = 8
"""From one address: several machines behind one NAT may join together."""
TLS_OVERHEAD_BYTES = 16384
"""Handshake and record headers in a forwarded stream."""

HubResolver = Callable[[PeerId], Sequence[str]]
"""`host:port` of the enrolment servers of a hub; empty when it is unknown."""


class Desk:
    """One network of the hub: its key and certificate, the issuer if there is one, and where the other hubs are."""

    def __init__(self, profile: Profile, issuer: Issuer | None, resolve_hub: HubResolver | None = None) -> None:
        """Left out, `resolve_hub` is the profile's network document."""
        self.issuer = issuer
        self.resolve = resolve_hub or document_resolver(profile)
        self._profile = profile
        self._context: tuple[tuple[bytes, ...], ssl.SSLContext] | None = None

    @property
    def peer_id(self) -> PeerId:
        """Whom TLS shows here."""
        return self._profile.key.peer_id

    def context(self) -> ssl.SSLContext:
        """For today's certificate: made once and again after each renewal."""
        chain = self._profile.chain
        if self._context is None or self._context[0] != chain:
            self._context = chain, server_context(self._profile)
        return self._context[1]


class EnrolmentServer:
    """Serves connections that begin with an enrolment's prelude, for all desks."""

    def __init__(
        self,
        *,
        wall: WallClock = time.time,
        timeout: float = TIMEOUT_S,
        max_connections: int = MAX_CONNECTIONS,
        max_per_source: int = MAX_PER_SOURCE,
    ) -> None:
        self.desks: dict[PeerId, Desk] = {}
        self._wall = wall
        self._timeout = timeout
        self._max_connections = max_connections
        self._max_per_source = max_per_source
        self._sources: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def connections(self) -> int:
        """How many are under way."""
        return len(self._tasks)

    async def close(self) -> None:
        """End what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from the prelude on."""
        source = source_of(writer.get_extra_info("peername"))
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
        desk = self.desks.get(target)
        if desk is not None:
            await self._answer(desk, reader, writer)
        elif magic == MAGIC:
            await self._forward(target, reader, writer)

    async def _answer(self, desk: Desk, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if desk.issuer is None:
            return
        tls = Messages(reader, writer, desk.context(), server=True)
        await tls.handshake()
        request = await tls.receive(MAX_REQUEST_BYTES)
        await tls.send(desk.issuer.handle_untrusted(request, self._wall()))
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
        addresses = [text for desk in self.desks.values() for text in desk.resolve(target)]
        for text in addresses[:MAX_ATTEMPTS]:
            host, port = split_address(text)
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(self._timeout / 3):
                    return await asyncio.open_connection(host, port or ENROL_PORT, limit=CHUNK_BYTES)
        raise RemoteError(f"the hub {target} cannot be reached")


def document_resolver(profile: Profile) -> HubResolver:
    """Hubs as the newest network document lists them."""

    def resolve(peer_id: PeerId) -> Sequence[str]:
        hub = profile.document.hub(peer_id)
        return hub.enrol_addresses if hub else ()

    return resolve


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
