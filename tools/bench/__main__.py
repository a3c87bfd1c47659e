"""TCP throughput between two hosts over our user plane and over nebula, in alternation: `python -m tools.bench --help`.

Machines are noisy: trust the ratio within a round, measured minutes apart at most, not the absolute numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from p2pvpn.core.errors import LocalError
from p2pvpn.lab.namespace import fork_into_lab
from p2pvpn.lab.net import Lab, Node, running

from .subjects import SUBJECTS, Tunnel, wire

REFERENCE = "nebula"
TARGET = 0.7
"""The least that our throughput may be of the reference's."""


@dataclass(frozen=True)
class Result:
    """One run: gigabits a second received, CPU seconds of both tunnel processes for each gigabit, median ping in ms."""

    round: int
    subject: str
    gbps: float
    cpu_s_per_gb: float
    ping_ms: float


def measure(number: int, subject: str, seconds: float, streams: int) -> Result:
    """Set a tunnel up, load it, take it down."""
    with Lab() as lab:
        one, other = wire(lab)
        with SUBJECTS[subject](one, other) as tunnel:
            times = one.ping(tunnel.target, count=20, interval_s=0.01)
            before = _cpu_s(tunnel)
            gbps, gigabits = _iperf3(one, other, tunnel.target, seconds, streams)
            used = _cpu_s(tunnel) - before
    return Result(number, subject, gbps, used / gigabits, statistics.median(times) if times else float("nan"))


def _iperf3(one: Node, other: Node, target: str, seconds: float, streams: int) -> tuple[float, float]:
    """Gigabits a second after the first one, and all gigabits that went through."""
    server = ["iperf3", "--server", "--one-off", "--forceflush"]
    client = ["iperf3", "--json", "--client", target, "--time", str(seconds), "--omit", "1", "--parallel", str(streams)]
    with running(other.popen(server, stdout=subprocess.PIPE)) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "listening" in line:
                break
        report = json.loads(one.run(client, timeout_s=seconds + 20).stdout)
    gbps = report["end"]["sum_received"]["bits_per_second"] / 1e9
    return gbps, gbps * (seconds + 1)


def _cpu_s(tunnel: Tunnel) -> float:
    """CPU seconds that the tunnel's processes have used so far."""
    ticks = 0
    for pid in tunnel.pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def ratios(results: list[Result], subject: str) -> list[float]:
    """Throughput of the subject over that of the reference, round by round."""
    reference = {result.round: result.gbps for result in results if result.subject == REFERENCE}
    return [
        result.gbps / reference[result.round]
        for result in results
        if result.subject == subject and result.round in reference
    ]


def show(results: list[Result], subjects: list[str]) -> Table:
    """Medians, and the ratio to the reference."""
    table = Table("subject", "Gbit/s, median", "each round", "CPU-s/Gbit", "ping ms", f"ratio to {REFERENCE}")
    for subject in subjects:
        runs = [result for result in results if result.subject == subject]
        ours = ratios(results, subject)
        table.add_row(
            subject,
            f"{statistics.median(run.gbps for run in runs):.2f}",
            " ".join(f"{run.gbps:.2f}" for run in runs),
            f"{statistics.median(run.cpu_s_per_gb for run in runs):.2f}",
            f"{statistics.median(run.ping_ms for run in runs):.3f}",
            f"{statistics.median(ours):.2f}" if ours else "-",
        )
    return table


def main() -> int:
    """Exit status 1 when the median ratio misses the target."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each subject (default 3)")
    parser.add_argument("--seconds", type=float, default=4, help="length of a run after one second of warming up")
    parser.add_argument("--streams", type=int, default=1, help="parallel TCP connections")
    parser.add_argument("--subjects", default="p2pvpn,nebula", help=f"of {', '.join(SUBJECTS)}, with commas between")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args()
    subjects = options.subjects.split(",")
    if not set(subjects) <= set(SUBJECTS):
        parser.error(f"subjects are {', '.join(SUBJECTS)}")
    try:
        status = fork_into_lab()
        if status is not None:
            return status
        results = [
            measure(number, subject, options.seconds, options.streams)
            for number in range(options.rounds)
            for subject in (subjects if number % 2 == 0 else subjects[::-1])
        ]
    except LocalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Console().print(show(results, subjects))
    ours = ratios(results, "p2pvpn")
    ratio = statistics.median(ours) if ours else None
    if options.json is not None:
        report = {
            "streams": options.streams,
            "seconds": options.seconds,
            "reference": REFERENCE,
            "target": TARGET,
            "ratio": ratio,
            "runs": [asdict(result) for result in results],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if ratio is not None and ratio < TARGET else 0


if __name__ == "__main__":
    sys.exit(main())
