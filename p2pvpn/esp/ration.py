"""What one member may send to a service of this machine, in packets a second.

A member's packets are decrypted before anything can be known of them, but what is too much for the service behind goes
no further: neither the device nor the service has work with it. Generous for whoever means well, and per SA, so that
nobody uses up what is another's.
"""

from __future__ import annotations

from typing import NamedTuple

from p2pvpn.core.limits import TokenBucket

from .inner import ICMPV6, flow_untrusted

PER_S = 2000.0
"""Twice the remote procedure calls that a hub gets of all others while it takes over their records."""
BURST = 4000.0

_UDP, _TCP = 17, 6


class Service(NamedTuple):
    """A UDP port at some of this machine's IPv6 addresses, packed."""

    addresses: frozenset[bytes]
    port: int


NO_SERVICE = Service(frozenset(), 0)


class Ration:
    """That of one SA. `addresses` are those whose packets are to be looked at."""

    __slots__ = ("_bucket", "_port", "addresses")

    def __init__(self, service: Service) -> None:
        self.addresses, self._port = service
        self._bucket = TokenBucket(PER_S, BURST)

    def admits_untrusted(self, packet: bytes, now: float, count: int = 1) -> bool:
        """Whether `count` packets that begin with `packet`, to such an address, may pass. Raises WireError."""
        protocol = packet[6]
        if protocol in (_TCP, ICMPV6):
            return True
        if protocol == _UDP and len(packet) >= 44:
            port = packet[42] << 8 | packet[43]
        else:
            protocol, _, port = flow_untrusted(packet)
        return protocol != _UDP or port != self._port or self._bucket.take(now, count)
