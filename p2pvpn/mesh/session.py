"""One remote member: its SAs, the path in use, the packets that wait for it.

Rules.
- At most one SA carries our outbound traffic (`current`); others only receive until their initiator closes them.
- Whoever initiated the SA moves it (RFC 4555 section 3.5) and closes it when it was replaced.
- Glare: of two SAs that both ends began at the same time, the one of the lower peer ID carries the traffic.
- A path that dies is left for the relay at once; a better one is taken when the punching agent nominates it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv6Address
from typing import Protocol

from p2pvpn.core.address import Endpoint, Path, any_local
from p2pvpn.core.errors import P2pvpnError, WireError
from p2pvpn.core.output import Output
from p2pvpn.identity.member import Member
from p2pvpn.ike.notifies import Notify
from p2pvpn.ike.outputs import SaEstablished
from p2pvpn.punch.agent import PunchAgent
from p2pvpn.punch.candidates import Candidate, decode_candidates_untrusted
from p2pvpn.punch.credentials import derive
from p2pvpn.punch.events import PathLost, PathNominated, PunchFailed

from .backoff import Backoff
from .connect import Attempt, ConnectError, Finder, connect
from .events import ConnectFailed, MeshEvent, PathChanged, PeerConnected, PeerLost, Refused
from .notices import CANDIDATES, find
from .ports import SaUsage
from .pump import Pump
from .relaying import RelayPath
from .services import Services
from .trap import TrapQueue

GIVE_UP_MOVES = 2
"""Moves away from a dead path that may fail, to the relay at hand and to a fresh one, before the SA counts as lost."""


class PathKind(Enum):
    DIRECT = "direct"
    MAPPED = "mapped"
    RELAYED = "relayed"


class Context(Finder, Protocol):
    """What a session asks of its network."""

    label: str

    @property
    def me(self) -> Member: ...

    def emit(self, event: MeshEvent) -> None: ...

    def local_candidates(self) -> list[Candidate]: ...

    def name_of(self, overlay: IPv6Address) -> str: ...


@dataclass(slots=True, eq=False)
class LiveSa:
    """An established IKE SA with its Child SA; `relay` is the relay it began on."""

    id: int
    child_id: int
    initiator: bool
    established_at: float
    path: Path
    relay: RelayPath | None = None
    agent: PunchAgent | None = None
    pump: Pump | None = None
    replaced: bool = False
    failed_moves: int = 0
    move_reason: str = "better"


class Session:
    """Everything between us and one overlay address; stays when the SAs go, until nothing is wanted of it."""

    def __init__(self, services: Services, context: Context, overlay: IPv6Address) -> None:
        self._services = services
        self._context = context
        self.overlay = overlay
        self.member: Member | None = None
        self.current: LiveSa | None = None
        self.usage = SaUsage()
        self.queue = TrapQueue()
        self.relays: dict[Endpoint, RelayPath] = {}
        self._sas: dict[int, LiveSa] = {}
        self._connecting: asyncio.Task[None] | None = None
        self._falling_back: asyncio.Task[None] | None = None
        self._attempt: Attempt | None = None
        tuning = services.tuning
        self._backoff = Backoff(tuning.retry_first_s, tuning.retry_max_s, services.entropy)
        self._not_before = 0.0
        self.last_failure = ""

    # What others see.

    @property
    def connected(self) -> bool:
        return self.current is not None

    @property
    def idle(self) -> bool:
        """Nothing is up, under way or waiting."""
        return not self._sas and self._connecting is None and not len(self.queue)

    @property
    def name(self) -> str:
        return self.member.name if self.member is not None else self._context.name_of(self.overlay)

    @property
    def sa_ids(self) -> list[int]:
        return list(self._sas)

    @property
    def path_kind(self) -> PathKind | None:
        if self.current is None:
            return None
        return PathKind.RELAYED if self.current.path.remote in self._services.relays.endpoints else PathKind.DIRECT

    @property
    def _with_hub(self) -> bool:
        """Whether one of us is a hub: then there is nothing to punch and no relay."""
        return self._context.me.is_hub or (self.member is not None and self.member.is_hub)

    @property
    def rtt_s(self) -> float | None:
        """Round trip of the path in use, as the punching agent last measured it; seconds."""
        sa = self.current
        if sa is None or sa.agent is None:
            return None
        return next((pair.rtt_s for pair in sa.agent.report() if pair.path == sa.path), None)

    @property
    def state(self) -> str:
        if self.current is not None:
            return "connected"
        return "connecting" if self._connecting is not None else "idle"

    # Outbound traffic wants a tunnel.

    def trap(self, packet: bytes) -> None:
        """A packet for this peer found no SA: keep it, and connect."""
        now = self._services.now
        self.queue.put(packet, now)
        if self.current is not None:
            self._flush(self.current)  # The SA came up while the packet was on its way to us.
        else:
            self.want()

    def want(self) -> None:
        """Start to connect, unless that is under way, done, or the back-off says not yet."""
        if self.current is None and self._connecting is None and self._services.now >= self._not_before:
            self._connecting = self._services.tasks.start(self._connect(), f"connect {self.name}")

    def network_changed(self) -> None:
        """Another address, another chance: no back-off, fresh candidates, and the relays learn where we are."""
        self._backoff.reset()
        self._not_before = 0.0
        candidates = self._context.local_candidates()
        for sa in self._sas.values():
            if sa.agent is not None and sa.pump is not None:
                sa.pump.feed(sa.agent.update_local(candidates, self._services.now))
            elif sa.initiator:
                self._services.ike.move(sa.id, sa.path)

    async def _connect(self) -> None:
        tuning = self._services.tuning
        self._attempt = Attempt(self.overlay)
        try:
            async with asyncio.timeout(tuning.connect_timeout_s):
                await connect(self._context, self._services, self._attempt)
            self._backoff.reset()
        except TimeoutError:
            self._failed("all steps", "took too long")
        except ConnectError as problem:
            self._failed(problem.step, str(problem))
        finally:
            self._connecting = None
            self._attempt = None
        if self.current is None and len(self.queue):
            # Packets still wait: the next attempt needs no new packet to start it.
            asyncio.get_running_loop().call_later(max(0.0, self._not_before - self._services.now), self._again)

    def _again(self) -> None:
        if len(self.queue) and self.queue.has_fresh(self._services.now):
            self.want()

    def _failed(self, step: str, reason: str) -> None:
        self.last_failure = f"{step}: {reason}"
        self._not_before = self._services.now + self._backoff.next_pause()
        self._context.emit(ConnectFailed(self._context.label, self.name, step, reason))

    # IKE tells what became of its SAs.

    def established(self, event: SaEstablished, child_id: int) -> None:
        """A new SA: decide which one carries the traffic, start to punch, send what waited."""
        services = self._services
        assert isinstance(event.remote.subject, Member)
        self.member = event.remote.subject
        sa = LiveSa(event.sa, child_id, event.initiator, services.now, event.path, self.relays.get(event.path.remote))
        self._sas[sa.id] = sa
        previous = self.current
        self._start_punching(sa, event)
        if previous is None:
            started = self._attempt.started_at if self._attempt is not None and event.initiator else None
            self._switch(sa)
            kind = self.path_kind
            self._context.emit(
                PeerConnected(
                    self._context.label,
                    self.name,
                    str(self.overlay),
                    kind.value if kind else "",
                    str(sa.path.remote),
                    sa.initiator,
                    None if started is None else round(services.now - started, 4),
                )
            )
        elif self._replaces(sa, previous):
            self._switch(sa)
            self._retire(previous)
        else:
            services.tasks.start(services.plane.use(previous.child_id), "keep the SA in use")
            services.ike.probe(previous.id)
            self._retire(sa)

    def _replaces(self, new: LiveSa, old: LiveSa) -> bool:
        """Whether a second SA takes the traffic over; both ends come to the same answer."""
        both_began = new.initiator != old.initiator
        if both_began and new.established_at - old.established_at < self._services.tuning.glare_window_s:
            we_are_lower = self._member_id() > self._context.me.peer_id
            return new.initiator == we_are_lower
        return True

    def _member_id(self) -> bytes:
        assert self.member is not None
        return self.member.peer_id

    def _retire(self, sa: LiveSa) -> None:
        """An SA that was replaced: its initiator closes it when nothing can be in flight any more."""
        sa.replaced = True
        services = self._services

        def close() -> None:
            if sa.id in self._sas:
                services.ike.close(sa.id, "replaced")

        if sa.initiator:
            asyncio.get_running_loop().call_later(services.tuning.old_sa_linger_s, close)
        else:
            services.ike.probe(sa.id)

    def _switch(self, sa: LiveSa) -> None:
        self.current = sa
        self._services.tasks.start(self._use(sa), "use SA")

    async def _use(self, sa: LiveSa) -> None:
        await self._services.plane.use(sa.child_id)
        self._flush(sa)

    def _flush(self, sa: LiveSa) -> None:
        packets = self.queue.drain(self._services.now)
        if packets:
            self._services.tasks.start(self._services.plane.inject(self._context.label, packets), "send what waited")

    def moved(self, sa_id: int, path: Path) -> None:
        """MOBIKE moved an SA, by either side."""
        sa = self._sas.get(sa_id)
        if sa is None or sa.path == path:
            return
        sa.path = path
        sa.failed_moves = 0
        relay = self.relays.get(path.remote)
        if relay is not None and relay is not sa.relay:
            relay.claimed = True
            sa.relay = relay
            self._release_relays()
        if sa is self.current:
            kind = self.path_kind
            reason, sa.move_reason = sa.move_reason, "better"
            self._context.emit(
                PathChanged(self._context.label, self.name, kind.value if kind else "", str(path.remote), reason)
            )

    def move_failed(self, sa_id: int, path: Path, reason: str) -> None:
        """The SA stays where it was. If that is dead too, try again over the relay."""
        sa = self._sas.get(sa_id)
        if sa is None or sa is not self.current:
            return
        self.last_failure = f"move to {path.remote}: {reason}"
        direct = sa.agent.selected if sa.agent is not None else None
        if sa.path.remote in self._services.relays.endpoints or direct == sa.path:
            return  # It was a move to something better, and what we have still works.
        sa.failed_moves += 1
        if sa.failed_moves >= GIVE_UP_MOVES:
            # The second relay was agreed on with the peer a moment ago, so the peer lives and lost the SA: begin anew.
            self._services.ike.drop(sa.id, f"the peer does not know the SA any more: {reason}")
        else:
            self.fall_back(reason)

    def closed(self, sa_id: int, reason: str) -> None:
        """An SA is gone. If it carried the traffic, another takes over, or the session is down."""
        sa = self._sas.pop(sa_id, None)
        if sa is None:
            return
        self._end_punching(sa)
        if sa is self.current:
            self.current = None
            if self._sas:
                self._switch(max(self._sas.values(), key=lambda other: other.established_at))
            else:
                self._context.emit(PeerLost(self._context.label, self.name, reason))
        self._release_relays()

    def informed(self, sa_id: int, notifies: tuple[Notify, ...]) -> None:
        """The peer said something inside IKE: perhaps new candidates."""
        sa = self._sas.get(sa_id)
        if sa is not None:
            self._take_candidates(sa, notifies)

    # Punching.

    def _start_punching(self, sa: LiveSa, event: SaEstablished) -> None:
        if self._with_hub:
            return  # A hub is reachable as it is.
        services = self._services
        credentials = derive(
            lambda label, length: services.ike.endpoint.export(sa.id, label, length), initiator=sa.initiator
        )
        agent = PunchAgent(
            controlling=sa.initiator,
            credentials=credentials,
            tie_breaker=int.from_bytes(services.entropy(8), "big"),
            entropy=services.entropy,
            limits=services.punch_limits,
        )
        sa.agent = agent
        sa.pump = Pump(agent, services.underlay, lambda output: self._on_punch(sa, output))
        services.punch.register(agent)
        services.agents[agent] = sa.pump
        remote = self._candidates_of(event.notifies)
        sa.pump.feed(agent.start(self._context.local_candidates(), remote, services.now))

    def _end_punching(self, sa: LiveSa) -> None:
        if sa.agent is not None and sa.pump is not None:
            sa.pump.feed(sa.agent.close())
            sa.pump.close()
            self._services.punch.unregister(sa.agent)
            del self._services.agents[sa.agent]
            sa.agent = sa.pump = None

    def _candidates_of(self, notifies: tuple[Notify, ...]) -> tuple[Candidate, ...]:
        data = find(notifies, CANDIDATES)
        if data is None:
            return ()
        try:
            return decode_candidates_untrusted(data)
        except WireError as problem:
            self._context.emit(Refused(self._context.label, self.name, f"candidates: {problem}"))
            return ()

    def _take_candidates(self, sa: LiveSa, notifies: tuple[Notify, ...]) -> None:
        if find(notifies, CANDIDATES) is not None and sa.agent is not None and sa.pump is not None:
            sa.pump.feed(sa.agent.update_remote(self._candidates_of(notifies), self._services.now))

    def _on_punch(self, sa: LiveSa, output: Output) -> None:
        match output:
            case PathNominated(path=path):
                if sa.initiator and sa.id in self._sas:
                    self._move(sa, path)
            case PathLost(path=path, reason=reason):
                # It may be our own NAT that forgot us: the relay and the hubs should know our new address soon.
                self._services.suspect()
                for relay in self.relays.values():
                    relay.rebind()
                if sa.initiator and sa.path == path and sa.id in self._sas:
                    self.fall_back(reason)
            case PunchFailed():
                pass  # The agent goes on by itself; the report shows it.

    def _move(self, sa: LiveSa, path: Path) -> None:
        if path != sa.path:
            self._services.ike.move(sa.id, path)

    def fall_back(self, reason: str) -> None:
        """The path in use is dead: take the relay, the one we have or a new one."""
        sa = self.current
        if sa is not None and sa.initiator and self._falling_back is None and not self._with_hub:
            self._falling_back = self._services.tasks.start(self._to_relay(sa, reason), f"fall back {self.name}")

    async def _to_relay(self, sa: LiveSa, reason: str) -> None:
        backoff = Backoff(self._services.tuning.retry_first_s, 4.0, self._services.entropy)
        dead = sa.path
        try:
            while sa.id in self._sas and sa.path == dead:
                try:
                    relay = await self._living_relay(sa, dead)
                    sa.relay = relay
                    sa.move_reason = reason
                    self._move(sa, relay.path)
                    return
                except P2pvpnError as problem:
                    self.last_failure = f"fall back: {problem}"
                    await asyncio.sleep(backoff.next_pause())
        finally:
            self._falling_back = None

    async def _living_relay(self, sa: LiveSa, dead: Path) -> RelayPath:
        if not sa.failed_moves and sa.relay is not None and sa.relay.path != dead and await sa.relay.confirm():
            return sa.relay
        return await self._context.relay_to(self.overlay)

    def relay_lost(self, relay: RelayPath) -> None:
        """The hub that relayed does not answer any more."""
        self.relays.pop(relay.endpoint, None)
        for sa in self._sas.values():
            if sa.relay is relay:
                sa.relay = None
            if sa is self.current and sa.path.remote == relay.endpoint:
                self.fall_back("relay lost")

    def _release_relays(self) -> None:
        used = {sa.relay for sa in self._sas.values()}
        for endpoint, relay in list(self.relays.items()):
            if relay not in used and relay.claimed:
                relay.close()
                del self.relays[endpoint]

    # Care.

    def inspect(self, usage: dict[int, SaUsage]) -> None:
        """Look at the counters: suspect silence, replace what is old, take down what is idle."""
        sa = self.current
        if sa is None:
            return
        tuning, now = self._services.tuning, self._services.now
        before, self.usage = self.usage, usage.get(sa.child_id, SaUsage())
        if self.usage.last_in_at > before.last_in_at:
            self._services.ike.heard(sa.id)
        silent = self.usage.last_out_at - max(self.usage.last_in_at, sa.established_at)
        if silent > tuning.loss_suspect_s and self.usage.packets_out > before.packets_out:
            self.suspect()
        age = now - sa.established_at
        worn = self.usage.sequence_out > tuning.sequence_limit or age > tuning.sa_life_s * tuning.sa_replace_fraction
        if worn and sa.initiator and self._connecting is None:
            self.replace()
        quiet_since = max(self.usage.last_in_at, self.usage.last_out_at, sa.established_at)
        if now - quiet_since > tuning.idle_s and sa.initiator and not self._with_hub:
            self.disconnect("idle")

    def suspect(self) -> None:
        """Verify the path in use now rather than at the next consent check."""
        sa = self.current
        if sa is None:
            return
        if sa.agent is not None and sa.pump is not None and sa.agent.selected == sa.path:
            sa.pump.feed(sa.agent.verify(self._services.now))
        elif sa.relay is not None and sa.path == sa.relay.path and self._falling_back is None:
            self._falling_back = self._services.tasks.start(
                self._doubt(sa, sa.relay), f"doubt the relay to {self.name}"
            )
        self._services.ike.probe(sa.id)

    async def _doubt(self, sa: LiveSa, relay: RelayPath) -> None:
        """The relayed path is silent: if the relay is to blame, find another one."""
        alive = await relay.confirm()
        self._falling_back = None
        if not alive and sa is self.current and sa.path == relay.path:
            sa.relay = None
            self.fall_back("the relay does not answer")

    def replace(self) -> None:
        """Make a fresh SA over the path in use, before the old one ends."""
        sa = self.current
        if sa is not None and self._connecting is None:
            self._connecting = self._services.tasks.start(self._reconnect(sa), f"replace SA {self.name}")

    async def _reconnect(self, sa: LiveSa) -> None:
        path = any_local(sa.path.remote, self._services.underlay.port) if sa.relay is None else sa.path
        try:
            await self._context.dial(Attempt(self.overlay, path), self._services.tuning.connect_timeout_s)
            if self.current is not None and self.current is not sa and self.current.relay is None:
                self.current.relay = sa.relay
        except ConnectError as problem:
            self.last_failure = f"replace: {problem}"
        finally:
            self._connecting = None

    def disconnect(self, reason: str) -> None:
        """Close every SA; a new packet connects anew."""
        for sa_id in self._sas:
            self._services.ike.close(sa_id, reason)
        if self._connecting is not None:
            self._connecting.cancel()
