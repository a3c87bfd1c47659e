"""One session's way through endpoint-dependent NATs: when a run of guesses begins, and what each side does in it.

    easy side                                         hard side
    ordinary checks found nothing for START_AFTER_S
    two hubs say where the peer is
    WANT -------------------------------------------> two hubs say where the peer is
                                                      a few fresh sockets ask a hub: can the next port be told?
                                                      opens sockets, sends a check from each to the easy side
    <------------------------------------------- OPEN the ports predicted, or none
    a check to each of them, or to random ports ----> a hit is a pair like others: checked, nominated, moved to

Where both sides are hard and predictable, both open sockets, tell the ports predicted, and aim at the peer's. One run
at a time is under way on a machine; after a failure the next one waits, up to half an hour, unless a network changes.
The relay carries the traffic meanwhile. The socket that won stays open as long as a path goes from it; all others are
closed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Mapping, Sequence
from ipaddress import IPv6Address
from typing import TYPE_CHECKING, Any, Protocol

from p2pvpn.core.address import Endpoint, IpAddress, Path
from p2pvpn.core.errors import LocalError, P2pvpnError, WireError
from p2pvpn.core.output import Output
from p2pvpn.ike.notifies import Notify
from p2pvpn.punch.agent import PunchAgent
from p2pvpn.punch.behaviour import Allocation, NatBehaviour
from p2pvpn.punch.birthday import (
    HUBS_NEEDED,
    INTERVAL_S,
    PROBES,
    SOCKETS,
    RunBackoff,
    Volley,
    VolleyEnded,
    VolleyReached,
    guesses,
    meetings,
    openings,
)
from p2pvpn.punch.candidates import CandidateKind, priority
from p2pvpn.punch.checklist import SEEN_FROM_OUTSIDE
from p2pvpn.punch.pair import PairState
from p2pvpn.punch.prediction import Prediction, predict
from p2pvpn.punch.traversal import Part, RunNotice, Step, decode_nat_untrusted, part

from .events import Guessed, MeshEvent
from .notices import CANDIDATES, NAT, RUN, find
from .ports import Underlay
from .pump import Pump
from .services import Services

if TYPE_CHECKING:
    from .live import LiveSa

START_AFTER_S = 0.6
"""Ordinary checks have found what they can by then."""
ANSWER_S = 8.0
"""From WANT to OPEN: words of hubs, samples, 128 openings, and the way over the relay."""
HOLD_S = PROBES * INTERVAL_S * 1.25 + 3.0
"""The hard side keeps its sockets for a run of the other so long."""
SHORT_HOLD_S = 0.5
"""The same where ports were predicted, after the second that a volley waits for answers."""
HIT_S = 2.0
"""What hit becomes a path within this time, or not at all."""
SAMPLES = 4
"""Fresh sockets that ask a hub."""
PREDICTED_SOCKETS, SPARE = 16, 32
"""Sockets whose ports are predicted, and further ports that are tried as others may open some in between."""
MEETING_ROUNDS = 3
AFTER_MEETING_S = 1.0
WORDS_S = 20.0
"""What hubs said of where the peer is counts so long."""
LINGER_S = 5.0
"""What was sent to a socket before the move arrives."""


class Context(Protocol):
    """What is asked of the network."""

    label: str

    def emit(self, event: MeshEvent) -> None: ...

    def nat(self) -> NatBehaviour:
        """Our own, for IPv4."""
        ...

    async def whereabouts(self, overlay: IPv6Address) -> Mapping[IpAddress, frozenset[bytes]]:
        """Where hubs see the peer's tunnel come from, and which. Raises P2pvpnError."""
        ...

    def hub_endpoints(self) -> Sequence[Endpoint]: ...


class Owner(Protocol):
    """What is asked of the session."""

    overlay: IPv6Address
    current: LiveSa | None
    last_failure: str

    @property
    def name(self) -> str: ...

    @property
    def sas(self) -> Mapping[int, LiveSa]: ...


class HardNat:
    """Runs of one session, and the extra sockets that its paths go from."""

    def __init__(self, services: Services, context: Context, owner: Owner) -> None:
        self._services = services
        self._context = context
        self._owner = owner
        self._theirs = NatBehaviour()
        self._their_place = b""
        """The peer's candidates as they came: others mean that it moved."""
        self._backoff = RunBackoff()
        self._predicts = True
        """Whether our next run as the hard side tries to predict; the one after a prediction that failed does not."""
        self._run: asyncio.Task[None] | None = None
        self._run_sa: LiveSa | None = None
        self._number = 0
        self._answer: asyncio.Future[RunNotice] | None = None
        self._words: Mapping[IpAddress, frozenset[bytes]] = {}
        self._words_at = 0.0
        """What hubs said of where the peer is, and when."""
        self._found = asyncio.Event()
        self._kept: dict[int, float] = {}
        """Extra sockets of paths in use, and when they were last seen so."""

    @property
    def theirs(self) -> NatBehaviour:
        """The peer's NAT, as it says."""
        return self._theirs

    # What happens around us.

    def begun(self, sa: LiveSa, notifies: tuple[Notify, ...]) -> None:
        """An SA with a punching agent came up."""
        self._learn(notifies)
        if sa.agent is None or sa.pump is None:
            return
        sa.agent.checks.extra_ports.update(self._kept)
        if not sa.relayed:
            sa.pump.feed(sa.agent.suggest(sa.path, self._services.now))
        asyncio.get_running_loop().call_later(START_AFTER_S, self.look)
        if sa.relayed and self._part() in (Part.OPEN, Part.PROBE, Part.MEET):
            self._services.tasks.start(self._look_up(sa.agent), f"where is {self._owner.name}")

    def informed(self, sa: LiveSa, notifies: tuple[Notify, ...]) -> None:
        """The peer said something inside IKE."""
        self._learn(notifies)
        data = find(notifies, RUN)
        if data is None or sa.agent is None:
            return
        try:
            notice = RunNotice.decode_untrusted(data)
        except WireError as problem:
            self._owner.last_failure = f"hard NAT: {problem}"
            return
        if self._answer is not None and not self._answer.done() and notice.run == self._number:
            self._answer.set_result(notice)
        elif notice.step in (Step.WANT, Step.READY):
            self._asked(sa, notice)

    def network_changed(self) -> None:
        """Another NAT, another chance."""
        self._words = {}
        self._backoff.reset()
        self._predicts = True

    def nominated(self, path: Path) -> None:
        """The agent chose a path: ESP comes and goes by its socket soon."""
        self._found.set()
        port = path.local.port
        if port != self._services.underlay.port and port not in self._kept:
            self._kept[port] = self._services.now
            self._services.tasks.start(self._services.plane.listen(port), f"listen at {port}")

    def look(self) -> None:
        """Now and then: close what is not used any more; begin a run if it is time."""
        self._close_unused()
        sa = self._owner.current
        if sa is None or self._run is not None or not self._is_wanted(sa):
            return
        now = self._services.now
        if now - sa.established_at < START_AFTER_S - 0.01 or not self._backoff.allows(now):
            return
        mine = self._part()
        if mine is Part.PROBE:
            self._begin(sa, self._probe(sa), "probe")
        elif mine is Part.MEET and sa.initiator:
            self._begin(sa, self._meet(sa, None), "meet")

    def ended(self, sa: LiveSa) -> None:
        """The SA has no agent any more."""
        if self._kept:
            asyncio.get_running_loop().call_later(LINGER_S + 0.1, self._close_unused)
        if self._run is not None and sa is self._run_sa:
            self._run.cancel()

    # Knowledge.

    def _learn(self, notifies: tuple[Notify, ...]) -> None:
        place = find(notifies, CANDIDATES)
        if place is not None and place != self._their_place:
            self._their_place = place
            self.network_changed()
        data = find(notifies, NAT)
        if data is None:
            return
        try:
            theirs = decode_nat_untrusted(data)
        except WireError:
            return
        if theirs != self._theirs:
            self._theirs = theirs
            self._backoff.reset()

    def _part(self) -> Part:
        if not self._services.tuning.hard_nats:
            return Part.NOTHING
        return part(self._context.nat(), self._theirs)

    def _is_wanted(self, sa: LiveSa) -> bool:
        return sa.relayed and sa.agent is not None and sa.agent.selected is None

    async def _attest(self, agent: PunchAgent) -> str:
        """The peer's address by the word of enough hubs. Raises P2pvpnError."""
        if self._services.now - self._words_at > WORDS_S or not self._words:
            self._words = await self._context.whereabouts(self._owner.overlay)
            self._words_at = self._services.now
        for address, hubs in self._words.items():
            for hub in hubs:
                agent.attest(str(address), hub)
            if address.version == 4 and len(hubs) >= HUBS_NEEDED:
                return str(address)
        raise LocalError(f"fewer than {HUBS_NEEDED} hubs say where the peer is")

    async def _look_up(self, agent: PunchAgent) -> None:
        """A run will be wanted, perhaps: ask the hubs beforehand."""
        with contextlib.suppress(P2pvpnError):
            await self._attest(agent)

    # Runs.

    def _begin(self, sa: LiveSa, work: Coroutine[Any, Any, None], what: str) -> None:
        self._run_sa = sa
        self._run = self._services.tasks.start(self._in_turn(work), f"hard NAT: {what} {self._owner.name}")

    async def _in_turn(self, work: Coroutine[Any, Any, None]) -> None:
        """One run at a time on this machine."""
        try:
            async with self._services.guessing:
                await work
        except TimeoutError:
            self._fail("the peer does not answer")
        except P2pvpnError as problem:
            self._fail(str(problem))
        finally:
            work.close()
            self._run = self._answer = None

    def _fail(self, reason: str) -> None:
        self._owner.last_failure = f"hard NAT: {reason}"
        self._backoff.failed(self._services.now)

    def _asked(self, sa: LiveSa, notice: RunNotice) -> None:
        """The peer wants a run."""
        wanted = Part.OPEN if notice.step is Step.WANT else Part.MEET
        busy = self._run is not None or self._services.guessing.locked() or self._part() is not wanted
        if busy or not self._backoff.allows(self._services.now):
            self._tell(sa, Step.BUSY, notice.run)
        elif sa.agent is None or sa.agent.selected is not None:
            return
        elif wanted is Part.OPEN:
            self._begin(sa, self._open(sa, notice.run), "open")
        else:
            self._begin(sa, self._meet(sa, notice), "meet")

    def _tell(self, sa: LiveSa, step: Step, number: int, ports: Sequence[int] = ()) -> None:
        notice = RunNotice(step, number, tuple(ports))
        self._services.ike.inform(sa.id, (Notify(RUN, notice.encode()),))

    async def _ask(self, sa: LiveSa, step: Step, ports: Sequence[int] = ()) -> RunNotice:
        """Tell the peer, and wait for its word. Raises TimeoutError."""
        self._number = int.from_bytes(self._services.entropy(4), "big")
        self._answer = asyncio.get_running_loop().create_future()
        self._tell(sa, step, self._number, ports)
        return await asyncio.wait_for(self._answer, ANSWER_S)

    async def _probe(self, sa: LiveSa) -> None:
        """The easy side's part."""
        agent = sa.agent
        if agent is None or not self._is_wanted(sa):
            return
        host = await self._attest(agent)
        for _ in range(2):  # a prediction may fail; the peer guesses then
            answer = await self._ask(sa, Step.WANT)
            if answer.step is not Step.OPEN:
                self._backoff.busy(self._services.now)
                return
            paths = guesses(_near(agent), host, answer.ports, self._services.entropy)
            if await self._fire(sa, paths, "prediction" if answer.ports else "birthday"):
                self._backoff.reset()
                return
            if not answer.ports or not self._is_wanted(sa):
                break
        self._fail("no guess met")

    async def _open(self, sa: LiveSa, number: int) -> None:
        """The hard side's part."""
        agent = sa.agent
        assert agent is not None
        target = _seen_at(agent, await self._attest(agent))
        near = _near(agent).host
        with self._sockets(agent) as sockets:
            prediction = Prediction(Allocation.RANDOM)
            if self._predicts and self._context.nat().allocation is not Allocation.RANDOM:
                prediction = await self._sample(near, sockets)
            ports = sockets.open(PREDICTED_SOCKETS if prediction.is_useful else SOCKETS)
            told = prediction.ports(ports, SPARE)
            self._predicts = not told
            ready = len(ports) if told else len(ports) // 2
            paths = openings(near, ports, target)
            await self._fire(sa, paths, "", ready, lambda: self._tell(sa, Step.OPEN, number, told))
            await self._met(agent, SHORT_HOLD_S if told else HOLD_S)

    async def _meet(self, sa: LiveSa, theirs: RunNotice | None) -> None:
        """Both sides are hard and predictable; `theirs` is what the peer said if it began."""
        agent = sa.agent
        if agent is None or not self._is_wanted(sa):
            return
        host = await self._attest(agent)
        near = _near(agent).host
        with self._sockets(agent) as sockets:
            prediction = await self._sample(near, sockets)
            if not prediction.is_useful:
                raise LocalError("our NAT cannot be predicted")
            ports = sockets.open(PREDICTED_SOCKETS)
            told = prediction.ports(ports)
            if theirs is None:
                theirs = await self._ask(sa, Step.READY, told)
                if theirs.step is not Step.READY:
                    self._backoff.busy(self._services.now)
                    return
            else:
                self._tell(sa, Step.READY, theirs.run, told)
            paths = meetings(near, ports, host, theirs.ports, MEETING_ROUNDS)
            if await self._fire(sa, paths, "prediction on both sides") or await self._met(agent, AFTER_MEETING_S):
                self._backoff.reset()
                return
        self._fail("no prediction met")

    async def _sample(self, host: str, sockets: _Sockets) -> Prediction:
        """How our NAT allocates, as a hub sees it."""
        hub = next((hub for hub in self._context.hub_endpoints() if not hub.is_ipv6), None)
        if hub is None:
            raise LocalError("no hub to ask")
        return predict(await self._services.sampler.sample(host, sockets.open(SAMPLES), hub))

    async def _fire(self, sa: LiveSa, paths: Sequence[Path], method: str, tell_at: int = 0, tell: Any = None) -> bool:
        """Send a volley; whether there is a path in the end."""
        assert sa.agent is not None
        began = self._services.now
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def hear(output: Output) -> None:
            match output:
                case VolleyReached():
                    tell()
                case VolleyEnded(met=met) if not done.done():
                    done.set_result(met)

        volley = Volley(sa.agent, paths, self._services.punch_limits, began, tell_at=tell_at)
        pump = Pump(volley, self._services.underlay, hear)
        try:
            pump.feed(volley.tick(began))
            met = await done
        finally:
            pump.close()
        if method:
            took = round(self._services.now - began, 3)
            self._context.emit(Guessed(self._context.label, self._owner.name, method, met, volley.sent, took))
        return met

    async def _met(self, agent: PunchAgent, limit_s: float) -> bool:
        """Wait for a path; whether there is one."""
        if agent.selected is None:
            self._found.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._found.wait(), limit_s)
            hits = agent.checks.within(PairState.CHECKING, PairState.VALID)
            if agent.selected is None and any(pair.local.port in agent.checks.extra_ports for pair in hits):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._found.wait(), HIT_S)
        return agent.selected is not None

    # Extra sockets.

    def _sockets(self, agent: PunchAgent) -> _Sockets:
        return _Sockets(self._services.underlay, agent, self._kept)

    def _close_unused(self) -> None:
        now = self._services.now
        for port in [port for port in self._kept if self._is_used(port)]:
            self._kept[port] = now
        for port in [port for port, used_at in self._kept.items() if now - used_at > LINGER_S]:
            del self._kept[port]
            for sa in self._owner.sas.values():
                if sa.agent is not None:
                    sa.agent.checks.drop_ports((port,))
            self._services.tasks.start(self._give_back(port), f"close {port}")

    async def _give_back(self, port: int) -> None:
        try:
            await self._services.plane.unlisten(port)
        finally:
            self._services.underlay.close_extra(port)

    def _is_used(self, port: int) -> bool:
        for sa in self._owner.sas.values():
            selected = sa.agent.selected if sa.agent is not None else None
            if sa.path.local.port == port or (selected is not None and selected.local.port == port):
                return True
        return False


class _Sockets:
    """Extra sockets of one run: those that no path goes from are closed in the end."""

    def __init__(self, underlay: Underlay, agent: PunchAgent, kept: Mapping[int, float]) -> None:
        self._underlay = underlay
        self._agent = agent
        self._kept = kept
        self._ports: list[int] = []

    def __enter__(self) -> _Sockets:
        return self

    def open(self, count: int) -> list[int]:
        """Raises LocalError when the machine has none."""
        ports = list(self._underlay.open_extra(count))
        self._ports += ports
        self._agent.checks.extra_ports.update(ports)
        if not ports:
            raise LocalError("no socket is left")
        return ports

    def __exit__(self, *problem: object) -> None:
        unused = [port for port in self._ports if port not in self._kept]
        self._agent.checks.drop_ports(unused)
        for port in unused:
            self._underlay.close_extra(port)


def _near(agent: PunchAgent) -> Endpoint:
    """Where our packets to the Internet leave from. Raises LocalError without IPv4."""
    ours = [candidate for candidate in agent.checks.local if not candidate.base.is_ipv6]
    if not ours:
        raise LocalError("no IPv4 address")
    return next((one.base for one in ours if one.kind is CandidateKind.REFLEXIVE), ours[0].base)


def _seen_at(agent: PunchAgent, host: str) -> Endpoint:
    """The easy side's socket as everybody sees it, at this address. Raises LocalError when it names none."""
    outside = (*SEEN_FROM_OUTSIDE, CandidateKind.HOST)
    known = [one for one in agent.checks.remote if one.kind in outside and one.endpoint.host == host]
    if not known:
        raise LocalError("the peer names no address that hubs attest")
    return max(known, key=priority).endpoint
