"""The shared port: what the kernel sorts where, whose port it is, and which address a datagram came to."""

from __future__ import annotations

import select
import socket
import subprocess
import sys

import pytest

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.datagram import Kind, classify, is_first_message
from p2pvpn.core.errors import LocalError
from p2pvpn.host.udp import (
    ancillary,
    local_address,
    open_esp_beside,
    open_extra,
    open_port,
    path_mtu,
    received,
)

from .peers import PUBLIC, Peer, link

pytestmark = pytest.mark.netns
LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


@pytest.fixture
def node(lab):
    """A host on which the test itself runs."""
    node = lab.node("h")
    with node.inside():
        yield node


@pytest.fixture
def shared(node):
    port = open_port(4500)
    yield port
    port.close()


def arrivals(pair):
    """Everything that waits at the sockets."""
    out = {"control": [], "esp": [], "strangers": []}
    for name, sock in (("control", pair.control), ("esp", pair.esp), ("strangers", pair.strangers)):
        while select.select([sock], [], [], 0)[0]:
            out[name].append(sock.recv(65535))
    return out


def test_further_ports_are_all_different_and_sort_esp_out_once_the_plane_asks(node):
    opened = [open_extra() for _ in range(300)]
    assert len({sock.getsockname()[1] for sock in opened}) == 300
    control = opened[0]
    target = ("127.0.0.1", control.getsockname()[1])
    esp, stun, ike = b"\xc0" + bytes(40), b"\x00\x01" + bytes(18), bytes(44)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for data in (esp, stun):
            sender.sendto(data, target)
        assert [control.recv(100) for _ in range(2)] == [esp, stun]
        plane = open_esp_beside(control)
        for data in (esp, stun, ike) * 20:
            sender.sendto(data, target)
    assert [plane.recv(100) for _ in range(20)] == [esp] * 20
    assert [control.recv(100) for _ in range(40)] == [stun, ike] * 20
    for sock in (*opened, plane):
        sock.close()


@pytest.mark.parametrize("family", LOOPBACK)
def test_the_kernel_sorts_as_the_specification_says(shared, family):
    pair = next(pair for pair in shared.pairs if pair.family == family)
    with socket.socket(family, socket.SOCK_DGRAM) as sender:
        wanted = {"control": [], "esp": [], "strangers": []}
        first = bytes(4) + b"initiate" + bytes(8) + bytes([33, 0x20, 34, 8]) + bytes(60)
        kinds = [first[:at] + bytes([octet]) + first[at + 1 :] for at in range(24) for octet in (0, 1, 34, 41, 0xC0)]
        kinds += [first[:size] for size in range(1, 30)]
        samples = [bytes([first]) + bytes(size) for first in range(256) for size in (7, 40)]
        for data in [
            *samples,
            *kinds,
            b"",
            bytes(4) + b"an IKE message",
            b"\x00\x01\x00\x00\x21\x12\xa4\x42" + bytes(12),
        ]:
            sender.sendto(data, (LOOPBACK[family], 4500))
            kind = classify(data)
            rest = "strangers" if is_first_message(data) else "control"
            wanted["esp" if kind is Kind.ESP else rest].append(data)
        came = arrivals(pair)
    assert {name: sorted(found) for name, found in came.items()} == {n: sorted(found) for n, found in wanted.items()}
    assert len(came["strangers"]) > 50


def test_a_second_daemon_cannot_share_the_port(shared):
    with pytest.raises(LocalError, match="another p2pvpn daemon"):
        open_port(4500)
    program = "from p2pvpn.host.udp import open_port; open_port(4500)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "another p2pvpn daemon" in done.stderr


@pytest.mark.parametrize("family", LOOPBACK)
@pytest.mark.parametrize("reuse", [False, True])
def test_a_port_that_another_program_has_is_refused(node, family, reuse):
    with socket.socket(family, socket.SOCK_DGRAM) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, reuse)
        other.bind((LOOPBACK[family], 4500))
        with pytest.raises(LocalError, match="in use by another program"):
            open_port(4500)
    open_port(4500).close()


def test_any_free_port_is_the_same_in_both_families(node):
    shared = open_port(0)
    ports = {sock.getsockname()[1] for pair in shared.pairs for sock in (pair.control, pair.esp)}
    assert ports == {shared.port}
    assert {pair.family for pair in shared.pairs} == {socket.AF_INET, socket.AF_INET6}
    shared.close()


def test_a_machine_without_ipv6_has_a_port_all_the_same(node):
    node.sysctl({"net/ipv6/conf/all/disable_ipv6": "1", "net/ipv6/conf/lo/disable_ipv6": "1"})
    shared = open_port(4500)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"\xc0", ("127.0.0.1", 4500))
    assert arrivals(shared.pairs[0])["esp"] == [b"\xc0"]
    shared.close()


@pytest.mark.parametrize("family", LOOPBACK)
def test_a_datagram_leaves_from_the_paths_address_and_tells_where_it_came_to(node, family):
    ipv6 = family == socket.AF_INET6
    ours = "fd00::11" if ipv6 else "127.0.0.11"
    if ipv6:
        node.ip(f"addr add {ours}/128 dev lo nodad")
    shared = open_port(4500)
    pair = next(pair for pair in shared.pairs if pair.family == family)
    path = Path(Endpoint(ours, 4500), Endpoint(LOOPBACK[family], 4500))
    pair.control.sendmsg([b"\x01"], ancillary(path), 0, path.remote)
    data, control, _, source = pair.control.recvmsg(100, 128)
    assert (data, source[:2]) == (b"\x01", (ours, 4500))
    assert local_address(control) == LOOPBACK[family]
    pair.control.sendmsg([b"\x02"], ancillary(Path(path.remote, path.local)), 0, (ours, 4500))
    assert local_address(pair.control.recvmsg(100, 128)[1]) == ours
    shared.close()


@pytest.mark.parametrize("family", LOOPBACK)
def test_the_traffic_class_goes_out_and_is_told(shared, family):
    pair = next(pair for pair in shared.pairs if pair.family == family)
    path = Path(Endpoint("::" if family == socket.AF_INET6 else "0.0.0.0", 4500), Endpoint(LOOPBACK[family], 4500))
    pair.esp.sendmsg([b"\xc0 packet"], ancillary(path, 0xBA), 0, path.remote)
    data, control, _, _ = pair.esp.recvmsg(100, 128)
    size, traffic_class = received(control)
    assert (data, size, traffic_class) == (b"\xc0 packet", 0, 0xBA)


def test_the_path_mtu_is_the_routes(node):
    node.ip("link set lo mtu 4000\nroute add 198.51.100.0/24 dev lo mtu 1300")
    anywhere = Endpoint("0.0.0.0", 4500)
    assert path_mtu(Path(anywhere, Endpoint("127.0.0.1", 4500))) == 4000
    assert path_mtu(Path(anywhere, Endpoint("198.51.100.1", 4500))) == 1300
    assert path_mtu(Path(Endpoint("::", 4500), Endpoint("2001:db8:ffff::1", 4500))) is None


def test_the_underlay_tells_the_path_of_a_datagram_and_answers_over_it(lab):
    one, other = link(lab)
    one.ip("addr add 192.0.2.11/24 dev wire")
    peer = Peer(one)
    stranger = other.socket()
    try:
        stranger.bind(("192.0.2.20", 5000))
        stranger.settimeout(5)
        stranger.sendto(b"\x00 hello", ("192.0.2.11", 4500))
        path, data = peer.wait_for("datagram")
        assert (path, bytes.fromhex(data)) == ("192.0.2.11:4500 > 192.0.2.20:5000", b"\x00 hello")
        peer.ask("send", "192.0.2.11:4500", "192.0.2.20:5000", b"answer".hex())
        assert stranger.recvfrom(100) == (b"answer", ("192.0.2.11", 4500))
        peer.ask("send", "192.0.2.99:4500", "192.0.2.20:5000", b"from nowhere".hex())
        peer.ask("send", "0.0.0.0:4500", "198.51.100.1:5000", b"to nowhere".hex())
        peer.ask("send", "0.0.0.0:4500", "192.0.2.20:5000", b"routed".hex())
        assert stranger.recvfrom(100) == (b"routed", ("192.0.2.10", 4500))
    finally:
        stranger.close()
        peer.close()


def test_local_endpoints_follow_the_machine(lab):
    one, _ = link(lab)
    peer = Peer(one)
    try:
        v4, v6 = PUBLIC["a"]
        assert peer.ask("endpoints") == [f"{v4}:4500", f"[{v6}]:4500"]
        peer.open()
        assert peer.ask("endpoints") == [f"{v4}:4500", f"[{v6}]:4500"]
        one.ip("addr add 203.0.113.5/24 dev wire")
        peer.wait_for("change")
        assert "203.0.113.5:4500" in peer.ask("endpoints")
    finally:
        peer.close()
