"""What happens to a connection when hubs die, NATs change, SAs age and peers crash."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from p2pvpn.mesh.connect import ConnectError
from p2pvpn.mesh.events import PeerLost
from p2pvpn.mesh.tuning import Tuning
from p2pvpn.sim.application import Pinger
from p2pvpn.sim.internet import ACCESS
from p2pvpn.sim.nat import NatKind

from .life import Life


def test_a_direct_path_loses_nothing_when_the_hub_that_relayed_dies() -> None:
    life = Life(1)

    async def story() -> None:
        await life.ping(life.a, life.b)
        running = Pinger(life.a.host, life.b.overlay, count=1000, interval_s=0.05)
        life.relaying_hub().host.crash()
        assert (await running.done()).lost == []

    life.run(story())


def test_a_new_connection_is_made_while_a_hub_is_dead() -> None:
    life = Life(2)

    async def story() -> None:
        await life.ping(life.a, life.b)
        life.relaying_hub().host.crash()
        for one, other in ((life.a, life.b), (life.b, life.a)):
            life.network(one).forget(other.overlay)
        await asyncio.sleep(1)
        assert (await life.ping(life.a, life.b, count=60)).lost == []

    life.run(story())


def test_who_was_met_is_known_by_name_while_no_hub_answers() -> None:
    life = Life(3)

    async def story() -> None:
        await life.ping(life.a, life.b)
        for hub in life.hubs:
            hub.host.crash()
        directory = life.network(life.a).directory
        assert await directory.resolve("b") == life.b.overlay
        with pytest.raises(ConnectError, match="no hub answered"):
            await directory.resolve("nobody")

    life.run(story())


@pytest.mark.parametrize("seed", [1, 2, 7])
def test_a_relayed_pair_finds_another_relay_within_a_second_when_its_hub_dies(seed: int) -> None:
    life = Life(seed, "symmetric", "symmetric")

    async def story() -> None:
        await life.ping(life.a, life.b)
        running = Pinger(life.a.host, life.b.overlay, count=500, interval_s=0.02)
        await asyncio.sleep(1)
        life.relaying_hub().host.crash()
        report = await running.done()
        assert report.longest_gap_s < 1.0
        assert report.answered > 440
        assert life.path(life.a, life.b) == "relayed"

    life.run(story())


def test_traffic_falls_back_to_the_relay_when_both_nats_turn_hostile() -> None:
    life = Life(3)

    async def story() -> None:
        await life.ping(life.a, life.b)
        assert life.path(life.a, life.b) == "direct"
        running = Pinger(life.a.host, life.b.overlay, count=1000, interval_s=0.02)
        await asyncio.sleep(1)
        for home in life.homes.values():
            home.router.replace_nat(NatKind.of("symmetric"))
        report = await running.done()
        assert report.longest_gap_s < 1.5
        assert report.answered > 900
        assert life.path(life.a, life.b) == life.path(life.b, life.a) == "relayed"

    life.run(story())


@pytest.mark.parametrize(("nat", "limit_s"), [("port-restricted", 0.5), ("ei/apd/random", 1.5), ("symmetric", 0.7)])
@pytest.mark.parametrize("side", ["a", "b"])
def test_a_flushed_nat_is_survived_on_either_side(side: str, nat: str, limit_s: float) -> None:
    """The side behind it hears nothing any more, and checks: its packet opens the NAT again."""
    life = Life(4, nat, nat)

    async def story() -> None:
        await life.ping(life.a, life.b)
        running = Pinger(life.a.host, life.b.overlay, count=500, interval_s=0.02)
        await asyncio.sleep(1)
        life.homes[side].router.flush()
        report = await running.done()
        assert report.longest_gap_s < limit_s
        assert report.answered > 400
        assert (await life.ping(life.b, life.a)).lost == []

    life.run(story())


@pytest.mark.parametrize("seed", range(1, 7))
def test_a_peer_that_moves_to_another_home_is_found_again_without_a_new_sa(seed: int) -> None:
    life = Life(seed)

    async def story() -> None:
        await life.ping(life.a, life.b)
        running = Pinger(life.a.host, life.b.overlay, count=1000, interval_s=0.02)
        await asyncio.sleep(1)
        life.world.move(life.a, life.world.home("full-cone", name="cafe"))
        report = await running.done()
        assert report.longest_gap_s < 1
        assert report.answered > 950
        assert life.heard(life.a, PeerLost) == []
        assert life.path(life.a, life.b) == "direct"

    life.run(story())


def test_an_sa_is_replaced_before_it_is_old_and_nothing_is_lost() -> None:
    life = Life(6, tuning=Tuning(sa_life_s=60.0))

    async def story() -> None:
        await life.ping(life.a, life.b)
        first = life.network(life.a).sessions[life.b.overlay].sa_ids
        running = Pinger(life.a.host, life.b.overlay, count=2000, interval_s=0.05)
        assert (await running.done()).lost == []
        assert life.network(life.a).sessions[life.b.overlay].sa_ids != first
        assert life.path(life.a, life.b) == "direct"

    life.run(story())


@pytest.mark.parametrize("nat", ["port-restricted", "symmetric"])
@pytest.mark.parametrize("who", ["a", "b"])
def test_a_crashed_peer_is_reached_again_within_three_seconds_of_its_restart(who: str, nat: str) -> None:
    """Whoever began the SA, and whether anything was sent meanwhile or not."""
    for busy in (True, False):
        life = Life(8, nat, nat)

        async def story(life: Life = life, busy: bool = busy) -> None:
            crashed, other = (life.a, life.b) if who == "a" else (life.b, life.a)
            await life.ping(life.a, life.b)
            meanwhile = Pinger(other.host, crashed.overlay, count=150, interval_s=0.02) if busy else None
            await asyncio.sleep(0.5)
            crashed.host.crash()
            await asyncio.sleep(1)
            crashed.host.restart()
            await life.start(crashed)
            await asyncio.sleep(0.5)
            if meanwhile is not None:
                await meanwhile.done()
            report = await life.ping(other, crashed, count=150, interval_s=0.02)
            assert report.first_answer_s is not None
            assert report.first_answer_s < 3

        life.run(story())


def test_a_hub_that_restarts_with_an_empty_disk_has_its_records_back_from_its_neighbours() -> None:
    life = Life(9)

    async def story() -> None:
        hub = life.hubs[0]
        before = len(life.network(hub).hub.store)  # type: ignore[union-attr]
        assert before >= 4
        hub.host.crash(lose_disk=True)
        await asyncio.sleep(2)
        hub.host.restart()
        await life.start(hub)
        await asyncio.sleep(60)
        assert len(life.network(hub).hub.store) >= before  # type: ignore[union-attr]

    life.run(story())


def test_a_relay_that_the_nats_forgot_still_serves_after_an_idle_hour() -> None:
    life = Life(10, "symmetric", "symmetric")

    async def story() -> None:
        for _ in range(20):
            report = await life.ping(life.a, life.b, count=2)
            assert report.lost == []
            await asyncio.sleep(180)

    life.run(story())


@pytest.mark.parametrize("seed", range(10))
def test_both_ends_agree_on_the_direct_path_after_a_time_of_heavy_loss(seed: int) -> None:
    life = Life(40 + seed)

    async def story() -> None:
        lines = [home.router.outside for home in life.homes.values()]
        for line in lines:
            line.quality = replace(ACCESS, loss=0.3)
        await life.ping(life.a, life.b, count=100, interval_s=0.1)
        for line in lines:
            line.quality = ACCESS
        report = await life.ping(life.a, life.b, count=200, interval_s=0.2)
        assert report.answered > 150
        assert life.path(life.a, life.b) == life.path(life.b, life.a) == "direct"

    life.run(story())


@pytest.mark.parametrize("seed", range(3))
def test_a_peer_that_a_hub_wrongly_believes_to_be_there_is_called_through_another(seed: int) -> None:
    for hub in range(3):
        life = Life(60 + seed)

        async def story(life: Life = life, hub: int = hub) -> None:
            life.world.cut([life.hubs[hub]], [life.b])
            report = await life.ping(life.a, life.b, count=250, interval_s=0.02)
            assert report.first_answer_s is not None
            assert report.first_answer_s < 4

        life.run(story())


@pytest.mark.parametrize("who", ["a", "b"])
def test_a_child_sa_that_either_end_rekeys_goes_on_being_watched_and_moved(who: str) -> None:
    life = Life(70)

    async def story() -> None:
        await life.ping(life.a, life.b)
        one, other = (life.a, life.b) if who == "a" else (life.b, life.a)
        before = life.network(one).sessions[other.overlay].current
        assert before is not None
        old, sa_id = before.child_id, before.id
        driver = life.nodes[one.name].services.ike
        driver.post(lambda now: driver.endpoint.rekey_child(sa_id, old, now))
        await asyncio.sleep(1)
        running = Pinger(life.a.host, life.b.overlay, count=300, interval_s=0.02)
        await asyncio.sleep(2)
        for machine, peer in ((life.a, life.b), (life.b, life.a)):
            session = life.network(machine).sessions[peer.overlay]
            assert session.current is not None
            assert session.usage.packets_in > 10
        assert before.child_id != old
        life.world.move(life.a, life.world.home("full-cone", name="cafe"))
        assert (await running.done()).longest_gap_s < 0.6

    life.run(story())
