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
    from .config import IkeSettings
    from .tasks.task import Task

MIN_EARLY_S, MARGIN_S = 0.1, 0.05
"""The first retransmission comes 1.5 round trips and a margin after the request, and not sooner than this."""
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
    sent_at: float = 0.0
    early: bool = False
    """Whether the retransmission comes that is not counted: soon after the answer is due."""
    graces: int = 0
    """How often its tries began anew, because the peer was heard meanwhile."""


class Requests:
    """Our requests."""

    __slots__ = ("_max", "_queue", "next_id", "outstanding", "rtt_s")

    def __init__(self, queue_max: int) -> None:
        self.next_id = 0
        self.outstanding: Outstanding | None = None
        self.rtt_s: float | None = None
        """Round trip of the last request that was answered without a retransmission, the peer's work included."""
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

    def inherit(self, former: Requests) -> None:
        """The queue and the round trip of the SA that this one follows."""
        self._queue.extend(task for task in former._queue if task.passes_on)
        former._queue.clear()
        self.rtt_s = former.rtt_s

    def clear_queue(self) -> None:
        self._queue.clear()

    def begin_wait(self, settings: IkeSettings, now: float) -> float:
        """A request was sent once more: seconds until its retransmission.

        Patience is counted in tries at long intervals. The first of them begins with one retransmission more, which is
        not counted: a lost packet costs about a round trip then.
        """
        waiting = self.outstanding
        assert waiting is not None
        interval_s = settings.retry_s * settings.retry_factor ** (waiting.sent - 1)
        waiting.sent_at = now
        early_s = settings.early_s if self.rtt_s is None else max(MIN_EARLY_S, 1.5 * self.rtt_s + MARGIN_S)
        waiting.early = waiting.sent == 1 and early_s < interval_s
        return early_s if waiting.early else interval_s

    def is_early(self, settings: IkeSettings) -> float | None:
        """The interval after a retransmission that is not counted, None when it is time for one that is."""
        waiting = self.outstanding
        if waiting is None or not waiting.early:
            return None
        waiting.early = False
        return settings.retry_s

    def answered(self, now: float) -> None:
        """The request under way has its answer: learn the round trip if it is clear which transmission it answers."""
        waiting = self.outstanding
        if waiting is not None and waiting.sent == 1 and waiting.early:
            self.rtt_s = now - waiting.sent_at


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
