"""The user-space forwarder with real sockets: what passes, what goes to the relay server, and what never passes."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import struct
import subprocess
import sys

import pytest

from p2pvpn.core import stun
from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.errors import LocalError
from p2pvpn.core.ids import PeerId
from p2pvpn.core.output import Transmit
from p2pvpn.core.secret import Secret
from p2pvpn.lab.namespace import is_inside
from p2pvpn.relay.binding import build_request
from p2pvpn.relay.client import RelayClient, RelayReady
from p2pvpn.relay.limits import RelayLimits
from p2pvpn.relay.server import Answer, Bind, ClosePair, Forward, RelayServer
from p2pvpn.relay.wire import RelayTicket, transaction_id

from .relays import V4, V6, Relay, Source, free_range, relay, until

UDP_SEGMENT = 103
BIND_REQUEST = build_request(RelayTicket(1, "somebody.a", Secret(bytes(32)), 60), transaction_id(1, b"abcd"), b"")


@pytest.fixture(autouse=True)
def _loopback():
    """A laboratory starts without one."""
    if is_inside():
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


@pytest.mark.parametrize("host_b", [V4, V6])
@pytest.mark.parametrize("host_a", [V4, V6])
def test_bytes_pass_both_ways_unchanged_in_any_mix_of_families(host_a, host_b):
    async def story():
        async with relay() as hub:
            with Source(host_a) as a, Source(host_b) as b:
                port_a, port_b = await hub.pair_of(a, b)
                for data in (b"\xff", b"\xc0 esp", b"\0\0\0\0 ike", bytes(range(256)) * 5):
                    a.send(port_a, data)
                    assert await b.receive() == (data, Endpoint(host_b, port_b))
                    b.send(port_b, data[::-1])
                    assert await a.receive() == (data[::-1], Endpoint(host_a, port_a))
                assert hub.up.empty()

    asyncio.run(story())


def test_a_stranger_passes_nothing_and_is_handed_up_with_its_source():
    async def story():
        async with relay() as hub:
            with Source() as a, Source() as b, Source() as stranger, Source(V6) as six:
                port_a, _ = await hub.pair_of(a, b)
                for source in (stranger, six):
                    source.send(port_a, b"let me in")
                    assert await hub.handed_up() == (port_a, source.at, b"let me in")
                a.send(port_a, b"last")
                assert await b.data() == b"last"
                assert b.is_silent()

    asyncio.run(story())


def test_what_a_bound_source_sends_is_handed_up_until_the_twin_is_bound():
    async def story():
        async with relay() as hub:
            with Source() as a, Source() as b:
                port_a, port_b = await hub.forwarder.open_pair()
                hub.forwarder.bind(port_a, a.at)
                await hub.settled()
                a.send(port_a, b"early")
                assert await hub.handed_up() == (port_a, a.at, b"early")
                hub.forwarder.answer(port_b, b.at, b"early")
                hub.forwarder.bind(port_b, b.at)
                await hub.settled()
                a.send(port_a, b"late")
                assert [await b.data(), await b.data()] == [b"early", b"late"]

    asyncio.run(story())


def test_binding_requests_go_to_the_server_and_other_stun_passes():
    async def story():
        async with relay() as hub:
            with Source() as a, Source() as b:
                port_a, _ = await hub.pair_of(a, b)
                check = stun.build(stun.request(b"twelve bytes", username="a:b", priority=1), b"key")
                a.send(port_a, BIND_REQUEST)
                a.send(port_a, check)
                assert await hub.handed_up() == (port_a, a.at, BIND_REQUEST)
                assert await b.data() == check
                assert b.is_silent()

    asyncio.run(story())


def test_a_new_binding_replaces_the_old_one():
    async def story():
        async with relay() as hub:
            with Source() as old, Source() as new, Source() as b:
                port_a, port_b = await hub.pair_of(old, b)
                hub.forwarder.bind(port_a, new.at)
                await hub.settled()
                old.send(port_a, b"from the old address")
                assert (await hub.handed_up())[1] == old.at
                new.send(port_a, b"from the new address")
                assert await b.data() == b"from the new address"
                b.send(port_b, b"back")
                assert await new.data() == b"back"
                assert old.is_silent()

    asyncio.run(story())


def test_answers_and_relayed_packets_leave_from_the_address_that_was_asked():
    async def story():
        async with relay() as hub:
            with Source() as a, Source() as b:
                port_a, port_b = await hub.forwarder.open_pair()
                a.send(port_a, b"bind me", "127.0.0.55")
                await hub.handed_up()
                hub.forwarder.answer(port_a, a.at, b"answer")
                assert await a.receive() == (b"answer", Endpoint("127.0.0.55", port_a))
                hub.forwarder.bind(port_a, a.at)
                hub.forwarder.bind(port_b, b.at)
                await hub.settled()
                b.send(port_b, b"data")
                assert await a.receive() == (b"data", Endpoint("127.0.0.55", port_a))
                a.send(port_a, BIND_REQUEST, "127.0.0.66")
                await hub.handed_up()
                hub.forwarder.bind(port_a, a.at)
                await hub.settled()
                b.send(port_b, b"data")
                assert await a.receive() == (b"data", Endpoint("127.0.0.66", port_a))

    asyncio.run(story())


@pytest.mark.parametrize("host", [V4, V6])
def test_a_train_of_segments_arrives_whole_and_in_order_and_a_bind_inside_it_does_not_pass(host):
    async def story():
        async with relay() as hub:
            with Source(host) as a, Source(host) as b:
                port_a, _ = await hub.pair_of(a, b)
                cars = [bytes([0xC0, number]) + os.urandom(998) for number in range(20)]
                segment = [(socket.SOL_UDP, UDP_SEGMENT, struct.pack("=H", 1000))]
                a.sock.sendmsg([*cars, BIND_REQUEST], segment, 0, (host, port_a))
                a.send(port_a, b"the end")
                assert [await b.data() for _ in range(21)] == [*cars, b"the end"]
                assert await hub.handed_up() == (port_a, a.at, BIND_REQUEST)

    asyncio.run(story())


def test_usage_is_counted_over_both_directions():
    async def story():
        async with relay() as hub:
            with Source() as a, Source() as b:
                port_a, port_b = await hub.pair_of(a, b)
                assert hub.forwarder.used_at(port_a) == (0.0, 0)
                before = asyncio.get_running_loop().time()
                a.send(port_a, bytes(1000))
                await b.data()
                b.send(port_b, bytes(500))
                await a.data()
                await until(lambda: hub.forwarder.used_at(port_b)[1] >= 1500)
                at, total = hub.forwarder.used_at(port_a)
                assert total == 1500
                assert before <= at <= asyncio.get_running_loop().time()

    asyncio.run(story())


def test_a_closed_pair_passes_nothing_and_frees_its_ports():
    async def story():
        async with relay() as hub:
            with Source() as a, Source() as b, Source() as late:
                port_a, port_b = await hub.pair_of(a, b)
                hub.forwarder.close_pair(port_b)
                hub.forwarder.close_pair(port_b)
                hub.forwarder.bind(port_a, a.at)
                hub.forwarder.answer(port_a, a.at, b"nothing")
                await hub.settled()
                late.send(port_a, b"hello?")
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
                    other.bind((V4, port_a))
                assert hub.forwarder.used_at(port_a) == (0.0, 0)
                assert a.is_silent()
                assert b.is_silent()
                assert hub.up.empty()

    asyncio.run(story())


def test_a_range_that_is_used_up_refuses_and_serves_again_after_a_close():
    ports = free_range(5)

    async def story():
        async with relay(ports=ports) as hub:
            one, two = await hub.forwarder.open_pair(), await hub.forwarder.open_pair()
            assert len({*one, *two}) == 4
            assert {*one, *two} < set(ports)
            with pytest.raises(LocalError, match="no relay port"):
                await hub.forwarder.open_pair()
            hub.forwarder.close_pair(one[0])
            assert set(await hub.forwarder.open_pair()) < set(ports)

    asyncio.run(story())


def test_hundreds_of_pairs_stay_apart():
    async def story():
        async with relay() as hub:
            with Source() as a, Source() as b:
                pairs = [await hub.pair_of(a, b) for _ in range(200)]
                for port_a, port_b in pairs:
                    a.send(port_a, b"%d" % port_b)
                    data, source = await b.receive()
                    assert int(data) == source.port == port_b

    asyncio.run(story())


def test_a_flood_of_strangers_is_rationed_and_the_bound_pass_meanwhile():
    async def story():
        async with relay() as hub:
            with Source() as a, Source() as b, Source() as stranger:
                port_a, _ = await hub.pair_of(a, b)
                for _ in range(50):
                    for _ in range(100):
                        stranger.send(port_a, b"junk")
                    a.send(port_a, b"data")
                    assert await b.data() == b"data"
                await hub.settled()
                assert 1 <= hub.up.qsize() < 1000

    asyncio.run(story())


def test_a_worker_that_dies_is_replaced_with_the_same_ports_and_bindings(caplog):
    async def story():
        async with relay(restart_s=0.01) as hub:
            with Source() as a, Source() as b:
                port_a, port_b = await hub.pair_of(a, b)
                first = hub.forwarder.pid
                os.kill(first, signal.SIGKILL)
                await until(lambda: hub.forwarder.pid not in (first, None))
                await hub.settled()
                a.send(port_a, b"still there?")
                assert await b.receive() == (b"still there?", Endpoint(V4, port_b))

    asyncio.run(story())
    assert "ended with code -9" in caplog.text


def test_without_a_worker_no_pair_is_opened(caplog):
    async def story():
        async with relay(restart_s=1000) as hub:
            os.kill(hub.forwarder.pid, signal.SIGSTOP)
            waiting = asyncio.create_task(hub.forwarder.open_pair())
            await asyncio.sleep(0)
            os.kill(hub.forwarder.pid, signal.SIGKILL)
            with pytest.raises(LocalError, match="ended"):
                await waiting
            with pytest.raises(LocalError, match="does not run"):
                await hub.forwarder.open_pair()

    asyncio.run(story())


def test_a_pair_whose_asker_left_is_closed():
    async def story():
        async with relay(ports=free_range(2)) as hub:
            waiting = asyncio.create_task(hub.forwarder.open_pair())
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            async with asyncio.timeout(10):
                while True:
                    try:
                        return await hub.forwarder.open_pair()
                    except LocalError:
                        continue

    assert asyncio.run(story())


DAEMON = """
import asyncio, sys
from p2pvpn.host.forwarder import UserForwarder
async def main():
    forwarder = UserForwarder()
    await forwarder.start()
    await forwarder.open_pair()
    print(forwarder.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def test_the_worker_dies_with_the_daemon():
    with subprocess.Popen([sys.executable, "-c", DAEMON], stdout=subprocess.PIPE, text=True) as daemon:
        worker = os.pidfd_open(int(daemon.stdout.readline()))
        daemon.kill()
        assert select.select([worker], [], [], 20)[0]
        os.close(worker)


@pytest.mark.parametrize(("host_a", "host_b"), [(V4, V4), (V4, V6), (V6, V6)])
def test_relay_server_clients_and_forwarder_together(host_a, host_b):
    """Both clients bind, one by its tunnel's address and one by a nonce; the first packet waits for the second side."""

    async def story():
        loop = asyncio.get_running_loop()
        async with relay() as hub:
            server = RelayServer(RelayLimits(), os.urandom)

            def do(outputs):
                for output in outputs:
                    match output:
                        case Bind(port, source):
                            hub.forwarder.bind(port, source)
                        case Answer(port, to, data) | Forward(port, to, data):
                            hub.forwarder.answer(port, to, data)
                        case ClosePair(port):
                            hub.forwarder.close_pair(port)

            hub.forwarder.on_unbound = lambda port, source, data: do(server.handle(port, source, data, loop.time()))
            ports = await hub.forwarder.open_pair()
            peers = PeerId(bytes(20)), PeerId(bytes([1]) * 20)
            allocation = server.allocate(*ports, *peers, Endpoint(host_a, 0).ip, None, loop.time())

            async def bind(source, ticket):
                client = RelayClient(ticket, Path(source.at, Endpoint(source.at.host, ticket.port)), os.urandom)
                outputs = client.bind(loop.time())
                while not isinstance(outputs[0], RelayReady):
                    assert isinstance(outputs[0], Transmit)
                    source.send(outputs[0].path.remote.port, outputs[0].data)
                    outputs = client.handle(client.path, await source.data(), loop.time())
                return outputs[0]

            with Source(host_a) as a, Source(host_b) as b:
                assert (await bind(a, allocation.side_a)).mapped == a.at
                a.send(ports[0], b"first")
                a.send(ports[0], b"second")
                await until(lambda: server._pairs[allocation.id].sides[1].queued_bytes == 11)
                early, ready = await bind_quietly(b, allocation.side_b, bind)
                assert ready.mapped == b.at
                early += [await b.data() for _ in range(2 - len(early))]
                assert early == [b"first", b"second"]
                b.send(ports[1], b"answer")
                assert await a.data() == b"answer"

    async def bind_quietly(source, ticket, bind):
        """Data that arrives before the relay's answer is kept aside, as the engine's demultiplexer does."""
        early = []
        receive = source.data

        async def only_stun():
            while (data := await receive())[4:8] != bytes.fromhex("2112a442"):
                early.append(data)
            return data

        source.data = only_stun
        ready = await bind(source, ticket)
        del source.data
        return early, ready

    asyncio.run(story())


@pytest.mark.netns
@pytest.mark.parametrize(("host_a", "host_b"), [(V4, "10.5.0.2"), (V6, "fd00:5::2")])
def test_a_train_longer_than_the_way_onward_allows_arrives_in_fragments(lab, host_a, host_b):
    hub, node_b = lab.node("hub"), lab.node("b")
    lab.link(hub, "eth0", node_b, "eth0")
    for node, number in ((hub, 1), (node_b, 2)):
        node.ip(f"addr add 10.5.0.{number}/24 dev eth0\naddr add fd00:5::{number}/64 dev eth0 nodad")
        node.ip("link set eth0 mtu 1300")

    async def story():
        it = Relay()
        with hub.inside():
            await it.forwarder.start()
            a = Source(host_a)
        with node_b.inside():
            b = Source(host_b)
        try:
            with a, b:
                port_a, _ = await it.pair_of(a, b)
                cars = [bytes([0xC0, number]) + os.urandom(1398) for number in range(20)]
                segment = [(socket.SOL_UDP, UDP_SEGMENT, struct.pack("=H", 1400))]
                a.sock.sendmsg(cars, segment, 0, (host_a, port_a))
                assert sorted([await b.data() for _ in cars]) == sorted(cars)
        finally:
            await it.forwarder.close()

    asyncio.run(story())


@pytest.mark.netns
def test_a_machine_without_ipv6_relays_ipv4(lab):
    hub = lab.node("hub")
    hub.sysctl({"net/ipv6/conf/all/disable_ipv6": "1"})

    async def story():
        it = Relay()
        with hub.inside():
            await it.forwarder.start()
            a, b = Source(), Source()
        try:
            with a, b:
                port_a, port_b = await it.pair_of(a, b)
                a.send(port_a, b"data")
                assert await b.receive() == (b"data", Endpoint(V4, port_b))
        finally:
            await it.forwarder.close()

    asyncio.run(story())
