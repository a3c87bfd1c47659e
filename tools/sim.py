"""The simulated Internet campaign: `make sim`, or `python -m tools.sim --seeds 1-20`.

Each seed is a world of its own: peers behind NATs of a declared mix, lossy lines, three hubs, a thousand pairs that
talk. The table says how they fared, judged by an oracle that knows the NATs and nothing of the product. A seed that
fails is made small and drawn as a sequence diagram.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from p2pvpn.sim.campaign import Result, run
from p2pvpn.sim.plan import Crash, Plan, Trouble, draw_plan
from p2pvpn.sim.shrink import shrink

COLUMNS = (
    ("seed", 4),
    ("pairs", 6),
    ("connected", 10),
    ("direct/oracle", 14),
    ("relayed", 8),
    ("1st answer RT", 15),
    ("direct after s", 16),
    ("look-ups", 9),
    ("calls", 6),
    ("ESP", 7),
    ("wall s", 7),
)


def cells(figures: dict[str, Any]) -> list[str]:
    """One line of the table."""

    def spread(name: str) -> str:
        values = figures[name]
        return "-" if values is None else f"{values['median']:.2f} / {values['p95']:.2f}"

    return [
        str(figures["seed"]),
        str(figures["pairs"]),
        str(figures["connected"]),
        f"{figures['direct']}/{figures['oracle_direct']}",
        str(figures["relayed"]),
        spread("first_answer_round_trips"),
        spread("direct_after_s"),
        str(figures["lookups"]),
        str(figures["calls"]),
        str(figures["esp_opened"]),
        f"{figures['wall_s']:.0f}",
    ]


def line(texts: list[str], *, markdown: bool) -> str:
    """Texts as columns."""
    if markdown:
        return "| " + " | ".join(texts) + " |"
    return " ".join(text.rjust(width) for text, (_, width) in zip(texts, COLUMNS, strict=True))


def seeds(text: str) -> Iterator[int]:
    """`1-3,7` -> 1 2 3 7. Raises ValueError."""
    for part in text.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def explain(result: Result, runs: int) -> None:
    """Make a failed run small and draw it."""
    print(f"\nseed {result.plan.seed} failed:", *result.failures[:10], sep="\n  ", flush=True)
    small, spent = shrink(result, runs=runs, say=lambda text: print(f"  {text}", flush=True))
    plan = small.plan
    print(f"smallest after {spent} runs: {len(plan.pairs)} pairs, {len(plan.peers)} peers, {plan.hubs} hubs")
    for peer in small.plan.peers[:20]:
        print(f"  {peer}")
    print(*(f"  {pair}" for pair in small.plan.pairs[:20]), *(f"  {text}" for text in small.failures[:5]), sep="\n")
    about = (small.suspects or list(small.plan.pairs))[:1]
    if about:
        print(run(small.plan, draw=about[0].names).diagram)


def plan_of(seed: int, options: argparse.Namespace) -> Plan:
    trouble = Trouble(Crash(options.crash), options.churn, options.cut)
    return draw_plan(
        seed,
        peers=options.peers,
        hubs=options.hubs,
        pairs=options.pairs,
        rate=options.rate,
        nat=options.nat,
        trouble=trouble,
    )


def main() -> int:
    """Run the campaign; 0 when every seed is as the oracle says."""
    parser = argparse.ArgumentParser(prog="tools.sim", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="1-20", help="1-20, or 3,7-9")
    parser.add_argument("--peers", type=int, default=200)
    parser.add_argument("--hubs", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=1000, help="pairs that talk, per seed")
    parser.add_argument("--rate", type=float, default=10.0, help="pairs that begin in a second")
    parser.add_argument(
        "--nat", default="", metavar="KIND", help="everybody behind a NAT of this kind, instead of the mix"
    )
    parser.add_argument("--crash", choices=[crash.value for crash in Crash], default="none", help="of the first hub")
    parser.add_argument("--churn", type=float, default=0.0, help="share of the peers that crash and restart")
    parser.add_argument("--cut", type=float, default=0.0, metavar="SECONDS", help="partition around the second hub")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="seeds at a time")
    parser.add_argument("--json", metavar="FILE", help="write all figures here")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    parser.add_argument(
        "--shrink", type=int, default=40, metavar="RUNS", help="runs spent on a failing seed; 0 for none"
    )
    options = parser.parse_args()
    plans = [plan_of(seed, options) for seed in seeds(options.seeds)]
    print(line([name for name, _ in COLUMNS], markdown=options.markdown))
    if options.markdown:
        print(line(["---:"] * len(COLUMNS), markdown=True))
    results = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for result in pool.map(run, plans):
            results.append(result)
            print(line(cells(result.figures()), markdown=options.markdown), flush=True)
    failed = [result for result in results if result.failures]
    for result in failed:
        if options.shrink:
            explain(result, options.shrink)
        else:
            print(f"\nseed {result.plan.seed} failed:", *result.failures, sep="\n  ")
    if options.json:
        Path(options.json).write_text(json.dumps([result.figures() for result in results], indent=1))
    print(f"\n{len(results) - len(failed)} of {len(results)} seeds as the oracle says" if results else "no seeds")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
