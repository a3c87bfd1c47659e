"""The clock and the entropy that machines are given."""

from __future__ import annotations

from typing import Protocol


class Entropy(Protocol):
    """A source of random bytes: the system's in production, a seeded one in simulations."""

    def __call__(self, count: int, /) -> bytes: ...


class WallClock(Protocol):
    """Seconds since the Unix epoch; only certificates, expiries and sequences look at it."""

    def __call__(self) -> float: ...
