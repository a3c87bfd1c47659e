"""Traffic selectors: which packets an SA may carry (RFC 7296 section 3.13, RFC 4301 section 4.4.1)."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .address import IpAddress, IpNetwork

ANY_PROTOCOL = 0


@dataclass(frozen=True, slots=True)
class Selector:
    """Addresses `start`..`end` of one family, one protocol (0 is any), ports `start_port`..`end_port`."""

    start: IpAddress
    end: IpAddress
    protocol: int = ANY_PROTOCOL
    start_port: int = 0
    end_port: int = 65535

    def __post_init__(self) -> None:
        if self.start.version != self.end.version:
            raise ValueError("a selector has one address family")

    @classmethod
    def of_network(cls, network: IpNetwork | str) -> Selector:
        """All protocols and ports of a prefix."""
        net = ipaddress.ip_network(network)
        return cls(net.network_address, net.broadcast_address)

    @classmethod
    def of_address(cls, address: IpAddress | str) -> Selector:
        return cls.of_network(str(address))

    @property
    def version(self) -> int:
        return self.start.version

    @property
    def is_empty(self) -> bool:
        return int(self.start) > int(self.end) or self.start_port > self.end_port

    def intersect(self, other: Selector) -> Selector | None:
        """What both hold, or None."""
        if self.version != other.version:
            return None
        if self.protocol and other.protocol and self.protocol != other.protocol:
            return None
        both = Selector(
            max(self.start, other.start),
            min(self.end, other.end),
            self.protocol or other.protocol,
            max(self.start_port, other.start_port),
            min(self.end_port, other.end_port),
        )
        return None if both.is_empty else both

    def holds(self, other: Selector) -> bool:
        return self.intersect(other) == other

    def matches(self, address: IpAddress, protocol: int = ANY_PROTOCOL, port: int = 0) -> bool:
        if address.version != self.version or not int(self.start) <= int(address) <= int(self.end):
            return False
        return (not self.protocol or protocol == self.protocol) and self.start_port <= port <= self.end_port

    def networks(self) -> list[IpNetwork]:
        """The prefixes that make up the address range."""
        return list(ipaddress.summarize_address_range(self.start, self.end))

    def __str__(self) -> str:
        text = ", ".join(str(net) for net in self.networks())
        if self.protocol:
            text += f" proto {self.protocol}"
        if (self.start_port, self.end_port) != (0, 65535):
            text += f" ports {self.start_port}-{self.end_port}"
        return text


def narrow(offered: Sequence[Selector], allowed: Iterable[Selector]) -> tuple[Selector, ...]:
    """What of `offered` is also `allowed`, in the order offered, without repeats (RFC 7296 section 2.9)."""
    limits = list(allowed)
    out: list[Selector] = []
    for want in offered:
        for limit in limits:
            both = want.intersect(limit)
            if both is not None and both not in out:
                out.append(both)
    return tuple(out)
