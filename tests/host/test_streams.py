"""Streams over real TLS on loopback: what goes in comes out, strangers get little, and who answers in a hub's place is
told from a hub."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import wraps

import pytest
from hypothesis import given
from hypothesis import strategies as st
from identity.world import World, make_world

from p2pvpn.core.address import Endpoint
from p2pvpn.core.ids import PeerId
from p2pvpn.host.enrol_server import Desk
from p2pvpn.host.listener import MAX_PENDING, MAX_PENDING_PER_SOURCE, Listener
from p2pvpn.host.portal import MAX_SHOWN_CHARS, find_portal, portal_of_untrusted
from p2pvpn.host.stream_end import MAX_WAITING_BYTES, StreamEnd
from p2pvpn.host.streams import HostStreams
from p2pvpn.host.tls import TlsPipe, client_context, name_of, server_context
from p2pvpn.identity.keys import PeerKey
from p2pvpn.ike.stream import build_frame, build_head
from p2pvpn.mesh.ports import StreamFailed, StreamTrouble

LOOPBACK = "127.0.0.1"
RELAY_PORT = 1
"""Stands for any relay port; the tests' hub maps it to nothing."""


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    @wraps(test)
    def run(*args: object, **kwargs: object) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 30))

    return run


@pytest.fixture
def world() -> World:
    return make_world()


class Udp(asyncio.DatagramProtocol):
    """A machine's own UDP port; keeps what came."""

    def __init__(self) -> None:
        self.came: asyncio.Queue[tuple[bytes, tuple[str, int]]] = asyncio.Queue()
        self.transport: asyncio.DatagramTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.came.put_nowait((data, addr))

    @property
    def port(self) -> int:
        return int(self.transport.get_extra_info("sockname")[1])

    def send(self, data: bytes, to: tuple[str, int] | Endpoint) -> None:
        self.transport.sendto(data, tuple(to))

    async def take(self) -> tuple[bytes, tuple[str, int]]:
        return await asyncio.wait_for(self.came.get(), 5)


class Machine:
    """One end: its UDP port and its streams."""

    def __init__(self, udp: Udp, streams: HostStreams) -> None:
        self.udp = udp
        self.streams = streams
        self.lost: list[Endpoint] = []
        streams.on_lost = self.lost.append


@asynccontextmanager
async def machine(**options: float) -> AsyncIterator[Machine]:
    loop = asyncio.get_running_loop()
    _, udp = await loop.create_datagram_endpoint(Udp, local_addr=(LOOPBACK, 0))
    streams = HostStreams(udp.port, **options)
    try:
        yield Machine(udp, streams)
    finally:
        streams.close_all()
        udp.transport.close()


@asynccontextmanager
async def hub(world: World, **options: float) -> AsyncIterator[tuple[Machine, Listener]]:
    """A hub in one network, with a stream for whoever wants one to IKE."""
    greeting_s = options.pop("greeting_s", 10.0)
    async with machine(**options) as one:
        one.streams.may_reach = lambda port: port == 0
        listener = Listener(one.streams, greeting_s=greeting_s)
        listener.add(Desk(world.profile(world.hub_key, world.hub), None))
        await listener.listen(LOOPBACK, 0)
        try:
            yield one, listener
        finally:
            await listener.close()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110 (a count without an event)
            await asyncio.sleep(0.01)


def at(listener: Listener) -> Endpoint:
    return Endpoint(LOOPBACK, listener.port)


@in_loop
async def test_datagrams_of_any_kind_pass_both_ways_unchanged_and_in_order(world: World) -> None:
    async with hub(world) as (there, listener), machine() as here:
        stream = await here.streams.open(at(listener), world.hub_key.peer_id, 0)
        assert stream.is_stream
        sizes = [1, 8, 60, 1200, 1200, 1200, 400, 1200, 1365, 9000]
        sent = [bytes([0xC0 + number]) * 4 + bytes(size) for number, size in enumerate(sizes)]
        sent += [b"\xff", bytes(4) + b"IKE", b"\x00\x01STUN" * 20]
        for datagram in sent:
            here.udp.send(datagram, stream)
        came = [await there.udp.take() for _ in sent]
        assert [data for data, _ in came] == sent
        sources = {source for _, source in came}
        assert len(sources) == 1
        back = sources.pop()
        assert Endpoint(*back).is_stream
        for datagram in sent:
            there.udp.send(datagram, back)
        answers = [await here.udp.take() for _ in sent]
        assert answers == [(datagram, tuple(stream)) for datagram in sent]


@in_loop
async def test_streams_from_one_outside_address_have_one_address_at_the_hub(world: World) -> None:
    async with hub(world) as (there, listener), machine() as here:
        sources = []
        for _ in range(2):
            stream = await here.streams.open(at(listener), world.hub_key.peer_id, 0)
            here.udp.send(b"\xffhello", stream)
            sources.append((await there.udp.take())[1])
        assert sources[0][0] == sources[1][0]
        assert sources[0] != sources[1]


@in_loop
async def test_the_hub_decides_which_ports_strangers_may_reach(world: World) -> None:
    async with hub(world) as (there, listener), machine() as here:
        stream = await here.streams.open(at(listener), world.hub_key.peer_id, RELAY_PORT)
        await until(lambda: here.lost == [stream])
        assert len(there.streams) == 0


@in_loop
async def test_the_end_of_a_stream_is_told_to_the_other_side_and_not_to_who_ends_it(world: World) -> None:
    async with hub(world) as (there, listener), machine() as here:
        one = await here.streams.open(at(listener), world.hub_key.peer_id, 0)
        two = await here.streams.open(at(listener), world.hub_key.peer_id, 0)
        await until(lambda: len(there.streams) == 2)
        here.streams.close(one)
        await until(lambda: len(there.streams) == 1)
        there.streams.close_all()
        await until(lambda: here.lost == [two])


@in_loop
async def test_a_hub_in_two_networks_shows_the_key_that_the_client_names(world: World) -> None:
    other = make_world("another")
    async with hub(world) as (_, listener), machine() as here:
        listener.add(Desk(other.profile(other.hub_key, other.hub), None))
        for key in (world.hub_key, other.hub_key):
            assert await here.streams.open(at(listener), key.peer_id, 0)


@in_loop
async def test_a_plain_stream_is_served_as_well(world: World) -> None:
    async with hub(world) as (there, listener):
        reader, writer = await asyncio.open_connection(LOOPBACK, listener.port)
        writer.write(build_head(0) + build_frame(bytes(4) + b"IKE"))
        data, source = await there.udp.take()
        assert data == bytes(4) + b"IKE"
        there.udp.send(b"\xc0\0\0\0ESP", source)
        assert await asyncio.wait_for(reader.readexactly(9), 5) == build_frame(b"\xc0\0\0\0ESP")
        writer.close()


# Who is not the hub.


async def trouble(here: Machine, port: int, peer_id: PeerId) -> StreamTrouble:
    with pytest.raises(StreamFailed) as caught:
        await here.streams.open(Endpoint(LOOPBACK, port), peer_id, 0)
    return caught.value.trouble


@in_loop
async def test_another_certificate_is_an_interception(world: World) -> None:
    async with hub(world) as (there, listener), machine() as here:
        assert await trouble(here, listener.port, PeerKey.generate().peer_id) is StreamTrouble.INTERCEPTED
        assert len(there.streams) == 0


@in_loop
async def test_a_web_server_in_the_hubs_place_is_an_interception() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(serve, LOOPBACK, 0)
    async with machine() as here:
        port = server.sockets[0].getsockname()[1]
        assert await trouble(here, port, PeerKey.generate().peer_id) is StreamTrouble.INTERCEPTED
    server.close()


@in_loop
async def test_nobody_there_is_silence() -> None:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = probe.getsockname()[1]
    async with machine() as here:
        assert await trouble(here, port, PeerKey.generate().peer_id) is StreamTrouble.SILENT


PORTAL = b"HTTP/1.1 302 Found\r\nLocation: http://portal.example/login?from=hub\r\n\r\n"


@in_loop
async def test_a_redirection_of_the_hubs_address_is_a_portal() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(PORTAL)
        writer.close()

    server = await asyncio.start_server(serve, LOOPBACK, 0)
    port = server.sockets[0].getsockname()[1]
    assert await find_portal(LOOPBACK, intercepted=False, port=port) == "http://portal.example/login?from=hub"
    server.close()
    await server.wait_closed()
    assert await find_portal(LOOPBACK, intercepted=False, port=port) is None


@pytest.mark.parametrize(
    ("answer", "intercepted", "portal"),
    [
        (PORTAL, False, "http://portal.example/login?from=hub"),
        (b"HTTP/1.1 301 Moved\r\nLocation: https://192.0.2.1/\r\n\r\n", False, None),
        (b"HTTP/1.1 301 Moved\r\nlocation: /login\r\n\r\n", False, None),
        (b"HTTP/1.1 301 Moved\r\nlocation: /login\r\n\r\n", True, "/login"),
        (b"HTTP/1.1 511 Network Authentication Required\r\n\r\n", False, "http://192.0.2.1/"),
        (b"HTTP/1.1 200 OK\r\n\r\n<html>", False, None),
        (b"HTTP/1.1 200 OK\r\n\r\n<html>", True, "http://192.0.2.1/"),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", True, None),
        (b"", True, None),
        (b"SSH-2.0-OpenSSH\r\n", True, None),
    ],
)
def test_which_answers_are_a_portals(answer: bytes, intercepted: bool, portal: str | None) -> None:
    assert portal_of_untrusted(answer, "192.0.2.1", intercepted=intercepted) == portal


@given(st.binary(max_size=300), st.booleans())
def test_a_portals_address_is_printable_and_short_whatever_answers(tail: bytes, intercepted: bool) -> None:
    shown = portal_of_untrusted(b"HTTP/1.1 302 x\r\nLocation: " + tail, "192.0.2.1", intercepted=intercepted)
    assert shown is None or (shown.isascii() and (shown.isprintable()) and len(shown) <= MAX_SHOWN_CHARS)


# Strangers at the listener.


async def hung_up(port: int, data: bytes) -> bool:
    """Whether the listener hangs up on who says this."""
    reader, writer = await asyncio.open_connection(LOOPBACK, port)
    writer.write(data)
    try:
        async with asyncio.timeout(5):
            while await reader.read(1000):
                pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    finally:
        writer.transport.abort()
    return True


@in_loop
async def test_whoever_does_not_begin_as_one_should_is_hung_up_on(world: World) -> None:
    async with hub(world) as (there, listener):
        for data in (b"GET / HTTP/1.1\r\n\r\n", bytes(100), b"\x16" + b"\xff" * 100, b"IKETCP\xff\xff", b"IKETCP\0\0"):
            assert await hung_up(listener.port, data), data
        assert (listener.pending, len(there.streams)) == (0, 0)


@in_loop
async def test_a_frame_that_is_too_long_ends_a_stream_inside_of_tls(world: World) -> None:
    async with hub(world) as (there, listener):
        context = client_context()
        reader, writer = await asyncio.open_connection(
            LOOPBACK, listener.port, ssl=context, server_hostname=name_of(world.hub_key.peer_id)
        )
        writer.write(build_head(0) + b"\xff\xff" + bytes(1000))
        with pytest.raises((ConnectionError, ssl.SSLError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        await until(lambda: len(there.streams) == 0)
        writer.transport.abort()


@in_loop
async def test_the_slow_are_dropped_in_time_at_every_stage(world: World) -> None:
    async with hub(world, greeting_s=0.2, unproven_s=0.2, look_s=0.05) as (there, listener), machine() as here:
        assert await hung_up(listener.port, b"")
        assert await hung_up(listener.port, b"\x16\x03")
        assert await hung_up(listener.port, b"IKE")
        stream = await here.streams.open(at(listener), world.hub_key.peer_id, 0)
        await until(lambda: here.lost == [stream])
        kept = await here.streams.open(at(listener), world.hub_key.peer_id, 0)
        here.udp.send(b"\xffhello", kept)
        _, source = await there.udp.take()
        there.streams.vouch(Endpoint(*source))
        await asyncio.sleep(0.5)
        assert here.lost == [stream]
        assert listener.pending == 0


@in_loop
async def test_one_source_gets_so_many_places_and_no_more(world: World) -> None:
    async with hub(world) as (_, listener):
        held = [await asyncio.open_connection(LOOPBACK, listener.port) for _ in range(MAX_PENDING_PER_SOURCE + 20)]
        await until(lambda: listener.pending == MAX_PENDING_PER_SOURCE)
        for _, writer in held:
            writer.transport.abort()
        await until(lambda: listener.pending == 0)


@in_loop
async def test_a_member_gets_in_while_a_thousand_strangers_hold_all_places(world: World) -> None:
    """From forty addresses, each as many connections as it can have."""
    async with hub(world) as (_, listener), machine() as here:
        loop = asyncio.get_running_loop()
        held = []
        for number in range(1000):
            sock = socket.socket()
            sock.setblocking(False)
            sock.bind((f"127.1.0.{number % 40 + 1}", 0))
            await loop.sock_connect(sock, (LOOPBACK, listener.port))
            held.append(sock)
        await until(lambda: listener.pending == MAX_PENDING)
        assert await here.streams.open(at(listener), world.hub_key.peer_id, 0)
        assert listener.pending <= MAX_PENDING
        for sock in held:
            sock.close()


@in_loop
async def test_when_tcp_stalls_the_oldest_datagrams_are_dropped_and_memory_is_bounded(world: World) -> None:
    """The other side does not read."""
    ours, theirs = socket.socketpair()
    with theirs:
        ours.setblocking(False)
        end = StreamEnd(None, server=False)
        await asyncio.get_running_loop().create_connection(lambda: end, sock=ours)
        async with machine() as here:
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.bind((LOOPBACK, 0))
            sock.connect((LOOPBACK, here.udp.port))
            end.attach(sock)
            sent = 0
            while end.dropped < 100:
                for _ in range(20):
                    here.udp.send(sent.to_bytes(4, "big") + bytes(1200), sock.getsockname())
                    sent += 1
                await asyncio.sleep(0.001)
            assert end.waiting_bytes <= MAX_WAITING_BYTES
            newest = sent - 1
            data = bytearray()
            theirs.setblocking(False)
            while newest.to_bytes(4, "big") + bytes(1200) not in data:
                await asyncio.sleep(0.001)
                try:
                    data += theirs.recv(1 << 20)
                except BlockingIOError:
                    continue
            end.close()


def test_tls_without_a_known_name_shows_the_first_network(world: World) -> None:
    profile = world.profile(world.hub_key, world.hub)
    server = TlsPipe(server_context(profile), server=True)
    client = TlsPipe(client_context(), server=False)
    client.start()
    for _ in range(3):
        server.receive_untrusted(client.take())
        client.receive_untrusted(server.take())
    assert client.peer_id_untrusted() == world.hub_key.peer_id
