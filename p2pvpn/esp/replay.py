"""The anti-replay window of an inbound SA (RFC 4303 section 3.4.3) and the 64-bit numbers behind it (appendix A2).

    ... too old | top - WINDOW + 1 ............................ top | not seen yet ...
                  bits: one per number, newest lowest |<-- run -->|

Packets mostly come in order. For them `run`, the count of numbers up to `top` that came without a gap, grows by one and
nothing else happens; it is folded into the integer `bits` when a number comes out of order.

Use: `sequence = window.whole(low)`, then `fresh(sequence)`, then the ICV, and only then `accept(sequence)`.
"""

from __future__ import annotations

WINDOW = 4096
"""Numbers remembered. A gigabit of 1,400-byte packets reordered by 40 ms of difference between paths needs 3,600."""
_MASK = (1 << WINDOW) - 1
_WRAP = 1 << 32


class ReplayWindow:
    """Which sequence numbers came. Without ESN they are 32 bits and never wrap."""

    __slots__ = ("_bits", "_esn", "_run", "top")

    def __init__(self, *, esn: bool, top: int = 0) -> None:
        """`top` is the highest number that counts as seen already; a new SA has seen 0."""
        self._esn = esn
        self._bits = _MASK
        self._run = 0
        self.top = top

    def whole(self, low: int) -> int:
        """The 64-bit number that the 32 bits on the wire stand for; below 1 when there is none (appendix A2.2)."""
        if not self._esn:
            return low
        # The one number with these low bits that is not below the window's left edge.
        edge = self.top - WINDOW + 1
        return edge + (low - edge) % _WRAP

    def fresh(self, sequence: int) -> bool:
        """Whether the number is in or above the window and did not come before. Number 0 is never sent."""
        behind = self.top - sequence
        if behind < 0:
            return True
        if sequence < 1 or behind >= WINDOW or behind < self._run:
            return False
        return not self._bits >> (behind - self._run) & 1

    def accept(self, sequence: int) -> bool:
        """Mark a fresh, authenticated number as seen. True when it is the newest of all."""
        ahead = sequence - self.top
        if ahead == 1:
            self.top = sequence
            self._run += 1
            return True
        if self._run:
            run = min(self._run, WINDOW)
            self._bits = (self._bits << run | (1 << run) - 1) & _MASK
            self._run = 0
        if ahead > 0:
            self._bits = (self._bits << ahead | 1) & _MASK if ahead < WINDOW else 1
            self.top = sequence
            return True
        self._bits |= 1 << -ahead
        return False

    def accept_run(self, first: int, count: int) -> None:
        """Mark `count` consecutive authenticated numbers from `first`, which is above `top`, as seen."""
        self.accept(first)
        self._run += count - 1
        self.top += count - 1
