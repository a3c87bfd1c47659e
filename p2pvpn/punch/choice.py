"""Which working path is the chosen one, and when another takes its place: by score, with hysteresis.

On the controlling side `next` says whom to nominate: the best path once the first success had its round trip to be
beaten, a clearly better one later, and one that answers when the chosen one does not. The controlled side takes what
the peer nominates.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from p2pvpn.core.timers import TimerTable

from .pair import Pair
from .settings import PunchSettings


class ChoiceTimer(Enum):
    SETTLE = "the first success had its time to be beaten"
    HOLD = "the chosen path was kept long enough to be replaced by a better one"


class Choice:
    """`selected` is the chosen pair. Times are monotonic seconds."""

    def __init__(self, settings: PunchSettings) -> None:
        self.selected: Pair | None = None
        self._settings = settings
        self._timers: TimerTable[ChoiceTimer] = TimerTable()
        self._settled = False
        self._held = False

    def next_deadline(self) -> float | None:
        return self._timers.next_deadline()

    def tick(self, now: float) -> None:
        for timer in self._timers.pop_due(now):
            if timer is ChoiceTimer.SETTLE:
                self._settled = True
            else:
                self._held = False

    def take(self, pair: Pair, now: float) -> None:
        """This pair is chosen."""
        self.drop()
        self.selected = pair
        self._held = True
        self._timers.set(ChoiceTimer.HOLD, now + self._settings.hold_s)

    def drop(self) -> None:
        """Nothing is chosen any more."""
        self.selected = None
        self._settled = self._held = False
        self._timers.clear_all()

    def next(self, valid: Sequence[Pair], *, pending: bool, now: float) -> Pair | None:
        """Whom the controlling side should nominate now (RFC 8445 section 8.1.1).

        `valid` are the working pairs, best priority first; `pending` is whether others are still being checked.
        """
        if not valid:
            return None
        best = min(valid, key=lambda pair: pair.score)
        if self.selected is None:
            if self._settled or not pending:
                return best
            if self._timers.at(ChoiceTimer.SETTLE) is None:
                self._timers.set(ChoiceTimer.SETTLE, now + min(best.rtt_s or 0.0, self._settings.settle_s))
            return None
        if not self._held and best.samples >= 2 and self.is_beaten_by(best):
            return best
        if self.selected.misses < self._settings.move_misses:
            return None
        doubt_at = self.selected.doubt_at
        return next((pair for pair in self.spares(valid) if (pair.last_answer_at or 0.0) > doubt_at), None)

    def is_beaten_by(self, pair: Pair) -> bool:
        """Whether a pair is better than the chosen one by enough to move."""
        if self.selected is None or pair is self.selected:
            return False
        score = self.selected.score
        return pair.score < score - max(self._settings.gain_s, self._settings.gain * score)

    def spares(self, valid: Sequence[Pair]) -> list[Pair]:
        """Working pairs that are not chosen, best first."""
        return sorted((pair for pair in valid if pair is not self.selected), key=lambda pair: pair.score)
