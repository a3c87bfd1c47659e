"""A simulated life as data drawn from a seed: who lives where, who talks with whom and when, what happens to whom.

Peers move between homes, cafes, offices and mobile networks, sleep and wake elsewhere, lose their link, crash; their
routers restart, get another address or another firmware. Hubs restart, one, two or all at once; the network falls apart
in places. In the end there is a time of calm, after which everything has to be as it should.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from enum import Enum

from .loop import seeded
from .plan import DOUBLE_NAT_SHARE, MIX

CALM_S = 120.0
"""Nothing goes wrong at the end for so long."""
QUIET_S = 20.0
"""Nor in the beginning."""
PAUSE_S = 200.0
"""Between two things that happen to a peer, on average."""
TALK_S, SILENT_S = (60.0, 400.0), (20.0, 500.0)
"""How long a pair talks and is silent; silence may be longer than the engine keeps an idle peer."""
HUB_PAUSE_S = 150.0
"""Between two troubles with hubs, on average."""
PEERS_PER_PLACE = 8
"""One public place for so many peers."""
REPLACEMENTS = ("port-restricted", "symmetric", "full-cone")
TIMEOUTS_S = (30.0, 60.0, 120.0, 300.0)
"""Of NATs' mappings."""


class What(Enum):
    """Things that happen to a peer, to its router, or to hubs."""

    MOVE = "moves"
    SLEEP = "sleeps"
    OFFLINE = "loses its link"
    CRASH = "crashes"
    FLUSH = "router restarts"
    RENUMBER = "router gets another address"
    REPLACE = "router becomes another"
    HUB = "hub restarts"
    HUBS = "two hubs restart"
    ALL_HUBS = "all hubs restart"
    CUT_HUB = "hub is cut off"
    CUT_PEERS = "half of the peers are cut off from the other half"


SHARES = {
    What.MOVE: 0.35,
    What.SLEEP: 0.25,
    What.OFFLINE: 0.10,
    What.CRASH: 0.08,
    What.FLUSH: 0.10,
    What.RENUMBER: 0.06,
    What.REPLACE: 0.06,
}
HUB_SHARES = {What.HUB: 0.4, What.HUBS: 0.15, What.ALL_HUBS: 0.05, What.CUT_HUB: 0.25, What.CUT_PEERS: 0.15}


@dataclass(frozen=True, slots=True)
class Site:
    """A network that peers can be in: `nat` and `carrier` by name, `none` for public addresses."""

    name: str
    nat: str
    carrier: str = ""


@dataclass(frozen=True, slots=True)
class Happening:
    """`who` is a peer, or the number of a hub. It lasts `for_s`; a peer that moved is at the site `to` then, and a
    router that was replaced is of the kind `to`.

    `clock_ran` is about sleep: whether the monotonic clock ran on, as for a process that was stopped.
    """

    at_s: float
    what: What
    who: str = ""
    for_s: float = 0.0
    to: str = ""
    clock_ran: bool = False


@dataclass(frozen=True, slots=True)
class Talk:
    """One conversation of a pair."""

    caller: str
    callee: str
    at_s: float
    until_s: float


@dataclass(frozen=True, slots=True)
class LifePlan:
    """One world and what happens in it. `homes` says where each peer is at first."""

    seed: int
    hubs: int
    duration_s: float
    sites: tuple[Site, ...]
    homes: dict[str, str]
    happenings: tuple[Happening, ...]
    talks: tuple[Talk, ...]


def draw_life(
    seed: int, *, peers: int = 100, hubs: int = 5, duration_s: float = 1800.0, pairs: int | None = None
) -> LifePlan:
    """A plan by the shares above; `pairs` is as many as there are peers unless told otherwise."""
    draw = seeded(seed, "life")
    names = [f"peer{number + 1:03}" for number in range(peers)]
    own = {name: _site(draw, f"home of {name}") for name in names}
    public = [_site(draw, f"place {number + 1}") for number in range(max(3, peers // PEERS_PER_PLACE))]
    end_s = duration_s - CALM_S
    happenings = [one for name in names for one in _of_peer(draw, name, own[name].name, public, end_s)]
    happenings += _of_hubs(draw, hubs, end_s)
    talks: list[Talk] = []
    for _ in range(peers if pairs is None else pairs):
        caller, callee = draw.sample(names, 2)
        talks += _of_pair(draw, caller, callee, duration_s)
    return LifePlan(
        seed,
        hubs,
        duration_s,
        (*own.values(), *public),
        {name: site.name for name, site in own.items()},
        tuple(sorted(happenings, key=lambda one: (one.at_s, one.who))),
        tuple(sorted(talks, key=lambda one: (one.at_s, one.caller, one.callee))),
    )


def _site(draw: random.Random, name: str) -> Site:
    nat = draw.choices(list(MIX), list(MIX.values()))[0]
    if nat == "none":
        return Site(name, nat)
    carrier = "port-restricted" if draw.random() < DOUBLE_NAT_SHARE else ""
    return Site(name, f"{nat}/{draw.choice(TIMEOUTS_S):g}s", carrier)


def _of_peer(draw: random.Random, name: str, home: str, public: list[Site], end_s: float) -> list[Happening]:
    """One thing after the other, never two at once."""
    found = []
    at_s, place = QUIET_S + draw.expovariate(1.0 / PAUSE_S), home
    while at_s < end_s:
        what = draw.choices(list(SHARES), list(SHARES.values()))[0]
        for_s, to = 0.0, ""
        if what is What.SLEEP:
            for_s = _log_uniform(draw, 10.0, 900.0)
        elif what is What.OFFLINE:
            for_s = _log_uniform(draw, 1.0, 60.0)
        elif what is What.CRASH:
            for_s = _log_uniform(draw, 1.0, 30.0)
        if what is What.MOVE or (what is What.SLEEP and draw.random() < 0.5):
            to = home if place != home and draw.random() < 0.5 else draw.choice(public).name
            place = to
        elif what is What.REPLACE:
            to = draw.choice(REPLACEMENTS)
        if at_s + for_s < end_s:
            found.append(Happening(round(at_s, 3), what, name, round(for_s, 3), to, draw.random() < 0.3))
        at_s += for_s + 5.0 + draw.expovariate(1.0 / PAUSE_S)
    return found


def _of_hubs(draw: random.Random, hubs: int, end_s: float) -> list[Happening]:
    found = []
    at_s = QUIET_S + draw.expovariate(1.0 / HUB_PAUSE_S)
    while at_s < end_s:
        what = draw.choices(list(HUB_SHARES), list(HUB_SHARES.values()))[0]
        for_s = _log_uniform(draw, 2.0, 60.0)
        if at_s + for_s < end_s:
            found.append(Happening(round(at_s, 3), what, str(draw.randint(1, hubs)), round(for_s, 3)))
        at_s += for_s + 20.0 + draw.expovariate(1.0 / HUB_PAUSE_S)
    return found


def _of_pair(draw: random.Random, caller: str, callee: str, duration_s: float) -> list[Talk]:
    talks = []
    at_s = draw.uniform(0.0, SILENT_S[1])
    while at_s < duration_s:
        until_s = at_s + draw.uniform(*TALK_S)
        talks.append(Talk(caller, callee, round(at_s, 3), round(min(until_s, duration_s), 3)))
        at_s = until_s + draw.uniform(*SILENT_S)
    return talks


def _log_uniform(draw: random.Random, low: float, high: float) -> float:
    return math.exp(draw.uniform(math.log(low), math.log(high)))
