"""The search for how long a silent binding lives."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pvpn.punch.lifetime import (
    AGAIN_S,
    CLOSE,
    LEAST_MARGIN,
    LONGEST_S,
    MARGIN,
    MOST_REFRESH_S,
    UNKNOWN_REFRESH_S,
    LifetimeSearch,
)


def learn(search: LifetimeSearch, lifetime_s: float, trials: int = 30) -> float:
    """Try until it is found; the time that took."""
    took = 0.0
    for _ in range(trials):
        if search.is_found:
            return took
        silence_s = search.next_silence()
        took += silence_s
        (search.lived if silence_s < lifetime_s else search.died)(silence_s)
    raise AssertionError("not found")


@given(st.floats(10.0, 1000.0))
def test_every_lifetime_is_found_and_refreshing_stays_below_it(lifetime_s: float) -> None:
    search = LifetimeSearch()
    assert search.refresh_s == UNKNOWN_REFRESH_S
    assert learn(search, lifetime_s) < 1500.0
    assert search.refresh_s < lifetime_s
    assert search.refresh_s <= MOST_REFRESH_S
    assert search.pause_s() == AGAIN_S
    if lifetime_s <= LONGEST_S:
        assert search.refresh_s >= lifetime_s / CLOSE * MARGIN * 0.9
    else:
        assert search.refresh_s == MOST_REFRESH_S


@given(st.floats(25.0 / MARGIN, 400.0), st.integers(0, 20))
def test_refreshing_never_waits_longer_than_what_did_no_harm(lifetime_s: float, trials: int) -> None:
    search = LifetimeSearch()
    for _ in range(trials):
        silence_s = search.next_silence()
        (search.lived if silence_s < lifetime_s else search.died)(silence_s)
        assert search.refresh_s < max(lifetime_s, UNKNOWN_REFRESH_S)


@pytest.mark.parametrize(("before_s", "after_s"), [(120.0, 60.0), (60.0, 120.0), (300.0, 40.0), (40.0, 290.0)])
def test_a_nat_that_becomes_another_is_noticed(before_s: float, after_s: float) -> None:
    search = LifetimeSearch()
    learn(search, before_s)
    for _ in range(40):
        silence_s = search.next_silence()
        (search.lived if silence_s < after_s else search.died)(silence_s)
    assert after_s / CLOSE * 0.9 <= (search.lifetime_s or 0) < after_s


def test_a_binding_in_use_that_was_lost_makes_everything_doubtful() -> None:
    search = LifetimeSearch()
    learn(search, 120.0)
    refresh_s = search.refresh_s
    search.lost(200.0)
    search.lost(1.0)
    assert search.refresh_s == refresh_s
    search.lost(100.0)
    assert search.refresh_s == UNKNOWN_REFRESH_S
    learn(search, 120.0)
    assert search.refresh_s < 0.8 * refresh_s
    for _ in range(20):
        search.lost(50.0)
        search.lived(60.0)
    assert search.margin == LEAST_MARGIN


@given(st.floats(10.0, 1000.0))
def test_what_was_kept_is_what_was_known(lifetime_s: float) -> None:
    search = LifetimeSearch()
    assert LifetimeSearch.of_dict(json.loads(json.dumps(search.as_dict()))) == search
    learn(search, lifetime_s)
    kept = LifetimeSearch.of_dict(json.loads(json.dumps(search.as_dict())))
    assert (kept.lived_s, kept.died_s, kept.refresh_s) == (search.lived_s, search.died_s, search.refresh_s)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)
)


@given(json_values | st.fixed_dictionaries({"lived_s": json_values, "died_s": json_values, "margin": json_values}))
def test_a_damaged_file_is_as_good_as_none(value: object) -> None:
    search = LifetimeSearch.of_dict(value)
    assert 0.0 < search.refresh_s <= MOST_REFRESH_S
    assert 0.0 < search.next_silence() <= LONGEST_S
