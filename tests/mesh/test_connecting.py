"""How two peers come together, for each pair of NATs, and what the first packet experiences."""

from __future__ import annotations

import asyncio

import pytest

from p2pvpn.mesh.attach import Hub
from p2pvpn.mesh.events import Called, PeerConnected
from p2pvpn.mesh.tuning import Tuning
from p2pvpn.sim.application import Pinger
from p2pvpn.sim.oracle import Verdict
from p2pvpn.sim.world import Machine

from .life import Life

NATS = ("none", "full-cone", "restricted", "port-restricted", "symmetric")
PAIRS = [(a, b) for a in NATS for b in NATS]


@pytest.mark.parametrize(("nat_a", "nat_b"), PAIRS)
def test_any_pair_of_nats_connects_and_goes_direct_where_the_oracle_says_so(nat_a: str, nat_b: str) -> None:
    life = Life(11, nat_a, nat_b)

    async def story() -> None:
        report = await life.ping(life.a, life.b, count=40)
        assert report.lost == []
        expected = "direct" if life.world.verdict(life.a, life.b) is Verdict.DIRECT else "relayed"
        assert life.path(life.a, life.b) == expected
        assert life.path(life.b, life.a) == expected

    life.run(story())


def test_the_first_packet_is_answered_after_four_round_trips_over_the_relay() -> None:
    life = Life(1)

    async def story() -> None:
        report = await life.ping(life.a, life.b, count=1)
        relayed_round_trip_s = 0.081
        assert report.first_answer_s is not None
        assert report.first_answer_s < 4.2 * relayed_round_trip_s

    life.run(story())


def test_both_ends_starting_at_once_make_one_connection_and_lose_nothing() -> None:
    for seed in range(5):
        life = Life(seed)

        async def story(life: Life = life) -> None:
            there = Pinger(life.a.host, life.b.overlay, count=100, interval_s=0.01)
            back = Pinger(life.b.host, life.a.overlay, count=100, interval_s=0.01)
            assert (await there.done()).lost == []
            assert (await back.done()).lost == []
            await asyncio.sleep(10)
            assert len(life.network(life.a).sessions[life.b.overlay].sa_ids) == 1
            assert len(life.network(life.b).sessions[life.a.overlay].sa_ids) == 1

        life.run(story())


def test_peers_that_are_known_to_have_public_addresses_are_dialled_without_a_call() -> None:
    life = Life(3, "none", "none")

    async def story() -> None:
        await life.network(life.a).locate(life.b.overlay)
        assert (await life.ping(life.a, life.b)).lost == []
        assert life.heard(life.b, Called) == []
        assert [event.path for event in life.heard(life.a, PeerConnected) if event.peer == "b"] == ["direct"]

    life.run(story())


def test_an_ipv4_overlay_address_leads_to_the_peer_too() -> None:
    life = Life(5)

    async def story() -> None:
        ipv4 = life.b.profile.member.ipv4
        assert ipv4 is not None
        report = await Pinger(life.a.host, ipv4, count=20, interval_s=0.05).done()
        assert report.answered >= 18  # what comes during the look-up of the address is left to retransmission

    life.run(story())


def test_a_name_leads_to_the_peer() -> None:
    life = Life(6)

    async def story() -> None:
        assert await life.network(life.a).directory.resolve("b") == life.b.overlay

    life.run(story())


def test_an_idle_peer_is_taken_down_and_comes_back_with_the_next_packet() -> None:
    life = Life(7)

    async def story() -> None:
        await life.ping(life.a, life.b)
        await asyncio.sleep(400)
        assert life.path(life.a, life.b) is None
        assert life.path(life.b, life.a) is None
        assert (await life.ping(life.a, life.b)).lost == []

    life.run(story())


def test_the_same_seed_gives_the_same_trace() -> None:
    def trace() -> str:
        life = Life(21)

        async def story() -> None:
            await life.ping(life.a, life.b)

        life.run(story())
        return life.world.trace.digest()

    assert trace() == trace()


def test_the_relay_of_a_call_is_not_forgotten_before_the_caller_has_come() -> None:
    """Sessions are tidied up once a second, in the middle of some connections."""
    for step in range(20):
        life = Life(30, "symmetric", "symmetric")

        async def story(life: Life = life, step: int = step) -> None:
            await asyncio.sleep(step * 0.05)
            await life.ping(life.a, life.b, count=1)
            assert life.path(life.a, life.b) == life.path(life.b, life.a) == "relayed"

        life.run(story())


def test_a_hub_that_hands_on_the_call_and_keeps_the_ike_answer_costs_one_round_trip() -> None:
    """Or changes it: what is carried inside a call proves nothing, and the exchange goes on over the relay."""
    for lie in (b"", b"\x00" * 400):
        life = Life(31)

        async def story(life: Life = life, lie: bytes = lie) -> None:
            for hub in life.hubs:
                side = life.network(hub).hub
                assert side is not None

                async def invite(target, meet, side=side, told=side._invite, lie=lie) -> bytes:
                    await told(target, meet)
                    return lie

                side._invite = invite  # type: ignore[method-assign]
            report = await life.ping(life.a, life.b, count=1)
            assert report.first_answer_s is not None
            assert report.first_answer_s < 5.2 * 0.081

        life.run(story())


def test_a_peer_attached_to_other_hubs_than_ours_is_called_through_them() -> None:
    life = Life(32, tuning=Tuning(hubs_wanted=1))

    async def story() -> None:
        assert attached(life, life.a) != attached(life, life.b)
        report = await life.ping(life.a, life.b, count=1)
        assert report.first_answer_s is not None
        assert report.first_answer_s < 5 * 0.081

    life.run(story())


def attached(life: Life, machine: Machine) -> list[Hub]:
    return life.network(machine).attachments.connected()
