"""A peer's side of relays: tickets become bound paths, which are kept, confirmed, moved and given back."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

from p2pvpn.core.address import Endpoint, Path, any_local
from p2pvpn.core.errors import RemoteError
from p2pvpn.core.output import Output
from p2pvpn.core.ports import Entropy
from p2pvpn.relay.client import MOST_REFRESH_S, RelayClients, RelayLost, RelayReady
from p2pvpn.relay.wire import RelayTicket

from .lines import Lines
from .ports import Underlay
from .pump import Pump

CONFIRM_MARGIN_S = 0.1
"""With two round trips: two or three packets to a relay that worked a moment ago. To be wrong costs one call."""
AT_ONCE_S = 0.001
FRESH_S = 0.2
"""A relay that answered so lately is taken to work."""


class RelayFailed(RemoteError):
    """The relay did not let us bind."""


class RelayPath:
    """One relay port of ours: `path` stands for the peer on the other side. `claimed` once an SA began on it."""

    def __init__(self, pump: RelayClientPump, path: Path, relay: Endpoint) -> None:
        self._pump = pump
        self.path = path
        self.relay = relay
        """The port on the hub; the path leads there, or to the stream that stands for it."""
        self.claimed = False
        self.answered_at = -math.inf
        self.on_lost: Callable[[RelayPath], None] | None = None
        self._bound: bool | None = None
        self._on_bound: Callable[[bool], None] | None = None
        self._on_unbound: Callable[[], None] | None = None
        self.on_silent: Callable[[RelayPath], None] | None = None
        """It never answered."""

    @property
    def endpoint(self) -> Endpoint:
        return self.path.remote

    @property
    def host(self) -> str:
        """The hub that relays."""
        return self.relay.host

    @property
    def rtt_s(self) -> float | None:
        return self._pump.rtt_of(self.endpoint)

    def when_bound(self, bound: Callable[[bool], None], failed: Callable[[], None]) -> None:
        """Call `bound` when the relay answered the first bind, with whether that was its first packet: what was sent
        behind it arrived then. Call `failed` if it never answers.
        """
        self._on_bound, self._on_unbound = bound, failed
        if self._bound is not None:
            bound(self._bound)

    def note_bound(self, at_once: bool) -> None:
        """The relay answered."""
        if self._bound is None:
            self._bound = at_once
            if self._on_bound is not None:
                self._on_bound(at_once)

    def note_lost(self) -> None:
        """The relay does not answer any more, or never did."""
        if self._bound is None:
            if self.on_silent is not None:
                self.on_silent(self)
            if self._on_unbound is not None:
                self._on_unbound()
        if self.on_lost is not None:
            self.on_lost(self)

    @property
    def is_bound(self) -> bool:
        return self._bound is not None

    def rebind(self) -> None:
        """Prove ourselves again at once; the old binding serves meanwhile."""
        self._pump.rebind(self.endpoint)

    async def confirm(self) -> bool:
        """Whether the relay knows us: it answered a moment ago, or answers a fresh bind."""
        if self._pump.now - self.answered_at < FRESH_S:
            return True
        try:
            await self._pump.confirm(self.endpoint)
        except RelayFailed:
            return False
        return True

    def close(self) -> None:
        self._pump.release(self.endpoint)


class RelayClientPump:
    """Drives all relay bindings of the machine."""

    def __init__(
        self, underlay: Underlay, entropy: Entropy, lines: Lines, timeout_s: float, confirm_timeout_s: float
    ) -> None:
        self._underlay = underlay
        self._lines = lines
        self._clients = RelayClients(entropy)
        self._pump = Pump(self._clients, underlay, self._on_output)
        self._paths: dict[Endpoint, RelayPath] = {}
        self._waiting: dict[Endpoint, list[asyncio.Future[None]]] = {}
        self._rtts: dict[Endpoint, float] = {}
        self._opened_at: dict[Endpoint, float] = {}
        self._timeout_s = timeout_s
        self._confirm_timeout_s = confirm_timeout_s

    @property
    def now(self) -> float:
        return self._pump.now

    @property
    def endpoints(self) -> dict[Endpoint, RelayPath]:
        """Relay endpoints in use: a path whose remote is one of them is a relayed path."""
        return self._paths

    def rtt_of(self, endpoint: Endpoint) -> float | None:
        return self._rtts.get(endpoint)

    async def bind(self, ticket: bytes, relays: Sequence[Endpoint], proven: str | None) -> RelayPath:
        """Bind at one of the relay's endpoints. At the host `proven`, where our tunnel to the hub goes, without waiting
        for the answer; else at the first that answers. Raises RelayFailed, or WireError for a bad ticket.
        """
        parsed = RelayTicket.decode_untrusted(ticket)
        usable = [relay for relay in relays if relay.port == parsed.port]
        problem = RelayFailed("the relay has no address that we can reach")
        for relay in sorted(usable, key=lambda relay: relay.host != proven):
            path = self._open(parsed, relay)
            if relay.host == proven:
                return path
            done = self._wait(relay)
            try:
                await self._within(done, self._timeout_s)
                return path
            except RelayFailed as failure:
                self.release(relay)
                problem = failure
        raise problem

    def bind_over(self, ticket: bytes, stream: Endpoint, relay: Endpoint) -> RelayPath:
        """Bind at the `relay` that a stream stands for, without waiting for the answer. Raises WireError."""
        return self._open(RelayTicket.decode_untrusted(ticket), relay, stream)

    def _open(self, ticket: RelayTicket, relay: Endpoint, stream: Endpoint | None = None) -> RelayPath:
        path = any_local(stream or relay, self._underlay.port)
        at = path.remote
        opened = self._paths[at] = RelayPath(self, path, relay)
        self._opened_at[at] = self._pump.now
        self._pump.feed(self._clients.open(ticket, path, self._pump.now))

        def check() -> None:
            if self._paths.get(at) is opened and not opened.is_bound:
                self.lose(at)

        asyncio.get_running_loop().call_later(self._timeout_s, check)
        return opened

    async def confirm(self, relay: Endpoint) -> None:
        """Raises RelayFailed unless the relay answers a fresh bind."""
        client = self._clients.at(relay)
        if client is None:
            raise RelayFailed("the relay is given up")
        done = self._wait(relay)
        self._pump.feed(client.rebind(self._pump.now))
        rtt_s = self._rtts.get(relay)
        patience_s = self._confirm_timeout_s if rtt_s is None else 2.0 * rtt_s + CONFIRM_MARGIN_S
        await self._within(done, min(patience_s, self._confirm_timeout_s))

    def rebind(self, relay: Endpoint) -> None:
        client = self._clients.at(relay)
        if client is not None:
            self._pump.feed(client.rebind(self._pump.now))

    def refresh_every(self, refresh_s: float) -> None:
        """NAT bindings want a packet so often."""
        if refresh_s < self._clients.refresh_s:
            self._clients.refresh_every(refresh_s)
            self.network_changed()
        else:
            self._clients.refresh_every(min(refresh_s, MOST_REFRESH_S))

    def network_changed(self) -> None:
        """Bind everything again: our address or our NAT may be another."""
        for path in self._paths.values():
            path.answered_at = -math.inf
        self._pump.feed(self._clients.network_changed(self._pump.now))

    def release(self, relay: Endpoint) -> None:
        self._clients.close(relay)
        self._paths.pop(relay, None)
        self._rtts.pop(relay, None)
        self._opened_at.pop(relay, None)
        self._settle(relay, RelayFailed("the relay was given up"))
        self._lines.leave(relay)

    def route(self, path: Path, data: bytes) -> bool:
        """Offer an inbound STUN datagram; whether it was for a relay binding."""
        outputs = self._clients.route(path, data, self._pump.now)
        if outputs is None:
            return False
        self._pump.feed(outputs)
        return True

    def close(self) -> None:
        for relay in list(self._paths):
            self.release(relay)
        self._pump.close()

    def _wait(self, relay: Endpoint) -> asyncio.Future[None]:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(relay, []).append(done)
        return done

    async def _within(self, done: asyncio.Future[None], timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await done
        except TimeoutError:
            raise RelayFailed("the relay does not answer") from None

    def _settle(self, relay: Endpoint, problem: RelayFailed | None) -> None:
        for done in self._waiting.pop(relay, []):
            if not done.done():
                if problem is None:
                    done.set_result(None)
                else:
                    done.set_exception(problem)

    def _on_output(self, output: Output) -> None:
        match output:
            case RelayReady(path=path, rtt_s=rtt_s):
                relay = path.remote
                self._rtts[relay] = rtt_s
                if relay in self._paths:
                    self._paths[relay].answered_at = self._pump.now
                self._settle(relay, None)
                if relay in self._paths:
                    elapsed_s = self._pump.now - self._opened_at[relay]
                    self._paths[relay].note_bound(elapsed_s <= rtt_s + AT_ONCE_S)
            case RelayLost(path=path):
                self.lose(path.remote)

    def lose(self, relay: Endpoint) -> None:
        """Nothing will come from there any more."""
        lost = self._paths.get(relay)
        self.release(relay)
        if lost is not None:
            lost.note_lost()
