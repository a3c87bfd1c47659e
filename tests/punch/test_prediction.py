"""Which ports a NAT gives next, from those that it gave to a few fresh sockets."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pvpn.core.address import Endpoint
from p2pvpn.punch.allocation import Sample
from p2pvpn.punch.behaviour import Allocation
from p2pvpn.punch.prediction import FIRST_PORT, LAST_PORT, predict
from p2pvpn.sim.nat import Nat, NatKind

HUB = Endpoint("192.0.2.1", 3478)
PEER = Endpoint("198.51.100.9", 4500)
INNER = range(40001, 40017)


def sampled(nat: Nat, apart_s: float = 0.0) -> list[Sample]:
    """Four fresh sockets of one host, seen by a hub."""
    samples = []
    for number, port in enumerate(range(40101, 40105)):
        outer = nat.translate_out(Endpoint("10.0.0.2", port), HUB, number * apart_s)
        assert outer is not None
        samples.append(Sample(port, outer.port))
    return samples


def opened(nat: Nat, at: float) -> list[int]:
    """The outer ports of sixteen more, towards a peer."""
    outer = [nat.translate_out(Endpoint("10.0.0.2", port), PEER, at) for port in INNER]
    return [one.port for one in outer if one is not None]


@pytest.mark.parametrize("kind", ["apd/apd/sequential", "ad/apd/sequential", "apd/apd/sequential+4", "apd/apd"])
def test_what_is_predicted_comes_true(kind: str) -> None:
    for seed in range(50):
        nat = Nat(["198.51.100.1"], NatKind.of(kind), random.Random(seed))
        prediction = predict(sampled(nat))
        assert prediction.is_useful
        assert prediction.confidence == 1.0
        assert list(prediction.ports(list(INNER))) == opened(nat, 0.1)


def test_with_others_in_between_the_ports_are_among_the_spare_ones() -> None:
    met = 0
    for seed in range(50):
        nat = Nat(["198.51.100.1"], NatKind.of("apd/apd/sequential/others=50"), random.Random(seed))
        prediction = predict(sampled(nat, apart_s=0.01))
        met += bool(set(prediction.ports(list(INNER), 32)) & set(opened(nat, 0.2)))
    assert met == 50


def test_nothing_is_predicted_of_a_random_allocator() -> None:
    for seed in range(50):
        nat = Nat(["198.51.100.1"], NatKind.of("symmetric"), random.Random(seed))
        prediction = predict(sampled(nat))
        assert not prediction.is_useful
        assert prediction.ports(list(INNER), 32) == ()


def test_a_sequence_goes_on_at_the_other_end_of_the_range() -> None:
    prediction = predict([Sample(1, 65532), Sample(2, 65533), Sample(3, 65534)])
    assert prediction.ports([7, 8, 9]) == (65535, FIRST_PORT, FIRST_PORT + 1)
    falling = predict([Sample(1, 1028), Sample(2, 1027), Sample(3, 1026)])
    assert falling.step == -1
    assert falling.ports([7, 8, 9]) == (1025, 1024, LAST_PORT)


def test_two_samples_say_nothing() -> None:
    assert predict([Sample(1, 5000), Sample(2, 5001)]).allocation is Allocation.UNKNOWN


@given(st.lists(st.builds(Sample, st.integers(1, 65535), st.integers(1, 65535)), max_size=8), st.integers(0, 40))
def test_whatever_was_seen_predictions_are_distinct_ports(samples: list[Sample], spare: int) -> None:
    ports = predict(samples).ports(list(INNER), spare)
    assert len(set(ports)) == len(ports) <= len(INNER) + spare
    assert all(0 < port <= LAST_PORT for port in ports)
