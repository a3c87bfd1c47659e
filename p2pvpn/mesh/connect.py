"""How a connection begins, from the wish to the SA: locate, dial or call, IKE.

a hub                       dial its address from the network document
a peer with a public path   dial what its locator says; silence for a second means: go on
any other peer              call it through a hub, bind our side of the relay, run IKE over it
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from typing import TYPE_CHECKING, Protocol

from p2pvpn.core.address import Endpoint, Path, any_local
from p2pvpn.core.errors import P2pvpnError

from .relaying import RelayPath
from .services import Services

if TYPE_CHECKING:
    from .directory import Locator


MAX_CALLS = 3
"""Of one attempt; the next one follows after the back-off."""


class ConnectError(P2pvpnError):
    """An attempt ended at `step`."""

    def __init__(self, step: str, reason: str) -> None:
        super().__init__(reason)
        self.step = step


def _outcome() -> asyncio.Future[None]:
    """A future whose failure is no surprise if nobody waits for it any more."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.add_done_callback(lambda done: None if done.cancelled() else done.exception())
    return future


@dataclass(eq=False, slots=True)
class Attempt:
    """One try to bring an SA up; the tag of its IKE exchange."""

    overlay: IPv6Address
    path: Path | None = None
    sa_id: int | None = None
    started_at: float = field(default_factory=lambda: asyncio.get_running_loop().time())
    done: asyncio.Future[None] = field(default_factory=_outcome)

    def succeed(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def fail(self, reason: str) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectError("IKE", reason))

    def begin_again(self, services: Services) -> None:
        """Forget the exchange without a word; another may begin."""
        if self.sa_id is not None and not self.done.done():
            services.ike.drop(self.sa_id, "abandoned")
        self.done.cancel()
        self.done = _outcome()
        self.sa_id = None


@dataclass(frozen=True, slots=True)
class Located:
    """Where a peer may be found: endpoints that answer strangers, and for peers the locator with more."""

    endpoints: tuple[Endpoint, ...]
    locator: Locator | None

    @property
    def is_hub(self) -> bool:
        return self.locator is None


class Finder(Protocol):
    """What the story needs of the network."""

    async def locate(self, overlay: IPv6Address) -> Located: ...

    async def relay_to(self, locator: Locator, tried: Sequence[str]) -> RelayPath:
        """Call the peer: a relay that we bind to, with the peer invited to the other side. Hubs at addresses that were
        `tried` are asked last. Raises ConnectError.
        """
        ...

    async def relay_anew(self, overlay: IPv6Address, dead: Endpoint) -> RelayPath:
        """The same for a live SA whose path to `dead` died. Raises ConnectError."""
        ...

    def is_connected(self, overlay: IPv6Address) -> bool:
        """Whether the peer's own attempt came through meanwhile."""
        ...

    async def dial(self, attempt: Attempt, timeout_s: float) -> None:
        """Run IKE over the attempt's path until the SA is up. Raises ConnectError."""
        ...


async def connect(finder: Finder, services: Services, attempt: Attempt, relay: RelayPath | None = None) -> None:
    """Bring an SA with `attempt.overlay` up, over `relay` if there is one already. Raises ConnectError with the step
    that failed.
    """
    if relay is None:
        located = await finder.locate(attempt.overlay)
        if await _dial_all(finder, services, attempt, located) or finder.is_connected(attempt.overlay):
            return
        await _dial_by_call(finder, services, attempt, located)
    else:
        await _dial_over(finder, services, attempt, relay, services.tuning.connect_timeout_s)


async def _dial_by_call(finder: Finder, services: Services, attempt: Attempt, located: Located) -> None:
    """Call the peer, and when it does not come, call it through another hub: the first may know an old place of it."""
    assert located.locator is not None
    tried: list[str] = []
    while True:
        relay = await finder.relay_to(located.locator, tried)
        if finder.is_connected(attempt.overlay):
            return
        try:
            await _dial_over(finder, services, attempt, relay, services.tuning.relay_dial_timeout_s)
            return
        except ConnectError:
            tried.append(relay.endpoint.host)
            attempt.begin_again(services)
            if finder.is_connected(attempt.overlay):
                return
            if len(tried) >= MAX_CALLS:
                raise


async def _dial_all(finder: Finder, services: Services, attempt: Attempt, located: Located) -> bool:
    """Dial the endpoints one after another; whether one answered. Raises ConnectError when no hub's does."""
    tuning = services.tuning
    for endpoint in located.endpoints:
        attempt.path = any_local(endpoint, services.underlay.port)
        try:
            await finder.dial(attempt, tuning.hub_dial_timeout_s if located.is_hub else tuning.direct_dial_timeout_s)
            return True
        except ConnectError:
            if located.is_hub and endpoint == located.endpoints[-1]:
                raise
            attempt.begin_again(services)
    return False


async def _dial_over(finder: Finder, services: Services, attempt: Attempt, relay: RelayPath, timeout_s: float) -> None:
    """IKE goes out right behind the bind, which the relay takes at once when it knows our address; if it did not, the
    first message was lost, and goes again when the relay is bound.
    """

    def bound(at_once: bool) -> None:
        if not at_once and attempt.sa_id is not None:
            services.ike.resend(attempt.sa_id)

    attempt.path = relay.path
    relay.when_bound(bound, lambda: attempt.fail("the relay does not answer"))
    await finder.dial(attempt, timeout_s)
