"""Notices that the machine slept: a laptop whose lid was closed, a process or a virtual machine that was stopped.

Nobody tells us when the network is the same as before. But the wall clock went on while the monotonic one stood still
(CLOCK_MONOTONIC does not count a suspend), or both went on and our timers are late. Whatever NATs, hubs and peers knew
of us may be gone then, so it is as if the network had changed. A wall clock that is set costs the same few packets.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from p2pvpn.core.ports import WallClock

log = logging.getLogger(__name__)

TICK_S = 2.0
"""Between looks at the clocks: a sleep is noticed so soon after its end."""
SLEPT_S = 10.0
"""Less than the shortest life of a NAT's binding, and more than a busy machine is ever late."""


async def watch_clocks(wall: WallClock, woke: Callable[[], None]) -> None:
    """Call `woke` after each sleep, until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        ticks, date = loop.time(), wall()
        await asyncio.sleep(TICK_S)
        passed_s = loop.time() - ticks
        slept_s = max(passed_s - TICK_S, wall() - date - passed_s)
        if slept_s > SLEPT_S:
            log.info("the machine slept for %.0f s", slept_s)
            woke()
