"""A machine that slept is told so, by clocks that we move."""

from __future__ import annotations

import asyncio
import os
import select

from p2pvpn.host.sleep import TICK_S, SleepWatch, boottime_timer


class Clocks:
    """Of a machine that has been up for a while."""

    def __init__(self) -> None:
        self.boottime, self.monotonic, self.wall = 1000.0, 900.0, 1.7e9
        self.told: list[float] = []

    def watch(self) -> SleepWatch:
        return SleepWatch(
            self.told.append,
            boottime=lambda: self.boottime,
            monotonic=lambda: self.monotonic,
            wall=lambda: self.wall,
        )

    def run(self, seconds: float) -> None:
        self.boottime += seconds
        self.monotonic += seconds
        self.wall += seconds

    def sleep(self, seconds: float) -> None:
        self.boottime += seconds
        self.wall += seconds


def watched(*steps: tuple[str, float]) -> list[float]:
    clocks = Clocks()

    async def story() -> None:
        watch = clocks.watch()
        for kind, seconds in steps:
            if kind == "set":
                clocks.wall += seconds
            elif kind == "stop":
                clocks.run(seconds)
            elif kind == "sleep":
                clocks.sleep(seconds)
            for _ in range(int(seconds / TICK_S) if kind == "run" else 1):
                if kind == "run":
                    clocks.run(TICK_S)
                watch.look()
        watch.close()

    asyncio.run(story())
    return clocks.told


def test_a_sleep_is_told_once_with_its_length() -> None:
    assert watched(("run", 100.0), ("sleep", 28800.0), ("run", 5.0), ("sleep", 60.0)) == [28800.0, 60.0]


def test_time_that_passes_and_a_clock_that_is_corrected_are_no_sleep() -> None:
    assert watched(("run", 1e4), ("set", 3.0), ("stop", 6.0), ("set", -5000.0), ("sleep", 0.5)) == []


def test_a_virtual_machine_that_was_stopped_has_slept() -> None:
    assert watched(("set", 600.0)) == [600.0]


def test_a_process_that_was_stopped_has_slept() -> None:
    assert watched(("run", 10.0), ("stop", 62.0), ("run", 10.0)) == [60.0]


def test_the_timer_of_the_boot_time_clock_goes_off() -> None:
    fd = boottime_timer(1)
    ready, _, _ = select.select([fd], [], [], 5.0)
    os.close(fd)
    assert ready == [fd]
