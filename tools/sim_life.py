"""Simulated lives: `make sim-life`, or `python -m tools.sim_life`.

A hundred peers move, sleep, crash and lose their links for half an hour, while routers change, hubs restart and the
network falls apart in places. No pair that talks may be without an answer for more than five seconds while it could be
connected, and nothing may be parked in the end. The table says how long each kind of trouble took to get over.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median

from rich.console import Console

from p2pvpn.sim.life import LifeResult, Outage, live, recoveries, too_long
from p2pvpn.sim.lifeplan import LifePlan, draw_life
from tools.nat_grid import as_markdown, as_table
from tools.sim import seeds

LIVES = (
    "seed",
    "peers",
    "hubs",
    "minutes",
    "events",
    "packets",
    "answered",
    "outages",
    "too long",
    "CPU s",
    "us/peer-s",
)
CAUSES = ("what happened", "outages", "median s", "95th s", "longest s")
WORST = ("seed", "at s", "lasted s", "pair", "way", "what happened before, and meanwhile")


def lives(results: Sequence[LifeResult]) -> list[list[str]]:
    """A row per seed."""
    return [
        [
            str(result.plan.seed),
            str(len(result.plan.homes)),
            str(result.plan.hubs),
            f"{result.plan.duration_s / 60:.0f}",
            str(len(result.plan.happenings)),
            str(result.counts["pings"]),
            f"{result.counts['answers'] / max(1, result.counts['pings']):.1%}",
            str(len(result.outages)),
            str(len(too_long(result))),
            f"{result.cpu_s:.0f}",
            f"{result.cpu_per_peer_second_us:.0f}",
        ]
        for result in results
    ]


def causes(results: Sequence[LifeResult]) -> list[list[str]]:
    """A row per kind of trouble."""
    rows = []
    for cause, lengths in recoveries(results).items():
        p95 = lengths[min(len(lengths) - 1, round(0.95 * len(lengths)))]
        rows.append([cause, str(len(lengths)), f"{median(lengths):.1f}", f"{p95:.1f}", f"{lengths[-1]:.1f}"])
    return rows


def worst(results: Sequence[LifeResult], count: int) -> list[list[str]]:
    """The longest outages."""
    found = [(result.plan.seed, outage) for result in results for outage in result.outages]
    found.sort(key=lambda one: -one[1].lasted_s)
    return [
        [
            str(seed),
            f"{outage.at_s:.1f}",
            f"{outage.lasted_s:.1f}" + ("" if outage.ended else ", open") + (" !" if outage.is_too_long else ""),
            f"{outage.caller} to {outage.callee}",
            outage.path,
            "; ".join(outage.causes[-3:]),
        ]
        for seed, outage in found[:count]
    ]


def explain(plan: LifePlan, outage: Outage) -> None:
    """Draw an outage."""
    print(f"\nseed {plan.seed}: {outage.caller} had no answer from {outage.callee} for {outage.lasted_s:.1f} s")
    print(*(f"  {cause}" for cause in outage.causes), live(plan, draw=outage).diagram, sep="\n")


def main() -> int:
    """Run the lives; 0 when nobody was without an answer for too long."""
    parser = argparse.ArgumentParser(prog="tools.sim_life", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="1-5", help="1-5, or 3,7-9")
    parser.add_argument("--peers", type=int, default=100)
    parser.add_argument("--hubs", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=30.0, help="of virtual time")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="lives at a time")
    parser.add_argument("--worst", type=int, default=15, metavar="COUNT", help="outages listed")
    parser.add_argument("--draw", action="store_true", help="draw the longest outage, whether it was too long or not")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    options = parser.parse_args()
    plans = [
        draw_life(seed, peers=options.peers, hubs=options.hubs, duration_s=60.0 * options.minutes)
        for seed in seeds(options.seeds)
    ]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(live, plans))
    for title, headings, rows in (
        ("Lives", LIVES, lives(results)),
        ("How long troubles lasted", CAUSES, causes(results)),
        ("The longest outages", WORST, worst(results, options.worst)),
    ):
        if options.markdown:
            print(f"### {title}\n\n{as_markdown(headings, rows)}\n")
        else:
            show_table(title, headings, rows)
    failures = [f"seed {result.plan.seed}: {failure}" for result in results for failure in result.failures]
    bad = [(result.plan, outage) for result in results for outage in too_long(result)]
    print(f"{len(bad)} outages were too long; {len(failures)} other failures", *failures, sep="\n  ")
    drawn = bad or [(result.plan, outage) for result in results for outage in result.outages]
    if drawn and (bad or options.draw):
        explain(*max(drawn, key=lambda one: one[1].lasted_s))
    return int(bool(bad or failures))


def show_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """On a terminal, or into a pipe."""
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(as_table(title, headings, rows), "")


if __name__ == "__main__":
    sys.exit(main())
