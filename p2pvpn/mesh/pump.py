"""Runs a sans-IO machine on the event loop: executes its outputs in order and wakes it at its deadlines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from p2pvpn.core.address import Path
from p2pvpn.core.output import Output, Transmit


class Machine(Protocol):
    """What every sans-IO machine offers to its driver."""

    def tick(self, now: float) -> Sequence[Output]: ...

    def next_deadline(self) -> float | None: ...


class Sender(Protocol):
    """Where a machine's packets go: the underlay, or a socket of its own."""

    def send(self, path: Path, data: bytes) -> None: ...


class Pump:
    """Drives one machine. `sink` gets every output that is not a Transmit, in its place in the order."""

    def __init__(self, machine: Machine, underlay: Sender, sink: Callable[[Output], None]) -> None:
        self._machine = machine
        self._underlay = underlay
        self._sink = sink
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def now(self) -> float:
        return self._loop.time()

    def feed(self, outputs: Sequence[Output]) -> None:
        """Execute what a call of the machine answered, then set the timer to the machine's next deadline."""
        for output in outputs:
            if isinstance(output, Transmit):
                self._underlay.send(output.path, output.data)
            else:
                self._sink(output)
        self._arm()

    def close(self) -> None:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self._machine.next_deadline()
        if deadline is not None and not self._closed:
            self._timer = self._loop.call_at(max(deadline, self._loop.time()), self._wake)

    def _wake(self) -> None:
        self._timer = None
        if not self._closed:
            self.feed(self._machine.tick(self._loop.time()))
