"""The simulated Internet: hundreds of peers behind declared NATs, judged by the oracle; plans, counts and shrinking."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest

from p2pvpn.punch.checklist import CheckList
from p2pvpn.sim.campaign import Result, run
from p2pvpn.sim.internet import Quality
from p2pvpn.sim.plan import MIX, Crash, Trouble, draw_plan
from p2pvpn.sim.shrink import shrink

CLEAN = Quality(delay_s=0.012_25)
MAX_ROUND_TRIPS = 6.0
"""Peer to peer and back over the relay, until the first packet is answered, at the median."""


def assert_fine(result: Result) -> None:
    """Everybody is connected, direct where the oracle says so, and nothing was bypassed."""
    figures = result.figures()
    assert result.failures == []
    assert figures["connected"] == figures["pairs"] == len(result.plan.pairs)
    assert figures["direct"] == figures["oracle_direct"]
    assert figures["first_answer_round_trips"]["median"] <= MAX_ROUND_TRIPS
    assert figures["lookups"] >= 0.95 * figures["pairs"]
    assert figures["calls"] >= 0.85 * figures["pairs"]
    assert figures["esp_opened"] >= 14 * figures["pairs"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hundred_peers_and_a_thousand_pairs_are_as_the_oracle_says() -> None:
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for result in pool.map(run, [draw_plan(seed) for seed in (1, 2, 3)]):
            assert len(result.pairs) == 1000
            assert_fine(result)


def test_the_same_plan_gives_the_same_trace() -> None:
    plan = draw_plan(4, peers=16, pairs=16)
    one, other = run(plan), run(plan)
    assert one.digest == other.digest
    assert_fine(one)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "trouble",
    [
        Trouble(crash=Crash.DISK),
        Trouble(crash=Crash.EMPTY),
        Trouble(crash=Crash.DEAD),
        Trouble(cut_s=20.0),
        Trouble(churn=0.1),
    ],
    ids=["hub restarts", "hub loses its disk", "hub dies", "partition", "churn"],
)
def test_everybody_is_connected_whatever_goes_wrong(trouble: Trouble) -> None:
    result = run(draw_plan(5, peers=40, pairs=80, rate=4.0, trouble=trouble))
    assert result.failures == []
    assert result.connected == 80
    if trouble.crash in (Crash.DISK, Crash.EMPTY):
        assert result.resync_s is not None
        assert result.resync_s < 30
    if trouble.churn:
        assert result.back_s
        assert max(result.back_s) < 15


def test_a_plan_has_the_declared_mix_and_distinct_pairs() -> None:
    plan = draw_plan(7)
    kinds = Counter(peer.nat for peer in plan.peers)
    assert kinds == {kind: round(share * 200) for kind, share in MIX.items()}
    assert len({frozenset(pair.names) for pair in plan.pairs}) == 1000
    assert any(peer.carrier for peer in plan.peers)
    assert any(pair.mutual for pair in plan.pairs)
    assert plan == draw_plan(7)
    assert plan != draw_plan(8)


def test_more_pairs_than_peers_make_are_refused() -> None:
    with pytest.raises(ValueError, match="10 peers make 45 pairs"):
        draw_plan(1, peers=10, pairs=46)


def test_a_failing_plan_shrinks_to_the_pair_that_fails() -> None:
    """Lines that carry nothing larger than a small IKE message: whoever talks fails."""
    plan = draw_plan(9, peers=8, pairs=4, rate=4.0, line=CLEAN)
    narrow = replace(plan, line=replace(CLEAN, mtu=120))
    failed = run(narrow)
    assert failed.failures
    small, spent = shrink(failed, runs=8)
    assert small.failures
    assert spent <= 8
    assert len(small.plan.pairs) <= 1 or len(small.plan.peers) < 8


def test_a_fault_in_the_product_shrinks_to_two_peers_that_show_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks from addresses that nobody told of are forgotten: only who is behind a symmetric NAT misses them."""
    plan = draw_plan(14, peers=12, hubs=2, pairs=10, rate=5.0)
    assert_fine(run(plan))
    monkeypatch.setattr(CheckList, "learn", lambda *_: None)
    failed = run(plan)
    assert len(failed.pairs) == 10
    small, spent = shrink(failed)
    assert spent < 10
    (pair,) = small.plan.pairs
    assert {peer.name for peer in small.plan.peers} == set(pair.names)
    assert "symmetric" in {peer.nat for peer in small.plan.peers}
    assert small.failures == [f"{pair.caller} and {pair.callee} can be direct and are relayed and relayed after 20 s"]
    assert (small.plan.hubs, small.plan.line.loss) == (1, 0.0)


def test_a_connection_can_be_drawn() -> None:
    plan = draw_plan(10, peers=8, pairs=1, line=CLEAN)
    (pair,) = plan.pairs
    result = run(plan.without_bystanders(), draw=pair.names)
    assert result.failures == []
    for word in ("IKE_SA_INIT request", "IKE_AUTH response", "ESP", pair.caller, pair.callee, "hub1"):
        assert word in result.diagram
