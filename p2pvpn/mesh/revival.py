"""A tunnel to a hub that stays silent: the hub restarted, gave us up while we slept, or is dead.

A second SA is begun beside the first one. When that comes up it takes over; when the first is heard of meanwhile, the
second is forgotten; when neither says a word, the first is dropped, so that another hub is attached to instead.
"""

from __future__ import annotations

import asyncio
from ipaddress import IPv6Address
from typing import Protocol

from p2pvpn.core.address import any_local

from .connect import Attempt, ConnectError
from .services import Services

REVIVE_S = 4.0
"""For the second SA: five packets. Another hub is attached to meanwhile, and back to this one leads a new dial."""


class Tunnel(Protocol):
    """What is known of the silent SA."""

    id: int
    alive: asyncio.Event
    """The hub was heard since it was doubted."""


class Dialler(Protocol):
    """Who runs IKE."""

    async def dial(self, attempt: Attempt, timeout_s: float) -> None: ...


async def revive(dialler: Dialler, services: Services, overlay: IPv6Address, tunnel: Tunnel) -> None:
    """Until the tunnel is heard of, replaced or dropped."""
    view = services.ike.endpoint.view(tunnel.id)
    if view is None:
        return
    udp = services.lines.udp_of(view.path.remote)
    attempt = Attempt(overlay, any_local(udp, services.underlay.port))
    dialling = asyncio.create_task(dialler.dial(attempt, REVIVE_S), name="dial beside")
    heard = asyncio.create_task(tunnel.alive.wait(), name="heard")
    try:
        await asyncio.wait((dialling, heard), return_when=asyncio.FIRST_COMPLETED)
        if not heard.done():
            await dialling
    except ConnectError as problem:
        if not tunnel.alive.is_set():
            services.ike.drop(tunnel.id, f"the hub does not answer: {problem}")
    finally:
        dialling.cancel()
        heard.cancel()
        await asyncio.gather(dialling, heard, return_exceptions=True)
        attempt.begin_again(services)
