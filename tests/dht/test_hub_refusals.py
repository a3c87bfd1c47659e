"""What hubs refuse: lies, floods, strangers and wrong shapes."""

from __future__ import annotations

import asyncio
from ipaddress import IPv6Address
from typing import Any

import pytest

from p2pvpn.dht import hub as hub_module
from p2pvpn.dht import records
from p2pvpn.dht.policy import Reason, RecordRefused
from p2pvpn.dht.records import NameBody
from p2pvpn.dht.rpc import Code, RpcRefusedError

from .world import World


def test_a_peer_that_asks_for_rubbish_without_pause_makes_the_hubs_no_work() -> None:
    world = World()

    async def story() -> None:
        hubs = await world.add_hubs(3)
        _, peer = await world.peer("mallory", hubs=hubs[:1])
        before = hubs[0].rpc.counters.sent
        await asyncio.gather(*(peer.lookup(bytes([n]) * 20) for n in range(200)), return_exceptions=True)
        assert hubs[0].rpc.counters.sent - before <= 2 * (hub_module.CRAWL_BURST + hub_module.CRAWL_RATE)

    world.run(story())


def test_hubs_answer_only_for_pairs_that_the_document_allows() -> None:
    world = World()
    friends: set[tuple[IPv6Address, bytes]] = set()

    async def story() -> None:
        await world.add_hubs(2, allowed=lambda asker, record: (asker, bytes(record.subject)) in friends)
        who, peer = await world.peer("laptop")
        friend, asker = await world.peer("desktop")
        _, stranger = await world.peer("stranger")
        friends.add((friend.overlay, bytes(who.peer_id)))
        await peer.publish(who.record(world.wall()), need=2)
        assert await asker.lookup(who.key) is not None
        assert await stranger.lookup(who.key) is None

    world.run(story())


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (lambda who, mallory, wall: mallory.impersonating(who).record(wall), Reason.SENDER),
        (lambda who, mallory, wall: who.record(wall), Reason.SENDER),
        (lambda who, mallory, wall: mallory.record(wall + 120), Reason.FUTURE),
        (lambda who, mallory, wall: mallory.record(wall - 800), Reason.EXPIRED),
        (lambda who, mallory, wall: mallory.record(wall, lifetime=5000), Reason.LIFETIME),
        (lambda who, mallory, wall: mallory.record(wall, NameBody("laptop", mallory.overlay)), Reason.AUTHORITY),
        (lambda who, mallory, wall: mallory.record(wall, certificate=b"none"), Reason.CERTIFICATE),
    ],
)
def test_hubs_refuse_lies_and_say_why(lie: Any, reason: Reason) -> None:
    world = World()

    async def story() -> None:
        hubs = await world.add_hubs(2)
        who = world.registry.join("laptop")
        mallory, peer = await world.peer("mallory")
        with pytest.raises(RecordRefused) as refused:
            await peer.publish(lie(who, mallory, world.wall()))
        assert refused.value.reason is reason
        assert len(hubs[0].node.store) == 0

    world.run(story())


def test_an_old_record_of_a_peer_is_refused_and_the_first_of_two_equal_sequences_stays() -> None:
    world = World()

    async def story() -> None:
        await world.add_hubs(2)
        who, peer = await world.peer("laptop")
        wall = world.wall()
        old = who.record(wall - 10)
        await peer.publish(who.record(wall), need=2)
        with pytest.raises(RecordRefused) as refused:
            await peer.publish(old)
        assert refused.value.reason is Reason.STALE
        with pytest.raises(RecordRefused) as refused:
            await peer.publish(who.record(wall, records.LocatorBody((who.peer_id,), ())))
        assert refused.value.reason is Reason.CONFLICT

    world.run(story())


def test_a_peer_that_stores_without_pause_is_slowed_down_before_any_signature_is_checked() -> None:
    world = World()

    async def story() -> None:
        (hub,) = await world.add_hubs(1)
        mallory, peer = await world.peer("mallory")
        victim = world.registry.join("victim")
        refused = 0
        for number in range(200):
            raw = mallory.impersonating(mallory).record(world.wall() + number / 1000)
            try:
                await peer._rpc.request(hub.who.overlay, "dht.store", [mallory.key, raw, 1])
            except RpcRefusedError as problem:
                refused += problem.code == Code.APPLICATION + Reason.RATE
            world.tunnels.delay_s = 0.001
        assert refused > 100
        assert world.registry.verifications < 100
        client = await world.client(victim)
        assert await client.publish(victim.record(world.wall())) == 1

    world.run(story())


def test_clients_are_no_nodes_and_may_not_sync() -> None:
    world = World()

    async def story() -> None:
        hubs = await world.add_hubs(2)
        _, peer = await world.peer("laptop")
        for method, args in (("dht.sync", ["", bytes(12), b""]), ("dht.fetch", [bytes(40)])):
            with pytest.raises(RpcRefusedError):
                await peer._rpc.request(hubs[0].who.overlay, method, args)
        await peer.lookup(bytes(20))
        assert [node.id for node in hubs[0].node._overlay.near(bytes(20))] == [hubs[1].who.peer_id]
        with pytest.raises(RpcRefusedError) as refused:
            await hubs[0].rpc.request(peer._rpc.local, "dht.find", [bytes(20), b"", 0])
        assert refused.value.code == Code.UNKNOWN_METHOD

    world.run(story())


def test_arguments_of_the_wrong_shape_are_refused_and_break_nothing() -> None:
    world = World()

    async def story() -> None:
        (hub,) = await world.add_hubs(1)
        _, peer = await world.peer("laptop")
        for method in ("dht.store", "dht.find", "dht.sync", "dht.fetch"):
            for args in ([], [None], [b"", b"", 2], [1, 2, 3], [[], [], []], [b"", b"", b""]):
                with pytest.raises(RpcRefusedError):
                    await peer._rpc.request(hub.who.overlay, method, args)
        assert hub.rpc.counters.failures == 0

    world.run(story())


def test_a_hub_that_left_the_document_is_no_hub_any_more() -> None:
    world = World()

    async def story() -> None:
        hubs = await world.add_hubs(3)
        gone = hubs[2]
        for hub in hubs[:2]:
            hub.node.set_hubs([other.who.peer_id for other in hubs[:2]])
        assert not hubs[0].node.is_hub(gone.who.overlay)
        assert gone.who.peer_id not in [node.id for node in hubs[0].node._overlay.near(bytes(20))]
        who = world.registry.join("laptop")
        with pytest.raises(RpcRefusedError):
            await gone.rpc.request(hubs[0].who.overlay, "dht.store", [who.key, who.record(world.wall()), 0])

    world.run(story())
