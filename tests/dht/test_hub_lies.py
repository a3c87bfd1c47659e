"""Hubs that lie, to peers and to each other."""

from __future__ import annotations

import asyncio
from ipaddress import IPv6Address
from typing import Any

import pytest

from p2pvpn.dht import hub as hub_module
from p2pvpn.dht.client import DhtClient, NoHubAnsweredError
from p2pvpn.dht.found import Found
from p2pvpn.dht.policy import Reason
from p2pvpn.dht.records import Record
from p2pvpn.dht.rpc import Code, RpcNode, RpcRefusedError
from p2pvpn.identity.member import Role

from .world import RTT_S, Hub, Person, World, took


class Liar:
    """A hub that answers `dht.find` as it likes."""

    def __init__(self, who: Person, rpc: RpcNode) -> None:
        self.who = who
        self.rpc = rpc
        self.answer: Any = None
        rpc.register("dht.find", lambda sender, args: self.answer, repeatable=True)
        rpc.register("dht.store", lambda sender, args: [1], repeatable=True)


async def with_liar(world: World, honest: int = 1) -> tuple[list[Hub], Liar, DhtClient, list[Record]]:
    hubs = await world.add_hubs(honest)
    crook = world.registry.join("crook", roles=(Role.HUB,))
    liar = Liar(crook, await world.rpc(crook))
    newer: list[Record] = []
    asker = await world.client(world.registry.join("asker"), on_newer=newer.append)
    everybody = [hub.who for hub in hubs] + [crook]
    asker.set_hubs([(who.peer_id, who.overlay) for who in everybody])
    return hubs, liar, asker, newer


def test_a_hub_verifies_what_another_hub_hands_it() -> None:
    world = World()

    async def story() -> None:
        hubs = await world.add_hubs(2)
        who, mallory = world.registry.join("laptop"), world.registry.join("mallory")
        forged = mallory.impersonating(who).record(world.wall())
        with pytest.raises(RpcRefusedError) as refused:
            await hubs[1].rpc.request(hubs[0].who.overlay, "dht.store", [who.key, forged, 0])
        assert refused.value.code == Code.APPLICATION + Reason.SIGNATURE
        assert hubs[0].node.refusals[Reason.SIGNATURE] == 1

    world.run(story())


@pytest.mark.parametrize(
    "listing",
    [
        None,
        [0],
        [1, []],
        [1, [b"x" * 12] * 16],
        [2, [], True],
        [2, [[b"\xff" * 40, 2**62]], True],
        [2, [[b"\xff" * 40, 2**62]], False],
        [2, [[bytes(40), 2**62], [bytes(40), 2**62]], False],
        [2, [[bytes(39), 1]], False],
        [2, [["text", 1]], False],
        [9, [], False],
    ],
)
def test_a_neighbour_that_lies_about_what_it_has_is_outlived(listing: Any) -> None:
    world = World()

    async def story() -> None:
        hubs = await world.add_hubs(3)
        liar = hubs[2]
        who, forger = world.registry.join("laptop"), world.registry.join("mallory")
        forged = forger.impersonating(who).record(world.wall())
        for method, answer in (("dht.sync", listing), ("dht.fetch", [forged]), ("dht.find", [[forged], b"", []])):
            liar.rpc.unregister(method)
            liar.rpc.register(method, lambda sender, args, answer=answer: answer, repeatable=True)
        hubs[1].node._accept(who.record(world.wall()), who.key)
        hubs[0].node.nudge(liar.who.overlay)
        before = liar.rpc.counters.answered
        await asyncio.sleep(hub_module.SYNC_S * 1.3)
        assert hubs[0].has(who)
        assert len(hubs[0].node.store) == 1
        assert liar.rpc.counters.answered - before < 2000

    world.run(story())


def test_a_lying_hub_is_not_believed_and_costs_nothing() -> None:
    world = World()

    async def story() -> None:
        hubs, liar, asker, _ = await with_liar(world)
        who, mallory = world.registry.join("laptop"), world.registry.join("mallory")
        hubs[0].node._accept(who.record(world.wall()), who.key)
        wall = world.wall()
        lies: list[Any] = [
            None,
            [],
            {},
            [[b"rubbish"], b"", []],
            [[mallory.impersonating(who).record(wall)], b"", []],
            [[mallory.record(wall)], b"", []],
            [[who.record(wall + 100)], b"", []],
            [[who.record(wall - 900)], b"", []],
            [[bytes(4000)], b"", []],
            [[], b"\x01" * 20, []],
            [[], b"", [b"\x01" * 20]],
            Found(()).value,
        ]
        for lie in lies:
            liar.answer = lie
            since = world.now
            found = await asker.lookup(who.key, fresh=True)
            assert found is not None
            assert found.subject == who.peer_id
            assert took(world, since) < RTT_S
            await asyncio.sleep(2)
            assert not asker._background, "nothing goes on for ever"

    world.run(story())


def test_when_only_liars_answer_nothing_is_known() -> None:
    world = World()

    async def story() -> None:
        hubs, liar, asker, _ = await with_liar(world)
        hubs[0].silence()
        who, mallory = world.registry.join("laptop"), world.registry.join("mallory")
        liar.answer = [[mallory.impersonating(who).record(world.wall())], b"", []]
        with pytest.raises(NoHubAnsweredError):
            await asker.lookup(who.key)
        assert asker.refusals[Reason.SIGNATURE] == 1

    world.run(story())


def test_a_hub_that_withholds_is_outvoted_by_one_that_does_not() -> None:
    world = World()

    async def story() -> None:
        hubs, liar, asker, _ = await with_liar(world)
        who = world.registry.join("laptop")
        hubs[0].node._accept(who.record(world.wall()), who.key)
        liar.answer = Found(()).value
        world.tunnels.delay_s = 0.1
        assert await asker.lookup(who.key) is not None

    world.run(story())


def test_a_later_higher_sequence_corrects_what_was_returned() -> None:
    world = World()

    async def story() -> None:
        hubs, liar, asker, newer = await with_liar(world)
        who = world.registry.join("laptop")
        old, new = who.record(world.wall() - 50), who.record(world.wall())
        liar.answer = Found((old,)).value

        async def slowly(sender: IPv6Address, args: list[Any]) -> Any:
            await asyncio.sleep(0.3)
            return Found((new,)).value

        hubs[0].rpc.unregister("dht.find")
        hubs[0].rpc.register("dht.find", slowly)
        first = await asker.lookup(who.key)
        assert first is not None
        assert first.raw == old
        await asyncio.sleep(1)
        assert [record.raw for record in newer] == [new]
        cached = await asker.lookup(who.key)
        assert cached is not None
        assert cached.raw == new

    world.run(story())


def test_nobody_rolls_a_peer_back_that_was_seen_before() -> None:
    world = World()

    async def story() -> None:
        hubs, liar, asker, _ = await with_liar(world)
        who = world.registry.join("laptop")
        old, new = who.record(world.wall() - 50), who.record(world.wall())
        liar.answer = Found((old,)).value
        hubs[0].node._accept(new, who.key)
        await asker.lookup(who.key)
        await asyncio.sleep(2)
        hubs[0].silence()
        for _ in range(2):
            found = await asker.lookup(who.key, fresh=True)
            assert found is not None
            assert found.raw == new
            asker.forget()
        assert asker.refusals[Reason.STALE] >= 2

    world.run(story())
