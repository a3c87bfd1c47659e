"""miniupnpd as the router: PCP, NAT-PMP and UPnP by it, and two peers that meet by the ports it maps."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from p2pvpn.core.address import Endpoint
from p2pvpn.core.output import Output, Transmit
from p2pvpn.host.igd import Igd
from p2pvpn.host.netlink import Netlink
from p2pvpn.host.portmap import PortMapper
from p2pvpn.lab import nat
from p2pvpn.lab.nat import NatKind
from p2pvpn.lab.net import Home, Lab, Node
from p2pvpn.lab.stage import Stage
from p2pvpn.punch.portmap import pcp
from p2pvpn.punch.portmap.client import GatewayClient
from p2pvpn.punch.portmap.mapping import MapProtocol
from tests.lab.meeting import found_network, join

from .miniupnpd import PUBLIC, miniupnpd

pytestmark = [pytest.mark.netns, pytest.mark.stranger, pytest.mark.timeout(120)]

NO_PCP = """
table ip pcp {
  chain input {
    type filter hook input priority -10;
    udp dport 5351 @th,64,8 2 drop
  }
}
"""
"""A router that does not know PCP at all, and says nothing to it."""
ANSWER_S = 0.5


@pytest.fixture
def home(lab: Lab) -> Home:
    home = lab.home("a", PUBLIC.format(1), number=1)
    nat.apply(home, NatKind.SYMMETRIC)
    return home


def reaches(lab: Lab, home: Home, external: Endpoint, stranger: str = "192.0.2.9") -> bool:
    """Whether a packet from somebody whom the peer never wrote to comes to its port 4500."""
    far = lab.public("far", stranger)
    with home.peer.socket() as inside, far.socket() as outside:
        inside.bind((home.inside, 4500))
        inside.settimeout(ANSWER_S)
        outside.sendto(b"hello", external)
        try:
            return inside.recv(100) == b"hello"
        except TimeoutError:
            return False


def ask(home: Home, seconds: float = 100.0) -> GatewayClient:
    """Drive a client against the router by a clock that jumps ahead whenever the router is silent."""
    client = GatewayClient(local=Endpoint(home.inside, 4500), gateway="192.168.1.1", entropy=os.urandom)
    now = 0.0
    with home.peer.socket() as sock:
        sock.connect(("192.168.1.1", pcp.PORT))
        sock.settimeout(ANSWER_S)
        outputs: list[Output] = client.start(now)
        while client.mapping is None and now < seconds:
            for output in outputs:
                if isinstance(output, Transmit):
                    sock.send(output.data)
            try:
                data = sock.recv(pcp.MAX_BYTES)
            except TimeoutError:
                now = client.next_deadline() or seconds
                outputs = client.tick(now)
            else:
                outputs = client.handle(Endpoint("192.168.1.1", pcp.PORT), data, now)
    return client


def test_miniupnpd_maps_by_pcp_and_by_nat_pmp_where_it_knows_no_pcp(lab: Lab, home: Home, tmp_path: Path) -> None:
    with miniupnpd(home, tmp_path):
        by_pcp = ask(home).mapping
        assert by_pcp is not None
        assert by_pcp.protocol is MapProtocol.PCP
        assert by_pcp.external == Endpoint(home.public, 4500)
        assert reaches(lab, home, by_pcp.external)
    home.router.nft("flush table inet filter\ndelete table inet filter")
    with miniupnpd(home, tmp_path):
        home.router.nft(NO_PCP)
        by_nat_pmp = ask(home).mapping
        assert by_nat_pmp is not None
        assert by_nat_pmp.protocol is MapProtocol.NAT_PMP
        assert by_nat_pmp.external == Endpoint(home.public, 4500)


@pytest.mark.parametrize("version1", [True, False], ids=["IGD1", "IGD2"])
def test_miniupnpd_maps_by_upnp_and_deletes_at_the_end(lab: Lab, home: Home, tmp_path: Path, *, version1: bool) -> None:
    igd = Igd("192.168.1.1", Endpoint(home.inside, 4500), os.urandom)
    with miniupnpd(home, tmp_path, pcp=False, upnp=True, version1=version1):
        with home.peer.inside():
            assert asyncio.run(igd.map()) > 0
        assert igd.mapping is not None
        external = igd.mapping.external
        assert (external, igd.mapping.protocol) == (Endpoint(home.public, 4500), MapProtocol.UPNP)
        assert reaches(lab, home, external)
        with home.peer.inside():
            asyncio.run(igd.map())
            assert igd.mapping.external == external, "renewed"
            asyncio.run(igd.unmap())
        assert "dnat" not in home.router.run(["nft", "list", "chain", "inet", "filter", "prerouting_miniupnpd"]).stdout


def test_a_port_that_a_neighbour_has_is_not_taken_from_it(lab: Lab, home: Home, tmp_path: Path) -> None:
    home.peer.ip("addr add 192.168.1.3/24 dev eth0")
    with miniupnpd(home, tmp_path, pcp=False, upnp=True, version1=True), home.peer.inside():
        neighbour = Igd("192.168.1.1", Endpoint("192.168.1.3", 4500), os.urandom)
        ours = Igd("192.168.1.1", Endpoint(home.inside, 4500), os.urandom)
        asyncio.run(neighbour.map())
        asyncio.run(ours.map())
    assert neighbour.mapping is not None
    assert ours.mapping is not None
    assert neighbour.mapping.external.port == 4500
    assert ours.mapping.external.port >= 10000


def test_the_machine_finds_its_router_and_asks_again_when_its_network_changes(home: Home, tmp_path: Path) -> None:
    async def story() -> None:
        netlink = await Netlink.open()
        mapper = PortMapper(netlink)
        changed = asyncio.Event()
        mapper.on_change = changed.set
        netlink.watch(mapper.network_changed)
        mapper.start(4500)
        async with asyncio.timeout(10):
            await changed.wait()
            (mapping,) = mapper.mappings()
            assert mapping.internal == Endpoint("192.168.1.2", 4500)
            changed.clear()
            home.peer.ip("addr del 192.168.1.2/24 dev eth0\naddr add 192.168.1.7/24 dev eth0")
            home.peer.ip("route replace default via 192.168.1.1")
            while [m.internal.host for m in mapper.mappings()] != ["192.168.1.7"]:
                await changed.wait()
                changed.clear()
        await mapper.close()
        netlink.close()

    with miniupnpd(home, tmp_path), home.peer.inside():
        asyncio.run(story())
    assert "dnat to 192.168.1.7" not in home.router.run(["nft", "list", "ruleset"]).stdout


FIREWALL_V6 = """
table inet filter {
  chain forward {
    type filter hook forward priority 0;
    jump miniupnpd
    iifname "wan" meta nfproto ipv6 drop
  }
}
"""
"""As homes have it (RFC 6092), here without state: nothing comes in but by a pinhole."""


def link_local(node: Node, device: str) -> str:
    words = node.run(["ip", "-6", "addr", "show", device]).stdout.split()
    return next(word for word in words if word.startswith("fe80")).partition("/")[0]


def test_pcp_opens_the_ipv6_firewall_for_us_and_closes_it_at_the_end(lab: Lab, home: Home, tmp_path: Path) -> None:
    inside = "2001:db8:1::2"
    here, there = f"to-{home.router}", "to-far"
    far = lab.public("far")
    far.ip("addr add 2001:db8:f::9/64 dev wan nodad")
    home.router.ip("addr add 2001:db8:1::1/64 dev lan nodad")
    home.peer.ip(
        f"addr add {inside}/64 dev eth0 nodad\nroute add default via {link_local(home.router, 'lan')} dev eth0"
    )
    lab.internet.ip(
        f"route add 2001:db8:1::/64 via {link_local(home.router, 'wan')} dev {here}\n"
        f"route add 2001:db8:f::/64 via {link_local(far, 'wan')} dev {there}"
    )
    far.ip(f"route add default via {link_local(lab.internet, there)} dev wan")

    async def story() -> list[bool]:
        netlink = await Netlink.open()
        mapper = PortMapper(netlink)
        changed = asyncio.Event()
        mapper.on_change = changed.set
        before = comes_in()
        mapper.start(4500)
        async with asyncio.timeout(10):
            while not any(mapping.internal.is_ipv6 for mapping in mapper.mappings()):
                await changed.wait()
                changed.clear()
        while_open = comes_in()
        await mapper.close()
        netlink.close()
        return [before, while_open]

    def comes_in() -> bool:
        with home.peer.socket(socket.AF_INET6) as ours, far.socket(socket.AF_INET6) as theirs:
            ours.bind((inside, 4500))
            ours.settimeout(ANSWER_S)
            theirs.sendto(b"hello", (inside, 4500))
            try:
                return ours.recv(100) == b"hello"
            except TimeoutError:
                return False

    with miniupnpd(home, tmp_path):
        home.router.nft(FIREWALL_V6)
        with home.peer.inside():
            assert asyncio.run(story()) == [False, True]
        deadline = time.monotonic() + 5
        while comes_in():
            assert time.monotonic() < deadline, "closed at the end"


@contextmanager
def meeting(lab: Lab, directory: Path, nats: dict[str, NatKind]) -> Iterator[Stage]:
    """A network with one hub, whose peers' routers map ports by PCP."""
    publics = {name: PUBLIC.format(number) for number, name in enumerate(nats, start=1)}
    stage = Stage(lab, directory, hubs=1, nats=nats, rtt_ms=10, plane="user", publics=publics, port_mapping=True)
    found_network(stage, directory)
    with ExitStack() as stack:
        for home in stage.homes.values():
            stack.enter_context(miniupnpd(home, directory))
            join(stage, home.peer)
        yield stage


def status(stage: Stage, peer: Node) -> dict[str, str]:
    return stage.ask(peer, "status")["port_mapping"]  # type: ignore[no-any-return]


def test_two_peers_behind_symmetric_nats_meet_by_the_ports_that_their_routers_map(lab: Lab, tmp_path: Path) -> None:
    with meeting(lab, tmp_path, dict.fromkeys(("a", "b"), NatKind.SYMMETRIC)) as stage:
        overlay = stage.ask(stage.b, "status")["networks"][0]["overlay"]
        for peer in (stage.a, stage.b):
            (router,) = status(stage, peer)["routers"]
            assert router["protocol"] == "pcp"  # type: ignore[index]
            assert router["told"]  # type: ignore[index]
        assert stage.a.ping(overlay, wait_s=5.0)

        def mapped() -> bool:
            return stage.path(stage.a, "b") == stage.path(stage.b, "a") == "mapped"

        stage.wait("a mapped path", mapped, 15.0, lambda: str(stage.path(stage.a, "b")), stage.a, stage.b)
        assert len(stage.a.ping(overlay, count=5)) == 5
        stage.cli(stage.a, "down")
        mappings = stage.homes["a"].router.run(["nft", "list", "ruleset"]).stdout
        assert "dnat" not in mappings.replace("status dnat", ""), "given back at the end"
