"""IKE fragmentation (RFC 7383): cutting what is too large, and putting pieces together.

A piece counts only after it was decrypted, so nobody but the peer (or whoever shares a Diffie-Hellman secret with us)
can fill a set. There is one set per direction: that of the one message that may come next.
"""

from __future__ import annotations

from p2pvpn.core.errors import WireError

from .protect import Opened

MAX_FRAGMENTS = 64
"""Windows sends up to 29; 64 hold every message below the byte limit even at 576-byte datagrams."""
MIN_PIECE_BYTES = 64
"""Keeps a mistaken fragment size from making thousands of pieces."""


def split(chain: bytes, piece_bytes: int) -> list[bytes]:
    """The chain in pieces of at most that size."""
    size = max(MIN_PIECE_BYTES, piece_bytes)
    return [chain[at : at + size] for at in range(0, len(chain), size)]


class Reassembly:
    """The pieces of one message so far."""

    __slots__ = ("_bytes", "_first", "_message_id", "_pieces", "_total", "max_bytes")

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._message_id = -1
        self._clear(0)

    def _clear(self, total: int) -> None:
        self._total = total
        self._pieces: dict[int, bytes] = {}
        self._first = 0
        self._bytes = 0

    @property
    def held_bytes(self) -> int:
        return self._bytes

    def add_untrusted(self, message_id: int, opened: Opened) -> Opened | None:
        """The whole message when `opened` was the last piece missing, else None. Raises WireError, and keeps the set.

        A larger total replaces the set, a smaller one is passed over, and of two pieces with one number the first
        counts (RFC 7383 section 2.6).
        """
        number, total = opened.number, opened.total
        if not 1 <= number <= total <= MAX_FRAGMENTS:
            raise WireError(f"fragment {number} of {total}")
        if message_id != self._message_id or total > self._total:
            self._message_id = message_id
            self._clear(total)
        if total < self._total or number in self._pieces:
            return None
        if self._bytes + len(opened.plain) > self.max_bytes:
            self._clear(0)
            raise WireError("a fragmented message that is too large")
        self._pieces[number] = opened.plain
        self._bytes += len(opened.plain)
        if number == 1:
            self._first = opened.first
        if len(self._pieces) < total:
            return None
        whole = Opened(self._first, b"".join(self._pieces[at] for at in range(1, total + 1)))
        self._clear(0)
        return whole
