"""Peers that stay relayed meet at the hub that is nearest to both."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pvpn.core.errors import WireError
from p2pvpn.core.ids import PeerId
from p2pvpn.mesh import nearest
from p2pvpn.mesh.events import PathChanged
from p2pvpn.sim.application import Pinger

from .life import Life

FAR_S, NEAR_S = 0.080, 0.002
A, B, C = (PeerId(bytes([number]) * 20) for number in (1, 2, 3))


@pytest.mark.parametrize("near", [0, 1, 2])
def test_a_relayed_pair_moves_to_the_nearest_hub_and_loses_nothing(near: int) -> None:
    delays = [NEAR_S if number == near else FAR_S + 0.01 * number for number in range(3)]
    life = Life(41, "symmetric", "symmetric", hub_delays_s=delays)

    async def story() -> None:
        pinger = Pinger(life.a.host, life.b.overlay, count=400, interval_s=0.05)
        assert (await pinger.done()).lost == []
        assert life.relaying_hub() is life.hubs[near]
        assert life.path(life.a, life.b) == life.path(life.b, life.a) == "relayed"
        report = await life.ping(life.a, life.b, count=20)
        assert report.lost == []
        assert life.remote(life.b, life.a).startswith(life.hubs[near].host.interfaces[0].hosts[0])

    life.run(story())


def test_hubs_at_one_distance_keep_what_they_have() -> None:
    life = Life(42, "symmetric", "symmetric", hub_delays_s=(0.010, 0.012, 0.014))

    async def story() -> None:
        await life.ping(life.a, life.b, count=400)
        assert [event.path for event in life.heard(life.a, PathChanged) if event.peer == "b"] == []  # type: ignore[attr-defined]

    life.run(story())


def test_the_relay_moves_back_when_the_nearest_hub_dies() -> None:
    life = Life(43, "symmetric", "symmetric", hub_delays_s=(FAR_S, NEAR_S, FAR_S))

    async def story() -> None:
        await life.ping(life.a, life.b, count=400)
        assert life.relaying_hub() is life.hubs[1]
        life.hubs[1].host.crash()
        await asyncio.sleep(5)
        assert (await life.ping(life.a, life.b, count=100)).lost == []
        assert life.relaying_hub() is not life.hubs[1]

    life.run(story())


def test_a_direct_pair_measures_nothing() -> None:
    life = Life(44, hub_delays_s=(FAR_S, NEAR_S, FAR_S))

    async def story() -> None:
        await life.ping(life.a, life.b, count=400)
        assert life.path(life.a, life.b) == "direct"
        assert life.network(life.a).nearest._measured_at is None

    life.run(story())


def test_the_least_sum_wins_if_it_is_clearly_less() -> None:
    everybody = [A, B, C]
    assert nearest.nearest({A: 0.100, B: 0.050, C: 0.060}, A, everybody) == B
    assert nearest.nearest({A: 0.100, B: 0.050, C: 0.060}, A, [A, C]) == C
    assert nearest.nearest({A: 0.100, B: 0.095, C: 0.200}, A, everybody) is None
    assert nearest.nearest({A: 0.012, B: 0.004}, A, everybody) is None
    assert nearest.nearest({A: 0.100}, A, []) is None


def test_round_trips_travel_and_are_bounded() -> None:
    there = {A: 0.0123, B: 9.0}
    assert nearest.decode_untrusted(nearest.encode(there)) == pytest.approx({A: 0.0123, B: 6.5535})
    many = {PeerId(bytes([number]) * 20): 0.1 for number in range(30)}
    assert len(nearest.decode_untrusted(nearest.encode(many))) == nearest.MAX_HUBS
    with pytest.raises(WireError):
        nearest.decode_untrusted(b"\xff" + bytes(22 * 255))


@given(st.binary(max_size=300))
def test_no_bytes_make_round_trips_of_more_than_eight_hubs(data: bytes) -> None:
    with suppress(WireError):
        assert len(nearest.decode_untrusted(data)) <= nearest.MAX_HUBS
