"""Keeps learning what the NAT in front of us is like, with sockets of its own, and makes the engine send accordingly.

    once per network     whose packets come in (filtering), whether it turns packets around (hairpin)
    all the time         how long a silent binding lives; kept by network attachment, so that it is learned once
    used for             the pause between the packets that keep bindings: to the hubs' STUN service, and to relays

A binding is tried so: three exchanges with a hub from a fresh socket, as many NATs keep only busy bindings for long;
silence; then the hub knocks, asked through the tunnel. When no knock comes, the same is done without the silence, so
that a lost packet or a hub that cannot knock is not taken for a lost binding.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv6Address

from p2pvpn.core.address import Endpoint, Path, any_local
from p2pvpn.core.errors import LocalError, P2pvpnError
from p2pvpn.core.ids import PeerId
from p2pvpn.dht.rpc import RpcNode, RpcRefusedError
from p2pvpn.punch.behaviour import Filtering, Mapping, NatBehaviour
from p2pvpn.punch.filtering import judge, knock, knock_untrusted
from p2pvpn.punch.lifetime import LifetimeSearch
from p2pvpn.punch.reflexive import STUN_PORTS, ReflexiveProbe

from .knocks import KNOCK, ask
from .ports import StateStore
from .probing import ProbeSocket, Seen
from .services import Services

log = logging.getLogger(__name__)

FILE = "nat-lifetimes"
MAX_ATTACHMENTS = 32
"""Networks whose NAT is remembered; the one longest unused is forgotten."""
MAX_FILE_BYTES = 16_384
LOOK_S = 2.0
"""Between looks for a hub, until there is one."""
SETTLE_S = 5.0
"""After the first hub: others follow, and connecting goes first."""
WARM, WARM_S = 3, 1.5
"""Exchanges that make a binding a busy one (Linux: answered, and used for more than two seconds)."""
KNOCK_TRIES, KNOCK_S = 2, 0.8
"""Each asks for one knock and waits so long for it: a round trip through the tunnel and half of one back."""
SURE_TRIES = 4
"""The same when a binding's death is at stake."""
HAIRPIN_TRIES, HAIRPIN_S = 3, 0.3
VOID_S = 60.0
"""Pause after a trial that told nothing, doubled each time up to an hour."""
VOID_MAX_S = 3600.0


@dataclass(frozen=True, slots=True)
class HubEnd:
    """A hub that we have a tunnel to: where it is, and how it is asked."""

    name: str
    peer_id: PeerId
    overlay: IPv6Address
    endpoint: Endpoint
    rpc: RpcNode


class NatWatch:
    """`hubs` are those that there are tunnels to, of all networks; `apply` is told when `refresh_s` is another one."""

    def __init__(
        self,
        services: Services,
        probe: ReflexiveProbe,
        hubs: Callable[[], Iterable[HubEnd]],
        apply: Callable[[float], None],
    ) -> None:
        self._services = services
        self._probe = probe
        self._hubs = hubs
        self._apply = apply
        self._sockets: dict[int, ProbeSocket] = {}
        self._knocks: dict[bytes, asyncio.Future[Endpoint]] = {}
        """Expected at the shared socket."""
        self._stores: list[StateStore] = []
        self._task: asyncio.Task[None] | None = None
        self.search = LifetimeSearch()
        self.attachment = ""
        self._was_inside = self._inside()

    # Life.

    def start(self, store: StateStore) -> None:
        """Begin, or go on; what is learned is kept in `store` too."""
        self._stores.append(store)
        if self._task is None:
            self._begin()

    def stop(self, store: StateStore) -> None:
        """The store's network is gone."""
        self._stores.remove(store)
        if not self._stores:
            self.close()

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def network_changed(self) -> bool:
        """Something changed. Where it is our networks or routers it may be another NAT, of which nothing is assumed;
        whether it is.
        """
        inside = self._inside()
        if inside == self._was_inside:
            return False
        self._was_inside = inside
        self.attachment = ""
        self._use(LifetimeSearch())
        if self._task is not None:
            self._task.cancel()
            self._begin()
        return True

    def _begin(self) -> None:
        self._task = self._services.tasks.start(self._run(), "NAT watch")

    def handle(self, path: Path, data: bytes) -> bool:
        """Offer an inbound datagram; whether it was for a measurement."""
        socket = self._sockets.get(path.local.port)
        if socket is not None:
            socket.handle(path, data)
            return True
        came = self._knocks.get(data[8:20])
        if came is None or knock_untrusted(data) is None:
            return False
        if not came.done():
            came.set_result(path.remote)
        return True

    def behaviour(self, ipv6: bool = False) -> NatBehaviour:
        """All that is known of one family's NAT."""
        return self._probe.behaviour(ipv6)

    def lost(self, silent_s: float) -> None:
        """A mapping in use became another one after it was silent for so long."""
        before = self.search.refresh_s
        self.search.lost(silent_s)
        if self.search.refresh_s != before:
            self._learned()

    @contextmanager
    def socket(self, *, ipv6: bool) -> Iterator[ProbeSocket]:
        """A socket to measure with. Raises LocalError."""
        with ProbeSocket(self._services.underlay, self._services.entropy, ipv6=ipv6) as socket:
            self._sockets[socket.port] = socket
            try:
                yield socket
            finally:
                del self._sockets[socket.port]

    # The story.

    async def _run(self) -> None:
        void_s = VOID_S
        while True:
            hub = await self._some_hub()
            if self._where() != self.attachment:
                await asyncio.sleep(SETTLE_S)
                if (arrived := self._arrive()) is None:
                    continue
                await self.look(arrived)
            await asyncio.sleep(self.search.pause_s())
            silence_s = self.search.next_silence()
            search = self.search
            alive = await self._try_silence(hub, silence_s)
            if search is not self.search or alive is None:
                await asyncio.sleep(void_s if alive is None else 0.0)
                void_s = min(2 * void_s, VOID_MAX_S)
                continue
            void_s = VOID_S
            (search.lived if alive else search.died)(silence_s)
            self._learned()

    async def _some_hub(self) -> HubEnd:
        while True:
            for hub in self._hubs():
                if hub.endpoint in self._probe.seen_by():
                    return hub
            await asyncio.sleep(LOOK_S)

    def _where(self) -> str:
        """The network that we are in: its outer address, its router and the networks inside."""
        outer = sorted({seen.host for seen in self._probe.seen_by().values()})
        return f"{' '.join(outer[:2])} | {self._inside()}"[:200]

    def _inside(self) -> str:
        """Our routers and networks."""
        underlay = self._services.underlay
        return f"{' '.join(underlay.gateways())} | {' '.join(map(str, underlay.local_networks()))}"

    def _arrive(self) -> HubEnd | None:
        """Take up what is known of this network."""
        hub = next((hub for hub in self._hubs() if hub.endpoint in self._probe.seen_by()), None)
        if hub is None:
            return None
        self.attachment = self._where()
        self._use(LifetimeSearch.of_dict(self._read().get(self.attachment)))
        return hub

    def hub_of(self, ipv6: bool) -> HubEnd | None:
        """A hub that we have a tunnel of this family to, and that answers STUN."""
        answered = self._probe.seen_by()
        return next((hub for hub in self._hubs() if hub.endpoint.is_ipv6 == ipv6 and hub.endpoint in answered), None)

    async def look(self, hub: HubEnd) -> bool:
        """Filtering and hairpin, of the family that the tunnel to this hub uses; whether they could be looked at."""
        ipv6 = hub.endpoint.is_ipv6
        try:
            with self.socket(ipv6=ipv6) as socket:
                seen = await socket.ask(hub.endpoint)
                filtering, hairpin = await asyncio.gather(
                    self.filtering(socket, hub, seen), self._hairpin(socket, seen)
                )
        except P2pvpnError as problem:
            log.debug("the NAT was not looked at: %s", problem)
            return False
        self._probe.note_sample(socket.port, hub.endpoint, seen.endpoint)
        self._probe.note_sight(ipv6, filtering, hairpin)
        return True

    async def filtering(self, socket: ProbeSocket, hub: HubEnd, seen: Seen) -> Filtering:
        """Whose packets come to a socket that wrote to one port of one hub only. Raises P2pvpnError."""
        others = [one for one in self._hubs() if one.rpc is hub.rpc and one.endpoint.is_ipv6 == hub.endpoint.is_ipv6]
        other = next((one for one in others if one.endpoint.host != hub.endpoint.host), None)
        ports = [port for port in STUN_PORTS if port != hub.endpoint.port]
        same, from_port, from_hub = await asyncio.gather(
            self._knocked(socket, hub, seen),
            self._knocked_from_port(socket, hub, seen, ports),
            self._knocked(socket, hub, seen, other=other),
        )
        return judge(same=bool(same), other_port=from_port, other_hub=None if other is None else from_hub)

    async def _knocked_from_port(self, socket: ProbeSocket, hub: HubEnd, seen: Seen, ports: list[int]) -> bool | None:
        """From the first of these ports that the hub has; None when it has none."""
        for port in ports:
            came = await self._knocked(socket, hub, seen, port=port)
            if came is not None:
                return came
        return None

    async def _knocked(
        self,
        socket: ProbeSocket,
        hub: HubEnd,
        seen: Seen,
        *,
        port: int = 0,
        other: HubEnd | None = None,
        tries: int = KNOCK_TRIES,
    ) -> bool | None:
        """Whether a knock came in from where it was asked for; None when the hub could not knock."""
        asked = False
        for _ in range(tries):
            transaction, came = socket.expect()
            args = ask(seen.endpoint, seen.proof, transaction, port, bytes(other.peer_id) if other else b"")
            try:
                await hub.rpc.request(hub.overlay, KNOCK, args, timeout=KNOCK_S)
                asked = True
            except RpcRefusedError:
                return None
            except P2pvpnError:
                continue
            try:
                async with asyncio.timeout(KNOCK_S):
                    source = await came
            except TimeoutError:
                continue
            if other is not None:
                return source.host != hub.endpoint.host
            return source == Endpoint(hub.endpoint.host, port or hub.endpoint.port)
        return False if asked else None

    async def _hairpin(self, socket: ProbeSocket, seen: Seen) -> bool | None:
        """Whether two of our sockets reach each other at their outer addresses, which both write to: filters let it in
        then. None where there is no NAT, or none that two hubs agree on.
        """
        ipv6 = seen.endpoint.is_ipv6
        outer = {one for one in self._probe.seen_by().values() if one.is_ipv6 == ipv6}
        if self._probe.mapping(ipv6) is not Mapping.ENDPOINT_INDEPENDENT or len(outer) != 1:
            return None
        (shared,) = outer
        transaction, came = socket.expect()
        self._knocks[transaction] = came
        underlay = self._services.underlay
        try:
            for _ in range(HAIRPIN_TRIES):
                underlay.send(socket.path(shared), knock(transaction))
                underlay.send(any_local(seen.endpoint, underlay.port), knock(transaction))
                try:
                    async with asyncio.timeout(HAIRPIN_S):
                        await asyncio.shield(came)
                    return True
                except TimeoutError:
                    continue
        finally:
            del self._knocks[transaction]
        return False

    async def _try_silence(self, hub: HubEnd, silence_s: float) -> bool | None:
        """Whether a binding outlives the silence; None when that could not be found out."""
        try:
            with self.socket(ipv6=hub.endpoint.is_ipv6) as socket:
                seen = await socket.ask(hub.endpoint)
                for _ in range(WARM - 1):
                    await asyncio.sleep(WARM_S)
                    seen = await socket.ask(hub.endpoint)
                await asyncio.sleep(silence_s)
                if await self._knocked(socket, hub, seen, tries=SURE_TRIES):
                    return True
                seen = await socket.ask(hub.endpoint)
                return False if await self._knocked(socket, hub, seen, tries=SURE_TRIES) else None
        except (P2pvpnError, LocalError) as problem:
            log.debug("a silence of %.0f s was not tried: %s", silence_s, problem)
            return None

    # What was learned.

    def _use(self, search: LifetimeSearch) -> None:
        self.search = search
        self._tell()

    def _learned(self) -> None:
        self._tell()
        self._write()

    def _tell(self) -> None:
        self._probe.note_lifetime(self.search.lifetime_s)
        self._apply(self.search.refresh_s)

    def _read(self) -> dict[str, object]:
        """What the first store that has the file says; nothing of it is trusted to make sense."""
        for store in self._stores:
            try:
                raw = store.read(FILE)
                value = json.loads(raw) if raw is not None and len(raw) <= MAX_FILE_BYTES else None
            except (LocalError, ValueError):
                continue
            if isinstance(value, dict):
                return value
        return {}

    def _write(self) -> None:
        known = self._read()
        known.pop(self.attachment, None)
        known[self.attachment] = self.search.as_dict()
        kept = dict(list(known.items())[-MAX_ATTACHMENTS:])
        for store in self._stores:
            try:
                store.write(FILE, json.dumps(kept).encode())
            except LocalError as problem:
                log.warning("what was learned of the NAT is not kept: %s", problem)
