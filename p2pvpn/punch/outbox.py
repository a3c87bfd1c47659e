"""What one agent sends: its checks, on whose account they go, and which answers are awaited.

An address that others leave silent is not this peer's fault where a hub attests that the peer's tunnel comes from
there: then the session's packets go on a count of their own (`PunchLimits`).
"""

from __future__ import annotations

from dataclasses import dataclass

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.limits import BoundedTable
from p2pvpn.core.output import Event, Output, Transmit

from .limits import PunchLimits
from .messages import Messages
from .pair import Pair

MAX_OUTSTANDING = 256
"""Checks whose answers are awaited; the oldest is forgotten first."""
MAX_ATTESTED = 4
"""Addresses of the peer that hubs attest: of both families, before and after a move."""


@dataclass(frozen=True, slots=True)
class SentCheck:
    """A check whose answer is awaited."""

    pair: Pair
    sent_at: float
    controlling: bool
    nominates: bool


class Outbox:
    """`take` gives what is to be done, in order. Times are monotonic seconds."""

    def __init__(self, messages: Messages, limits: PunchLimits) -> None:
        self._messages = messages
        self._limits = limits
        self._out: list[Output] = []
        self._awaited: BoundedTable[bytes, SentCheck] = BoundedTable(MAX_OUTSTANDING)
        self._attested: BoundedTable[str, frozenset[bytes]] = BoundedTable(MAX_ATTESTED)

    def say(self, event: Event) -> None:
        self._out.append(event)

    def send(self, path: Path, data: bytes) -> None:
        """An answer: it costs the address nothing but what it sent itself."""
        self._out.append(Transmit(path, data))

    def take(self) -> list[Output]:
        """Everything since the last call."""
        outputs, self._out = self._out, []
        return outputs

    # Checks.

    def check(self, pair: Pair, now: float, *, nominates: bool) -> None:
        """One check of a pair."""
        transaction, data = self._messages.check(pair.local, nominates=nominates)
        self._awaited.put(transaction, SentCheck(pair, now, self._messages.controlling, nominates))
        pair.checks_sent += 1
        pair.last_sent_at = now
        self._out.append(Transmit(pair.path, data))

    def stray_check(self, path: Path) -> Transmit:
        """A check of a path that is no pair and becomes one if the peer's own check comes back: nobody waits for the
        answer."""
        return Transmit(path, self._messages.check(path.local, nominates=False)[1])

    def awaited(self, transaction: bytes) -> SentCheck | None:
        return self._awaited.peek(transaction)

    def settle(self, transaction: bytes) -> None:
        """The answer came."""
        self._awaited.pop(transaction)

    # Whose account.

    def attest(self, host: str, hub: bytes) -> None:
        """A hub says that the peer's tunnel comes from this address; `hub` names it, or nothing."""
        self._attested.put(host, (self._attested.peek(host) or frozenset()) | ({hub} if hub else frozenset()))

    def attesting_hubs(self, host: str) -> int:
        """How many hubs, known by name, say so."""
        return len(self._attested.peek(host) or ())

    def take_silent(self, pair: Pair, now: float) -> bool:
        """Whether the pair's far end may get one more packet while it stays silent."""
        remote, session = pair.path.remote, self._session(pair.path.remote)
        return self._limits.take_silent(remote, now, permitted=pair.permitted, session=session)

    def earn(self, remote: Endpoint, now: float, packets: int = 1) -> None:
        """It sent us an authenticated check, or so many packets to it are granted."""
        self._limits.earn(remote, now, session=self._session(remote), packets=packets)

    def answered(self, remote: Endpoint) -> None:
        """It answered: it is not silent."""
        self._limits.answered(remote, session=self._session(remote))

    def _session(self, remote: Endpoint) -> bytes:
        return self._messages.tag if remote.host in self._attested else b""
