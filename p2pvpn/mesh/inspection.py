"""Looks at every SA's counters now and then, closely at those with traffic; forgets sessions that came to nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from ipaddress import IPv6Address

from p2pvpn.core.errors import LocalError

from .ports import SaUsage
from .services import Services
from .session import Session


async def inspect(
    services: Services,
    sessions: dict[IPv6Address, Session],
    *,
    keep: Callable[[IPv6Address], bool],
    looked: Callable[[Collection[Session]], None],
) -> None:
    """Go on until cancelled. Idle sessions are dropped unless `keep` wants them; `looked` follows each look at all."""
    tuning = services.tuning
    inspect_at = services.now
    while True:
        busy = [session for session in sessions.values() if session.is_busy]
        await asyncio.sleep(tuning.watch_s if busy else max(tuning.watch_s, inspect_at - services.now))
        if services.now >= inspect_at:
            inspect_at = services.now + tuning.inspect_s
            await _look_at(services, list(sessions.values()), Session.inspect)
            looked(sessions.values())
            for overlay, session in list(sessions.items()):
                if session.idle and not keep(overlay):
                    del sessions[overlay]
        else:
            await _look_at(services, busy, Session.watch)


async def _look_at(services: Services, sessions: list[Session], look: Callable[[Session, SaUsage], None]) -> None:
    live = [session.current.child_id for session in sessions if session.current is not None]
    try:
        usage = await services.plane.usage(live)
    except LocalError:
        return  # the plane died; it is started anew, and every SA with it
    for session in sessions:
        if session.current is not None:
            look(session, usage.get(session.current.child_id, SaUsage()))
