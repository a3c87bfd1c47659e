"""Which records are true: the check that every hub runs before it stores and every client at each look-up.

The check is one pure function, cheap tests first, so that a flood of rubbish costs parsing and nothing more:

    1 form, size              the canonical encoding of `records`
    2 network                 this one
    3 time                    not expired, sequence not ahead of the clock, lifetime not beyond that of its kind
    4 key                     the record belongs where it is to be stored, or where it was found
    5 sender                  a peer stores its own records only; hubs hand on those of others
    6 certificate             the leaf holds (chain, dates, revocation: `verify_leaf`) and its key is the subject's
    7 authority               the certificate holds the name, address or prefix that the record claims
    8 signature

A record dies at most `LIFETIME_S` after its sequence, so that what was replaced cannot come back once its successor
has expired.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from enum import IntEnum
from ipaddress import IPv4Address, IPv6Address

from p2pvpn.core.errors import RemoteError, TrustError, WireError
from p2pvpn.core.ids import NetworkId
from p2pvpn.core.selector import Selector
from p2pvpn.crypto import signatures
from p2pvpn.identity.member import Member, Role

from .records import LIFETIME_S, LocatorBody, NameBody, Record, key_of, parse_untrusted

MAX_SKEW_S = 60
"""How far a publisher's clock may run ahead of ours."""


class Reason(IntEnum):
    """Why a record was refused; the number is on the wire, 16 above."""

    MALFORMED = 0
    """Oversized, not canonical, out of bounds."""
    NETWORK = 1
    """Another network's."""
    EXPIRED = 2
    """Its time is over."""
    LIFETIME = 3
    """It would live longer than its kind may."""
    FUTURE = 4
    """Its sequence is ahead of the clock."""
    KEY = 5
    """It does not belong under this key."""
    SENDER = 6
    """A peer stored what is not its own."""
    CERTIFICATE = 7
    """Its certificate does not hold."""
    SUBJECT = 8
    """Its subject is not the holder of the certificate."""
    AUTHORITY = 9
    """The certificate does not hold what the record claims."""
    SIGNATURE = 10
    """The signature does not hold."""
    RATE = 11
    """Too many stores from this source."""
    STALE = 12
    """A record with a higher sequence is there."""
    CONFLICT = 13
    """Other content with the same sequence is there."""
    TAKEN = 14
    """Another live subject holds this name or address, or the prefix has all the publishers it may have."""
    QUOTA = 15
    """The subject has as many records as it may have."""
    FULL = 16
    """The store is full."""


class RecordRefused(RemoteError):
    """A record that is not believed or not kept, and why."""

    def __init__(self, reason: Reason, message: str = "") -> None:
        super().__init__(f"{reason.name.lower()}: {message}" if message else reason.name.lower())
        self.reason = reason


VerifyLeaf = Callable[[bytes, float], Member]
"""(certificate in DER, wall time) -> the member it describes; raises TrustError."""


class AcceptancePolicy:
    """The check for one network."""

    def __init__(self, network: NetworkId, verify_leaf: VerifyLeaf) -> None:
        self.network = network
        self._verify_leaf = verify_leaf

    def check(self, raw: bytes, key: bytes, wall: float, sender: IPv6Address | None = None) -> Record:
        """The record, believed. Raises RecordRefused.

        `sender` is the peer that stores it, by its overlay address; None when it was looked up or a hub hands it on.
        """
        record = self.check_form(raw, key, wall)
        if sender is not None and sender != record.overlay:
            raise RecordRefused(Reason.SENDER, f"{sender} stores a record of {record.overlay}")
        try:
            member = self._verify_leaf(record.certificate, wall)
        except TrustError as problem:
            raise RecordRefused(Reason.CERTIFICATE, str(problem)) from None
        if member.network != record.network or member.peer_id != record.subject:
            raise RecordRefused(Reason.SUBJECT)
        _check_authority(record, member)
        try:
            signatures.verify(
                member.public_key, signatures.own_scheme(member.public_key), record.signature, record.signed_part
            )
        except TrustError:
            raise RecordRefused(Reason.SIGNATURE) from None
        return record

    def check_form(self, raw: bytes, key: bytes, wall: float) -> Record:
        """The cheap half: form, network, time and key. Enough for bytes that are the same as verified ones."""
        try:
            record = parse_untrusted(raw)
        except WireError as problem:
            raise RecordRefused(Reason.MALFORMED, str(problem)) from None
        if record.network != self.network:
            raise RecordRefused(Reason.NETWORK)
        if record.expires <= wall:
            raise RecordRefused(Reason.EXPIRED)
        if record.sequence > (wall + MAX_SKEW_S) * 1000:
            raise RecordRefused(Reason.FUTURE)
        if record.expires * 1000 > record.sequence + (LIFETIME_S[record.kind] + MAX_SKEW_S) * 1000:
            raise RecordRefused(Reason.LIFETIME)
        if key_of(record) != key:
            raise RecordRefused(Reason.KEY)
        return record


def _check_authority(record: Record, member: Member) -> None:
    body = record.body
    if isinstance(body, LocatorBody):
        return
    if isinstance(body, NameBody):
        if body.overlay != record.overlay:
            raise RecordRefused(Reason.AUTHORITY, "a name for somebody else's address")
        address = _ipv4(body.name)
        held = member.ipv4 == address if address is not None else member.name.lower() == body.name.lower()
        if not held:
            raise RecordRefused(Reason.AUTHORITY, "the certificate holds another name")
        return
    if Role.GATEWAY not in member.roles:
        raise RecordRefused(Reason.AUTHORITY, "not a gateway")
    prefix = Selector.of_network(body.prefix)
    if not any(block.holds(prefix) for block in member.blocks):
        raise RecordRefused(Reason.AUTHORITY, f"the certificate does not hold {body.prefix}")


def _ipv4(name: str) -> IPv4Address | None:
    try:
        return ipaddress.IPv4Address(name)
    except ValueError:
        return None
