"""An SA that is up, and by which kind of path."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from enum import Enum

from p2pvpn.core.address import Path
from p2pvpn.punch.agent import PunchAgent
from p2pvpn.punch.candidates import CandidateKind

from .pump import Pump
from .relaying import RelayPath

APART_S, APART_MAX_S = 1.0, 60.0
"""A move takes a round trip or two; when the SA still is not on the chosen path after this, it is moved again, later
after twice as long."""


class PathKind(Enum):
    DIRECT = "direct"
    MAPPED = "mapped"
    """Direct, by a port that a router forwards to one of the two."""
    RELAYED = "relayed"


FORWARDED = (CandidateKind.MAPPED, CandidateKind.DECLARED)


@dataclass(slots=True, eq=False)
class LiveSa:
    """An established IKE SA with its Child SA; `relay` is the relay at hand, the one it began on at first."""

    id: int
    child_id: int
    initiator: bool
    established_at: float
    path: Path
    relayed: bool = False
    relay: RelayPath | None = None
    agent: PunchAgent | None = None
    pump: Pump | None = None
    replaced: bool = False
    move_reason: str = ""
    apart_until: float | None = None
    """The SA is not on the path that was chosen, and is moved again then."""
    apart_s: float = APART_S
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    """A move ended, well or not."""
    suspected_at: float = -math.inf
    alive: asyncio.Event = field(default_factory=asyncio.Event)
    """The peer was heard since the path was doubted."""
