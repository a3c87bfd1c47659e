"""How long traffic stands still when the network changes: `make roaming`, or `python -m tools.roaming --seeds 1-50`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median

from p2pvpn.sim.roaming import CASES, Outage, run

from .sim import seeds

MEDIAN_S, P95_S = 0.4, 1.0
"""What nobody notices."""


def row(case: str, outages: list[Outage]) -> tuple[dict[str, object], bool]:
    """Figures of one case, and whether they are as they should be."""
    seconds = sorted(one.seconds for one in outages if one.seconds is not None)
    dead = len(outages) - len(seconds)
    at = min(len(seconds) - 1, round(0.95 * len(seconds)))
    figures: dict[str, object] = {"case": case, "what": CASES[case].words, "runs": len(outages), "never": dead}
    if seconds:
        figures |= {"median_s": round(median(seconds), 3), "p95_s": round(seconds[at], 3)}
        figures |= {"most_s": round(seconds[-1], 3)}
    figures["paths"] = {path: sum(one.path == path for one in outages) for path in sorted({o.path for o in outages})}
    good = not dead and median(seconds) <= MEDIAN_S and seconds[at] <= P95_S
    return figures, good


def main() -> int:
    """Run the cases; 0 when all are within the targets."""
    parser = argparse.ArgumentParser(prog="tools.roaming", description=__doc__)
    parser.add_argument("--seeds", default="1-50")
    parser.add_argument("--case", action="append", choices=list(CASES), help="only this one; may be repeated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--json", metavar="FILE", help="write all figures here")
    options = parser.parse_args()
    numbers = list(seeds(options.seeds))
    print(
        "| what happens | median s | 95 % s | most s | path in the end |",
        "| --- | ---: | ---: | ---: | --- |",
        sep="\n",
    )
    everything, bad = [], []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for case in options.case or CASES:
            figures, good = row(case, list(pool.map(partial(run, case), numbers[: CASES[case].most_runs])))
            everything.append(figures)
            bad += [] if good else [case]
            paths = ", ".join(f"{count} {path}" for path, count in figures["paths"].items())  # type: ignore[attr-defined]
            cells = [figures["what"], *(figures.get(name, "-") for name in ("median_s", "p95_s", "most_s")), paths]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(everything, indent=1))
    print(f"\nabove {MEDIAN_S:g} s at the median or {P95_S:g} s at 95 %: {', '.join(bad) or 'none'}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
