"""The kinds of NAT are what they claim, says coturn's client."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from p2pvpn.lab import nat
from p2pvpn.lab.nat import NatKind
from p2pvpn.lab.net import Lab
from p2pvpn.lab.stun_check import Verdict, discover, stun_server

pytestmark = pytest.mark.netns

ENDPOINT = "Endpoint Independent"
ADDRESS = "Address Dependent"
PORT = "Address and Port Dependent"
CLAIMS = {
    NatKind.NONE: Verdict(ENDPOINT, ENDPOINT),
    NatKind.FULL_CONE: Verdict(ENDPOINT, ENDPOINT),
    NatKind.RESTRICTED: Verdict(ENDPOINT, ADDRESS),
    NatKind.PORT_RESTRICTED: Verdict(ENDPOINT, PORT),
    NatKind.SYMMETRIC: Verdict(PORT, PORT),
}


@pytest.mark.stranger
def test_each_kind_of_nat_is_what_it_claims_says_coturn(lab: Lab) -> None:
    homes = {}
    for number, kind in enumerate(CLAIMS, start=1):
        public = "198.51.100.1" if kind is NatKind.NONE else f"203.0.113.{number}"
        homes[kind] = lab.home(f"h{number}", public, number=number, routed=kind is NatKind.NONE)
        nat.apply(homes[kind], kind)
    with stun_server(lab) as server, ThreadPoolExecutor(len(homes)) as pool:
        verdicts = dict(zip(homes, pool.map(lambda home: discover(home.peer, server), homes.values()), strict=True))
    assert verdicts == CLAIMS


@pytest.mark.stranger
def test_a_router_turned_hostile_is_symmetric(lab: Lab) -> None:
    home = lab.home("a", "198.51.100.1", number=1)
    nat.apply(home, NatKind.FULL_CONE)
    with stun_server(lab) as server:
        assert discover(home.peer, server) == CLAIMS[NatKind.FULL_CONE]
        nat.turn_hostile(home)
        assert discover(home.peer, server) == CLAIMS[NatKind.SYMMETRIC]


def _udp(node: object, port: int) -> socket.socket:
    sock = node.socket()  # type: ignore[attr-defined]
    sock.bind(("0.0.0.0", port))
    sock.settimeout(1.0)
    return sock


def test_where_udp_is_blocked_tcp_passes(lab: Lab) -> None:
    home, host = lab.home("a", "198.51.100.1", number=1), lab.public("server", "192.0.2.1")
    nat.apply(home, NatKind.UDP_BLOCKED)
    with _udp(host, 7000) as server, _udp(home.peer, 7000) as client:
        client.sendto(b"hello", ("192.0.2.1", 7000))
        with pytest.raises(TimeoutError):
            server.recvfrom(100)
    with host.socket(kind=socket.SOCK_STREAM) as listener, home.peer.socket(kind=socket.SOCK_STREAM) as caller:
        listener.bind(("192.0.2.1", 443))
        listener.listen()
        caller.settimeout(5.0)
        caller.connect(("192.0.2.1", 443))
        accepted, source = listener.accept()
        accepted.close()
        assert source[0] == home.public


def test_an_early_packet_of_the_peer_does_not_change_the_mapping(lab: Lab) -> None:
    home = lab.home("a", "198.51.100.1", number=1)
    nat.apply(home, NatKind.PORT_RESTRICTED)
    server, peer = lab.public("s", "192.0.2.10"), lab.public("p", "192.0.2.20")
    with _udp(home.peer, 4500) as inner, _udp(server, 3478) as reflector, _udp(peer, 4500) as puncher:
        inner.sendto(b"who am I", ("192.0.2.10", 3478))
        mapped = reflector.recvfrom(100)[1]
        puncher.sendto(b"early", mapped)  # comes before anything was sent to the peer: the router drops it
        inner.sendto(b"punch", ("192.0.2.20", 4500))
        assert puncher.recvfrom(100) == (b"punch", mapped)
        puncher.sendto(b"in time", mapped)
        assert inner.recvfrom(100) == (b"in time", ("192.0.2.20", 4500))


def test_a_flow_does_not_survive_the_router_turning_hostile(lab: Lab) -> None:
    home = lab.home("a", "198.51.100.1", number=1)
    nat.apply(home, NatKind.PORT_RESTRICTED)
    server = lab.public("s", "192.0.2.10")
    with _udp(home.peer, 4500) as inner, _udp(server, 3478) as outer:
        inner.sendto(b"1", ("192.0.2.10", 3478))
        before = outer.recvfrom(100)[1]
        nat.turn_hostile(home)
        outer.sendto(b"lost", before)
        inner.sendto(b"2", ("192.0.2.10", 3478))
        after = outer.recvfrom(100)[1]
        assert after != before
        outer.sendto(b"found", after)
        assert inner.recvfrom(100)[0] == b"found"


def test_tcp_is_translated_too(lab: Lab) -> None:
    server = lab.public("s", "192.0.2.10")
    home = lab.home("a", "198.51.100.1", number=1)
    for kind in (NatKind.FULL_CONE, NatKind.SYMMETRIC):
        nat.apply(home, kind)
        with server.socket(kind=socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("192.0.2.10", 443))
            listener.listen()
            with home.peer.socket(kind=socket.SOCK_STREAM) as client:
                client.settimeout(2.0)
                client.connect(("192.0.2.10", 443))
                accepted, source = listener.accept()
                with accepted:
                    assert source[0] == "198.51.100.1"
