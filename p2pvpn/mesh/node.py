"""One machine: the shared socket, the IKE machine, punching and relays, and the networks that use them.

datagram ->  IKE     -> ike driver  -> plane, session
             STUN    -> relay binding | punching agent | reflexive probe | reflector (on hubs)
packet   ->  trap    -> session of its destination
"""

from __future__ import annotations

import asyncio
import logging
from itertools import count

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.datagram import NON_ESP_MARKER, SPI_MARK, Kind, classify
from p2pvpn.core.output import Output
from p2pvpn.core.ports import Entropy, WallClock
from p2pvpn.dht.storage import Backend
from p2pvpn.identity.profile import Profile
from p2pvpn.ike.config import Credential, IkeSettings
from p2pvpn.ike.endpoint import IkeEndpoint
from p2pvpn.ike.outputs import (
    ChildRekeyed,
    Informed,
    InstallChild,
    Liveness,
    MoveFailed,
    Refused,
    RemoveChild,
    SaClosed,
    SaEstablished,
    SaFailed,
    SaMoved,
)
from p2pvpn.punch.behaviour import NatBehaviour
from p2pvpn.punch.candidates import Candidate
from p2pvpn.punch.limits import PunchLimits
from p2pvpn.punch.mux import PunchMux
from p2pvpn.punch.proof import Proofs
from p2pvpn.punch.reflector import Reflector
from p2pvpn.punch.reflexive import HubDoubted, ReflexiveLearned, ReflexiveLost, ReflexiveProbe

from .connect import Attempt
from .events import EventSink
from .ike_driver import IKE_PORT_WITHOUT_MARKER, IkeDriver
from .lines import Lines
from .natwatch import HubEnd, NatWatch
from .netcheck import NetCheck
from .network import Network
from .outside import Outside
from .ports import Forwarder, KeyLog, Plane, PortMapper, Resolver, StateStore, Streams, Underlay
from .pump import Pump
from .relaying import RelayClientPump
from .sampling import Sampler
from .services import Services
from .standing import Standing
from .trap import destination
from .tuning import Tuning

log = logging.getLogger(__name__)

SETTLE_S = 0.05
"""Changes of the network come in bunches."""
MOVE_TRIES = 3
"""Over a path that was just proven: gives up after 3 s, and another path is tried."""
PROOF_KEY_BYTES = 32
MAX_SPIS = 100_000
"""Beyond this, SPIs of negotiations that came to nothing are given back."""


class Node:
    """The engine of one machine, over the ports it is given."""

    def __init__(
        self,
        *,
        underlay: Underlay,
        plane: Plane,
        forwarder: Forwarder | None,
        streams: Streams | None = None,
        resolver: Resolver,
        entropy: Entropy,
        wall: WallClock,
        emit: EventSink,
        tuning: Tuning | None = None,
        key_log: KeyLog | None = None,
        port_mapper: PortMapper | None = None,
    ) -> None:
        tuning = tuning or Tuning()
        self._underlay = underlay
        self._resolver = resolver
        self._key_log = key_log
        self._entropy = entropy
        self._spis: dict[int, int] = {}
        """Child ID by inbound SPI; 0 while the SA is negotiated."""
        self._child_of: dict[int, int] = {}
        """Child ID by IKE SA."""
        self._network_of: dict[int, Network] = {}
        """Network by IKE SA."""
        children = count(1)
        settings = IkeSettings(
            liveness_s=tuning.liveness_s, nat_keepalive_s=None, move_tries=MOVE_TRIES, routable=self._is_proven
        )
        sink = key_log.line if key_log is not None else None
        endpoint = IkeEndpoint(settings, entropy, lambda: next(children), self._allocate_spi, sink)
        lines = Lines(streams, tuning.stream_linger_s)
        if streams is not None:
            streams.may_reach = self._may_reach
        self.services = Services(
            underlay=underlay,
            plane=plane,
            forwarder=forwarder,
            entropy=entropy,
            wall=wall,
            emit=emit,
            ike=IkeDriver(endpoint, underlay, plane, self._on_ike),
            punch=PunchMux(),
            punch_limits=PunchLimits(),
            relays=RelayClientPump(
                underlay, entropy, lines, tuning.relay_bind_timeout_s, tuning.relay_confirm_timeout_s
            ),
            lines=lines,
            tuning=tuning,
            sampler=Sampler(underlay, entropy),
            proofs=Proofs(entropy(PROOF_KEY_BYTES)),
            hub_used=self._hub_used,
        )
        self.networks: dict[str, Network] = {}
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._reflexive = ReflexiveProbe(underlay.port, entropy)
        self._reflexive_pump = Pump(self._reflexive, underlay, self._on_reflexive)
        self._port_mapper = port_mapper
        self.outside = Outside(underlay, self._reflexive, port_mapper, self.services.punch_limits.refuses)
        self._reflector = Reflector(self.services.proofs)
        self.nat_watch = NatWatch(self.services, self._reflexive, self._hub_ends, self._refresh_every)
        self.net_check = NetCheck(self.services, self.nat_watch, self.outside, self.networks.values, self._look_outside)
        self._stores: dict[str, StateStore] = {}
        """By the label of the network that is theirs."""
        self._settling: asyncio.TimerHandle | None = None
        self.services.suspect = self._look_outside
        underlay.on_datagram = self._on_datagram
        underlay.screen = self._screen
        underlay.on_change = self.network_changed
        underlay.on_resume = self._resumed
        plane.on_trapped = self._on_trapped
        plane.on_moved = self._on_moved
        if port_mapper is not None:
            port_mapper.on_change = self._moved_soon
        if forwarder is not None:
            forwarder.on_unbound = self._on_unbound

    # Life.

    async def start(self) -> None:
        """Begin to work; networks are added then."""
        self.services.tasks.start(self.services.ike.run(), "IKE")
        self.services.punch_limits.update_subnets(self._underlay.local_networks())
        if self._port_mapper is not None:
            self._port_mapper.start(self._underlay.port)

    async def add_network(self, profile: Profile, store: StateStore, backend: Backend | None = None) -> Network:
        """Bring a network up; it attaches to its hubs in the background. Raises LocalError when it cannot be opened."""
        standing = Standing(profile, store, self.services.wall)
        network = Network(self.services, standing, self._resolver, self, backend)
        self.networks[network.label] = network
        self._forbid_overlays()
        self.refresh_credentials()
        try:
            await network.open()
        except BaseException:
            del self.networks[network.label]
            self.refresh_credentials()
            raise
        if network.hub is None:
            self.nat_watch.start(store)
            self._stores[network.label] = store
        self._runs[network.label] = self.services.tasks.start(network.run(), f"network {standing.name}")
        return network

    async def remove_network(self, label: str) -> None:
        """Take a network down."""
        network = self.networks.pop(label)
        self._forbid_overlays()
        self._runs.pop(label).cancel()
        if (store := self._stores.pop(label, None)) is not None:
            self.nat_watch.stop(store)
        await network.close()
        self.refresh_credentials()

    async def close(self) -> None:
        """Say goodbye and let go of everything."""
        for label in list(self.networks):
            await self.remove_network(label)
        if self._settling is not None:
            self._settling.cancel()
        self._reflexive_pump.close()
        self.nat_watch.close()
        self.services.relays.close()
        self.services.lines.close()
        await self.services.tasks.close()

    async def plane_died(self) -> None:
        """Every SA is gone and never comes back: forget them, open the devices again, start afresh."""
        for network in self.networks.values():
            network.abandon("the plane failed")
        await self.services.ike.drained()
        for network in self.networks.values():
            await network.reopen()

    def _forbid_overlays(self) -> None:
        """No check goes to an overlay address: a path inside a tunnel is no path."""
        networks = self.networks.values()
        self.services.punch_limits.update_never([route for one in networks for route in one.standing.routes])

    def refresh_credentials(self) -> None:
        """Networks, certificates or documents changed."""
        credentials = [network.credential() for network in self.networks.values()]
        self.services.ike.post(lambda now: self._set_credentials(credentials))

    def _set_credentials(self, credentials: list[Credential]) -> list[Output]:
        self.services.ike.endpoint.set_credentials(credentials)
        return []

    def _allocate_spi(self) -> int:
        """An unused inbound SPI with the two top bits set, so that the kernel can sort ESP from the rest."""
        while True:
            spi = int.from_bytes(self._entropy(4), "big") | SPI_MARK
            if spi not in self._spis:
                if len(self._spis) > MAX_SPIS:
                    self._spis = {known: child for known, child in self._spis.items() if child}
                self._spis[spi] = 0
                return spi

    def ike_counters(self) -> dict[str, int]:
        """What strangers asked of us."""
        endpoint = self.services.ike.endpoint
        counts = endpoint.init_counts
        return {
            "init_requests": counts.requests,
            "cookies_asked": counts.cookies_asked,
            "half_open": endpoint.half_open,
        }

    def _is_proven(self, remote: Endpoint) -> bool:
        """Whether what is sent there reaches a peer: a relay that we bound to, or a path that answers our checks."""
        agents = self.services.agents
        return remote in self.services.relays.endpoints or any(
            agent.selected is not None and agent.selected.remote == remote and not agent.is_silent for agent in agents
        )

    # Inbound.

    def _screen(self, source: tuple[str, int], data: bytes) -> bytes | None:
        if data[:4] != NON_ESP_MARKER:
            return None
        answer = self.services.ike.endpoint.screen(source, data[4:], self.services.now)
        return NON_ESP_MARKER + answer if answer else answer

    def _on_datagram(self, path: Path, data: bytes) -> None:
        kind = classify(data)
        if kind is Kind.IKE:
            self.services.ike.receive(path, data[len(NON_ESP_MARKER) :])
        elif kind is Kind.STUN:
            self._on_stun(path, data)
        elif path.local.port == IKE_PORT_WITHOUT_MARKER:
            self.services.ike.receive(path, data)

    def _on_stun(self, path: Path, data: bytes) -> None:
        now = self.services.now
        if self.nat_watch.handle(path, data) or self.services.relays.route(path, data):
            return
        agent = self.services.punch.find_untrusted(data)
        if agent is not None:
            self.services.agents[agent].feed(self.services.punch.route(path, data, now) or [])
            return
        if self.services.sampler.route(path, data):
            return
        outputs = self._reflexive.handle(path, data, now)
        if outputs is not None:
            self._reflexive_pump.feed(outputs)
            for network in self.networks.values():
                network.fallback.heard(path.remote)
            return
        if any(network.hub is not None for network in self.networks.values()):
            answer = self._reflector.handle(path, data, now)
            if answer is not None:
                self._underlay.send(path, answer)

    def _on_trapped(self, label: str, packet: bytes) -> None:
        network = self.networks.get(label)
        address = destination(packet)
        if network is not None and address is not None:
            network.trapped(packet, address)

    def _on_moved(self, child_id: int, source: Endpoint) -> None:
        """An SA's packets come from elsewhere. Whoever moved says so by MOBIKE; if it is our NAT that changed, the hubs
        tell us.
        """
        self._look_outside()

    def _may_reach(self, port: int) -> bool:
        """What strangers may have a stream to: as a hub, IKE and the relay ports."""
        hubs = [network.hub for network in self.networks.values() if network.hub is not None]
        return bool(hubs) if port == 0 else any(hub.has_port(port) for hub in hubs)

    def _on_unbound(self, port: int, source: Endpoint, data: bytes) -> None:
        for network in self.networks.values():
            if network.hub is not None:
                network.hub.on_unbound(port, source, data)

    def _on_ike(self, output: Output) -> None:
        match output:
            case InstallChild(sa=sa, child=child):
                self._spis[child.spi_in] = child.id
                self._child_of[sa] = child.id
                if self._key_log is not None:
                    self._key_log.child(child)
            case RemoveChild(child_id=child_id):
                self._spis = {spi: child for spi, child in self._spis.items() if child != child_id}
            case SaEstablished(sa=sa, network=label, tag=tag):
                network = self.networks.get(label)
                if network is not None:
                    self._network_of[sa] = network
                    network.established(output, self._child_of.get(sa, 0))
                if isinstance(tag, Attempt):
                    tag.succeed()
            case SaFailed(tag=Attempt() as attempt, reason=reason):
                attempt.fail(reason)
            case SaClosed(sa=sa):
                self._child_of.pop(sa, None)
                network = self._network_of.pop(sa, None)
                if network is not None:
                    network.on_ike(output)
            case ChildRekeyed(sa=sa, new_id=child_id):
                self._child_of[sa] = child_id
                if sa in self._network_of:
                    self._network_of[sa].on_ike(output)
            case SaMoved(sa=sa) | Informed(sa=sa) | Liveness(sa=sa) | MoveFailed(sa=sa):
                if sa in self._network_of:
                    self._network_of[sa].on_ike(output)
            case Refused(path=path, reason=reason):
                log.info("IKE from %s refused: %s", path.remote, reason)

    # Where we are (network.Place).

    def hubs_changed(self) -> None:
        endpoints = [endpoint for network in self.networks.values() for endpoint in network.hub_endpoints()]
        self._reflexive_pump.feed(self._reflexive.update(endpoints, self.services.now))

    def candidates(self) -> list[Candidate]:
        return self.outside.candidates()

    def nat(self) -> NatBehaviour:
        """What is known of the NAT in front of us, for IPv4."""
        return self._reflexive.behaviour()

    def public_endpoints(self) -> tuple[Endpoint, ...]:
        return self.outside.published()

    def declare(self, endpoints: tuple[Endpoint, ...]) -> None:
        """The owner says that these addresses reach us."""
        if endpoints != self.outside.declared:
            self.outside.declared = endpoints
            self._moved_soon()

    def _look_outside(self) -> None:
        """Ask the hubs at once where they see us."""
        self._reflexive_pump.feed(self._reflexive.refresh(self.services.now))

    def _hub_ends(self) -> list[HubEnd]:
        return [end for network in self.networks.values() for end in network.hub_ends()]

    def _hub_used(self, at: Endpoint) -> None:
        """A packet went to the hub's tunnel and one came back: that kept the binding."""
        self._reflexive.heard(at, self.services.now)

    def _refresh_every(self, refresh_s: float) -> None:
        """Bindings want a packet so often."""
        self.services.relays.refresh_every(refresh_s)
        self._reflexive.refresh_s = refresh_s
        self._reflexive_pump.feed(self._reflexive.hasten(self.services.now))

    def _on_reflexive(self, output: Output) -> None:
        if isinstance(output, ReflexiveLearned) and output.silent_s is not None:
            self.nat_watch.lost(output.silent_s)
        if isinstance(output, ReflexiveLearned | ReflexiveLost):
            self._moved_soon()
        elif isinstance(output, HubDoubted):
            for network in self.networks.values():
                network.doubt_hub(output.hub)

    def network_changed(self) -> None:
        """An address, link or default route of the machine changed."""
        self.services.punch_limits.update_subnets(self._underlay.local_networks())
        if self._port_mapper is not None:
            self._port_mapper.network_changed()
        if self.nat_watch.network_changed():
            self._reflexive.forget()
        self._look_outside()
        self._moved_soon()

    def _resumed(self, slept_s: float) -> None:
        """The machine was suspended: its NAT, its peers and its hubs may have given it up."""
        self.services.punch_limits.update_subnets(self._underlay.local_networks())
        self.services.relays.network_changed()
        for network in self.networks.values():
            self.services.tasks.start(network.resumed(slept_s), "resume")
        self._look_outside()

    def _moved_soon(self) -> None:
        """Several hubs answer within a moment: one change."""
        if self._settling is None:
            self._settling = asyncio.get_running_loop().call_later(SETTLE_S, self._moved)

    def _moved(self) -> None:
        self._settling = None
        self.services.relays.network_changed()
        for network in self.networks.values():
            network.network_changed()
