"""Ports that routers open, addresses that owners declare, and neighbours on one LAN: what comes of them."""

from __future__ import annotations

import asyncio

import pytest

from p2pvpn.core.address import Endpoint
from p2pvpn.punch.candidates import CandidateKind

from .life import Life


def test_two_symmetric_nats_that_map_ports_meet_directly_and_say_so() -> None:
    life = Life(21, "symmetric", "symmetric", pcp=True)

    async def story() -> None:
        report = await life.ping(life.a, life.b, count=40)
        assert report.lost == []
        assert {life.path(life.a, life.b), life.path(life.b, life.a)} == {"mapped"}

    life.run(story())


def test_one_router_that_maps_is_enough() -> None:
    for who in ("a", "b"):
        life = Life(22, "symmetric", "symmetric", pcp=who)

        async def story(life: Life = life) -> None:
            assert (await life.ping(life.a, life.b, count=40)).lost == []
            assert {life.path(life.a, life.b), life.path(life.b, life.a)} == {"mapped"}

        life.run(story())


def test_a_router_that_restarts_is_asked_again_and_nothing_is_lost_for_long() -> None:
    life = Life(23, "symmetric", "symmetric", pcp=True)

    async def story() -> None:
        await life.ping(life.a, life.b)
        life.homes["b"].router.flush()
        life.nodes["b"].network_changed()  # the link went down with it
        await asyncio.sleep(3)
        report = await life.ping(life.a, life.b, count=40)
        assert report.lost == []
        assert life.path(life.a, life.b) == "mapped"

    life.run(story())


def test_behind_a_second_nat_the_mapping_is_not_told() -> None:
    life = Life(25, "symmetric", "symmetric")
    outer = life.world.home("symmetric", name="carrier", lan="100.64.0.0/10")
    inner = life.world.home("symmetric", name="inner", behind=outer, pcp=True)
    carol = life.world.peer("carol", behind=inner)

    async def story() -> None:
        outside = life.nodes["carol"].outside
        status = outside.status()
        (router,) = status["routers"]  # type: ignore[misc, attr-defined]
        assert router["external"].startswith("100.64.")
        assert not router["told"]
        assert "not public" in router["reason"]
        assert CandidateKind.MAPPED not in {candidate.kind for candidate in outside.candidates()}
        assert outside.published() == ()
        assert (await life.ping(life.a, carol, count=40)).lost == []
        assert life.path(life.a, carol) == "relayed"

    life.run(story())


def test_a_mapping_at_an_address_that_the_hubs_do_not_see_is_told_and_not_published() -> None:
    life = Life(26, "symmetric", "symmetric", pcp="b")
    life.homes["b"].router.pcp._public = lambda: "198.51.100.250"  # type: ignore[union-attr]

    async def story() -> None:
        outside = life.nodes["b"].outside
        assert CandidateKind.MAPPED in {candidate.kind for candidate in outside.candidates()}
        assert outside.published() == ()
        assert (await life.ping(life.a, life.b, count=40)).lost == []
        assert life.path(life.a, life.b) == "relayed"

    life.run(story())


def test_a_router_that_refuses_changes_nothing() -> None:
    life = Life(27, pcp=True)
    for home in life.homes.values():
        assert home.router.pcp is not None
        home.router.pcp.refuses = True

    async def story() -> None:
        (router,) = life.nodes["a"].outside.status()["routers"]  # type: ignore[misc, attr-defined]
        assert router["reason"] == "not authorized"
        assert (await life.ping(life.a, life.b, count=40)).lost == []
        assert life.path(life.a, life.b) == "direct"

    life.run(story())


def test_a_port_that_the_owner_forwards_by_hand_and_declares_is_used() -> None:
    life = Life(28, "symmetric", "symmetric")

    async def story() -> None:
        router = life.homes["b"].router
        assert router.nat is not None
        declared = Endpoint(router.nat.public[0], 7000)
        router.forwards.add(declared, Endpoint(life.b.host.interfaces[0].hosts[0], 4500))
        life.nodes["b"].declare((declared,))
        await asyncio.sleep(3)
        assert life.nodes["b"].outside.published() == (declared,)
        assert (await life.ping(life.a, life.b, count=40)).lost == []
        assert {life.path(life.a, life.b), life.path(life.b, life.a)} == {"mapped"}

    life.run(story())


def test_a_declared_address_that_leads_nowhere_costs_nothing() -> None:
    life = Life(29)

    async def story() -> None:
        life.nodes["b"].declare((Endpoint("198.51.100.251", 4500),))
        await asyncio.sleep(3)
        report = await life.ping(life.a, life.b, count=60)
        assert report.lost == []
        assert report.first_answer_s is not None
        assert report.first_answer_s < 0.5
        assert life.path(life.a, life.b) == "direct"

    life.run(story())


@pytest.mark.parametrize("nat", ["port-restricted", "port-restricted/no-hairpin", "symmetric", "symmetric/no-hairpin"])
def test_peers_on_one_lan_use_it_whatever_their_router_does(nat: str) -> None:
    life = Life(30)
    home = life.world.home(nat, name="shared")
    carol, dave = (life.world.peer(name, behind=home) for name in ("carol", "dave"))

    async def story() -> None:
        assert (await life.ping(carol, dave, count=40)).lost == []
        for one, other in ((carol, dave), (dave, carol)):
            assert life.path(one, other) == "direct"
            assert life.remote(one, other).startswith("192.168.")

    life.run(story())


@pytest.mark.parametrize(("hairpin", "expected"), [("", "direct"), ("/no-hairpin", "relayed")])
def test_two_homes_behind_one_carrier_need_its_hairpin(hairpin: str, expected: str) -> None:
    life = Life(31)
    carrier = life.world.home(f"port-restricted{hairpin}", name="carrier", lan="100.64.0.0/10")
    homes = [life.world.home("port-restricted/no-hairpin", name=f"flat {n}", behind=carrier) for n in (1, 2)]
    carol, dave = (life.world.peer(name, behind=home) for name, home in zip(("carol", "dave"), homes, strict=True))

    async def story() -> None:
        assert (await life.ping(carol, dave, count=40)).lost == []
        assert life.path(carol, dave) == life.path(dave, carol) == expected

    life.run(story())


def test_two_neighbours_who_both_ask_their_router_get_two_ports() -> None:
    life = Life(32)
    home = life.world.home("symmetric", name="shared", pcp=True)
    carol, dave = (life.world.peer(name, behind=home) for name in ("carol", "dave"))

    async def story() -> None:
        ports = {life.nodes[name].outside.published()[0].port for name in ("carol", "dave")}
        assert len(ports) == 2
        for one in (carol, dave):
            assert (await life.ping(life.a, one, count=20)).lost == []
            assert life.path(life.a, one) == "mapped"

    life.run(story())
