"""The ways to one peer: relays at hand, punching for the direct one, and what to do when the one in use dies.

- The SA's initiator moves it (RFC 4555 section 3.5); the responder asks it to, over the relay. A path is left for the
  relay at hand as soon as one check of it is late, and taken again when it answers; if the peer does not answer over
  the relay either, a fresh one is taken, for which the peer is called.
- A call says whether we have an SA with the peer. A peer that has none any more (it crashed) begins anew over the
  relay; one that has it, and is its initiator, moves it there. So either end can save the other.
- A better path is taken when the punching agent nominates it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from ipaddress import IPv6Address
from typing import Any, Protocol

from p2pvpn.core.address import Endpoint, IpAddress, Path
from p2pvpn.core.errors import P2pvpnError, WireError
from p2pvpn.core.output import Output
from p2pvpn.identity.member import Member
from p2pvpn.ike.notifies import Notify
from p2pvpn.punch.agent import PunchAgent
from p2pvpn.punch.candidates import Candidate, decode_candidates_untrusted, encode_candidates
from p2pvpn.punch.credentials import derive
from p2pvpn.punch.events import PathLost, PathNominated, PathSilent, PunchFailed

from .backoff import Backoff
from .connect import Finder
from .detour import Detour
from .events import MeshEvent, PathChanged, Refused
from .hardnat import Context as HardNatContext
from .hardnat import HardNat
from .live import APART_MAX_S, APART_S, FORWARDED, LiveSa, PathKind
from .notices import CANDIDATES, MOVE_WANTED, find
from .pump import Pump
from .relaying import RelayPath
from .revival import revive
from .services import Services
from .waiting import set_within

ANSWER_S = 0.6
"""How long a peer may take to answer over a path that is fine as far as we can see, before another is tried."""
VERDICT_S = 0.3
"""A path that was doubted so lately is being verified."""
GIVE_UP_MOVES = 2
"""Fresh relays, agreed on with the peer a moment ago, over which an SA may not answer before it counts as lost."""
RETRY_MAX_S = 4.0
"""Between calls for a fresh relay."""


class Context(Finder, HardNatContext, Protocol):
    """What a session asks of its network."""

    label: str

    @property
    def me(self) -> Member: ...

    def emit(self, event: MeshEvent) -> None: ...

    def local_candidates(self) -> list[Candidate]: ...

    def name_of(self, overlay: IPv6Address) -> str: ...

    def hub_silent(self) -> None:
        """A hub that we are attached to says nothing."""
        ...


class Owner(Protocol):
    """What the paths ask of their session."""

    overlay: IPv6Address
    current: LiveSa | None
    last_failure: str

    @property
    def name(self) -> str: ...

    @property
    def sas(self) -> Mapping[int, LiveSa]: ...

    @property
    def with_hub(self) -> bool:
        """Whether one of us is a hub: then there is nothing to punch and no relay."""
        ...

    def begin_over(self, relay: RelayPath) -> None:
        """Begin anew, over this relay."""
        ...


class Paths:
    """One session's ways to its peer."""

    def __init__(self, services: Services, context: Context, owner: Owner) -> None:
        self._services = services
        self._context = context
        self._owner = owner
        self.relays: dict[Endpoint, RelayPath] = {}
        self._seen_at: IpAddress | None = None
        """Where a hub saw the peer, when it was last called."""
        self._rescue: asyncio.Task[None] | None = None
        self.is_hub_silent = False
        self.detour = Detour(services, context, owner, self)
        self.hard_nat = HardNat(services, context, owner)
        self._untold: tuple[Notify, ...] = ()
        """What the peer is to know as soon as there is a path again."""

    def kind(self, sa: LiveSa) -> PathKind:
        if sa.relayed:
            return PathKind.RELAYED
        pairs = [pair for pair in sa.agent.report() if pair.path.remote == sa.path.remote] if sa.agent else []
        used = next((pair for pair in pairs if pair.path == sa.path), pairs[0] if pairs else None)
        forwarded = used is not None and (used.local_kind in FORWARDED or used.remote_kind in FORWARDED)
        return PathKind.MAPPED if forwarded else PathKind.DIRECT

    def begun(self, sa: LiveSa, notifies: tuple[Notify, ...]) -> None:
        """A new SA: it has the relay that it began on at hand, and looks for a direct path with the candidates that
        came with it.
        """
        self._take_up(sa)
        self._start_punching(sa, notifies)

    def _take_up(self, sa: LiveSa) -> bool:
        """The SA is on its path now; whether that is a relay that it did not have at hand."""
        relay = self.relays.get(sa.path.remote)
        sa.relayed = relay is not None
        if relay is None:
            return False
        is_new = relay is not sa.relay
        relay.claimed = True
        sa.relay = relay
        return is_new

    def rtt_s(self, sa: LiveSa) -> float | None:
        """Round trip of the path in use, as last measured; seconds. Over a relay it is not known to the peer's end."""
        if sa.agent is not None and sa.agent.selected == sa.path:
            return next((pair.rtt_s for pair in sa.agent.report() if pair.path == sa.path), None)
        if sa.relay is not None and sa.path.remote == sa.relay.endpoint and sa.relay.rtt_s is not None:
            return 2.0 * sa.relay.rtt_s
        return None

    # Relays.

    def keep(self, relay: RelayPath, seen_at: IpAddress | None) -> None:
        """A relay to the peer, at which a hub saw the peer's tunnel come from `seen_at`."""
        self.relays[relay.endpoint] = relay
        relay.on_lost = self._relay_lost
        for sa in self._owner.sas.values():
            if sa.path.remote == relay.endpoint:  # The peer was quicker than the news of the relay.
                self._take_up(sa)
        if seen_at is not None:
            self._seen_at = seen_at
            for sa in self._owner.sas.values():
                if sa.agent is not None:
                    sa.agent.attest(str(seen_at))

    def drop_unclaimed(self, relay: RelayPath) -> None:
        """No SA began on it."""
        if not relay.claimed:
            self.relays.pop(relay.endpoint, None)
            relay.close()

    def _relay_lost(self, relay: RelayPath) -> None:
        """The hub that relayed does not answer any more."""
        self.relays.pop(relay.endpoint, None)
        for sa in self._owner.sas.values():
            if sa.relay is relay:
                sa.relay = None
            if sa is self._owner.current and sa.path.remote == relay.endpoint:
                self.fall_back("relay lost")

    def release(self) -> None:
        """Give back the relays that no SA has at hand."""
        used = {sa.relay for sa in self._owner.sas.values()}
        for endpoint, relay in list(self.relays.items()):
            if relay not in used and relay.claimed:
                relay.close()
                del self.relays[endpoint]

    # Punching.

    def _start_punching(self, sa: LiveSa, notifies: tuple[Notify, ...]) -> None:
        if self._owner.with_hub:
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
        if self._seen_at is not None:
            agent.attest(str(self._seen_at))
        sa.agent = agent
        sa.pump = Pump(agent, services.underlay, lambda output: self._on_punch(sa, output))
        services.punch.register(agent)
        services.agents[agent] = sa.pump
        remote = self._candidates_of(notifies)
        sa.pump.feed(agent.start(self._context.local_candidates(), remote, services.now))
        self.hard_nat.begun(sa, notifies)

    def end_punching(self, sa: LiveSa) -> None:
        self.hard_nat.ended(sa)
        if sa.agent is not None and sa.pump is not None:
            sa.pump.feed(sa.agent.close())
            sa.pump.close()
            self._services.punch.unregister(sa.agent)
            del self._services.agents[sa.agent]
            sa.agent = sa.pump = None

    def informed(self, sa: LiveSa, notifies: tuple[Notify, ...], path: Path) -> None:
        """The peer said something inside IKE: perhaps new candidates, or that it is not where we think."""
        if find(notifies, MOVE_WANTED) is not None and sa.initiator:
            self._move_as_wanted(sa, path)
        if find(notifies, CANDIDATES) is not None and sa.agent is not None and sa.pump is not None:
            sa.pump.feed(sa.agent.update_remote(self._candidates_of(notifies), self._services.now))
        self.hard_nat.informed(sa, notifies)

    def network_changed(self) -> None:
        """Another address, another chance: fresh candidates, and hubs learn where we are."""
        candidates = self._context.local_candidates()
        self.hard_nat.network_changed()
        for sa in self._owner.sas.values():
            if sa.agent is not None and sa.pump is not None:
                sa.pump.feed(sa.agent.update_local(candidates, self._services.now))
            elif sa.initiator:
                self._services.ike.move(sa.id, sa.path)
                if self._owner.with_hub:
                    self.suspect()
        rescue = self._rescue
        if rescue is not None and not rescue.done() and not self._owner.with_hub:
            rescue.cancel()  # It waits for answers that the old network owes us.
            self._rescue = None
            self.fall_back("the network changed")

    def _move_as_wanted(self, sa: LiveSa, path: Path) -> None:
        relay = self.relays.get(path.remote)
        if relay is not None:
            if self.kind(sa) is not PathKind.RELAYED:
                self.move(sa, relay.path, "the peer is cut off", eager=True)
        elif sa.agent is not None and sa.agent.selected:
            self._services.ike.move(sa.id, sa.agent.selected)

    def tell(self, sa: LiveSa, notifies: tuple[Notify, ...]) -> None:
        """Have the peer know this, over a path that works: a request that waits on a dead one is in the way."""
        if self.is_in_trouble:
            self._untold = notifies
        else:
            self._services.ike.inform(sa.id, notifies)

    def _candidates_of(self, notifies: tuple[Notify, ...]) -> tuple[Candidate, ...]:
        data = find(notifies, CANDIDATES)
        if data is None:
            return ()
        try:
            return decode_candidates_untrusted(data)
        except WireError as problem:
            self._context.emit(Refused(self._context.label, self._owner.name, f"candidates: {problem}"))
            return ()

    def _on_punch(self, sa: LiveSa, output: Output) -> None:
        match output:
            case PathNominated(path=path):
                self.hard_nat.nominated(path)
                if sa.initiator and sa.id in self._owner.sas:
                    self.move(sa, path, "better")
            case PathSilent(path=path):
                answers = sa.alive.is_set()  # to IKE, over the same path: one check got lost
                if sa is self._owner.current and sa.path == path and sa.relay is not None and not answers:
                    self.fall_back("a check was not answered")
            case PathLost(path=path, reason=reason):
                # It may be our own NAT that forgot us: the relay and the hubs should know our new address soon.
                self._services.suspect()
                for relay in self.relays.values():
                    relay.rebind()
                if sa is self._owner.current and sa.path == path:
                    self.fall_back(reason)
            case PunchFailed():
                pass  # The agent goes on by itself; the report shows it.

    # Moves.

    def move(self, sa: LiveSa, path: Path, reason: str, *, eager: bool = False) -> None:
        """Take an SA that we began to another path; `eager` when the old one is dead."""
        if path != sa.path:
            sa.move_reason = reason
            sa.settled.clear()
            self._services.ike.move(sa.id, path, eager=eager)

    def take_relay(self, sa: LiveSa, relay: RelayPath, reason: str) -> None:
        """A better relay, where the peer waits, for an SA of ours that is on another one still."""
        if sa is self._owner.current and sa.relayed and not self.is_in_trouble:
            self.move(sa, relay.path, reason)

    def moved(self, sa: LiveSa, path: Path) -> None:
        """MOBIKE moved an SA, by either side."""
        sa.path = path
        sa.settled.set()
        sa.alive.set()
        if self._take_up(sa):
            self.release()
        if self._untold and sa is self._owner.current:
            notifies, self._untold = self._untold, ()
            self._services.ike.inform(sa.id, notifies)
        if sa is self._owner.current:
            reason = sa.move_reason or ("better" if sa.initiator else "the peer moved it")
            sa.move_reason = ""
            label, name = self._context.label, self._owner.name
            remote = self._services.lines.show(path.remote)
            self._context.emit(PathChanged(label, name, self.kind(sa).value, remote, reason))

    def move_failed(self, sa: LiveSa, path: Path, reason: str) -> None:
        """The SA stays where it was. If that is dead too, try again over the relay."""
        sa.settled.set()
        self._owner.last_failure = f"move to {path.remote}: {reason}"
        works = sa.agent is not None and sa.agent.selected == sa.path
        if sa is self._owner.current and not works and self.kind(sa) is not PathKind.RELAYED:
            self.fall_back(reason)

    def reconcile(self, sa: LiveSa) -> None:
        """A move may get lost, on either side: then the SA is not where the punching agents are."""
        self.hard_nat.look()
        chosen = sa.agent.selected if sa.agent is not None else None
        if chosen is None or chosen.remote == sa.path.remote:
            sa.apart_until, sa.apart_s = None, APART_S
            return
        now = self._services.now
        if sa.apart_until is not None and now >= sa.apart_until:
            sa.apart_until = None
            if sa.initiator:
                self.move(sa, chosen, "better")
            else:
                self._services.ike.inform(sa.id, (Notify(MOVE_WANTED),))
        if sa.apart_until is None:
            sa.apart_until = now + sa.apart_s
            sa.apart_s = min(APART_MAX_S, 2 * sa.apart_s)

    # A path in doubt.

    def suspect(self) -> None:
        """The path in use may be dead: find out now rather than at the next consent check."""
        sa, now = self._owner.current, self._services.now
        if sa is None or now < sa.suspected_at + VERDICT_S:
            return
        sa.suspected_at = now
        sa.alive.clear()
        self._services.suspect()
        if sa.relay is not None:
            sa.relay.rebind()  # It carries the traffic, or is known to work when it is needed.
            if sa.path.remote == sa.relay.endpoint:
                self._begin(self._doubt(sa, sa.relay), "doubt the relay")
        elif self._owner.with_hub and sa.initiator and not self._context.me.is_hub:
            self._begin(self._doubt_hub(sa), "doubt the way to")
        if sa.agent is not None and sa.pump is not None and sa.agent.selected == sa.path:
            sa.pump.feed(sa.agent.verify(self._services.now))
        self._services.ike.probe(sa.id)

    async def _doubt(self, sa: LiveSa, relay: RelayPath) -> None:
        """The relayed path is silent: the relay may be dead, or the peer's side of it."""
        problem = "the relay does not answer"
        if await relay.confirm():
            problem = "the peer does not answer over the relay"
            if await set_within(sa.alive, ANSWER_S):
                return
        if sa is self._owner.current and sa.path.remote == relay.endpoint:
            sa.relay = None
            await self._save(sa, problem)

    async def _doubt_hub(self, sa: LiveSa) -> None:
        """A hub is silent: perhaps UDP does not reach it any more, or it does not know us any more."""
        if await set_within(sa.alive, self._services.tuning.stream_after_s):
            return
        self.is_hub_silent = True
        self._context.hub_silent()
        try:
            await asyncio.gather(revive(self._context, self._services, self._owner.overlay, sa), self.detour.take(sa))
        finally:
            self.is_hub_silent = False

    def fall_back(self, reason: str) -> None:
        """The path in use is dead: take the relay, the one we have or a new one."""
        sa = self._owner.current
        if sa is not None and not self._owner.with_hub:
            self._begin(self._save(sa, reason), "fall back")

    @property
    def is_in_trouble(self) -> bool:
        """Whether the path in use is being left or doubted."""
        return self._rescue is not None and not self._rescue.done()

    def resume(self, relay: RelayPath) -> None:
        """The peer called because our SA lost its path: meet it at this relay."""
        sa = self._owner.current
        if sa is None:
            self._owner.begin_over(relay)
        elif sa.initiator and not self._owner.with_hub:
            self.move(sa, relay.path, "the peer called", eager=True)

    def _begin(self, work: Coroutine[Any, Any, None], what: str) -> None:
        if self.is_in_trouble:
            work.close()
            return
        self._rescue = self._services.tasks.start(work, f"{what} {self._owner.name}")

    async def _save(self, sa: LiveSa, reason: str) -> None:
        """Bring an SA to a path that works."""
        dead = sa.path
        sa.alive.clear()
        await self._take_relay(sa, dead, reason)
        backoff = Backoff(self._services.tuning.retry_first_s, RETRY_MAX_S, self._services.entropy)
        unanswered = 0
        while self._is_stuck(sa, dead):
            try:
                relay = await self._context.relay_anew(self._owner.overlay, dead.remote)
            except P2pvpnError as problem:
                self._owner.last_failure = f"fall back: {problem}"
                await asyncio.sleep(backoff.next_pause())
                continue
            if not self._is_stuck(sa, dead):
                return
            sa.relay = relay
            await self._go_to(sa, relay, reason, self._services.tuning.relay_dial_timeout_s)
            unanswered += 1
            if unanswered >= GIVE_UP_MOVES and self._is_stuck(sa, dead) and not sa.alive.is_set():
                self._services.ike.drop(sa.id, f"the peer does not know the SA any more: {reason}")
                return

    async def _take_relay(self, sa: LiveSa, dead: Path, reason: str) -> None:
        """Over to the relay at hand, if it works."""
        relay = sa.relay
        if relay is not None and relay.endpoint != dead.remote and await relay.confirm() and self._is_stuck(sa, dead):
            await self._go_to(sa, relay, reason, ANSWER_S)

    async def _go_to(self, sa: LiveSa, relay: RelayPath, reason: str, limit_s: float) -> None:
        """Move there, or ask the peer to; returns when that is done or took too long."""
        sa.settled.clear()
        if sa.initiator:
            self.move(sa, relay.path, reason, eager=True)
        else:
            sa.move_reason = reason
            candidates = Notify(CANDIDATES, encode_candidates(self._context.local_candidates()))
            self._services.ike.appeal(sa.id, relay.path, (Notify(MOVE_WANTED), candidates))
        await set_within(sa.settled, limit_s)

    def _is_stuck(self, sa: LiveSa, dead: Path) -> bool:
        """Whether the SA still has nothing but the path that died."""
        works_again = sa.agent is not None and sa.agent.selected == dead and not sa.agent.is_silent
        return sa is self._owner.current and sa.path == dead and not works_again
