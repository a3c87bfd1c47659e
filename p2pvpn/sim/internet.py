"""The underlay: segments that interfaces attach to, and links that delay, lose and reorder.

    host --- home LAN --- router(NAT) --- public Internet --- router(NAT) --- CGN LAN --- router(NAT) --- ...

A *segment* is a LAN or the public Internet: it carries a datagram from one of its interfaces to the one that has the
destination, to a router that announced a prefix, or to its gateway. Every interface is one access *link* with a
quality per direction; a crossing costs both links' delay and one timer. Segments may reuse private addresses, as real
homes do. Only UDP is carried. Datagrams larger than a link's MTU are lost, as with the don't-fragment bit and no ICMP.

Every crossing can be watched: `taps` are told time, nodes, endpoints, bytes and fate; `fates` counts them.
"""

from __future__ import annotations

import contextvars
import ipaddress
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from p2pvpn.core.address import Endpoint, IpAddress, IpNetwork

from .loop import VirtualLoop, seeded

IPV4_UDP_BYTES = 28
IPV6_UDP_BYTES = 48
"""Header bytes in front of UDP data."""
SERIALISATION_S = 1e-6
"""Two packets of one flow never arrive at the same instant: their order would be undefined."""


class Datagram(NamedTuple):
    """A UDP datagram on a segment."""

    source: Endpoint
    destination: Endpoint
    data: bytes


class Fate(Enum):
    """What became of a datagram at one crossing."""

    DELIVERED = "delivered"
    LOST = "lost"
    CUT = "cut"
    TOO_BIG = "too big"
    NO_ROUTE = "no route"
    FILTERED = "filtered"
    NOBODY = "nobody listens"


class Crossing(NamedTuple):
    """One datagram on its way from one node to the next. `arrives_at` equals `sent_at` unless it was delivered."""

    sent_at: float
    arrives_at: float
    sender: str
    receiver: str
    datagram: Datagram
    fate: Fate


Tap = Callable[[Crossing], None]


@dataclass(frozen=True, slots=True)
class Quality:
    """Of one link, per direction. Probabilities in 0..1, times in seconds, `mtu` in bytes with headers.

    Jitter alone never reorders, since queues do not; `reorder` is the share of packets that take `reorder_s` longer
    while others overtake.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    reorder_s: float = 0.02
    mtu: int = 1500

    @property
    def is_plain(self) -> bool:
        return not (self.jitter_s or self.loss or self.duplicate or self.reorder)


ACCESS = Quality(delay_s=0.010)
"""A site's or a hub's line to the middle of the Internet: 20 ms from one site to another, one way."""
LAN = Quality(delay_s=0.000_25)
"""A host's cable or radio to its switch."""


class Node(Protocol):
    """A host or a router."""

    @property
    def name(self) -> str: ...

    @property
    def context(self) -> contextvars.Context | None:
        """The context that the node's callbacks run in."""
        ...

    def receive(self, interface: Interface, datagram: Datagram) -> None: ...


class Interface:
    """A node's attachment to a segment, with its addresses and the quality of its link."""

    def __init__(self, node: Node, segment: Segment, addresses: Iterable[IpAddress], quality: Quality) -> None:
        self.node = node
        self.segment = segment
        self.addresses = tuple(addresses)
        self.hosts = tuple(str(address) for address in self.addresses)
        """The addresses as endpoints spell them."""
        self.quality = quality
        self.is_up = True
        self._draw = segment.internet.draw(f"link/{segment.name}/{node.name}")
        self._last_arrival: dict[Interface, float] = {}
        segment.add(self)

    def send(self, datagram: Datagram) -> None:
        """Put a datagram on the segment; whatever is wrong with it loses it."""
        self.segment.carry(self, datagram)

    def readdress(self, *addresses: str) -> None:
        """Take these addresses instead of the former ones."""
        self.segment.remove(self)
        self.addresses = tuple(ipaddress.ip_address(address) for address in addresses)
        self.hosts = tuple(str(address) for address in self.addresses)
        self.segment.add(self)

    def detach(self) -> None:
        """Leave the segment for good."""
        self.is_up = False
        self.segment.remove(self)

    def host(self, *, ipv6: bool) -> str | None:
        """The first address of a family."""
        return next((host for host in self.hosts if (":" in host) == ipv6), None)

    def is_lost(self) -> bool:
        return bool(self.quality.loss) and self._draw.random() < self.quality.loss

    def is_doubled(self) -> bool:
        return bool(self.quality.duplicate) and self._draw.random() < self.quality.duplicate

    def held_s(self) -> float:
        """By how much a packet is overtaken: mostly not at all."""
        quality = self.quality
        return quality.reorder_s if quality.reorder and self._draw.random() < quality.reorder else 0.0

    def transit_s(self) -> float:
        quality = self.quality
        return quality.delay_s + (self._draw.random() * quality.jitter_s if quality.jitter_s else 0.0)

    def in_order(self, sender: Interface, arrives_at: float) -> float:
        """The arrival, put off until what came before it from the same sender is through."""
        arrives_at = max(arrives_at, self._last_arrival.get(sender, 0.0) + SERIALISATION_S)
        self._last_arrival[sender] = arrives_at
        return arrives_at

    def deliver(self, datagram: Datagram) -> None:
        if self.is_up:
            self.node.receive(self, datagram)


class Segment:
    """A LAN, or the public Internet: interfaces that reach each other directly."""

    def __init__(self, internet: Internet, name: str, prefixes: Iterable[IpNetwork] = ()) -> None:
        self.internet = internet
        self.name = name
        self.prefixes = tuple(prefixes)
        """What is on-link: an address in here that nobody has goes nowhere, not to the gateway."""
        self.gateway: Interface | None = None
        self.interfaces: list[Interface] = []
        self._routes: list[tuple[IpNetwork, Interface]] = []
        self._next_hops: dict[str, Interface | None] = {}

    def add(self, interface: Interface) -> None:
        taken = {address for other in self.interfaces for address in other.addresses}
        for address in interface.addresses:
            if address in taken:
                raise ValueError(f"{address} is already on {self.name}")
        self.interfaces.append(interface)
        self._next_hops.clear()

    def remove(self, interface: Interface) -> None:
        self.interfaces.remove(interface)
        self._next_hops.clear()

    def route(self, prefix: IpNetwork, via: Interface) -> None:
        """Send what is for the prefix to this interface."""
        self._routes.append((prefix, via))
        self._routes.sort(key=lambda route: -route[0].prefixlen)
        self._next_hops.clear()

    def is_on_link(self, host: str) -> bool:
        """Whether somebody on this very segment has the address."""
        hop = self.next_hop(host)
        return hop is not None and host in hop.hosts

    def next_hop(self, host: str) -> Interface | None:
        """The interface that a datagram for `host` goes to."""
        try:
            return self._next_hops[host]
        except KeyError:
            hop = self._next_hops[host] = self._find(ipaddress.ip_address(host))
            return hop

    def _find(self, address: IpAddress) -> Interface | None:
        for interface in self.interfaces:
            if address in interface.addresses:
                return interface
        for prefix, via in self._routes:
            if address.version == prefix.version and address in prefix:
                return via
        if any(address.version == prefix.version and address in prefix for prefix in self.prefixes):
            return None
        return self.gateway

    def carry(self, sender: Interface, datagram: Datagram) -> None:
        internet = self.internet
        now = internet.loop.instant
        receiver = self.next_hop(datagram.destination.host)
        if receiver is None or receiver is sender:
            internet.note(now, sender.node.name, self.name, datagram, Fate.NO_ROUTE)
            return
        if not (sender.is_up and receiver.is_up) or (internet.cuts and internet.is_cut(sender.node, receiver.node)):
            internet.note(now, sender.node.name, receiver.node.name, datagram, Fate.CUT)
            return
        near, far = sender.quality, receiver.quality
        size = len(datagram.data) + (IPV6_UDP_BYTES if datagram.destination.is_ipv6 else IPV4_UDP_BYTES)
        if size > near.mtu or size > far.mtu:
            internet.note(now, sender.node.name, receiver.node.name, datagram, Fate.TOO_BIG)
            return
        if near.is_plain and far.is_plain:
            self._schedule(now, sender, receiver, datagram, now + near.delay_s + far.delay_s)
            return
        if sender.is_lost() or receiver.is_lost():
            internet.note(now, sender.node.name, receiver.node.name, datagram, Fate.LOST)
            return
        copies = 1 + sender.is_doubled() + receiver.is_doubled()
        for _ in range(copies):
            held_s = sender.held_s() + receiver.held_s()
            arrives_at = now + sender.transit_s() + receiver.transit_s() + held_s
            self._schedule(now, sender, receiver, datagram, arrives_at, in_order=not held_s)

    def _schedule(
        self,
        now: float,
        sender: Interface,
        receiver: Interface,
        datagram: Datagram,
        arrives_at: float,
        *,
        in_order: bool = True,
    ) -> None:
        if in_order:
            arrives_at = receiver.in_order(sender, arrives_at)
        internet = self.internet
        if internet.taps:
            crossing = Crossing(now, arrives_at, sender.node.name, receiver.node.name, datagram, Fate.DELIVERED)
            for tap in internet.taps:
                tap(crossing)
        internet.fates[Fate.DELIVERED] += 1
        internet.loop.call_at_instant(arrives_at, receiver.deliver, datagram, context=receiver.node.context)


class Internet:
    """All segments of one world, what was cut, and what was seen."""

    def __init__(self, loop: VirtualLoop, seed: int) -> None:
        self.loop = loop
        self.seed = seed
        self.public = Segment(self, "internet")
        self.taps: list[Tap] = []
        self.fates: Counter[Fate] = Counter()
        self.cuts: set[frozenset[str]] = set()

    def draw(self, purpose: str) -> random.Random:
        return seeded(self.seed, purpose)

    def segment(self, name: str, *prefixes: str) -> Segment:
        return Segment(self, name, [ipaddress.ip_network(prefix) for prefix in prefixes])

    def cut(self, some: Iterable[str], others: Iterable[str]) -> None:
        """Stop everything between two groups of nodes that are neighbours on a segment, both directions."""
        others = list(others)
        self.cuts.update(frozenset((one, other)) for one in some for other in others if one != other)

    def heal(self) -> None:
        """Undo every cut."""
        self.cuts.clear()

    def is_cut(self, one: Node, other: Node) -> bool:
        return frozenset((one.name, other.name)) in self.cuts

    def note(self, now: float, sender: str, receiver: str, datagram: Datagram, fate: Fate) -> None:
        """Count and report a datagram that ends here."""
        self.fates[fate] += 1
        for tap in self.taps:
            tap(Crossing(now, now, sender, receiver, datagram, fate))
