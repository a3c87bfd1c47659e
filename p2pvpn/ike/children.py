"""The Child SAs of one IKE SA: which there are, which replaces which, and which only receive what is still in flight.

A Child SA that was replaced keeps receiving for a while after both sides turned to its successor: packets sent before
the change may arrive after it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from p2pvpn.core.child import ChildSa

CONFIRMED_S = 5.0
"""Whoever has no answer asks again within that time."""
MAX_RETIRED = 32
"""Replaced Child SAs that still receive; the oldest makes room."""


class Children:
    """`live` by id. `successor` leads from a Child SA to the one that the peer made in its place, not used yet.

    `closing` are those that our DELETE is about. `unconfirmed` are those that we answered for, until the peer's next
    request shows that it knows them, or it has not asked again for a while (`answered_at` is when it did last).
    """

    __slots__ = ("_retired", "answered_at", "closing", "live", "successor", "unconfirmed")

    def __init__(self) -> None:
        self.live: dict[int, ChildSa] = {}
        self.successor: dict[int, int] = {}
        self.closing: set[int] = set()
        self.unconfirmed: set[int] = set()
        self.answered_at = 0.0
        self._retired: deque[tuple[float, int]] = deque()

    def __iter__(self) -> Iterator[int]:
        return iter(self.live)

    def __len__(self) -> int:
        return len(self.live)

    def get(self, child_id: int) -> ChildSa | None:
        return self.live.get(child_id)

    def add(self, child: ChildSa) -> None:
        self.live[child.id] = child

    def by_outbound(self, spi: bytes) -> ChildSa | None:
        """The one that the peer names by its inbound SPI."""
        return next((one for one in self.live.values() if one.spi_out.to_bytes(4, "big") == spi), None)

    def may_be_unknown(self, child_id: int, now: float) -> bool:
        """Whether the peer may still wait for the answer that makes it."""
        return child_id in self.unconfirmed and now - self.answered_at < CONFIRMED_S

    def forget(self, child_id: int) -> None:
        """It is no longer one of ours."""
        self.live.pop(child_id, None)
        self.closing.discard(child_id)
        self.unconfirmed.discard(child_id)
        self.successor.pop(child_id, None)
        self.successor = {old: new for old, new in self.successor.items() if new != child_id}

    def retire(self, child_id: int, at: float) -> list[int]:
        """It only receives, until `at`. Those that have to make room for it."""
        self.forget(child_id)
        self._retired.append((at, child_id))
        return [self._retired.popleft()[1] for _ in range(len(self._retired) - MAX_RETIRED)]

    def next_deadline(self) -> float | None:
        return self._retired[0][0] if self._retired else None

    def pop_due(self, now: float) -> list[int]:
        """Those that have received for long enough."""
        due = []
        while self._retired and self._retired[0][0] <= now:
            due.append(self._retired.popleft()[1])
        return due

    def take_all(self) -> list[int]:
        """Every one that the plane knows; there are none afterwards."""
        known = [*self.live, *(child_id for _, child_id in self._retired)]
        self.__init__()  # type: ignore[misc]
        return known
