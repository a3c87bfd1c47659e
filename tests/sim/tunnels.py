"""Hosts and Child SAs for tests that need no mesh: what IKE would negotiate, made by hand."""

import asyncio
import ipaddress

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.child import ChildSa, EspSuite
from p2pvpn.core.secret import Secret
from p2pvpn.core.selector import Selector
from p2pvpn.sim.host import SimHost
from p2pvpn.sim.internet import ACCESS

NETWORK = "net"
ROUTE = ipaddress.ip_network("fd00::/8")


def overlay(number):
    return ipaddress.ip_address(f"fd00::{number:x}")


def public_host(net, name, address, quality=ACCESS, **options):
    host = SimHost(net, name, **options)
    host.attach(net.public, address, quality=quality)
    return host


async def open_network(host, *addresses, mtu=1400):
    nets = [ROUTE, ipaddress.ip_network("10.99.0.0/16")]
    await host.plane.open_network(NETWORK, [ipaddress.ip_address(str(each)) for each in addresses], nets, mtu)


def child(number, local, remote, to, *, spi=0, mtu=1400, selectors=None):
    """One end of an SA; both ends agree when `local` and `remote` are exchanged."""
    mine, theirs = (int(end) & 0xFF | spi << 8 for end in (local, remote))
    keys = [Secret(bytes([end & 0xFF, spi]) * 18) for end in (mine, theirs)]
    sides = selectors or ((Selector.of_address(local),), (Selector.of_address(remote),))
    return ChildSa(
        id=number,
        network=NETWORK,
        suite=EspSuite.AES_GCM_16_256,
        spi_in=0xC0000000 | mine,
        spi_out=0xC0000000 | theirs,
        key_in=keys[0],
        key_out=keys[1],
        local=sides[0],
        remote=sides[1],
        path=Path(Endpoint("0.0.0.0", 4500), Endpoint.parse(to)),
        mtu=mtu,
    )


async def connect(one, other, to_one, to_other, *, number=1):
    """Both ends of an SA between two hosts that have one overlay address each."""
    ends = [host.stack().addresses[0] for host in (one, other)]
    for host, local, remote, to in ((one, *ends, to_other), (other, *reversed(ends), to_one)):
        await host.plane.install(child(number, local, remote, to))
    for host in (one, other):
        await host.plane.use(number)


class Echo(asyncio.DatagramProtocol):
    def __init__(self):
        self.got, self.lost = [], None

    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, addr):
        self.got.append((data, addr))
        if data.startswith(b"?"):
            self.transport.sendto(data[1:], addr)

    def connection_lost(self, exc):
        self.lost = exc or "closed"


def pair_network(hosts):
    class Network:
        def open_udp(self, protocol, local, remote):
            host = next((host for host in hosts if host.owns(local[0])), hosts[0])
            return host.open_udp(protocol, local, remote)

    return Network()
