"""UDP sockets of one address space: a host's underlay, or one overlay network on it.

`SocketTable` knows who has which port, `SimTransport` is what asyncio code gets from `create_datagram_endpoint`.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import Any

from p2pvpn.core.address import Endpoint

FIRST_EPHEMERAL = 32768
LAST_EPHEMERAL = 60999
"""Ports that a bind to port 0 chooses from: the range of Linux."""

Receiver = Callable[[Endpoint, Endpoint, bytes], None]
"""(endpoint it came to, source, data)."""
Sender = Callable[[Endpoint, Endpoint, bytes], None]
"""(local endpoint, destination, data); best effort."""


class SocketTable:
    """Receivers by address and port; host None is the wildcard, which any more exact address goes before."""

    def __init__(self) -> None:
        self.is_open = True
        self._receivers: dict[tuple[str | None, int], Receiver] = {}
        self._next = FIRST_EPHEMERAL

    def bind(self, host: str | None, port: int, receiver: Receiver) -> int:
        """Take a port, 0 for any; returns the port. Raises OSError (EADDRINUSE)."""
        if port == 0:
            port = self._free_port()
        elif self._is_taken(host, port):
            raise OSError(errno.EADDRINUSE, f"port {port} is in use")
        self._receivers[host, port] = receiver
        return port

    def unbind(self, host: str | None, port: int) -> None:
        self._receivers.pop((host, port), None)

    def close(self) -> None:
        """The host is gone: nothing comes in, and nothing that is sent leaves."""
        self.is_open = False
        self._receivers.clear()

    def find(self, local: Endpoint) -> Receiver | None:
        return self._receivers.get((local.host, local.port)) or self._receivers.get((None, local.port))

    def _is_taken(self, host: str | None, port: int) -> bool:
        if host is None:
            return any(taken == port for _, taken in self._receivers)
        return (host, port) in self._receivers or (None, port) in self._receivers

    def _free_port(self) -> int:
        for _ in range(FIRST_EPHEMERAL, LAST_EPHEMERAL + 1):
            port = self._next
            self._next = port + 1 if port < LAST_EPHEMERAL else FIRST_EPHEMERAL
            if not self._is_taken(None, port):
                return port
        raise OSError(errno.EADDRINUSE, "no port is free")


class SimTransport(asyncio.DatagramTransport):
    """One bound socket. Sending never blocks and never fails; a socket of a crashed host swallows everything."""

    def __init__(
        self,
        table: SocketTable,
        protocol: asyncio.DatagramProtocol,
        local: tuple[str, int],
        remote: tuple[str, int] | None,
        send: Sender,
    ) -> None:
        wildcard = local[0] in ("", "0.0.0.0", "::")  # noqa: S104 (compared, not bound)
        self._host = None if wildcard else Endpoint.of(*local).host
        port = table.bind(self._host, local[1], self._receive)
        self.local = Endpoint(local[0] if wildcard else Endpoint.of(*local).host, port)
        self._remote = None if remote is None else Endpoint.of(*remote)
        super().__init__({"sockname": sockaddr(self.local), "peername": self._remote and sockaddr(self._remote)})
        self._table = table
        self._protocol = protocol
        self._send = send
        self._closing = False

    def _receive(self, local: Endpoint, remote: Endpoint, data: bytes) -> None:
        if self._remote is None or self._remote == remote:
            self._protocol.datagram_received(data, sockaddr(remote))

    def sendto(self, data: Any, addr: Any = None) -> None:
        if self._closing or not self._table.is_open:
            return
        remote = self._remote if addr is None else Endpoint.of(addr[0], addr[1])
        if remote is None:
            raise ValueError("an unconnected socket needs an address to send to")
        self._send(self.local, remote, bytes(data))

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._table.unbind(self._host, self.local.port)
            asyncio.get_running_loop().call_soon(self._protocol.connection_lost, None)

    def abort(self) -> None:
        self.close()

    def is_closing(self) -> bool:
        return self._closing


def sockaddr(endpoint: Endpoint) -> tuple[Any, ...]:
    """As the socket module shows it: four fields for IPv6."""
    return (endpoint.host, endpoint.port, 0, 0) if endpoint.is_ipv6 else (endpoint.host, endpoint.port)
