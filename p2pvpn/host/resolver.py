"""Addresses of hubs: numeric ones as they are, names by the system's resolver, remembered for when it fails."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

from p2pvpn.core.address import Endpoint
from p2pvpn.core.limits import BoundedTable

MAX_NAMES = 256
TIMEOUT_S = 3.0
"""A hub whose name takes longer to resolve is tried again later; another hub serves meanwhile."""


class SystemResolver:
    """Implements mesh.ports.Resolver."""

    def __init__(self) -> None:
        self._known: BoundedTable[str, tuple[Endpoint, ...]] = BoundedTable(MAX_NAMES)

    async def resolve(self, address: str, default_port: int) -> Sequence[Endpoint]:
        """Numeric endpoints of `host[:port]`; a name that does not resolve now gives what it gave last."""
        try:
            return (Endpoint.parse(address, default_port),)
        except ValueError:
            pass
        host, _, port = address.partition(":")
        try:
            async with asyncio.timeout(TIMEOUT_S):
                found = await asyncio.get_running_loop().getaddrinfo(
                    host, int(port) if port else default_port, type=socket.SOCK_DGRAM
                )
        except (OSError, TimeoutError, ValueError):
            return self._known.get(address) or ()
        endpoints = tuple(dict.fromkeys(Endpoint.of(str(entry[4][0]), int(entry[4][1])) for entry in found))
        self._known.put(address, endpoints)
        return endpoints
