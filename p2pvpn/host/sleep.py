"""Notices that the machine was suspended: the monotonic clock stood still while the boot-time clock went on.

    CLOCK_BOOTTIME - CLOCK_MONOTONIC     how long the machine has slept since it booted
    CLOCK_REALTIME - CLOCK_MONOTONIC     jumps as well when a virtual machine was stopped: it has no other clock
    how late this look comes             where every clock ran on: this process alone was stopped

A timer of CLOCK_BOOTTIME that came due during the sleep fires at the moment of waking, so nothing has to look often.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import struct
import time
from collections.abc import Callable

from p2pvpn.core.errors import LocalError

TICK_S = 2
"""Between looks while the machine is awake; a shorter sleep is nothing."""
LEAST_S = 2.0
"""Sleeps below this are not told."""
LEAST_JUMP_S = 10.0
"""The same for the wall clock, which is also set by hand and by NTP, and for lateness: more than a busy machine's."""

_TFD_NONBLOCK, _TFD_CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC
_ITIMERSPEC = struct.Struct("@qqqq")


class SleepWatch:
    """Calls `on_resume` with the seconds slept. `boottime`, `monotonic` and `wall` are clocks in seconds."""

    def __init__(
        self,
        on_resume: Callable[[float], None],
        *,
        boottime: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._on_resume = on_resume
        self._boottime, self._monotonic, self._wall = boottime, monotonic, wall
        self._slept_s, self._offset_s = self._offsets()
        self._looked_at = monotonic()
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._fd: int | None = None
        try:
            self._fd = boottime_timer(TICK_S)
        except LocalError:
            self._wait()  # notices up to a tick later
        else:
            self._loop.add_reader(self._fd, self._fired)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._fd is not None:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = None

    def look(self) -> None:
        """Compare the clocks now."""
        slept_s, offset_s = self._offsets()
        nap_s, jump_s = slept_s - self._slept_s, offset_s - self._offset_s
        self._slept_s, self._offset_s = slept_s, offset_s
        late_s = self._monotonic() - self._looked_at - TICK_S
        self._looked_at += late_s + TICK_S
        if nap_s >= LEAST_S:
            self._on_resume(nap_s)
        elif max(jump_s, late_s) >= LEAST_JUMP_S:
            self._on_resume(max(jump_s, late_s))

    def _offsets(self) -> tuple[float, float]:
        now = self._monotonic()
        return self._boottime() - now, self._wall() - now

    def _fired(self) -> None:
        if self._fd is not None:
            with contextlib.suppress(OSError):
                os.read(self._fd, 8)
        self.look()

    def _wait(self) -> None:
        self._timer = self._loop.call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self.look()
        self._wait()


def boottime_timer(period_s: int) -> int:
    """A descriptor that can be read every `period_s` of CLOCK_BOOTTIME. Raises LocalError where there is none."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.timerfd_create(time.CLOCK_BOOTTIME, _TFD_NONBLOCK | _TFD_CLOEXEC)
    if fd < 0:
        raise LocalError(f"timerfd_create: {os.strerror(ctypes.get_errno())}")
    spec = _ITIMERSPEC.pack(period_s, 0, period_s, 0)
    if libc.timerfd_settime(fd, 0, spec, None) < 0:
        os.close(fd)
        raise LocalError(f"timerfd_settime: {os.strerror(ctypes.get_errno())}")
    return fd
