"""A simulated network, and two hosts that are connected."""

import pytest

from p2pvpn.sim.internet import Internet
from p2pvpn.sim.loop import VirtualLoop

from .tunnels import connect, open_network, overlay, public_host

A, B = overlay(0xA), overlay(0xB)


@pytest.fixture
def net():
    loop = VirtualLoop()
    yield Internet(loop, 1)
    loop.close()


@pytest.fixture
def pair(net):
    """Two connected hosts: `a` at fd00::a and 10.99.0.10, `b` at fd00::b and 10.99.0.11."""
    hosts = [public_host(net, name, f"192.0.2.{number}") for name, number in (("a", 10), ("b", 11))]

    async def story():
        for number, host in enumerate(hosts):
            await open_network(host, (A, B)[number])
        await connect(*hosts, "192.0.2.10:4500", "192.0.2.11:4500")

    net.loop.run(story())
    return hosts
