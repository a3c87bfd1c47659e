"""One session's way over TCP where UDP does not pass, and back to UDP when it does (`fallback` says when)."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from p2pvpn.core.errors import P2pvpnError

from .connect import ConnectError
from .relaying import RelayPath
from .services import Services
from .waiting import set_within

if TYPE_CHECKING:
    from .live import LiveSa
    from .paths import Context, Owner, Paths

MOVE_S = 6.0
"""How long a move may take until it has failed."""


class Detour:
    """Of the tunnel to a hub, or of a relay to a peer."""

    def __init__(self, services: Services, context: Context, owner: Owner, paths: Paths) -> None:
        self._services = services
        self._context = context
        self._owner = owner
        self._paths = paths
        self._leaving: asyncio.Task[None] | None = None

    async def take(self, sa: LiveSa) -> None:
        """A hub is silent: move its SA to a stream, if there can be one, and if the hub is not heard meanwhile."""
        try:
            path = await self._context.line_to(self._owner.overlay)
            if sa is self._owner.current and not sa.alive.is_set():
                self._paths.move(sa, path, "UDP is silent")
                await set_within(sa.settled, MOVE_S)
        except ConnectError as problem:
            self._owner.last_failure = str(problem)
        finally:
            self._context.tidy_lines(self._owner.overlay)

    def leave(self) -> None:
        """UDP works again: replace a relay on a stream by one that is not, and move over."""
        sa = self._owner.current
        is_under_way = self._leaving is not None and not self._leaving.done()
        if sa is not None and sa.relay is not None and sa.relay.endpoint.is_stream and not is_under_way:
            self._leaving = self._services.tasks.start(
                self._replace_relay(sa, sa.relay), f"leave TCP to {self._owner.name}"
            )

    async def _replace_relay(self, sa: LiveSa, old: RelayPath) -> None:
        try:
            relay = await self._context.relay_anew(self._owner.overlay, old.endpoint)
        except P2pvpnError as problem:
            self._owner.last_failure = f"leave TCP: {problem}"
            return
        if sa is not self._owner.current or relay.endpoint.is_stream:
            return
        if sa.path.remote == old.endpoint:
            if sa.initiator:
                self._paths.move(sa, relay.path, "UDP works")
        elif sa.relay is old:
            relay.claimed = True
            sa.relay = relay
            self._paths.release()
