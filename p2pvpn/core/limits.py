"""Bounds on what strangers can make us remember or do."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class TokenBucket:
    """`rate` tokens a second, `burst` at most; `now` in monotonic seconds."""

    __slots__ = ("_at", "_level", "burst", "rate")

    def __init__(self, rate: float, burst: float) -> None:
        self.rate = rate
        self.burst = burst
        self._level = burst
        self._at: float | None = None

    def has(self, now: float, tokens: float = 1.0) -> bool:
        """Whether `tokens` could be had; nothing is taken."""
        if self._at is not None and now > self._at:
            self._level = min(self.burst, self._level + (now - self._at) * self.rate)
        self._at = now if self._at is None else max(now, self._at)
        return self._level >= tokens

    def take(self, now: float, tokens: float = 1.0) -> bool:
        """Whether `tokens` could be had; they are gone then."""
        if not self.has(now, tokens):
            return False
        self._level -= tokens
        return True


class BoundedTable(Generic[K, V]):
    """A mapping with at most `limit` entries; the least recently used one leaves first.

    `on_evict` is told of each entry that leaves for want of room.
    """

    __slots__ = ("_entries", "limit", "on_evict")

    def __init__(self, limit: int, on_evict: Callable[[K, V], None] | None = None) -> None:
        if limit < 1:
            raise ValueError("a table holds at least one entry")
        self._entries: OrderedDict[K, V] = OrderedDict()
        self.limit = limit
        self.on_evict = on_evict

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[K]:
        return iter(list(self._entries))

    def get(self, key: K) -> V | None:
        """The entry, which is now the most recently used, or None."""
        try:
            self._entries.move_to_end(key)
        except KeyError:
            return None
        return self._entries[key]

    def peek(self, key: K) -> V | None:
        return self._entries.get(key)

    def put(self, key: K, value: V) -> None:
        self._entries[key] = value
        self._entries.move_to_end(key)
        while len(self._entries) > self.limit:
            old_key, old_value = self._entries.popitem(last=False)
            if self.on_evict is not None:
                self.on_evict(old_key, old_value)

    def pop(self, key: K) -> V | None:
        return self._entries.pop(key, None)

    def items(self) -> list[tuple[K, V]]:
        return list(self._entries.items())


class SourceLimiter(Generic[K]):
    """A token bucket per source, for at most `sources` sources."""

    __slots__ = ("_buckets", "burst", "rate")

    def __init__(self, rate: float, burst: float, sources: int) -> None:
        self.rate = rate
        self.burst = burst
        self._buckets: BoundedTable[K, TokenBucket] = BoundedTable(sources)

    def take(self, source: K, now: float, tokens: float = 1.0) -> bool:
        bucket = self._buckets.get(source)
        if bucket is None:
            bucket = TokenBucket(self.rate, self.burst)
            self._buckets.put(source, bucket)
        return bucket.take(now, tokens)
