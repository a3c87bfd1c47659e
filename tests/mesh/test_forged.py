"""Members and hubs that lie in the messages by which peers meet: calls, forwards, invitations, documents."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from p2pvpn.core.address import Endpoint
from p2pvpn.core.errors import P2pvpnError
from p2pvpn.dht.rpc import RpcRefusedError
from p2pvpn.identity.document import Topology
from p2pvpn.mesh.calls import CALL, DOCUMENT, FORWARD, MEET, Call, Forward, Invitation, Meet
from p2pvpn.mesh.events import Called, DocumentReplaced
from p2pvpn.mesh.gossip import MAX_DOCUMENT_BYTES
from p2pvpn.mesh.hubside import Refusal
from p2pvpn.sim.world import Machine, World

from .life import Life

VICTIM = Endpoint("203.0.113.99", 9)
"""An address that a liar would like others to send to."""


async def refused(life: Life, sender: Machine, to: Machine, method: str, args: list[object]) -> RpcRefusedError:
    """The refusal that a request meets."""
    with pytest.raises(P2pvpnError) as refusal:
        await life.network(sender).rpc.request(to.overlay, method, args)
    assert isinstance(refusal.value, RpcRefusedError), refusal.value
    return refusal.value


def foreign_certificate() -> bytes:
    """Of a member of another network."""
    with World(99, network="elsewhere") as world:
        world.hub()
        return world.peer("x").profile.member.certificate


def test_a_call_is_made_for_oneself_only_and_only_with_a_certificate_of_this_network() -> None:
    foreign = foreign_certificate()
    life = Life(11)

    async def story() -> None:
        hub, target = life.hubs[0], life.b.overlay
        theirs = life.b.profile.member.certificate
        mine = life.a.profile.member.certificate
        for certificate, code in ((theirs, Refusal.FOREIGN), (foreign, Refusal.UNTRUSTED), (b"", Refusal.UNTRUSTED)):
            refusal = await refused(life, life.a, hub, CALL, Call(target, certificate).encode())
            assert refusal.code == code
        changed = bytearray(mine)
        changed[-1] ^= 1
        refusal = await refused(life, life.a, hub, CALL, Call(target, bytes(changed)).encode())
        assert refusal.code == Refusal.UNTRUSTED
        assert not life.heard(life.b, Called)
        assert not list(life.network(hub).hub.relay.ports())  # type: ignore[union-attr]

    life.run(story())


@pytest.mark.parametrize(
    "args",
    [
        [],
        [b"", 0, b"", b""],
        [bytes(20), 0, b"", b""],
        [bytes(16), 0, bytes(2000), b""],
        [bytes(16), 0, b"", bytes(5000)],
        [bytes(16), 0, b"", [b""]],
        [bytes(16), 0, {}, 7],
        [[[[[]]]], 1, 2, 3],
        ["text"] * 5,
        [2**63] * 6,
    ],
)
def test_calls_of_any_other_shape_are_refused_by_hubs_and_peers(args: list[object]) -> None:
    life = Life(12)

    async def story() -> None:
        await life.ping(life.a, life.b, count=1)
        for to in (life.hubs[0], life.b):
            for method in (CALL, FORWARD, MEET):
                await refused(life, life.a, to, method, args)
        assert (await life.ping(life.a, life.b)).answered == 20

    life.run(story())


def test_only_hubs_forward_and_only_hubs_invite() -> None:
    life = Life(13)

    async def story() -> None:
        await life.ping(life.a, life.b, count=1)
        calls = len(life.heard(life.b, Called))
        meet = Meet(life.a.profile.member.certificate, Invitation((VICTIM,), bytes(64)))
        forward = Forward(life.b.overlay, meet)
        assert (await refused(life, life.a, life.hubs[0], FORWARD, forward.encode())).code == Refusal.FOREIGN
        await refused(life, life.a, life.b, MEET, meet.encode())
        await refused(life, life.a, life.b, FORWARD, forward.encode())
        assert len(life.heard(life.b, Called)) == calls

    life.run(story())


def test_a_hub_cannot_invite_to_strangers_nor_for_pairs_that_the_document_forbids() -> None:
    foreign = foreign_certificate()
    life = Life(14)

    async def story() -> None:
        hub = life.hubs[0]
        invitation = Invitation((VICTIM,), bytes(64))
        await refused(life, hub, life.a, MEET, Meet(foreign, invitation).encode())
        await refused(life, hub, life.a, MEET, Meet(b"garbage", invitation).encode())
        life.world.admin.set_topology(Topology.STAR, wall=life.world.wall())
        life.network(hub).take_document(life.world.admin.document.encode(), "the admin")
        await asyncio.sleep(5)
        await refused(life, hub, life.a, MEET, Meet(life.b.profile.member.certificate, invitation).encode())
        assert not life.heard(life.a, Called)

    life.run(story())


def test_a_hub_that_invites_to_a_relay_that_is_none_costs_a_few_small_packets() -> None:
    """The one lie that is left to a hub: its victim gets a rationed number of binding requests, and then nothing."""
    life = Life(15)

    async def story() -> None:
        sent: list[int] = []
        send = life.a.host.underlay.send

        def count(path, data: bytes) -> None:
            if path.remote == VICTIM:
                sent.append(len(data))
            send(path, data)

        life.a.host.underlay.send = count  # type: ignore[method-assign]
        meet = Meet(life.b.profile.member.certificate, Invitation((VICTIM,), bytes(64)))
        for _ in range(20):
            await life.network(life.hubs[0]).rpc.request(life.a.overlay, MEET, meet.encode())
        await asyncio.sleep(60)
        assert sum(sent) < 20 * 4 * 200
        assert (await life.ping(life.a, life.b)).answered == 20

    life.run(story())


def test_foreign_damaged_and_oversized_documents_change_nothing() -> None:
    with World(98, network="elsewhere") as other:
        other.hub()
        foreign = other.admin.document.encode()
    life = Life(16)

    async def story() -> None:
        liar, network = life.hubs[0], life.network(life.a)
        life.world.admin.set_topology(Topology.STAR, wall=life.world.wall())
        true = life.world.admin.document
        lies = [
            foreign,
            true.encode()[:-1],
            bytes([true.encode()[0]]) + bytes(len(true.encode()) - 1),
            replace(true, version=true.version + 7).encode(),  # a future version under an old signature
            b"",
            bytes(5000),
        ]
        version = network.standing.document.version
        for lie in lies:
            serve(life, liar, lie)
            await network.gossip.fetch(liar.overlay)
            assert network.standing.document.version == version
        for total in (MAX_DOCUMENT_BYTES + 1, MAX_DOCUMENT_BYTES, -1, "many"):
            rpc = life.network(liar).rpc
            rpc.unregister(DOCUMENT)
            rpc.register(DOCUMENT, lambda sender, args, total=total: [total, b"x"])
            await asyncio.wait_for(network.gossip.fetch(liar.overlay), 60)
        assert network.standing.document.version == version
        assert not life.heard(life.a, DocumentReplaced)

    life.run(story())


def serve(life: Life, liar: Machine, raw: bytes) -> None:
    """From now on the hub hands this out as the network document."""
    life.network(liar).gossip._current = lambda: raw


@pytest.mark.parametrize("manner", ["slowly", "never", "no"])
def test_a_hub_that_answers_calls_slowly_or_never_or_refuses_is_gone_round(manner: str) -> None:
    life = Life(17)

    async def story() -> None:
        async def answer(sender: object, args: object) -> object:
            await asyncio.sleep({"slowly": 2.0, "never": 3600.0, "no": 0.0}[manner])
            raise RpcRefusedError(Refusal.QUOTA, "a hub that does not care")

        attached = life.network(life.a).attachments.connected()
        assert len(attached) == 2
        bad = next(hub for hub in life.hubs if hub.overlay == attached[0].overlay)
        rpc = life.network(bad).rpc
        rpc.unregister(CALL)
        rpc.register(CALL, answer)
        report = await life.ping(life.a, life.b, count=1)
        assert report.first_answer_s is not None
        assert report.first_answer_s < 2.0

    life.run(story())
