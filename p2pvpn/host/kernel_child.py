"""A Child SA as the kernel has it: two states with a reqid of their own, and the pairs of prefixes of its policies."""

from __future__ import annotations

import ipaddress
import socket

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.child import ChildSa
from p2pvpn.core.errors import LocalError
from p2pvpn.core.selector import Selector

from .kernel_trap import SA_PRIORITY
from .xfrm import REQIDS, Counted, Flow, Pair, State, Template

MAX_PAIRS = 256
"""Pairs of prefixes, so policies in each direction, of one Child SA."""


class InstalledChild:
    """One installed Child SA, and where its two states are now."""

    __slots__ = ("asked", "base", "child", "flow_in", "flow_out", "last_at", "pairs", "seen", "told")

    def __init__(self, child: ChildSa, pairs: tuple[Pair, ...], path: Path) -> None:
        self.child = child
        self.pairs = pairs
        self.asked = child.path
        self.flow_out = Flow(path.local, path.remote)
        self.flow_in = Flow(path.remote, path.local)
        self.told: Endpoint = path.remote
        self.base = [0, 0, 0, 0]
        """Packets and bytes in, packets and bytes out of states that were replaced by a move."""
        self.seen = [0, 0, 0, 0]
        self.last_at = [0.0, 0.0]
        """In and out; loop time of the look that found new packets."""

    @property
    def reqid(self) -> int:
        return REQIDS.start + self.child.id % len(REQIDS)

    def state(self, flow: Flow, replay: bytes = b"", *, inbound: bool) -> State:
        child = self.child
        spi, key = (child.spi_in, child.key_in) if inbound else (child.spi_out, child.key_out)
        return State(flow, spi, self.reqid, child.suite, key, child.esn, inbound, replay, child.transport_mode)

    def template(self, flow: Flow, *, optional: bool = False) -> Template:
        return Template(flow, self.reqid, optional, self.child.transport_mode)

    def keep_counts(self, counted: Counted, *, inbound: bool) -> None:
        """Before a state is replaced by one that counts from zero."""
        at = 0 if inbound else 2
        self.base[at] += counted.packets
        self.base[at + 1] += counted.octets


def is_exact(pair: Pair) -> bool:
    lengths = pair.source.prefixlen, pair.destination.prefixlen
    return lengths == (pair.source.max_prefixlen,) * 2 and not any(pair[2:])


def priority(pair: Pair) -> int:
    """Longest prefixes first, as routes are chosen."""
    return SA_PRIORITY - pair.source.prefixlen - pair.destination.prefixlen


def pairs_of(child: ChildSa) -> tuple[Pair, ...]:
    """Prefix by prefix, what the SA sends. Raises LocalError for what policies cannot say."""
    pairs: dict[Pair, None] = {}
    for near in child.local:
        for far in child.remote:
            if near.version != far.version or (near.protocol and far.protocol and near.protocol != far.protocol):
                continue
            ports = _port(near), _port(far)
            for source in near.networks():
                for destination in far.networks():
                    pairs[Pair(source, destination, near.protocol or far.protocol, *ports)] = None
                    if len(pairs) > MAX_PAIRS:
                        raise LocalError(f"the selectors make more than {MAX_PAIRS} policies")
    if not pairs:
        raise LocalError("the selectors have no address family in common")
    return tuple(pairs)


def bypass_of(entry: InstalledChild) -> Pair:
    """IKE and ESP themselves, of an SA in transport mode: they travel between the addresses that it protects."""
    here, there = entry.flow_out
    source, destination = ipaddress.ip_network(here.host), ipaddress.ip_network(there.host)
    return Pair(source, destination, socket.IPPROTO_UDP, here.port, there.port)


def _port(selector: Selector) -> int:
    if (selector.start_port, selector.end_port) == (0, 65535):
        return 0
    if selector.start_port == selector.end_port:
        return selector.start_port
    raise LocalError("the kernel plane takes one port or all, no range")
