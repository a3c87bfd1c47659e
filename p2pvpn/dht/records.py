"""Records: what a peer says about itself, signed, as the hubs keep it and everybody can check it.

A record is one deterministic MessagePack array:

    [kind, network, subject, sequence, expiry, body, certificate, signature]
      int   32 B      20 B     ms      s     array      DER         bytes

`sequence` is the publisher's wall clock in milliseconds when it signed; `expiry` is in seconds since the epoch. The
signature covers a context string and the array of the first seven fields. Only arrays, byte strings, text and
integers occur, and a record is accepted only when encoding it again gives the same bytes: MessagePack itself allows
several encodings of one value.

    kind      body                            found under the hash of        who may publish it
    LOCATOR   [[hub ID..], [endpoint..]]      network, overlay address       the peer of that address
    NAME      [name, overlay address]         network, name in lower case    whose certificate holds name or address
    ROUTE     [[address, length], priority]   network, prefix                gateways whose certificate holds the prefix

An IPv4 overlay address is published as a name in its usual notation, so that both are unique by the same rule.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv6Address
from typing import ClassVar

from p2pvpn.core.address import Endpoint, IpNetwork
from p2pvpn.core.errors import WireError
from p2pvpn.core.ids import NETWORK_ID_BYTES, PEER_ID_BYTES, NetworkId, PeerId, overlay_address
from p2pvpn.crypto import signatures
from p2pvpn.crypto.signatures import PrivateKey

from .packing import list_untrusted, pack, shape_untrusted, unpack_untrusted

MAX_RECORD_BYTES = 2048
"""A P-256 leaf certificate has 500 to 900 bytes; RSA and several prefixes still fit."""
MAX_HUBS = 8
"""Hubs in a locator; a peer is attached to two or three."""
MAX_ENDPOINTS = 16
"""Endpoints in a locator: as many as candidates per peer."""
MAX_NAME_BYTES = 255
"""RFC 1035 section 2.3.4."""
MAX_PRIORITY = 255
KEY_BYTES = 20
"""A Kademlia key."""
SIGNING_CONTEXT = b"p2pvpn record 1\0"
KEY_CONTEXT = b"p2pvpn key 1\0"

_MAX_INTEGER = 2**63 - 1

Signer = Callable[[bytes], bytes]
"""Signs with the key of the certificate, by `signatures.own_scheme` of it; the key may live in a TPM."""


class Kind(IntEnum):
    """What a record says; the number is on the wire."""

    LOCATOR = 1
    NAME = 2
    ROUTE = 3


LIFETIME_S = {Kind.LOCATOR: 600, Kind.NAME: 3600, Kind.ROUTE: 600}
"""How long a record may live after its sequence. Publishers refresh at half of it."""


@dataclass(frozen=True, slots=True)
class LocatorBody:
    """Which hubs the peer is attached to, and at which public or declared addresses it answers, best first."""

    kind: ClassVar[Kind] = Kind.LOCATOR
    hubs: tuple[PeerId, ...]
    endpoints: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class NameBody:
    """The overlay address of who holds `name`."""

    kind: ClassVar[Kind] = Kind.NAME
    name: str
    overlay: IPv6Address


@dataclass(frozen=True, slots=True)
class RouteBody:
    """A prefix that the publisher serves; of several gateways the lowest `priority` (0..255) is preferred."""

    kind: ClassVar[Kind] = Kind.ROUTE
    prefix: IpNetwork
    priority: int = 0


Body = LocatorBody | NameBody | RouteBody


@dataclass(frozen=True, slots=True)
class Record:
    """A parsed record. Parsing checks nothing but the form; `policy` says whether it is true."""

    network: NetworkId
    subject: PeerId
    sequence: int
    expires: int
    body: Body
    certificate: bytes
    signature: bytes
    raw: bytes

    @property
    def kind(self) -> Kind:
        return self.body.kind

    @property
    def overlay(self) -> IPv6Address:
        """The overlay address of the subject."""
        return overlay_address(self.network, self.subject)

    @property
    def signed_part(self) -> bytes:
        """What the signature covers."""
        return SIGNING_CONTEXT + pack(self.fields)

    @property
    def fields(self) -> list[object]:
        """The array without the signature, as it is encoded."""
        body = _body_fields(self.body)
        return [
            int(self.kind),
            bytes(self.network),
            bytes(self.subject),
            self.sequence,
            self.expires,
            body,
            self.certificate,
        ]


def key_of_locator(network: NetworkId, overlay: IPv6Address) -> bytes:
    """Where the locator of an overlay address is kept."""
    return _key(Kind.LOCATOR, network, overlay.packed)


def key_of_name(network: NetworkId, name: str) -> bytes:
    """Where a name (case does not matter, RFC 4343) or an IPv4 overlay address in its usual notation is kept."""
    return _key(Kind.NAME, network, name.lower().encode())


def key_of_route(network: NetworkId, prefix: IpNetwork) -> bytes:
    """Where the routes of a prefix are kept."""
    return _key(Kind.ROUTE, network, prefix.network_address.packed + bytes([prefix.prefixlen]))


def key_of(record: Record) -> bytes:
    """Where this record belongs: 20 bytes."""
    body = record.body
    if isinstance(body, LocatorBody):
        return key_of_locator(record.network, record.overlay)
    if isinstance(body, NameBody):
        return key_of_name(record.network, body.name)
    return key_of_route(record.network, body.prefix)


def _key(kind: Kind, network: NetworkId, value: bytes) -> bytes:
    return hashlib.sha256(KEY_CONTEXT + bytes([kind]) + network + value).digest()[:KEY_BYTES]


def signer(key: PrivateKey) -> Signer:
    """Sign records with a key that is at hand."""
    scheme = signatures.own_scheme(key.public_key())
    return lambda data: signatures.sign(key, scheme, data)


def build(
    network: NetworkId,
    subject: PeerId,
    body: Body,
    *,
    sequence: int,
    expires: int,
    sign: Signer,
    certificate: bytes,
) -> bytes:
    """A signed record. `sequence` in milliseconds, `expires` in seconds, both since the epoch.

    Raises ValueError for what `parse_untrusted` would refuse.
    """
    draft = Record(network, subject, sequence, expires, body, certificate, b"", b"")
    raw = pack([*draft.fields, sign(draft.signed_part)])
    try:
        parse_untrusted(raw)
    except WireError as problem:
        raise ValueError(f"not a record that others would accept: {problem}") from None
    return raw


def parse_untrusted(raw: bytes) -> Record:
    """A record in its canonical form. Raises WireError for everything else; nothing is verified."""
    fields = unpack_untrusted(raw, MAX_RECORD_BYTES)
    kind, network, subject, sequence, expires, body, certificate, signature = shape_untrusted(
        fields, int, bytes, bytes, int, int, list, bytes, bytes
    )
    if len(network) != NETWORK_ID_BYTES or len(subject) != PEER_ID_BYTES:
        raise WireError("a network or peer ID of a wrong size")
    if not 0 <= sequence <= _MAX_INTEGER or not 0 <= expires <= _MAX_INTEGER:
        raise WireError("sequence or expiry out of range")
    parse_body = _BODY_PARSERS.get(kind)
    if parse_body is None:
        raise WireError(f"a record of unknown kind {kind}")
    record = Record(
        NetworkId(network), PeerId(subject), sequence, expires, parse_body(body), certificate, signature, bytes(raw)
    )
    if pack([*record.fields, signature]) != raw:
        raise WireError("a record that is not in canonical form")
    return record


def _body_fields(body: Body) -> list[object]:
    if isinstance(body, LocatorBody):
        return [[bytes(hub) for hub in body.hubs], [endpoint.packed() for endpoint in body.endpoints]]
    if isinstance(body, NameBody):
        return [body.name, body.overlay.packed]
    return [[body.prefix.network_address.packed, body.prefix.prefixlen], body.priority]


def _locator_body(fields: list[object]) -> LocatorBody:
    hubs, endpoints = shape_untrusted(fields, list, list)
    list_untrusted(hubs, bytes, MAX_HUBS)
    list_untrusted(endpoints, bytes, MAX_ENDPOINTS)
    if any(len(hub) != PEER_ID_BYTES for hub in hubs):
        raise WireError("a hub ID of a wrong size")
    parsed = tuple(Endpoint.unpack_untrusted(endpoint) for endpoint in endpoints)
    if any(endpoint.port == 0 or endpoint.is_unspecified or endpoint.ip.is_multicast for endpoint in parsed):
        raise WireError("an endpoint that nobody can be at")
    return LocatorBody(tuple(PeerId(hub) for hub in hubs), parsed)


def _name_body(fields: list[object]) -> NameBody:
    name, overlay = shape_untrusted(fields, str, bytes)
    if not name or len(name.encode()) > MAX_NAME_BYTES or len(overlay) != 16:
        raise WireError("an empty or oversized name, or no IPv6 address")
    return NameBody(name, IPv6Address(overlay))


def _route_body(fields: list[object]) -> RouteBody:
    prefix, priority = shape_untrusted(fields, list, int)
    address, length = shape_untrusted(prefix, bytes, int)
    if len(address) not in (4, 16) or not 0 <= priority <= MAX_PRIORITY or not 0 <= length <= 8 * len(address):
        raise WireError("a prefix or priority out of range")
    try:
        return RouteBody(ipaddress.ip_network((address, length)), priority)
    except ValueError:
        raise WireError("a prefix with host bits set") from None


_BODY_PARSERS: dict[int, Callable[[list[object]], Body]] = {
    Kind.LOCATOR: _locator_body,
    Kind.NAME: _name_body,
    Kind.ROUTE: _route_body,
}
