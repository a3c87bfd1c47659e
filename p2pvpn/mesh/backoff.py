"""Pauses between attempts: doubling, capped, jittered, and short again when something changed."""

from __future__ import annotations

from p2pvpn.core.ports import Entropy


class Backoff:
    """`next_pause` grows from `first_s` to `max_s`; the jitter keeps peers that failed together apart."""

    def __init__(self, first_s: float, max_s: float, entropy: Entropy) -> None:
        self._first_s = first_s
        self._max_s = max_s
        self._entropy = entropy
        self._failures = 0

    def reset(self) -> None:
        self._failures = 0

    def next_pause(self) -> float:
        """Seconds to wait now, between half and the whole of the current step."""
        step = min(self._max_s, self._first_s * 2.0 ** min(self._failures, 20))
        self._failures += 1
        return step * (0.5 + self._entropy(1)[0] / 510)
