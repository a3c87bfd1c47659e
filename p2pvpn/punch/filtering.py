"""Whose packets come in through a NAT or firewall (RFC 5780 section 4.4): a hub knocks from where we never sent to.

    our extra socket wrote to      knocks come from                and are let in
    one port of hub 1              the same port of hub 1          unless the test itself does not work
                                   another port of hub 1           unless ports are looked at
                                   hub 2                           only where nothing is looked at

A knock is a Binding indication whose transaction ID we chose and told the hub inside the tunnel. So who forges one has
to guess 96 bits, and a copy that comes later or from elsewhere is nobody's.
"""

from __future__ import annotations

from p2pvpn.core import stun
from p2pvpn.core.address import Endpoint
from p2pvpn.core.datagram import Kind, classify
from p2pvpn.core.errors import RemoteError, WireError
from p2pvpn.core.limits import SourceLimiter

from .behaviour import Filtering

KNOCKS_PER_S = 2.0
"""To one address: a peer learns about a NAT with ten of them and asks again every half hour, others are behind the same
NAT, and somebody may type `netcheck` again and again. 28 bytes each."""
KNOCKS_BURST = 40.0
TARGETS = 4096
"""Addresses whose rate is remembered; the least recently used one is forgotten first."""
ASKER_PER_S, ASKER_BURST = 2.0, 40.0
"""On one asker's word; of hubs, which ask for others, ten times as many."""
HUB_FACTOR = 10.0


class KnockRefused(RemoteError):
    """Too many knocks at that address, or on that word."""


def knock(transaction: bytes) -> bytes:
    """The packet: smaller than any request for one."""
    return stun.build(stun.indication(transaction))


def knock_untrusted(data: bytes) -> bytes | None:
    """The transaction ID of a knock, or None for anything else."""
    if classify(data) is not Kind.STUN:
        return None
    try:
        message = stun.parse_untrusted(data)
    except WireError:
        return None
    return message.transaction_id if message.message_class is stun.Class.INDICATION else None


def judge(*, same: bool, other_port: bool | None, other_hub: bool | None) -> Filtering:
    """From which knocks came in; None for those that no hub could send."""
    if not same:
        return Filtering.UNKNOWN
    if other_hub:
        return Filtering.ENDPOINT_INDEPENDENT
    if other_port is None:
        return Filtering.UNKNOWN
    if not other_port:
        return Filtering.ADDRESS_AND_PORT_DEPENDENT
    return Filtering.UNKNOWN if other_hub is None else Filtering.ADDRESS_DEPENDENT


class KnockLimits:
    """How often a hub knocks: per address, and per peer or hub that asks."""

    def __init__(self) -> None:
        self._targets: SourceLimiter[str] = SourceLimiter(KNOCKS_PER_S, KNOCKS_BURST, TARGETS)
        self._askers: SourceLimiter[bytes] = SourceLimiter(ASKER_PER_S, ASKER_BURST, TARGETS)

    def take(self, asker: bytes, target: Endpoint, now: float, *, is_hub: bool = False) -> None:
        """Raises KnockRefused."""
        if not self._askers.take(asker, now, 1.0 / HUB_FACTOR if is_hub else 1.0):
            raise KnockRefused("too many knocks were asked for")
        if not self._targets.take(target.host, now):
            raise KnockRefused("too many knocks at that address")
