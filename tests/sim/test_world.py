"""Worlds: places, identities made by the product's own code, and what the oracle says of pairs."""

import asyncio
from ipaddress import ip_network

import pytest

from p2pvpn.core.address import Endpoint, any_local
from p2pvpn.core.errors import LocalError
from p2pvpn.core.ids import overlay_address
from p2pvpn.identity.profile import Profile
from p2pvpn.sim.application import ping
from p2pvpn.sim.internet import Quality
from p2pvpn.sim.nat import Rule
from p2pvpn.sim.oracle import Verdict
from p2pvpn.sim.world import World

from .tunnels import connect


@pytest.fixture
def world():
    with World(seed=7) as world:
        yield world


def test_a_world_has_hubs_homes_and_peers_with_addresses_of_their_own(world):
    hubs = [world.hub(), world.hub()]
    homes = [world.home(), world.home("symmetric", ipv6=True)]
    peers = [world.peer(f"peer{n}", behind=home) for n, home in enumerate([*homes, *homes, None])]
    assert [str(hub.host.underlay.local_endpoints()[0]) for hub in hubs] == ["192.0.2.1:4500", "192.0.2.2:4500"]
    assert hubs[0].host.underlay.ports == (4500, 500, 3478)
    assert [[e.host for e in peer.host.underlay.local_endpoints()] for peer in peers] == [
        ["192.168.1.2"],
        ["192.168.2.2", "2001:db8:2::2"],
        ["192.168.1.3"],
        ["192.168.2.3", "2001:db8:2::3"],
        ["203.0.113.1"],
    ]


def test_identities_are_real_and_repeat_with_the_seed(world):
    hub, alice = world.hub(), world.peer("alice")
    world.publish()
    member = hub.profile.trust.verify_chain(alice.profile.chain, world.wall())
    assert member.name == "alice"
    assert member.overlay == alice.overlay == overlay_address(member.network, member.peer_id)
    assert hub.is_hub
    assert not alice.is_hub
    assert Profile.load(alice.host.store.read).member.peer_id == member.peer_id
    with World(seed=7) as again, World(seed=8) as other:
        again.hub()
        other.hub()
        assert again.peer("alice").overlay == alice.overlay
        assert other.peer("alice").overlay != alice.overlay


def test_hubs_that_come_later_are_in_the_document_that_is_published(world):
    first = world.hub()
    alice = world.peer("alice")
    second = world.hub(issuer=True)
    assert len(alice.profile.document.hubs) == 1
    world.publish()
    assert {entry.peer_id for entry in alice.profile.document.hubs} == {
        hub.profile.member.peer_id for hub in (first, second)
    }
    assert set(world.issuers) == {"hub1", "hub2"}


def test_a_gateway_is_granted_its_prefixes(world):
    world.hub()
    gateway = world.peer("gateway", prefixes=["10.20.0.0/16"])
    assert any(block.networks() == [ip_network("10.20.0.0/16")] for block in gateway.profile.member.blocks)


def test_names_are_given_once(world):
    world.peer("alice")
    world.home(name="home")
    with pytest.raises(LocalError):
        world.peer("alice")
    with pytest.raises(LocalError):
        world.home(name="home")


def test_certificates_are_renewed_through_the_issuer_that_the_request_names(world):
    hub, alice = world.hub(), world.peer("alice")
    until = alice.profile.member.not_after
    renew = world.renew_of(alice)

    async def story(request):
        return await renew(Endpoint("192.0.2.1", 443), request)

    world.run(asyncio.sleep(3600 * 24), limit_s=3600 * 25)
    answer = world.run(story(alice.profile.renew_request(hub.profile.member.peer_id)))
    assert alice.profile.accept_untrusted(answer, world.wall()).not_after > until
    hub.host.crash()
    with pytest.raises(LocalError):
        world.run(story(alice.profile.renew_request(hub.profile.member.peer_id)))


def test_the_resolver_knows_numbers_and_names(world):
    world.resolver.names["hub.example"] = ["192.0.2.1", "2001:db8::1"]

    async def story():
        return [
            [str(endpoint) for endpoint in await world.resolver.resolve(text, 4500)]
            for text in ("192.0.2.9", "192.0.2.9:7", "hub.example", "hub.example:7", "nobody.example")
        ]

    assert world.run(story()) == [
        ["192.0.2.9:4500"],
        ["192.0.2.9:7"],
        ["192.0.2.1:4500", "[2001:db8::1]:4500"],
        ["192.0.2.1:7", "[2001:db8::1]:7"],
        [],
    ]


def test_the_oracle_sees_where_machines_are_now(world):
    hub = world.hub()
    strict = world.home("port-restricted")
    alice = world.peer("alice", behind=world.home("symmetric"))
    bob, brother = world.peer("bob", behind=strict), world.peer("brother", behind=strict)
    assert world.verdict(alice, hub) is Verdict.DIRECT
    assert world.verdict(alice, bob) is Verdict.BIRTHDAY
    assert world.verdict(bob, brother) is Verdict.DIRECT
    world.move(alice, world.home("restricted"))
    assert world.verdict(alice, bob) is Verdict.DIRECT
    strict.router.blocks_udp = True
    assert world.verdict(alice, bob) is Verdict.STREAM
    world.move(bob, None)
    assert world.verdict(alice, bob) is Verdict.DIRECT


def test_the_oracle_sees_carriers_and_ipv6(world):
    for hairpin, want in (("", Verdict.DIRECT), ("/no-hairpin", Verdict.RELAYED)):
        carrier = world.home(f"full-cone{hairpin}", lan=f"100.{64 + len(hairpin)}.0.0/16")
        pair = [world.peer(f"p{n}{hairpin[1:]}", behind=world.home("full-cone", behind=carrier)) for n in range(2)]
        assert world.verdict(*pair) is want
        assert pair[0].home.edge == carrier.router.name
    six = [world.peer(f"six{n}", behind=world.home("symmetric", ipv6=True, firewall=Rule.APD)) for n in range(2)]
    assert world.verdict(*six) is Verdict.DIRECT


def test_an_ipv6_prefix_is_reached_through_the_carrier_and_the_firewall_of_its_home(world):
    carrier = world.home("port-restricted", lan="100.64.0.0/16")
    inside = world.peer("inside", behind=world.home("full-cone", behind=carrier, ipv6=True, firewall=Rule.APD))
    outside = world.peer("outside", ipv6=True)
    assert world.verdict(inside, outside) is Verdict.DIRECT
    ends = [next(e for e in machine.host.underlay.local_endpoints() if e.is_ipv6) for machine in (inside, outside)]
    got = []
    for machine in (inside, outside):
        machine.host.sockets.bind(None, 7000, lambda local, remote, data: got.append((remote.host, data)))

    async def send(machine, to):
        machine.host.send(Endpoint("::", 7000), Endpoint(to.host, 7000), machine.name.encode())
        await asyncio.sleep(1)
        return [data for _, data in got]

    assert world.run(send(outside, ends[0])) == []
    assert world.run(send(inside, ends[1])) == [b"inside"]
    assert world.run(send(outside, ends[0])) == [b"inside", b"outside"]
    assert [host for host, _ in got] == [end.host for end in ends]


def test_a_home_without_nat_has_public_addresses_inside(world):
    office = world.home("none")
    alice = world.peer("alice", behind=office)
    assert office.ipv4 == ()
    assert not alice.host.underlay.local_endpoints()[0].host.startswith("192.168")
    assert world.verdict(alice, world.peer("bob", behind=world.home("symmetric"))) is Verdict.DIRECT


def test_a_partition_stops_what_crosses_it(world):
    hub, alice = world.hub(), world.peer("alice", behind=world.home("full-cone"))
    got = []
    hub.host.sockets.bind(None, 7000, lambda local, remote, data: got.append(data))

    async def send():
        alice.host.send(Endpoint("0.0.0.0", 7000), Endpoint("192.0.2.1", 7000), b"x")
        await asyncio.sleep(1)
        return len(got)

    assert world.run(send()) == 1
    world.cut([alice], [hub])
    assert world.run(send()) == 1
    world.internet.heal()
    assert world.run(send()) == 2


class Silent(asyncio.DatagramProtocol):
    """Does nothing."""


def test_sockets_are_opened_on_the_host_whose_code_asks(world):
    same = [world.peer(name, behind=world.home(lan="192.168.77.0/24")) for name in ("one", "other")]

    async def open_here(local):
        transport, _ = await world.loop.create_datagram_endpoint(Silent, local_addr=local)
        return transport

    async def story():
        with pytest.raises(OSError, match="2 hosts"):
            await open_here(("192.168.77.2", 9000))
        for machine in same:
            await machine.host.spawn(open_here(("192.168.77.2", 9000)))
            with pytest.raises(OSError):
                await machine.host.spawn(open_here(("192.168.77.2", 9000)))
            await machine.host.spawn(open_here(("0.0.0.0", 9001)))

    world.run(story())


def tell(seed):
    """A small story with losses, a NAT and pings; returns its trace."""
    with World(seed) as world:
        hub = world.hub(quality=Quality(0.01, jitter_s=0.01, loss=0.1, reorder=0.1))
        alice = world.peer("alice", behind=world.home("symmetric"))
        world.trace.watch(world.internet)

        async def story():
            for machine in (alice, hub):
                await machine.host.plane.open_network("net", [machine.overlay], [], 1400)
            hub.host.plane.on_moved = lambda number, source: (
                world.trace.note("hub1", "moved", str(source)),
                hub.host.spawn(hub.host.plane.move(number, any_local(source, 4500))),
            )
            await connect(alice.host, hub.host, "198.51.100.1:1", "192.0.2.1:4500")
            report = await ping(alice.host, hub.overlay, count=40, interval_s=0.05)
            world.trace.note("alice", "ping", str(report))

        world.run(story())
        return world.trace


def test_the_same_seed_gives_the_same_trace_and_another_one_does_not():
    first, again, other = tell(5), tell(5), tell(6)
    assert first.lines() == again.lines()
    assert first.digest() == again.digest() != other.digest()
    assert len(first.events) > 100
