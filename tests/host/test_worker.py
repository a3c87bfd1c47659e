"""The worker's loop, driven by hand in the test's own process."""

from __future__ import annotations

import dataclasses
import socket
import subprocess
import sys

import pytest

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.esp.engine import EspEngine
from p2pvpn.host.udp import open_port
from p2pvpn.host.worker import Worker
from p2pvpn.host.worker_messages import Op, child_fields, child_of, pack, path_fields, unpack
from tests.esp.packets import ipv4

from .peers import INNER, children, path


def test_the_worker_imports_nothing_heavy():
    program = (
        "import sys, p2pvpn.host.worker;"
        "heavy = {'asyncio', 'aioice', 'pyroute2', 'kademlia', 'numpy', 'rich', 'click'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_child_sa_survives_the_channel():
    child = children(7, esn=True, outer_ipv6=True, left=("10.0.0.0/8", "fd00::/64"))[0]
    assert child_of(unpack(pack(child_fields(child)))) == child


class Bench:
    """Host a with a worker whose control channel the test holds, and the engine of its peer b."""

    def __init__(self, node) -> None:
        self.shared = open_port(4500)
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(5)
        self.worker = Worker(theirs, [pair.esp for pair in self.shared.pairs])
        self.theirs = theirs
        self.serial = 0
        self.esp = self.shared.pairs[0].esp
        self.far = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.far.bind((path("a", "b").remote.host, 4600))
        self.far.settimeout(5)
        ours, self.child = children()
        self.ours = dataclasses.replace(ours, path=Path(ours.path.local, Endpoint(ours.path.remote.host, 4600)))
        self.peer = EspEngine()
        self.peer.install(self.child)
        self.peer.use(self.child.id)
        self.device = self.now(Op.OPEN, "bench")
        node.ip(f"link set {self.device} up\naddr add {INNER['a'][0]}/32 dev {self.device}\n")
        node.ip(f"route add 10.9.0.0/16 dev {self.device}")
        self.inner = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.inner.bind((INNER["a"][0], 7000))
        self.inner.settimeout(5)

    def write(self, op, *arguments) -> int:
        self.serial += 1
        self.control.send(pack([self.serial, op, *arguments]))
        return self.serial

    def answer(self):
        return unpack(self.control.recv(1 << 18))

    def now(self, op, *arguments):
        """Let the worker execute a command."""
        serial = self.write(op, *arguments)
        self.worker._on_control()
        while True:
            number, ok, *rest = self.answer()
            if number == serial:
                assert ok, rest
                return rest[0]

    def counters(self):
        """All but the multicast noise of a device that comes up."""
        return {reason: count for reason, count in self.now(Op.COUNTERS).items() if reason != "LINK_SCOPED"}

    def run_device(self) -> None:
        """Let the worker take what waits at its device."""
        for fd in list(self.worker._tuns):
            self.worker._on_tun(fd)

    def close(self) -> None:
        for sock in (self.control, self.theirs, self.far, self.inner):
            sock.close()
        self.worker._close_network("bench")
        self.worker._epoll.close()
        self.shared.close()


@pytest.fixture
def bench(lab):
    node = lab.node("a")
    node.ip(f"addr add {path('a', 'b').local.host}/32 dev lo\naddr add {path('a', 'b').remote.host}/32 dev lo")
    with node.inside():
        bench = Bench(node)
        yield bench
        bench.close()


def udp(payload: bytes, source: int = 7001, destination: int = 7000) -> bytes:
    """An inner UDP packet from b to a; a checksum of zero is none."""
    header = source.to_bytes(2, "big") + destination.to_bytes(2, "big") + (8 + len(payload)).to_bytes(2, "big")
    return ipv4(INNER["b"][0], INNER["a"][0], header + b"\0\0" + payload)


@pytest.mark.netns
def test_a_packet_that_is_faster_than_the_command_is_not_lost(bench):
    sealed = bench.peer.outbound("bench", udp(b"early"), 0.0)
    bench.far.sendto(sealed.datagram, ("192.0.2.10", 4500))
    bench.write(Op.INSTALL, *child_fields(bench.ours))
    bench.worker._on_esp(bench.esp)  # the ESP socket's turn comes before the control channel's
    assert bench.inner.recv(100) == b"early"
    assert bench.answer() == [bench.serial, True, None]
    assert bench.counters() == {}


@pytest.mark.netns
def test_an_spi_that_stays_unknown_is_counted_once(bench):
    sealed = bench.peer.outbound("bench", udp(b"too early"), 0.0)
    bench.far.sendto(sealed.datagram, ("192.0.2.10", 4500))
    bench.worker._on_esp(bench.esp)
    assert bench.counters() == {"UNKNOWN_SPI": 1}


@pytest.mark.netns
def test_a_packet_for_an_sa_that_is_just_being_used_is_not_trapped(bench):
    bench.now(Op.INSTALL, *child_fields(bench.ours))
    bench.inner.sendto(b"first", (INNER["b"][0], 7001))
    bench.write(Op.USE, bench.ours.id)
    bench.run_device()
    datagram = bench.far.recv(2000)
    assert bench.peer.inbound(("192.0.2.10", 4500), datagram, 0.0).packet.endswith(b"first")


@pytest.mark.netns
def test_trapped_packets_go_up_and_come_back_in_order(bench):
    for number in range(3):
        bench.inner.sendto(b"packet %d" % number, (INNER["b"][0], 7001))
    bench.run_device()
    trapped = [bench.answer() for _ in range(3)]
    assert [message[:3] for message in trapped] == [[0, "trapped", "bench"]] * 3
    bench.now(Op.INSTALL, *child_fields(bench.ours))
    bench.now(Op.USE, bench.ours.id)
    bench.now(Op.INJECT, "bench", [message[3] for message in trapped])
    came = [bench.peer.inbound(("192.0.2.10", 4500), bench.far.recv(2000), 0.0).packet for _ in range(3)]
    assert came == [message[3] for message in trapped]


@pytest.mark.netns
def test_what_is_injected_too_early_is_dropped_and_not_trapped_again(bench):
    bench.now(Op.INJECT, "bench", [ipv4(INNER["a"][0], INNER["b"][0])])
    assert bench.counters() == {"injected too early": 1}


@pytest.mark.netns
def test_a_full_channel_drops_the_newest_trapped_packets_and_no_answer(bench):
    sent = 0
    for _ in range(200):
        for _ in range(10):
            bench.inner.sendto(sent.to_bytes(4, "big") + bytes(1300), (INNER["b"][0], 7001))
            sent += 1
        bench.run_device()
    serial = bench.write(Op.COUNTERS)
    bench.worker._on_control()
    came = []
    while True:
        message = bench.answer()
        bench.worker._on_control()
        if message[0] == serial:
            break
        came.append(int.from_bytes(message[3][28:32], "big"))
    assert came == list(range(len(came)))
    assert 0 < len(came) < sent
    assert message[2]["trapped"] == sent - len(came)


@pytest.mark.netns
def test_a_run_of_equal_packets_arrives_as_single_datagrams(bench):
    bench.now(Op.INSTALL, *child_fields(bench.ours))
    bench.now(Op.USE, bench.ours.id)
    sizes = [500, 500, 500, 300, 500, 700, 700, 700]
    for number, size in enumerate(sizes):
        bench.inner.sendto(bytes([number]) * size, (INNER["b"][0], 7001))
    bench.run_device()
    for number, size in enumerate(sizes):
        packet = bench.peer.inbound(("192.0.2.10", 4500), bench.far.recv(2000), 0.0).packet
        assert packet[28:] == bytes([number]) * size


@pytest.mark.netns
def test_a_batch_of_the_wire_is_taken_apart(bench):
    bench.now(Op.INSTALL, *child_fields(bench.ours))
    datagrams = [bench.peer.outbound("bench", udp(bytes([number]) * 400), 0.0).datagram for number in range(10)]
    segment = (17, 103, len(datagrams[0]).to_bytes(2, sys.byteorder))
    bench.far.sendmsg(datagrams, [segment], 0, ("192.0.2.10", 4500))
    bench.worker._on_esp(bench.esp)
    assert [bench.inner.recv(1000) for _ in datagrams] == [bytes([number]) * 400 for number in range(10)]


@pytest.mark.netns
def test_errors_come_back_with_their_reason(bench):
    bench.now(Op.INSTALL, *child_fields(bench.ours))
    for command in (
        (Op.INSTALL, *child_fields(bench.ours)),
        (Op.USE, 99),
        (Op.MOVE, 99, *path_fields(bench.ours.path)),
        (Op.OPEN, "bench"),
    ):
        serial = bench.write(*command)
        bench.worker._on_control()
        number, ok, reason, _ = bench.answer()
        assert (number, ok) == (serial, False)
        assert reason


@pytest.mark.netns
def test_closing_a_network_forgets_its_sas_and_its_device(bench):
    bench.now(Op.INSTALL, *child_fields(bench.ours))
    bench.now(Op.CLOSE, "bench")
    assert bench.now(Op.USAGE, [bench.ours.id]) == {}
    assert bench.device not in {name for _, name in socket.if_nameindex()}
    bench.now(Op.CLOSE, "bench")


@pytest.mark.netns
def test_the_worker_ends_with_its_channel(bench):
    bench.control.close()
    bench.worker.run()
    assert not bench.worker._alive
