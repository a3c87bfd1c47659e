"""One remote member: its SAs, the packets that wait for it, and when an SA is replaced or taken down.

Rules.
- At most one SA carries our outbound traffic (`current`); others only receive until their initiator closes them.
- Whoever initiated the SA moves it (RFC 4555 section 3.5) and closes it when it was replaced.
- Glare: of two SAs that both ends began at the same time, the one of the lower peer ID carries the traffic.
- How the peer is reached, and what happens when a path dies, is in `paths`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from ipaddress import IPv6Address

from p2pvpn.core.address import Path, any_local
from p2pvpn.identity.member import Member
from p2pvpn.ike.notifies import Notify
from p2pvpn.ike.outputs import SaEstablished

from .backoff import Backoff
from .connect import Attempt, ConnectError, connect
from .events import ConnectFailed, PeerConnected, PeerLost
from .live import LiveSa, PathKind
from .paths import Context, Paths
from .ports import SaUsage
from .relaying import RelayPath
from .services import Services
from .silence import Silence
from .trap import TrapQueue


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
        self.paths = Paths(services, context, self)
        self._sas: dict[int, LiveSa] = {}
        self._connecting: asyncio.Task[None] | None = None
        self._attempt: Attempt | None = None
        tuning = services.tuning
        self._backoff = Backoff(tuning.retry_first_s, tuning.retry_max_s, services.entropy)
        self._not_before = 0.0
        self._silence = Silence(tuning.loss_suspect_s, services.now)
        self.last_failure = ""

    # What others see.

    @property
    def connected(self) -> bool:
        return self.current is not None

    @property
    def idle(self) -> bool:
        """Nothing is up, under way or waiting; a relay at which the peer was asked to meet us counts."""
        return not self._sas and self._connecting is None and not len(self.queue) and not self.paths.relays

    @property
    def name(self) -> str:
        return self.member.name if self.member is not None else self._context.name_of(self.overlay)

    @property
    def sas(self) -> Mapping[int, LiveSa]:
        """All SAs by ID."""
        return self._sas

    @property
    def sa_ids(self) -> list[int]:
        return list(self._sas)

    @property
    def path_kind(self) -> PathKind | None:
        return None if self.current is None else self.paths.kind(self.current)

    @property
    def is_doubtful(self) -> bool:
        """Whether the peer owes us an answer."""
        return self._silence.doubts > 0

    @property
    def is_silent(self) -> bool:
        """Whether a hub has said nothing for a while, although it was asked."""
        return self.paths.is_hub_silent

    @property
    def with_hub(self) -> bool:
        """Whether one of us is a hub: then there is nothing to punch and no relay."""
        return self._context.me.is_hub or (self.member is not None and self.member.is_hub)

    @property
    def rtt_s(self) -> float | None:
        """Round trip of the path in use, as last measured; seconds."""
        return None if self.current is None else self.paths.rtt_s(self.current)

    @property
    def remote(self) -> str | None:
        """Where the tunnel goes, for a person."""
        return None if self.current is None else self._services.lines.show(self.current.path.remote)

    @property
    def transport(self) -> str | None:
        """What the tunnel goes over: udp or tcp."""
        if self.current is None:
            return None
        return "tcp" if self.current.path.remote.is_stream else "udp"

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

    def begin_over(self, relay: RelayPath) -> None:
        """Connect over a relay at which the peer waits: it lost the path of an SA that we know nothing of."""
        if self.current is None and self._connecting is None:
            self._connecting = self._services.tasks.start(self._connect(relay), f"connect {self.name}")

    def resume(self, relay: RelayPath) -> None:
        """The peer called for the sake of an SA that it has with us."""
        self.paths.resume(relay)

    def network_changed(self) -> None:
        """Another address, another chance: no back-off, and every path is looked at."""
        self._backoff.reset()
        self._not_before = 0.0
        self.paths.network_changed()

    def slept(self, slept_s: float) -> None:
        """The machine was asleep: forget the SAs that the other end cannot have any more."""
        tuning = self._services.tuning
        if slept_s > (tuning.asleep_s if self.with_hub else tuning.forgotten_s):
            for sa_id in self._sas:
                self._services.ike.drop(sa_id, f"the machine slept for {slept_s:.0f} s")

    async def _connect(self, relay: RelayPath | None = None) -> None:
        tuning = self._services.tuning
        self._attempt = Attempt(self.overlay)
        try:
            async with asyncio.timeout(tuning.connect_timeout_s):
                await connect(self._context, self._services, self._attempt, relay)
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
        sa = LiveSa(event.sa, child_id, event.initiator, services.now, event.path)
        self._sas[sa.id] = sa
        previous = self.current
        self.paths.begun(sa, event.notifies)
        by_udp = services.lines.at(sa.path.remote) is None
        if self.with_hub and by_udp and not (self._context.me.is_hub and self.member.is_hub):
            services.ike.trust_silence(sa.id, services.tuning.hub_liveness_s)
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
                    services.lines.show(sa.path.remote),
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
        if self.paths.is_in_trouble:
            return True  # The peer may have lost the old one.
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
        self._silence = Silence(self._services.tuning.loss_suspect_s, self._services.now)
        self.usage = SaUsage()
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
        if sa is not None and sa.path != path:
            self.paths.moved(sa, path)
            if sa is self.current:
                self._silence.reset()

    def move_failed(self, sa_id: int, path: Path, reason: str) -> None:
        """The SA stays where it was."""
        sa = self._sas.get(sa_id)
        if sa is not None:
            self.paths.move_failed(sa, path, reason)

    def alive(self, sa_id: int) -> None:
        """The peer answered."""
        sa = self._sas.get(sa_id)
        if sa is not None:
            sa.alive.set()

    def rekeyed(self, sa_id: int, child_id: int) -> None:
        """Another Child SA carries the traffic: its counters begin at nothing."""
        sa = self._sas.get(sa_id)
        if sa is None:
            return
        sa.child_id = child_id
        if sa is self.current:
            self.usage = SaUsage()
            self._silence = Silence(self._services.tuning.loss_suspect_s, self._services.now)

    def closed(self, sa_id: int, reason: str) -> None:
        """An SA is gone. If it carried the traffic, another takes over, or the session is down."""
        sa = self._sas.pop(sa_id, None)
        if sa is None:
            return
        self.paths.end_punching(sa)
        if sa is self.current:
            self.current = None
            if self._sas:
                self._switch(max(self._sas.values(), key=lambda other: other.established_at))
            else:
                self._context.emit(PeerLost(self._context.label, self.name, reason))
        self.paths.release()

    def informed(self, sa_id: int, notifies: tuple[Notify, ...], path: Path) -> None:
        """The peer said something inside IKE: perhaps new candidates."""
        sa = self._sas.get(sa_id)
        if sa is not None:
            self.paths.informed(sa, notifies, path)

    # Care.

    @property
    def is_busy(self) -> bool:
        """Whether the counters want to be looked at closely: traffic with a peer, a moment ago."""
        return self.current is not None and self._silence.is_busy and not self.with_hub

    def watch(self, usage: SaUsage) -> None:
        """Look at the counters of the SA in use: is its path dead?"""
        sa = self.current
        if sa is None:
            return
        before, self.usage = self.usage, usage
        if usage.last_in_at > before.last_in_at:
            if self.with_hub and usage.last_out_at > before.last_out_at:
                self._services.hub_used(sa.path.remote)
            sa.alive.set()
            self._services.ike.heard(sa.id)
        if self._silence.look(usage, self.rtt_s, self._services.now) is not None:
            self.suspect()

    def inspect(self, usage: SaUsage) -> None:
        """Now and then: also replace what is old, take down what is idle."""
        self.watch(usage)
        sa = self.current
        if sa is None:
            return
        self.paths.reconcile(sa)
        tuning, now = self._services.tuning, self._services.now
        age = now - sa.established_at
        worn = usage.sequence_out > tuning.sequence_limit or age > tuning.sa_life_s * tuning.sa_replace_fraction
        if worn and sa.initiator and self._connecting is None:
            self.replace()
        quiet_since = max(usage.last_in_at, usage.last_out_at, sa.established_at)
        if now - quiet_since > tuning.idle_s and sa.initiator and not self.with_hub:
            self.disconnect("idle")

    def suspect(self) -> None:
        """Verify the path in use now."""
        self.paths.suspect()

    def replace(self) -> None:
        """Make a fresh SA over the path in use, before the old one ends."""
        sa = self.current
        if sa is not None and self._connecting is None:
            self._connecting = self._services.tasks.start(self._reconnect(sa), f"replace SA {self.name}")

    async def _reconnect(self, sa: LiveSa) -> None:
        shared = self._services.underlay.port
        path = any_local(sa.path.remote, shared) if sa.relay is None and sa.path.local.port == shared else sa.path
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
