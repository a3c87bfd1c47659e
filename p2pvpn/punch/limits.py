"""Bounds that keep hole punching from being a weapon; one object is shared by all agents of a machine.

A member can name any address as its candidate. So checks are paced over all sessions, an address that does not answer
gets few packets whoever names it, and private addresses are tried only where they can mean the peer and not a
neighbour of ours who happens to have that number. Checks on a path that answers are not held back.

One address may be that of many members, behind a carrier's NAT, and some of them cannot answer. Where a hub attests
that a peer's tunnel comes from an address, that peer's session has a count of its own there: nobody can aim it at
anybody else.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from p2pvpn.core.address import Endpoint, IpAddress, IpNetwork
from p2pvpn.core.limits import BoundedTable, TokenBucket

from .candidates import is_usable

TA_S = 0.020
"""Between two new checks, over all sessions (RFC 8445 section 14.2 allows 5 ms and asks for 50 ms by default)."""
CHECKS_PER_S = 100.0
"""Packets to addresses that did not answer yet, retransmissions included, over all sessions."""
CHECKS_BURST = 10.0
SILENT_PACKETS = 20
"""Packets that an address gets while it stays silent: a full round of checks and a dozen single retries."""
SILENCE_S = 600.0
"""After so long the count of a silent address begins anew."""
RUNS = 3
"""Runs of guesses (`birthday`) that an address gets in SILENCE_S, from all sessions."""
RESERVE = 5.0
"""Packets of the rate that runs of guesses leave to ordinary checks at any moment."""
SILENT_ADDRESSES = 4096
"""Addresses whose silence is remembered; the least recently used one is forgotten first."""

PRIVATE = tuple(
    ipaddress.ip_network(net)
    for net in (
        "10.0.0.0/8",  # RFC 1918
        "172.16.0.0/12",
        "192.168.0.0/16",
        "100.64.0.0/10",  # RFC 6598, carrier-grade NAT
        "169.254.0.0/16",  # RFC 3927
        "fc00::/7",  # RFC 4193
    )
)
LINK_LOCAL_IPV6 = ipaddress.IPv6Network("fe80::/10")


@dataclass(slots=True)
class _Silence:
    """What a silent address got: packets sent since `since`, and how many it earned by checks of its own."""

    since: float
    sent: int = 0
    earned: int = 0


class PunchLimits:
    """`own_subnets` are the networks that our interfaces are in; `never` (the overlay) is no target in any case."""

    def __init__(self, own_subnets: Iterable[IpNetwork] = (), never: Iterable[IpNetwork] = ()) -> None:
        self._own_subnets = tuple(own_subnets)
        self._never = tuple(never)
        self._rate = TokenBucket(CHECKS_PER_S, CHECKS_BURST)
        self._silent: BoundedTable[tuple[str, bytes], _Silence] = BoundedTable(SILENT_ADDRESSES)
        self._runs: BoundedTable[str, _Silence] = BoundedTable(SILENT_ADDRESSES)
        self._next_start_at = 0.0

    def update_subnets(self, own_subnets: Iterable[IpNetwork]) -> None:
        """The machine moved to other networks."""
        self._own_subnets = tuple(own_subnets)

    def update_never(self, never: Iterable[IpNetwork]) -> None:
        """The overlay networks that the machine is in now."""
        self._never = tuple(never)

    def permits(self, target: Endpoint, *, same_site: bool) -> bool:
        """Whether a candidate that a peer named may be checked.

        `same_site` says that the peer and we are seen under one public address, so its private addresses may be ours.
        """
        if self.refuses(target):
            return False
        address = target.ip
        return same_site or self._is_ours(address) or not any(address in net for net in PRIVATE)

    def refuses(self, target: Endpoint) -> bool:
        """Whether nothing may be sent there on a peer's word, even when an authenticated check came from it."""
        address = target.ip
        if any(address in net for net in self._never):
            return True
        return not self._is_ours(address) and (not is_usable(address) or address in LINK_LOCAL_IPV6)

    def _is_ours(self, address: IpAddress) -> bool:
        return any(address in net for net in self._own_subnets)

    def reserve_start(self, now: float) -> float:
        """The caller's slot for one new check: slots are Ta apart and given in the order in which they are asked for.

        Who waits holds one slot, so sessions take turns and none is woken for another one's.
        """
        at = max(now, self._next_start_at)
        self._next_start_at = at + TA_S
        return at

    def take_rate(self, now: float) -> bool:
        """Whether a packet to an address that did not answer yet fits the rate."""
        return self._rate.take(now)

    def take_spare(self, now: float) -> bool:
        """The same for a guess, which lets ordinary checks go before."""
        return self._rate.has(now, RESERVE + 1.0) and self._rate.take(now)

    def take_run(self, host: str, now: float) -> bool:
        """Whether a run of guesses may begin towards an address; it is counted then."""
        entry = self._runs.get(host)
        if entry is None or now - entry.since >= SILENCE_S:
            entry = _Silence(now)
            self._runs.put(host, entry)
        entry.sent += 1
        return entry.sent <= RUNS

    def take_silent(self, target: Endpoint, now: float, *, permitted: bool, session: bytes = b"") -> bool:
        """Whether a silent address may get one more packet; it is counted then. Counted by address, not by port.

        Without `permitted` it gets only what it earned. `session` has a count of its own: to be given only for an
        address that a hub attests for that session's peer.
        """
        entry = self._entry(target, session, now)
        if entry.sent >= entry.earned + (SILENT_PACKETS if permitted else 0):
            return False
        entry.sent += 1
        return True

    def earn(self, target: Endpoint, now: float, *, session: bytes = b"", packets: int = 1) -> None:
        """An authenticated check came from there: it may get a packet for it, so that nobody gets more than came."""
        self._entry(target, session, now).earned += packets

    def answered(self, target: Endpoint, *, session: bytes = b"") -> None:
        """An authenticated answer came from there: it is not silent."""
        self._silent.pop((target.host, b""))
        self._silent.pop((target.host, session))

    def _entry(self, target: Endpoint, session: bytes, now: float) -> _Silence:
        key = (target.host, session)
        entry = self._silent.get(key)
        if entry is None or now - entry.since >= SILENCE_S:
            entry = _Silence(now)
            self._silent.put(key, entry)
        return entry
