"""Knocks: what they show, who may have them, and that nothing else is taken for one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pvpn.core import stun
from p2pvpn.core.address import Endpoint
from p2pvpn.punch.behaviour import Filtering
from p2pvpn.punch.filtering import ASKER_BURST, KNOCKS_BURST, KnockLimits, KnockRefused, judge, knock, knock_untrusted

THERE = Endpoint("203.0.113.5", 5555)


@pytest.mark.parametrize(
    ("same", "other_port", "other_hub", "filtering"),
    [
        (True, True, True, Filtering.ENDPOINT_INDEPENDENT),
        (True, True, False, Filtering.ADDRESS_DEPENDENT),
        (True, False, False, Filtering.ADDRESS_AND_PORT_DEPENDENT),
        (True, False, None, Filtering.ADDRESS_AND_PORT_DEPENDENT),
        (True, True, None, Filtering.UNKNOWN),
        (True, None, None, Filtering.UNKNOWN),
        (True, None, False, Filtering.UNKNOWN),
        (True, None, True, Filtering.ENDPOINT_INDEPENDENT),
        (False, False, False, Filtering.UNKNOWN),
        (False, True, True, Filtering.UNKNOWN),
    ],
)
def test_what_came_in_tells_the_filter(
    same: bool, other_port: bool | None, other_hub: bool | None, filtering: Filtering
) -> None:
    assert judge(same=same, other_port=other_port, other_hub=other_hub) is filtering


def test_a_knock_is_known_by_its_transaction_and_smaller_than_what_asks_for_it() -> None:
    assert knock_untrusted(knock(b"x" * 12)) == b"x" * 12
    assert len(knock(b"x" * 12)) == 28
    for other in (stun.request(b"x" * 12), stun.success(b"x" * 12, THERE), stun.error(b"x" * 12, 400, "no")):
        assert knock_untrusted(stun.build(other)) is None


@given(st.binary(max_size=80))
def test_any_bytes_do_no_harm(data: bytes) -> None:
    assert knock_untrusted(data) is None or len(data) >= 20


def granted(limits: KnockLimits, askers: int, targets: int, *, is_hub: bool = False) -> int:
    count = 0
    for turn in range(200):
        try:
            limits.take(bytes([turn % askers]), Endpoint(f"203.0.113.{turn % targets}", turn + 1), 1.0, is_hub=is_hub)
        except KnockRefused:
            continue
        count += 1
    return count


def test_an_address_gets_few_knocks_whoever_asks_and_whatever_the_port() -> None:
    assert granted(KnockLimits(), askers=100, targets=1) == KNOCKS_BURST


def test_an_asker_gets_few_knocks_wherever_they_go() -> None:
    assert granted(KnockLimits(), askers=1, targets=100) == ASKER_BURST
    assert granted(KnockLimits(), askers=1, targets=100, is_hub=True) == 200
