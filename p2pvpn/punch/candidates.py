"""Candidates: addresses at which a peer may be reachable, how they are ranked, and how they travel inside IKE.

    count(1)  then per candidate:  kind(1)  length(1)  endpoint(6 or 18: address, port)

Entries are in ascending order of their bytes without repeats, so that a list has one encoding. A candidate's base, the
local endpoint that packets are sent from, stays at home: no peer needs it. Kinds that a later version adds are skipped
by this one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from p2pvpn.core.address import Endpoint, IpAddress
from p2pvpn.core.errors import LocalError, WireError
from p2pvpn.core.wire import Reader

MAX_CANDIDATES = 16
"""Candidates that a peer may name: more than a well-connected laptop has, few enough to be no weapon."""
MAX_LIST_BYTES = 512
"""16 candidates of IPv6 take 321 bytes; the rest is room for kinds that are skipped."""
LOCAL_PREFERENCE_IPV6 = 65535
LOCAL_PREFERENCE_IPV4 = 32767
"""IPv6 first: mostly without translation (RFC 8421 section 4)."""
COMPONENT = 1
"""One UDP socket carries everything, so there is one component."""


class CandidateKind(Enum):
    """Wire value, type preference (RFC 8445 section 5.1.2.2: peer-reflexive above server-reflexive, 126 at most)."""

    HOST = (1, 126)
    """An address of the machine itself."""
    REFLEXIVE = (2, 100)
    """What a hub saw: the outside of our NATs."""
    PEER_REFLEXIVE = (3, 110)
    """What the peer saw, or where its check came from; never signalled."""
    MAPPED = (4, 104)
    """A port that a router opened for us (PCP, NAT-PMP, UPnP)."""
    DECLARED = (5, 118)
    """An address that the operator says reaches us."""

    def __init__(self, wire: int, preference: int) -> None:
        self.wire = wire
        self.preference = preference


SIGNALLED = {
    kind.wire: kind
    for kind in (CandidateKind.HOST, CandidateKind.REFLEXIVE, CandidateKind.MAPPED, CandidateKind.DECLARED)
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """Reachable at `endpoint`; our own ones send from `base`, whose host may be the wildcard.

    A remote candidate has no base of interest: it is the endpoint.
    """

    kind: CandidateKind
    endpoint: Endpoint
    base: Endpoint

    @classmethod
    def remote(cls, kind: CandidateKind, endpoint: Endpoint) -> Candidate:
        return cls(kind, endpoint, endpoint)

    @classmethod
    def host(cls, endpoint: Endpoint) -> Candidate:
        return cls(CandidateKind.HOST, endpoint, endpoint)


def priority(candidate: Candidate) -> int:
    """RFC 8445 section 5.1.2.1."""
    return priority_of(candidate.kind, candidate.endpoint)


def priority_of(kind: CandidateKind, endpoint: Endpoint) -> int:
    """The priority that a candidate of this kind and family has, 1..2**31-1."""
    local_preference = LOCAL_PREFERENCE_IPV6 if endpoint.is_ipv6 else LOCAL_PREFERENCE_IPV4
    return (kind.preference << 24) + (local_preference << 8) + 256 - COMPONENT


def pair_priority(controlling: int, controlled: int) -> int:
    """RFC 8445 section 6.1.2.3, from the priorities of both sides' candidates."""
    low, high = sorted((controlling, controlled))
    return (low << 32) + 2 * high + (controlling > controlled)


def is_usable(address: IpAddress) -> bool:
    """Whether a unicast packet to this address can mean a peer on another machine."""
    if address.is_loopback or address.is_multicast or address.is_unspecified:
        return False
    return address.version == 6 or not (address.is_reserved or address.packed[0] == 0)


def encode_candidates(candidates: Iterable[Candidate]) -> bytes:
    """Wire bytes of what the peer may be told; raises LocalError beyond 16 candidates or for unusable ones."""
    entries: set[bytes] = set()
    for candidate in candidates:
        if candidate.kind.wire not in SIGNALLED:
            raise LocalError(f"{candidate.kind.name} candidates are not signalled")
        if not candidate.endpoint.port or not is_usable(candidate.endpoint.ip):
            raise LocalError(f"{candidate.endpoint} is no candidate")
        packed = candidate.endpoint.packed()
        entries.add(bytes((candidate.kind.wire, len(packed))) + packed)
    if len(entries) > MAX_CANDIDATES:
        raise LocalError(f"{len(entries)} candidates; at most {MAX_CANDIDATES} may be signalled")
    return bytes((len(entries),)) + b"".join(sorted(entries))


def decode_candidates_untrusted(data: bytes) -> tuple[Candidate, ...]:
    """The peer's candidates, at most 16, none loopback, multicast, unspecified or at port 0. Raises WireError."""
    if len(data) > MAX_LIST_BYTES:
        raise WireError(f"{len(data)} bytes of candidates")
    reader = Reader(data)
    count = reader.u8()
    if count > MAX_CANDIDATES:
        raise WireError(f"{count} candidates")
    candidates: list[Candidate] = []
    last = b""
    for _ in range(count):
        wire, length = reader.u8(), reader.u8()
        packed = reader.take(length)
        entry = bytes((wire, length)) + packed
        if entry <= last:
            raise WireError("candidates are not in their order")
        last = entry
        kind = SIGNALLED.get(wire)
        if kind is None:
            continue
        endpoint = Endpoint.unpack_untrusted(packed)
        if endpoint.packed() != packed or not endpoint.port or not is_usable(endpoint.ip):
            raise WireError(f"{endpoint} is no candidate")
        candidates.append(Candidate.remote(kind, endpoint))
    reader.end()
    return tuple(candidates)
