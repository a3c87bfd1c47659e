"""What two hubs compare instead of their records: a tree of marks over the slots, kept up to date by each change.

A slot is a record's key and subject, 40 bytes. Its hexadecimal digits lead from the root (`""`) to one of 4,096 leaves;
each node's mark says how many slots are below it and the XOR of a hash of each slot with its sequence. Two hubs with
equal marks at the root have the same records; unequal ones are followed down, 16 children at a time.
"""

from __future__ import annotations

import hashlib

DEPTH = 3
"""Digits on the way to a leaf: 4,096 leaves keep a leaf of 200,000 records at about 50."""
CHILDREN = "0123456789abcdef"
MARK_BYTES = 12
"""4 bytes of count, 8 bytes of XOR."""

EMPTY_MARK = bytes(MARK_BYTES)


class DigestTree:
    """Marks over a set of (slot, sequence)."""

    __slots__ = ("_marks",)

    def __init__(self) -> None:
        self._marks: dict[str, tuple[int, int]] = {}

    def add(self, slot: bytes, sequence: int) -> None:
        self._change(slot, sequence, 1)

    def remove(self, slot: bytes, sequence: int) -> None:
        """The exact inverse of `add`."""
        self._change(slot, sequence, -1)

    def mark(self, prefix: str) -> bytes:
        """The mark of one node, MARK_BYTES."""
        count, value = self._marks.get(prefix, (0, 0))
        return count.to_bytes(4, "big") + value.to_bytes(8, "big")

    def children(self, prefix: str) -> list[bytes]:
        """The marks of a node's 16 children."""
        return [self.mark(prefix + digit) for digit in CHILDREN]

    def count(self, prefix: str) -> int:
        """How many slots are below a node."""
        return self._marks.get(prefix, (0, 0))[0]

    def _change(self, slot: bytes, sequence: int, by: int) -> None:
        digest = hashlib.sha256(slot + sequence.to_bytes(8, "big")).digest()
        own = int.from_bytes(digest[:8], "big")
        path = slot[: (DEPTH + 1) // 2].hex()
        for depth in range(DEPTH + 1):
            count, value = self._marks.get(path[:depth], (0, 0))
            if count + by:
                self._marks[path[:depth]] = (count + by, value ^ own)
            else:
                del self._marks[path[:depth]]
