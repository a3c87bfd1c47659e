"""Enrolment: joining with a token and renewing a certificate, as bytes in and bytes out.

    join     [[kind, network ID, issuer's peer ID, lookup, SPKI], proof of possession, HMAC]
    renew    [[kind, network ID, issuer's peer ID, chain], signature]
    answer   [kind, genesis, document, chain]     or     [kind, code, sentence]

Both requests name the issuer that the connection is pinned to, so that neither can be replayed to another one. The
HMAC, keyed with the token's verifier, covers the request with its proof. A renewal is signed with the key of the
certificate that it shows; replaying one only makes another certificate for the same key.

An issuer writes down what it decided before it answers. It keeps one live peer ID per name and per IPv4 address. A
member keeps its address while it stays with one issuer; one that comes from another issuer gets a new address out of
this issuer's range, since no certificate can hold an address outside it (RFC 3779). Its name, peer ID and IPv6
overlay address never change. A certificate that ran out while a laptop was away is renewed for 90 days more.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address

from p2pvpn.core.errors import Fault, LocalError, TrustError, WireError
from p2pvpn.core.ids import NETWORK_ID_BYTES, PEER_ID_BYTES, NetworkId, PeerId
from p2pvpn.core.limits import BoundedTable, SourceLimiter
from p2pvpn.core.ports import Entropy
from p2pvpn.core.selector import Selector
from p2pvpn.crypto.signatures import PublicKey, Scheme, is_p256, public_key_untrusted, spki, verify

from .canonical import Fields, pack
from .certificates import (
    DAY_S,
    MAX_CERTIFICATE_BYTES,
    MEMBER_LIFETIME_S,
    Authority,
    issue_leaf,
    new_serial,
    parse_untrusted,
)
from .document import MAX_DOCUMENT_BYTES, NetworkDocument
from .genesis import MAX_GENESIS_BYTES, MAX_SIGNATURE_BYTES, MAX_SPKI_BYTES, Genesis
from .invitations import (
    LOOKUP_BYTES,
    MAX_INVITATIONS,
    MAX_TOKEN_ADDRESSES,
    TOKEN_LIFETIME_S,
    InvitationBook,
    Token,
    lookup_of,
    proof_of,
)
from .keys import PeerKey, peer_id_of
from .member import Member
from .names import MAX_NAME_CHARS, require_name
from .trust import MAX_CHAIN, Trust

_JOIN_KIND = "p2pvpn-join-1"
_RENEW_KIND = "p2pvpn-renew-1"
_ANSWER_KIND = "p2pvpn-enrolled-1"
_REFUSAL_KIND = "p2pvpn-refused-1"
_STATE_KIND = "p2pvpn-issuer-1"

MAX_REQUEST_BYTES = 40960
"""A chain of the largest certificates; usual requests have 300 bytes to join, 1800 to renew."""
MAX_ANSWER_BYTES = MAX_DOCUMENT_BYTES + 65536
MAX_STATE_BYTES = 1 << 25
MAX_MEMBERS = 10000
"""Members that one issuer remembers; ten times what its IPv4 range holds."""
RENEW_GRACE_S = 90 * DAY_S
"""How long after expiry a name and an address stay reserved and a certificate can still be renewed."""
RENEWALS_PER_S = 1 / 60
RENEWALS_BURST = 5
"""Of one member: more than half-life renewal and every retry need, too few to keep an issuer busy."""


class Code(Enum):
    """Why an issuer refuses; the value travels."""

    MALFORMED = "malformed"
    WRONG_NETWORK = "wrong-network"
    WRONG_ISSUER = "wrong-issuer"
    UNKNOWN = "unknown-token"
    EXPIRED = "expired-token"
    USED = "used-token"
    BAD_PROOF = "bad-proof"
    NAME_TAKEN = "name-taken"
    REVOKED = "revoked"
    UNTRUSTED = "untrusted"
    GRANTED = "granted"
    FULL = "full"
    BUSY = "busy"
    FAILED = "failed"


class Refused(TrustError):
    """The issuer said no. `code` is a value of `Code`, or one of a newer issuer."""

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence, hint=_HINTS.get(code, ""))
        self.code = code


_HINTS = {
    Code.UNKNOWN.value: "ask for a new token",
    Code.EXPIRED.value: "ask for a new token",
    Code.USED.value: "ask for a new token; each works for one machine",
    Code.NAME_TAKEN.value: "ask for a token with another name",
    Code.REVOKED.value: "ask the admin of the network",
    Code.GRANTED.value: "print a new request and have the admin grant it",
    Code.BUSY.value: "try again in a few minutes",
}


class _Refusal(Exception):
    """Inside an issuer: what to answer."""

    def __init__(self, code: Code, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


@dataclass(frozen=True, slots=True)
class JoinResult:
    """What an issuer answers when it agrees; the chain is leaf first."""

    genesis: Genesis
    document: NetworkDocument
    chain: tuple[bytes, ...]

    @classmethod
    def parse_untrusted(cls, data: bytes) -> JoinResult:
        """Raises Refused when the issuer said no; WireError or TrustError when the answer is not what it must be."""
        fields = Fields.unpack_untrusted(data, "an answer", MAX_ANSWER_BYTES)
        kind = fields.text(64)
        if kind == _REFUSAL_KIND:
            raise Refused(fields.text(64), fields.text(1024))
        if kind != _ANSWER_KIND:
            raise WireError("not an issuer's answer")
        genesis = Genesis.parse_untrusted(fields.raw(MAX_GENESIS_BYTES))
        document = NetworkDocument.parse_untrusted(fields.raw(MAX_DOCUMENT_BYTES))
        document.verify(genesis)
        chain = fields.raws(MAX_CHAIN, MAX_CERTIFICATE_BYTES)
        fields.end()
        return cls(genesis, document, chain)

    def verify(self, network: NetworkId, key: PeerKey, wall: float) -> Member:
        """The member that we are by this answer. Raises TrustError unless it is of `network` and for `key`."""
        if self.genesis.network_id != network:
            raise TrustError("the issuer answered for another network")
        member = Trust(self.genesis, self.document).verify_chain(self.chain, wall)
        if spki(member.public_key) != key.spki:
            raise TrustError("the issuer answered with a certificate for another key")
        return member


def join_request(token: Token, key: PeerKey) -> bytes:
    """The request of a new member with this key."""
    body = pack((_JOIN_KIND, bytes(token.network), bytes(token.issuer), lookup_of(token.verifier), key.spki))
    proof = key.sign(body)
    return pack((body, proof, proof_of(token.verifier, pack((body, proof)))))


def renew_request(key: PeerKey, chain: tuple[bytes, ...], network: NetworkId, issuer: PeerId) -> bytes:
    """The request of a member for a fresh certificate from the issuer on hub `issuer`."""
    body = pack((_RENEW_KIND, bytes(network), bytes(issuer), chain))
    return pack((body, key.sign(body)))


def issuer_of_untrusted(request: bytes) -> PeerId:
    """Which issuer a request is for: what its connection has to be pinned to. Raises WireError."""
    bundle = Fields.unpack_untrusted(request, "a request", MAX_REQUEST_BYTES)
    fields = Fields.unpack_untrusted(bundle.raw(MAX_REQUEST_BYTES), "a request", MAX_REQUEST_BYTES)
    fields.text(64)
    fields.exactly(NETWORK_ID_BYTES)
    return PeerId(fields.exactly(PEER_ID_BYTES))


@dataclass(frozen=True, slots=True)
class _Holder:
    """A member in the ledger; `ipv4` is 0 for none, `not_after` in seconds since the epoch."""

    name: str
    ipv4: int
    not_after: int


class Issuer:
    """One issuer of a network: `handle_untrusted` turns requests into answers and never raises for what they say.

    `hub` is the peer ID of the hub it runs on; `persist` stores `to_bytes()` and is called before each answer that
    rests on it. Times are in seconds since the epoch.
    """

    def __init__(
        self,
        trust: Trust,
        hub: PeerId,
        key: PeerKey,
        certificate: bytes,
        *,
        entropy: Entropy,
        state: bytes | None = None,
        persist: Callable[[bytes], None] | None = None,
    ) -> None:
        """Raises LocalError when key, certificate or state do not belong together."""
        try:
            parsed = parse_untrusted(certificate)
        except WireError as problem:
            raise LocalError(f"the issuer's certificate cannot be read: {problem}") from None
        if parsed.peer_id != key.peer_id:
            raise LocalError("the issuer's certificate is not for the issuing key of this machine")
        self.trust = trust
        self.hub = hub
        self._authority = Authority(key, parsed)
        self._entropy = entropy
        self._persist = persist
        self._book = InvitationBook()
        self._members: dict[PeerId, _Holder] = {}
        self._noted: BoundedTable[PeerId, int] = BoundedTable(MAX_MEMBERS)
        self._renewals: SourceLimiter[PeerId] = SourceLimiter(RENEWALS_PER_S, RENEWALS_BURST, MAX_MEMBERS)
        if state is not None:
            self._load(state)

    def invite(self, name: str, wall: float, *, lifetime: float = TOKEN_LIFETIME_S, replaces: bool = False) -> Token:
        """A token for a machine to be called `name`; an unused one for that name stops working.

        `replaces` lets the new machine take the name from the one that holds it. Raises LocalError.
        """
        require_name(name)
        self._forget(wall)
        document = self.trust.document
        if any(hub.name == name for hub in document.hubs):
            raise LocalError(f"{name} is the name of a hub", hint="choose another name", fault=Fault.REFUSED)
        if not replaces and self._holder_of(name) is not None:
            raise LocalError(
                f"{name} is a member already", hint="choose another name, or say that the new machine replaces it"
            )
        own = document.hub(self.hub)
        others = [hub for hub in document.hubs if hub.peer_id != self.hub]
        addresses = [a for hub in ([own] if own else []) for a in hub.enrol_addresses]
        addresses += [hub.enrol_addresses[0] for hub in others]
        if not addresses:
            raise LocalError(
                "the network document lists no hub yet", hint="grant a hub its address first", fault=Fault.REFUSED
            )
        self._book.withdraw(name)
        expires = int(wall + lifetime)
        secret = self._book.invite(name, expires=expires, wall=wall, entropy=self._entropy, replaces=replaces)
        self._store()
        return Token(self.trust.network, tuple(addresses[:MAX_TOKEN_ADDRESSES]), self.hub, secret, expires, name)

    def withdraw(self, name: str) -> bool:
        """Make unused tokens for this name worthless; whether there were any."""
        gone = self._book.withdraw(name)
        if gone:
            self._store()
        return gone

    def note(self, member: Member, wall: float) -> None:
        """A hub saw this member: what it remembers of that lets the member outlive a revoked issuer."""
        if self._noted.get(member.peer_id) is None:
            self._noted.put(member.peer_id, int(wall))

    def handle_untrusted(self, request: bytes, wall: float) -> bytes:
        """The answer to a request, or the refusal of it. Never raises."""
        try:
            leaf = self._decide(request, wall)
        except _Refusal as refusal:
            return _refuse(refusal.code, str(refusal))
        except WireError as problem:
            return _refuse(Code.MALFORMED, f"the request cannot be read: {problem}")
        except TrustError as problem:
            return _refuse(Code.UNTRUSTED, str(problem))
        except LocalError:
            return _refuse(Code.FAILED, "the issuer could not write down its answer")
        chain = (leaf, self._authority.certificate.der)
        return pack((_ANSWER_KIND, self.trust.genesis.encode(), self.trust.document.encode(), chain))

    def to_bytes(self) -> bytes:
        """All that has to survive a restart."""
        members = tuple((bytes(peer), h.name, h.ipv4, h.not_after) for peer, h in self._members.items())
        noted = tuple((bytes(peer), at) for peer, at in self._noted.items())
        return pack((_STATE_KIND, self._book.to_value(), members, noted))

    def _decide(self, request: bytes, wall: float) -> bytes:
        bundle = Fields.unpack_untrusted(request, "a request", MAX_REQUEST_BYTES)
        body = bundle.raw(MAX_REQUEST_BYTES)
        proof = bundle.raw(MAX_SIGNATURE_BYTES)
        fields = Fields.unpack_untrusted(body, "a request", MAX_REQUEST_BYTES)
        kind = fields.text(64)
        network, issuer = fields.exactly(NETWORK_ID_BYTES), fields.exactly(PEER_ID_BYTES)
        if network != self.trust.network:
            raise _Refusal(Code.WRONG_NETWORK, "this issuer belongs to another network")
        if issuer != self.hub:
            raise _Refusal(Code.WRONG_ISSUER, "the request is for another issuer")
        own = self._authority.certificate
        if not own.not_before <= wall <= own.not_after or any(
            key == own.key_id for key, _ in self.trust.document.cut_offs
        ):
            raise _Refusal(Code.FAILED, "this issuer's own certificate has expired or was revoked")
        self._forget(wall)
        if kind == _JOIN_KIND:
            mac = bundle.exactly(32)
            bundle.end()
            lookup, key = fields.exactly(LOOKUP_BYTES), fields.raw(MAX_SPKI_BYTES)
            fields.end()
            return self._join(lookup, key, body, proof, mac=mac, wall=wall)
        if kind == _RENEW_KIND:
            bundle.end()
            chain = fields.raws(MAX_CHAIN, MAX_CERTIFICATE_BYTES)
            fields.end()
            return self._renew(chain, body, proof, wall)
        raise _Refusal(Code.MALFORMED, "an unknown kind of request")

    def _join(self, lookup: bytes, key_spki: bytes, body: bytes, proof: bytes, *, mac: bytes, wall: float) -> bytes:
        entry = self._book.find(lookup)
        if entry is None:
            raise _Refusal(Code.UNKNOWN, "this token is unknown here, or has expired")
        if not hmac.compare_digest(mac, proof_of(entry.verifier, pack((body, proof)))):
            raise _Refusal(Code.BAD_PROOF, "the request does not prove that it has the token")
        if entry.expires < wall:
            raise _Refusal(Code.EXPIRED, "this token has expired")
        key = public_key_untrusted(key_spki)
        if not is_p256(key) or spki(key) != key_spki:
            raise _Refusal(Code.MALFORMED, "members have ECDSA keys on P-256")
        try:
            verify(key, Scheme.ECDSA_SHA256, proof, body)
        except TrustError:
            raise _Refusal(Code.BAD_PROOF, "the request does not prove that it has its key") from None
        peer = peer_id_of(key)
        if peer in self.trust.document.revoked_peers:
            raise _Refusal(Code.REVOKED, "this key was revoked")
        if entry.used_by == peer:
            return entry.certificate
        if entry.used_by:
            raise _Refusal(Code.USED, "this token has been used")
        leaf = self._issue(key, entry.name, wall, replaces=entry.replaces)
        self._book.use(lookup, peer, leaf)
        self._store()
        return leaf

    def _renew(self, chain: tuple[bytes, ...], body: bytes, proof: bytes, wall: float) -> bytes:
        member = self.trust.verify_chain(chain, wall, grace=RENEW_GRACE_S)
        if not is_p256(member.public_key):
            raise _Refusal(Code.MALFORMED, "members have ECDSA keys on P-256")
        try:
            verify(member.public_key, Scheme.ECDSA_SHA256, proof, body)
        except TrustError:
            raise _Refusal(Code.BAD_PROOF, "the request is not signed with the key of its certificate") from None
        if any(root.key_id == member.issuer for root in self.trust.roots.accepted):
            raise _Refusal(Code.GRANTED, "the admin granted this certificate, and the admin renews it")
        cut_off = self.trust.cut_off(member)
        if cut_off is not None:
            # A stolen issuer can date its certificates back; what hubs saw before the cut-off it cannot change.
            noted = self._noted.peek(member.peer_id)
            if noted is None or noted >= cut_off:
                raise _Refusal(Code.REVOKED, "the issuer of this certificate was revoked")
        if not self._renewals.take(member.peer_id, wall):
            raise _Refusal(Code.BUSY, "this member renews too often")
        leaf = self._issue(member.public_key, member.name, wall, had=member.ipv4)
        self._store()
        return leaf

    def _issue(
        self, key: PublicKey, name: str, wall: float, *, had: IPv4Address | None = None, replaces: bool = False
    ) -> bytes:
        """Certify, and write the ledger. Raises _Refusal when the name is taken or the ledger full."""
        peer = peer_id_of(key)
        hub = next((hub for hub in self.trust.document.hubs if hub.name == name), None)
        holder = self._holder_of(name)
        if (hub is not None and hub.peer_id != peer) or (holder not in (None, peer) and not replaces):
            raise _Refusal(Code.NAME_TAKEN, f"another machine has the name {name}")
        if peer not in self._members and len(self._members) >= MAX_MEMBERS:
            raise _Refusal(Code.FULL, "this issuer has as many members as it can remember")
        if holder is not None and holder != peer:
            del self._members[holder]
        ipv4 = self._address(peer, had)
        certificate = self._authority.certificate
        leaf = issue_leaf(
            self._authority,
            key,
            self.trust.network,
            name=name,
            wall=wall,
            serial=new_serial(self._entropy),
            lifetime=MEMBER_LIFETIME_S,
            groups=certificate.groups,
            blocks=[] if ipv4 is None else [Selector.of_address(ipv4)],
        )
        self._members[peer] = _Holder(name, int(ipv4 or 0), int(wall + MEMBER_LIFETIME_S))
        return leaf

    def _address(self, peer: PeerId, had: IPv4Address | None) -> IPv4Address | None:
        """The address it has, or the lowest free one; None when all are taken, since the overlay is IPv6 anyway."""
        ours = next((block for block in self._authority.certificate.blocks if block.version == 4), None)
        if ours is None:
            return None
        taken = {holder.ipv4 for other, holder in self._members.items() if other != peer}
        # First and last address of the range stay free: some systems take them for the network and for broadcast.
        hosts = range(int(ours.start) + 1, int(ours.end))
        mine = self._members.get(peer)
        for wanted in (mine.ipv4 if mine else 0, int(had) if had else 0):
            if wanted in hosts and wanted not in taken:
                return IPv4Address(wanted)
        free = next((address for address in hosts if address not in taken), None)
        return None if free is None else IPv4Address(free)

    def _holder_of(self, name: str) -> PeerId | None:
        return next((peer for peer, holder in self._members.items() if holder.name == name), None)

    def _forget(self, wall: float) -> None:
        """Drop what is past its grace, or revoked."""
        revoked = self.trust.document.revoked_peers
        gone = [peer for peer, h in self._members.items() if h.not_after + RENEW_GRACE_S < wall or peer in revoked]
        for peer in gone:
            del self._members[peer]

    def _store(self) -> None:
        if self._persist is not None:
            self._persist(self.to_bytes())

    def _load(self, state: bytes) -> None:
        try:
            fields = Fields.unpack_untrusted(state, "the issuer's state", MAX_STATE_BYTES)
            fields.kind(_STATE_KIND)
            self._book = InvitationBook.from_fields_untrusted(fields.array(MAX_INVITATIONS))
            for item in fields.arrays(MAX_MEMBERS):
                peer = PeerId(item.exactly(PEER_ID_BYTES))
                self._members[peer] = _Holder(item.text(MAX_NAME_CHARS), item.uint(2**32 - 1), item.uint())
            for item in fields.arrays(MAX_MEMBERS):
                self._noted.put(PeerId(item.exactly(PEER_ID_BYTES)), item.uint())
        except WireError as problem:
            raise LocalError(f"the issuer's state is damaged: {problem}") from None


def _refuse(code: Code, sentence: str) -> bytes:
    return pack((_REFUSAL_KIND, code.value, sentence[:1024]))
