"""What every plane must do, and every pair of planes on one wire."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import threading
import time
from dataclasses import replace

import pytest

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.child import EspSuite
from p2pvpn.esp.packet import Sealer
from tests.host.peers import INNER, PUBLIC, Refusal, children, encode_child
from tests.host.test_user_plane import bound, spoof

from .conftest import one_machine
from .pings import ping

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(120)]
NAMES = ["IPv4", "IPv6"]
IN_FLIGHT_S = 0.15
"""Also in the queue of a worker that has to wait for a CPU."""


class Stream:
    """Numbered datagrams from one host to another at a steady rate, until `stop`."""

    def __init__(self, sender, receiver, source, target, pause_s=0.005):
        self.sent_at = []
        self._pause_s = pause_s
        self._sock = bound(sender, source)
        self._receiver = bound(receiver, target)
        self._receiver.setsockopt(socket.SOL_SOCKET, 33, 1 << 20)  # SO_RCVBUFFORCE
        self._target = (target, 7000)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        while not self._ending.wait(self._pause_s):
            number = self.sent
            self.sent_at.append(time.monotonic())
            with contextlib.suppress(OSError):
                self._sock.sendto(number.to_bytes(4, "big"), self._target)

    @property
    def sent(self):
        return len(self.sent_at)

    def stop(self):
        """Numbers in the order in which they came."""
        self._ending.set()
        self._thread.join()
        time.sleep(0.2)
        self._receiver.setblocking(False)
        came = []
        with contextlib.suppress(BlockingIOError):
            while True:
                came.append(int.from_bytes(self._receiver.recv(100), "big"))
        self._sock.close()
        self._receiver.close()
        return came

    def lost(self):
        came = self.stop()
        assert came == sorted(came)
        assert len(came) == len(set(came))
        return sorted(set(range(self.sent)) - set(came))


@pytest.mark.parametrize("outer", [False, True], ids=["over IPv4", "over IPv6"])
@pytest.mark.parametrize("inner", [0, 1], ids=NAMES)
def test_packets_of_both_families_go_over_both(wire, outer, inner):
    sa = wire.connect(children(next(wire.ids), outer_ipv6=outer))
    assert ping(wire.a.node, INNER["b"][inner], count=3) == 3
    for size in (0, 1, 1300, 4000):
        assert ping(wire.b.node, INNER["a"][inner], size=size), size
    for peer in wire.peers:
        usage = peer.ask("usage", [sa])[str(sa)]
        assert usage["packets_in"] >= 7
        assert usage["packets_out"] >= 7
        assert usage["bytes_in"] >= 5000
        assert usage["sequence_out"] == usage["packets_out"]
        assert usage["last_in_at"] > 0


@pytest.mark.parametrize("esn", [False, True], ids=["32-bit numbers", "64-bit numbers"])
@pytest.mark.parametrize("suite", EspSuite)
def test_every_suite_carries_traffic(wire, suite, esn):
    sa = wire.connect(children(next(wire.ids), suite=suite, esn=esn))
    assert ping(wire.a.node, INNER["b"][0])
    assert wire.b.ask("usage", [sa])[str(sa)]["bytes_in"] == 84


def test_packets_keep_their_order(wire):
    wire.connect(children(next(wire.ids)))
    with bound(wire.b.node, INNER["b"][1]) as receiver, bound(wire.a.node, INNER["a"][1]) as sender:
        for number in range(100):
            sender.sendto(bytes([number]), (INNER["b"][1], 7000))
        assert [receiver.recv(10)[0] for _ in range(100)] == list(range(100))


@pytest.mark.parametrize("inner", [0, 1], ids=NAMES)
def test_trapped_packets_are_told_and_sent_in_order_once_there_is_an_sa(wire, inner):
    with bound(wire.b.node, INNER["b"][inner]) as receiver, bound(wire.a.node, INNER["a"][inner]) as sender:
        for number in range(5):
            sender.sendto(bytes([number]), (INNER["b"][inner], 7000))
        trapped = [wire.a.wait_for("trapped") for _ in range(5)]
        assert {network for network, _ in trapped} == {"bench"}
        wire.connect(children(next(wire.ids)))
        wire.a.ask("inject", [packet for _, packet in trapped])
        assert [receiver.recv(10)[0] for _ in range(5)] == list(range(5))
        sender.sendto(b"straight", (INNER["b"][inner], 7000))
        assert receiver.recv(10) == b"straight"


@one_machine
def test_packets_injected_without_an_sa_are_dropped_and_not_trapped_again(wire):
    with bound(wire.a.node, INNER["a"][0]) as sender:
        sender.sendto(b"early", (INNER["b"][0], 7000))
        _, packet = wire.a.wait_for("trapped")
        before = wire.a.ask("counters").get("injected too early", 0)
        wire.a.ask("inject", [packet, packet])
        assert wire.a.ask("counters")["injected too early"] == before + 2
        sender.sendto(b"marker", (INNER["b"][0], 7000))
        _, packet = wire.a.wait_for("trapped")
        assert bytes.fromhex(packet).endswith(b"marker")


@pytest.mark.parametrize("inner", [0, 1], ids=NAMES)
def test_a_gateway_sends_what_it_forwards_in_the_name_of_its_source(wire, inner):
    inside = ("10.30.0.0/24", "fd00:30::/64")
    source, target = ("10.30.0.2", "fd00:30::2")[inner], INNER["b"][inner]
    wire.b.node.ip("\n".join(f"route replace {net} dev {wire.b.device}" for net in inside))
    with bound(wire.b.node, target) as receiver, bound(wire.guest, source) as sender:
        sender.sendto(b"first", (target, 7000))
        _, packet = wire.a.wait_for("trapped")
        assert bytes.fromhex(packet).endswith(b"first")
        wire.connect(children(next(wire.ids), left=(*INNER["a"], *inside)))
        wire.a.ask("inject", [packet])
        data, address = receiver.recvfrom(10)
        assert (data, address[0]) == (b"first", source)
        sender.sendto(b"second", (target, 7000))
        assert receiver.recv(10) == b"second"
        receiver.sendto(b"answer", (source, 7000))
        assert sender.recv(10) == b"answer"
    assert ping(wire.guest, target)


def test_a_new_sa_takes_over_without_a_loss_in_whichever_order(wire):
    wire.connect(children(next(wire.ids)))
    forth = Stream(wire.a.node, wire.b.node, INNER["a"][0], INNER["b"][0])
    back = Stream(wire.b.node, wire.a.node, INNER["b"][1], INNER["a"][1])
    for turn in range(4):
        former = wire.installed[-1][1]
        pair = children(next(wire.ids))
        wire.install(pair)
        for peer in wire.peers if turn % 2 else reversed(wire.peers):
            peer.ask("use", pair[0].id)
            time.sleep(0.2)
        for peer in wire.peers:
            peer.ask("remove", former)
            time.sleep(0.1)
    assert (forth.lost(), back.lost()) == ([], [])
    assert forth.sent > 100


@one_machine
def test_the_former_sa_takes_over_when_the_newer_is_removed(wire):
    one = wire.connect(children(next(wire.ids)))
    other = wire.connect(children(next(wire.ids)))
    stream = Stream(wire.a.node, wire.b.node, INNER["a"][0], INNER["b"][0])
    time.sleep(0.2)
    wire.a.ask("remove", other)
    time.sleep(0.2)
    assert stream.lost() == []
    usage = wire.a.ask("usage", [one, other])
    assert usage.keys() == {str(one)}
    assert usage[str(one)]["packets_out"] > 5


def test_moves_to_other_ports_addresses_and_families_keep_the_numbers(wire):
    sa = wire.connect(children(next(wire.ids)))
    a, b = wire.peers
    a.node.ip("addr replace 192.0.2.99/24 dev wire")
    b.node.ip("addr replace 192.0.2.88/24 dev wire")
    (a4, a6), (b4, b6) = PUBLIC["a"], PUBLIC["b"]
    stream = Stream(a.node, b.node, INNER["a"][0], INNER["b"][0])
    sequence, moves = 0, []
    before = [peer.ask("counters") for peer in wire.peers]
    for near, far in [
        ("192.0.2.99", b4),
        ("192.0.2.99", "192.0.2.88"),
        (a4, b4),
        (a6, b6),
        ("192.0.2.99", b4),
        (a4, b4),
    ]:
        local, remote = str(Endpoint(near, 4500)), str(Endpoint(far, 4500))
        began = time.monotonic()
        b.ask("move", sa, remote, local)
        a.ask("move", sa, local, remote)
        moves.append((began - IN_FLIGHT_S, time.monotonic() + IN_FLIGHT_S))
        time.sleep(3 * IN_FLIGHT_S)
        usage = a.ask("usage", [sa])[str(sa)]
        assert usage["sequence_out"] > sequence
        assert usage["packets_out"] == usage["sequence_out"]
        sequence = usage["sequence_out"]
        assert ping(a.node, INNER["b"][1])
    for number in stream.lost():
        assert any(began <= stream.sent_at[number] <= ended for began, ended in moves)
    for peer, counted in zip(wire.peers, before, strict=True):
        mismatches = (counters.get("XfrmInTmplMismatch", 0) for counters in (counted, peer.ask("counters")))
        assert len(set(mismatches)) == 1


def test_traffic_goes_over_a_further_port_and_back(wire):
    sa = wire.connect(children(next(wire.ids)))
    a, b = wire.peers
    (a4, _), (b4, _) = PUBLIC["a"], PUBLIC["b"]
    port = a.ask("listen")
    stream = Stream(a.node, b.node, INNER["a"][0], INNER["b"][0])
    remote = str(Endpoint(b4, 4500))
    for near in (port, 4500, port, 4500):
        local = str(Endpoint(a4, near))
        b.ask("move", sa, remote, local)
        a.ask("move", sa, local, remote)
        time.sleep(0.1)
        assert len(a.node.ping(INNER["b"][1], count=2, interval_s=0.05)) == 2
        assert len(b.node.ping(INNER["a"][0], count=2, interval_s=0.05)) == 2
        assert (
            b.node.run(["ping", "-n", "-c", "1", "-W", "3", "-s", "4000", INNER["a"][0]], check=False).returncode == 0
        )
    assert stream.lost() == []
    a.ask("unlisten", port)
    assert a.node.ping(INNER["b"][0])


@one_machine
def test_a_source_left_to_routing_follows_the_routes(wire):
    pair = children(next(wire.ids))
    path = Path(Endpoint("0.0.0.0", 4500), pair[0].path.remote)
    wire.connect((replace(pair[0], path=path), pair[1]))
    assert ping(wire.a.node, INNER["b"][0])


@pytest.fixture
def translated(wire):
    """a behind a NAT whose public port and address can be changed: `translated(address, port)`; flushes its memory."""
    program = "iptables-legacy"
    rule = ["POSTROUTING", "-o", "wan", "-p", "udp", "-j", "SNAT", "--to-source"]
    made = False

    def translate(address, port):
        nonlocal made
        place = ["-R", rule[0], "1"] if made else ["-A", rule[0]]
        wire.nat.run([program, "-w", "-t", "nat", *place, *rule[1:], f"{address}:{port}-{port}"])
        made = True
        wire.nat.run(["conntrack", "-F"])

    yield translate
    wire.nat.run([program, "-w", "-t", "nat", "-F"])
    wire.nat.run(["conntrack", "-F"])


def test_a_nat_that_changes_ports_and_addresses_is_told_once_and_followed(wire, translated):
    translated("198.51.100.1", 40000)
    pair = children(next(wire.ids))
    inside, outside = Endpoint("10.1.0.2", 4500), Endpoint("198.51.100.2", 4500)
    paths = Path(inside, outside), Path(outside, Endpoint("198.51.100.1", 40000))
    sa = wire.connect([replace(child, path=path) for child, path in zip(pair, paths, strict=True)])
    assert ping(wire.a.node, INNER["b"][0], count=2) == 2
    wire.b.ask("counters")
    assert not [event for event, _ in wire.b.events if event == "moved"]
    for address, port in [("198.51.100.1", 41000), ("198.51.100.9", 42000)]:
        translated(address, port)
        stream = Stream(wire.a.node, wire.b.node, INNER["a"][1], INNER["b"][1])
        assert wire.b.wait_for("moved") == [sa, f"{address}:{port}"]
        time.sleep(0.3)
        assert stream.lost() == []  # what comes from there is let in all the time
        wire.b.ask("counters")
        assert not [event for event, _ in wire.b.events if event == "moved"]
        wire.b.ask("move", sa, str(outside), f"{address}:{port}")
        assert ping(wire.a.node, INNER["b"][0])
        assert ping(wire.b.node, INNER["a"][1])


@one_machine
@pytest.mark.parametrize("inner", [0, 1], ids=NAMES)
def test_plaintext_from_the_wire_is_dropped_with_no_sa_one_or_two(wire, inner):
    """Each peer sends what the other could have sent, but in the clear; a marker after it shows it had its chance."""
    for installed in range(3):
        if installed:
            wire.connect(children(next(wire.ids)))
        for victim, sender in (wire.peers, wire.peers[::-1]):
            target, source = INNER[victim.node.name][inner], INNER[sender.node.name][inner]
            with bound(victim.node, "::" if inner else "0.0.0.0") as receiver:
                near = PUBLIC[victim.node.name][inner]
                sender.node.ip(f"route replace {target} via {near}")
                for claimed in (source, target, INNER["c"][inner]):
                    smuggle(sender.node, victim.node, claimed, target, b"spoofed")
                spoof(sender.node, PUBLIC[sender.node.name][inner], near, b"marker")
                assert receiver.recv(100) == b"marker", installed
                sender.node.ip(f"route del {target}")


def datagram(source, target, payload):
    """A UDP datagram to port 7000 as an IP packet; its ethertype and its number as a next header."""
    from p2pvpn.core.address import normal_ip
    from tests.esp.packets import ipv4, ipv6, ones_complement

    header = b"\x1b\x59\x1b\x58" + (8 + len(payload)).to_bytes(2, "big")
    if normal_ip(source).version == 6:
        empty = ipv6(source, target, header + b"\0\0" + payload)
        pseudo = empty[8:40] + empty[4:6] + b"\0\x11"
        checksum = 0xFFFF - ones_complement(pseudo + empty[40:])
        return ipv6(source, target, header + checksum.to_bytes(2, "big") + payload), 0x86DD, 41
    return ipv4(source, target, header + b"\0\0" + payload), 0x0800, 4


def smuggle(node, victim, source, target, payload):
    """Put an IP packet on the wire to the victim beside all policies of the sender, by packet socket."""
    packet, protocol, _ = datagram(source, target, payload)
    with node.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0) as wire:
        wire.sendto(packet, ("wire", protocol, 0, 0, mac_of(victim)))


def mac_of(node):
    """Of its device on the wire (SIOCGIFHWADDR)."""
    with node.socket() as sock:
        return fcntl.ioctl(sock, 0x8927, b"wire".ljust(40, b"\0"))[18:24]


@one_machine
@pytest.mark.parametrize("inner", [0, 1], ids=NAMES)
def test_a_peer_behind_a_stream_is_reached_there_and_speaks_in_its_own_name_alone(wire, inner):
    """Its packets come out of the loopback device, where a kernel does not ask its policies by itself."""
    ours, theirs = children(next(wire.ids))
    others, _ = children(next(wire.ids), other="c")
    node, target = wire.a.node, INNER["a"][inner]
    with node.socket() as stream, bound(node, target) as receiver:
        stream.bind(("127.64.7.1", 0))
        stream.connect(("127.0.0.1", 4500))
        stream.settimeout(10)
        there = Path(Endpoint("0.0.0.0", 4500), Endpoint(*stream.getsockname()))
        for child in (replace(ours, path=there), others):
            wire.a.ask("install", encode_child(child))
            wire.installed.append((wire.a, child.id))
            wire.a.ask("use", child.id)
        sealer = Sealer(theirs.suite, theirs.key_out.reveal(), ours.spi_in, esn=False)
        for sequence, claimed in enumerate(("c", "a", "b"), start=1):
            packet, _, next_header = datagram(INNER[claimed][inner], target, claimed.encode())
            stream.send(sealer.seal(sequence, packet, next_header))
        data, source = receiver.recvfrom(100)
        assert (data, source[0]) == (b"b", INNER["b"][inner])
        receiver.sendto(b"answer", source)
        assert stream.recv(2000)[:4] == ours.spi_out.to_bytes(4, "big")


def test_nothing_leaves_in_the_clear(wire):
    """Looks at what leaves: what comes in is seen again once the kernel has decrypted it."""
    wire.connect(children(next(wire.ids)))
    with contextlib.ExitStack() as stack:
        captures = [stack.enter_context(host.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)) for host in wire.hosts]
        for capture in captures:
            capture.bind(("wire", 3))
            capture.setblocking(False)
        for inner in INNER["b"]:
            assert ping(wire.a.node, inner, count=3, pattern=b"plain") == 3
        for capture in captures:
            frames = outgoing(capture)
            datagrams = [frame for frame in frames if frame[0] >> 4 == 4 and frame[9] == 17]
            assert len(datagrams) >= 6
            assert all(frame[20:24] == b"\x11\x94\x11\x94" and frame[28] >> 6 == 3 for frame in datagrams)
            assert not any(b"plain" in frame for frame in frames)


def outgoing(capture):
    frames = []
    with contextlib.suppress(BlockingIOError):
        while True:
            frame, address = capture.recvfrom(2000)
            if address[2] == socket.PACKET_OUTGOING:
                frames.append(frame[14:])
    return frames


@one_machine
def test_a_machine_may_talk_to_its_own_overlay_address(wire):
    for peer in wire.peers:
        assert ping(peer.node, INNER[peer.node.name][0])
        assert ping(peer.node, INNER[peer.node.name][1])


def test_control_datagrams_share_the_port(wire):
    wire.connect(children(next(wire.ids)))
    local, remote = f"{PUBLIC['a'][0]}:4500", f"{PUBLIC['b'][0]}:4500"
    for data in ("0000000049" * 4, "0101000c2112a442" + "00" * 12, "ff"):
        wire.a.ask("send", local, remote, data)
    wire.a.ask("send", local, remote, "00000000" + "4d" * 20)
    got = []
    while not got or not got[-1].startswith("000000004d"):
        got.append(wire.b.wait_for("datagram")[1])
    assert len(got) == 3
    assert ping(wire.a.node, INNER["b"][0])


@one_machine
def test_what_cannot_be_done_is_refused_with_a_reason(wire):
    ours, theirs = children(next(wire.ids))
    wire.install((ours, theirs))
    with pytest.raises(Refusal, match="installed already"):
        wire.install((ours, theirs))
    with pytest.raises(Refusal, match="taken"):
        wire.install((replace(ours, id=next(wire.ids)), theirs))
    with pytest.raises(Refusal, match="top bits"):
        wire.install((replace(ours, id=next(wire.ids), spi_in=0x1000), theirs))
    with pytest.raises(Refusal, match="device already"):
        wire.a.ask("open", ["10.9.0.1"], ["10.9.0.0/16"], 1400)
    with pytest.raises(Refusal, match="no Child SA"):
        wire.a.ask("use", 99999)
    with pytest.raises(Refusal, match="no Child SA"):
        wire.a.ask("move", 99999, "0.0.0.0:4500", "192.0.2.1:4500")
    wire.a.ask("remove", 99999)
    assert wire.a.ask("usage", [99999]) == {}
    for peer in wire.peers:
        peer.ask("use", ours.id)
    assert ping(wire.a.node, INNER["b"][0])
