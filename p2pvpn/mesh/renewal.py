"""Our certificate is renewed at half of its life, from any issuer, for as long as it takes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from p2pvpn.core.errors import P2pvpnError
from p2pvpn.identity.profile import Profile

from .backoff import Backoff
from .events import CertificateRenewed, Refused
from .services import Services
from .standing import Standing

RETRY_FIRST_S, RETRY_MAX_S = 5.0, 3600.0
"""Days are left at half-life; an hour between attempts is often enough."""
LONGEST_SLEEP_S = 60.0
"""The wall clock may be set, or the machine may sleep: look again now and then."""

Renew = Callable[[Profile], Awaitable[None]]
"""Put a fresh certificate of one of the issuers into the profile. Raises P2pvpnError when none gave one."""


async def keep_renewed(services: Services, standing: Standing, renew: Renew, renewed: Callable[[], None]) -> None:
    """Renew in time until cancelled; `renewed` is told after each success."""
    backoff = Backoff(RETRY_FIRST_S, RETRY_MAX_S, services.entropy)
    while True:
        if standing.profile.is_granted:
            return  # The admin renews it, with a new grant.
        due_in = standing.profile.renew_at - services.wall()
        if due_in > 0:
            await asyncio.sleep(min(due_in, LONGEST_SLEEP_S))
            continue
        try:
            await renew(standing.profile)
            standing.renewed()
        except P2pvpnError as problem:
            services.emit(Refused(standing.label, "certificate renewal", str(problem)))
            await asyncio.sleep(backoff.next_pause())
            continue
        backoff.reset()
        services.emit(CertificateRenewed(standing.label, standing.me.not_after))
        renewed()
