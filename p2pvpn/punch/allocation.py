"""Which outer ports a NAT gives to new mappings, judged from a few of them in order of time (RFC 4787 section 4.2).

    outer ports 4500, ...         the inner port is among them     preserving
    outer ports 31007, 31008 ...  each a small step on             sequential
    outer ports 5120, 48311 ...   anything else                    random

Others behind the same NAT take ports too, so steps vary; the smallest one seen is the allocator's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from .behaviour import Allocation

MAX_STEP = 64
"""Ports between two mappings of ours, made within seconds, of a sequential allocator that others use too."""
MIN_RANDOM = 3
"""Mappings before a lack of pattern means something: two far apart may be a busy sequential allocator's."""
PORTS = 65536


@dataclass(frozen=True, slots=True)
class Sample:
    """A new mapping: our port, and what the NAT made of it."""

    inner: int
    outer: int


def judge(samples: Sequence[Sample]) -> tuple[Allocation, int]:
    """The pattern of mappings in order of their making, and the step of a sequential one; else 0."""
    if not samples:
        return Allocation.UNKNOWN, 0
    if any(sample.outer == sample.inner for sample in samples):
        return Allocation.PRESERVING, 0
    steps = [(two.outer - one.outer + PORTS // 2) % PORTS - PORTS // 2 for one, two in itertools.pairwise(samples)]
    for sign in (1, -1):
        small = [sign * step for step in steps if 0 < sign * step <= MAX_STEP]
        # A range that starts over, or one packet that was overtaken, is one step that does not fit.
        if small and len(small) >= len(steps) - len(steps) // 3:
            return Allocation.SEQUENTIAL, sign * min(small)
    return (Allocation.RANDOM, 0) if len(samples) >= MIN_RANDOM else (Allocation.UNKNOWN, 0)
