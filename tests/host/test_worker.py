"""The worker's loop, driven by hand in the test's own process."""

from __future__ import annotations

import dataclasses
import random
import socket
import subprocess
import sys

import pytest

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.esp.engine import EspEngine
from p2pvpn.host.batch_worker import BatchWorker
from p2pvpn.host.offload_tun import OffloadTun
from p2pvpn.host.udp import open_port
from p2pvpn.host.worker import Worker
from p2pvpn.host.worker_messages import Op, child_fields, child_of, pack, path_fields, unpack
from tests.esp.packets import ipv4, ones_complement

from .peers import INNER, children, path


def test_the_worker_imports_nothing_heavy():
    program = (
        "import sys, p2pvpn.host.worker_process;"
        "heavy = {'asyncio', 'aioice', 'pyroute2', 'kademlia', 'numpy', 'rich', 'click'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("there", "expected"), [("", "BatchWorker"), ("sys.modules['numpy'] = None;", "Worker")])
def test_the_batched_worker_runs_where_numpy_is(there, expected):
    program = f"import sys;{there}import p2pvpn.host.worker_process as w;print(w.worker_class('auto').__name__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == expected + "\n"


def test_a_child_sa_survives_the_channel():
    child = children(7, esn=True, outer_ipv6=True, left=("10.0.0.0/8", "fd00::/64"))[0]
    assert child_of(unpack(pack(child_fields(child)))) == child


class Bench:
    """Host a with a worker whose control channel the test holds, and the engine of its peer b."""

    def __init__(self, node, kind) -> None:
        self.shared = open_port(4500)
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(5)
        self.worker = kind(theirs, [pair.esp for pair in self.shared.pairs])
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
        self.device = self.now(Op.OPEN, "bench", [], 0)
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


@pytest.fixture(params=[Worker, BatchWorker], ids=["plain", "batched"])
def bench(lab, request):
    node = lab.node("a")
    node.ip(f"addr add {path('a', 'b').local.host}/32 dev lo\naddr add {path('a', 'b').remote.host}/32 dev lo")
    with node.inside():
        bench = Bench(node, request.param)
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


@pytest.fixture
def batched(lab):
    """As `bench`, with the batched worker alone."""
    node = lab.node("a")
    node.ip(f"addr add {path('a', 'b').local.host}/32 dev lo\naddr add {path('a', 'b').remote.host}/32 dev lo")
    with node.inside():
        bench = Bench(node, BatchWorker)
        bench.now(Op.INSTALL, *child_fields(bench.ours))
        bench.now(Op.USE, bench.ours.id)
        yield bench
        bench.close()


def summed(packet: bytes) -> bytes:
    """A UDP packet with its checksum."""
    pseudo = packet[12:20] + b"\0\x11" + (len(packet) - 20).to_bytes(2, "big")
    return packet[:26] + (0xFFFF - ones_complement(pseudo + packet[20:])).to_bytes(2, "big") + packet[28:]


def send_batch(bench, datagrams) -> None:
    segment = (17, 103, len(datagrams[0]).to_bytes(2, sys.byteorder))
    bench.far.sendmsg(datagrams, [segment], 0, ("192.0.2.10", 4500))
    bench.worker._on_esp(bench.esp)


@pytest.mark.netns
def test_a_batch_is_joined_and_comes_out_as_the_same_packets(batched):
    written = []
    tun = next(iter(batched.worker._networks.values()))
    batched.worker._networks["bench"] = Written(tun, written)
    payloads = [bytes([number]) * 400 for number in range(20)] + [b"last"]
    packets = [summed(udp(payload)) for payload in payloads]
    send_batch(batched, [batched.peer.outbound("bench", packet, 0.0).datagram for packet in packets])
    assert [batched.inner.recv(1000) for _ in payloads] == payloads
    assert written == ["super-packet"]
    usage = batched.now(Op.USAGE, [batched.ours.id])[batched.ours.id]
    assert usage[:2] == [21, sum(map(len, packets))]
    assert batched.counters() == {}


class Written(OffloadTun):
    """A device that says what it is given."""

    def __init__(self, tun, written) -> None:
        self.fd, self.name, self.joins_udp = tun.fd, tun.name, tun.joins_udp
        self._written = written

    def write(self, packet):
        self._written.append("packet")
        return super().write(packet)

    def write_whole(self, data):
        self._written.append("super-packet")
        return super().write_whole(data)


@pytest.mark.netns
def test_a_damaged_packet_in_a_batch_is_not_repaired(batched):
    packets = [summed(udp(bytes([number]) * 400)) for number in range(9)]
    packets[4] = packets[4][:-1] + b"\xff"
    send_batch(batched, [batched.peer.outbound("bench", packet, 0.0).datagram for packet in packets])
    assert [batched.inner.recv(1000)[0] for _ in range(8)] == [0, 1, 2, 3, 5, 6, 7, 8]


@pytest.mark.netns
def test_a_batch_that_was_replayed_is_refused_packet_by_packet(batched):
    datagrams = [batched.peer.outbound("bench", summed(udp(bytes(100))), 0.0).datagram for _ in range(8)]
    send_batch(batched, datagrams)
    send_batch(batched, datagrams)
    assert batched.counters() == {"REPLAYED": 8}


@pytest.mark.netns
def test_a_batch_that_is_faster_than_the_command_is_not_lost(batched):
    batched.now(Op.REMOVE, batched.ours.id)
    datagrams = [batched.peer.outbound("bench", summed(udp(bytes([n]))), 0.0).datagram for n in range(8)]
    batched.write(Op.INSTALL, *child_fields(batched.ours))
    send_batch(batched, datagrams)
    assert [batched.inner.recv(10)[0] for _ in datagrams] == list(range(8))


@pytest.mark.netns
def test_a_batch_from_elsewhere_hints_at_a_move_once(batched):
    batched.far.close()
    batched.far = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    batched.far.bind((path("a", "b").remote.host, 4700))
    for _ in range(2):
        send_batch(batched, [batched.peer.outbound("bench", summed(udp(b"x")), 0.0).datagram for _ in range(8)])
    assert batched.answer() == [0, "moved", batched.ours.id, path("a", "b").remote.host, 4700]
    assert batched.counters() == {}


@pytest.mark.netns
def test_a_super_packet_of_the_device_leaves_as_the_packets_that_were_meant(batched):
    payload = random.Random(1).randbytes(30 * 500 + 77)
    segment = (17, 103, (500).to_bytes(2, sys.byteorder))
    batched.inner.sendmsg([payload], [segment], 0, (INNER["b"][0], 7001))
    batched.run_device()
    came = b""
    for _ in range(31):
        packet = batched.peer.inbound(("192.0.2.10", 4500), batched.far.recv(2000), 0.0).packet
        assert packet == summed(packet[:26] + b"\0\0" + packet[28:])
        came += packet[28:]
    assert came == payload
    usage = batched.now(Op.USAGE, [batched.ours.id])[batched.ours.id]
    assert usage[2:4] == [31, len(payload) + 31 * 28]


@pytest.mark.netns
def test_a_super_packet_that_became_too_big_is_answered(batched):
    batched.inner.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER: do
    batched.inner.connect((INNER["b"][0], 7001))
    batched.worker._engine.narrow_path(batched.ours.path.remote, 1300)
    batched.inner.sendmsg([bytes(13000)], [(17, 103, (1300).to_bytes(2, sys.byteorder))])
    batched.run_device()
    assert batched.inner.getsockopt(socket.IPPROTO_IP, 14) == 1238  # IP_MTU
    assert batched.now(Op.USAGE, [batched.ours.id])[batched.ours.id][2] == 0


@pytest.mark.netns
def test_a_super_packet_without_an_sa_is_trapped_as_the_packets_that_were_meant(batched):
    batched.now(Op.REMOVE, batched.ours.id)
    batched.inner.sendmsg([bytes(1250)], [(17, 103, (500).to_bytes(2, sys.byteorder))], 0, (INNER["b"][0], 7001))
    batched.run_device()
    assert [len(batched.answer()[3]) for _ in range(3)] == [528, 528, 278]


@pytest.mark.netns
def test_errors_come_back_with_their_reason(bench):
    bench.now(Op.INSTALL, *child_fields(bench.ours))
    for command in (
        (Op.INSTALL, *child_fields(bench.ours)),
        (Op.USE, 99),
        (Op.MOVE, 99, *path_fields(bench.ours.path)),
        (Op.OPEN, "bench", [], 0),
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
