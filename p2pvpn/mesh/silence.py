"""Judges an SA by its counters alone: does the flow look as if the path had died?

    unanswered   several packets went out and nothing came in since the first of them
    stopped      a flow that came in steadily stops, though nobody went silent by choice, perhaps

Either is a doubt: the path is checked, which costs a packet or two. As long as checks say that the path works and still
nothing comes in (a stream that nobody answers), the next doubt takes twice as long; anything that comes in, and any
change of path, makes it short again.
"""

from __future__ import annotations

from enum import Enum

from .ports import SaUsage

BUSY_S = 1.5
"""A session is watched closely for so long after its last packet."""
STEADY_PACKETS, STEADY_S = 5, 1.0
"""So many packets came in within so long: when that stops, it is worth a check."""
UNANSWERED_PACKETS = 2
"""One packet may want no answer."""
MAX_PATIENCE_S = 5.0
"""What a stream that nobody answers costs at least: one check in this time."""


class Doubt(Enum):
    UNANSWERED = "nothing comes back"
    STOPPED = "what came in steadily has stopped"


class Silence:
    """One SA's counters over time. `patience_s` is the shortest silence that is suspicious."""

    def __init__(self, patience_s: float, now: float) -> None:
        self._base_s = patience_s
        self._patience_s = patience_s
        self._before = SaUsage()
        self._waiting_since: float | None = None
        self._sent_then = 0
        self._steady_since = now
        self._steady_from = 0
        self._is_steady = False
        self.is_busy = False
        self.doubts = 0
        """In a row, since anything came in or the path changed."""

    def reset(self) -> None:
        """Another path: old silence says nothing about it."""
        self._patience_s = self._base_s
        self._waiting_since = None
        self._is_steady = False
        self.doubts = 0

    def look(self, usage: SaUsage, rtt_s: float | None, now: float) -> Doubt | None:
        """Take new counters. `rtt_s` is the path's round trip, if it is known."""
        before, self._before = self._before, usage
        came, went = usage.packets_in > before.packets_in, usage.packets_out > before.packets_out
        self.is_busy = now - max(usage.last_in_at, usage.last_out_at) < BUSY_S
        if came:
            self._waiting_since = None
            self._patience_s = self._base_s
            self.doubts = 0
        if went and self._waiting_since is None and usage.last_out_at > usage.last_in_at:
            self._waiting_since = usage.last_out_at if came else min(usage.last_out_at, now)
            self._sent_then = before.packets_out
        self._note_steadiness(usage, now)
        patience_s = max(self._patience_s, 2.0 * (rtt_s or 0.0))
        if (
            self._waiting_since is not None
            and now - self._waiting_since >= patience_s
            and usage.packets_out - self._sent_then >= UNANSWERED_PACKETS
        ):
            self._waiting_since = None
            return self._doubt(Doubt.UNANSWERED)
        if self._is_steady and now - usage.last_in_at >= patience_s:
            self._is_steady = False
            return self._doubt(Doubt.STOPPED)
        return None

    def _doubt(self, doubt: Doubt) -> Doubt:
        self.doubts += 1
        self._patience_s = min(MAX_PATIENCE_S, 2.0 * self._patience_s)
        return doubt

    def _note_steadiness(self, usage: SaUsage, now: float) -> None:
        if usage.packets_in - self._steady_from >= STEADY_PACKETS:
            self._is_steady = True
        if now - self._steady_since >= STEADY_S:
            self._steady_since = now
            self._steady_from = usage.packets_in
