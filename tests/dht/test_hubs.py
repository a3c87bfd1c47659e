"""Hubs and peers together on virtual time: what is published is found, in spite of loss and dead hubs."""

from __future__ import annotations

import asyncio
import ipaddress

import pytest

from p2pvpn.core.errors import LocalError
from p2pvpn.dht import hub as hub_module
from p2pvpn.dht import records
from p2pvpn.dht.client import DhtClient, NoHubAnsweredError
from p2pvpn.dht.messages import GOOD_MESSAGE_BYTES
from p2pvpn.dht.records import NameBody, RouteBody
from p2pvpn.identity.member import Role

from .world import NETWORK, RTT_S, World, took


@pytest.mark.parametrize(("count", "loss"), [(3, 0.0), (3, 0.05), (5, 0.15), (4, 0.3)])
def test_what_is_published_is_found_by_everybody_in_spite_of_loss(count: int, loss: float) -> None:
    world = World(seed=count, loss=loss)

    async def story() -> None:
        await world.add_hubs(count)
        people = []
        for number in range(15):
            who, peer = await world.peer(f"peer{number}")
            assert await peer.publish(who.record(world.wall())) >= 1
            people.append((who, peer))
        waits = []
        for (who, _), (_, asker) in zip(people, people[1:] + people[:1], strict=True):
            since = world.now
            found = await asker.lookup(who.key)
            waits.append(took(world, since))
            assert found is not None
            assert found.subject == who.peer_id
        if not loss:
            assert max(waits) < RTT_S
        assert sorted(waits)[len(waits) // 2] < RTT_S + 4 * loss
        assert world.tunnels.largest <= GOOD_MESSAGE_BYTES

    world.run(story())


def test_names_and_addresses_lead_to_peers() -> None:
    world = World()

    async def story() -> None:
        await world.add_hubs(2)
        who = world.registry.join("desktop", ipv4="100.64.0.9")
        peer = await world.client(who)
        _, asker = await world.peer("laptop")
        for name in ("desktop", "100.64.0.9"):
            await peer.publish(who.record(world.wall(), NameBody(name, who.overlay)))
            found = await asker.lookup(records.key_of_name(NETWORK, name))
            assert found is not None
            assert found.body == NameBody(name, who.overlay)

    world.run(story())


def test_all_gateways_of_a_prefix_are_found_page_by_page() -> None:
    world = World(loss=0.05)
    prefix = ipaddress.ip_network("10.5.0.0/16")

    async def story() -> None:
        await world.add_hubs(3)
        gateways = [world.registry.join(f"gateway{n}", roles=(Role.GATEWAY,), blocks=(str(prefix),)) for n in range(5)]
        for number, who in enumerate(gateways):
            peer = await world.client(who)
            await peer.publish(who.record(world.wall(), RouteBody(prefix, number)), need=3)
        _, asker = await world.peer("laptop")
        found = await asker.lookup_all(records.key_of_route(NETWORK, prefix))
        assert {record.subject for record in found} == {who.peer_id for who in gateways}
        assert world.tunnels.largest <= GOOD_MESSAGE_BYTES

    world.run(story())


def test_a_dead_hub_costs_no_visible_delay() -> None:
    world = World()

    async def story() -> None:
        hubs = await world.add_hubs(3)
        who, peer = await world.peer("laptop")
        _, asker = await world.peer("desktop")
        hubs[1].silence()
        for number in range(3):
            since = world.now
            assert await peer.publish(who.record(world.wall())) == 1
            assert took(world, since) < RTT_S
            since = world.now
            assert await asker.lookup(who.key, fresh=True) is not None
            assert took(world, since) < RTT_S
            nobody = world.registry.join(f"nobody{number}")
            since = world.now
            assert await asker.lookup(nobody.key) is None
            assert took(world, since) < (1.0 if number == 0 else 3 * RTT_S)
            await asyncio.sleep(5)
            await peer.publish(who.record(world.wall()))

    world.run(story())


def test_not_found_and_not_answered_are_different() -> None:
    world = World()

    async def story() -> None:
        hubs = await world.add_hubs(3)
        who, peer = await world.peer("laptop")
        nobody = world.registry.join("nobody")
        assert await peer.lookup(nobody.key) is None
        for hub in hubs:
            hub.silence()
        with pytest.raises(NoHubAnsweredError):
            await peer.lookup(who.key)
        with pytest.raises(NoHubAnsweredError):
            await peer.publish(who.record(world.wall()))
        peer.set_hubs([])
        with pytest.raises(NoHubAnsweredError):
            await peer.lookup(who.key)

    world.run(story())


def test_after_all_hubs_were_silent_the_first_question_is_answered_at_once() -> None:
    world = World()

    async def story() -> None:
        hubs = await world.add_hubs(3)
        who, peer = await world.peer("laptop")
        _, asker = await world.peer("desktop")
        await peer.publish(who.record(world.wall()), need=3)
        for hub in hubs:
            hub.silence()
        with pytest.raises(NoHubAnsweredError):
            await asker.lookup(who.key)
        await asyncio.sleep(60)
        for hub in hubs:
            hub.revive()
        since = world.now
        assert await asker.lookup(who.key) is not None
        assert took(world, since) < RTT_S
        await peer.publish(who.record(world.wall()), need=3)
        await asyncio.sleep(hub_module.SYNC_S * 1.3)
        other, newcomer = await world.peer("tablet", hubs=hubs[:1])
        await newcomer.publish(other.record(world.wall()))
        await asyncio.sleep(1)
        assert all(hub.has(other) for hub in hubs), "hubs hand records to each other again"

    world.run(story())


def test_a_hub_that_is_back_is_heard_while_the_one_that_is_waited_for_is_dead() -> None:
    world = World()

    async def story() -> None:
        first, second = await world.add_hubs(2)
        who, peer = await world.peer("laptop")
        _, asker = await world.peer("desktop")
        await peer.publish(who.record(world.wall()), need=2)
        first.silence()
        assert await asker.lookup(who.key) is not None
        await asyncio.sleep(60)
        first.revive()
        second.silence()
        since = world.now
        assert await asker.lookup(who.key, fresh=True) is not None
        assert took(world, since) < RTT_S

    world.run(story())


def test_many_questions_for_what_is_not_there_ask_the_other_hubs_once() -> None:
    world = World()

    async def story() -> None:
        hubs = await world.add_hubs(3)
        nobody = world.registry.join("nobody")
        askers = [(await world.peer(f"peer{number}", hubs=hubs[:1]))[1] for number in range(20)]
        before = hubs[0].rpc.counters.sent
        assert await asyncio.gather(*(asker.lookup(nobody.key) for asker in askers)) == [None] * 20
        assert hubs[0].rpc.counters.sent - before == 2
        before = askers[0]._rpc.counters.sent
        assert await asyncio.gather(*(askers[0].lookup(nobody.key) for _ in range(20))) == [None] * 20
        assert askers[0]._rpc.counters.sent == before

    world.run(story())


def test_kademlia_sees_the_store_and_cannot_write_it() -> None:
    world = World()

    async def story() -> None:
        (hub,) = await world.add_hubs(1)
        who = world.registry.join("laptop")
        raw = who.record(world.wall())
        hub.node._accept(raw, who.key)
        storage = hub.node._overlay.storage
        assert storage.get(who.key) == storage[who.key] == raw
        assert list(storage) == [(who.key, raw)]
        assert storage.iter_older_than(0) == []
        assert storage.get(bytes(20), b"none") == b"none"
        with pytest.raises(KeyError):
            storage[bytes(20)]
        with pytest.raises(LocalError):
            storage[who.key] = raw
        for call in (hub.node._overlay.get("laptop"), hub.node._overlay.set("laptop", raw)):
            with pytest.raises(LocalError):
                await call

    world.run(story())


def test_the_cache_serves_half_a_life_and_then_asks_again() -> None:
    world = World()

    async def story() -> None:
        await world.add_hubs(2)
        who, peer = await world.peer("laptop")
        _, asker = await world.peer("desktop")
        await peer.publish(who.record(world.wall()), need=2)
        await asker.lookup(who.key)
        await asyncio.sleep(1)
        sent = asker._rpc.counters.sent
        await asyncio.sleep(290)
        assert await asker.lookup(who.key) is not None
        assert asker._rpc.counters.sent == sent
        await asyncio.sleep(20)
        assert await asker.lookup(who.key) is not None
        assert asker._rpc.counters.sent == sent + 2
        asker.forget()
        assert await asker.lookup(who.key) is not None
        assert asker._rpc.counters.sent == sent + 4
        await asyncio.sleep(400)
        assert await asker.lookup(who.key) is None

    world.run(story())


def test_a_hub_publishes_and_looks_up_for_itself() -> None:
    world = World()

    async def story() -> None:
        hubs = await world.add_hubs(2)
        own = DhtClient(hubs[0].rpc, world.policy, world.wall)
        own.set_hubs([(hub.who.peer_id, hub.who.overlay) for hub in hubs])
        assert await own.publish(hubs[0].who.record(world.wall()), need=2) == 2
        hubs[1].silence()
        who, peer = await world.peer("laptop")
        await peer.publish(who.record(world.wall()))
        since = world.now
        assert await own.lookup(who.key) is not None
        assert took(world, since) < 0.001

    world.run(story())


def test_the_same_seed_gives_the_same_run() -> None:
    def once() -> tuple[int, float]:
        world = World(seed=11, loss=0.1)

        async def story() -> tuple[int, float]:
            await world.add_hubs(3)
            for number in range(5):
                who, peer = await world.peer(f"peer{number}")
                await peer.publish(who.record(world.wall()), need=2)
                await peer.lookup(who.key, fresh=True)
            return world.tunnels.sent, world.now

        return world.run(story())

    sent = {once()[0] for _ in range(3)}
    assert max(sent) - min(sent) < 30, "keys differ from run to run, and with them the order of hubs"
