"""The machine's side of port mapping: which routers there are, a socket towards each, and UPnP beside.

For each of our private IPv4 addresses towards a default gateway, and for our global IPv6 addresses (whose router may
have a firewall to open), a `GatewayClient` asks by PCP or NAT-PMP, from a port of its own. Where that brings nothing,
UPnP is tried. At every change of the network all of it starts again; at the end the mappings are given back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.errors import LocalError, P2pvpnError
from p2pvpn.core.output import Output
from p2pvpn.core.ports import Entropy
from p2pvpn.mesh.ports import PortMapStatus
from p2pvpn.mesh.pump import Pump
from p2pvpn.punch.limits import PRIVATE
from p2pvpn.punch.portmap import pcp
from p2pvpn.punch.portmap.client import GatewayClient
from p2pvpn.punch.portmap.mapping import MapGained, MapLost, MapProtocol, MapRefused, PortMapping

from .igd import Igd
from .netlink import Gateway, LocalAddress, Netlink

log = logging.getLogger(__name__)

UPNP_AFTER_S = 1.5
"""A router that answered neither PCP nor NAT-PMP by then is asked by UPnP too."""
UPNP_FIRST_REST_S, UPNP_REST_S = 60.0, 1800.0
"""Before UPnP is tried again where it failed, doubled each time; a change of network starts over."""
MAX_GATEWAYS = 4
"""Routers asked; a laptop has one or two. Per router and family at most two addresses of ours are mapped."""
MAX_ADDRESSES = 2
GOODBYE_S = 2.0
"""For giving mappings back over TCP at the end."""

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Line:
    """One of our addresses towards one router."""

    client: GatewayClient
    igd: Igd | None
    sock: socket.socket
    pump: Pump = field(init=False)
    upnp: asyncio.Task[None] | None = None

    def send(self, path: Path, data: bytes) -> None:
        with contextlib.suppress(OSError):  # also what ICMP said of an earlier one
            self.sock.send(data)

    @property
    def mapping(self) -> PortMapping | None:
        return self.client.mapping or (self.igd.mapping if self.igd is not None else None)


class PortMapper:
    """Implements `mesh.ports.PortMapper` by the routers that the kernel's default routes name."""

    def __init__(self, netlink: Netlink, *, is_on: bool = True, entropy: Entropy = os.urandom) -> None:
        self.is_on = is_on
        self.on_change: Callable[[], None] = _ignore_change
        self._netlink = netlink
        self._entropy = entropy
        self._port = 0
        self._lines: dict[tuple[str, str], _Line] = {}
        self._announcements: list[socket.socket] = []
        self._looking: asyncio.Task[None] | None = None
        self._look_again = False
        self._said: dict[str, str] = {}

    # mesh.ports.PortMapper

    def start(self, port: int) -> None:
        self._port = port
        self._listen()
        self.network_changed()

    async def turn(self, *, on: bool) -> None:
        """The owner lets us ask from now on, or does not: then mappings are given back."""
        self.is_on = on
        if on:
            self.network_changed()
        else:
            await self._let_go()
            self.on_change()

    def mappings(self) -> Sequence[PortMapping]:
        return [line.mapping for line in self._lines.values() if line.mapping is not None]

    def status(self) -> Sequence[PortMapStatus]:
        return [
            PortMapStatus(
                line.client.gateway,
                line.mapping,
                "" if line.mapping is not None and line.mapping.is_public else line.client.reason,
            )
            for line in self._lines.values()
        ]

    def network_changed(self) -> None:
        if not self._port or not self.is_on:
            return
        if self._looking is not None:
            self._look_again = True
            return
        self._looking = asyncio.get_running_loop().create_task(self._look(), name="look for routers")
        self._looking.add_done_callback(self._looked)

    async def close(self) -> None:
        """Give every mapping back, and stop."""
        self._port = 0
        for sock in self._announcements:
            asyncio.get_running_loop().remove_reader(sock)
            sock.close()
        await self._let_go()

    async def _let_go(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
        lines, self._lines = list(self._lines.values()), {}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE_S):
                await asyncio.gather(*(self._end(line) for line in lines))

    # Routers come and go.

    async def _look(self) -> None:
        gateways = await self._netlink.gateways()
        addresses = await self._netlink.addresses()
        wanted = {(gateway.host, local): gateway for gateway, local in _ways(gateways, addresses)}
        for key in [known for known in self._lines if known not in wanted]:
            await self._end(self._lines.pop(key))
            self.on_change()
        for key, gateway in wanted.items():
            line = self._lines.get(key)
            if line is None:
                line = self._open(gateway, key[1])
                if line is None:
                    continue
                self._lines[key] = line
            line.pump.feed(line.client.start(line.pump.now))
            if line.upnp is not None and line.igd is not None and line.igd.mapping is None:
                line.upnp.cancel()  # It failed in the former network, and rests.
                line.upnp = None
            self._start_upnp(line)

    def _looked(self, task: asyncio.Task[None]) -> None:
        self._looking = None
        if not task.cancelled() and (problem := task.exception()) is not None:
            if not isinstance(problem, LocalError):
                raise problem
            log.warning("looking for routers failed: %s", problem)
        if self._look_again and self._port:
            self._look_again = False
            self.network_changed()

    def _open(self, gateway: Gateway, host: str) -> _Line | None:
        is_ipv6 = ":" in host
        sock = socket.socket(socket.AF_INET6 if is_ipv6 else socket.AF_INET, socket.SOCK_DGRAM)
        try:
            sock.setblocking(False)
            sock.bind((host, 0))
            sock.connect(_sockaddr(gateway))
        except OSError:
            sock.close()
            return None  # The address went; the next change tells.
        local = Endpoint(host, self._port)
        client = GatewayClient(local=local, gateway=gateway.host, entropy=self._entropy)
        line = _Line(client, None if is_ipv6 else Igd(gateway.host, local, self._entropy), sock)
        line.pump = Pump(client, line, lambda output: self._on_output(line, output))
        asyncio.get_running_loop().add_reader(sock, self._receive, line)
        return line

    async def _end(self, line: _Line) -> None:
        line.pump.feed(line.client.close())
        line.pump.close()
        asyncio.get_running_loop().remove_reader(line.sock)
        line.sock.close()
        if line.upnp is not None:
            line.upnp.cancel()
        if line.igd is not None:
            await line.igd.unmap()

    # Packets.

    def _receive(self, line: _Line) -> None:
        now = line.pump.now
        try:
            data = line.sock.recv(pcp.MAX_BYTES + 1)
        except BlockingIOError:
            return
        except OSError:
            line.pump.feed(line.client.unreachable(now))
            return
        line.pump.feed(line.client.handle(Endpoint(line.client.gateway, pcp.PORT), data, now))

    def _listen(self) -> None:
        """For announcements, where no other program has taken the port for itself."""
        for family in (socket.AF_INET, socket.AF_INET6):
            with contextlib.suppress(OSError):
                self._announcements.append(_announcements(family))
        for sock in self._announcements:
            asyncio.get_running_loop().add_reader(sock, self._receive_announcement, sock)

    def _receive_announcement(self, sock: socket.socket) -> None:
        try:
            data, source = sock.recvfrom(pcp.MAX_BYTES + 1)
        except OSError:
            return
        for line in self._lines.values():
            sender = Endpoint(source[0], source[1])
            line.pump.feed(line.client.announced(sender, data, line.pump.now))

    def _on_output(self, line: _Line, output: Output) -> None:
        match output:
            case MapGained(mapping=mapping):
                self._tell(mapping.gateway, _described(mapping))
                self.on_change()
            case MapLost(mapping=mapping):
                self._tell(mapping.gateway, f"the mapping of {mapping.external} is gone")
                self.on_change()
            case MapRefused(gateway=gateway, reason=reason):
                self._tell(gateway, reason)
                self._start_upnp(line)

    def _tell(self, gateway: str, what: str) -> None:
        """Once: a router that says the same again is no news."""
        if self._said.get(gateway) != what:
            self._said[gateway] = what
            log.info("router %s: %s", gateway, what)

    # UPnP.

    def _start_upnp(self, line: _Line) -> None:
        if line.igd is not None and (line.upnp is None or line.upnp.done()):
            line.upnp = asyncio.get_running_loop().create_task(self._keep_by_upnp(line, line.igd), name="UPnP")

    async def _keep_by_upnp(self, line: _Line, igd: Igd) -> None:
        """Map and renew, as long as the router does nothing by PCP or NAT-PMP."""
        await asyncio.sleep(UPNP_AFTER_S)
        rest_s = UPNP_FIRST_REST_S
        while line.client.mapping is None:
            before = igd.mapping
            try:
                pause_s = await igd.map()
                assert igd.mapping is not None
                self._tell(line.client.gateway, _described(igd.mapping))
            except P2pvpnError as problem:
                pause_s, rest_s = rest_s, min(2.0 * rest_s, UPNP_REST_S)
                line.client.reason = f"{line.client.reason}; {problem}" if line.client.reason else str(problem)
                self._tell(line.client.gateway, line.client.reason)
            if igd.mapping != before:
                self.on_change()
            await asyncio.sleep(pause_s)
        await igd.unmap()


def _announcements(family: int) -> socket.socket:
    """A socket for what routers multicast to all hosts, a group that every machine is in. Raises OSError."""
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(("", pcp.ANNOUNCE_PORT))
    except OSError:
        sock.close()
        raise
    return sock


def _sockaddr(gateway: Gateway) -> tuple[str | int, ...]:
    """With the zone as a number, which is how the socket module wants it. Raises OSError when the link is gone."""
    host, _, zone = gateway.host.partition("%")
    return (host, pcp.PORT, 0, socket.if_nametoindex(zone)) if zone else (host, pcp.PORT)


def _ways(gateways: Sequence[Gateway], addresses: Sequence[LocalAddress]) -> list[tuple[Gateway, str]]:
    """Which of our addresses are worth a question to which router: private IPv4 ones, and global IPv6 ones."""
    ways = []
    for gateway in list(dict.fromkeys(gateways))[:MAX_GATEWAYS]:
        is_ipv6 = ":" in gateway.host
        ours = [a.host for a in addresses if a.interface == gateway.interface and (":" in a.host) == is_ipv6]
        ways += [(gateway, host) for host in ours if _is_private(host) != is_ipv6][:MAX_ADDRESSES]
    return ways


def _is_private(host: str) -> bool:
    address = Endpoint(host, 0).ip
    return any(address in network for network in PRIVATE)


def _described(mapping: PortMapping) -> str:
    what = "opens" if mapping.external == mapping.internal else f"maps {mapping.external} to"
    note = "" if mapping.is_public else ", which peers elsewhere cannot use"
    return f"{what} {mapping.internal} by {_NAMES[mapping.protocol]}{note}"


_NAMES = {MapProtocol.PCP: "PCP", MapProtocol.NAT_PMP: "NAT-PMP", MapProtocol.UPNP: "UPnP"}


def _ignore_change() -> None:
    """Before the engine listens."""
