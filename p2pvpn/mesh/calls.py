"""The messages by which peers meet: RPCs between peers and hubs over the overlay, as flat lists of plain values.

    peer -> hub   call     [target, target's hubs, resume, certificate]  -> [relay endpoints, ticket, target's address]
    hub  -> hub   forward  [target, <meet>]                              -> target's address
    hub  -> peer  meet     [certificate, resume, relay endpoints, ticket, caller's address]  -> []
    any  -> any   document [offset]                                      -> [total bytes, chunk]

`resume` is 1 when the caller has an SA with the target, whose path died; else 0. The caller's certificate travels
along, so that the hub of the target and the target itself judge for themselves whether the two may talk, without a
look-up.

An address here is where a hub sees that peer's tunnel come from, 4 or 16 bytes, or none when it does not know. So each
side knows of one address that it is the other's, and not one that the other made up for it to send to.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address

from p2pvpn.core.address import Endpoint, IpAddress
from p2pvpn.core.errors import WireError
from p2pvpn.core.ids import PEER_ID_BYTES, PeerId

CALL = "call"
FORWARD = "forward"
MEET = "meet"
DOCUMENT = "document"

MAX_HUBS = 8
"""A locator names the hubs its peer is attached to; more than two or three would only cost keepalives."""
MAX_RELAY_ENDPOINTS = 4
"""A hub has an IPv4 and an IPv6 address, perhaps two of each."""
MAX_CERTIFICATE_BYTES = 1024
MAX_TICKET_BYTES = 256
DOCUMENT_CHUNK_BYTES = 1000
"""Leaves room for the RPC header in a datagram that no tunnel has to fragment."""


@dataclass(frozen=True, slots=True)
class Call:
    """A peer asks its hub for a relay to `target`, who is attached to `hubs`; `resume` for the sake of a live SA."""

    target: PeerId
    hubs: tuple[PeerId, ...]
    certificate: bytes
    resume: bool = False

    def encode(self) -> list[object]:
        return [bytes(self.target), [bytes(hub) for hub in self.hubs], int(self.resume), self.certificate]

    @classmethod
    def decode_untrusted(cls, args: object) -> Call:
        target, hubs, resume, certificate = _fields(args, 4)
        if not isinstance(hubs, list | tuple) or len(hubs) > MAX_HUBS:
            raise WireError("a call names too many hubs")
        return cls(
            _peer_id(target),
            tuple(_peer_id(hub) for hub in hubs),
            _bytes(certificate, MAX_CERTIFICATE_BYTES),
            resume == 1,
        )


@dataclass(frozen=True, slots=True)
class Invitation:
    """What both sides of a call get to know: where the relay is, their side's ticket, where the hub sees the other."""

    relays: tuple[Endpoint, ...]
    ticket: bytes
    other: IpAddress | None = None

    def encode(self) -> list[object]:
        return [[relay.packed() for relay in self.relays], self.ticket, encode_address(self.other)]

    @classmethod
    def decode_untrusted(cls, args: object) -> Invitation:
        relays, ticket, other = _fields(args, 3)
        if not isinstance(relays, list | tuple) or not 1 <= len(relays) <= MAX_RELAY_ENDPOINTS:
            raise WireError("an invitation names one to four relay endpoints")
        return cls(
            tuple(Endpoint.unpack_untrusted(_bytes(relay, 18)) for relay in relays),
            _bytes(ticket, MAX_TICKET_BYTES),
            decode_address_untrusted(other),
        )


@dataclass(frozen=True, slots=True)
class Meet:
    """A hub tells a peer: this caller waits for you at this relay, to begin or to `resume`."""

    certificate: bytes
    invitation: Invitation
    resume: bool = False

    def encode(self) -> list[object]:
        return [self.certificate, int(self.resume), *self.invitation.encode()]

    @classmethod
    def decode_untrusted(cls, args: object) -> Meet:
        certificate, resume, *invitation = _fields(args, 5)
        return cls(_bytes(certificate, MAX_CERTIFICATE_BYTES), Invitation.decode_untrusted(invitation), resume == 1)


@dataclass(frozen=True, slots=True)
class Forward:
    """A hub asks another hub to tell a peer attached there."""

    target: PeerId
    meet: Meet

    def encode(self) -> list[object]:
        return [bytes(self.target), *self.meet.encode()]

    @classmethod
    def decode_untrusted(cls, args: object) -> Forward:
        target, *rest = _fields(args, 6)
        return cls(_peer_id(target), Meet.decode_untrusted(rest))


def encode_address(address: IpAddress | None) -> bytes:
    """An address in a call; empty for an unknown one."""
    return b"" if address is None else address.packed


def decode_address_untrusted(value: object) -> IpAddress | None:
    """Raises WireError."""
    packed = _bytes(value, 16)
    if len(packed) not in (0, 4, 16):
        raise WireError("an address has 4 or 16 bytes")
    return ip_address(packed) if packed else None


def _fields(args: object, count: int) -> list[object]:
    if not isinstance(args, list | tuple) or len(args) != count:
        raise WireError(f"expected {count} fields")
    return list(args)


def _bytes(value: object, limit: int) -> bytes:
    if not isinstance(value, bytes) or len(value) > limit:
        raise WireError(f"expected at most {limit} bytes")
    return value


def _peer_id(value: object) -> PeerId:
    if not isinstance(value, bytes) or len(value) != PEER_ID_BYTES:
        raise WireError("a peer ID has 20 bytes")
    return PeerId(value)
