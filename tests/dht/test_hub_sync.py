"""Hubs hand records to each other: at once, when one comes back, and from disk."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from p2pvpn.dht import hub as hub_module
from p2pvpn.dht import records
from p2pvpn.dht.storage import Row

from .world import RTT_S, World, took


def test_a_record_stored_at_one_hub_reaches_all_and_is_verified_once_at_each() -> None:
    world = World()

    async def story() -> None:
        hubs = await world.add_hubs(4)
        who = world.registry.join("laptop")
        peer = await world.client(who, hubs[:1])
        before = world.registry.verifications
        raw = who.record(world.wall())
        assert await peer.publish(raw) == 1
        await asyncio.sleep(0.2)
        assert all(hub.has(who) for hub in hubs)
        assert world.registry.verifications - before == 4
        sent = dict(world.tunnels.by_host)
        assert await peer.publish(raw) == 1
        await asyncio.sleep(0.2)
        assert world.registry.verifications - before == 4
        assert world.tunnels.by_host[str(hubs[1].who.overlay)] == sent[str(hubs[1].who.overlay)]

    world.run(story())


@pytest.mark.parametrize("loss", [0.0, 0.1])
def test_a_hub_that_comes_back_empty_is_level_within_thirty_seconds(loss: float) -> None:
    world = World(seed=3, loss=loss)

    async def story() -> float:
        hubs = await world.add_hubs(3)
        people = [world.registry.join(f"peer{number}") for number in range(300)]
        for who in people:
            raw = who.record(world.wall())
            hubs[0].node._accept(raw, who.key)
            hubs[1].node._accept(raw, who.key)
        await hubs[2].stop()
        since = world.now
        await hubs[2].start()
        while not all(hubs[2].has(who) for who in people):
            await asyncio.sleep(0.5)
            assert took(world, since) < 30
        assert hubs[2].node.store.digest.mark("") == hubs[0].node.store.digest.mark("")
        return took(world, since)

    print(f"level after {world.run(story()):.1f} s")


def test_two_thousand_records_fill_an_empty_hub_within_thirty_seconds() -> None:
    world = World(seed=3, loss=0.02)

    async def story() -> None:
        hubs = await world.add_hubs(2)
        people = [world.registry.join(f"peer{number}") for number in range(2000)]
        for who in people:
            hubs[0].node._accept(who.record(world.wall()), who.key)
        await hubs[1].stop()
        await hubs[1].start()
        await asyncio.sleep(30 - hub_module.START_SYNC_S)
        assert len(hubs[1].node.store) == 2000

    world.run(story())


def test_a_hub_that_was_cut_off_learns_what_it_missed_when_its_tunnel_is_back() -> None:
    world = World()

    async def story() -> None:
        hubs = await world.add_hubs(3)
        who, peer = await world.peer("laptop", hubs=hubs[:2])
        hubs[2].silence()
        await asyncio.sleep(60)
        await peer.publish(who.record(world.wall()), need=2)
        await asyncio.sleep(10)
        hubs[2].revive()
        hubs[2].node.nudge(hubs[0].who.overlay)
        await asyncio.sleep(1)
        assert hubs[2].has(who)

    world.run(story())


def test_digests_catch_what_nobody_handed_on() -> None:
    world = World()

    async def story() -> None:
        hubs = await world.add_hubs(3)
        who = world.registry.join("laptop")
        hubs[0].node._accept(who.record(world.wall()), who.key)
        await asyncio.sleep(hub_module.SYNC_S * 1.25)
        assert all(hub.has(who) for hub in hubs)

    world.run(story())


class Shelf:
    """A disk in memory."""

    def __init__(self) -> None:
        self.rows: dict[bytes, Row] = {}

    def load(self) -> list[Row]:
        return list(self.rows.values())

    def write(self, puts: Sequence[Row], deletes: Sequence[bytes]) -> None:
        self.rows.update((row.slot, row) for row in puts)
        for slot in deletes:
            self.rows.pop(slot, None)

    def close(self) -> None:
        """Nothing to do."""


def test_a_hub_that_restarts_alone_has_its_records_from_disk_and_verifies_them_again() -> None:
    world = World()

    async def story() -> None:
        (hub,) = await world.add_hubs(1)
        await hub.stop()
        shelf = Shelf()
        await hub.start(shelf)
        who, peer = await world.peer("laptop")
        mallory = world.registry.join("mallory")
        await peer.publish(who.record(world.wall()))
        await asyncio.sleep(3)
        await hub.stop()
        forged = records.parse_untrusted(mallory.impersonating(world.registry.join("other")).record(world.wall()))
        slot = records.key_of(forged) + forged.subject
        shelf.rows[slot] = Row(slot, forged.kind, forged.sequence, forged.expires, forged.raw)
        await hub.start(shelf)
        assert hub.has(who)
        assert len(hub.node.store) == 1
        await asyncio.sleep(3)
        assert len(shelf.rows) == 1

    world.run(story())


def test_a_hub_that_lacks_a_record_asks_the_others_before_it_says_no() -> None:
    world = World()

    async def story() -> None:
        hubs = await world.add_hubs(3)
        who = world.registry.join("laptop")
        hubs[2].node._accept(who.record(world.wall()), who.key)
        _, asker = await world.peer("desktop", hubs=hubs[:1])
        since = world.now
        assert await asker.lookup(who.key) is not None
        assert took(world, since) < 2 * RTT_S
        assert hubs[0].has(who)

    world.run(story())


def test_more_hubs_than_replicas_still_find_everything() -> None:
    world = World()

    async def story() -> None:
        hubs = await world.add_hubs(24)
        who, peer = await world.peer("laptop", hubs=hubs[:1])
        await peer.publish(who.record(world.wall()))
        await asyncio.sleep(hub_module.SYNC_S * 1.3)
        assert sum(hub.has(who) for hub in hubs) >= 20
        for hub in hubs:
            _, asker = await world.peer("asker", hubs=[hub])
            assert await asker.lookup(who.key) is not None

    world.run(story())


def test_a_hub_that_is_behind_is_pointed_to_the_newest_record_by_whoever_sees_it() -> None:
    world = World()

    async def story() -> None:
        hubs = await world.add_hubs(3)
        who = world.registry.join("laptop")
        old, new = who.record(world.wall() - 50), who.record(world.wall())
        hubs[0].node._accept(new, who.key)
        hubs[1].node._accept(old, who.key)
        _, asker = await world.peer("desktop", hubs=hubs[:2])
        await asker.lookup(who.key)
        await asyncio.sleep(1)
        assert [row.raw for row in hubs[1].node.store.find(who.key, world.wall())] == [new]

    world.run(story())


def test_a_hub_that_a_peer_attaches_to_is_given_what_the_peer_published() -> None:
    world = World()

    async def story() -> None:
        first, second = await world.add_hubs(2)
        first.node.set_hubs([])
        second.node.set_hubs([])
        who, peer = await world.peer("laptop", hubs=[first])
        await peer.publish(who.record(world.wall()))
        peer.set_hubs([(hub.who.peer_id, hub.who.overlay) for hub in (first, second)])
        await asyncio.sleep(0.2)
        assert second.has(who)

    world.run(story())
