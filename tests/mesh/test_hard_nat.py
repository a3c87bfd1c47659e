"""Endpoint-dependent NATs: passed by prediction or guesses, sparingly, and left alone where that is hopeless."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from ipaddress import ip_address

import pytest

from p2pvpn.core.errors import P2pvpnError
from p2pvpn.core.ids import PeerId
from p2pvpn.dht.rpc import RpcRefusedError
from p2pvpn.mesh.events import Guessed
from p2pvpn.mesh.hardnat import HardNat
from p2pvpn.mesh.tuning import Tuning
from p2pvpn.mesh.whereabouts import WHERE, Word, independent
from p2pvpn.sim.application import Pinger
from p2pvpn.sim.nat import NatKind
from p2pvpn.sim.world import Machine
from tools.hard_nat import MOST_PROBES, MOST_RATE, run

from .life import Life

CERTAIN = [
    ("symmetric/sequential", "port-restricted"),
    ("port-restricted", "symmetric/sequential+2/others=5"),
    ("ad/apd/sequential", "port-restricted"),
    ("apd/apd", "port-restricted"),
    ("symmetric/sequential", "symmetric/sequential+3"),
    ("apd/apd", "apd/apd"),
    ("symmetric/sequential", "apd/apd"),
]
GUESSED = [("symmetric", "port-restricted"), ("port-restricted", "ad/apd/random")]


def hard_nat(life: Life, machine: Machine, other: Machine) -> HardNat:
    return life.network(machine).sessions[other.overlay].paths.hard_nat


async def direct_within(life: Life, limit_s: float) -> bool:
    loop = asyncio.get_running_loop()
    until = loop.time() + limit_s
    while loop.time() < until:
        if life.path(life.a, life.b) == life.path(life.b, life.a) == "direct":
            return True
        await asyncio.sleep(0.1)
    return False


def guesses(life: Life) -> list[Guessed]:
    return [event for _, event in life.events if isinstance(event, Guessed)]


@pytest.mark.parametrize(("nat_a", "nat_b"), CERTAIN)
def test_a_nat_that_can_be_predicted_is_passed_within_three_seconds(nat_a: str, nat_b: str) -> None:
    life = Life(41, nat_a, nat_b)

    async def story() -> None:
        await life.ping(life.a, life.b, count=1)
        assert await direct_within(life, 3.0)
        assert all(run.method.startswith("prediction") for run in guesses(life))
        assert (await life.ping(life.a, life.b)).lost == []
        assert (await life.ping(life.b, life.a)).lost == []

    life.run(story())


def test_a_prediction_that_others_spoil_is_followed_by_guesses_at_once() -> None:
    life = Life(49, "symmetric/sequential/others=2000", "port-restricted")

    async def story() -> None:
        await life.ping(life.a, life.b, count=1)
        assert await direct_within(life, 16.0)
        await asyncio.sleep(1)
        assert [(run.method, run.met) for run in guesses(life)] == [("prediction", False), ("birthday", True)]

    life.run(story())


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_a_random_nat_against_a_port_restricted_one_is_passed_by_guessing(seed: int) -> None:
    outcome = run(seed)
    assert outcome.direct_s is not None
    assert outcome.direct_s <= 12.0
    assert outcome.probes <= MOST_PROBES
    assert outcome.rate <= MOST_RATE


@pytest.mark.parametrize(("nat_a", "nat_b"), GUESSED)
def test_nothing_is_lost_meanwhile_and_one_extra_socket_stays(nat_a: str, nat_b: str) -> None:
    life = Life(43, nat_a, nat_b)
    hard = life.a if nat_a != "port-restricted" else life.b

    async def story() -> None:
        running = Pinger(life.a.host, life.b.overlay, count=800, interval_s=0.02)
        assert await direct_within(life, 14.0)
        report = await running.done()
        assert report.lost == []
        await asyncio.sleep(8)
        (port,) = hard.host.underlay.extra_ports
        session = life.network(hard).sessions[(life.b if hard is life.a else life.a).overlay]
        assert session.current is not None
        assert session.current.path.local.port == port
        await asyncio.sleep(60)
        assert life.path(life.a, life.b) == "direct"
        assert (await life.ping(life.b, life.a)).lost == []
        await asyncio.sleep(320)  # nobody talks, the SA is taken down
        assert life.path(life.a, life.b) is None
        assert hard.host.underlay.extra_ports == set()

    life.run(story())


def test_an_sa_that_is_replaced_stays_on_its_hard_won_path() -> None:
    life = Life(44, "symmetric/sequential", "port-restricted", tuning=replace(Tuning(), sa_life_s=30.0))

    async def story() -> None:
        running = Pinger(life.a.host, life.b.overlay, count=1200, interval_s=0.1)
        assert await direct_within(life, 4.0)
        assert (await running.done()).lost == []
        assert life.path(life.a, life.b) == life.path(life.b, life.a) == "direct"
        assert len(guesses(life)) <= 2
        for one, other in ((life.a, life.b), (life.b, life.a)):
            session = life.network(one).sessions[other.overlay]
            assert session.current is not None
            assert session.current.agent is not None
            assert session.current.agent.selected == session.current.path

    life.run(story())


def test_two_random_nats_stay_relayed_without_a_guess() -> None:
    life = Life(45, "symmetric", "symmetric")

    async def story() -> None:
        await life.ping(life.a, life.b)
        assert not await direct_within(life, 15.0)
        assert guesses(life) == []
        assert life.path(life.a, life.b) == "relayed"

    life.run(story())


def test_nothing_is_guessed_where_the_owner_does_not_want_it() -> None:
    life = Life(46, "symmetric", "port-restricted", tuning=Tuning(hard_nats=False))

    async def story() -> None:
        await life.ping(life.a, life.b)
        assert not await direct_within(life, 15.0)
        assert guesses(life) == []

    life.run(story())


def test_after_a_failure_it_is_tried_again_a_minute_later_and_at_once_when_a_network_changes() -> None:
    life = Life(47, "symmetric", "port-restricted")

    async def story() -> None:
        blocked = _block_guesses(life)
        await life.ping(life.a, life.b, count=1)
        await asyncio.sleep(30)
        assert [run.met for run in guesses(life)] == [False]
        assert life.a.host.underlay.extra_ports == set()
        running = Pinger(life.a.host, life.b.overlay, count=60, interval_s=1.0)
        await asyncio.sleep(20)
        assert len(guesses(life)) == 1
        await asyncio.sleep(40)
        assert [run.met for run in guesses(life)] == [False, False]
        blocked.clear()
        life.homes["a"].router.replace_nat(NatKind.of("symmetric"))
        assert await direct_within(life, 40.0)
        await running.done()

    life.run(story())


def _block_guesses(life: Life) -> set[bool]:
    """While the set is not empty, nothing that b's machine sends to a's home arrives."""
    blocked = {True}
    underlay, target = life.b.host.underlay, life.homes["a"].router.outside.host(ipv6=False)
    send = underlay.send

    def sift(path, data):  # type: ignore[no-untyped-def]
        if not (blocked and path.remote.host == target):
            send(path, data)

    underlay.send = sift  # type: ignore[method-assign]
    return blocked


def test_no_hub_has_a_part_in_two_words() -> None:
    one, two, three, four = (PeerId(bytes([number]) * 20) for number in range(1, 5))
    here, there = ip_address("192.0.2.1"), ip_address("198.51.100.1")

    def witnesses(*words: tuple[PeerId, PeerId]) -> int:
        return len(independent([Word(asked, witness, here) for asked, witness in words]).get(here, ()))

    assert witnesses((one, one), (two, two)) == 2
    assert witnesses((one, one), (three, two)) == 2
    assert witnesses((three, one), (four, two)) == 2
    assert witnesses((one, one)) == 1
    assert witnesses((one, one), (one, two)) == 1  # the hub that was asked made both up, perhaps
    assert witnesses((one, two), (three, two)) == 1  # the witness lied to both, perhaps
    assert witnesses((three, one), (one, one), (three, two)) == 2  # a hub's own sight goes first
    assert independent([Word(one, one, here), Word(two, two, there)]) == {here: {bytes(one)}, there: {bytes(two)}}


def test_two_hubs_say_where_a_peer_is_and_none_to_whom_the_document_does_not_let_talk() -> None:
    life = Life(48)

    async def story() -> None:
        network, target = life.network(life.a), life.b.profile.member
        address = ip_address(life.homes["b"].router.outside.host(ipv6=False) or "")
        words = await network.whereabouts(target.overlay)
        assert set(words) == {address}
        assert len(words[address]) >= 2
        hub, other, *_ = [hub for hub in network.attachments.connected() if bytes(hub.peer_id) in words[address]]
        question = [bytes(target.peer_id), bytes(hub.peer_id)]
        for certificate in (life.b.profile.member.certificate, b"garbage"):
            with pytest.raises(RpcRefusedError):
                await network.rpc.request(hub.overlay, WHERE, [*question, certificate])
        for args in ([], [b"", b"", b""], [*question, b"x" * 2000], "where"):
            with pytest.raises(P2pvpnError):
                await network.rpc.request(hub.overlay, WHERE, args)
        nobody = [bytes(target.peer_id), bytes(20), network.me.certificate]
        assert await network.rpc.request(hub.overlay, WHERE, nobody) == b""
        other_sight = [bytes(target.peer_id), bytes(other.peer_id), network.me.certificate]
        assert await network.rpc.request(hub.overlay, WHERE, other_sight) == address.packed
        stranger = [bytes(20), bytes(hub.peer_id), network.me.certificate]
        with pytest.raises(RpcRefusedError, match="does not let"):
            await network.rpc.request(hub.overlay, WHERE, stranger)

    life.run(story())
