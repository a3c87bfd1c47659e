"""Makes a failing plan small: fewer pairs, fewer peers, less trouble, cleaner lines, as long as it still fails.

The pairs that a failure is about are kept; everything else is left out in halves, as in delta debugging. A plan is a
deterministic world, so one run decides whether it fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from .campaign import Result, run
from .internet import Quality
from .plan import PairPlan, Plan, Trouble

MAX_RUNS = 40
"""Runs that are spent on one plan."""


def shrink(
    failed: Result, *, runs: int = MAX_RUNS, say: Callable[[str], None] = lambda text: None
) -> tuple[Result, int]:
    """The smallest failing run found, and the number of runs that it took."""
    best, spent = failed, 0
    progress = True
    while progress and spent < runs:
        progress = False
        for plan in _smaller(best):
            if spent >= runs:
                break
            spent += 1
            result = run(plan)
            if result.failures:
                best, progress = result, True
                say(f"still fails with {len(plan.pairs)} pairs of {len(plan.peers)} peers")
                break
    return best, spent


def _smaller(failed: Result) -> Iterator[Plan]:
    """Plans with less in them, the smallest first."""
    plan = failed.plan
    kept = tuple(pair for pair in plan.pairs if pair in failed.suspects)
    others = tuple(pair for pair in plan.pairs if pair not in failed.suspects)
    if others:
        if kept:
            yield plan.only(kept)
        yield from (plan.only(_in_order(kept + part)) for part in _parts(others))
    elif len(kept) > 1:
        yield from (plan.only((pair,)) for pair in kept)
    if plan.without_bystanders() != plan:
        yield plan.without_bystanders()
    if plan.trouble != Trouble():
        yield replace(plan, trouble=Trouble())
    if any(peer.crash_at_s is not None for peer in plan.peers):
        yield replace(plan, peers=tuple(replace(peer, crash_at_s=None) for peer in plan.peers))
    clean = Quality(delay_s=plan.line.delay_s + plan.line.jitter_s / 2)
    if plan.line != clean:
        yield replace(plan, line=clean)
    if plan.hubs > 1:
        yield replace(plan, hubs=plan.hubs - 1)


def _parts(pairs: tuple[PairPlan, ...]) -> Iterator[tuple[PairPlan, ...]]:
    """Halves, then what is left without each quarter."""
    half = len(pairs) // 2
    yield pairs[:half]
    yield pairs[half:]
    quarter = max(1, len(pairs) // 4)
    if len(pairs) > 2:
        for start in range(0, len(pairs), quarter):
            yield pairs[:start] + pairs[start + quarter :]


def _in_order(pairs: tuple[PairPlan, ...]) -> tuple[PairPlan, ...]:
    return tuple(sorted(pairs, key=lambda pair: (pair.at_s, pair.names)))
