"""Rows: packets of one size with their padding, one behind the other, and checksums over all of them.

The Internet checksum (RFC 1071) does not care for the order of bytes as long as it is always the same, nor for how
many 16-bit words are added at once. So rows are summed as little-endian words of 32 bits, modulo 65535.
"""

from __future__ import annotations

import numpy as np

WORD = "<u4"
MODULUS = 65535


class Rows:
    """`count` rows of `size` bytes, a multiple of four, at the start of a buffer."""

    __slots__ = ("array", "count", "size", "views", "words")

    def __init__(self, buffer: bytearray, size: int, count: int) -> None:
        self.size = size
        self.count = count
        self.array = np.frombuffer(buffer, np.uint8, size * count).reshape(count, size)
        self.words = self.array.view(WORD)
        view = memoryview(buffer)
        self.views = [view[at : at + size] for at in range(0, size * count, size)]

    def field(self, at: int, kind: str) -> np.ndarray:
        """The field at offset `at` of all rows, of a numpy type."""
        return np.ndarray((self.count,), kind, self.array, at, (self.size,))


def little_sum(data: bytes) -> int:
    """The sum of bytes from an even offset on, as rows are summed; an odd last byte is followed by zero."""
    return int.from_bytes(data, "little") % MODULUS


def swapped(number: int) -> int:
    """A 16-bit number in network byte order as rows are summed."""
    return (number & 0xFF) << 8 | number >> 8
