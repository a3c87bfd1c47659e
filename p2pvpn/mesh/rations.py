"""Which of this machine's services members are rationed at: the calls of the mesh itself."""

from __future__ import annotations

from collections.abc import Iterable

from p2pvpn.core.address import IpAddress
from p2pvpn.dht.rpc import DHT_PORT
from p2pvpn.esp.ration import Service


def call_service(addresses: Iterable[IpAddress]) -> Service:
    """The port of remote procedure calls at the overlay addresses of a network."""
    return Service(frozenset(address.packed for address in addresses if address.version == 6), DHT_PORT)
