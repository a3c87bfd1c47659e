"""Keeps tunnels to enough hubs: two for a peer, all of them for a hub.

Which two: the order is drawn from the peer's overlay address, so that peers spread over the hubs, and whoever wants to
call a peer knows which hubs to ask first without a look-up. A hub that failed goes to the end of the line. One task
watches; whatever ends a tunnel wakes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Protocol

from p2pvpn.core.ids import PeerId

from .backoff import Backoff
from .services import Services


@dataclass(frozen=True, slots=True)
class Hub:
    """A hub of the network document."""

    peer_id: PeerId
    name: str
    overlay: IPv6Address


def preference(peer: IPv6Address, hub: PeerId) -> bytes:
    """Orders the hubs for one peer, the least first: rendezvous hashing."""
    return hashlib.sha256(peer.packed + hub).digest()


SURPLUS_S = 60.0
"""A tunnel more than wanted is kept for so long: it took the place of a hub that was silent for a moment."""


class HubSession(Protocol):
    """What attachments need of a session."""

    @property
    def connected(self) -> bool: ...

    @property
    def is_silent(self) -> bool: ...

    def want(self) -> None: ...

    def disconnect(self, reason: str) -> None: ...


class Attachments:
    """Decides which hubs to be attached to, and tries until it is so."""

    def __init__(
        self, services: Services, me: IPv6Address, wanted: int | None, session: Callable[[IPv6Address], HubSession]
    ):
        """`wanted` None means every hub."""
        self._services = services
        self._me = me
        self._wanted = wanted
        self._session = session
        self._hubs: dict[IPv6Address, Hub] = {}
        self._failures: dict[IPv6Address, int] = {}
        self._up: set[IPv6Address] = set()
        self._wake = asyncio.Event()
        self._news = asyncio.Event()
        self._backoff = Backoff(services.tuning.retry_first_s, services.tuning.retry_max_s, services.entropy)

    def set_hubs(self, hubs: Sequence[Hub]) -> None:
        """The hubs of a new document, without ourselves."""
        self._hubs = {hub.overlay: hub for hub in hubs if hub.overlay != self._me}
        self._failures = {overlay: count for overlay, count in self._failures.items() if overlay in self._hubs}
        self.wake()

    def wake(self) -> None:
        """Something changed: look again now, without a back-off."""
        self._backoff.reset()
        self._wake.set()

    def look(self) -> None:
        """A tunnel is in doubt: look again now."""
        self._wake.set()

    def forgive(self) -> None:
        """What failed did so because of us (the machine slept): the order of the hubs is the first one again."""
        self._failures.clear()
        self.wake()

    async def any_attached(self, limit_s: float) -> None:
        """Wait for a tunnel to any hub, for so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while not self.connected():
                    self._news.clear()
                    await self._news.wait()

    def lost(self, overlay: IPv6Address) -> None:
        """A tunnel to a hub ended, or an attempt failed."""
        if overlay in self._hubs:
            self._up.discard(overlay)
            self._failures[overlay] = self._failures.get(overlay, 0) + 1
            self._wake.set()

    def attached(self, overlay: IPv6Address) -> bool:
        """A tunnel to a hub came up; whether that is news."""
        self._news.set()
        news = overlay not in self._up
        self._up.add(overlay)
        self._failures.pop(overlay, None)
        self._backoff.reset()
        self._wake.set()
        return news

    @property
    def hubs(self) -> list[Hub]:
        return list(self._hubs.values())

    def connected(self) -> list[Hub]:
        """Hubs we have a tunnel to, in our order of preference."""
        return [hub for hub in self._ordered() if self._session(hub.overlay).connected]

    def hub_at(self, overlay: IPv6Address) -> Hub | None:
        return self._hubs.get(overlay)

    def _ordered(self) -> list[Hub]:
        def rank(hub: Hub) -> tuple[int, bytes]:
            return self._failures.get(hub.overlay, 0), preference(self._me, hub.peer_id)

        return sorted(self._hubs.values(), key=rank)

    async def run(self) -> None:
        """Keep attached until cancelled."""
        while True:
            missing = self._start_missing()
            crowded = self._wanted is not None and len(self.connected()) > self._wanted
            self._wake.clear()
            try:
                pause_s = self._backoff.next_pause() if missing else SURPLUS_S if crowded else None
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()
            except TimeoutError:
                for session in self._surplus():
                    session.disconnect("enough hubs")

    def _surplus(self) -> list[HubSession]:
        """Tunnels more than wanted, when all of them work."""
        sessions = [self._session(hub.overlay) for hub in self.connected()]
        if self._wanted is None or any(session.is_silent for session in sessions):
            return []
        return sessions[self._wanted :]

    def _start_missing(self) -> bool:
        """Begin with as many hubs as are missing; whether any is missing."""
        ordered = self._ordered()
        sessions = [self._session(hub.overlay) for hub in ordered]
        up = sum(session.connected and not session.is_silent for session in sessions)
        wanted = len(ordered) if self._wanted is None else min(self._wanted, len(ordered))
        missing = wanted - up
        for hub in ordered:
            if missing <= 0:
                break
            session = self._session(hub.overlay)
            if not session.connected:
                session.want()
                missing -= 1
        return up < wanted
