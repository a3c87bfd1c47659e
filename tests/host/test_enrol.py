"""Enrolment over real TLS on loopback: direct, forwarded, and with somebody in the middle."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import wraps

import pytest
from identity.world import WALL, World, entropy, make_world

from p2pvpn.core.address import Endpoint
from p2pvpn.core.errors import LocalError, P2pvpnError, RemoteError, TrustError
from p2pvpn.core.ids import PeerId
from p2pvpn.host.enrol import enrol, renew
from p2pvpn.host.enrol_server import Desk, EnrolmentServer, document_resolver
from p2pvpn.host.enrol_wire import MAGIC, MAGIC_FORWARDED
from p2pvpn.host.listener import Listener
from p2pvpn.identity.enrolment import JoinResult, Refused, join_request
from p2pvpn.identity.keys import PeerKey
from p2pvpn.identity.profile import Profile

LOOPBACK = "127.0.0.1"


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    @wraps(test)
    def run(*args: object, **kwargs: object) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


@pytest.fixture
def world() -> World:
    return make_world()


@pytest.fixture
def key() -> PeerKey:
    return PeerKey.generate()


class Hubs:
    """The issuing hub, and a second one that only forwards to where the first one listens."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.profile = world.profile(world.hub_key, world.hub)
        self.issuer = self.profile.make_issuer(entropy=entropy("issuer"))
        self.one: Listener
        self.two: Listener

    def resolve(self, peer_id: PeerId) -> Sequence[str]:
        return [f"{LOOPBACK}:{self.one.port}"] if peer_id == self.world.hub_key.peer_id else []

    @property
    def direct(self) -> str:
        return f"{LOOPBACK}:{self.one.port}"

    @property
    def indirect(self) -> str:
        return f"{LOOPBACK}:{self.two.port}"


async def listen(desk: Desk, enrolment: EnrolmentServer, greeting_s: float = 10.0) -> Listener:
    listener = Listener(None, enrolment, greeting_s=greeting_s)
    listener.add(desk)
    await listener.listen(LOOPBACK, 0)
    return listener


@asynccontextmanager
async def hubs(world: World, *, greeting_s: float = 10.0, **limits: object):
    both = Hubs(world)
    second = world.profile(world.second_key, world.second)
    both.one = await listen(Desk(both.profile, both.issuer), EnrolmentServer(wall=lambda: WALL, **limits), greeting_s)
    both.two = await listen(Desk(second, None, both.resolve), EnrolmentServer(wall=lambda: WALL))
    try:
        yield both
    finally:
        await both.one.close()
        await both.two.close()


def unused_port() -> int:
    """A port that nobody listens at: bound and closed."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


@in_loop
async def test_a_token_makes_a_member_over_tls(world: World, key: PeerKey) -> None:
    async with hubs(world) as both:
        token = both.issuer.invite("laptop", WALL)
        answer = await enrol([both.direct], token.issuer, join_request(token, key))
        profile = Profile.from_join(key, JoinResult.parse_untrusted(answer))
        assert profile.member.name == "laptop"


@in_loop
async def test_another_hub_forwards_what_it_cannot_read(world: World, key: PeerKey) -> None:
    async with hubs(world) as both:
        token = both.issuer.invite("laptop", WALL)
        answer = await enrol([both.indirect], token.issuer, join_request(token, key))
        assert JoinResult.parse_untrusted(answer).verify(token.network, key, WALL).name == "laptop"


@in_loop
async def test_a_dead_hub_costs_one_stagger(world: World, key: PeerKey) -> None:
    async with hubs(world) as both:
        token = both.issuer.invite("laptop", WALL)

        async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        silent = await asyncio.start_server(say_nothing, LOOPBACK, 0)
        nobody = f"{LOOPBACK}:{unused_port()}"
        mute = f"{LOOPBACK}:{silent.sockets[0].getsockname()[1]}"
        begun = asyncio.get_running_loop().time()
        answer = await enrol([nobody, mute, both.direct], token.issuer, join_request(token, key), stagger=0.05)
        assert JoinResult.parse_untrusted(answer)
        assert asyncio.get_running_loop().time() - begun < 3
        silent.close()


@in_loop
async def test_a_hub_that_poses_as_the_issuer_is_sent_nothing(world: World, key: PeerKey) -> None:
    """The man in the middle is a real hub with a real certificate of the network, but not the issuer."""
    received: list[bytes] = []

    class Impostor(EnrolmentServer):
        async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readexactly(24)
            await self._answer(next(iter(self.desks.values())), reader, writer)

    class Greedy:
        def handle_untrusted(self, request: bytes, _wall: float) -> bytes:
            received.append(request)
            return b""

    desk = Desk(world.profile(world.second_key, world.second), Greedy())
    impostor = await listen(desk, Impostor(wall=lambda: WALL))
    try:
        with pytest.raises(TrustError, match="somebody else answers") as caught:
            await enrol([f"{LOOPBACK}:{impostor.port}"], world.hub_key.peer_id, b"a secret request")
        assert "nothing was sent" in str(caught.value)
        assert caught.value.hint
        assert received == []
        async with hubs(world) as both:
            token = both.issuer.invite("laptop", WALL)
            addresses = [f"{LOOPBACK}:{impostor.port}", both.direct]
            assert JoinResult.parse_untrusted(await enrol(addresses, token.issuer, join_request(token, key)))
    finally:
        await impostor.close()


@in_loop
async def test_a_forwarding_hub_that_meddles_with_the_bytes_breaks_the_connection(world: World, key: PeerKey) -> None:
    async with hubs(world) as both:
        seen = bytearray()

        async def meddle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there_reader, there_writer = await asyncio.open_connection(LOOPBACK, both.one.port)

            async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, flip_after: int) -> None:
                passed = 0
                while data := await source.read(65536):
                    seen.extend(data)
                    if passed <= flip_after < passed + len(data):
                        data = (
                            data[: flip_after - passed]
                            + bytes([data[flip_after - passed] ^ 1])
                            + data[flip_after - passed + 1 :]
                        )
                    passed += len(data)
                    sink.write(data)

            try:
                await asyncio.gather(pump(reader, there_writer, 10**9), pump(there_reader, writer, 900))
            finally:
                there_writer.close()
                writer.close()

        middle = await asyncio.start_server(meddle, LOOPBACK, 0)
        token = both.issuer.invite("laptop", WALL)
        request = join_request(token, key)
        with pytest.raises(P2pvpnError):
            await enrol([f"{LOOPBACK}:{middle.sockets[0].getsockname()[1]}"], token.issuer, request, timeout=3)
        assert seen
        assert token.network not in seen
        assert key.spki not in seen
        middle.close()


@in_loop
async def test_nobody_there_is_told_with_each_address(world: World) -> None:
    port = unused_port()
    with pytest.raises(RemoteError, match=f"{LOOPBACK}:{port}") as caught:
        await enrol([f"{LOOPBACK}:{port}"], world.hub_key.peer_id, b"request")
    assert caught.value.hint
    with pytest.raises(LocalError, match="no hub"):
        await enrol([], world.hub_key.peer_id, b"request")


@in_loop
async def test_an_issuer_that_says_no_is_heard(world: World, key: PeerKey) -> None:
    async with hubs(world) as both:
        token = both.issuer.invite("laptop", WALL)
        both.issuer.withdraw("laptop")
        with pytest.raises(Refused, match="unknown here"):
            JoinResult.parse_untrusted(await enrol([both.direct], token.issuer, join_request(token, key)))


@in_loop
async def test_a_member_renews_over_tls_by_what_its_request_says(world: World, key: PeerKey) -> None:
    async with hubs(world) as both:
        token = both.issuer.invite("laptop", WALL)
        answer = await enrol([both.direct], token.issuer, join_request(token, key))
        profile = Profile.from_join(key, JoinResult.parse_untrusted(answer))
        before = profile.member.serial
        answer = await renew(Endpoint(LOOPBACK, both.two.port), profile.renew_request(world.hub_key.peer_id))
        assert profile.accept_untrusted(answer, WALL).serial != before


async def hung_up_on(port: int, data: bytes) -> bytes:
    """What a server answers before it hangs up."""
    reader, writer = await asyncio.open_connection(LOOPBACK, port)
    writer.write(data)
    try:
        return await asyncio.wait_for(reader.read(), 5)
    except ConnectionError:
        return b""
    finally:
        writer.close()


@in_loop
async def test_strangers_and_loops_are_hung_up_on(world: World) -> None:
    async with hubs(world) as both:
        nobody = PeerKey.generate().peer_id
        assert await hung_up_on(both.one.port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n") == b""
        assert await hung_up_on(both.two.port, MAGIC + nobody) == b""
        assert await hung_up_on(both.two.port, MAGIC + world.second_key.peer_id) == b""
        assert await hung_up_on(both.two.port, MAGIC_FORWARDED + world.hub_key.peer_id) == b""
        rubbish = await hung_up_on(both.one.port, MAGIC + world.hub_key.peer_id + bytes(200))
        assert not rubbish or rubbish[0] == 21, "at most a TLS alert"


@in_loop
async def test_a_silent_stranger_is_dropped_in_time(world: World) -> None:
    async with hubs(world, timeout=0.1, greeting_s=0.1) as both:
        assert await hung_up_on(both.one.port, MAGIC + b"1234") == b""
        assert await hung_up_on(both.one.port, b"p2e") == b""


@in_loop
async def test_connections_are_bounded_per_source(world: World, key: PeerKey) -> None:
    async with hubs(world, max_per_source=2) as both:
        held = [await asyncio.open_connection(LOOPBACK, both.one.port) for _ in range(2)]
        for _, writer in held:
            writer.write(MAGIC)
        assert await hung_up_on(both.one.port, MAGIC) == b""
        token = both.issuer.invite("laptop", WALL)
        with pytest.raises(RemoteError):
            await enrol([both.direct], token.issuer, join_request(token, key), timeout=2)
        for _, writer in held:
            writer.close()
            await writer.wait_closed()
        assert await enrol([both.direct] * 3, token.issuer, join_request(token, key), stagger=0.1)


@in_loop
async def test_older_tls_is_refused(world: World) -> None:
    async with hubs(world) as both:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing)
        with pytest.raises(ssl.SSLWantReadError):
            tls.do_handshake()
        answer = await hung_up_on(both.one.port, MAGIC + world.hub_key.peer_id + outgoing.read())
        assert answer[:1] == b"\x15", "a TLS alert"


@in_loop
async def test_the_document_says_where_hubs_enrol(world: World) -> None:
    resolve = document_resolver(world.profile(world.gateway_key, world.gateway))
    assert list(resolve(world.second_key.peer_id)) == ["198.51.100.7:8443"]
    assert list(resolve(PeerKey.generate().peer_id)) == []


@in_loop
async def test_a_port_that_is_taken_is_said(world: World) -> None:
    async with hubs(world) as both:
        with pytest.raises(LocalError, match=f"TCP port {both.one.port}"):
            await Listener(None).listen(LOOPBACK, both.one.port)


@in_loop
async def test_closing_ends_what_is_under_way(world: World) -> None:
    async with hubs(world) as both:
        reader, writer = await asyncio.open_connection(LOOPBACK, both.two.port)
        writer.write(MAGIC + world.hub_key.peer_id)
        async with asyncio.timeout(5):
            while not both.two.enrolment.connections or not both.one.enrolment.connections:  # noqa: ASYNC110 (two servers, no event)
                await asyncio.sleep(0)
        await both.two.close()
        assert await asyncio.wait_for(reader.read(), 5) == b""
        assert both.two.enrolment.connections == 0
        writer.close()
