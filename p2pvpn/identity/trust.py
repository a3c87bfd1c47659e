"""Whom to believe: from a certificate to a member of the network, or to an error that says why not.

A leaf is signed by the root of the day, by an earlier root that handed over in good order, or by an issuer whose own
certificate such a root signed. Issuers come from the network document; a chain may bring one that the document at
hand does not list yet. What each may say:

    root      any roles and groups, prefixes outside the network's own addresses, further names for dialling
    issuer    no roles, its own group alone, one IPv4 address of its range, seven days

Every leaf has the name as first DNS name, the overlay address recomputed from its key in SAN and blocks, at most one
address of the network's IPv4 pool, and nobody else's address in either. Signatures are checked once and remembered,
since hubs see the same leaves in thousands of records; times are checked at each use, and a new document forgets all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address

from p2pvpn.core.errors import TrustError, WireError
from p2pvpn.core.ids import NetworkId, overlay_address
from p2pvpn.core.limits import BoundedTable
from p2pvpn.core.selector import Selector
from p2pvpn.crypto.signatures import is_p256

from .certificates import (
    BACKDATE_S,
    IPSEC_IKE,
    MEMBER_LIFETIME_S,
    Certificate,
    parse_untrusted,
)
from .document import NetworkDocument
from .genesis import Genesis, Root, Roots, ipv4_pool, overlay_prefix
from .member import Member, Role
from .names import is_name

MAX_CHAIN = 4
"""Leaf and issuer are two; some implementations send the root along."""
CACHED_LEAVES = 4096
"""About 2 KB each. The least recently used leaves first: it is only verified again."""


@dataclass(frozen=True, slots=True)
class _Verified:
    """A member, and until when the certificate that signed its own is valid."""

    member: Member
    issuer_not_before: float
    issuer_not_after: float


class Trust:
    """The verifier of one network. Times are in seconds since the epoch."""

    def __init__(self, genesis: Genesis, document: NetworkDocument) -> None:
        """Raises TrustError when the document is not this network's."""
        self.genesis = genesis
        self.network: NetworkId = genesis.network_id
        self._pool = Selector.of_network(ipv4_pool(self.network))
        self._prefix = Selector.of_network(overlay_prefix(self.network))
        self._verified: BoundedTable[bytes, _Verified] = BoundedTable(CACHED_LEAVES)
        self._adopt(document, document.verify(genesis))

    @property
    def document(self) -> NetworkDocument:
        """The newest document seen."""
        return self._document

    @property
    def roots(self) -> Roots:
        return self._roots

    def replace_document(self, document: NetworkDocument) -> bool:
        """Adopt a newer document; an older one or the same changes nothing. Returns whether it was newer.

        Raises TrustError when it is not this network's.
        """
        roots = document.verify(self.genesis)
        if not document.is_newer_than(self._document):
            return False
        self._adopt(document, roots)
        return True

    def verify_leaf(self, der: bytes, wall: float) -> Member:
        """The member that this leaf makes. Raises TrustError."""
        return self.verify_chain((der,), wall)

    def verify_chain(self, chain: Sequence[bytes], wall: float, *, grace: float = 0.0) -> Member:
        """The member that the first certificate makes; issuers may follow it. Raises TrustError.

        `grace` lets the leaf be expired by as many seconds: an issuer renews what a laptop slept through.
        """
        if not 1 <= len(chain) <= MAX_CHAIN:
            raise TrustError(f"a chain of {len(chain)} certificates")
        key = hashlib.sha256(chain[0]).digest()
        entry = self._verified.get(key)
        if entry is None:
            entry = self._verify(chain)
            self._verified.put(key, entry)
        member = entry.member
        if wall < member.not_before:
            raise TrustError("the certificate is not valid yet", hint="compare the clocks of both machines")
        if wall > member.not_after + grace:
            raise TrustError("the certificate has expired", hint="it is renewed at half its life from any issuer")
        if not entry.issuer_not_before <= wall <= entry.issuer_not_after:
            raise TrustError("the issuer's certificate has expired or is not valid yet")
        return member

    def describe(self, chain: Sequence[bytes]) -> Member:
        """As `verify_chain`, at whatever time the certificate is valid: for a machine's own. Raises TrustError."""
        return self._verify(chain).member

    def cut_off(self, member: Member) -> int | None:
        """From when on the issuer of this member counts as stolen, in seconds since the epoch; None if it does not."""
        return self._cut_offs.get(member.issuer)

    def _adopt(self, document: NetworkDocument, roots: Roots) -> None:
        self._document = document
        self._roots = roots
        self._by_root = {root.key_id: root for root in roots.accepted}
        self._cut_offs = dict(document.cut_offs)
        self._hub_names = {hub.name: hub.peer_id for hub in document.hubs}
        self._issuers: dict[bytes, Certificate] = {}
        for entry in document.issuers:
            try:
                issuer = self._issuer(entry.certificate)
            except TrustError:
                continue  # signed by a root that was replaced since; its leaves are then refused one by one
            self._issuers[issuer.key_id] = issuer
        self._verified = BoundedTable(CACHED_LEAVES)

    def _verify(self, chain: Sequence[bytes]) -> _Verified:
        leaf = _parse(chain[0])
        root = self._by_root.get(leaf.issuer_key_id)
        if root is not None:
            _check_signed(leaf, root.certificate)
            self._check_leaf(leaf)
            self._check_by_root(leaf)
            return _Verified(self._member(leaf), root.certificate.not_before, root.certificate.not_after)
        issuer = self._issuers.get(leaf.issuer_key_id) or self._issuer_in(chain[1:], leaf.issuer_key_id)
        _check_signed(leaf, issuer)
        self._check_leaf(leaf)
        self._check_by_issuer(leaf, issuer)
        return _Verified(self._member(leaf), issuer.not_before, issuer.not_after)

    def _issuer_in(self, chain: Sequence[bytes], key_id: bytes) -> Certificate:
        for der in chain:
            if _parse(der).key_id == key_id:
                return self._issuer(der)
        raise TrustError(
            "the certificate is of another network, or of an issuer that this network does not know",
            hint="both machines must have joined the same network",
        )

    def _issuer(self, der: bytes) -> Certificate:
        """An issuer's certificate, verified."""
        issuer = _parse(der)
        root: Root | None = self._by_root.get(issuer.issuer_key_id)
        if root is None:
            raise TrustError("an issuer of another network: no root of this network signed its certificate")
        _check_signed(issuer, root.certificate)
        if not issuer.is_ca or issuer.path_length != 0 or not issuer.signs_certificates or issuer.unknown_critical:
            raise TrustError("an issuer's certificate that does not let it issue")
        if issuer.roles != (Role.ISSUER.value,) or len(issuer.groups) != 1 or not is_p256(issuer.public_key):
            raise TrustError("an issuer's certificate that does not name its group")
        if issuer.key_id != issuer.peer_id:
            raise TrustError("an issuer's key identifier does not follow from its key")
        if issuer.serial in self._document.revoked_serials:
            raise TrustError("the issuer's certificate is revoked")
        return issuer

    def _check_leaf(self, leaf: Certificate) -> None:
        """What holds for every leaf."""
        if leaf.is_ca or leaf.signs_certificates:
            raise TrustError("a certificate authority is no member")
        if leaf.unknown_critical:
            raise TrustError("the certificate has a critical extension that is not understood")
        if not leaf.signs_data or IPSEC_IKE.dotted_string not in leaf.purposes:
            raise TrustError("the certificate is not for IKE")
        peer_id = leaf.peer_id
        if leaf.key_id != peer_id:
            raise TrustError("the key identifier does not follow from the key")
        if not leaf.dns_names or not is_name(leaf.dns_names[0]):
            raise TrustError("the certificate has no name, or a bad one")
        overlay = overlay_address(self.network, peer_id)
        if not leaf.addresses or leaf.addresses[0] != overlay:
            raise TrustError("the overlay address does not follow from the network and the key")
        if [b for b in leaf.blocks if b.intersect(self._prefix)] != [Selector.of_address(overlay)]:
            raise TrustError("the certificate does not hold just its own overlay address")
        pool = [b for b in leaf.blocks if b.intersect(self._pool)]
        if len(pool) > 1 or any(b.start != b.end for b in pool):
            raise TrustError("the certificate holds more than one IPv4 address of the network")
        if peer_id in self._document.revoked_peers or leaf.serial in self._document.revoked_serials:
            raise TrustError("the certificate is revoked", hint="ask the admin of the network")

    def _check_by_root(self, leaf: Certificate) -> None:
        outside = [b for b in leaf.blocks if not b.intersect(self._prefix) and not b.intersect(self._pool)]
        if outside and Role.GATEWAY.value not in leaf.roles:
            raise TrustError("a certificate with prefixes but without the role of a gateway")

    def _check_by_issuer(self, leaf: Certificate, issuer: Certificate) -> None:
        """What an issuer, honest or stolen, can say at most."""
        if leaf.roles:
            raise TrustError("an issuer gave roles away")
        if not set(leaf.groups) <= set(issuer.groups):
            raise TrustError("an issuer gave away a group that is not its own")
        if any(not any(limit.holds(block) for limit in issuer.blocks) for block in leaf.blocks):
            raise TrustError("an issuer gave away addresses outside its range")
        if len(leaf.dns_names) != 1 or len(leaf.addresses) != 1:
            raise TrustError("an issuer gave more than one name")
        holder = self._hub_names.get(leaf.dns_names[0])
        if holder is not None and holder != leaf.peer_id:
            raise TrustError("an issuer gave away the name of a hub")
        if leaf.not_after - leaf.not_before > MEMBER_LIFETIME_S + BACKDATE_S:
            raise TrustError("an issuer gave more than seven days")
        cut_off = self._cut_offs.get(issuer.key_id)
        if cut_off is not None and leaf.not_before + BACKDATE_S >= cut_off:
            raise TrustError("the issuer was revoked before this certificate")

    def _member(self, leaf: Certificate) -> Member:
        ipv4 = [b.start for b in leaf.blocks if b.intersect(self._pool)]
        known = {role.value for role in Role}
        return Member(
            network=self.network,
            peer_id=leaf.peer_id,
            name=leaf.dns_names[0],
            roles=frozenset(Role(role) for role in leaf.roles if role in known),
            groups=frozenset(leaf.groups),
            ipv4=IPv4Address(int(ipv4[0])) if ipv4 else None,
            blocks=leaf.blocks,
            public_key=leaf.public_key,
            not_before=leaf.not_before,
            not_after=leaf.not_after,
            serial=leaf.serial,
            issuer=leaf.issuer_key_id,
            certificate=leaf.der,
        )


def _parse(der: bytes) -> Certificate:
    try:
        return parse_untrusted(der)
    except WireError as problem:
        raise TrustError(str(problem)) from None


def _check_signed(certificate: Certificate, issuer: Certificate) -> None:
    """Raises TrustError unless `issuer` is named as issuer and its key made the signature."""
    if certificate.issuer != issuer.subject:
        raise TrustError("the certificate names another issuer than the one that its key identifier says")
    certificate.verify_signature(issuer.public_key)
