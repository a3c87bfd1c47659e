"""A delay line: an Ethernet link of fixed latency in user space, for kernels without netem.

Both ends are TAP devices, made in the namespaces that the link joins; one process carries frames between them:

    node's TAP --read--> queue of (due, frame) --write--> other node's TAP      and the same the other way

Every frame waits the same time, so each queue is first in, first out, and its head holds the next deadline: nothing is
lost and nothing overtakes. TAP devices have no offloads, so frames are whole and their checksums complete.

    python -m p2pvpn.lab.delay FD FD SECONDS      inherited TAP descriptors, one-way delay
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF = 0x400454CA
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
FRAME_BYTES = 65536
"""More than any frame of a device with an MTU of 1500."""
BURST_FRAMES = 64
"""Frames read from one end before the other end and the deadlines get their turn."""
QUEUE_FRAMES = 20000
"""Frames that the kernel holds for us while we have no CPU: a second at 20,000 packets a second."""


def open_tap(name: str) -> int:
    """Make a TAP device in the namespace of the calling thread; its non-blocking descriptor. Raises OSError."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    except OSError:
        os.close(fd)
        raise
    return fd


def carry(one: int, other: int, delay_s: float) -> None:
    """Carry frames between two TAP descriptors until one of them goes away."""
    to_other: deque[tuple[float, bytes]] = deque()
    to_one: deque[tuple[float, bytes]] = deque()
    lines = ((one, other, to_other), (other, one, to_one))
    ends = [one, other]
    read, write, clock = os.read, os.write, time.monotonic
    while True:
        dues = [queue[0][0] for _, _, queue in lines if queue]
        wait = max(0.0, min(dues) - clock()) if dues else None
        readable, _, _ = select.select(ends, (), (), wait)
        for source, target, queue in lines:
            if source in readable:
                with contextlib.suppress(BlockingIOError):
                    for _ in range(BURST_FRAMES):
                        queue.append((clock() + delay_s, read(source, FRAME_BYTES)))
            now = clock()
            while queue and queue[0][0] <= now:
                with contextlib.suppress(OSError):  # the far device is down: the cable is out
                    write(target, queue[0][1])
                queue.popleft()


def main(arguments: list[str]) -> None:
    one, other, delay_s = int(arguments[0]), int(arguments[1]), float(arguments[2])
    gc.disable()  # nothing here makes cycles
    with contextlib.suppress(OSError):
        os.nice(-10)  # the wire does not wait for its users; not granted to the unprivileged
    with contextlib.suppress(KeyboardInterrupt):
        carry(one, other, delay_s)


if __name__ == "__main__":
    main(sys.argv[1:])
