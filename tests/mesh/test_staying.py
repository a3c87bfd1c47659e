"""What happens to a connection when hubs die, NATs change, SAs age and peers crash."""

from __future__ import annotations

import asyncio

from p2pvpn.mesh.events import PeerLost
from p2pvpn.mesh.tuning import Tuning
from p2pvpn.sim.application import Pinger
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


def test_a_relayed_pair_finds_another_relay_when_its_hub_dies() -> None:
    life = Life(7, "symmetric", "symmetric")

    async def story() -> None:
        await life.ping(life.a, life.b)
        running = Pinger(life.a.host, life.b.overlay, count=1000, interval_s=0.02)
        await asyncio.sleep(1)
        life.relaying_hub().host.crash()
        report = await running.done()
        assert report.longest_gap_s < 5
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
        assert report.longest_gap_s < 6
        assert life.path(life.a, life.b) == life.path(life.b, life.a) == "relayed"

    life.run(story())


def test_a_flushed_nat_is_survived_on_either_side() -> None:
    for side in ("a", "b"):
        life = Life(4)

        async def story(life: Life = life, side: str = side) -> None:
            await life.ping(life.a, life.b)
            running = Pinger(life.a.host, life.b.overlay, count=1000, interval_s=0.02)
            await asyncio.sleep(1)
            life.homes[side].router.flush()
            assert (await running.done()).longest_gap_s < 6
            assert (await life.ping(life.b, life.a)).lost == []

        life.run(story())


def test_a_peer_that_moves_to_another_home_is_found_again_without_a_new_sa() -> None:
    life = Life(5)

    async def story() -> None:
        await life.ping(life.a, life.b)
        running = Pinger(life.a.host, life.b.overlay, count=1000, interval_s=0.02)
        await asyncio.sleep(1)
        life.world.move(life.a, life.world.home("full-cone", name="cafe"))
        report = await running.done()
        assert report.longest_gap_s < 6
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


def test_a_crashed_peer_is_reached_again_after_its_restart() -> None:
    life = Life(8)

    async def story() -> None:
        await life.ping(life.a, life.b)
        life.b.host.crash()
        await asyncio.sleep(1)
        life.b.host.restart()
        await life.start(life.b)
        await asyncio.sleep(60)
        assert (await life.ping(life.a, life.b, count=40)).lost == []

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
