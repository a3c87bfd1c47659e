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
import errno
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

from .net import Node

MARKER_BYTES = 16
LAYOUT = struct.Struct("!16sId")
PACKET_BYTES = 200
SOCKET_BYTES = 8 << 20
DRAIN_S = 1.0
"""Longer than any packet is on its way."""
BURST_PACKETS = 64
"""Sent at once at most after having had no CPU, so that a late sender is not a flood."""


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


def main(arguments: list[str]) -> None:
    local, remote, port, rate, marker_hex, file = arguments[:6]
    answer = "--answer" in arguments
    marker, interval = bytes.fromhex(marker_hex), 1 / float(rate)
    family = socket.AF_INET6 if ":" in local else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    for option in (32, 33):  # SO_SNDBUFFORCE, SO_RCVBUFFORCE
        with contextlib.suppress(PermissionError):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BYTES)
    sock.setblocking(False)
    sock.bind((local, int(port)))
    target = (remote, int(port))
    sent: list[float] = []
    arrived: list[tuple[int, float]] = []
    armed = sending = False
    due = 0.0
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        wait = max(0.0, due - time.monotonic()) if sending else None
        readable, _, _ = select.select([sock.fileno(), 0], [], [], wait)
        if sock.fileno() in readable:
            with contextlib.suppress(BlockingIOError):
                while True:
                    try:
                        data = sock.recv(2048)
                    except OSError as error:
                        if error.errno in (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH):
                            continue  # what ICMP says of an earlier packet
                        raise
                    at = time.time()
                    if len(data) >= LAYOUT.size:
                        arrived.append((LAYOUT.unpack_from(data)[1], at))
                        if armed and answer and not sending:
                            sending, due = True, time.monotonic()
        if 0 in readable:
            words = os.read(0, 4096).decode().split() or ["report"]  # at the end of input too
            if "go" in words:
                armed, sending, due = True, not answer, time.monotonic()
            if "stop" in words:
                armed = sending = False
            if "report" in words:
                break
        burst = 0
        while sending and due <= time.monotonic() and burst < BURST_PACKETS:
            at = time.time()
            packet = LAYOUT.pack(marker, len(sent), at)
            sent.append(at)
            with contextlib.suppress(OSError):  # refused by the kernel: counts as sent and lost
                sock.sendto(packet.ljust(PACKET_BYTES, b"."), target)
            due += interval
            burst += 1
    Path(file).write_text(json.dumps({"sent": sent, "arrived": arrived}))
    sys.stdout.write("done\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
