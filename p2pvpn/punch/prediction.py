"""Which outer ports a NAT gives to sockets that it has not seen yet (RFC 4787 section 4.2.2), from a few that it gave.

    preserving   the inner port
    sequential   the last one and a step, or several steps where others open mappings in between
    random       nobody can tell

All samples are of fresh sockets, in the order of their first packets: a mapping that existed before says nothing about
the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .allocation import Sample, judge
from .behaviour import Allocation

FIRST_PORT, LAST_PORT = 1024, 65535
"""Where allocators choose (RFC 4787 REQ-3); a preserved port may lie below."""
MIN_SAMPLES = 3
"""Two random ports may look like a step."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the samples say; `confidence` is between 0 and 1: the share of samples, or of gaps, that fit exactly.

    `last` is the newest outer port.
    """

    allocation: Allocation
    confidence: float = 0.0
    step: int = 0
    last: int = 0

    @property
    def is_useful(self) -> bool:
        return self.allocation in (Allocation.PRESERVING, Allocation.SEQUENTIAL)

    def ports(self, inner: Sequence[int], spare: int = 0) -> tuple[int, ...]:
        """Outer ports of fresh sockets with these inner ports, in the order of their first packets; a sequential
        allocator may be `spare` turns further than that, as others open mappings too. Empty for a random one.
        """
        if self.allocation is Allocation.PRESERVING:
            return tuple(inner)
        if self.allocation is Allocation.SEQUENTIAL:
            return tuple(_wrapped(self.last + self.step * turn) for turn in range(1, len(inner) + spare + 1))
        return ()


def predict(samples: Sequence[Sample]) -> Prediction:
    """What a NAT with these samples does next."""
    if len(samples) < MIN_SAMPLES:
        return Prediction(Allocation.UNKNOWN)
    allocation, step = judge(samples)
    if allocation is Allocation.PRESERVING:
        kept = sum(sample.inner == sample.outer for sample in samples)
        return Prediction(allocation, kept / len(samples))
    if allocation is Allocation.SEQUENTIAL:
        gaps = [_wrapped(after.outer - before.outer + FIRST_PORT) - FIRST_PORT for before, after in pairwise(samples)]
        exact = gaps.count(_wrapped(step + FIRST_PORT) - FIRST_PORT)
        return Prediction(allocation, exact / len(gaps), step, samples[-1].outer)
    return Prediction(allocation)


def _wrapped(port: int) -> int:
    return FIRST_PORT + (port - FIRST_PORT) % (LAST_PORT - FIRST_PORT + 1)
