"""How a connection begins, from the wish to the SA: dial, or call with IKE inside.

a hub                        dial it (`hub_dial`)
a peer whose locator we have
and says a public endpoint   dial that; silence for a second means: go on
any other peer               call it through a hub, with IKE_SA_INIT inside; go on with IKE over the relay that the
                             hub gives. The locator is looked up meanwhile, for when no hub takes the call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from typing import Protocol

from p2pvpn.core.address import Endpoint, Path, any_local
from p2pvpn.core.errors import P2pvpnError

from .relaying import RelayPath
from .services import Services

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

    async def finish(self, timeout_s: float) -> None:
        """Wait for the SA. Raises ConnectError."""
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(self.done)
        except TimeoutError:
            where = "" if self.path is None else f" from {self.path.remote}"
            raise ConnectError("IKE", f"no answer{where}") from None

    def begin_again(self, services: Services) -> None:
        """Forget the exchange without a word; another may begin."""
        if self.sa_id is not None and not self.done.done():
            services.ike.drop(self.sa_id, "abandoned")
        self.done.cancel()
        self.done = _outcome()
        self.sa_id = None


@dataclass(frozen=True, slots=True)
class Located:
    """Where a peer or hub answers strangers."""

    endpoints: tuple[Endpoint, ...]
    is_hub: bool


class Finder(Protocol):
    """What the story needs of the network."""

    def is_hub(self, overlay: IPv6Address) -> bool: ...

    async def locate(self, overlay: IPv6Address) -> Located: ...

    def known_endpoints(self, overlay: IPv6Address) -> tuple[Endpoint, ...]:
        """Where the peer answers strangers, as far as we know without asking."""
        ...

    async def dial_hub(self, attempt: Attempt, located: Located) -> None:
        """Bring an SA with a hub up, over UDP or TCP. Raises ConnectError."""
        ...

    async def line_to(self, overlay: IPv6Address) -> Path:
        """A stream to a hub, as a path. Raises ConnectError."""
        ...

    def tidy_lines(self, overlay: IPv6Address) -> None:
        """Give up the streams to a hub that no SA is on."""
        ...

    async def call(self, attempt: Attempt, tried: Sequence[str]) -> tuple[RelayPath, bytes]:
        """Begin IKE and call the peer with its first message: a relay that we bind to, with the peer invited to the
        other side, and the peer's answer if it gave one in time. Hubs at addresses that were `tried` are asked last.
        Raises ConnectError.
        """
        ...

    async def relay_anew(self, overlay: IPv6Address, dead: Endpoint) -> RelayPath:
        """A relay for a live SA whose path to `dead` died. Raises ConnectError."""
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
    if relay is not None:
        await _dial_over(finder, services, attempt, relay)
    elif finder.is_hub(attempt.overlay):
        await finder.dial_hub(attempt, await finder.locate(attempt.overlay))
    else:
        await _reach(finder, services, attempt)


async def _reach(finder: Finder, services: Services, attempt: Attempt) -> None:
    known = finder.known_endpoints(attempt.overlay)
    if known and await _dial_all(finder, services, attempt, Located(known, is_hub=False)):
        return
    locating = asyncio.create_task(finder.locate(attempt.overlay), name=f"locate {attempt.overlay}")
    try:
        try:
            await _dial_by_call(finder, services, attempt)
        except ConnectError:
            attempt.begin_again(services)
            if finder.is_connected(attempt.overlay):
                return
            located = await locating
            if located.endpoints == known or not await _dial_all(finder, services, attempt, located):
                raise
    finally:
        locating.cancel()
        await asyncio.gather(locating, return_exceptions=True)


async def _dial_by_call(finder: Finder, services: Services, attempt: Attempt) -> None:
    """Call the peer, and when it does not come, call it through another hub: the first may know an old place of it."""
    tried: list[str] = []
    while not finder.is_connected(attempt.overlay):
        relay, answer = await finder.call(attempt, tried)
        if finder.is_connected(attempt.overlay):
            attempt.begin_again(services)
            return
        try:
            await _go_on_over(services, attempt, relay, answer)
            return
        except ConnectError:
            tried.append(relay.host)
            attempt.begin_again(services)
            if len(tried) >= MAX_CALLS and not finder.is_connected(attempt.overlay):
                raise


async def _dial_all(finder: Finder, services: Services, attempt: Attempt, located: Located) -> bool:
    """Dial the endpoints of a peer one after another; whether one answered."""
    for endpoint in located.endpoints:
        attempt.path = any_local(endpoint, services.underlay.port)
        try:
            await finder.dial(attempt, services.tuning.direct_dial_timeout_s)
            return True
        except ConnectError:
            attempt.begin_again(services)
    return finder.is_connected(attempt.overlay)


async def _go_on_over(services: Services, attempt: Attempt, relay: RelayPath, answer: bytes) -> None:
    """IKE began inside the call and goes on over the relay."""
    sa_id = attempt.sa_id
    assert sa_id is not None
    attempt.path = relay.path
    services.ike.post(lambda now: services.ike.endpoint.go_on(sa_id, relay.path, answer, now))
    _watch(services, attempt, relay)
    await attempt.finish(services.tuning.relay_dial_timeout_s)


async def _dial_over(finder: Finder, services: Services, attempt: Attempt, relay: RelayPath) -> None:
    attempt.path = relay.path
    _watch(services, attempt, relay)
    await finder.dial(attempt, services.tuning.connect_timeout_s)


def _watch(services: Services, attempt: Attempt, relay: RelayPath) -> None:
    """IKE goes out right behind the bind, which the relay takes at once when it knows our address; if it did not, the
    message was lost, and goes again when the relay is bound.
    """

    def bound(at_once: bool) -> None:
        if not at_once and attempt.sa_id is not None:
            services.ike.resend(attempt.sa_id)

    relay.when_bound(bound, lambda: attempt.fail("the relay does not answer"))
