"""What a punching agent says besides packets."""

from __future__ import annotations

from dataclasses import dataclass

from p2pvpn.core.address import Path
from p2pvpn.core.output import Event

from .candidates import CandidateKind


@dataclass(frozen=True, slots=True)
class PathNominated(Event):
    """This direct path works in both directions and is the chosen one from now on; said again for a better one.

    On the controlling side it means "move here"; on the controlled side that the peer chose it. `kind` is that of its
    worse end, `priority` the pair priority of RFC 8445 section 6.1.2.3.
    """

    path: Path
    kind: CandidateKind
    rtt_s: float
    priority: int


@dataclass(frozen=True, slots=True)
class PathSilent(Event):
    """The chosen path was in doubt, and a check of it was not answered in time. PathLost follows, or it answers."""

    path: Path


@dataclass(frozen=True, slots=True)
class PathLost(Event):
    """The chosen path does not work any more; another one, or it again, may be nominated later."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class PunchFailed(Event):
    """Every pair was checked and none works. The agent goes on trying by itself, with backoff and at each update."""

    reason: str
