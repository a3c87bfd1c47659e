"""The kernel drops ESP of SPIs that are not ours before it takes room in the socket's queue (classic BPF).

Without it a flood of garbage fills the queue that honest packets share, and each of its datagrams wakes the worker.
Nobody who does not see our packets knows one of our SPIs: they are random numbers of 30 bits.

    new SPI        the filter is taken off at once: packets may follow right behind the answer to the command
    SETTLE_S later a program for the SPIs as they are then is attached

The program is a binary search over the sorted SPIs, four instructions for each at most. Above MAX_SPIS there is none:
the kernel takes 4,096 instructions, and the worker refuses unknown SPIs by itself in any case. Of datagrams that the
kernel has joined (UDP_GRO) it sees the first: whoever forges a peer's address and port can so cost packets, as by any
flood, and nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
import time
from collections.abc import Callable, Collection, Sequence

MAX_SPIS = 1000
SETTLE_S = 0.2
"""Installing a thousand SAs in a row builds a program a few times, not a thousand times."""
_LEAF = 4
"""So many SPIs are compared one after the other."""
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
_SPI_AT = 8
"""A filter of a UDP socket sees the UDP header first."""
_LOAD_WORD, _IF_EQUAL, _IF_AT_LEAST, _JUMP, _RETURN = 0x20, 0x15, 0x35, 0x05, 0x06
_ALL, _NOTHING = 0xFFFFFFFF, 0
_INSTRUCTION = struct.Struct("=HBBI")

Instruction = tuple[int, int, int, int]
"""Code, jump if true, jump if false, operand."""


def program(spis: Collection[int]) -> list[Instruction]:
    """Passes datagrams whose first word is one of these; shorter ones end the program with nothing."""
    return [(_LOAD_WORD, 0, 0, _SPI_AT), *_search(sorted(spis))]


def _search(spis: Sequence[int]) -> list[Instruction]:
    if len(spis) <= _LEAF:
        compared = [one for spi in spis for one in ((_IF_EQUAL, 0, 1, spi), (_RETURN, 0, 0, _ALL))]
        return [*compared, (_RETURN, 0, 0, _NOTHING)]
    middle = len(spis) // 2
    below, rest = _search(spis[:middle]), _search(spis[middle:])
    return [(_IF_AT_LEAST, 0, 1, spis[middle]), (_JUMP, 0, 0, len(below)), *below, *rest]


class SpiFilter:
    """Of the ESP sockets of one worker."""

    def __init__(self, sockets: Sequence[socket.socket], clock: Callable[[], float] = time.monotonic) -> None:
        self._sockets = list(sockets)
        self._clock = clock
        self._is_attached = False
        self._settle_at: float | None = clock()

    def changed(self, *, added: bool) -> None:
        """An SPI came (before anybody is told so) or went."""
        if added and self._is_attached:
            for sock in self._sockets:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
            self._is_attached = False
        if self._settle_at is None:
            self._settle_at = self._clock() + SETTLE_S

    def add(self, sock: socket.socket) -> None:
        """One more socket, open to all SPIs until the next program."""
        self._sockets.append(sock)
        self.changed(added=False)

    def remove(self, sock: socket.socket) -> None:
        self._sockets.remove(sock)

    def wait_s(self) -> float | None:
        """Until `settle` has something to do; None for ever."""
        return None if self._settle_at is None else max(0.0, self._settle_at - self._clock())

    def settle(self, spis: Collection[int]) -> None:
        """When it is time: attach a program for these SPIs, unless there are too many or the kernel has no room."""
        if self._settle_at is None or self._clock() < self._settle_at:
            return
        self._settle_at = None
        if len(spis) > MAX_SPIS:
            self.changed(added=True)
            self._settle_at = None
            return
        lines = program(spis)
        code = ctypes.create_string_buffer(b"".join(_INSTRUCTION.pack(*line) for line in lines))
        option = struct.pack("@HP", len(lines), ctypes.addressof(code))
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, option)
        self._is_attached = True
