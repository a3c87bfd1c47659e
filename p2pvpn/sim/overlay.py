"""The IP stack of a host on one overlay network: what a kernel would do around the TUN device.

Packets that the host sends go to the plane as if they came from the TUN; packets that the plane opened are answered
(ICMP echo), given to UDP sockets, forwarded to other overlay addresses (a hub of a star) or to a site behind the host.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
from collections import Counter
from collections.abc import Callable, Sequence

from p2pvpn.core.address import Endpoint, IpAddress, IpNetwork
from p2pvpn.core.errors import WireError

from . import packet as ip
from .sockets import SimTransport, SocketTable

EchoHandler = Callable[[int, bytes], None]
"""(sequence, data) of an answer."""


class OverlayStack:
    """One network's addresses, routes and sockets on one host.

    `transmit` hands a packet to the plane. `counts` says what came and why something was dropped.
    """

    def __init__(
        self,
        addresses: Sequence[IpAddress],
        routes: Sequence[IpNetwork],
        mtu: int,
        transmit: Callable[[bytes], None],
    ) -> None:
        self.addresses = tuple(addresses)
        self.routes = tuple(routes)
        self.mtu = mtu
        self.sockets = SocketTable()
        self.counts: Counter[str] = Counter()
        self.on_packet: Callable[[bytes], None] | None = None
        """Sees every packet that the plane delivers, before anything else."""
        self._transmit = transmit
        self._sites: list[IpNetwork] = []
        self._echoes: dict[int, EchoHandler] = {}
        self._path_mtus: dict[IpAddress, int] = {}
        self._reassembler = ip.Reassembler()
        self._identification = 0
        self._identifier = 0

    # ------------------------------------------------------------------ addresses

    def source_for(self, destination: IpAddress) -> IpAddress:
        """Our address of the destination's family. Raises OSError when there is none."""
        for address in self.addresses:
            if address.version == destination.version:
                return address
        raise OSError(errno.EADDRNOTAVAIL, f"no IPv{destination.version} address on this network")

    def serve(self, site: str) -> None:
        """Stand for all hosts of a prefix behind this one: their echo is answered, their sockets may be bound."""
        self._sites.append(ipaddress.ip_network(site))

    def is_local(self, address: IpAddress) -> bool:
        return address in self.addresses or any(
            address.version == site.version and address in site for site in self._sites
        )

    def is_routed(self, address: IpAddress) -> bool:
        return any(address.version == route.version and address in route for route in self.routes)

    # ------------------------------------------------------------------ sending

    def send_udp(self, local: Endpoint, remote: Endpoint, data: bytes) -> None:
        """Send a datagram, in fragments if need be; without a source address it is lost."""
        destination = remote.ip
        try:
            source = self.source_for(destination) if local.is_unspecified else local.ip
        except OSError:
            self.counts["no source address"] += 1
            return
        self.send(ip.udp_packet(source, local.port, destination, remote.port, data))

    def send_echo(self, destination: IpAddress, identifier: int, sequence: int, data: bytes) -> None:
        """Send an echo request. Raises OSError without an address of the family."""
        echo = ip.Echo(False, identifier, sequence, data)
        self.send(ip.echo_packet(self.source_for(destination), destination, echo))

    def expect_echoes(self, handler: EchoHandler) -> int:
        """An identifier whose answers go to `handler`, until `forget_echoes`."""
        self._identifier = self._identifier % 0xFFFF + 1
        self._echoes[self._identifier] = handler
        return self._identifier

    def forget_echoes(self, identifier: int) -> None:
        self._echoes.pop(identifier, None)

    def send(self, packet: bytes) -> None:
        """Route a packet of this host: to itself, or into the TUN."""
        destination = _destination(packet)
        if self.is_local(destination):
            asyncio.get_running_loop().call_soon(self.receive, packet)
            return
        self._identification += 1
        for piece in ip.cut(packet, self._path_mtus.get(destination, self.mtu), self._identification):
            self._transmit(piece)

    # ------------------------------------------------------------------ receiving

    def receive(self, packet: bytes) -> None:
        """A packet that came out of the TUN: an opened one, or an error about one that we sent."""
        if self.on_packet is not None:
            self.on_packet(packet)
        try:
            if self.is_local(_destination(packet)):
                whole = self._reassembler.take_untrusted(packet)
                if whole is not None:
                    self._receive_local(ip.parse_untrusted(whole))
            else:
                self._forward(packet)
        except WireError as problem:
            self.counts[f"bad packet: {problem}"] += 1

    def _forward(self, packet: bytes) -> None:
        onward = ip.forwarded(packet) if self.is_routed(_destination(packet)) else None
        if onward is None:
            self.counts["no route"] += 1
        else:
            self.counts["forwarded"] += 1
            self._transmit(onward)

    def _receive_local(self, inner: ip.Inner) -> None:
        if inner.protocol == ip.UDP:
            source_port, port, data = ip.udp_untrusted(inner)
            local = Endpoint(str(inner.destination), port)
            receiver = self.sockets.find(local)
            if receiver is None:
                self.counts["no socket"] += 1
            else:
                receiver(local, Endpoint(str(inner.source), source_port), data)
        elif inner.protocol in (ip.ICMP, ip.ICMPV6):
            self._receive_icmp(inner)
        else:
            self.counts[f"protocol {inner.protocol}"] += 1

    def _receive_icmp(self, inner: ip.Inner) -> None:
        narrowed = ip.narrowed_untrusted(inner)
        if narrowed is not None:
            destination, mtu = narrowed
            floor = 1280 if destination.version == 6 else 576
            self._path_mtus[destination] = max(min(mtu, self.mtu), floor)
            self.counts["too big"] += 1
            return
        echo = ip.echo_untrusted(inner)
        if echo is None:
            self.counts["other ICMP"] += 1
        elif echo.is_reply:
            handler = self._echoes.get(echo.identifier)
            if handler is not None:
                handler(echo.sequence, echo.data)
        else:
            self.counts["echo requests"] += 1
            self.send(ip.echo_packet(inner.destination, inner.source, echo._replace(is_reply=True)))

    # ------------------------------------------------------------------ sockets

    def open_udp(
        self, protocol: asyncio.DatagramProtocol, local: tuple[str, int], remote: tuple[str, int] | None
    ) -> SimTransport:
        """Bind a socket to one of our addresses or to all. Raises OSError as a real bind does."""
        return SimTransport(self.sockets, protocol, local, remote, self.send_udp)


def _destination(packet: bytes) -> IpAddress:
    if packet[0] >> 4 == 6:
        return ipaddress.IPv6Address(packet[24:40])
    return ipaddress.IPv4Address(packet[16:20])
