"""Guessing the port of an endpoint-dependent NAT: many sockets on one side, many probes of the other.

    hard side   s sockets, a check from each to the easy side's address:   opens s ports of n = 64,512 that nobody knows
    easy side   p checks to random distinct ports of the hard side's address:  meets one with 1 - (1 - s/n)^p

With s = 256 that is 64 % after 256 probes, 98.2 % after 1,024. Where the allocator can be predicted (`prediction`) a
few sockets and the ports predicted do. Every packet is an ordinary authenticated check of the session's agent, so a hit
is a pair that the agent learns from the check that came, checks back, and nominates by its own rules.

So that this is no weapon: nothing goes to an address unless two hubs say that the peer's tunnel comes from there; 1,024
probes and 256 openings are the most that a run has, at 100 a second and only what ordinary checks leave of the
machine's rate; an address gets three runs in ten minutes, whoever asks; the caller holds them to one at a time for the
machine and backs off (`RunBackoff`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.errors import LocalError
from p2pvpn.core.output import Event, Output
from p2pvpn.core.ports import Entropy

from .agent import PunchAgent
from .limits import PunchLimits
from .pair import PairState
from .prediction import FIRST_PORT, LAST_PORT

SOCKETS = 256
"""Of a run on the hard side: beyond, the probes saved cost more in openings."""
PROBES = 1024
"""Of a run on the easy side: 98.2 % in 10.8 s; twice as many would add 1.8 %."""
INTERVAL_S = 0.0105
"""Between two packets of a run: 95 a second, and ordinary checks have the rest of 100."""
HUBS_NEEDED = 2
"""Hubs that say where the peer's tunnel comes from: one alone could aim everybody at a victim."""
REPLY_PACKETS = 8
"""What a far end may get beyond its earnings once a run is on: a round of checks, so that one lost packet costs no hit.
"""
HIT_WAIT_S = 0.1
"""Between looks whether what hit becomes a path; nothing is sent meanwhile."""
AFTER_S = 1.0
"""For the answers to the last packets."""
BACKOFF_S = (60.0, 300.0, 1800.0)
"""Between runs that failed; the last one repeats."""
BUSY_S = 5.0
"""Until a peer is asked again that was busy."""


@dataclass(frozen=True, slots=True)
class VolleyReached(Event):
    """The packet that was asked about is out: so many were sent."""

    sent: int


@dataclass(frozen=True, slots=True)
class VolleyEnded(Event):
    """Everything is out and had its time to be answered, or the agent has a path."""

    met: bool


class Volley:
    """Checks along these paths, one after the other, at the pace of a run; all to addresses that two hubs attest.

    Says VolleyReached after `tell_at` packets. Raises LocalError for an address that is not attested so, or that had
    its runs. Times are monotonic seconds.
    """

    def __init__(
        self, agent: PunchAgent, paths: Sequence[Path], limits: PunchLimits, now: float, *, tell_at: int = 0
    ) -> None:
        hosts = {path.remote.host for path in paths}
        for host in hosts:
            if agent.outbox.attesting_hubs(host) < HUBS_NEEDED:
                raise LocalError(f"fewer than {HUBS_NEEDED} hubs attest {host}")
        if len(hosts) != 1 or len(paths) > max(SOCKETS, PROBES):
            raise LocalError("a run has one address and a bounded number of packets")
        self._host = hosts.pop()
        if not limits.take_run(self._host, now):
            raise LocalError(f"{self._host} had its runs")
        self._agent = agent
        self._paths = tuple(paths)
        self._limits = limits
        self._tell_at = tell_at
        self._began_at = now
        self._next_at: float | None = now
        self.sent = 0
        agent.outbox.earn(paths[0].remote, now, REPLY_PACKETS)

    def next_deadline(self) -> float | None:
        return self._next_at

    def tick(self, now: float) -> list[Output]:
        """Send what is due."""
        if self._next_at is None or now < self._next_at:
            return []
        if self._agent.selected is not None:
            self._next_at = None
            return [VolleyEnded(met=True)]
        if self._has_hit():
            self._next_at = now + HIT_WAIT_S
            return []
        if self.sent == len(self._paths):
            self._next_at = None
            return [VolleyEnded(met=False)]
        if not self._limits.take_spare(now):
            self._next_at = now + INTERVAL_S
            return []
        outputs: list[Output] = [self._agent.outbox.stray_check(self._paths[self.sent])]
        self.sent += 1
        self._next_at = max(now, self._next_at + INTERVAL_S)
        if self.sent == len(self._paths):
            self._next_at = now + AFTER_S
        if self.sent == self._tell_at:
            outputs.append(VolleyReached(self.sent))
        return outputs

    def _has_hit(self) -> bool:
        """Whether a check came from the address by a way that no candidate names, and its pair may become a path."""
        return any(
            not pair.signalled
            and pair.path.remote.host == self._host
            and (pair.last_check_in_at or 0.0) >= self._began_at
            for pair in self._agent.checks.within(PairState.CHECKING, PairState.VALID)
        )


def openings(host: str, ports: Sequence[int], target: Endpoint) -> list[Path]:
    """From each of our extra sockets to the easy side."""
    return [Path(Endpoint(host, port), target) for port in ports]


def meetings(host: str, ports: Sequence[int], far_host: str, far_ports: Sequence[int], rounds: int) -> list[Path]:
    """From the first of our sockets to the first of the peer's ports, and so on; again as often as `rounds` says."""
    pairs = [Path(Endpoint(host, near), Endpoint(far_host, far)) for near, far in zip(ports, far_ports, strict=False)]
    return pairs * rounds


def guesses(local: Endpoint, host: str, predicted: Sequence[int], entropy: Entropy) -> list[Path]:
    """To these ports of the hard side, or to random distinct ones where none are predicted."""
    return [Path(local, Endpoint(host, port)) for port in predicted or draw_ports(PROBES, entropy)]


def draw_ports(count: int, entropy: Entropy) -> list[int]:
    """Distinct ports of those that allocators choose from, in random order."""
    span = LAST_PORT - FIRST_PORT + 1
    drawn: dict[int, None] = {}
    while len(drawn) < count:
        for at in range(0, len(raw := entropy(4 * count)), 4):
            drawn[FIRST_PORT + int.from_bytes(raw[at : at + 4], "big") % span] = None
    return list(drawn)[:count]


class RunBackoff:
    """When the next run may begin. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._failures = 0
        self._not_before = 0.0

    def allows(self, now: float) -> bool:
        return now >= self._not_before

    def failed(self, now: float) -> None:
        self._not_before = now + BACKOFF_S[min(self._failures, len(BACKOFF_S) - 1)]
        self._failures += 1

    def busy(self, now: float) -> None:
        """No fault of the peer's NAT: soon again."""
        self._not_before = now + BUSY_S

    def reset(self) -> None:
        """A network changed, or a run met."""
        self._failures = 0
        self._not_before = 0.0
