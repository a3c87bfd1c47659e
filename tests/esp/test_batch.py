"""Batches against packets one by one: what is cut, sealed, opened and joined at once must be the same packets."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pvpn.core.child import COMBINED_SUITES, EspSuite
from p2pvpn.core.errors import WireError
from p2pvpn.esp.batch.cut import Cutter, plan_of
from p2pvpn.esp.batch.join import Joiner, Run
from p2pvpn.esp.batch.opening import Opening
from p2pvpn.esp.batch.rows import Rows
from p2pvpn.esp.batch.sealing import ROW_OVERHEAD_BYTES, Sealing, rows_for
from p2pvpn.esp.batch.slots import HEADER_AT, PACKET_AT, SLOT_BYTES, Slots
from p2pvpn.esp.engine import Delivered, EspEngine, Reason
from p2pvpn.esp.inner import with_checksum
from p2pvpn.esp.packet import NEXT_IPV4, NEXT_IPV6, trailer_of

from .packets import ALICE, ALICE6, ALICE_AT, BOB, BOB6, NETWORK, ipv4, ipv6, ones_complement, pair, selectors

FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = (1 << bit for bit in range(8))
TCP, UDP = 6, 17


def transport_at(packet: bytes) -> int:
    return (packet[0] & 15) * 4 if packet[0] >> 4 == 4 else 40


def pseudo_header(packet: bytes) -> bytes:
    """As RFC 9293 section 3.1 and RFC 8200 section 8.1 have it, with the length of this packet."""
    at = transport_at(packet)
    addresses, protocol = (packet[12:20], packet[9]) if packet[0] >> 4 == 4 else (packet[8:40], packet[6])
    return addresses + bytes([0, protocol]) + (len(packet) - at).to_bytes(2, "big")


def checked(packet: bytes) -> bytes:
    """The packet with its transport checksum, computed word by word."""
    at = transport_at(packet)
    is_tcp = pseudo_header(packet)[-3] == TCP
    field = at + (16 if is_tcp else 6)
    packet = packet[:field] + b"\0\0" + packet[field + 2 :]
    found = 0xFFFF - ones_complement(pseudo_header(packet) + packet[at:])
    return packet[:field] + (found if found or is_tcp else 0xFFFF).to_bytes(2, "big") + packet[field + 2 :]


def is_right(packet: bytes) -> bool:
    at = transport_at(packet)
    header = packet[0] >> 4 == 6 or ones_complement(packet[:at]) == 0xFFFF
    return header and ones_complement(pseudo_header(packet) + packet[at:]) == 0xFFFF


def tcp(sequence: int, flags: int, options: bytes, payload: bytes, source: int = 1000) -> bytes:
    head = source.to_bytes(2, "big") + b"\x07\xd0" + (sequence & 0xFFFFFFFF).to_bytes(4, "big") + b"\0\0\x12\x34"
    return head + bytes([(20 + len(options)) << 2, flags]) + b"\x01\xf5\0\0\0\0" + options + payload


def udp(payload: bytes, source: int = 1000) -> bytes:
    return source.to_bytes(2, "big") + b"\x07\xd0" + (8 + len(payload)).to_bytes(2, "big") + b"\0\0" + payload


def whole(
    version: int, protocol: int, transport: bytes, *, number: int = 0x1234, df: bool = True, tos: int = 0
) -> bytes:
    """An IP packet without its transport checksum."""
    if version == 6:
        return ipv6(ALICE6, BOB6, transport, protocol, tclass=tos)
    packet = bytearray(ipv4(ALICE, BOB, transport, protocol, tos=tos, flags=0x4000 if df else 0))
    packet[4:6] = (number & 0xFFFF).to_bytes(2, "big")
    packet[10:12] = b"\0\0"
    packet[10:12] = (0xFFFF - ones_complement(bytes(packet[:20]))).to_bytes(2, "big")
    return bytes(packet)


def partial(packet: bytes) -> bytes:
    """The packet with the sum of its pseudo header for a checksum, as the kernel leaves it to a device."""
    field = transport_at(packet) + (16 if pseudo_header(packet)[-3] == TCP else 6)
    return packet[:field] + ones_complement(pseudo_header(packet)).to_bytes(2, "big") + packet[field + 2 :]


@st.composite
def super_packets(draw):
    """A super-packet, the size of its segments, and the segments, made one by one."""
    version, protocol = draw(st.sampled_from([4, 6])), draw(st.sampled_from([TCP, UDP]))
    segment = draw(st.integers(1, 1400))
    size = draw(st.integers(1, min(70 * segment, 40000)))
    options = bytes(draw(st.sampled_from([0, 4, 12, 40])))
    payload = random.Random(draw(st.integers(0, 99))).randbytes(size)
    number, sequence = draw(st.sampled_from([0, 0xFFF0])), draw(st.sampled_from([7, 0xFFFFFE00]))
    flags = ACK | draw(st.sampled_from([0, PSH, FIN, PSH | FIN, CWR, ECE | PSH]))
    tos = draw(st.sampled_from([0, 0xBA]))

    def packet(at: int, part: bytes, kept: int) -> bytes:
        if protocol == TCP:
            return whole(version, TCP, tcp(sequence + at, kept, options, part), number=number + at // segment, tos=tos)
        return whole(version, UDP, udp(part), number=number + at // segment, tos=tos)

    expected = []
    for at in range(0, size, segment):
        kept = flags
        if at:
            kept &= ~CWR
        if at + segment < size:
            kept &= ~(PSH | FIN)
        expected.append(checked(packet(at, payload[at : at + segment], kept)))
    return partial(packet(0, payload, flags)), segment, expected


@settings(max_examples=150, deadline=None)
@given(super_packets())
def test_a_super_packet_is_cut_into_the_packets_that_were_meant(case):
    packet, segment, expected = case
    view = memoryview(packet)
    plan = plan_of(view, transport_at(packet), segment, is_tcp=pseudo_header(packet)[-3] == TCP)
    assert Cutter().packets(view, plan) == expected
    assert all(is_right(packet) for packet in expected)


@given(st.binary(max_size=120), st.integers(0, 130), st.integers(0, 0xFFFF), st.booleans(), st.sampled_from("E`F"))
def test_lengths_that_do_not_fit_are_refused(data, at, segment, is_tcp, first):
    view = memoryview(first.encode() + data)
    try:
        plan = plan_of(view, at, segment, is_tcp=is_tcp)
    except WireError:
        return
    packets = Cutter().packets(view, plan)
    assert sum(len(packet) - plan.payload_at for packet in packets) == len(view) - plan.payload_at


def rows_of(packets: list[bytes]) -> Rows:
    """Packets of one size as rows."""
    kind = NEXT_IPV4 if packets[0][0] >> 4 == 4 else NEXT_IPV6
    padded = [packet + trailer_of(len(packet), kind) for packet in packets]
    return Rows(bytearray(b"".join(padded)), len(padded[0]), len(padded))


def joined(packets: list[bytes]) -> list[list[bytes]]:
    """What the joiner makes of packets of one size, cut again."""
    rows, joiner, out = rows_of(packets), Joiner(10), []
    form = joiner.form_untrusted(rows, len(packets))
    if form is None:
        return [[packet] for packet in packets]
    for start, end in joiner.runs(rows, len(packets), form):
        if end - start == 1:
            out.append([packets[start]])
            continue
        head = packets[start][: form.payload_at]
        data = memoryview(bytes(joiner.join(rows, Run(start, end), form, head)))[10:]
        assert partial(bytes(data)) == bytes(data)
        plan = plan_of(data, form.transport_at, form.size - form.payload_at, is_tcp=form.is_tcp)
        out.append(Cutter().packets(data, plan))
    return out


@st.composite
def neighbours(draw):
    """Packets of one size: mostly the next of a flow, now and then something else."""
    version = draw(st.sampled_from([4, 6]))
    protocol, payload = draw(st.sampled_from([TCP, UDP])), draw(st.integers(1, 60))
    packets, sequence, number, source, df, flags, tos = [], 0xFFFFFF80, 0xFFFC, 1000, True, ACK, 0
    for index in range(draw(st.integers(1, 12))):
        change = draw(
            st.sampled_from(["", "", "", "", "gap", "port", "flags", "df", "damage", "bare", "id", "tos", "kind"])
        )
        if change == "gap":
            sequence += 1
        elif change == "port":
            source = 3000 - source
        elif change == "flags":
            flags = draw(
                st.sampled_from([ACK, ACK | PSH, ACK | FIN, ACK | CWR, ACK | ECE, SYN, RST | ACK, 0, ACK | URG])
            )
        elif change == "df":
            df = not df
        elif change == "id":
            number += 5
        elif change == "tos":
            tos ^= 0x28
        elif change == "kind":
            protocol = TCP + UDP - protocol
            payload = max(payload + (12 if protocol == UDP else -12), 1)
        body = random.Random(index).randbytes(payload)
        transport = tcp(sequence, flags, b"", body, source) if protocol == TCP else udp(body, source)
        packet = checked(whole(version, protocol, transport, number=number, df=df, tos=tos))
        if change == "damage":
            at = draw(st.integers(0, len(packet) - 1))
            packet = packet[:at] + bytes([packet[at] ^ 1 << draw(st.integers(0, 7))]) + packet[at + 1 :]
        elif change == "bare" and protocol == UDP:
            packet = packet[: transport_at(packet) + 6] + b"\0\0" + packet[transport_at(packet) + 8 :]
        packets.append(packet)
        sequence, number = sequence + payload, number + 1
    return [packet for packet in packets if len(packet) == len(packets[0])]


def without_number(packet: bytes) -> bytes:
    """Without the IPv4 identification of a packet that is never cut, which means nothing (RFC 6864)."""
    if packet[0] >> 4 == 4 and packet[6] & 0x40:
        return packet[:4] + packet[6:10] + packet[12:]
    return packet


@settings(max_examples=400, deadline=None)
@given(neighbours())
def test_joining_loses_nothing_and_repairs_nothing(packets):
    """Cut again, super-packets are the packets that they were joined from, the damaged ones included."""
    out = joined(packets)
    assert [without_number(packet) for group in out for packet in group] == [without_number(p) for p in packets]
    for group in out:
        if len(group) > 1:
            assert all(is_right(packet) for packet in group)


def flow(count: int, size: int = 100, **options) -> list[bytes]:
    return [
        checked(whole(4, TCP, tcp(index * size, ACK, bytes(12), bytes([index]) * size), number=index, **options))
        for index in range(count)
    ]


def test_a_flow_becomes_one_super_packet():
    assert joined(flow(40)) == [flow(40)]
    assert joined(flow(40, df=False)) == [flow(40, df=False)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_one_damaged_bit_anywhere_keeps_its_packet_alone(data):
    packets = flow(6)
    victim = data.draw(st.integers(0, 5))
    bit = data.draw(st.integers(0, 8 * len(packets[0]) - 1))
    damaged = bytearray(packets[victim])
    damaged[bit // 8] ^= 1 << bit % 8
    packets[victim] = bytes(damaged)
    assert [bytes(damaged)] in joined(packets)


def test_fragments_and_options_are_not_joined():
    fragments = [ipv4(ALICE, BOB, bytes(80), TCP, flags=0x2000) for _ in range(4)]
    with_options = [checked(ipv4(ALICE, BOB, udp(bytes(80)), UDP, options=b"\x01\x01\x01\x01")) for _ in range(4)]
    assert len(joined(fragments)) == len(joined(with_options)) == 4


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"flags": ACK | PSH}, True),
        ({"sequence": 301}, False),
        ({"source": 1001}, False),
        ({"size": 100}, False),
        ({"damage": True}, False),
        ({"options": bytes(8)}, False),
    ],
)
def test_a_shorter_last_packet_goes_along_when_it_is_the_next(change, fits):
    rows, joiner = rows_of(flow(3)), Joiner(10)
    form = joiner.form_untrusted(rows, 3)
    transport = tcp(
        change.get("sequence", 300),
        change.get("flags", ACK),
        change.get("options", bytes(12)),
        bytes(change.get("size", 33)),
        change.get("source", 1000),
    )
    last = checked(whole(4, TCP, transport, number=3))
    if change.get("damage"):
        last = last[:-1] + b"\1"
    run = Run(0, 3)
    assert joiner.continues_untrusted(rows, run, form, last) is fits
    if fits:
        data = memoryview(bytes(joiner.join(rows, run, form, flow(1)[0][:52], last)))[10:]
        plan = plan_of(data, 20, 100, is_tcp=True)
        assert Cutter().packets(data, plan) == [*flow(3), last]


@given(st.integers(4, 20), st.sampled_from([4, 6]), st.sampled_from([TCP, UDP]), st.integers(0, 300))
def test_slots_get_their_checksums_and_padding(count, version, protocol, size):
    slots = Slots()
    expected = []
    for index in range(count):
        body = random.Random(index * 1000 + size).randbytes(size)
        packet = whole(version, protocol, tcp(index, ACK, b"", body) if protocol == TCP else udp(body))
        start = index * SLOT_BYTES
        slots.buffer[start + PACKET_AT : start + PACKET_AT + len(packet)] = partial(packet)
        expected.append(checked(packet))
    offset = 16 if protocol == TCP else 6
    assert list(slots.groups([len(packet) + 10] * count)) == [(0, count)]
    rows = slots.rows(0, count, len(packet), (transport_at(packet), offset))
    kind = NEXT_IPV4 if version == 4 else NEXT_IPV6
    assert [bytes(row) for row in rows] == [one + trailer_of(len(one), kind) for one in expected]
    assert with_checksum(partial(packet), transport_at(packet), offset) == expected[-1]


def test_slots_are_grouped_by_what_they_have_in_common():
    slots = Slots()
    packets = [
        *[ipv4(ALICE, BOB, bytes(30))] * 3,
        *[ipv4(ALICE, BOB, bytes(31))] * 2,
        *[ipv4(ALICE, BOB, bytes(31), tos=4)] * 2,
        *[ipv4(BOB, ALICE, bytes(31), tos=4)] * 2,
        *[ipv6(ALICE6, BOB6, bytes(11))] * 2,
        ipv6(ALICE6, ALICE6, bytes(11)),
    ]
    for index, packet in enumerate(packets):
        slots.buffer[index * SLOT_BYTES + PACKET_AT : index * SLOT_BYTES + PACKET_AT + len(packet)] = packet
    slots.buffer[2 * SLOT_BYTES + HEADER_AT] = 1
    sizes = [len(packet) + 10 for packet in packets]
    assert list(slots.groups(sizes)) == [(0, 2), (2, 3), (3, 5), (5, 7), (7, 9), (9, 11), (11, 12)]
    assert list(slots.groups([])) == []


class Ends:
    """Alice's and Bob's engines with one SA, and batches between them."""

    def __init__(self, suite=EspSuite.AES_GCM_16_256, *, esn=False, top=0) -> None:
        left, right = pair(suite=suite, esn=esn)
        self.alice, self.bob = EspEngine(), EspEngine()
        for engine, child in ((self.alice, left), (self.bob, right)):
            engine.install(child)
            engine.use(child.id)
        self.out = self.alice._children[1].outbound
        self.inbound = self.bob._children[1].inbound
        self.out.sequence = self.inbound.window.top = top
        self.sealing, self.opening = Sealing(), Opening()

    def seal(self, packets: list[bytes]) -> list[bytes]:
        rows = rows_of(packets)
        first = self.out.reserve(len(packets), len(packets[0]), 1.0)
        data = bytes(self.sealing.seal(self.out, first, rows.views))
        size = rows.size + ROW_OVERHEAD_BYTES
        return [data[at : at + size] for at in range(0, len(data), size)]

    def single(self, packets: list[bytes]) -> list[bytes]:
        return [self.alice.outbound(NETWORK, packet, 1.0).datagram for packet in packets]

    def open(self, datagrams: list[bytes]) -> list[bytes] | None:
        data = b"".join(datagrams)
        self.opening.buffer[: len(data)] = data
        sa = self.bob.inbound_sa(data[:4])
        rows = self.opening.open_untrusted(sa, len(datagrams[0]), len(datagrams), 2.0)
        if rows is None:
            return None
        return [self.bob.admit_text(sa, bytes(row), 0) for row in rows.views[: len(datagrams)]]


@pytest.mark.parametrize("suite", COMBINED_SUITES)
@pytest.mark.parametrize(
    ("esn", "top"), [(False, 0), (False, 0xFFFFFF00), (True, 0), (True, 0xFFFFFFFA), (True, 1 << 40)]
)
def test_batches_and_single_packets_are_the_same_on_the_wire(suite, esn, top):
    packets = flow(20)
    batch, single = Ends(suite, esn=esn, top=top), Ends(suite, esn=esn, top=top)
    datagrams = batch.seal(packets)
    assert datagrams == single.single(packets)
    assert batch.alice.usage([1]) == single.alice.usage([1])
    came = [batch.bob.inbound(ALICE_AT, datagram, 2.0) for datagram in datagrams]
    assert came == [Delivered(NETWORK, 1, packet) for packet in packets]
    crosses = top == 0xFFFFFFFA
    assert single.open(datagrams) == (None if crosses else packets)
    if not crosses:
        assert batch.bob.usage([1]) == single.bob.usage([1])


def test_a_batch_is_opened_once():
    ends = Ends()
    first, second = ends.seal(flow(10)), ends.seal(flow(10))
    assert ends.open(second) == flow(10)  # a gap in front is none of its business
    for replay in (second, first, [*first[5:], *second[:5]]):
        assert ends.open(replay) is None
    assert [isinstance(ends.bob.inbound(ALICE_AT, one, 3.0), Delivered) for one in (*first, *second)] == [True] * 10 + [
        False
    ] * 10
    assert ends.bob.drops[Reason.REPLAYED] == 10


@pytest.mark.parametrize("position", [0, 4, 9])
def test_one_forged_datagram_leaves_the_batch_to_the_slow_path(position):
    ends = Ends()
    datagrams = ends.seal(flow(10))
    good = datagrams[position]
    datagrams[position] = good[:-1] + bytes([good[-1] ^ 1])
    assert ends.open(datagrams) is None
    assert ends.inbound.window.top == 0
    came = [ends.bob.inbound(ALICE_AT, datagram, 2.0) for datagram in datagrams]
    assert [isinstance(one, Delivered) for one in came] == [index != position for index in range(10)]
    assert isinstance(ends.bob.inbound(ALICE_AT, good, 2.0), Delivered)


@pytest.mark.parametrize("swap", [(0, 1), (8, 9)])
def test_datagrams_out_of_order_are_left_to_the_slow_path(swap):
    ends = Ends()
    datagrams = ends.seal(flow(10))
    one, other = swap
    datagrams[one], datagrams[other] = datagrams[other], datagrams[one]
    assert ends.open(datagrams) is None
    assert all(isinstance(ends.bob.inbound(ALICE_AT, datagram, 2.0), Delivered) for datagram in datagrams)


def test_datagrams_of_two_sas_are_left_to_the_slow_path():
    ends = Ends()
    datagrams = ends.seal(flow(4))
    datagrams[2] = b"\xc0\0\0\7" + datagrams[2][4:]
    assert ends.open(datagrams) is None


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 200), st.integers(0, 130))
def test_no_bytes_of_the_wire_make_the_batch_raise(data, size, count):
    ends = Ends()
    ends.opening.buffer[: len(data)] = data
    assert ends.opening.open_untrusted(ends.inbound, size, count, 0.0) is None


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=4, max_size=120), st.integers(1, 6), st.sampled_from([b"", b"\x45", b"\x60"]), st.booleans())
def test_no_authentic_text_makes_the_joiner_raise(data, count, first, padded):
    text = first + data + bytes(-(len(first) + len(data)) % 4)
    if padded:
        text = text[: len(text) // 4 * 4 - 4] + b"\1\2\2\4"
    rows, joiner = Rows(bytearray(text * count), len(text), count), Joiner(10)
    form = joiner.form_untrusted(rows, count)
    if form is not None:
        assert joiner.runs(rows, count, form)[-1].end == count


def test_the_window_goes_on_after_a_run():
    ends = Ends()
    datagrams = ends.single(flow(30))
    assert ends.open(datagrams[2:12]) == flow(30)[2:12]
    for index, fresh in ((1, True), (5, False), (11, False), (12, True), (0, True), (0, False)):
        assert isinstance(ends.bob.inbound(ALICE_AT, datagrams[index], 2.0), Delivered) is fresh
    assert ends.open(datagrams[13:30]) == flow(30)[13:30]


def test_policy_and_congestion_hold_for_runs_too():
    ends = Ends()
    head = flow(1)[0][:52]
    assert ends.bob.admit_run(ends.inbound, head, 7, 152, 0) == head
    assert ends.bob.usage([1])[1].bytes_in == 7 * 152
    assert ends.bob.admit_run(ends.inbound, head, 7, 152, 3) is None
    assert ends.bob.drops[Reason.CONGESTION] == 7
    marked = checked(whole(4, TCP, tcp(0, ACK, b"", b"x"), tos=2))[:40]
    assert ends.bob.admit_run(ends.inbound, marked, 1, 41, 3)[1] == 3
    stranger = dataclasses.replace(ends.inbound.child, id=2, spi_in=0xC0000099, remote=selectors("10.9.0.77"))
    ends.bob.install(stranger)
    assert ends.bob.admit_run(ends.bob._children[2].inbound, head, 7, 152, 0) is None
    assert ends.bob.drops[Reason.WRONG_ADDRESS] == 7


def test_an_sa_reserves_no_numbers_that_it_does_not_have():
    ends = Ends(top=0xFFFFFFF0)
    assert ends.out.reserve(16, 10, 0.0) is None
    assert ends.out.reserve(15, 10, 0.0) == 0xFFFFFFF1
    assert ends.out.reserve(1, 10, 0.0) is None


def test_a_batch_fits_one_send_call():
    for size in range(28, 1500, 4):
        assert 1 <= rows_for(size) <= 64
        assert rows_for(size) * (size + ROW_OVERHEAD_BYTES) <= 65507
