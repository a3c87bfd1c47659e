"""One network on this machine: puts the parts of the engine together and passes IKE's news to sessions.

standing     who we are, whom we believe          attachments  tunnels to hubs
directory    names and places in the DHT          rendezvous   calls and relays
gossip       newer network documents              hub          what a hub does for others
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from ipaddress import IPv6Address
from typing import Protocol

from p2pvpn.core.address import Endpoint, IpAddress, Path
from p2pvpn.core.output import Output
from p2pvpn.core.selector import Selector
from p2pvpn.dht.client import DhtClient
from p2pvpn.dht.policy import AcceptancePolicy
from p2pvpn.dht.rpc import DHT_PORT, RpcNode
from p2pvpn.dht.storage import Backend
from p2pvpn.identity.keys import PeerKey
from p2pvpn.identity.member import Member
from p2pvpn.ike.config import Credential, IkeId, Initiate
from p2pvpn.ike.notifies import Notify
from p2pvpn.ike.outputs import ChildRekeyed, Informed, Liveness, MoveFailed, SaClosed, SaEstablished, SaMoved
from p2pvpn.punch.behaviour import NatBehaviour
from p2pvpn.punch.candidates import Candidate, encode_candidates
from p2pvpn.punch.traversal import encode_nat

from . import whereabouts
from .attach import Attachments
from .connect import Attempt, ConnectError, Located
from .directory import Directory
from .events import DocumentReplaced, HubAttached, HubDetached, MeshEvent
from .fallback import Fallback
from .gossip import DocumentGossip
from .history import History
from .hub_dial import dial_hub
from .hubside import HubSide
from .ike_driver import carried_path
from .inspection import inspect
from .knocks import Knocks
from .natwatch import HubEnd
from .nearest import NearestRelay
from .notices import CANDIDATES, NAT, DocumentVersion, document_version
from .ports import Resolver
from .relaying import RelayPath
from .rendezvous import Rendezvous
from .services import Services
from .session import Session
from .standing import Standing

DEFAULT_HUB_PORT = 4500
MAX_SESSIONS = 20_000
"""Peers in contact at a time; a hub of a large network has the most."""
ANY = (Selector.of_network("::/0"), Selector.of_network("0.0.0.0/0"))


class Place(Protocol):
    """Where the machine is, as of now."""

    def candidates(self) -> list[Candidate]: ...

    def nat(self) -> NatBehaviour: ...

    def public_endpoints(self) -> tuple[Endpoint, ...]: ...

    def hubs_changed(self) -> None:
        """The hubs whose STUN service we use are others."""
        ...


class Network:
    """The engine's state for one network."""

    def __init__(
        self,
        services: Services,
        standing: Standing,
        resolver: Resolver,
        place: Place,
        backend: Backend | None,
    ) -> None:
        self._services = services
        self._resolver = resolver
        self.standing = standing
        self.label = standing.label
        self._place = place
        self.on_member: Callable[[Member], None] = lambda member: None
        """Told of every member that authenticated to us; an issuer remembers them."""
        self.history = History()
        self.sessions: dict[IPv6Address, Session] = {}
        self._by_sa: dict[int, Session] = {}
        self.rpc = RpcNode(self.me.overlay, DHT_PORT, services.entropy)
        self.rpc.is_hub = self.is_hub
        policy = AcceptancePolicy(self.me.network, standing.verify_leaf)
        self.dht = DhtClient(self.rpc, policy, services.wall)
        self.directory = Directory(services, self, self.dht)
        wanted = None if self.me.is_hub else services.tuning.hubs_wanted
        self.attachments = Attachments(services, self.me.overlay, wanted, self.session)
        self.gossip = DocumentGossip(self.rpc, standing.encoded_document, self._adopt)
        self.fallback = Fallback(
            services=services,
            standing=standing,
            resolver=resolver,
            attachments=self.attachments,
            sessions=self.sessions,
            emit=self.emit,
        )
        self.rendezvous = Rendezvous(
            services=services,
            fallback=self.fallback,
            standing=standing,
            rpc=self.rpc,
            attachments=self.attachments,
            directory=self.directory,
            session=self.session,
            emit=self.emit,
        )
        self.nearest = NearestRelay(services, standing, self.attachments, self.rendezvous, self)
        self.hub: HubSide | None = None
        self.knocks = Knocks(services, self, self.rpc, services.proofs) if self.me.is_hub else None
        if self.me.is_hub:
            whereabouts.Whereabouts(self.rpc, self)
        if self.me.is_hub and services.forwarder is not None:
            self.hub = HubSide(
                services=services,
                registry=self,
                rpc=self.rpc,
                forwarder=services.forwarder,
                policy=policy,
                backend=backend,
            )

    @property
    def me(self) -> Member:
        return self.standing.me

    def emit(self, event: MeshEvent) -> None:
        self.history.note(event, self.wall())
        self._services.emit(event)

    def wall(self) -> float:
        return self._services.wall()

    @property
    def now(self) -> float:
        return self._services.now

    @property
    def key(self) -> PeerKey:
        return self.standing.key

    def verify(self, certificate: bytes) -> Member:
        """Raises TrustError."""
        return self.standing.verify(certificate)

    def local_candidates(self) -> list[Candidate]:
        return self._place.candidates()

    def nat(self) -> NatBehaviour:
        return self._place.nat()

    async def whereabouts(self, overlay: IPv6Address) -> Mapping[IpAddress, frozenset[bytes]]:
        """Where hubs see a peer's tunnel come from, and which hubs. Raises ConnectError."""
        locator = await self.directory.locator(overlay)
        hubs, certificate = self.attachments.connected(), self.me.certificate
        return await whereabouts.ask(self.rpc, hubs, locator.peer_id, locator.hubs, certificate)

    def public_endpoints(self) -> tuple[Endpoint, ...]:
        return self._place.public_endpoints()

    # Life.

    async def open(self) -> None:
        """Bring the TUN device up; returns when local things work, not when hubs answer.

        Raises LocalError; nothing is open then.
        """
        standing, plane = self.standing, self._services.plane
        await plane.open_network(self.label, standing.addresses, standing.routes, self._services.tuning.overlay_mtu)
        try:
            await self.rpc.open()
        except BaseException:
            await plane.close_network(self.label)
            raise
        self._apply_document()

    async def run(self) -> None:
        """Everything that goes on until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.attachments.run(), name="attachments")
            group.create_task(self.directory.run(), name="publish")
            watching = inspect(self._services, self.sessions, keep=self.is_hub, looked=self.nearest.look)
            group.create_task(watching, name="inspect")
            if self.hub is not None:
                group.create_task(self.hub.run(), name="hub")

    async def close(self) -> None:
        """Say goodbye to everybody and take the device away."""
        for session in self.sessions.values():
            session.disconnect("shutting down")
        await self._services.ike.drained()
        if self.hub is not None:
            await self.hub.close()
        await self.rpc.close()
        await self._services.plane.close_network(self.label)

    async def reopen(self) -> None:
        """The plane was started anew: make the device again and connect again."""
        standing = self.standing
        mtu = self._services.tuning.overlay_mtu
        await self._services.plane.open_network(self.label, standing.addresses, standing.routes, mtu)
        self.attachments.wake()

    def abandon(self, reason: str) -> None:
        """Every SA lost its plane: close them all, without hope for their traffic."""
        for session in self.sessions.values():
            session.disconnect(reason)

    def take_document(self, raw: bytes, source: str) -> None:
        """A document from outside the mesh, a new grant say. Raises TrustError or WireError."""
        self._adopt(raw, source)

    # The network document.

    def _adopt(self, raw: bytes, source: str) -> None:
        if self.standing.adopt(raw):
            self.emit(DocumentReplaced(self.label, self.standing.document.version, source))
            self._apply_document()
            self._tell_everybody((self._version_notify(),))

    def _apply_document(self) -> None:
        hubs = self.standing.hubs()
        self.attachments.set_hubs(hubs)
        self.dht.forget()
        if self.hub is not None:
            self.hub.apply([hub.peer_id for hub in hubs], self.standing.document.revoked_peers)
        self._hubs_changed()
        for session in list(self.sessions.values()):
            if session.member is not None and not self.standing.still_allowed(session.member):
                session.disconnect("the network document forbids it")

    def _version_notify(self) -> Notify:
        document = self.standing.document
        return DocumentVersion(document.version, document.digest).notify()

    def _compare_version(self, session: Session, notifies: tuple[Notify, ...]) -> None:
        theirs = document_version(notifies)
        mine = self.standing.document
        if theirs is not None and theirs.version >= mine.version and theirs.digest != mine.digest:
            self._services.tasks.start(self.gossip.fetch(session.overlay), "fetch document")

    def _tell_everybody(self, notifies: tuple[Notify, ...], *, punching_only: bool = False) -> None:
        for session in self.sessions.values():
            if session.current is not None and (session.current.agent is not None or not punching_only):
                session.paths.tell(session.current, notifies)

    # Sessions.

    def session(self, overlay: IPv6Address) -> Session:
        """The session with an overlay address, made when there is none."""
        session = self.sessions.get(overlay)
        if session is None:
            if len(self.sessions) >= MAX_SESSIONS:
                idle = next((known for known, other in self.sessions.items() if other.idle), None)
                self.sessions.pop(idle, None)  # type: ignore[arg-type]
            session = self.sessions[overlay] = Session(self._services, self, overlay)
        return session

    def name_of(self, overlay: IPv6Address) -> str:
        hub = self.attachments.hub_at(overlay)
        return hub.name if hub is not None else self.directory.name_of(overlay) or str(overlay)

    def hub_silent(self) -> None:
        """Another hub takes the place of one that says nothing, for the time being."""
        self.attachments.look()

    def is_hub(self, overlay: IPv6Address) -> bool:
        return self.attachments.hub_at(overlay) is not None

    def trapped(self, packet: bytes, destination: IpAddress) -> None:
        """A packet for somebody without an SA."""
        if isinstance(destination, IPv6Address):
            if destination in self.standing.overlay_network and destination != self.me.overlay:
                self.session(destination).trap(packet)
        elif destination in self.standing.profile.genesis.ipv4_pool and destination != self.me.ipv4:
            known = self.directory.known_ipv4(destination)
            if known is not None:
                self.session(known).trap(packet)
            else:
                self.directory.resolve_then(destination, lambda overlay: self.session(overlay).trap(packet))

    # What the story of a connection asks (connect.Finder).

    async def locate(self, overlay: IPv6Address) -> Located:
        """A hub's address from the document, a peer's locator from the DHT. Raises ConnectError."""
        hub = self.attachments.hub_at(overlay)
        if hub is None:
            locator = await self.directory.locator(overlay)
            return Located(locator.endpoints, is_hub=False)
        entry = self.standing.document.hub(hub.peer_id)
        endpoints: list[Endpoint] = []
        for address in entry.addresses if entry is not None else ():
            endpoints += await self._resolver.resolve(address, DEFAULT_HUB_PORT)
        if not endpoints:
            raise ConnectError("locate", f"no address of hub {hub.name} can be resolved")
        return Located(tuple(endpoints), is_hub=True)

    async def dial_hub(self, attempt: Attempt, located: Located) -> None:
        await dial_hub(self, self._services, attempt, located.endpoints)

    async def line_to(self, overlay: IPv6Address) -> Path:
        return await self.fallback.line_to(overlay)

    def tidy_lines(self, overlay: IPv6Address) -> None:
        self.fallback.tidy(overlay)

    def is_connected(self, overlay: IPv6Address) -> bool:
        session = self.sessions.get(overlay)
        return session is not None and session.connected

    def known_endpoints(self, overlay: IPv6Address) -> tuple[Endpoint, ...]:
        locator = self.directory.known_locator(overlay)
        return () if locator is None else locator.endpoints

    async def call(self, attempt: Attempt, tried: Sequence[str]) -> tuple[RelayPath, bytes]:
        attempt.path = carried_path(self.me.overlay, attempt.overlay)
        ike = await self._begin(attempt)
        return await self.rendezvous.relay_to(attempt.overlay, tried, ike=ike)

    async def relay_anew(self, overlay: IPv6Address, dead: Endpoint) -> RelayPath:
        host = self._services.lines.udp_of(dead).host
        relay, _ = await self.rendezvous.relay_to(overlay, [host], resume=True)
        return relay

    async def _begin(self, attempt: Attempt) -> bytes:
        """Begin IKE over the attempt's path; returns the first message if that path is inside a call."""
        assert attempt.path is not None
        request = Initiate(
            credential=self.credential(),
            path=attempt.path,
            remote_id=IkeId.address(attempt.overlay),
            local=self.me.blocks,
            remote=ANY,
            tag=attempt,
        )
        driver = self._services.ike
        attempt.sa_id, message = await driver.carried(attempt.path, lambda now: driver.endpoint.initiate(request, now))
        return message

    async def dial(self, attempt: Attempt, timeout_s: float) -> None:
        """Run IKE over the attempt's path. Raises ConnectError."""
        await self._begin(attempt)
        await attempt.finish(timeout_s)

    def credential(self) -> Credential:
        return self.standing.credential(self._auth_notifies)

    def _auth_notifies(self) -> tuple[Notify, ...]:
        if self.me.is_hub:
            return (self._version_notify(),)
        return self._version_notify(), *self._place_notifies()

    def _place_notifies(self) -> tuple[Notify, ...]:
        candidates = Notify(CANDIDATES, encode_candidates(self.local_candidates()))
        return candidates, Notify(NAT, encode_nat(self.nat()))

    # IKE's news.

    def established(self, event: SaEstablished, child_id: int) -> None:
        member = event.remote.subject
        assert isinstance(member, Member)
        self.directory.learn(member)
        self.on_member(member)
        session = self.session(member.overlay)
        self._by_sa[event.sa] = session
        session.established(event, child_id)
        self._session_changed(session, "")
        self._compare_version(session, event.notifies)

    def on_ike(self, output: Output) -> None:
        """An event of an established SA; those of other networks are ignored."""
        session = self._by_sa.get(getattr(output, "sa", 0))
        if session is None:
            return
        match output:
            case SaClosed(sa=sa, reason=reason):
                del self._by_sa[sa]
                session.closed(sa, reason)
                self._session_changed(session, reason)
            case SaMoved(sa=sa, path=path):
                session.moved(sa, path)
                self._tell_relay(session)
            case MoveFailed(sa=sa, path=path, reason=reason):
                session.move_failed(sa, path, reason)
            case ChildRekeyed(sa=sa, new_id=child_id):
                session.rekeyed(sa, child_id)
            case Liveness(sa=sa):
                session.alive(sa)
            case Informed(sa=sa, notifies=notifies, path=path):
                session.informed(sa, notifies, path)
                self.nearest.heard(session, notifies)
                self._compare_version(session, notifies)

    def _session_changed(self, session: Session, reason: str) -> None:
        hub = self.attachments.hub_at(session.overlay)
        if hub is not None:
            if session.current is not None:
                if self.attachments.attached(hub.overlay):
                    if self.hub is not None:
                        self.hub.node.nudge(hub.overlay)
                    remote = self._services.lines.show(session.current.path.remote)
                    self.emit(HubAttached(self.label, hub.name, remote))
            else:
                self.attachments.lost(hub.overlay)
                self.emit(HubDetached(self.label, hub.name, reason))
            self._hubs_changed()
        self._tell_relay(session)

    def _tell_relay(self, session: Session) -> None:
        self.fallback.changed(session)
        if self.hub is not None and session.member is not None:
            self.hub.peer_at(session.member.peer_id, self.outer_address(session.overlay))

    def _hubs_changed(self) -> None:
        connected = self.attachments.connected()
        self.dht.set_hubs([(hub.peer_id, hub.overlay) for hub in connected])
        self.directory.hubs_changed([hub.peer_id for hub in connected])
        self._place.hubs_changed()

    def outer_address(self, overlay: IPv6Address) -> IpAddress | None:
        """Where the peer's tunnel to us lives."""
        session = self.sessions.get(overlay)
        return session.current.path.remote.ip if session is not None and session.current is not None else None

    # The machine moved.

    def network_changed(self) -> None:
        """An address, a route or our NAT changed: tell hubs and peers, look for better paths."""
        self.attachments.wake()
        self.fallback.network_changed()
        self.nearest.network_changed()
        for session in list(self.sessions.values()):
            session.network_changed()
        self._tell_everybody(self._place_notifies(), punching_only=True)
        self.directory.publish_soon()

    async def resumed(self, slept_s: float) -> None:
        """The machine was asleep: what its peers have forgotten meanwhile is made anew, the rest is verified."""
        for session in list(self.sessions.values()):
            session.slept(slept_s)
        await self._services.ike.drained()
        self.attachments.forgive()
        self.network_changed()
        for session in list(self.sessions.values()):
            session.suspect()

    def hub_endpoints(self) -> Sequence[Endpoint]:
        """Where hubs answer STUN: those we are attached to, at the address that we use."""
        sessions = (self.sessions.get(hub.overlay) for hub in self.attachments.connected())
        lines = self._services.lines
        return [lines.udp_of(s.current.path.remote) for s in sessions if s is not None and s.current is not None]

    def hub_ends(self) -> list[HubEnd]:
        """The hubs that a peer has tunnels to."""
        if self.me.is_hub:
            return []
        lines = self._services.lines
        found = [(hub, self.sessions.get(hub.overlay)) for hub in self.attachments.connected()]
        return [
            HubEnd(hub.name, hub.peer_id, hub.overlay, lines.udp_of(session.current.path.remote), self.rpc)
            for hub, session in found
            if session is not None and session.current is not None
        ]

    def local_address(self, overlay: IPv6Address) -> Endpoint | None:
        """Where the peer's tunnel reaches us."""
        session = self.sessions.get(overlay)
        return session.current.path.local if session is not None and session.current is not None else None

    def doubt_hub(self, at: Endpoint) -> None:
        """The hub there may be gone, or may not know us any more: verify the tunnel to it."""
        for end in self.hub_ends():
            if end.endpoint == at:
                self.session(end.overlay).suspect()

    # What the command line asks.

    def forget(self, overlay: IPv6Address) -> None:
        """Close the SAs and drop what was cached."""
        session = self.sessions.get(overlay)
        if session is not None:
            session.disconnect("forgotten")
        self.directory.forget(overlay)
