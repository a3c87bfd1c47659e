"""Lives a plan through with the real engine on every machine, and keeps book of every outage.

    result = live(draw_life(seed=1))
    result.outages       the longest first, with what happened before each
    result.failures      what was not as it has to be, a sentence each

A pair that talks sends a ping a second. It is *owed* an answer while it could be connected: both machines awake and
with a link, and one hub in reach of both. An outage is the time from the last packet that was answered, or from the
moment since which it is owed, to the next packet that is, less the pause between two packets. After the calm at the end
nothing may be parked: every pair that talks is connected, and direct where the oracle says so.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from p2pvpn.mesh.network import Network
from p2pvpn.mesh.node import Node

from .internet import Interface, Quality
from .lifeplan import CALM_S, Happening, LifePlan, Talk, What
from .nat import NatKind
from .oracle import Verdict
from .overlay import OverlayStack
from .plan import HUB_LINE, LINE
from .start import start_node
from .world import Home, Machine, World

ATTACH_S = 15.0
"""Before the life begins, everybody has this long to attach."""
PING_S = 1.0
"""Between two packets of a conversation."""
LIMIT_S = 5.0
"""No pair may be without an answer for longer while it could be connected."""
HUBLESS_LIMIT_S = 20.0
"""The same after a time without any hub: ten thousand peers must not come back in one second."""
REMEMBER_S = 60.0
"""What happened so long before an outage may be its cause."""
NOTED_S = 1.5
"""Shorter outages are packets that the lines lost."""
MARGIN_S = 2.0
"""What a diagram shows before and after an outage."""
MAX_SEQUENCE = 0xFFFF


@dataclass(frozen=True, slots=True)
class Outage:
    """A pair that talked went without an answer for `lasted_s`, from `at_s` on; `causes` are the latest last."""

    caller: str
    callee: str
    at_s: float
    lasted_s: float
    ended: bool
    path: str
    """How the caller saw the way when it began."""
    causes: tuple[str, ...]
    cause: What | None
    limit_s: float

    @property
    def is_too_long(self) -> bool:
        return self.lasted_s > self.limit_s


@dataclass(slots=True)
class LifeResult:
    """What came of a life. `cpu_s` is process time, everything else virtual."""

    plan: LifePlan
    outages: list[Outage] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    cpu_s: float = 0.0
    virtual_s: float = 0.0
    digest: str = ""
    diagram: str = ""

    @property
    def cpu_per_peer_second_us(self) -> float:
        return self.cpu_s / (self.virtual_s * len(self.plan.homes)) * 1e6 if self.virtual_s else 0.0


def live(plan: LifePlan, *, draw: Outage | None = None) -> LifeResult:
    """Simulate the plan. With `draw`, an outage of a former run, the result has the sequence diagram of it."""
    began = time.process_time()
    with World(plan.seed) as world:
        life = Life(plan, world)
        if draw is not None:
            life.watch(draw)
        try:
            world.run(life.story(), plan.duration_s + 2 * ATTACH_S + 600.0)
        except Exception as problem:  # noqa: BLE001 (a broken engine is a result, too)
            life.result.failures.append(f"{type(problem).__name__}: {problem}")
        result = life.result
        result.virtual_s = world.loop.elapsed
        result.digest = world.trace.digest()
        if draw is not None:
            result.diagram = world.trace.diagram(life.columns(draw))
    result.cpu_s = time.process_time() - began
    result.outages.sort(key=lambda outage: -outage.lasted_s)
    return result


class Life:
    """One plan's world and its story."""

    def __init__(self, plan: LifePlan, world: World) -> None:
        self.plan = plan
        self.world = world
        self.result = LifeResult(plan)
        self.nodes: dict[str, Node] = {}
        self.hubs = [world.hub(quality=HUB_LINE) for _ in range(plan.hubs)]
        self._sites: dict[str, Home | None] = {}
        for site in plan.sites:
            self._sites[site.name] = self._build(site.name, site.nat, site.carrier)
        for name, site_name in plan.homes.items():
            home = self._sites[site_name]
            world.peer(name, behind=home, quality=LINE if home is None else None)
        world.publish()
        self._log: list[tuple[float, frozenset[str], What, str]] = []
        """What happened: when it ended, to whom (nobody in particular for hubs), and in words."""
        self._hubless_until = -math.inf
        self._watched: Outage | None = None
        self._began = 0.0

    def _build(self, name: str, nat: str, carrier: str) -> Home | None:
        if nat == "none":
            return None
        above = None
        if carrier:
            above = self.world.home(carrier, name=f"carrier of {name}", lan="100.64.0.0/16", line=LINE)
        return self.world.home(nat, name=name, behind=above, line=LINE if above is None else Quality())

    @property
    def now_s(self) -> float:
        """Seconds since the life began."""
        return self.world.loop.instant - self._began

    # ------------------------------------------------------------------ the story

    async def story(self) -> None:
        peers = [self.world.machines[name] for name in self.plan.homes]
        for machine in self.hubs:
            await self._start(machine)
        for machine in peers:
            await self._start(machine)
            await asyncio.sleep(0.05)
        await asyncio.sleep(ATTACH_S)
        self._began = self.world.loop.instant
        async with asyncio.TaskGroup() as group:
            if self._watched is not None:
                group.create_task(self._record(self._watched), name="record")
            for happening in self.plan.happenings:
                group.create_task(self._happen(happening), name=f"{happening.who} {happening.what.value}")
            talks = [Conversation(self, talk) for talk in self.plan.talks]
            for talk in talks:
                group.create_task(talk.run(), name=f"{talk.plan.caller} and {talk.plan.callee}")
        self._judge_the_end(talks, peers)

    async def _start(self, machine: Machine) -> None:
        self.nodes[machine.name] = await start_node(self.world, machine)

    def _judge_the_end(self, talks: Sequence[Conversation], peers: Sequence[Machine]) -> None:
        """Nothing is parked."""
        fail = self.result.failures.append
        for peer in peers:
            attached = len(self.network(peer).attachments.connected())
            if attached < min(2, self.plan.hubs):
                fail(f"{peer.name} is attached to {attached} hubs after {CALM_S:g} s of calm")
        for talk in talks:
            plan = talk.plan
            if plan.until_s < self.plan.duration_s or self.plan.duration_s - plan.at_s < CALM_S / 2:
                continue
            caller, callee = (self.world.machines[name] for name in (plan.caller, plan.callee))
            if self.world.verdict(caller, callee) is Verdict.DIRECT:
                ways = {self.path(caller, callee), self.path(callee, caller)}
                if ways != {"direct"}:
                    fail(f"{plan.caller} and {plan.callee} can be direct and are {' and '.join(sorted(ways))}")

    def network(self, machine: Machine) -> Network:
        return next(iter(self.nodes[machine.name].networks.values()))

    def path(self, machine: Machine, other: Machine) -> str:
        """How one machine reaches the other, as it sees it."""
        if not machine.host.plane.stacks:
            return "down"
        session = self.network(machine).sessions.get(other.overlay)
        kind = session.path_kind if session is not None else None
        return "none" if kind is None else kind.value

    # ------------------------------------------------------------------ what happens

    async def _happen(self, one: Happening) -> None:
        await asyncio.sleep(one.at_s)
        self.result.counts[one.what.value] += 1
        if one.what in (What.HUB, What.HUBS, What.ALL_HUBS):
            await self._restart_hubs(one)
        elif one.what in (What.CUT_HUB, What.CUT_PEERS):
            await self._cut(one)
        else:
            await self._happen_to(self.world.machines[one.who], one)

    async def _happen_to(self, machine: Machine, one: Happening) -> None:
        host, router = machine.host, machine.home.router if machine.home is not None else None
        names = [machine.name]
        match one.what:
            case What.MOVE:
                self._move(machine, one.to)
            case What.SLEEP:
                host.suspend()
                await asyncio.sleep(one.for_s)
                if one.to:
                    self._move(machine, one.to)
                host.resume(clock_ran=one.clock_ran)
            case What.OFFLINE:
                interfaces: list[Interface] = list(host.interfaces)
                for interface in interfaces:
                    host.unplug(interface)
                await asyncio.sleep(one.for_s)
                for interface in interfaces:
                    host.unplug(interface, up=True)
            case What.CRASH:
                host.crash()
                await asyncio.sleep(one.for_s)
                host.restart()
                await self._start(machine)
            case _ if router is None:
                return
            case What.FLUSH:
                router.flush()
                names = self._neighbours(machine)
            case What.RENUMBER:
                if machine.home is not None and machine.home.above is None:
                    self.world.renumber(machine.home)
                names = self._neighbours(machine)
            case What.REPLACE:
                router.replace_nat(NatKind.of(one.to))
                names = self._neighbours(machine)
        words = f"{machine.name} {one.what.value}" + (f" {one.for_s:.0f} s" if one.for_s else "")
        words += (f", to {one.to}" if one.to else "") + (", clock ran" if one.clock_ran and one.for_s else "")
        self._note(one.what, words, names)

    def _neighbours(self, machine: Machine) -> list[str]:
        return [name for name in self.plan.homes if self.world.machines[name].home is machine.home]

    def _move(self, machine: Machine, to: str) -> None:
        home = self._sites[to]
        self.world.move(machine, home)
        if home is None:
            for interface in machine.host.interfaces:
                interface.quality = LINE

    async def _restart_hubs(self, one: Happening) -> None:
        count = {What.HUB: 1, What.HUBS: 2, What.ALL_HUBS: len(self.hubs)}[one.what]
        chosen = [self.hubs[(int(one.who) - 1 + step) % len(self.hubs)] for step in range(count)]
        chosen = [hub for hub in chosen if hub.host.is_running]
        for hub in chosen:
            hub.host.crash()
        names = ", ".join(hub.name for hub in chosen)
        self._note(one.what, f"{names} down")
        await asyncio.sleep(one.for_s)
        for hub in chosen:
            hub.host.restart()
            await self._start(hub)
        self._note(one.what, f"{names} up again after {one.for_s:.0f} s")

    async def _cut(self, one: Happening) -> None:
        peers = [self.world.machines[name] for name in self.plan.homes]
        if one.what is What.CUT_HUB:
            hub = self.hubs[int(one.who) - 1]
            sides: tuple[list[Machine], list[Machine]] = [hub], peers[::2]
        else:
            sides = peers[::2], peers[1::2]
        before = set(self.world.internet.cuts)
        self.world.cut(*sides)
        mine = self.world.internet.cuts - before
        self._note(one.what, f"cut around {sides[0][0].name}")
        await asyncio.sleep(one.for_s)
        self.world.internet.cuts -= mine
        self._note(one.what, f"the cut around {sides[0][0].name} is healed after {one.for_s:.0f} s")

    def _note(self, what: What, words: str, names: Sequence[str] = ()) -> None:
        self._log.append((self.now_s, frozenset(names), what, words))
        self.world.trace.note(names[0] if names else "hub1", "HAPPENS", words)

    def causes(self, caller: str, callee: str, at_s: float) -> list[tuple[float, What, str]]:
        """What happened to a pair, or to hubs, shortly before and during an outage that began then."""
        both = {caller, callee}
        return [
            (when, what, words)
            for when, names, what, words in self._log
            if at_s - REMEMBER_S <= when and (not names or names & both)
        ]

    # ------------------------------------------------------------------ what could be

    def could_be_connected(self, caller: Machine, callee: Machine) -> bool:
        """Whether both are awake and have a link, and a hub is in reach of both."""
        if not (is_awake(caller) and is_awake(callee)):
            return False
        running = [hub for hub in self.hubs if hub.host.is_running and hub.host.plane.stacks]
        if not running:
            self._hubless_until = self.now_s
        return any(self._reaches(caller, hub) and self._reaches(callee, hub) for hub in running)

    def _reaches(self, peer: Machine, hub: Machine) -> bool:
        cuts = self.world.internet.cuts
        return not cuts or frozenset((peer.edge, hub.edge)) not in cuts

    def limit_s(self, at_s: float) -> float:
        """How long an outage that began then may last."""
        return HUBLESS_LIMIT_S if at_s - self._hubless_until < REMEMBER_S else LIMIT_S

    # ------------------------------------------------------------------ pictures

    def columns(self, outage: Outage) -> list[str]:
        """Hosts of a diagram: the pair with all routers that it was behind, the hubs in the middle."""
        routers: list[list[str]] = []
        for name in (outage.caller, outage.callee):
            homes = [self._sites[place] for place in self._places(name)]
            routers.append([router for home in homes if home is not None for router in _routers(home)])
        hubs = [hub.name for hub in self.hubs]
        names = [outage.caller, *routers[0], *hubs, *reversed(routers[1]), outage.callee]
        seen = {event.host for event in self.world.trace.events} | {event.to for event in self.world.trace.events}
        return [name for name in dict.fromkeys(names) if name in seen]

    def _places(self, name: str) -> list[str]:
        """All sites that a peer is at, in order."""
        places = [self.plan.homes[name], *(one.to for one in self.plan.happenings if one.who == name)]
        return [place for place in dict.fromkeys(places) if place in self._sites]

    def watch(self, outage: Outage) -> None:
        """Record nothing but what the pair does and sends around an outage."""
        self._watched = outage
        self.world.trace.is_kept = False

    async def _record(self, outage: Outage) -> None:
        trace = self.world.trace
        homes = (self._sites[place] for name in (outage.caller, outage.callee) for place in self._places(name))
        theirs = {outage.caller, outage.callee}.union(*(_routers(home) for home in homes if home is not None))
        await asyncio.sleep(max(0.0, outage.at_s - MARGIN_S))
        trace.is_kept = True
        end = trace.watch(
            self.world.internet, lambda crossing: crossing.sender in theirs or crossing.receiver in theirs
        )
        await asyncio.sleep(outage.lasted_s + 2 * MARGIN_S)
        end()
        trace.is_kept = False


def is_awake(machine: Machine) -> bool:
    """Whether there is an engine that runs, with a link."""
    host = machine.host
    is_up = host.is_running and not host.is_suspended and bool(host.plane.stacks)
    return is_up and any(interface.is_up for interface in host.interfaces)


class Conversation:
    """One talk: a ping a second, and how long the pair went without an answer that it is owed."""

    def __init__(self, life: Life, plan: Talk) -> None:
        self.plan = plan
        self._life = life
        self._caller = life.world.machines[plan.caller]
        self._callee = life.world.machines[plan.callee]
        self._owed_since: float | None = None
        self._path = "none"
        self._sent_at: dict[int, float] = {}
        self._number = 0
        self._stack: OverlayStack | None = None
        self._identifier = 0

    async def run(self) -> None:
        """Talk until the end."""
        life, counts = self._life, self._life.result.counts
        await asyncio.sleep(self.plan.at_s)
        while life.now_s < self.plan.until_s:
            if life.could_be_connected(self._caller, self._callee):
                if self._owed_since is None:
                    self._owed_since = life.now_s
                    self._path = life.path(self._caller, self._callee)
            else:
                self._close("could not be connected any more")
                self._owed_since = None
            if is_awake(self._caller):
                counts["pings"] += 1
                self._caller.host.context.run(self._send)
            await asyncio.sleep(PING_S)
        await asyncio.sleep(PING_S)
        self._close("the talk ended")

    def _send(self) -> None:
        stack = next(iter(self._caller.host.plane.stacks.values()))
        if stack is not self._stack:
            self._stack, self._identifier = stack, stack.expect_echoes(self._answered)
        self._number = (self._number + 1) & MAX_SEQUENCE
        self._sent_at[self._number] = self._life.now_s
        if len(self._sent_at) > 64:
            del self._sent_at[next(iter(self._sent_at))]
        stack.send_echo(self._callee.overlay, self._identifier, self._number, b"are you there?")

    def _answered(self, sequence: int, data: bytes) -> None:
        sent_at = self._sent_at.pop(sequence, None)
        if sent_at is None:
            return
        self._life.result.counts["answers"] += 1
        if self._owed_since is not None and sent_at > self._owed_since:
            self._note(sent_at - self._owed_since - PING_S, ended=True)
            self._owed_since = sent_at
            self._path = self._life.path(self._caller, self._callee)

    def _close(self, why: str) -> None:
        if self._owed_since is not None:
            self._note(self._life.now_s - self._owed_since - PING_S, ended=False)

    def _note(self, lasted_s: float, *, ended: bool) -> None:
        if lasted_s < NOTED_S:
            return
        life, at_s = self._life, self._owed_since or 0.0
        causes = life.causes(self.plan.caller, self.plan.callee, at_s)
        told = tuple(f"{when - at_s:+.1f} s {words}" for when, _, words in causes)
        before = [what for when, what, _ in causes if when <= at_s + PING_S]
        cause = before[-1] if before else causes[0][1] if causes else None
        life.result.outages.append(
            Outage(
                self.plan.caller,
                self.plan.callee,
                round(at_s, 3),
                round(lasted_s, 3),
                ended,
                self._path,
                told,
                cause,
                life.limit_s(at_s),
            )
        )


def too_long(result: LifeResult) -> list[Outage]:
    """Outages that must not be."""
    return [outage for outage in result.outages if outage.is_too_long]


def recoveries(results: Sequence[LifeResult]) -> dict[str, list[float]]:
    """Lengths of outages by what caused them, shortest first."""
    found: dict[str, list[float]] = {}
    for result in results:
        for outage in result.outages:
            cause = outage.cause.value if outage.cause is not None else "nothing"
            found.setdefault(cause, []).append(outage.lasted_s)
    return {cause: sorted(lengths) for cause, lengths in sorted(found.items())}


def _routers(home: Home) -> list[str]:
    """From a home outwards."""
    return [home.router.name] + ([] if home.above is None else _routers(home.above))
