"""Hosts: the real ESP engine between overlay stacks, sockets, crashes, and what traffic reports."""

import asyncio
import ipaddress
import time

import pytest

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.errors import LocalError, WireError
from p2pvpn.core.selector import Selector
from p2pvpn.esp.engine import Reason
from p2pvpn.mesh.ports import Forwarder, Plane, StateStore, Underlay
from p2pvpn.sim import packet as ip
from p2pvpn.sim.application import Flow, Pinger, ping
from p2pvpn.sim.host import SimHost
from p2pvpn.sim.internet import ACCESS, Quality

from .tunnels import NETWORK, Echo, child, connect, open_network, overlay, pair_network, public_host

A, B = overlay(0xA), overlay(0xB)


def test_the_ports_are_those_that_the_engine_asks_for(net):
    host = SimHost(net, "host")
    underlay: Underlay = host.underlay
    plane: Plane = host.plane
    forwarder: Forwarder = host.forwarder
    store: StateStore = host.store
    for port, protocol in ((underlay, Underlay), (plane, Plane), (forwarder, Forwarder), (store, StateStore)):
        wanted = {name for name in dir(protocol) if not name.startswith("_")} | set(protocol.__annotations__)
        assert wanted <= set(dir(port)), protocol


def test_a_ping_is_answered_over_esp(net, pair):
    report = net.loop.run(ping(pair[0], B, count=3))
    assert (report.sent, report.answered, report.lost) == (3, 3, [])
    assert all(rtt == pytest.approx(4 * ACCESS.delay_s, abs=1e-4) for rtt in report.rtts_s.values())
    assert report.first_answer_s == pytest.approx(0.04, abs=1e-4)


def test_everything_on_the_wire_is_esp(net, pair):
    seen = []
    net.taps.append(lambda crossing: seen.append(crossing.datagram.data))
    net.loop.run(ping(pair[0], B))
    assert len(seen) == 2
    assert all(data[0] >> 6 == 3 and b"\0" * 32 not in data for data in seen)


def test_packets_without_an_sa_are_trapped_and_go_on_when_injected(net, pair):
    trapped = []
    pair[0].plane.on_trapped = lambda network, packet: trapped.append((network, packet))

    async def story():
        before = Pinger(pair[0], overlay(0xC), count=1, wait_s=0.5)
        assert (await before.done()).answered == 0
        [(network, packet)] = trapped
        assert network == NETWORK
        assert ip.parse_untrusted(packet).destination == overlay(0xC)
        late = Pinger(pair[0], B, count=1)
        await asyncio.sleep(0)
        await pair[0].plane.remove(1)
        assert (await late.done()).answered == 0  # the answer finds no SA
        lost = Pinger(pair[0], B, count=1, wait_s=3)
        await asyncio.sleep(0.1)
        await pair[0].plane.install(child(2, A, B, "192.0.2.11:4500", spi=2))
        await pair[1].plane.install(child(2, B, A, "192.0.2.10:4500", spi=2))
        for host in pair:
            await host.plane.use(2)
        await pair[0].plane.inject(NETWORK, [trapped[-1][1], trapped[0][1]])
        assert (await lost.done()).answered == 1
        assert len(trapped) == 2

    net.loop.run(story())


def test_usage_counts_and_a_move_changes_the_path_alone(net, pair):
    third = public_host(net, "third", "192.0.2.12")
    moved = []
    pair[1].plane.on_moved = lambda number, source: moved.append((number, source))

    async def story():
        await ping(pair[0], B, count=5, interval_s=0.1)
        usage = await pair[0].plane.usage([1, 99])
        assert set(usage) == {1}
        assert (usage[1].packets_in, usage[1].packets_out) == (5, 5)
        assert usage[1].last_in_at == pytest.approx(net.loop.time(), abs=1)
        await pair[0].plane.move(1, Path(Endpoint("0.0.0.0", 4500), Endpoint("192.0.2.12", 4500)))
        assert (await ping(pair[0], B, wait_s=0.5)).answered == 0
        assert third.plane.engine.drops == {}  # an unknown SPI is not counted
        await pair[0].plane.move(1, Path(Endpoint("0.0.0.0", 4500), Endpoint("192.0.2.11", 4500)))
        pair[0].readdress(pair[0].interfaces[0], "192.0.2.99")
        await ping(pair[0], B, count=3, interval_s=0.1, wait_s=0.5)
        assert moved == [(1, Endpoint("192.0.2.99", 4500))]

    net.loop.run(story())


def test_a_replayed_datagram_is_refused_by_the_real_window(net, pair):
    seen = []
    net.taps.append(lambda crossing: seen.append(crossing.datagram))

    async def story():
        await ping(pair[0], B)
        pair[1].receive(pair[1].interfaces[0], seen[0])

    net.loop.run(story())
    assert pair[1].plane.engine.drops == {Reason.REPLAYED: 1}


def test_the_underlay_gets_all_but_esp_with_the_address_it_came_to(net):
    one, hub = public_host(net, "one", "192.0.2.1"), public_host(net, "hub", "192.0.2.2", extra_ports=(3478,))
    got = []
    hub.underlay.on_datagram = lambda path, data: got.append((path, data))

    async def story():
        for port, data in ((4500, b"\0\0\0\0ike"), (3478, b"stun"), (4500, b"\xff"), (4500, b"\xc0esp"), (4501, b"no")):
            path = Path(Endpoint("0.0.0.0", 4500), Endpoint("192.0.2.2", port))
            one.underlay.send(path, data)
        one.underlay.send(Path(Endpoint("0.0.0.0", 9), Endpoint("192.0.2.2", 4500)), b"not our port")
        await asyncio.sleep(1)

    net.loop.run(story())
    source = Endpoint("192.0.2.1", 4500)
    assert got == [
        (Path(Endpoint("192.0.2.2", 4500), source), b"\0\0\0\0ike"),
        (Path(Endpoint("192.0.2.2", 3478), source), b"stun"),
    ]


def test_library_code_opens_sockets_on_overlay_addresses(net, pair):
    net.loop.network = pair_network(pair)

    async def story():
        ends = [
            (await net.loop.create_datagram_endpoint(Echo, local_addr=(str(address), 5555)))[1] for address in (A, B)
        ]
        ends[0].transport.sendto(b"?hello", (str(B), 5555))
        ends[0].transport.sendto(b"?" + bytes(4000), (str(B), 5555))
        await asyncio.sleep(1)
        assert [data for data, _ in ends[1].got] == [b"?hello", b"?" + bytes(4000)]
        assert ends[0].got == [(b"hello", (str(B), 5555, 0, 0)), (bytes(4000), (str(B), 5555, 0, 0))]
        assert ends[0].transport.get_extra_info("sockname")[:2] == (str(A), 5555)
        with pytest.raises(OSError):
            await net.loop.create_datagram_endpoint(Echo, local_addr=(str(A), 5555))
        with pytest.raises(OSError):
            await net.loop.create_datagram_endpoint(Echo, local_addr=("fd00::77", 5555))
        ends[1].transport.close()
        ends[0].transport.sendto(b"?more", (str(B), 5555))
        await asyncio.sleep(1)
        assert ends[1].lost == "closed"
        assert len(ends[1].got) == 2
        again = (await net.loop.create_datagram_endpoint(Echo, local_addr=(str(B), 5555)))[1]
        connected = (await net.loop.create_datagram_endpoint(Echo, local_addr=(str(A), 0), remote_addr=(str(B), 5555)))[
            1
        ]
        connected.transport.sendto(b"?x")
        await asyncio.sleep(1)
        assert again.got[0][0] == b"?x"
        assert connected.got[0][0] == b"x"

    net.loop.run(story())


def test_oversized_packets_teach_the_stack_the_path_mtu(net, pair):
    async def story():
        for host, local, remote, to in ((pair[0], A, B, "192.0.2.11:4500"), (pair[1], B, A, "192.0.2.10:4500")):
            await host.plane.install(child(2, local, remote, to, spi=2, mtu=1300))
            await host.plane.use(2)
        first = await Pinger(pair[0], B, count=3, size=1340, interval_s=0.1).done()
        assert first.lost == [0, 1]  # a request taught the one side, an answer the other
        assert [host.stack().counts["too big"] for host in pair] == [1, 1]

    net.loop.run(story())


def test_ipv4_inside_works_with_fragments(net):
    hosts = [public_host(net, name, f"192.0.2.{number}") for name, number in (("a", 10), ("b", 11))]

    async def story():
        for number, host in enumerate(hosts):
            await open_network(host, f"10.99.0.{number + 10}")
        await connect(*hosts, "192.0.2.10:4500", "192.0.2.11:4500")
        assert (await ping(hosts[0], "10.99.0.11")).answered == 1
        assert (await Pinger(hosts[0], "10.99.0.11", size=3000).done()).answered == 1
        report = await Flow(*hosts, count=20, size=2500, ipv6=False).done()
        assert report.lost == []

    net.loop.run(story())


def test_a_flow_reports_loss_and_delay(net):
    hosts = [
        public_host(net, name, f"192.0.2.{number}", quality=Quality(0.01, loss=loss, duplicate=0.05))
        for name, number, loss in (("a", 10, 0.1), ("b", 11, 0.0))
    ]

    async def story():
        for number, host in enumerate(hosts):
            await open_network(host, (A, B)[number])
        await connect(*hosts, "192.0.2.10:4500", "192.0.2.11:4500")
        return await Flow(*hosts, count=500, rate=500).done()

    report = net.loop.run(story())
    assert report.sent == 500
    assert len(report.lost) == pytest.approx(50, rel=0.5)
    assert report.duplicates == 0  # ESP's replay window takes them out
    assert all(delay == pytest.approx(0.02, abs=1e-3) for delay in report.rtts_s.values())
    assert 0.002 <= report.longest_gap_s < 0.02


def test_a_gateway_answers_for_its_site_and_a_hub_forwards_between_spokes(net):
    spoke, hub, gateway = (
        public_host(net, name, f"192.0.2.{number}") for name, number in (("spoke", 10), ("hub", 12), ("gateway", 11))
    )
    c = overlay(0xC)
    every = Selector.of_network("fd00::/8")
    site = Selector.of_network("10.99.7.0/24")

    async def story():
        await open_network(spoke, A, "10.99.0.10")
        await open_network(hub, c)
        await open_network(gateway, B)
        gateway.stack().serve("10.99.7.0/24")
        all_v4 = Selector.of_network("10.99.0.0/16")
        for near, far, near_host, far_address, spi in (
            (A, c, spoke, "192.0.2.12:4500", 1),
            (c, A, hub, "192.0.2.10:4500", 1),
            (c, B, hub, "192.0.2.11:4500", 2),
            (B, c, gateway, "192.0.2.12:4500", 2),
        ):
            spoke_side = near is A or (near is B)
            peer = Selector.of_address(far) if not spoke_side else every
            mine = Selector.of_address(near) if spoke_side else every
            v4_mine = site if near is B else Selector.of_address("10.99.0.10") if near is A else all_v4
            v4_peer = all_v4 if spoke_side else site if far is B else Selector.of_address("10.99.0.10")
            sides = ((mine, v4_mine), (peer, v4_peer))
            await near_host.plane.install(child(spi, near, far, far_address, spi=spi, selectors=sides))
            await near_host.plane.use(spi)
        assert (await ping(spoke, B)).answered == 1
        assert (await ping(spoke, "10.99.7.55")).answered == 1
        assert hub.stack().counts["forwarded"] == 4

    net.loop.run(story())


def test_the_forwarder_passes_bytes_between_bound_sources_only(net):
    one, other, hub = (public_host(net, name, f"192.0.2.{n}") for name, n in (("one", 1), ("other", 2), ("hub", 3)))
    unbound, got = [], []
    hub.forwarder.on_unbound = lambda port, source, data: unbound.append((port, source.host, data))
    for host in (one, other):
        host.underlay.on_datagram = lambda path, data: got.append((path, data))

    def send(host, port, data):
        host.underlay.send(Path(Endpoint("0.0.0.0", 4500), Endpoint("192.0.2.3", port)), data)

    async def story():
        left, right = await hub.forwarder.open_pair()
        send(one, left, b"early")
        await asyncio.sleep(1)
        hub.forwarder.bind(left, Endpoint("192.0.2.1", 4500))
        send(one, left, b"no twin yet")
        await asyncio.sleep(1)
        hub.forwarder.bind(right, Endpoint("192.0.2.2", 4500))
        send(one, left, b"there")
        send(other, right, b"back")
        send(other, left, b"wrong port")
        await asyncio.sleep(1)
        assert unbound == [
            (left, "192.0.2.1", b"early"),
            (left, "192.0.2.1", b"no twin yet"),
            (left, "192.0.2.2", b"wrong port"),
        ]
        assert sorted((path.local.host, path.remote, data) for path, data in got) == [
            ("192.0.2.1", Endpoint("192.0.2.3", left), b"back"),
            ("192.0.2.2", Endpoint("192.0.2.3", right), b"there"),
        ]
        at, count = hub.forwarder.used_at(left)
        assert at == pytest.approx(net.loop.time() - 0.98, abs=0.01)
        assert count == len(b"there") + len(b"back")
        hub.forwarder.answer(left, Endpoint("192.0.2.1", 4500), b"answer")
        await asyncio.sleep(1)
        assert got[-1][1] == b"answer"
        hub.forwarder.close_pair(right)
        send(one, left, b"gone")
        await asyncio.sleep(1)
        assert len(unbound) == 3
        for ask in (lambda: hub.forwarder.used_at(left), lambda: hub.forwarder.bind(left, Endpoint("192.0.2.1", 1))):
            with pytest.raises(LocalError):
                ask()

    net.loop.run(story())


def test_a_network_is_opened_once_and_closed_with_its_sas(net, pair):
    async def story():
        with pytest.raises(LocalError):
            await open_network(pair[0], A)
        await pair[0].plane.close_network(NETWORK)
        assert await pair[0].plane.usage([1]) == {}
        with pytest.raises(LocalError):
            pair[0].stack()

    net.loop.run(story())


def test_a_thousand_packets_cost_well_under_a_second(net, pair):
    async def story():
        return await Flow(*pair, count=1000, rate=1000).done()

    before = time.process_time()
    report = net.loop.run(story())
    assert report.lost == []
    assert time.process_time() - before < 1


@pytest.mark.parametrize(("source", "destination"), [("fd00::1", "fd00::2"), ("10.0.0.1", "10.0.0.2")])
@pytest.mark.parametrize("size", [0, 1, 999, 1232, 1233, 4000])
def test_packets_survive_fragments_in_any_order_and_no_bit_error(source, destination, size):
    source, destination = ipaddress.ip_address(source), ipaddress.ip_address(destination)
    packet = ip.udp_packet(source, 1, destination, 2, bytes(range(256)) * (size // 256) + bytes(size % 256))
    pieces = ip.cut(packet, 1280, 7)
    assert all(len(piece) <= 1280 for piece in pieces)
    reassembler = ip.Reassembler()
    whole = [reassembler.take_untrusted(piece) for piece in reversed(pieces)]
    assert whole[:-1] == [None] * (len(pieces) - 1)
    inner = ip.parse_untrusted(whole[-1])
    assert (inner.source, inner.destination) == (source, destination)
    assert len(ip.udp_untrusted(inner)[2]) == size
    spoiled = inner._replace(payload=inner.payload[:-1] + bytes([inner.payload[-1] ^ 1]))
    with pytest.raises(WireError):
        ip.udp_untrusted(spoiled)
