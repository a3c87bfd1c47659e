"""Every bound of the relay service in one place, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """What a relay gives away. Operators may change any of it; the defaults suit a small public hub."""

    allocations: int = 4096
    """Pairs at once. 8,192 of the 10,000 ports of the default range, and four descriptors each."""
    allocations_per_peer: int = 64
    """Pairs at once that one peer asked for: a gateway that calls 64 peers whose NATs do not yield. The side that is
    called is not charged, so that nobody can use up another's share by calling it."""
    allocations_per_minute: float = 60.0
    """Sustained rate of requests of one peer: one a second covers any retry schedule."""
    allocation_burst: float = 32.0
    """A peer that comes up calls everybody it talks to at once."""
    bytes_per_second: float = 125_000_000.0
    """Sustained, per peer that asked, both directions together: 1 Gbit/s, about a quarter of what one core forwards."""
    byte_burst: float = 7_500_000_000.0
    """A minute at the sustained rate, so that only lasting use counts."""
    bind_s: float = 60.0
    """Both sides must have bound so soon after the allocation: a call takes seconds, a sleeping phone half a minute."""
    idle_s: float = 180.0
    """Without packets and binds for so long, the allocation ends: three refreshes of a client were lost, whose NAT is
    known to be patient."""
    lifetime_s: int = 600
    """A side that does not bind again within this has left, though its peer may still be sending to it."""
    queued_datagrams: int = 8
    """Kept for a side that is not bound yet: an IKE_SA_INIT, its retransmissions, and fragments of an IKE_AUTH."""
    queued_bytes: int = 12_000
    """Eight Ethernet frames; with `allocations` this bounds the queues to 50 MB even if every pair is half open."""
    nonce_s: float = 30.0
    """A nonce is good for this long at least and twice as long at most: a slow path's round trip, many times over."""
    challenges_per_second: float = 5.0
    """To one source address: a genuine client needs one per network change. Answers are not longer than requests, so
    this bounds only how far a captured request makes the relay knock at a stranger's door."""
    challenge_burst: float = 20.0
    """Many peers behind one NAT may come back at the same time."""
    challenge_sources: int = 4096
    """Source addresses remembered for the rate above, about 1 MB."""
    peers: int = 8192
    """Peers whose rates are remembered; a peer that falls out starts with a full bucket."""
