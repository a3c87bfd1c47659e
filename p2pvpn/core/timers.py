"""A deadline per timer name; machines keep one table each and callbacks nowhere."""

from __future__ import annotations

from enum import Enum
from typing import Generic, TypeVar

K = TypeVar("K", bound=Enum)


class TimerTable(Generic[K]):
    """Named deadlines in monotonic seconds."""

    __slots__ = ("_deadlines",)

    def __init__(self) -> None:
        self._deadlines: dict[K, float] = {}

    def set(self, timer: K, at: float) -> None:
        self._deadlines[timer] = at

    def clear(self, timer: K) -> None:
        self._deadlines.pop(timer, None)

    def clear_all(self) -> None:
        self._deadlines.clear()

    def at(self, timer: K) -> float | None:
        return self._deadlines.get(timer)

    def next_deadline(self) -> float | None:
        return min(self._deadlines.values(), default=None)

    def pop_due(self, now: float) -> list[K]:
        """The timers that are due, earliest first; each is cleared."""
        due = sorted((at, timer.name, timer) for timer, at in self._deadlines.items() if at <= now)
        for _, _, timer in due:
            del self._deadlines[timer]
        return [timer for _, _, timer in due]
