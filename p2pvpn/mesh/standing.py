"""Who we are in a network, whom we believe, and which document is in force."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from ipaddress import IPv6Address, IPv6Network

from p2pvpn.core.address import IpAddress, IpNetwork
from p2pvpn.core.errors import TrustError
from p2pvpn.core.ids import PeerId, overlay_address
from p2pvpn.core.ports import WallClock
from p2pvpn.crypto.signatures import Scheme, spki
from p2pvpn.identity.document import NetworkDocument
from p2pvpn.identity.keys import PeerKey
from p2pvpn.identity.member import Member
from p2pvpn.identity.profile import DOCUMENT, Profile
from p2pvpn.ike.config import Credential, IkeId, RemoteIdentity
from p2pvpn.ike.notifies import Notify

from .attach import Hub
from .ports import StateStore

OVERLAY_PREFIX_BITS = 48
"""fd and 40 bits of the network ID."""


class Standing:
    """One network's profile with what follows from it. Changes are saved before they are in force."""

    def __init__(self, profile: Profile, store: StateStore, wall: WallClock) -> None:
        self._store = store
        self._wall = wall
        self.profile = profile
        self.me: Member = profile.member
        self.label = self.me.network.hex()[:16]

    @property
    def name(self) -> str:
        return self.profile.genesis.name

    @property
    def key(self) -> PeerKey:
        return self.profile.key

    @property
    def document(self) -> NetworkDocument:
        return self.profile.document

    def encoded_document(self) -> bytes:
        return self.document.encode()

    @property
    def overlay_network(self) -> IPv6Network:
        return IPv6Network((self.me.overlay, OVERLAY_PREFIX_BITS), strict=False)

    @property
    def addresses(self) -> list[IpAddress]:
        """Our overlay addresses."""
        return [self.me.overlay, *([self.me.ipv4] if self.me.ipv4 is not None else [])]

    @property
    def routes(self) -> list[IpNetwork]:
        """What leads into the TUN device."""
        routes: list[IpNetwork] = [self.overlay_network]
        if self.me.ipv4 is not None:
            routes.append(self.profile.genesis.ipv4_pool)
        return routes

    def hubs(self) -> list[Hub]:
        """The hubs of the document, ourselves included."""
        return [Hub(entry.peer_id, entry.name, self.overlay_of(entry.peer_id)) for entry in self.document.hubs]

    def overlay_of(self, peer_id: PeerId) -> IPv6Address:
        return overlay_address(self.me.network, peer_id)

    def verify_leaf(self, certificate: bytes, wall: float) -> Member:
        """Raises TrustError."""
        return self.profile.trust.verify_leaf(certificate, wall)

    def verify(self, certificate: bytes) -> Member:
        """A certificate as of now. Raises TrustError."""
        return self.profile.trust.verify_leaf(certificate, self._wall())

    def still_allowed(self, member: Member) -> bool:
        """Whether the document in force lets us talk to a member whom an older one let."""
        try:
            return self.document.allows(self.me, self.verify(member.certificate))
        except TrustError:
            return False

    def credential(self, notifies: Callable[[], tuple[Notify, ...]]) -> Credential:
        """What IKE authenticates with; `notifies` go into our IKE_AUTH."""
        key = self.profile.key
        return Credential(
            network=self.label,
            local_id=IkeId.address(self.me.overlay),
            certificates=self.profile.chain,
            schemes=(Scheme.ECDSA_SHA256,),
            sign=lambda scheme, data: key.sign(data),
            authorities=self._authorities(),
            verify=self._verify_peer,
            local_blocks=self.me.blocks,
            auth_notifies=notifies,
        )

    def _authorities(self) -> tuple[bytes, ...]:
        """SHA-1 of each root's SubjectPublicKeyInfo (RFC 7296 section 3.7)."""
        roots = self.profile.trust.roots.accepted
        return tuple(hashlib.sha1(spki(root.public_key), usedforsecurity=False).digest() for root in roots)

    def _verify_peer(self, claimed: IkeId, chain: tuple[bytes, ...]) -> RemoteIdentity:
        member = self.profile.trust.verify_chain(chain, self._wall())
        if claimed != IkeId.address(member.overlay):
            raise TrustError("the identity is not the certificate's")
        if member.peer_id == self.me.peer_id:
            raise TrustError("the peer shows our own certificate")
        if not self.document.allows(self.me, member):
            raise TrustError("the network document does not let us talk")
        return RemoteIdentity(claimed, member.public_key, member.blocks, member)

    def adopt(self, raw: bytes) -> bool:
        """Put a document in force; False when it is not newer. Raises TrustError, WireError or LocalError."""
        document = NetworkDocument.parse_untrusted(raw)
        document.verify(self.profile.genesis)
        if not document.is_newer_than(self.document):
            return False
        self._store.write(DOCUMENT, document.encode())
        return self.profile.adopt_document(document)

    def renewed(self) -> None:
        """Our certificate was renewed in the profile: keep it."""
        self.profile.save(self._store.write)
        self.me = self.profile.member
