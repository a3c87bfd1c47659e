"""Numbered packets both ways between two hosts, to see what a change of path costs: each one sent is found or missed.

A packet is a 16-byte marker of its direction, its number and the time it was sent; both ends run on one kernel, so one
clock times both. Each host has a process of its own, told what to do by lines on its standard input:

    python -m p2pvpn.lab.traffic LOCAL REMOTE PORT RATE MARKER FILE [--answer]
        go      start sending (with --answer: at the first packet from the other side)
        stop    stop sending, keep receiving
        report  write FILE, say `done`, end
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from p2pvpn.core.errors import LocalError

from . import uml
from .mmsg import Batch
from .net import Node

MARKER_BYTES = 16
LAYOUT = struct.Struct("!16sId")
PACKET_BYTES = 200
SOCKET_BYTES = 8 << 20
DRAIN_S = 1.0
"""Longer than any packet is on its way."""
BURST_PACKETS = 64
"""Sent at once at most after having had no CPU, so that a late sender is not a flood."""
TICK_S = 0.005
"""In User-Mode Linux, where waking up is dear, a fast generator sends and looks for arrivals this often."""


@dataclass(frozen=True, slots=True)
class Flow:
    """One direction: when each number was sent, and when it first came (seconds since the epoch)."""

    marker: bytes
    sent_at: list[float]
    arrived_at: dict[int, float]
    duplicates: int

    def lost(self, since: float = 0.0) -> list[int]:
        """Numbers sent since then that never came."""
        return [number for number, at in enumerate(self.sent_at) if at >= since and number not in self.arrived_at]

    def latency_ms(self, numbers: Container[int] | None = None) -> float | None:
        """Median one-way time of those numbers, or of all; None when none came."""
        times = [at - self.sent_at[n] for n, at in self.arrived_at.items() if numbers is None or n in numbers]
        return statistics.median(times) * 1000 if times else None

    def longest_gap_s(self) -> float:
        """The longest time between two arrivals."""
        times = sorted(self.arrived_at.values())
        return max((later - earlier for earlier, later in itertools.pairwise(times)), default=0.0)


class Traffic:
    """Two processes, ready to send at `rate` packets a second each; then the two flows, one's first."""

    def __init__(
        self,
        ends: tuple[tuple[Node, str], tuple[Node, str]],
        directory: Path,
        *,
        rate: float = 200.0,
        port: int = 7018,
        mark: bytes = b"",
        answer: bool = False,
    ) -> None:
        """`ends` are the hosts and their addresses; `mark` begins the markers; with `answer` the second end waits."""
        self._files = [directory / f"traffic-{port}-{node}.json" for node, _ in ends]
        self.markers = [(mark + os.urandom(MARKER_BYTES))[:MARKER_BYTES] for _ in ends]
        self._processes = []
        for index, (node, address) in enumerate(ends):
            argv = [sys.executable, "-m", __name__, address, ends[1 - index][1], str(port), str(rate)]
            argv += [self.markers[index].hex(), str(self._files[index]), *(["--answer"] if answer and index else [])]
            self._processes.append(node.popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        self._expect("ready")

    def go(self) -> None:
        self._tell("go")

    def stop(self, drain_s: float = DRAIN_S) -> tuple[Flow, Flow]:
        """Stop sending, wait for what is on its way, and count. Raises LocalError when a process died."""
        self._tell("stop")
        time.sleep(drain_s)
        self._tell("report")
        self._expect("done")
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        one, other = (json.loads(file.read_text()) for file in self._files)
        return _flow(self.markers[0], one, other), _flow(self.markers[1], other, one)

    def _tell(self, word: str) -> None:
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(word + "\n")
                process.stdin.flush()

    def _expect(self, word: str) -> None:
        for process in self._processes:
            assert process.stdout is not None
            if process.stdout.readline() != word + "\n":
                raise LocalError(f"a traffic process died before it said {word!r}")


def _flow(marker: bytes, sender: dict[str, list[float]], receiver: dict[str, list[list[float]]]) -> Flow:
    arrived: dict[int, float] = {}
    for number, at in receiver["arrived"]:
        arrived.setdefault(int(number), at)
    return Flow(marker, sender["sent"], arrived, len(receiver["arrived"]) - len(arrived))


class _Ends:
    """The socket of one process, and what went out and came in by it."""

    def __init__(self, local: str, remote: str, port: int, marker: bytes) -> None:
        family = socket.AF_INET6 if ":" in local else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_DGRAM)
        for option in (32, 33):  # SO_SNDBUFFORCE, SO_RCVBUFFORCE
            with contextlib.suppress(PermissionError):
                self.sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BYTES)
        self.sock.setblocking(False)
        self.sock.bind((local, port))
        self.sent: list[float] = []
        self.arrived: list[tuple[int, float]] = []
        self._batch = Batch(self.sock, (remote, port), BURST_PACKETS, PACKET_BYTES)
        self._marker = marker

    def receive(self) -> bool:
        """Take what waits; whether anything came."""
        before = len(self.arrived)
        while True:
            try:
                came = self._batch.receive()
            except BlockingIOError:
                break
            at = time.time()
            self.arrived += [(LAYOUT.unpack_from(data)[1], at) for data in came if len(data) >= LAYOUT.size]
            if len(came) < BURST_PACKETS:
                break
        return len(self.arrived) > before

    def send(self, count: int) -> None:
        """The next packets. Those that the kernel refuses count as sent and lost."""
        at, first = time.time(), len(self.sent)
        packets = [LAYOUT.pack(self._marker, first + number, at).ljust(PACKET_BYTES, b".") for number in range(count)]
        self.sent += [at] * count
        while packets:
            taken = 1
            with contextlib.suppress(OSError):
                taken = self._batch.send(packets)
            del packets[:taken]


def main(arguments: list[str]) -> None:
    local, remote, port, rate, marker_hex, file = arguments[:6]
    answer = "--answer" in arguments
    interval = 1 / float(rate)
    tick = TICK_S if uml.is_inside() and interval < TICK_S else 0.0
    ends = _Ends(local, remote, int(port), bytes.fromhex(marker_hex))
    armed = sending = False
    due = 0.0
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        wait = max(0.0, due - time.monotonic(), tick) if sending else None
        watched = [0] if sending and tick else [0, ends.sock.fileno()]
        readable, _, _ = select.select(watched, [], [], wait)
        if ends.receive() and armed and answer and not sending:
            sending, due = True, time.monotonic()
        if 0 in readable:
            words = os.read(0, 4096).decode().split() or ["report"]  # at the end of input too
            if "go" in words:
                armed, sending, due = True, not answer, time.monotonic()
            if "stop" in words:
                armed = sending = False
            if "report" in words:
                break
        if sending:
            count = min(int((time.monotonic() - due) / interval) + 1, BURST_PACKETS)
            if count > 0:
                ends.send(count)
                due += count * interval
    Path(file).write_text(json.dumps({"sent": ends.sent, "arrived": ends.arrived}))
    sys.stdout.write("done\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
