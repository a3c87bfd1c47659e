"""Runs a plan with the real engine on every machine, and says how each pair fared, judged by the oracle.

    result = run(draw_plan(seed=1))
    result.failures        what was not as it has to be, a sentence each
    result.figures()       plain values for a table or JSON

A pair's story: the caller pings the callee; the first answer is timed. Within `SETTLE_S` both ends must report the
direct path if the oracle says that there is one. In the end the callee must still be reached over whatever path is in
use. Look-ups, calls and ESP packets are counted where they happen, so that a figure of zero would show what was
bypassed.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from p2pvpn.core.errors import LocalError
from p2pvpn.mesh.events import Called, ConnectFailed, Located, MeshEvent, PathChanged, PeerConnected
from p2pvpn.mesh.network import Network
from p2pvpn.mesh.node import Node
from p2pvpn.mesh.tuning import Tuning

from .application import Pinger
from .internet import LAN, Quality
from .oracle import Verdict
from .plan import HUB_LINE, ROUND_TRIP_S, Crash, PairPlan, PeerPlan, Plan
from .start import start_node
from .world import Home, Machine, World

ATTACH_S = 30.0
"""Everybody has a tunnel to two hubs by then."""
ATTACH_SPREAD_S = 5.0
"""Peers are switched on within this time."""
PINGS, PING_INTERVAL_S = 6, 0.5
"""What a pair says first."""
SETTLE_S = 20.0
"""A direct path that exists is in use by then."""
RELAYED_WAIT_S = 8.0
"""A relayed pair is looked at after this: early enough to see it before anything else happens."""
REACH_S = 15.0
"""How long a peer may be out of reach while things go wrong around it."""
POLL_S = 0.25
RESTART_S = 10.0
"""A crashed hub or peer is back after this."""
RESYNC_S = 30.0
"""After which a hub that lost its disk has its records again."""
END_S = 7200.0
ORDINARY = Tuning(hard_nats=False)
"""What ordinary checks must find is looked at here; what guesses add, `tools.hard_nat` counts."""


@dataclass(slots=True)
class PairResult:
    """How one pair fared. Times in seconds since the caller's first packet."""

    plan: PairPlan
    verdict: Verdict
    first_answer_s: float | None = None
    direct_s: float | None = None
    is_direct: bool = False
    reached: bool = False


@dataclass(slots=True)
class Result:
    """What came of a plan. `wall_s` is real time, everything else virtual."""

    plan: Plan
    pairs: list[PairResult] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    suspects: list[PairPlan] = field(default_factory=list)
    """The pairs that failures are about."""
    counts: Counter[str] = field(default_factory=Counter)
    back_s: list[float] = field(default_factory=list)
    """From a crashed peer's restart until one who had talked to it has an answer again."""
    resync_s: float | None = None
    """From a crashed hub's restart until it has as many records as before."""
    digest: str = ""
    virtual_s: float = 0.0
    wall_s: float = 0.0
    diagram: str = ""

    @property
    def connected(self) -> int:
        return sum(pair.first_answer_s is not None for pair in self.pairs)

    @property
    def promised(self) -> int:
        """Pairs that the oracle says can be direct."""
        return sum(pair.verdict is Verdict.DIRECT for pair in self.pairs)

    def figures(self) -> dict[str, Any]:
        first = [pair.first_answer_s / ROUND_TRIP_S for pair in self.pairs if pair.first_answer_s is not None]
        direct = [pair.direct_s for pair in self.pairs if pair.direct_s is not None]
        return {
            "seed": self.plan.seed,
            "peers": len(self.plan.peers),
            "hubs": self.plan.hubs,
            "pairs": len(self.pairs),
            "connected": self.connected,
            "oracle_direct": self.promised,
            "direct": sum(p.is_direct and p.verdict is Verdict.DIRECT for p in self.pairs),
            "relayed": sum(not p.is_direct for p in self.pairs),
            "direct_beyond_oracle": sum(p.is_direct and p.verdict is not Verdict.DIRECT for p in self.pairs),
            "first_answer_round_trips": _spread(first),
            "direct_after_s": _spread(direct),
            "back_after_crash_s": _spread(self.back_s),
            "resync_s": self.resync_s,
            **{name: self.counts[name] for name in ("lookups", "calls", "esp_sealed", "esp_opened", "datagrams")},
            "failed_attempts": self.counts["failed_attempts"],
            "trace": self.digest[:16],
            "virtual_s": round(self.virtual_s, 1),
            "wall_s": round(self.wall_s, 1),
            "failures": self.failures,
        }


def _spread(values: Iterable[float]) -> dict[str, float] | None:
    ordered = sorted(values)
    if not ordered:
        return None
    at = min(len(ordered) - 1, round(0.95 * len(ordered)))
    return {"median": round(median(ordered), 3), "p95": round(ordered[at], 3), "most": round(ordered[-1], 3)}


def run(plan: Plan, *, draw: Sequence[str] = ()) -> Result:
    """Simulate the plan. With `draw`, the result has a sequence diagram of these hosts and all hubs."""
    began = time.perf_counter()
    with World(plan.seed) as world:
        campaign = Campaign(plan, world)
        if draw:
            campaign.watch(draw)
        try:
            world.run(campaign.story(), END_S)
        except Exception as problem:  # noqa: BLE001 (a broken engine is a result, too: it can be shrunk)
            campaign.result.failures.append(f"{type(problem).__name__}: {problem}")
        result = campaign.result
        result.digest = world.trace.digest()
        result.virtual_s = world.loop.elapsed
        if draw:
            result.diagram = world.trace.diagram(campaign.columns(draw), skip=("STUN request", "STUN response"))
    result.wall_s = time.perf_counter() - began
    return result


class Campaign:
    """One plan's world and its story."""

    def __init__(self, plan: Plan, world: World) -> None:
        self.plan = plan
        self.world = world
        self.result = Result(plan)
        self.nodes: dict[str, Node] = {}
        self._direct_at: dict[tuple[str, str], float] = {}
        self._troubled: set[str] = set()
        self._homes: dict[str, Home] = {}
        self._talk_at = 0.0
        for _ in range(plan.hubs):
            world.hub(quality=HUB_LINE)
        for peer in plan.peers:
            self._settle(peer)
        world.publish()

    # ------------------------------------------------------------------ the world

    def _settle(self, peer: PeerPlan) -> Machine:
        line = self.plan.line
        if not peer.home:
            quality = Quality(
                line.delay_s + LAN.delay_s, line.jitter_s, line.loss, line.duplicate, line.reorder, line.reorder_s
            )
            return self.world.peer(peer.name, quality=quality)
        return self.world.peer(peer.name, behind=self._home(peer))

    def _home(self, peer: PeerPlan) -> Home:
        home = self._homes.get(peer.home)
        if home is not None:
            return home
        if not peer.carrier:
            home = self.world.home(peer.nat, name=peer.home, line=self.plan.line)
        else:
            carrier = self._homes.get(peer.carrier)
            if carrier is None:
                carrier = self._homes[peer.carrier] = self.world.home(
                    peer.carrier, name=f"carrier {peer.carrier}", lan="100.64.0.0/10", line=self.plan.line
                )
            home = self.world.home(peer.nat, name=peer.home, behind=carrier, line=Quality())
        self._homes[peer.home] = home
        return home

    def network(self, machine: Machine) -> Network:
        return next(iter(self.nodes[machine.name].networks.values()))

    def _path(self, machine: Machine, other: Machine) -> str | None:
        session = self.network(machine).sessions.get(other.overlay)
        kind = session.path_kind if session is not None else None
        return kind.value if kind is not None else None

    def columns(self, names: Sequence[str]) -> list[str]:
        """Hosts of a diagram: each with its routers, hubs in the middle."""
        sides = []
        for name in names:
            machine = self.world.machines[name]
            chain = [machine.name]
            home = machine.home
            while home is not None:
                chain.append(home.router.name)
                home = home.above
            sides.append(chain)
        hubs = [machine.name for machine in self.world.machines.values() if machine.is_hub]
        return list(dict.fromkeys([*sides[0], *hubs, *(host for side in sides[1:] for host in reversed(side))]))

    def watch(self, names: Sequence[str]) -> None:
        """Record the datagrams between these hosts, their routers and the hubs."""
        hosts = set(self.columns(names))
        self.world.trace.watch(
            self.world.internet, lambda crossing: crossing.sender in hosts and crossing.receiver in hosts
        )

    # ------------------------------------------------------------------ the story

    async def story(self) -> None:
        """Everybody attaches, the pairs talk, things go wrong, everything is counted."""
        machines = list(self.world.machines.values())
        hubs = [machine for machine in machines if machine.is_hub]
        peers = [machine for machine in machines if not machine.is_hub]
        for hub in hubs:
            await self._start(hub)
        for peer in peers:
            await asyncio.sleep(ATTACH_SPREAD_S / len(peers))
            await self._start(peer)
        await self._attached(peers)
        self._talk_at = self.world.loop.time()
        async with asyncio.TaskGroup() as group:
            for pair in self.plan.pairs:
                group.create_task(self._talk(pair), name=f"{pair.caller} and {pair.callee}")
            for plan in self.plan.peers:
                if plan.crash_at_s is not None:
                    group.create_task(self._crash_peer(plan), name=f"crash {plan.name}")
            if self.plan.trouble.crash is not Crash.NONE:
                group.create_task(self._crash_hub(hubs[0]), name="crash hub")
            if self.plan.trouble.cut_s:
                group.create_task(self._cut(hubs, peers), name="cut")
        for machine in machines:
            self.result.counts["esp_sealed"] += machine.host.plane.sealed
            self.result.counts["esp_opened"] += machine.host.plane.opened
        self.result.counts["datagrams"] = sum(self.world.internet.fates.values())

    async def _start(self, machine: Machine) -> None:
        name = machine.name

        def hear(event: MeshEvent) -> None:
            self._hear(name, event)

        self.nodes[name] = await start_node(self.world, machine, emit=hear, tuning=ORDINARY)

    def _hear(self, name: str, event: MeshEvent) -> None:
        counts = self.result.counts
        match event:
            case PeerConnected(peer=peer, path="direct") | PathChanged(peer=peer, path="direct"):
                self._direct_at.setdefault((name, peer), self.world.loop.time())
            case Located():
                counts["lookups"] += 1
            case Called():
                counts["calls"] += 1
            case ConnectFailed():
                counts["failed_attempts"] += 1

    def _is_calm(self, plan: PairPlan) -> bool:
        """Whether nothing went wrong around a pair: then it is judged by the clock, else by the end."""
        return not self.plan.trouble.cut_s and self._troubled.isdisjoint(plan.names)

    def _fail(self, text: str, *pairs: PairPlan) -> None:
        self.result.failures.append(text)
        self.result.suspects.extend(pair for pair in pairs if pair not in self.result.suspects)

    async def _attached(self, peers: list[Machine]) -> None:
        wanted = min(2, self.plan.hubs)

        def missing() -> list[str]:
            return [peer.name for peer in peers if len(self.network(peer).attachments.connected()) < wanted]

        if not await self._until(lambda: not missing(), ATTACH_S):
            self._fail(f"not attached to {wanted} hubs after {ATTACH_S:g} s: {', '.join(missing()[:5])}")
        await asyncio.sleep(1.0)  # Locators are published.

    async def _until(self, true: Callable[[], bool], limit_s: float) -> bool:
        until = self.world.loop.time() + limit_s
        while not true():
            if self.world.loop.time() >= until:
                return False
            await asyncio.sleep(POLL_S)
        return True

    async def _talk(self, plan: PairPlan) -> None:
        caller, callee = (self.world.machines[name] for name in plan.names)
        pair = PairResult(plan, self.world.verdict(caller, callee))
        self.result.pairs.append(pair)
        await asyncio.sleep(plan.at_s)
        await self._until(lambda: _is_up(caller) and _is_up(callee), 2 * RESTART_S)
        began = self.world.loop.time()
        there = Pinger(caller.host, callee.overlay, count=PINGS, interval_s=PING_INTERVAL_S)
        back = Pinger(callee.host, caller.overlay, count=PINGS, interval_s=PING_INTERVAL_S) if plan.mutual else None
        for pinger in (there, back):
            if pinger is not None:
                await _survive(pinger)
        pair.first_answer_s = there.report.first_answer_s
        if self._is_calm(plan) and pair.first_answer_s is None:
            self._fail(f"{plan.caller} got no answer from {plan.callee} to {PINGS} packets", plan)
        await self._settled(pair, caller, callee, began)
        pair.reached = await self._reach(caller, callee, REACH_S) is not None
        if not pair.reached:
            self._fail(f"{plan.caller} does not reach {plan.callee} in the end", plan)
        elif pair.first_answer_s is None and not self._is_calm(plan):
            pair.first_answer_s = self.world.loop.time() - began

    async def _settled(self, pair: PairResult, caller: Machine, callee: Machine, began: float) -> None:
        def is_direct() -> bool:
            return self._path(caller, callee) == self._path(callee, caller) == "direct"

        wait_s = began - self.world.loop.time() + (SETTLE_S if pair.verdict is Verdict.DIRECT else RELAYED_WAIT_S)
        pair.is_direct = await self._until(is_direct, wait_s)
        if pair.is_direct:
            at = [self._direct_at.get(names) for names in (pair.plan.names, pair.plan.names[::-1])]
            pair.direct_s = max(0.0, max(began if one is None else one for one in at) - began)
        elif pair.verdict is Verdict.DIRECT and self._is_calm(pair.plan):
            ways = " and ".join(str(self._path(*ends)) for ends in ((caller, callee), (callee, caller)))
            self._fail(
                f"{pair.plan.caller} and {pair.plan.callee} can be direct and are {ways} after {SETTLE_S:g} s",
                pair.plan,
            )

    async def _reach(self, caller: Machine, callee: Machine, limit_s: float) -> float | None:
        """Seconds until a packet is answered."""
        began = self.world.loop.time()
        while self.world.loop.time() - began < limit_s:
            if not (_is_up(caller) and _is_up(callee)):
                await asyncio.sleep(POLL_S)
                began += POLL_S
                continue
            pinger = Pinger(caller.host, callee.overlay, count=1, wait_s=1.0)
            await _survive(pinger)
            if pinger.report.answered:
                return self.world.loop.time() - began
        return None

    # ------------------------------------------------------------------ what goes wrong

    async def _crash_peer(self, plan: PeerPlan) -> None:
        assert plan.crash_at_s is not None
        machine = self.world.machines[plan.name]
        await asyncio.sleep(plan.crash_at_s)
        self._troubled.add(plan.name)
        machine.host.crash()
        await asyncio.sleep(RESTART_S)
        machine.host.restart()
        await self._start(machine)
        friends = [
            pair
            for pair in self.plan.pairs
            if plan.name in pair.names and pair.at_s < plan.crash_at_s - PINGS * PING_INTERVAL_S
        ]
        for pair in friends[:3]:
            other = self.world.machines[next(name for name in pair.names if name != plan.name)]
            took_s = await self._reach(other, machine, REACH_S)
            if took_s is None:
                self._fail(f"{other.name} does not reach {plan.name} after its restart", pair)
            else:
                self.result.back_s.append(took_s)

    async def _crash_hub(self, hub: Machine) -> None:
        trouble = self.plan.trouble
        await asyncio.sleep(self.plan.talk_s / 2)
        before = self._records(hub)
        hub.host.crash(lose_disk=trouble.crash is Crash.EMPTY)
        if trouble.crash is Crash.DEAD:
            return
        await asyncio.sleep(RESTART_S)
        hub.host.restart()
        await self._start(hub)
        began = self.world.loop.time()
        if await self._until(lambda: self._records(hub) >= before, RESYNC_S):
            self.result.resync_s = round(self.world.loop.time() - began, 2)
        else:
            self._fail(f"{hub.name} has {self._records(hub)} of {before} records {RESYNC_S:g} s after its restart")

    def _records(self, hub: Machine) -> int:
        side = self.network(hub).hub
        return len(side.store) if side is not None else 0

    async def _cut(self, hubs: list[Machine], peers: list[Machine]) -> None:
        """Cut the second hub off from the other hubs and from every other peer."""
        await asyncio.sleep(self.plan.talk_s / 3)
        alone = hubs[1:2]
        self.world.cut(alone, [hub for hub in hubs if hub not in alone] + peers[::2])
        await asyncio.sleep(self.plan.trouble.cut_s)
        self.world.internet.heal()


def _is_up(machine: Machine) -> bool:
    """Whether there is an engine on it with its network open."""
    return machine.host.is_running and bool(machine.host.plane.stacks)


async def _survive(pinger: Pinger) -> None:
    """Wait for the end of a run, which may be its host's."""
    try:
        await pinger.done()
    except LocalError:
        return
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
