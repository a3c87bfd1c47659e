"""What a campaign simulates, as data drawn from a seed: who lives where, who talks with whom and when, what goes wrong.

Each peer's place and each pair's time stand for themselves, so that a plan without some of its peers or pairs is the
same world with these left out. That is how a failing plan is made small.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import combinations

from .internet import Quality
from .loop import seeded

MIX = {"port-restricted": 0.40, "restricted": 0.25, "full-cone": 0.15, "symmetric": 0.15, "none": 0.05}
"""Shares of the kinds of NAT that peers are behind; `none` is a public address."""
CARRIERS = ("port-restricted", "full-cone/no-hairpin", "restricted")
"""Carriers' own NATs, into whose networks some homes are put: double NAT."""
DOUBLE_NAT_SHARE = 0.10
"""Of the peers behind NATs, those whose home is in a carrier's network."""
SHARED_HOME_SHARE = 0.10
"""Of the peers behind NATs, those who live in the home of another peer."""
MUTUAL_SHARE = 0.05
"""Of the pairs, those in which both begin at the same moment."""

LINE = Quality(delay_s=0.011_75, jitter_s=0.001, loss=0.01, duplicate=0.002, reorder=0.002)
"""A peer's line. With the LAN and half of the jitter 12.5 ms one way, so 25 ms to a hub and back; loss each way."""
HUB_LINE = Quality()
"""All of the way's delay is on the peers' side."""
ROUND_TRIP_S = 0.050
"""From peer to peer and back, over a relay or directly."""


class Crash(Enum):
    """What becomes of the first hub in the middle of the campaign."""

    NONE = "none"
    DISK = "disk"
    """It crashes and restarts ten seconds later with what it had on its disk."""
    EMPTY = "empty"
    """The same, with an empty disk."""
    DEAD = "dead"
    """It never comes back."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """What goes wrong meanwhile. `churn` is the share of peers that crash and restart once; `cut_s` is how long the
    second hub is cut off from the other hubs and half of the peers."""

    crash: Crash = Crash.NONE
    churn: float = 0.0
    cut_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PeerPlan:
    """One peer. `home` names a router that it may share; `carrier` is the network that the home is in, or empty."""

    name: str
    nat: str
    home: str
    carrier: str = ""
    crash_at_s: float | None = None
    """Seconds after the talk begins."""


@dataclass(frozen=True, slots=True)
class PairPlan:
    """`caller` begins to talk to `callee` at `at_s` after the talk begins; if `mutual`, so does the callee."""

    caller: str
    callee: str
    at_s: float
    mutual: bool = False

    @property
    def names(self) -> tuple[str, str]:
        return self.caller, self.callee


@dataclass(frozen=True, slots=True)
class Plan:
    """One world and what happens in it."""

    seed: int
    hubs: int
    peers: tuple[PeerPlan, ...]
    pairs: tuple[PairPlan, ...]
    talk_s: float
    """All pairs begin within this time; a hub crashes in its middle, a partition begins after its first third."""
    line: Quality = LINE
    trouble: Trouble = field(default_factory=Trouble)

    def only(self, pairs: tuple[PairPlan, ...]) -> Plan:
        """The same world with these pairs alone; the other peers stay."""
        return replace(self, pairs=pairs)

    def without_bystanders(self) -> Plan:
        """Without the peers that are in no pair."""
        talking = {name for pair in self.pairs for name in pair.names}
        return replace(self, peers=tuple(peer for peer in self.peers if peer.name in talking))


def draw_plan(
    seed: int,
    *,
    peers: int = 200,
    hubs: int = 3,
    pairs: int = 1000,
    rate: float = 10.0,
    nat: str = "",
    line: Quality = LINE,
    trouble: Trouble = Trouble(),
) -> Plan:
    """A plan by the mix above, or with every peer behind a home of its own with this `nat`; `rate` is how many pairs
    begin in a second. Raises ValueError for too many pairs.
    """
    draw = seeded(seed, "plan")
    mix = {nat: 1.0} if nat else MIX
    kinds = [kind for kind, share in mix.items() for _ in range(round(share * peers))]
    kinds = (kinds + [next(iter(mix))] * peers)[:peers]
    draw.shuffle(kinds)
    possible = list(combinations(range(peers), 2))
    if pairs > len(possible):
        raise ValueError(f"{peers} peers make {len(possible)} pairs, not {pairs}")
    duration = pairs / rate
    crashing = set(draw.sample(range(peers), round(trouble.churn * peers)))
    people: list[PeerPlan] = []
    alike: dict[str, list[PeerPlan]] = {kind: [] for kind in mix}
    for number, kind in enumerate(kinds):
        name = f"peer{number + 1:03}"
        home, carrier = f"home{number + 1:03}", ""
        if kind == "none":
            home = ""
        elif nat:
            pass
        elif draw.random() < DOUBLE_NAT_SHARE:
            carrier = draw.choice(CARRIERS)
        elif alike[kind] and draw.random() < SHARED_HOME_SHARE:
            host = draw.choice(alike[kind])
            home, carrier = host.home, host.carrier
        crash_at = draw.uniform(0.0, duration) if number in crashing else None
        people.append(PeerPlan(name, kind, home, carrier, crash_at))
        alike[kind].append(people[-1])
    talks = []
    for one, other in draw.sample(possible, pairs):
        if draw.random() < 0.5:
            one, other = other, one
        mutual = draw.random() < MUTUAL_SHARE
        talks.append(PairPlan(people[one].name, people[other].name, round(draw.uniform(0.0, duration), 3), mutual))
    talks.sort(key=lambda pair: (pair.at_s, pair.names))
    return Plan(seed, hubs, tuple(people), tuple(talks), duration, line, trouble)
