"""Networks that block UDP: everything over TCP, soon, and no longer than it must be."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from p2pvpn.mesh.events import HubAttached, Intercepted, UdpBlocked, UdpWorks
from p2pvpn.mesh.session import Session
from p2pvpn.mesh.status import network_status
from p2pvpn.sim.application import Pinger
from p2pvpn.sim.world import Machine

from .life import Life

SOON_S = 2.0


def hub_sessions(life: Life, machine: Machine) -> list[Session]:
    network = life.network(machine)
    return [network.session(hub.overlay) for hub in network.attachments.connected()]


def transports(life: Life, machine: Machine) -> set[str | None]:
    return {session.transport for session in hub_sessions(life, machine)}


def transport(life: Life, machine: Machine, other: Machine) -> str | None:
    return life.network(machine).sessions[other.overlay].transport


def blocked(seed: int, *names: str) -> Life:
    """A life in which these peers' networks drop all UDP."""
    life = Life(seed)
    for name in names:
        life.homes[name].router.blocks_udp = True
    return life


async def until(true: Callable[[], bool], limit_s: float) -> float:
    """Wait; the virtual seconds that it took."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while not true():
        assert loop.time() - began < limit_s, "it did not become true"
        await asyncio.sleep(0.02)
    return loop.time() - began


def test_a_peer_without_udp_is_attached_over_tcp_within_two_seconds() -> None:
    life = blocked(1, "a")
    took = []

    async def story() -> None:
        assert len(hub_sessions(life, life.a)) == 2
        assert transports(life, life.a) == {"tcp"}
        assert transports(life, life.b) == {"udp"}
        assert {event.hub for event in life.heard(life.a, UdpBlocked)} == {s.name for s in hub_sessions(life, life.a)}
        status = network_status(life.network(life.a))
        assert [hub["over"] for hub in status["hubs"] if hub["state"] == "connected"] == ["tcp", "tcp"]  # type: ignore[attr-defined]

    async def watch() -> None:
        took.append(await until(lambda: len(life.heard(life.a, HubAttached)) == 2, 10.0))

    life.watch = watch
    life.run(story())
    assert took[0] <= SOON_S


@pytest.mark.parametrize("names", [("a",), ("b",), ("a", "b")])
def test_peers_meet_whichever_of_them_is_without_udp(names: tuple[str, ...]) -> None:
    life = blocked(2, *names)

    async def story() -> None:
        report = await life.ping(life.a, life.b, count=40)
        assert report.lost == []
        for machine, other in ((life.a, life.b), (life.b, life.a)):
            assert life.path(machine, other) == "relayed"
            assert transport(life, machine, other) == ("tcp" if machine.name in names else "udp")

    life.run(story())


@pytest.mark.parametrize("names", [("a",), ("b",), ("a", "b")])
def test_tcp_is_left_without_losing_a_packet_when_udp_works_again(names: tuple[str, ...]) -> None:
    life = blocked(3, *names)

    async def story() -> None:
        await life.ping(life.a, life.b)
        there = Pinger(life.a.host, life.b.overlay, count=2400, interval_s=0.05)
        back = Pinger(life.b.host, life.a.overlay, count=2400, interval_s=0.05)
        await asyncio.sleep(5)
        for name in names:
            life.homes[name].router.blocks_udp = False
        assert (await there.done()).lost == []
        assert (await back.done()).lost == []
        for machine in (life.a, life.b):
            assert transports(life, machine) == {"udp"}
            assert len(machine.host.streams) == 0
        assert life.path(life.a, life.b) == "direct"
        for name in names:
            assert life.heard(life.world.machines[name], UdpWorks)

    life.run(story())


def test_relayed_peers_leave_tcp_too_where_no_direct_path_can_be() -> None:
    life = Life(4, "symmetric", "symmetric")
    life.homes["a"].router.blocks_udp = True

    async def story() -> None:
        await life.ping(life.a, life.b)
        assert transport(life, life.a, life.b) == "tcp"
        pinger = Pinger(life.a.host, life.b.overlay, count=1200, interval_s=0.05)
        life.homes["a"].router.blocks_udp = False
        assert (await pinger.done()).lost == []
        assert life.path(life.a, life.b) == "relayed"
        assert transport(life, life.a, life.b) == "udp"
        assert sum(len(hub.host.streams) for hub in life.hubs) == 0

    life.run(story())


def test_udp_that_is_blocked_in_the_middle_is_replaced_by_tcp() -> None:
    life = Life(5)

    async def story() -> None:
        await life.ping(life.a, life.b, count=40)
        assert life.path(life.a, life.b) == "direct"
        life.homes["a"].router.blocks_udp = True
        pinger = Pinger(life.a.host, life.b.overlay, count=300, interval_s=0.1)
        report = await pinger.done()
        assert report.lost[-1] < 150
        assert transports(life, life.a) == {"tcp"}
        assert transport(life, life.a, life.b) == "tcp"

    life.run(story())


def test_a_laptop_that_roams_into_a_network_without_udp_keeps_its_connections() -> None:
    life = Life(6)

    async def story() -> None:
        await life.ping(life.a, life.b, count=40)
        cafe = life.world.home("port-restricted", name="cafe", blocks_udp=True)
        pinger = Pinger(life.a.host, life.b.overlay, count=200, interval_s=0.1)
        life.world.move(life.a, cafe)
        report = await pinger.done()
        assert report.lost[-1] * 0.1 < 8.0
        sa_ids = life.network(life.a).sessions[life.b.overlay].sa_ids
        assert transport(life, life.a, life.b) == "tcp"
        life.world.move(life.a, life.homes["a"])
        await asyncio.sleep(20)
        assert (await life.ping(life.a, life.b)).lost == []
        assert transports(life, life.a) == {"udp"}
        assert life.network(life.a).sessions[life.b.overlay].sa_ids == sa_ids

    life.run(story())


def test_the_death_of_a_hub_is_survived_over_tcp() -> None:
    life = blocked(7, "a", "b")

    async def story() -> None:
        await life.ping(life.a, life.b)
        hub = next(one for one in life.hubs if one.host.streams.vouched and one.host.owns(relay_host(life)))
        pinger = Pinger(life.a.host, life.b.overlay, count=400, interval_s=0.1)
        hub.host.crash()
        report = await pinger.done()
        assert report.lost[-1] * 0.1 < 20.0
        assert transport(life, life.a, life.b) == "tcp"

    life.run(story())


def relay_host(life: Life) -> str:
    current = life.network(life.a).sessions[life.b.overlay].current
    assert current is not None
    assert current.relay is not None
    return current.relay.host


def test_a_captive_portal_is_told_of_and_left_when_somebody_has_logged_in() -> None:
    life = blocked(8, "a")
    router = life.homes["a"].router
    router.portal = "http://login.example/"

    async def story() -> None:
        assert hub_sessions(life, life.a) == []
        seen = life.heard(life.a, Intercepted)
        assert {(event.portal, event.answer) for event in seen} == {(True, "http://login.example/")}
        [warning, *_] = network_status(life.network(life.a))["warnings"]  # type: ignore[misc]
        assert "log in" in warning["hint"]
        router.portal = ""
        router.blocks_udp = False
        await until(lambda: len(hub_sessions(life, life.a)) == 2, 40.0)
        assert network_status(life.network(life.a))["warnings"] == []

    life.run(story())


def test_relay_ports_that_stay_silent_are_reached_over_tcp() -> None:
    """A firewall lets UDP through to port 4500 and to no other."""
    life = Life(9, "symmetric", "symmetric")

    async def story() -> None:
        life.homes["a"].router.only_udp_port = 4500
        pinger = Pinger(life.a.host, life.b.overlay, count=200, interval_s=0.1)
        assert (await pinger.done()).answered > 100
        assert transports(life, life.a) == {"udp"}
        assert transport(life, life.a, life.b) == "tcp"

    life.run(story())


def test_streams_are_vouched_for_by_members_alone() -> None:
    life = blocked(10, "a")

    async def story() -> None:
        await life.ping(life.a, life.b)
        vouched = [stream for hub in life.hubs for stream in hub.host.streams.vouched]
        assert len(vouched) == 3  # two tunnels, one relay

    life.run(story())
