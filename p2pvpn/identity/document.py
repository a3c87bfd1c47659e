"""The network document: what the admin says of a network, in one record signed by its root.

    [statement, signature]      signature: the current root's, ECDSA with SHA-256

    statement  [kind, network ID, version, issued, hubs, topology, allowed pairs, prefix lengths, QoS classes,
                multicast, foreign networks, issuers, revoked peers, revoked serials, issuer cut-offs, successions, ...]
    hub        [peer ID, name, addresses, enrolment port, ...]
    issuer     [peer ID of its hub, certificate, ...]
    cut-off    [key identifier, seconds since the epoch]

Fields after the known ones, here and in the entries, are kept and signed along, so that an older program can check
and hand on what a newer one wrote. Documents of a network are totally ordered: by recoveries of its root, changes of
root, version, and last by digest, so that peers which hold different ones always agree which of them goes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property

from p2pvpn.core.address import Endpoint
from p2pvpn.core.errors import Fault, LocalError, TrustError, WireError
from p2pvpn.core.ids import NETWORK_ID_BYTES, PEER_ID_BYTES, NetworkId, PeerId
from p2pvpn.crypto.signatures import Scheme, verify

from .canonical import Fields, Value, pack
from .certificates import MAX_CERTIFICATE_BYTES
from .genesis import (
    MAX_GENESIS_BYTES,
    MAX_SIGNATURE_BYTES,
    MAX_SUCCESSIONS,
    RANGES,
    Genesis,
    Roots,
    Succession,
    verify_successions,
)
from .keys import PeerKey
from .member import Member
from .names import MAX_NAME_CHARS, is_name

_KIND = "p2pvpn-document-1"
MAX_DOCUMENT_BYTES = 262144
"""A full set of hubs and issuers takes 80 KB, 4096 revocations as much."""
MAX_HUBS = 64
MAX_ADDRESSES = 8
"""Addresses of one hub."""
MAX_ADDRESS_CHARS = 260
"""A DNS name has at most 253 characters; a port follows."""
MAX_PAIRS = 1024
MAX_PREFIX_LENGTHS = 32
"""Each costs a look-up per packet to an unknown address, all in parallel."""
MAX_ENTRIES = 256
"""QoS classes, multicast groups, foreign networks: of each."""
MAX_REVOKED = 4096
MAX_SERIAL_BYTES = 20
ENROL_PORT = 443
"""The TCP port of enrolment: passes where only the web passes."""


class Topology(Enum):
    """Who may talk to whom directly."""

    FULL = "full"
    """Everybody with everybody."""
    STAR = "star"
    """Peers with hubs only."""
    DYNAMIC = "dynamic"
    """Everybody with everybody, once traffic asks for it."""
    PARTIAL = "partial"
    """Hubs with everybody, others by pairs of groups."""


@dataclass(frozen=True, slots=True)
class HubEntry:
    """A hub. `addresses` are the admin's text, `host` or `host:port`; whoever uses a host name resolves it."""

    peer_id: PeerId
    name: str
    addresses: tuple[str, ...]
    enrol_port: int = ENROL_PORT
    extra: tuple[Value, ...] = ()

    @property
    def address(self) -> str:
        """The first of the addresses."""
        return self.addresses[0]

    def endpoints(self, default_port: int) -> tuple[Endpoint, ...]:
        """Those addresses that are numeric."""
        out = []
        for text in self.addresses:
            try:
                out.append(Endpoint.parse(text, default_port))
            except ValueError:
                continue
        return tuple(out)

    @property
    def enrol_addresses(self) -> tuple[str, ...]:
        """`host:port` of the enrolment server at each address."""
        return tuple(join_address(split_address(text)[0], self.enrol_port) for text in self.addresses)


@dataclass(frozen=True, slots=True)
class IssuerEntry:
    """An issuer: the hub it runs on, and its certificate (DER)."""

    peer_id: PeerId
    certificate: bytes
    extra: tuple[Value, ...] = ()


@dataclass(frozen=True)
class NetworkDocument:
    """One version of a network's document. `issued` and cut-offs are in seconds since the epoch.

    `prefix_lengths` are (IP version, length) of the prefixes that gateways serve. The entries of `qos`, `multicast`
    and `foreign` are arrays whose fields the engine reads.
    """

    network: NetworkId
    version: int
    issued: int
    hubs: tuple[HubEntry, ...] = ()
    topology: Topology = Topology.FULL
    pairs: tuple[tuple[str, str], ...] = ()
    prefix_lengths: tuple[tuple[int, int], ...] = ()
    qos: tuple[Value, ...] = ()
    multicast: tuple[Value, ...] = ()
    foreign: tuple[Value, ...] = ()
    issuers: tuple[IssuerEntry, ...] = ()
    revoked_peers: frozenset[PeerId] = frozenset()
    revoked_serials: frozenset[int] = frozenset()
    cut_offs: tuple[tuple[bytes, int], ...] = ()
    successions: tuple[Succession, ...] = ()
    extra: tuple[Value, ...] = ()
    signature: bytes = b""

    @classmethod
    def parse_untrusted(cls, data: bytes) -> NetworkDocument:
        """From `encode`; the signature is not looked at. Raises WireError."""
        bundle = Fields.unpack_untrusted(data, "a network document", MAX_DOCUMENT_BYTES)
        statement = bundle.raw(MAX_DOCUMENT_BYTES)
        signature = bundle.raw(MAX_SIGNATURE_BYTES)
        bundle.end()
        fields = Fields.unpack_untrusted(statement, "a network document", MAX_DOCUMENT_BYTES)
        fields.kind(_KIND)
        document = cls(
            network=NetworkId(fields.exactly(NETWORK_ID_BYTES)),
            version=fields.uint(),
            issued=fields.uint(),
            hubs=tuple(_hub(item) for item in fields.arrays(MAX_HUBS)),
            topology=_topology(fields.text(16)),
            pairs=tuple(_pair(item) for item in fields.arrays(MAX_PAIRS)),
            prefix_lengths=tuple(_prefix_length(item) for item in fields.arrays(MAX_PREFIX_LENGTHS)),
            qos=fields.array(MAX_ENTRIES).rest(),
            multicast=fields.array(MAX_ENTRIES).rest(),
            foreign=fields.array(MAX_ENTRIES).rest(),
            issuers=tuple(_issuer(item) for item in fields.arrays(RANGES)),
            revoked_peers=frozenset(
                PeerId(item) for item in fields.raws(MAX_REVOKED, PEER_ID_BYTES, at_least=PEER_ID_BYTES)
            ),
            revoked_serials=frozenset(
                int.from_bytes(item, "big") for item in fields.raws(MAX_REVOKED, MAX_SERIAL_BYTES, at_least=1)
            ),
            cut_offs=tuple(_cut_off(item) for item in fields.arrays(MAX_REVOKED)),
            successions=tuple(
                Succession.parse_untrusted(item) for item in fields.raws(MAX_SUCCESSIONS, MAX_GENESIS_BYTES)
            ),
            extra=fields.rest(),
            signature=signature,
        )
        if document.statement != statement:
            raise WireError("a network document with unordered or repeated entries")
        return document

    def sign(self, root: PeerKey) -> NetworkDocument:
        """The same document, signed. Raises LocalError when it has become too large to be accepted."""
        signed = replace(self, signature=root.sign(self.statement))
        try:
            NetworkDocument.parse_untrusted(signed.encode())
        except WireError as problem:
            raise LocalError(f"the network document cannot be signed: {problem}") from None
        return signed

    def encode(self) -> bytes:
        return pack((self.statement, self.signature))

    @cached_property
    def statement(self) -> bytes:
        """The bytes that are signed."""
        return pack(
            (
                _KIND,
                bytes(self.network),
                self.version,
                self.issued,
                tuple((bytes(h.peer_id), h.name, h.addresses, h.enrol_port, *h.extra) for h in self.hubs),
                self.topology.value,
                self.pairs,
                self.prefix_lengths,
                self.qos,
                self.multicast,
                self.foreign,
                tuple((bytes(i.peer_id), i.certificate, *i.extra) for i in self.issuers),
                tuple(sorted(bytes(peer) for peer in self.revoked_peers)),
                tuple(_serial_bytes(serial) for serial in sorted(self.revoked_serials)),
                self.cut_offs,
                tuple(item.encode() for item in self.successions),
                *self.extra,
            )
        )

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the statement: names this document, whatever the signature's form."""
        return hashlib.sha256(self.statement).digest()

    def verify(self, genesis: Genesis) -> Roots:
        """Raises TrustError unless the root of this network signed it; answers who the roots are."""
        if self.network != genesis.network_id:
            raise TrustError("the document of another network")
        roots = verify_successions(genesis, self.successions)
        verify(roots.current.public_key, Scheme.ECDSA_SHA256, self.signature, self.statement)
        return roots

    @property
    def order(self) -> tuple[int, int, int, bytes]:
        """Documents that verify are newer the greater this is."""
        recoveries = sum(item.by_recovery for item in self.successions)
        sequence = self.successions[-1].sequence if self.successions else 0
        return recoveries, sequence, self.version, self.digest

    def is_newer_than(self, other: NetworkDocument) -> bool:
        return self.order > other.order

    @cached_property
    def hub_ids(self) -> frozenset[PeerId]:
        return frozenset(hub.peer_id for hub in self.hubs)

    @cached_property
    def issuer_ids(self) -> tuple[PeerId, ...]:
        """The hubs that issue certificates, in the admin's order.

        A revoked issuer stays listed until the last of its certificates has expired, but is no hub any more.
        """
        return tuple(issuer.peer_id for issuer in self.issuers if issuer.peer_id in self.hub_ids)

    def hub(self, peer_id: PeerId) -> HubEntry | None:
        return next((hub for hub in self.hubs if hub.peer_id == peer_id), None)

    def allows(self, a: Member, b: Member) -> bool:
        """Whether the two may have an SA with each other. What goes through a hub in star mode is not asked here."""
        if a.network != self.network or b.network != self.network:
            return False
        if a.peer_id in self.revoked_peers or b.peer_id in self.revoked_peers:
            return False
        if self.topology in (Topology.FULL, Topology.DYNAMIC) or self._is_hub(a) or self._is_hub(b):
            return True
        if self.topology is Topology.STAR:
            return False
        return any(
            (one in a.groups and other in b.groups) or (one in b.groups and other in a.groups)
            for one, other in self.pairs
        )

    def _is_hub(self, member: Member) -> bool:
        return member.is_hub and member.peer_id in self.hub_ids


_ADDRESS_HINT = "write HOST or HOST:PORT, and [IPV6]:PORT"


def split_address(text: str) -> tuple[str, int | None]:
    """Host and port of `host`, `host:port`, `[2001:db8::1]:port` or `2001:db8::1`. Raises LocalError."""
    host, port = text, ""
    if text.startswith("["):
        host, bracket, tail = text[1:].partition("]")
        if not bracket or (tail and not tail.startswith(":")):
            raise LocalError(f"{text!r} is not an address", hint=_ADDRESS_HINT, fault=Fault.REFUSED)
        port = tail[1:]
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    if not host or len(text) > MAX_ADDRESS_CHARS or not host.isascii() or not host.isprintable() or " " in host:
        shown = text if len(text) <= MAX_ADDRESS_CHARS else text[:20] + "..."
        raise LocalError(f"{shown!r} is not an address", hint=_ADDRESS_HINT, fault=Fault.REFUSED)
    if not port:
        return host, None
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise LocalError(f"{port!r} is not a port", hint="a port is a number from 1 to 65535", fault=Fault.REFUSED)
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """The inverse of `split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def prefix_lengths_of(lengths: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Sorted and without repeats, as the document keeps them."""
    return tuple(sorted(set(lengths)))


def _serial_bytes(serial: int) -> bytes:
    return serial.to_bytes(max(1, (serial.bit_length() + 7) // 8), "big")


def _hub(fields: Fields) -> HubEntry:
    peer_id = PeerId(fields.exactly(PEER_ID_BYTES))
    name = fields.text(MAX_NAME_CHARS)
    addresses = fields.texts(MAX_ADDRESSES, MAX_ADDRESS_CHARS)
    port = fields.uint(65535)
    if not is_name(name) or not addresses or port == 0:
        raise WireError("a bad hub in a network document")
    try:
        for text in addresses:
            split_address(text)
    except LocalError as problem:
        raise WireError(f"a bad hub in a network document: {problem}") from None
    return HubEntry(peer_id, name, addresses, port, fields.rest())


def _issuer(fields: Fields) -> IssuerEntry:
    return IssuerEntry(PeerId(fields.exactly(PEER_ID_BYTES)), fields.raw(MAX_CERTIFICATE_BYTES), fields.rest())


def _topology(text: str) -> Topology:
    try:
        return Topology(text)
    except ValueError:
        raise WireError(f"an unknown topology {text!r}") from None


def _pair(fields: Fields) -> tuple[str, str]:
    pair = fields.text(MAX_NAME_CHARS), fields.text(MAX_NAME_CHARS)
    fields.end()
    return pair


def _prefix_length(fields: Fields) -> tuple[int, int]:
    version, length = fields.uint(6), fields.uint(128)
    fields.end()
    if version not in (4, 6) or (version == 4 and length > 32):
        raise WireError("a bad prefix length in a network document")
    return version, length


def _cut_off(fields: Fields) -> tuple[bytes, int]:
    cut = fields.exactly(PEER_ID_BYTES), fields.uint()
    fields.end()
    return cut
