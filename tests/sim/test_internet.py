"""Segments, links and routers: where a datagram goes, when it arrives, and what becomes of it."""

import asyncio
from dataclasses import replace
from itertools import pairwise

import pytest

from p2pvpn.core.address import Endpoint
from p2pvpn.core.errors import LocalError
from p2pvpn.sim.host import SimHost
from p2pvpn.sim.internet import ACCESS, LAN, Fate, Internet, Quality
from p2pvpn.sim.loop import VirtualLoop
from p2pvpn.sim.nat import Firewall, NatKind, Rule
from p2pvpn.sim.router import Router

PORT = 7000


class World:
    """Hosts with one listening socket each; `got` holds (receiver, time, source, data)."""

    def __init__(self):
        self.loop = VirtualLoop()
        self.net = Internet(self.loop, 1)
        self.got = []

    def host(self, name, segment, *addresses, quality=ACCESS):
        host = SimHost(self.net, name)
        host.attach(segment, *addresses, quality=quality)
        host.sockets.bind(None, PORT, lambda local, remote, data: self._take(name, remote, data))
        return host

    def _take(self, name, remote, data):
        self.got.append((name, self.loop.elapsed, remote, data))

    def send(self, host, to, data=b"hello", port=PORT):
        remote = Endpoint.of(to, port)
        host.send(Endpoint("::" if remote.is_ipv6 else "0.0.0.0", PORT), remote, data)

    def run(self, seconds=1.0):
        """What was received, as (receiver, source, data)."""
        self.got.clear()
        self.loop.run(asyncio.sleep(seconds))
        return [(name, str(remote), data) for name, _, remote, data in self.got]


@pytest.fixture
def world():
    world = World()
    yield world
    world.loop.close()


def home(world, name, number, nat, *, lan="192.168.1", above=None, **options):
    above = above or world.net.public
    segment = world.net.segment(f"{name} LAN", f"{lan}.0/24", f"2001:db8:{number}::/64")
    return Router(
        name,
        segment,
        above,
        inside=[f"{lan}.1", f"2001:db8:{number}::1"],
        outside=[f"198.51.100.{number}", f"2001:db8:ffff::{number}"],
        nat=NatKind.of(nat) if nat else None,
        **options,
    )


def test_a_datagram_takes_the_delay_of_both_links(world):
    one = world.host("one", world.net.public, "192.0.2.1", quality=Quality(delay_s=0.030))
    world.host("other", world.net.public, "192.0.2.2", quality=Quality(delay_s=0.012))
    world.send(one, "192.0.2.2")
    assert world.run() == [("other", "192.0.2.1:7000", b"hello")]
    assert world.got[0][1] == pytest.approx(0.042)


def test_a_link_keeps_the_order_of_what_it_jitters(world):
    one = world.host("one", world.net.public, "192.0.2.1", quality=Quality(delay_s=0.01, jitter_s=0.05))
    world.host("other", world.net.public, "192.0.2.2")
    for number in range(100):
        world.send(one, "192.0.2.2", bytes([number]))
    assert [data[0] for _, _, data in world.run()] == list(range(100))


def test_packets_that_leave_at_one_instant_arrive_in_order(world):
    one = world.host("one", world.net.public, "192.0.2.1")
    world.host("other", world.net.public, "192.0.2.2")
    for number in range(200):
        world.send(one, "192.0.2.2", bytes([number]))
    assert [data[0] for _, _, data in world.run()] == list(range(200))


def test_links_lose_double_and_reorder_as_told(world):
    quality = Quality(delay_s=0.01, loss=0.1, duplicate=0.1, reorder=0.1)
    one = world.host("one", world.net.public, "192.0.2.1", quality=quality)
    world.host("other", world.net.public, "192.0.2.2")

    async def story():
        for number in range(2000):
            world.send(one, "192.0.2.2", number.to_bytes(2, "big"))
            await asyncio.sleep(0.001)
        await asyncio.sleep(1)

    world.loop.run(story())
    numbers = [int.from_bytes(data, "big") for _, _, _, data in world.got]
    assert len(set(numbers)) == pytest.approx(1800, rel=0.05)
    assert len(numbers) - len(set(numbers)) == pytest.approx(180, rel=0.4)
    overtaken = sum(later < earlier for earlier, later in pairwise(numbers))
    assert overtaken == pytest.approx(190, rel=0.5)
    assert world.net.fates[Fate.LOST] == 2000 - len(set(numbers))


def test_what_is_larger_than_a_link_is_lost(world):
    one = world.host("one", world.net.public, "192.0.2.1", "2001:db8::1", quality=Quality(mtu=1400))
    world.host("other", world.net.public, "192.0.2.2", "2001:db8::2")
    for to, headers in (("192.0.2.2", 28), ("2001:db8::2", 48)):
        world.send(one, to, bytes(1400 - headers))
        world.send(one, to, bytes(1401 - headers))
    assert len(world.run()) == 2
    assert world.net.fates[Fate.TOO_BIG] == 2


def test_an_address_that_nobody_has_leads_nowhere(world):
    one = world.host("one", world.net.public, "192.0.2.1")
    router = home(world, "home", 1, "full-cone")
    inner = world.host("inner", router.inside.segment, "192.168.1.2", quality=LAN)
    world.send(one, "192.0.2.99")
    world.send(one, "192.168.1.2")
    world.send(inner, "192.168.1.77")
    world.send(inner, "10.0.0.1")
    assert world.run() == []
    assert world.net.fates[Fate.NO_ROUTE] == 4


def test_a_port_that_nobody_listens_on_is_noted(world):
    one = world.host("one", world.net.public, "192.0.2.1")
    other = world.host("other", world.net.public, "192.0.2.2")
    world.send(one, "192.0.2.2", port=9)
    assert world.run() == []
    assert world.net.fates[Fate.NOBODY] == other.counts["no socket"] == 1


def test_a_nat_translates_out_and_back_and_filters_the_rest(world):
    router = home(world, "home", 1, "port-restricted")
    inner = world.host("inner", router.inside.segment, "192.168.1.2", quality=LAN)
    hub = world.host("hub", world.net.public, "192.0.2.1")
    stranger = world.host("stranger", world.net.public, "192.0.2.2")
    world.send(inner, "192.0.2.1")
    assert world.run() == [("hub", "198.51.100.1:7000", b"hello")]
    world.send(hub, "198.51.100.1")
    world.send(stranger, "198.51.100.1")
    assert world.run() == [("inner", "192.0.2.1:7000", b"hello")]
    assert world.net.fates[Fate.FILTERED] == 1


def test_two_homes_may_use_the_same_private_addresses(world):
    hub = world.host("hub", world.net.public, "192.0.2.1")
    inner = [
        world.host(name, home(world, f"{name} home", number, "full-cone").inside.segment, "192.168.1.2", quality=LAN)
        for number, name in ((1, "one"), (2, "other"))
    ]
    for host in inner:
        world.send(host, "192.0.2.1")
    assert {source for _, source, _ in world.run()} == {"198.51.100.1:7000", "198.51.100.2:7000"}
    world.send(hub, "198.51.100.2")
    assert [name for name, _, _ in world.run()] == ["other"]


def test_hosts_of_one_lan_talk_without_their_router(world):
    router = home(world, "home", 1, "symmetric", blocks_udp=True)
    one, _ = (world.host(f"h{n}", router.inside.segment, f"192.168.1.{n}", quality=LAN) for n in (2, 3))
    world.send(one, "192.168.1.3")
    assert world.run() == [("h3", "192.168.1.2:7000", b"hello")]
    assert world.got[0][1] < 0.001


def test_hairpin_turns_back_only_where_the_nat_does_it(world):
    for number, kind in ((1, "full-cone"), (2, "full-cone/no-hairpin")):
        router = home(world, f"home{number}", number, kind, lan=f"192.168.{number}")
        lan = router.inside.segment
        one, other = (world.host(f"h{number}{n}", lan, f"192.168.{number}.{n}", quality=LAN) for n in (2, 3))
        world.host(f"hub{number}", world.net.public, f"192.0.2.{number}")
        world.send(one, f"192.0.2.{number}")
        world.run()
        world.send(other, f"198.51.100.{number}")
        got = world.run()
        if number == 1:
            assert [(name, data) for name, _, data in got] == [("h12", b"hello")]
            assert got[0][1].startswith("198.51.100.1:")
        else:
            assert got == []


def test_a_home_behind_a_carriers_nat_is_translated_twice(world):
    carrier_lan = world.net.segment("carrier", "100.64.0.0/10")
    Router(
        "carrier",
        carrier_lan,
        world.net.public,
        inside=["100.64.0.1"],
        outside=["198.51.100.9"],
        nat=NatKind.of("symmetric"),
    )
    lan = world.net.segment("LAN", "192.168.1.0/24")
    Router("home", lan, carrier_lan, inside=["192.168.1.1"], outside=["100.64.0.2"], nat=NatKind.of("full-cone"))
    inner = world.host("inner", lan, "192.168.1.2", quality=LAN)
    hub = world.host("hub", world.net.public, "192.0.2.1")
    world.send(inner, "192.0.2.1")
    [(_, source, _)] = world.run()
    assert source.startswith("198.51.100.9:")
    hub.send(Endpoint("0.0.0.0", PORT), Endpoint.parse(source), b"back")
    assert world.run() == [("inner", "192.0.2.1:7000", b"back")]


def test_ipv6_is_routed_and_a_firewall_lets_only_answers_in(world):
    router = home(world, "home", 1, "symmetric", firewall=Firewall(Rule.APD))
    inner = world.host("inner", router.inside.segment, "192.168.1.2", "2001:db8:1::2", quality=LAN)
    hub = world.host("hub", world.net.public, "192.0.2.1", "2001:db8:aaaa::1")
    world.send(hub, "2001:db8:1::2")
    assert world.run() == []
    world.send(inner, "2001:db8:aaaa::1")
    assert world.run() == [("hub", "[2001:db8:1::2]:7000", b"hello")]
    world.send(hub, "2001:db8:1::2")
    assert world.run() == [("inner", "[2001:db8:aaaa::1]:7000", b"hello")]


def test_without_a_nat_a_lan_is_reached_at_its_own_addresses(world):
    router = home(world, "office", 1, None, lan="203.0.113")
    world.host("inner", router.inside.segment, "203.0.113.2", quality=LAN)
    hub = world.host("hub", world.net.public, "192.0.2.1")
    world.send(hub, "203.0.113.2")
    assert world.run() == [("inner", "192.0.2.1:7000", b"hello")]
    with pytest.raises(LocalError):
        router.replace_nat(NatKind.of("symmetric"))


def test_routers_are_flushed_replaced_renumbered_and_blocked_while_it_runs(world):
    router = home(world, "home", 1, "full-cone")
    inner = world.host("inner", router.inside.segment, "192.168.1.2", quality=LAN)
    hub = world.host("hub", world.net.public, "192.0.2.1")
    world.send(inner, "192.0.2.1")
    assert len(world.run()) == 1

    router.flush()
    world.send(hub, "198.51.100.1")
    assert world.run() == []

    router.replace_nat(NatKind.of("symmetric"))
    world.send(inner, "192.0.2.1")
    [(_, source, _)] = world.run()
    assert source != "198.51.100.1:7000"

    router.renumber("198.51.100.77")
    world.send(inner, "192.0.2.1")
    [(_, source, _)] = world.run()
    assert source.startswith("198.51.100.77:")

    router.blocks_udp = True
    world.send(inner, "192.0.2.1")
    assert world.run() == []


def test_links_and_neighbours_are_cut_and_healed(world):
    one = world.host("one", world.net.public, "192.0.2.1")
    world.host("other", world.net.public, "192.0.2.2")
    world.host("third", world.net.public, "192.0.2.3")

    def reached():
        world.send(one, "192.0.2.2")
        world.send(one, "192.0.2.3")
        return sorted(name for name, _, _ in world.run())

    world.net.cut(["one"], ["other"])
    assert reached() == ["third"]
    world.net.heal()
    one.interfaces[0].is_up = False
    assert reached() == []
    one.interfaces[0].is_up = True
    assert reached() == ["other", "third"]


def test_a_host_that_moves_is_found_at_its_new_address_only(world):
    one = world.host("one", world.net.public, "192.0.2.1")
    mobile = world.host("mobile", world.net.public, "192.0.2.2")
    changes = []
    world.run()
    mobile.underlay.on_change = lambda: changes.append(mobile.underlay.local_endpoints())
    router = home(world, "cafe", 1, "full-cone")
    mobile.move(router.inside.segment, "192.168.1.2")
    world.send(one, "192.0.2.2")
    world.send(mobile, "192.0.2.1")
    assert world.run() == [("one", "198.51.100.1:7000", b"hello")]
    assert changes == [[Endpoint("192.168.1.2", 4500)]]
    assert [str(net) for net in mobile.underlay.local_networks()] == ["192.168.1.0/24"]


def test_of_two_links_the_on_link_one_wins_and_a_named_source_is_kept(world):
    router = home(world, "home", 1, "full-cone")
    inner = world.host("inner", router.inside.segment, "192.168.1.2", quality=LAN)
    mobile = world.host("mobile", world.net.public, "203.0.113.5")
    wifi = mobile.attach(router.inside.segment, "192.168.1.3")
    world.host("hub", world.net.public, "192.0.2.1")
    world.send(mobile, "192.168.1.2")
    world.send(mobile, "192.0.2.1")
    mobile.send(Endpoint("192.168.1.3", PORT), Endpoint("192.0.2.1", PORT), b"wifi")
    mobile.send(Endpoint("192.168.9.9", PORT), Endpoint("192.0.2.1", PORT), b"not ours")
    assert sorted(world.run()) == [
        ("hub", "198.51.100.1:7000", b"wifi"),
        ("hub", "203.0.113.5:7000", b"hello"),
        ("inner", "192.168.1.3:7000", b"hello"),
    ]
    assert mobile.counts["unroutable"] == 1
    mobile.detach(wifi)
    world.send(inner, "192.168.1.3")
    assert world.run() == []


def test_taps_see_every_crossing_with_its_fate(world):
    router = home(world, "home", 1, "port-restricted")
    inner = world.host("inner", router.inside.segment, "192.168.1.2", quality=LAN)
    stranger = world.host("stranger", world.net.public, "192.0.2.2")
    world.host("hub", world.net.public, "192.0.2.1")
    seen = []
    world.net.taps.append(lambda crossing: seen.append((crossing.sender, crossing.receiver, crossing.fate.value)))
    world.send(inner, "192.0.2.1")
    world.send(stranger, "198.51.100.1")
    world.run()
    assert seen == [
        ("inner", "home", "delivered"),
        ("stranger", "home", "delivered"),
        ("home", "hub", "delivered"),
        ("home", "home", "filtered"),
    ]


def test_an_address_is_given_once_on_a_segment(world):
    world.host("one", world.net.public, "192.0.2.1")
    with pytest.raises(ValueError):
        world.host("other", world.net.public, "192.0.2.1")


def test_losses_of_one_link_do_not_depend_on_the_others():
    def arrivals(more):
        world = World()
        one = world.host("one", world.net.public, "192.0.2.1", quality=replace(ACCESS, loss=0.5))
        world.host("other", world.net.public, "192.0.2.2")
        if more:
            extra = world.host("extra", world.net.public, "192.0.2.3", quality=replace(ACCESS, loss=0.5))
        for number in range(100):
            world.send(one, "192.0.2.2", bytes([number]))
            if more:
                world.send(extra, "192.0.2.2", b"extra")
        got = [data for name, _, data in world.run() if data != b"extra"]
        world.loop.close()
        return got

    assert arrivals(False) == arrivals(True)
