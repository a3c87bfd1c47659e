"""Two user planes on two machines: packets, moves, deaths, and plaintext that does not get in."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import socket
import threading

import pytest

from p2pvpn.core.child import EspSuite
from tests.esp.packets import ipv4, ipv6, ones_complement

from .peers import INNER, PUBLIC, Peer, Refusal, children, connect, link
from .peers import encode_child as encode

pytestmark = pytest.mark.netns


@pytest.fixture(params=["plain", "user"])
def pair(lab, request):
    """Peers a and b on one wire, their networks open, nothing installed; with either worker."""
    peers = [Peer(node, plane=request.param) for node in link(lab)]
    for peer in peers:
        peer.open()
    yield tuple(peers)
    for peer in peers:
        peer.close()


def bound(node, address, kind=socket.SOCK_DGRAM, port=7000):
    """A socket of the host at an address of its."""
    sock = node.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((address, port))
    sock.settimeout(10)
    return sock


def transfer(sender, receiver, address, size):
    """Send random bytes by TCP; whether they came as they were sent."""
    data = random.Random(size).randbytes(size)
    digest = hashlib.sha256()
    with bound(receiver, address, socket.SOCK_STREAM) as listener:
        listener.listen()

        def take():
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(20)
                while piece := connection.recv(1 << 16):
                    digest.update(piece)

        taker = threading.Thread(target=take)
        taker.start()
        with sender.socket(listener.family, socket.SOCK_STREAM) as connection:
            connection.settimeout(20)
            connection.connect((address, 7000))
            connection.sendall(data)
        taker.join()
    return digest.digest() == hashlib.sha256(data).digest()


@pytest.mark.parametrize("outer_ipv6", [False, True], ids=["over IPv4", "over IPv6"])
@pytest.mark.parametrize("inner", [0, 1], ids=["IPv4", "IPv6"])
def test_packets_small_and_large_go_through(pair, outer_ipv6, inner):
    a, b = pair
    connect(a, b, children(outer_ipv6=outer_ipv6))
    assert len(a.node.ping(INNER["b"][inner], count=3)) == 3
    header = 48 if inner else 28
    for size in (0, 1, 2, 3, 1400 - header, 4000):
        argv = ["ping", "-n", "-c", "1", "-W", "3", "-s", str(size), INNER["a"][inner]]
        assert b.node.run(argv, check=False).returncode == 0, size
    assert transfer(a.node, b.node, INNER["b"][inner], 3_000_001)
    assert a.ask("counters").keys() <= {"LINK_SCOPED"}
    assert b.ask("counters").keys() <= {"LINK_SCOPED"}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("one", "other"), [("user", "user"), ("plain", "user"), ("user", "plain")])
def test_two_hundred_megabytes_arrive_as_they_were_sent(lab, one, other):
    a, b = (Peer(node, plane=plane) for node, plane in zip(link(lab), (one, other), strict=True))
    for peer in (a, b):
        peer.open()
    connect(a, b, children(outer_ipv6=one == "plain"))
    try:
        assert transfer(a.node, b.node, INNER["b"][0], 200_000_001)
        assert transfer(b.node, a.node, INNER["a"][1], 200_000_001)
        # What the kernel got packet by packet it checked itself: the checksums that were made here are right.
        for node in (a.node, b.node):
            errors = node.run(["nstat", "-az", "TcpInCsumErrors", "IpInHdrErrors", "Ip6InHdrErrors"]).stdout
            assert {line.split()[1] for line in errors.splitlines() if line[0] != "#"} == {"0"}
    finally:
        a.close()
        b.close()


@pytest.mark.parametrize("suite", EspSuite)
def test_every_suite_carries_traffic(pair, suite):
    connect(*pair, children(suite=suite, esn=suite is EspSuite.CHACHA20_POLY1305))
    assert pair[0].node.ping(INNER["b"][0])
    usage = pair[1].ask("usage", [1])["1"]
    assert usage["packets_in"] >= 1
    assert usage["bytes_in"] >= 84


def test_the_wire_carries_nothing_but_esp_in_udp(pair):
    a, b = pair
    connect(a, b, children())
    with a.node.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x0300) as capture:
        capture.bind(("wire", 3))
        assert len(a.node.ping(INNER["b"][0], count=3, pattern=b"plain")) == 3
        assert len(a.node.ping(INNER["b"][1], count=3, pattern=b"plain")) == 3
        capture.setblocking(False)
        frames = []
        while True:
            try:
                frames.append(capture.recv(2000)[14:])
            except BlockingIOError:
                break
    datagrams = [frame for frame in frames if frame[0] >> 4 == 4 and frame[9] == 17]
    assert len(datagrams) >= 12
    for frame in datagrams:
        assert frame[20:24] == b"\x11\x94\x11\x94"
        assert frame[28] >> 6 == 3
        assert frame[6] & 0x40
    assert not any(b"plain" in frame for frame in frames)


def test_a_trapped_packet_is_told_and_sent_once_there_is_an_sa(pair):
    a, b = pair
    with bound(b.node, INNER["b"][0]) as receiver, bound(a.node, INNER["a"][0]) as sender:
        sender.sendto(b"first packet", (INNER["b"][0], 7000))
        network, packet = a.wait_for("trapped")
        assert network == "bench"
        assert bytes.fromhex(packet).endswith(b"first packet")
        connect(a, b, children())
        a.ask("inject", [packet])
        assert receiver.recv(100) == b"first packet"


def test_a_new_sa_takes_over_without_a_loss(pair):
    a, b = pair
    connect(a, b, children(1))
    with bound(b.node, INNER["b"][0]) as receiver, bound(a.node, INNER["a"][0]) as sender:
        for number in range(60):
            sender.sendto(bytes([number]), (INNER["b"][0], 7000))
            if number == 20:
                connect(a, b, children(2))
            if number == 40:
                a.ask("remove", 1)
        assert [receiver.recv(10) for _ in range(60)] == [bytes([number]) for number in range(60)]
        b.ask("remove", 1)
    usage = a.ask("usage", [1, 2])
    assert usage.keys() == {"2"}
    assert usage["2"]["packets_out"] >= 39


def test_a_move_changes_the_path_and_is_hinted_to_the_peer(pair):
    a, b = pair
    connect(a, b, children())
    assert a.node.ping(INNER["b"][0])
    a.node.ip("addr add 192.0.2.99/24 dev wire")
    a.ask("move", 1, "192.0.2.99:4500", f"{PUBLIC['b'][0]}:4500")
    assert a.node.ping(INNER["b"][0])
    assert b.wait_for("moved") == [1, "192.0.2.99:4500"]
    b.ask("move", 1, f"{PUBLIC['b'][0]}:4500", "192.0.2.99:4500")
    a.ask("move", 1, f"[{PUBLIC['a'][1]}]:4500", f"[{PUBLIC['b'][1]}]:4500")
    assert a.node.ping(INNER["b"][0])
    assert b.wait_for("moved") == [1, f"[{PUBLIC['a'][1]}]:4500"]
    assert a.ask("usage", [1])["1"]["sequence_out"] >= 3
    with pytest.raises(Refusal):
        a.ask("move", 9, "0.0.0.0:4500", "192.0.2.1:4500")


@pytest.mark.parametrize("outer_ipv6", [False, True], ids=["over IPv4", "over IPv6"])
def test_a_narrow_path_is_learned_and_told_to_the_sources(pair, outer_ipv6):
    a, b = pair
    connect(a, b, children(outer_ipv6=outer_ipv6))
    for peer in pair:
        peer.node.ip("link set wire mtu 1300")
    ping = ["ping", "-n", "-c", "1", "-W", "3", "-M", "do"]
    a.node.run([*ping, "-s", "1300", INNER["b"][0]], check=False)
    refused = a.node.run([*ping, "-s", "1300", INNER["b"][0]], check=False)
    assert refused.returncode != 0
    assert f"mtu = {1218 if outer_ipv6 else 1238}" in refused.stdout
    assert a.node.run([*ping, "-s", "1100", INNER["b"][0]], check=False).returncode == 0
    # Every IPv6 packet of 1280 bytes must pass, here in fragments of the outer packet.
    assert a.node.run([*ping, "-s", "1232", INNER["b"][1]], check=False).returncode == 0
    assert transfer(a.node, b.node, INNER["b"][0], 500_000)
    assert transfer(a.node, b.node, INNER["b"][1], 500_000)


def test_ipv4_without_df_passes_a_narrow_path_in_fragments(pair):
    a, b = pair
    connect(a, b, children(mtu=1300))
    argv = ["ping", "-n", "-c", "1", "-W", "3", "-M", "dont", "-s", "3000", INNER["b"][0]]
    assert a.node.run(argv, check=False).returncode == 0


def test_dscp_is_copied_to_the_outer_packet_and_congestion_to_the_inner(pair):
    a, b = pair
    connect(a, b, children())
    b.node.nft(
        "table ip congested {\nchain early {\ntype filter hook prerouting priority -400;\n"
        "udp dport 4500 ip ecn set ce\n}\n}\n"
    )
    with bound(b.node, INNER["b"][0]) as receiver, bound(a.node, INNER["a"][0]) as sender:
        receiver.setsockopt(socket.IPPROTO_IP, 13, 1)  # IP_RECVTOS
        capture = b.node.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0x0008)
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0xB8 | 2)
        sender.sendto(b"marked", (INNER["b"][0], 7000))
        data, control, _, _ = receiver.recvmsg(100, 64)
        assert (data, control[0][2][0]) == (b"marked", 0xB8 | 3)
        capture.settimeout(5)
        while True:
            frame = capture.recv(2000)
            if frame[9] == 17 and frame[22:24] == b"\x11\x94":
                break
        assert frame[1] == 0xB8 | 2
        capture.close()


@pytest.mark.parametrize("inner", [0, 1], ids=["IPv4", "IPv6"])
def test_plaintext_from_the_wire_is_dropped(pair, inner):
    """b sends what a peer could have sent, but in the clear; a marker sent after it shows that it had its chance."""
    a, b = pair
    target, source = INNER["a"][inner], INNER["b"][inner]
    b.ask("close")
    with bound(a.node, "::" if inner else "0.0.0.0") as receiver:
        b.node.ip(f"route add {target} via {PUBLIC['a'][inner]}")
        spoof(b.node, source, target, b"spoofed")
        spoof(b.node, PUBLIC["b"][inner], PUBLIC["a"][inner], b"marker")
        assert receiver.recv(100) == b"marker"
        a.ask("close")
        assert "p2pvpn" not in a.node.run(["nft", "list", "ruleset"]).stdout
        a.node.ip(f"addr add {target} dev lo")
        spoof(b.node, source, target, b"spoofed")
        assert receiver.recv(100) == b"spoofed"  # without the guard it comes in: the test can see it


def spoof(node, source, destination, payload):
    """An IP packet from any source, by raw socket."""
    header = b"\x1b\x59\x1b\x58" + (8 + len(payload)).to_bytes(2, "big")
    if ":" in source:
        empty = ipv6(source, destination, header + b"\0\0" + payload)
        pseudo = empty[8:40] + empty[4:6] + b"\0\x11"
        checksum = 0xFFFF - ones_complement(pseudo + empty[40:])
        packet = ipv6(source, destination, header + checksum.to_bytes(2, "big") + payload)
        family, protocol = socket.AF_INET6, 255
    else:
        packet = ipv4(source, destination, header + b"\0\0" + payload)
        family, protocol = socket.AF_INET, 255
    with node.socket(family, socket.SOCK_RAW, protocol) as raw:
        raw.sendto(packet, (destination, 0))


def test_a_machine_may_talk_to_its_own_overlay_address(pair):
    assert pair[0].node.ping(INNER["a"][0])
    assert pair[0].node.ping(INNER["a"][1])


def test_when_the_daemon_is_killed_worker_and_device_go_too(pair):
    a, _ = pair
    os.kill(a.process.pid, signal.SIGKILL)
    a.process.wait()
    gone = os.pidfd_open(a.worker) if os.path.exists(f"/proc/{a.worker}") else None  # noqa: PTH110
    if gone is not None:
        wait_readable(gone)
    assert a.device not in a.node.run(["ip", "link"]).stdout
    assert not a.node.pids()


def wait_readable(fd):
    import select

    assert select.select([fd], [], [], 10)[0]
    os.close(fd)


def test_when_the_worker_dies_the_engine_is_told_and_can_start_over(pair):
    a, b = pair
    connect(a, b, children(1))
    assert a.node.ping(INNER["b"][0])
    os.kill(a.worker, signal.SIGKILL)
    a.wait_for("died")
    assert a.device not in a.node.run(["ip", "link"]).stdout
    with pytest.raises(Refusal, match="does not run"):
        a.ask("use", 1)
    a.open()
    with pytest.raises(Refusal):
        a.ask("use", 1)
    assert a.ask("usage", [1]) == {}
    b.ask("remove", 1)
    connect(a, b, children(2))
    assert a.node.ping(INNER["b"][0])


def test_a_device_that_somebody_removes_ends_the_worker(pair):
    a, _ = pair
    a.node.ip(f"link del {a.device}")
    a.wait_for("died")


def test_stopping_leaves_nothing_behind(pair):
    a, _ = pair
    a.ask("stop")
    a.process.wait(10)
    assert a.device not in a.node.run(["ip", "link"]).stdout
    assert "p2pvpn" not in a.node.run(["nft", "list", "ruleset"]).stdout
    assert not a.node.pids()
    assert ("died", []) not in a.events


def test_what_cannot_be_done_is_refused_with_a_reason(pair):
    a, _ = pair
    ours, _ = children()
    a.ask("install", encode(ours))
    with pytest.raises(Refusal, match="installed already"):
        a.ask("install", encode(ours))
    with pytest.raises(Refusal, match="device already"):
        a.ask("open", ["10.9.0.1"], ["10.9.0.0/16"], 1400)
    a.ask("close")
    with pytest.raises(Refusal, match="MTU"):
        a.ask("open", ["10.9.0.1"], ["10.9.0.0/16"], 1500)
    a.ask("remove", 12345)
