"""Nobody notices that the network changed: every case of `make roaming`, with one seed each."""

from __future__ import annotations

import pytest

from p2pvpn.sim.roaming import CASES, run


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.most_runs is None])
def test_traffic_stands_still_for_half_a_second_at_most(case: str) -> None:
    outage = run(case, seed=3)
    assert outage.seconds is not None
    assert outage.seconds < 0.5


@pytest.mark.parametrize("case", ["line", "other-end", "both-ends", "nap", "wifi-lte"])
def test_the_direct_path_is_back_soon_after(case: str) -> None:
    assert run(case, seed=4).path == "direct"
