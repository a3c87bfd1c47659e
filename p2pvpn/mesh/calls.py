"""The messages by which peers meet: RPCs between peers and hubs over the overlay, as flat lists of plain values.

    peer -> hub   call     [target, resume, certificate, IKE]  -> [relay endpoints, ticket, target's address, IKE]
    hub  -> hub   forward  [target, <meet>]                    -> [target's address, IKE]
    hub  -> peer  meet     [certificate, resume, relay endpoints, ticket, caller's address, IKE]  -> [IKE]
    any  -> any   document [offset]                            -> [total bytes, chunk]

A target is an overlay address; its hub knows the tunnel, any other hub the locator. `resume` is 1 when the caller has
an SA with the target, whose path died; else 0. The caller's certificate travels along, so that the hub of the target
and the target itself judge for themselves whether the two may talk, without a look-up.

IKE rides along: the caller's IKE_SA_INIT request, and in the answers the target's response, empty when it gave none
in time (or `resume` leaves nothing to begin). To hubs these are bytes. So the first message over the relay is the
second exchange already.

An address here is where a hub sees that peer's tunnel come from, 4 or 16 bytes, or none when it does not know. So each
side knows of one address that it is the other's, and not one that the other made up for it to send to.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

from p2pvpn.core.address import Endpoint, IpAddress
from p2pvpn.core.errors import WireError

CALL = "call"
FORWARD = "forward"
MEET = "meet"
DOCUMENT = "document"

OVERLAY_BYTES = 16
MAX_RELAY_ENDPOINTS = 4
"""A hub has an IPv4 and an IPv6 address, perhaps two of each."""
MAX_CERTIFICATE_BYTES = 1024
MAX_TICKET_BYTES = 256
MAX_IKE_BYTES = 2048
"""Of an IKE_SA_INIT message: ours has 450; certificate requests for many roots make the answer longer."""
DOCUMENT_CHUNK_BYTES = 1000
"""Leaves room for the RPC header in a datagram that no tunnel has to fragment."""


@dataclass(frozen=True, slots=True)
class Call:
    """A peer asks a hub for a relay to `target`, for the sake of a live SA (`resume`) or to begin one with `ike`."""

    target: IPv6Address
    certificate: bytes
    resume: bool = False
    ike: bytes = b""

    def encode(self) -> list[object]:
        return [self.target.packed, int(self.resume), self.certificate, self.ike]

    @classmethod
    def decode_untrusted(cls, args: object) -> Call:
        target, resume, certificate, ike = _fields(args, 4)
        return cls(
            _overlay(target), _bytes(certificate, MAX_CERTIFICATE_BYTES), resume == 1, _bytes(ike, MAX_IKE_BYTES)
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
class Answered:
    """A hub's answer to a call: where to meet the target, and what it said to the IKE message, if anything."""

    invitation: Invitation
    ike: bytes = b""

    def encode(self) -> list[object]:
        return [*self.invitation.encode(), self.ike]

    @classmethod
    def decode_untrusted(cls, args: object) -> Answered:
        *invitation, ike = _fields(args, 4)
        return cls(Invitation.decode_untrusted(invitation), _bytes(ike, MAX_IKE_BYTES))


@dataclass(frozen=True, slots=True)
class Meet:
    """A hub tells a peer: this caller waits for you at this relay, to begin (with `ike`) or to `resume`."""

    certificate: bytes
    invitation: Invitation
    resume: bool = False
    ike: bytes = b""

    def encode(self) -> list[object]:
        return [self.certificate, int(self.resume), *self.invitation.encode(), self.ike]

    @classmethod
    def decode_untrusted(cls, args: object) -> Meet:
        certificate, resume, *invitation, ike = _fields(args, 6)
        return cls(
            _bytes(certificate, MAX_CERTIFICATE_BYTES),
            Invitation.decode_untrusted(invitation),
            resume == 1,
            _bytes(ike, MAX_IKE_BYTES),
        )


@dataclass(frozen=True, slots=True)
class Forward:
    """A hub asks another hub to tell a peer attached there."""

    target: IPv6Address
    meet: Meet

    def encode(self) -> list[object]:
        return [self.target.packed, *self.meet.encode()]

    @classmethod
    def decode_untrusted(cls, args: object) -> Forward:
        target, *rest = _fields(args, 7)
        return cls(_overlay(target), Meet.decode_untrusted(rest))


@dataclass(frozen=True, slots=True)
class Told:
    """The other hub's answer: where it sees the target, and what that said to the IKE message."""

    seen_at: IpAddress | None
    ike: bytes = b""

    def encode(self) -> list[object]:
        return [encode_address(self.seen_at), self.ike]

    @classmethod
    def decode_untrusted(cls, args: object) -> Told:
        seen_at, ike = _fields(args, 2)
        return cls(decode_address_untrusted(seen_at), _bytes(ike, MAX_IKE_BYTES))


def decode_response_untrusted(args: object) -> bytes:
    """The called peer's answer to `meet`: its IKE message, empty for none. Raises WireError."""
    (ike,) = _fields(args, 1)
    return _bytes(ike, MAX_IKE_BYTES)


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


def _overlay(value: object) -> IPv6Address:
    if not isinstance(value, bytes) or len(value) != OVERLAY_BYTES:
        raise WireError("an overlay address has 16 bytes")
    return IPv6Address(value)
