"""The two windows of 1 of an IKE SA (RFC 7296 sections 2.1 to 2.3).

Our requests: one is under way, the others wait in a bounded queue; it is sent again, byte by byte the same, until it is
answered. The peer's requests: the one that must come next, and the stored answer to the last one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from p2pvpn.core.address import Path
from p2pvpn.core.errors import LocalError
from p2pvpn.core.limits import TokenBucket

if TYPE_CHECKING:
    from .tasks.task import Task

MAX_RESENDS_PER_S = 5.0
"""Stored answers sent again, per SA: a replayed old request must not make us an amplifier."""


@dataclass(slots=True)
class Outstanding:
    """A request under way: its packets, where they go, how often they were sent and how often they may be."""

    task: Task
    message_id: int
    packets: tuple[bytes, ...]
    path: Path
    limit: int
    sent: int = 0


class Requests:
    """Our requests."""

    __slots__ = ("_max", "_queue", "next_id", "outstanding")

    def __init__(self, queue_max: int) -> None:
        self.next_id = 0
        self.outstanding: Outstanding | None = None
        self._queue: deque[Task] = deque()
        self._max = queue_max

    def add(self, task: Task) -> None:
        """Behind the others. Raises LocalError when the queue is full."""
        if len(self._queue) >= self._max:
            raise LocalError("too many requests wait for the peer's answer")
        self._queue.append(task)

    def add_first(self, task: Task) -> None:
        """Before the others; for tasks of which there is only ever one."""
        self._queue.appendleft(task)

    def take(self) -> Task | None:
        """The next task, when the window is free."""
        if self.outstanding is not None or not self._queue:
            return None
        return self._queue.popleft()

    def has(self, kind: type[Task]) -> bool:
        """Whether such a task waits (one that is under way does not count)."""
        return any(isinstance(task, kind) for task in self._queue)

    @property
    def is_idle(self) -> bool:
        return self.outstanding is None and not self._queue

    def clear_queue(self) -> None:
        self._queue.clear()

    def interval(self, retry_s: float, factor: float) -> float:
        """Seconds until the next retransmission of the request under way."""
        sent = self.outstanding.sent if self.outstanding is not None else 1
        return retry_s * factor ** (sent - 1)


class Answers:
    """The peer's requests."""

    __slots__ = ("_bucket", "_exchange", "expected_id", "stored")

    def __init__(self) -> None:
        self.expected_id = 0
        self.stored: tuple[bytes, ...] = ()
        self._exchange = 0
        self._bucket = TokenBucket(MAX_RESENDS_PER_S, 2 * MAX_RESENDS_PER_S)

    def store(self, exchange: int, packets: tuple[bytes, ...]) -> None:
        """The answer to the expected request."""
        self._exchange = exchange
        self.stored = packets
        self.expected_id += 1

    def is_last(self, exchange: int, message_id: int) -> bool:
        """Whether a request with this exchange and number is the one answered last."""
        return (exchange, message_id) == (self._exchange, self.expected_id - 1)

    def again(self, now: float, check: Callable[[], bool]) -> tuple[bytes, ...]:
        """The stored answer, when `check` finds the repeated request genuine and it was not repeated too often."""
        return self.stored if check() and self._bucket.take(now) else ()
