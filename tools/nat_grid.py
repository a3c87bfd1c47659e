"""The NAT grid: `make nat-grid`, or `python -m tools.nat_grid`.

Every pair of places in a simulated world of its own: two peers, three hubs, the real engine. The table says which pairs
are direct, by which means, and at what cost, judged by an oracle that knows the NATs and nothing of the product.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from p2pvpn.sim.grid import PLACES, Cell, Outcome, Shared, all_cells, run
from p2pvpn.sim.oracle import BIRTHDAY_SHARE, Verdict
from tools.sim import seeds

LETTERS = {
    Verdict.DIRECT: "D",
    Verdict.PREDICTED: "P",
    Verdict.BIRTHDAY: "B",
    Verdict.RELAYED: "r",
    Verdict.STREAM: "t",
}
LEGEND = (
    "D direct, P direct by prediction, B direct by the birthday method, r relayed, t over TCP; "
    "+ direct beyond the promise, ~ not direct in every seed, ! not as promised"
)
MARKS = {"!": "bold red", "~": "yellow", "+": "cyan", "": "green"}

TEXTS = ("place", "promise", "cell", "pair", "way")
"""Columns that are not figures."""

Runs = Sequence[Outcome]
"""The same cell, one outcome per seed."""


def mark(runs: Runs) -> str:
    """What is to be said of a cell besides its letter."""
    verdict, direct = runs[0].verdict, sum(one.direct for one in runs)
    if not all(one.is_as_promised for one in runs):
        return "!"
    if verdict.direct_share and direct < len(runs):
        return "~"
    return "+" if direct and not verdict.direct_share else ""


def spread(values: Iterable[float | int | None], form: str) -> str:
    """Median / 95th percentile."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return "-"
    return f"{median(known):{form}} / {known[min(len(known) - 1, round(0.95 * len(known)))]:{form}}"


def grouped(outcomes: Iterable[Outcome]) -> list[Runs]:
    """Outcomes by cell; they come in the order of cells."""
    return [list(runs) for _, runs in groupby(outcomes, key=lambda one: one.cell)]


def matrix(grid: Sequence[Runs]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: one place per row and column, the lower half filled."""
    of_pair = {(runs[0].cell.one, runs[0].cell.other): runs for runs in grid if runs[0].cell.shared is Shared.NOTHING}
    used = [place for place in PLACES if any(place in pair for pair in of_pair)]
    rows = []
    for number, place in enumerate(used, start=1):
        row = [str(number), str(place)]
        for other in used[:number]:
            runs = of_pair.get((other, place))
            row.append("" if runs is None else LETTERS[runs[0].verdict] + mark(runs))
        rows.append(row + [""] * (len(used) - number))
    return ["", "place", *(str(number) for number in range(1, len(used) + 1))], rows


SUMMARY = ("promise", "cells", "runs", "connected", "direct", "1st answer s", "direct after s", "checks sent")


def summary(grid: Sequence[Runs]) -> list[list[str]]:
    """A row per promise."""
    rows = []
    for verdict in Verdict:
        cells = [runs for runs in grid if runs[0].verdict is verdict]
        runs = [one for cell in cells for one in cell]
        if runs:
            rows.append(
                [
                    f"{LETTERS[verdict]} {verdict.value}",
                    str(len(cells)),
                    str(len(runs)),
                    str(sum(one.connected for one in runs)),
                    str(sum(one.direct for one in runs)),
                    spread((one.first_answer_s for one in runs), ".2f"),
                    spread((one.direct_s for one in runs), ".2f"),
                    spread((one.checks for one in runs), ".0f"),
                ]
            )
    return rows


SPECIAL = ("cell", "promise", "connected", "direct", "1st answer s", "direct after s", "checks sent")


def special(grid: Sequence[Runs]) -> list[list[str]]:
    """A row per cell whose peers have something in common."""
    rows = []
    for runs in grid:
        if runs[0].cell.shared is not Shared.NOTHING:
            count = len(runs)
            rows.append(
                [
                    str(runs[0].cell),
                    runs[0].verdict.value + mark(runs),
                    f"{sum(one.connected for one in runs)}/{count}",
                    f"{sum(one.direct for one in runs)}/{count}",
                    spread((one.first_answer_s for one in runs), ".2f"),
                    spread((one.direct_s for one in runs), ".2f"),
                    spread((one.checks for one in runs), ".0f"),
                ]
            )
    return rows


def as_markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "| " + " | ".join("---" for _ in headings) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def as_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in TEXTS or heading.startswith("what") else "right")
    for row in rows:
        table.add_row(*(Text(text, MARKS.get(text[1:], "") if 0 < len(text) < 3 else "") for text in row))
    return table


def problems(grid: Sequence[Runs]) -> list[str]:
    """What was not as promised, a sentence each."""
    found = []
    for runs in grid:
        for one in runs:
            if not one.is_as_promised:
                what = one.problem or ("not connected" if not one.connected else "not direct")
                found.append(f"{one.cell} (seed {one.seed}): promised {one.verdict.value}, {what}")
    lucky = [one for runs in grid for one in runs if one.verdict is Verdict.BIRTHDAY]
    direct = sum(one.direct for one in lucky)
    if direct < BIRTHDAY_SHARE * len(lucky):
        found.append(f"by the birthday method {direct} of {len(lucky)} runs are direct: less than {BIRTHDAY_SHARE:.0%}")
    return found


def show(grid: Sequence[Runs], *, markdown: bool) -> None:
    """Print the tables."""
    parts = [("Every pair of places", *matrix(grid)), ("By promise", SUMMARY, summary(grid))]
    if any(runs[0].cell.shared is not Shared.NOTHING for runs in grid):
        parts.append(("Peers with a network in common", SPECIAL, special(grid)))
    if markdown:
        for title, headings, rows in parts:
            print(f"### {title}\n\n{as_markdown(headings, rows)}\n")
        print(f"{LEGEND[0].upper()}{LEGEND[1:]}.")
        return
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    for title, headings, rows in parts:
        console.print(as_table(title, headings, rows), "")
    console.print(LEGEND)


def simulate(cells: Sequence[Cell], numbers: Sequence[int], jobs: int) -> list[Runs]:
    """Every cell with every seed."""
    tasks = [(cell, seed) for cell in cells for seed in numbers]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        done = pool.map(run, *zip(*tasks, strict=True), chunksize=4)
        quiet = not sys.stderr.isatty()
        shown = track(done, "simulating", len(tasks), console=Console(stderr=True), disable=quiet)
        return grouped(shown)


def main() -> int:
    """Run the grid; 0 when every cell is as the oracle says."""
    parser = argparse.ArgumentParser(prog="tools.nat_grid", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="1-3", help="1-3, or 7")
    parser.add_argument("--only", default="", metavar="TEXT", help="cells whose name contains this")
    parser.add_argument("--draw", action="store_true", help="draw the datagrams of these cells, with the first seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cells at a time")
    parser.add_argument("--json", metavar="FILE", help="write the outcome of every run here")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    options = parser.parse_args()
    cells = [cell for cell in all_cells() if options.only in str(cell)]
    numbers = list(seeds(options.seeds))
    if not cells:
        parser.error(f"no cell's name contains {options.only!r}")
    if options.draw:
        for outcome in map(partial(run, seed=numbers[0], draw=True), cells):
            print(f"\n{outcome.cell}\n\n{outcome.diagram}")
        return 0
    grid = simulate(cells, numbers, options.jobs)
    show(grid, markdown=options.markdown)
    if options.json:
        rows = [asdict(one) | {"cell": str(one.cell), "verdict": one.verdict.value} for runs in grid for one in runs]
        Path(options.json).write_text(json.dumps(rows, indent=1))
    found = problems(grid)
    print(f"\n{len(found)} not as the oracle says" if found else "\neverything as the oracle says", *found, sep="\n  ")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
