"""How long to wait for an answer before asking again: a retransmission time per destination, after RFC 6298."""

from __future__ import annotations

START_RTO_S = 0.15
"""Before anything is known; most paths to a hub are below this, and one spare datagram costs little."""
MIN_RTO_S = 0.03
MAX_RTO_S = 1.0
BACKOFF = 1.5
"""Gentler than TCP's 2: a question or answer is one small packet, and seven tries fit into three seconds."""


class RoundTrip:
    """The estimate for one destination; `silent` while its last request went unanswered."""

    __slots__ = ("_smoothed", "_variation", "silent")

    def __init__(self) -> None:
        self._smoothed: float | None = None
        self._variation = 0.0
        self.silent = False

    def sample(self, seconds: float) -> None:
        """A measured round trip (RFC 6298 section 2)."""
        seconds = max(seconds, 0.0)
        if self._smoothed is None:
            self._smoothed, self._variation = seconds, seconds / 2
            return
        self._variation += (abs(self._smoothed - seconds) - self._variation) / 4
        self._smoothed += (seconds - self._smoothed) / 8

    @property
    def rto_s(self) -> float:
        """Seconds to wait for the answer to a first transmission."""
        if self._smoothed is None:
            return START_RTO_S
        return min(MAX_RTO_S, max(MIN_RTO_S, self._smoothed + 4 * self._variation))
