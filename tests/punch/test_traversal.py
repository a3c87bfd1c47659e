"""The plan that both sides come to, and the notices by which they do."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pvpn.core.errors import LocalError, WireError
from p2pvpn.punch.behaviour import Allocation, Filtering, Mapping, NatBehaviour
from p2pvpn.punch.traversal import MAX_PORTS, Part, RunNotice, Step, decode_nat_untrusted, encode_nat, part

EASY = NatBehaviour(Mapping.ENDPOINT_INDEPENDENT)
RANDOM = NatBehaviour(Mapping.ADDRESS_AND_PORT_DEPENDENT, allocation=Allocation.RANDOM)
STEPS = NatBehaviour(Mapping.ENDPOINT_DEPENDENT, allocation=Allocation.SEQUENTIAL, step=1)
MIRROR = {Part.OPEN: Part.PROBE, Part.PROBE: Part.OPEN}
behaviours = st.builds(
    NatBehaviour,
    st.sampled_from(Mapping),
    st.sampled_from(Filtering),
    st.sampled_from(Allocation),
    st.integers(-(1 << 15), (1 << 15) - 1),
)


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        (EASY, EASY, Part.NOTHING),
        (NatBehaviour(), NatBehaviour(), Part.NOTHING),
        (EASY, RANDOM, Part.PROBE),
        (STEPS, EASY, Part.OPEN),
        (STEPS, STEPS, Part.MEET),
        (STEPS, RANDOM, Part.RELAYED),
        (RANDOM, RANDOM, Part.RELAYED),
    ],
)
def test_who_does_what(mine: NatBehaviour, theirs: NatBehaviour, expected: Part) -> None:
    assert part(mine, theirs) is expected


def test_both_sides_come_to_the_same_plan() -> None:
    for mapping, other, allocation, another in itertools.product(Mapping, Mapping, Allocation, Allocation):
        one, two = NatBehaviour(mapping, allocation=allocation), NatBehaviour(other, allocation=another)
        ours, theirs = part(one, two), part(two, one)
        assert theirs is MIRROR.get(ours, ours)


@given(behaviours, st.binary(max_size=8))
def test_what_is_said_of_a_nat_arrives_and_later_versions_may_add(nat: NatBehaviour, more: bytes) -> None:
    assert decode_nat_untrusted(encode_nat(nat) + more) == nat


def test_a_nat_of_a_later_kind_is_an_unknown_one() -> None:
    assert decode_nat_untrusted(bytes((2, 99, 99, 99, 0, 0))) == NatBehaviour()


@given(st.sampled_from(Step), st.integers(0, (1 << 32) - 1), st.lists(st.integers(1, 65535), unique=True, max_size=64))
def test_a_step_of_a_run_arrives(step: Step, run: int, ports: list[int]) -> None:
    notice = RunNotice(step, run, tuple(ports))
    assert RunNotice.decode_untrusted(notice.encode()) == notice
    assert RunNotice.decode_untrusted(notice.encode() + b"later") == notice


@given(st.binary(max_size=600))
def test_garbage_is_a_wire_error_or_a_notice_within_bounds(data: bytes) -> None:
    for decode in (decode_nat_untrusted, RunNotice.decode_untrusted):
        try:
            found = decode(data)
        except WireError:
            continue
        if isinstance(found, RunNotice):
            assert len(found.ports) <= MAX_PORTS
            assert 0 not in found.ports


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\1\0\0\0\1\0",
        b"\1\x63\0\0\0\1\0",
        b"\1\2\0\0\0\1\x41" + bytes(range(130)),
        b"\1\2\0\0\0\1\1\0\0",
        b"\1\2\0\0\0\1\2\x11\x11\x11\x11",
        b"\1\2\0\0\0\1\1\x11",
    ],
    ids=["empty", "version 0", "unknown step", "too many ports", "port 0", "a port twice", "cut short"],
)
def test_bad_steps_of_a_run_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        RunNotice.decode_untrusted(data)


def test_more_ports_than_fit_are_not_encoded() -> None:
    with pytest.raises(LocalError):
        RunNotice(Step.OPEN, 1, tuple(range(1, MAX_PORTS + 2))).encode()
