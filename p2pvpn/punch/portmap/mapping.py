"""One port that a router opened for us, and what is believed of a router's word.

A router is nobody whom we trust: anybody on a café's network can pose as one. What it can do is name an address at
which nobody answers; so its word makes a candidate, and checks and certificates decide about that. It is not believed
when it names an address that no peer could use, or lifetimes that would keep us busy or silent.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from p2pvpn.core.address import Endpoint
from p2pvpn.core.output import Event
from p2pvpn.punch.candidates import is_usable
from p2pvpn.punch.limits import LINK_LOCAL_IPV6, PRIVATE

LIFETIME_S = 7200
"""Asked for (RFC 6886 section 3.3 recommends it): long enough to survive a router that is busy, short enough that a
machine which vanished is forgotten in time."""
MIN_LIFETIME_S = 120.0
"""A shorter one is taken for this: nobody makes us renew every second."""
MAX_LIFETIME_S = 86400.0
"""A longer one is taken for this: a router that forgot is asked again within half a day."""


class MapProtocol(Enum):
    """By whom a mapping is made; the value is what `status` says."""

    PCP = "pcp"
    NAT_PMP = "nat-pmp"
    UPNP = "upnp"


@dataclass(frozen=True, slots=True)
class PortMapping:
    """The router `gateway` forwards UDP from `external` to `internal`, one of our own endpoints."""

    protocol: MapProtocol
    gateway: str
    internal: Endpoint
    external: Endpoint

    @property
    def is_public(self) -> bool:
        """Whether peers elsewhere may use it. Behind another NAT (double NAT) the router's outer address is private."""
        address = self.external.ip
        if address in LINK_LOCAL_IPV6 or any(address in network for network in PRIVATE):
            return False
        return is_usable(address) and self.external.port != 0 and self.external.is_ipv6 == self.internal.is_ipv6


@dataclass(frozen=True, slots=True)
class MapGained(Event):
    """A mapping is there, or another one than before."""

    mapping: PortMapping


@dataclass(frozen=True, slots=True)
class MapLost(Event):
    """The mapping is gone."""

    mapping: PortMapping


@dataclass(frozen=True, slots=True)
class MapRefused(Event):
    """The router does not map for us now, for this reason; it is asked again later."""

    gateway: str
    reason: str


def clamped_lifetime(seconds: float) -> float:
    """A lifetime as a router says it, within reason."""
    return min(max(seconds, MIN_LIFETIME_S), MAX_LIFETIME_S)
