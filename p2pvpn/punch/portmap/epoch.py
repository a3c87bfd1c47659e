"""Whether a router lost its mappings since it was last heard: its epoch time says (RFC 6887 section 8.5)."""

from __future__ import annotations

SLACK_S = 2.0
"""Of both clocks together; one sixteenth of the elapsed time comes on top."""


class EpochClock:
    """The epoch times of one router."""

    def __init__(self) -> None:
        self._last: tuple[float, int] | None = None

    def take(self, epoch_s: int, now: float) -> bool:
        """Take the epoch time of an answer; False when the router's clock did not run like ours since the last one."""
        last, self._last = self._last, (now, epoch_s)
        if last is None:
            return True
        ours, theirs = now - last[0], epoch_s - last[1]
        if theirs < -1:
            return False
        return ours + SLACK_S >= theirs - theirs / 16 and theirs + SLACK_S >= ours - ours / 16
