"""The messages by which peers meet: RPCs between peers and hubs over the overlay, as flat lists of plain values.

    peer -> hub   call    [target, target's hubs, caller's certificate]            -> [relay endpoints, ticket]
    hub  -> hub   forward [target, caller's certificate, relay endpoints, ticket]  -> []
    hub  -> peer  meet    [caller's certificate, relay endpoints, ticket]          -> []
    any  -> any   document [offset]                                                -> [total bytes, chunk]

The caller's certificate travels along, so that the hub of the target and the target itself judge for themselves
whether the two may talk, without a look-up.
"""

from __future__ import annotations

from dataclasses import dataclass

from p2pvpn.core.address import Endpoint
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
    """A peer asks its hub for a relay to `target`, who is attached to `hubs`."""

    target: PeerId
    hubs: tuple[PeerId, ...]
    certificate: bytes

    def encode(self) -> list[object]:
        return [bytes(self.target), [bytes(hub) for hub in self.hubs], self.certificate]

    @classmethod
    def decode_untrusted(cls, args: object) -> Call:
        target, hubs, certificate = _fields(args, 3)
        if not isinstance(hubs, list | tuple) or len(hubs) > MAX_HUBS:
            raise WireError("a call names too many hubs")
        return cls(_peer_id(target), tuple(_peer_id(hub) for hub in hubs), _bytes(certificate, MAX_CERTIFICATE_BYTES))


@dataclass(frozen=True, slots=True)
class Invitation:
    """What both sides of a call get to know: where the relay is and their side's ticket."""

    relays: tuple[Endpoint, ...]
    ticket: bytes

    def encode(self) -> list[object]:
        return [[relay.packed() for relay in self.relays], self.ticket]

    @classmethod
    def decode_untrusted(cls, args: object) -> Invitation:
        relays, ticket = _fields(args, 2)
        if not isinstance(relays, list | tuple) or not 1 <= len(relays) <= MAX_RELAY_ENDPOINTS:
            raise WireError("an invitation names one to four relay endpoints")
        return cls(
            tuple(Endpoint.unpack_untrusted(_bytes(relay, 18)) for relay in relays), _bytes(ticket, MAX_TICKET_BYTES)
        )


@dataclass(frozen=True, slots=True)
class Meet:
    """A hub tells a peer: this caller waits for you at this relay."""

    certificate: bytes
    invitation: Invitation

    def encode(self) -> list[object]:
        return [self.certificate, *self.invitation.encode()]

    @classmethod
    def decode_untrusted(cls, args: object) -> Meet:
        certificate, relays, ticket = _fields(args, 3)
        return cls(_bytes(certificate, MAX_CERTIFICATE_BYTES), Invitation.decode_untrusted([relays, ticket]))


@dataclass(frozen=True, slots=True)
class Forward:
    """A hub asks another hub to tell a peer attached there."""

    target: PeerId
    meet: Meet

    def encode(self) -> list[object]:
        return [bytes(self.target), *self.meet.encode()]

    @classmethod
    def decode_untrusted(cls, args: object) -> Forward:
        target, *rest = _fields(args, 4)
        return cls(_peer_id(target), Meet.decode_untrusted(rest))


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
