"""Brings peers that stay relayed to the relay that is nearest to both, by round trips that both measured.

The first relay is the one that was quickest to get: nothing waits for a better one. When a session has been relayed
for some seconds, the SA's initiator measures its round trips to the hubs of the document, asks the peer for its own,
adds them up, and when another hub is clearly nearer gets a relay there and moves the SA. What the peer says may be
wrong; it can choose between hubs for its own traffic by that, and no more.

    initiator -> responder   RTTS_WANTED
    responder -> initiator   RTTS    count(1), then per hub: peer ID(20), round trip in units of 0.1 ms(2)
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Protocol

from p2pvpn.core.address import Endpoint
from p2pvpn.core.errors import P2pvpnError, WireError
from p2pvpn.core.ids import PEER_ID_BYTES, PeerId
from p2pvpn.core.wire import Reader
from p2pvpn.ike.notifies import Notify

from .attach import Attachments, Hub
from .live import LiveSa, PathKind
from .notices import RTTS, RTTS_WANTED, find
from .rendezvous import Rendezvous
from .services import Services
from .session import Session
from .standing import Standing

SETTLE_S = 3.0
"""Punching has had its first chances by then."""
PERIOD_S = 300.0
"""Between comparisons of one session: distances change when somebody moves, and then there is a new one anyway."""
ANSWER_PAUSE_S = 10.0
"""Between answers to one peer."""
FRESH_S = 60.0
"""A measurement serves all sessions for so long."""
MAX_HUBS = 8
"""Of a document, in its order, so that both ends measure the same."""
GAIN_S, GAIN_PART = 0.010, 0.2
"""By so much, and by such a part, the other relay has to be nearer: a move costs packets of a call."""
CONNECT_S = 3.0
"""For a tunnel to a hub that we are not attached to."""
CONNECT_LOOK_S = 0.05
UNIT_S = 0.0001
MAX_UNITS = 0xFFFF
DEFAULT_PORT = 4500


@dataclass(slots=True)
class _Talk:
    """About one session that is relayed since then."""

    since: float
    next_at: float = 0.0
    answered_at: float | None = None


class Sessions(Protocol):
    """Of the network."""

    def session(self, overlay: IPv6Address) -> Session:
        """The session with an overlay address, made when there is none."""
        ...


class NearestRelay:
    """One network's comparisons."""

    def __init__(
        self,
        services: Services,
        standing: Standing,
        attachments: Attachments,
        rendezvous: Rendezvous,
        sessions: Sessions,
    ) -> None:
        self._services = services
        self._standing = standing
        self._attachments = attachments
        self._rendezvous = rendezvous
        self._sessions = sessions
        self._talks: dict[IPv6Address, _Talk] = {}
        self._measured: dict[PeerId, float] = {}
        self._measured_at: float | None = None
        self._measuring = asyncio.Lock()

    def look(self, sessions: Iterable[Session]) -> None:
        """Once a second or so: which of the sessions are relayed, and for how long?"""
        for session in sessions:
            self._look(session)

    def network_changed(self) -> None:
        """We are elsewhere, and so are the hubs."""
        self._talks.clear()
        self._measured_at = None

    def heard(self, session: Session, notifies: tuple[Notify, ...]) -> None:
        """What a peer said inside IKE; most of it is not for us."""
        sa = session.current
        if sa is None or session.path_kind is not PathKind.RELAYED or session.with_hub:
            return
        talk = self._talk(session)
        now = self._services.now
        may_answer = talk.answered_at is None or now - talk.answered_at >= ANSWER_PAUSE_S
        if find(notifies, RTTS_WANTED) is not None and not sa.initiator and may_answer:
            talk.answered_at = now
            self._services.tasks.start(self._answer(sa), f"round trips for {session.name}")
        data = find(notifies, RTTS)
        if data is not None and sa.initiator:
            try:
                theirs = decode_untrusted(data)
            except WireError:
                return
            self._services.tasks.start(self._compare(session, sa, theirs), f"nearest relay to {session.name}")

    def _talk(self, session: Session) -> _Talk:
        return self._talks.setdefault(session.overlay, _Talk(self._services.now))

    def _look(self, session: Session) -> None:
        sa = session.current
        if sa is None or session.path_kind is not PathKind.RELAYED or session.with_hub:
            self._talks.pop(session.overlay, None)
            return
        talk, now = self._talk(session), self._services.now
        if sa.initiator and now - talk.since >= SETTLE_S and now >= talk.next_at:
            talk.next_at = now + PERIOD_S
            self._services.ike.inform(sa.id, (Notify(RTTS_WANTED),))

    async def _answer(self, sa: LiveSa) -> None:
        ours = await self._round_trips()
        self._services.ike.inform(sa.id, (Notify(RTTS, encode(ours)),))

    async def _compare(self, session: Session, sa: LiveSa, theirs: Mapping[PeerId, float]) -> None:
        """Move the SA to the hub with the least sum, when that is worth it."""
        ours = await self._round_trips()
        sums = {hub: ours[hub] + theirs[hub] for hub in ours.keys() & theirs.keys()}
        used = self._hub_of(sa.relay.relay.host) if sa.relay is not None else None
        if used is None or used not in sums:
            return
        best = nearest(sums, used, [hub.peer_id for hub in self._reachable()])
        if best is None:
            return
        hub = next(hub for hub in self._attachments.hubs if hub.peer_id == best)
        if not await self._attach(hub):
            return
        try:
            relay = await self._rendezvous.relay_by(hub, session.overlay)
        except P2pvpnError:
            return  # What there is serves on.
        session.paths.take_relay(sa, relay, f"{hub.name} is nearer")

    def _reachable(self) -> list[Hub]:
        """Hubs that may be asked: all, as long as we hold no tunnel more than we want to."""
        connected = self._attachments.connected()
        return connected if len(connected) > self._services.tuning.hubs_wanted else self._attachments.hubs

    async def _attach(self, hub: Hub) -> bool:
        session = self._sessions.session(hub.overlay)
        session.want()
        for _ in range(int(CONNECT_S / CONNECT_LOOK_S)):
            if session.connected:
                return True
            await asyncio.sleep(CONNECT_LOOK_S)
        return False

    # Measuring.

    def _places(self) -> dict[Endpoint, PeerId]:
        """Where the document's hubs answer STUN."""
        places = {}
        for entry in self._standing.document.hubs[:MAX_HUBS]:
            for endpoint in entry.endpoints(DEFAULT_PORT)[:1]:
                places[endpoint] = entry.peer_id
        return places

    def _hub_of(self, host: str) -> PeerId | None:
        return next(
            (
                entry.peer_id
                for entry in self._standing.document.hubs
                if host in {endpoint.host for endpoint in entry.endpoints(DEFAULT_PORT)}
            ),
            None,
        )

    async def _round_trips(self) -> dict[PeerId, float]:
        async with self._measuring:
            now = self._services.now
            if self._measured_at is None or now - self._measured_at >= FRESH_S:
                places = self._places()
                found = await self._services.sampler.round_trips(list(places))
                self._measured = {places[endpoint]: rtt_s for endpoint, rtt_s in found.items()}
                self._measured_at = now
            return self._measured


def nearest(sums: Mapping[PeerId, float], used: PeerId, allowed: list[PeerId]) -> PeerId | None:
    """The hub with the least sum of round trips, if it is clearly nearer than the one in use."""
    best = min((hub for hub in allowed if hub in sums), key=lambda hub: (sums[hub], hub), default=used)
    gain_s = sums[used] - sums[best]
    return best if best != used and gain_s >= max(GAIN_S, GAIN_PART * sums[used]) else None


def encode(round_trips: Mapping[PeerId, float]) -> bytes:
    """Wire bytes of RTTS."""
    entries = sorted(round_trips.items())[:MAX_HUBS]
    body = b"".join(bytes(hub) + min(int(rtt_s / UNIT_S), MAX_UNITS).to_bytes(2, "big") for hub, rtt_s in entries)
    return bytes((len(entries),)) + body


def decode_untrusted(data: bytes) -> dict[PeerId, float]:
    """The inverse of `encode`. Raises WireError."""
    reader = Reader(data)
    count = reader.u8()
    if count > MAX_HUBS:
        raise WireError(f"round trips to {count} hubs")
    found = {PeerId(reader.take(PEER_ID_BYTES)): reader.u16() * UNIT_S for _ in range(count)}
    reader.end()
    return found
