"""Our user plane and other VPNs between two hosts, in alternation: `python -m tools.bench --help`.

Each round sets every subject up anew and measures TCP by one and by four connections, packets of 64 bytes, and the
round trip of a ping. Machines are noisy: trust the ratio within a round, measured minutes apart at most, not the
absolute numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from p2pvpn.core.errors import LocalError
from p2pvpn.lab.namespace import fork_into_lab
from p2pvpn.lab.net import Lab, Node, running

from .subjects import SUBJECTS, Tunnel, wire

REFERENCE = "nebula"
TARGET = 0.7
"""The least that our throughput by one TCP connection may be of the reference's."""
STREAMS = (1, 4)
SMALL_BYTES = 64
SESSION_NICE = "-15"
PINGS = 100
PING_INTERVAL_S = 0.01


@dataclass(frozen=True)
class Result:
    """One run: gigabits a second received, CPU seconds of both tunnel processes for each gigabit, thousands of small
    packets a second received, median ping in ms, and the machine's load average at the start."""

    round: int
    subject: str
    tcp1_gbps: float
    tcp4_gbps: float
    cpu_s_per_gb: float
    small_kpps: float
    ping_ms: float
    load: float


COLUMNS: tuple[tuple[str, str, Callable[[Result], float]], ...] = (
    ("TCP x1 Gbit/s", "{:.2f}", lambda result: result.tcp1_gbps),
    ("TCP x4 Gbit/s", "{:.2f}", lambda result: result.tcp4_gbps),
    ("CPU-s/Gbit", "{:.2f}", lambda result: result.cpu_s_per_gb),
    ("64 B kpps", "{:.0f}", lambda result: result.small_kpps),
    ("ping ms", "{:.3f}", lambda result: result.ping_ms),
)


def measure(number: int, subject: str, seconds: float, congestion: str) -> Result:
    """Set a tunnel up, load it, take it down."""
    load = os.getloadavg()[0]
    with Lab() as lab:
        one, other = wire(lab)
        with SUBJECTS[subject](one, other) as tunnel:
            times = one.ping(tunnel.target, count=PINGS, interval_s=PING_INTERVAL_S)
            before = _cpu_s(tunnel)
            control = ["--congestion", congestion] if congestion else []
            tcp = [_tcp(one, other, tunnel.target, seconds, "--parallel", str(n), *control) for n in STREAMS]
            used = _cpu_s(tunnel) - before
            kpps = _small(one, other, tunnel.target, seconds)
    return Result(
        number,
        subject,
        *(gbps for gbps, _ in tcp),
        used / sum(gigabits for _, gigabits in tcp),
        kpps,
        statistics.median(times) if times else float("nan"),
        load,
    )


def _tcp(one: Node, other: Node, target: str, seconds: float, *options: str) -> tuple[float, float]:
    """Gigabits a second after the first one, and all gigabits that went through."""
    report = _iperf3(one, other, target, seconds, ["--omit", "1", *options])
    gbps = report["end"]["sum_received"]["bits_per_second"] / 1e9
    return gbps, gbps * (seconds + 1)


def _small(one: Node, other: Node, target: str, seconds: float) -> float:
    """Thousands of packets with 64 bytes of UDP payload that arrive in a second, of as many as can be sent."""
    report = _iperf3(one, other, target, seconds, ["--udp", "--bitrate", "0", "--length", str(SMALL_BYTES)])
    end = report["end"]["sum"]
    return (end["packets"] - end["lost_packets"]) / end["seconds"] / 1e3


def _iperf3(one: Node, other: Node, target: str, seconds: float, options: list[str]) -> Any:
    """The client's report of a run of iperf3(1)."""
    server = ["iperf3", "--server", "--one-off", "--forceflush"]
    client = ["iperf3", "--json", "--client", target, "--time", str(seconds), *options]
    with running(other.popen(server, stdout=subprocess.PIPE)) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "listening" in line:
                break
        return json.loads(one.run(client, timeout_s=seconds + 30).stdout)


def _cpu_s(tunnel: Tunnel) -> float:
    """CPU seconds that the tunnel's processes have used so far."""
    ticks = 0
    for pid in tunnel.pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def ratios(results: list[Result], subject: str, value: Callable[[Result], float]) -> list[float]:
    """A value of the subject over that of the reference, round by round."""
    reference = {result.round: value(result) for result in results if result.subject == REFERENCE}
    return [
        value(result) / reference[result.round]
        for result in results
        if result.subject == subject and reference.get(result.round)
    ]


def show(results: list[Result], subjects: list[str]) -> Table:
    """Per subject: medians, the ratio to the reference (median of the rounds), and TCP x1 of each round."""
    table = Table("subject", *(title for title, _, _ in COLUMNS), "TCP x1, each round")
    for subject in subjects:
        runs = [result for result in results if result.subject == subject]
        cells = []
        for _, form, value in COLUMNS:
            cell = form.format(statistics.median(map(value, runs)))
            ours = ratios(results, subject, value)
            if ours and subject != REFERENCE:
                cell += f" ({statistics.median(ours):.2f})"
            cells.append(cell)
        table.add_row(subject, *cells, " ".join(f"{run.tcp1_gbps:.2f}" for run in runs))
    table.caption = f"medians; in brackets the median ratio to {REFERENCE} of the same round"
    return table


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Meanwhile this session comes before the others of the machine, for every subject alike: where the kernel shares
    the CPUs out by session (autogroup), other work would be measured otherwise."""
    control = Path("/proc/self/autogroup")
    try:
        before = control.read_text().split()[-1]
        control.write_text(SESSION_NICE)
    except OSError:  # no autogroups, or not root
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            control.write_text(before)


def main() -> int:
    """Exit status 1 when the median ratio misses the target."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each subject (default 3)")
    parser.add_argument("--seconds", type=float, default=4, help="length of a run after one second of warming up")
    parser.add_argument("--congestion", default="", help="TCP congestion control, such as cubic (default the kernel's)")
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
        with undisturbed():
            results = [
                measure(number, subject, options.seconds, options.congestion)
                for number in range(options.rounds)
                for subject in (subjects if number % 2 == 0 else subjects[::-1])
            ]
    except LocalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Console(width=None if sys.stdout.isatty() else 160).print(show(results, subjects))
    ours = ratios(results, "p2pvpn", lambda result: result.tcp1_gbps)
    ratio = statistics.median(ours) if ours else None
    if options.json is not None:
        report = {
            "seconds": options.seconds,
            "congestion": options.congestion or Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
            "reference": REFERENCE,
            "target": TARGET,
            "ratio": ratio,
            "runs": [asdict(result) for result in results],
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if ratio is not None and ratio < TARGET else 0


if __name__ == "__main__":
    sys.exit(main())
