"""The worker with offloads: super-packets of the TUN device, runs of datagrams, numpy between them.

    TUN ---- 64 KB reads ----> Cutter or Slots -> Sealing ---- UDP_SEGMENT ----> ESP socket
    TUN <--- 64 KB writes ---- Joiner <------- Opening <------ UDP_GRO --------- ESP socket

Policy is looked up once for all packets of a batch. Whatever does not fit a batch - a few packets of different sizes,
an unknown SPI, a gap that goes back, a packet that is too big, no SA - is handled packet by packet as the plain worker
does, in its place in the order.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import NamedTuple

from p2pvpn.core.errors import WireError
from p2pvpn.esp.batch.cut import Cutter, Plan, plan_of
from p2pvpn.esp.batch.join import Form, Joiner, Run
from p2pvpn.esp.batch.opening import Opening
from p2pvpn.esp.batch.rows import Rows
from p2pvpn.esp.batch.sealing import Sealing, rows_for
from p2pvpn.esp.batch.slots import HEADER_AT, PACKET_AT, SLOT_BYTES, SLOTS, Slots
from p2pvpn.esp.engine import Delivered, Refused
from p2pvpn.esp.inner import MIN_MTU_IPV6, with_checksum
from p2pvpn.esp.packet import NEXT_IPV4, NEXT_IPV6
from p2pvpn.esp.sa import InboundSa, OutboundSa

from .offload_tun import (
    GSO_ECN,
    GSO_NONE,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP,
    HEADER,
    HEADER_BYTES,
    NEEDS_CSUM,
    OffloadTun,
)
from .tun import Tun
from .udp import ANCILLARY_BYTES, received
from .worker import BATCH, Worker

TURNS = 8
"""Reads of all slots, or of one super-packet, before the other descriptors get their turn."""
FEWEST_OUT, FEWEST_IN = 4, 4
"""Packets from which on a batch is faster than one by one."""
_LARGE_BYTES = HEADER_BYTES + 0xFFFF
_SLOT_ROOM = SLOT_BYTES - HEADER_AT


class _Arrival(NamedTuple):
    """What is common to all datagrams of one receive call."""

    source: tuple[str, int]
    now: float
    ecn: int


class _Batch(NamedTuple):
    """The opened datagrams of one receive call."""

    sa: InboundSa
    rows: Rows
    number: int
    ecn: int


class BatchWorker(Worker):
    """`Worker` with the batched paths in both directions. Its devices are `OffloadTun`."""

    def __init__(self, control: socket.socket, esp_sockets: list[socket.socket]) -> None:
        super().__init__(control, esp_sockets)
        self._cutter, self._slots, self._sealing = Cutter(), Slots(), Sealing()
        self._opening, self._joiner = Opening(), Joiner(HEADER_BYTES)
        self._buffer = self._opening.buffer
        self._view = memoryview(self._buffer)
        self._large = bytearray(_SLOT_ROOM + _LARGE_BYTES)
        self._large_view = memoryview(self._large)
        self._slot_view = memoryview(self._slots.buffer)
        overflow = self._large_view[_SLOT_ROOM:]
        self._slot_buffers = [
            (self._slot_view[at + HEADER_AT : at + SLOT_BYTES], overflow)
            for at in range(0, SLOTS * SLOT_BYTES, SLOT_BYTES)
        ]

    def _new_tun(self) -> Tun:
        return OffloadTun()

    # ------------------------------------------------------------------ out

    def _on_tun(self, fd: int) -> None:
        network, tun = self._tuns[fd]
        assert isinstance(tun, OffloadTun)
        now = time.monotonic()
        for _ in range(TURNS):
            sizes, large = tun.read_many(self._slot_buffers, _SLOT_ROOM)
            if sizes and not self._send_slots(network, tun, sizes, now):
                break
            if large:
                at = len(sizes) * SLOT_BYTES
                self._large_view[:_SLOT_ROOM] = self._slot_view[at + HEADER_AT : at + SLOT_BYTES]
                if not self._send_large(network, tun, self._large_view[:large], now):
                    break
            elif len(sizes) < SLOTS:
                break
        self._sender.flush()

    def _send_slots(self, network: str, tun: Tun, sizes: list[int], now: float) -> bool:
        """Send the packets in the first slots. False when the device went away meanwhile."""
        view, slots = self._slot_view, self._slots
        if len(sizes) < FEWEST_OUT:
            groups: Iterator[tuple[int, int]] = iter([(0, len(sizes))])
        else:
            groups = slots.groups(sizes)
        for start, end in groups:
            at = start * SLOT_BYTES + HEADER_AT
            if end - start >= FEWEST_OUT and self._send_group(network, start, end, sizes[start] - HEADER_BYTES, now):
                continue
            for number in range(start, end):
                at = number * SLOT_BYTES + HEADER_AT
                if not self._send_whole(network, tun, view[at : at + sizes[number]], now):
                    return False
        return True

    def _send_group(self, network: str, start: int, end: int, size: int, now: float) -> bool:
        """Packets of one size and pair of addresses, as one batch; False when it cannot be one."""
        at = start * SLOT_BYTES + PACKET_AT
        buffer = self._slots.buffer
        flags, gso_type, _, _, sum_from, sum_at = HEADER.unpack_from(buffer, at - HEADER_BYTES)
        version = buffer[at] >> 4
        if gso_type != GSO_NONE or size < (20 if version == 4 else 40) or version not in (4, 6):
            return False
        sums = flags & NEEDS_CSUM
        if sums and (sum_from % 4 or sum_from + sum_at + 2 > size):
            return False
        pair = bytes(buffer[at + 12 : at + 20] if version == 4 else buffer[at + 8 : at + 40])
        sa = self._engine.outbound_sa_of_pair(network, pair)
        if sa is None or size > sa.mtu:
            return False
        first = sa.reserve(end - start, size, now)
        if first is None:
            return False
        outer_class = _traffic_class(buffer, at)
        self._sender.flush()
        rows = self._slots.rows(start, end, size, (sum_from, sum_at) if sums else None)
        most = rows_for(len(rows[0]))
        for begin in range(0, end - start, most):
            self._send_rows(sa, first + begin, rows[begin : begin + most], outer_class=outer_class)
        return True

    def _send_rows(
        self, sa: OutboundSa, first: int, rows: list[memoryview], *, outer_class: int, tail: bytes = b""
    ) -> None:
        datagrams = self._sealing.seal(sa, first, rows, tail)
        self._sender.put_rows(sa.path, datagrams, (len(datagrams) - len(tail)) // len(rows), outer_class)

    def _send_whole(self, network: str, tun: Tun, data: memoryview, now: float) -> bool:
        """A packet with its virtio header. False when the device went away meanwhile."""
        if len(data) < HEADER_BYTES:
            return True
        flags, gso_type, _, _, sum_from, sum_at = HEADER.unpack_from(data)
        if gso_type != GSO_NONE:
            return self._send_large(network, tun, data, now)
        packet = bytes(data[HEADER_BYTES:])
        if flags & NEEDS_CSUM and sum_from + sum_at + 2 <= len(packet):
            packet = with_checksum(packet, sum_from, sum_at)
        return self._outbound(network, tun, packet, now)

    def _send_large(self, network: str, tun: Tun, data: memoryview, now: float) -> bool:
        """A super-packet with its virtio header. False when the device went away meanwhile."""
        _, gso_type, _, segment, transport_at, _ = HEADER.unpack_from(data)
        kind = gso_type & ~GSO_ECN
        packet = data[HEADER_BYTES:]
        if kind == GSO_NONE:
            return self._outbound(network, tun, bytes(packet), now)
        try:
            if kind not in (GSO_TCPV4, GSO_TCPV6, GSO_UDP):
                raise WireError(f"a super-packet of type {kind}")
            plan = plan_of(packet, transport_at, segment, is_tcp=kind != GSO_UDP)
        except WireError:
            self._lost["super-packet refused"] += 1
            return True
        sa = self._engine.outbound_sa(network, bytes(packet[: plan.payload_at]))
        if sa is not None and self._send_segments(sa, packet, plan, now):
            return True
        return all(self._outbound(network, tun, single, now) for single in self._cutter.packets(packet, plan))

    def _send_segments(self, sa: OutboundSa, packet: memoryview, plan: Plan, now: float) -> bool:
        """All segments of a super-packet; False when one is too big or there are not enough sequence numbers left."""
        size = plan.segment_size
        if size > sa.mtu and (plan.version == 4 or size > MIN_MTU_IPV6):
            return False
        if sa.sequence + (plan.size - plan.payload_at) // plan.segment + 1 > sa.stop_at:
            return False
        self._sender.flush()
        outer_class = _traffic_class(packet, 0)
        next_header = NEXT_IPV4 if plan.version == 4 else NEXT_IPV6
        for rows, tail in self._cutter.cut(packet, plan):
            first = sa.reserve(len(rows), size, now)
            last = sa.seal(tail, next_header, now) if tail else None
            if rows and first is not None:
                self._send_rows(sa, first, rows, outer_class=outer_class, tail=last or b"")
            elif last is not None:
                self._sender.put(sa.path, last, outer_class)
        return True

    # ------------------------------------------------------------------ in

    def _on_esp(self, sock: socket.socket) -> None:
        take, receive, into, view = self._take, sock.recvmsg_into, [self._buffer], self._view
        is_ipv6 = sock.family == socket.AF_INET6
        now = time.monotonic()
        left = BATCH * TURNS
        while left > 0:
            try:
                length, control, _, source = receive(into, ANCILLARY_BYTES)
            except BlockingIOError:
                return
            except OSError:
                left -= BATCH
                continue  # a soft error of an earlier datagram
            if is_ipv6:
                source = source[:2]
            size, ecn = received(control)
            size = size or length or 1
            left -= -(-length // size)
            arrival = _Arrival(source, now, ecn)
            if length // size < FEWEST_IN or not self._take_batch(arrival, size, length):
                for at in range(0, length, size):
                    take(source, bytes(view[at : min(at + size, length)]), now, ecn)

    def _take_batch(self, arrival: _Arrival, size: int, length: int) -> bool:
        """Datagrams of `size` bytes, the last maybe shorter, in the first `length` bytes of the buffer. False when they
        are to be taken one by one."""
        sa = self._engine.inbound_sa(bytes(self._view[:4]))
        if sa is None:
            return False
        count = length // size
        rows = self._opening.open_untrusted(sa, size, count, arrival.now)
        if rows is None:
            return False
        moved = sa.came_from(arrival.source) if arrival.source != sa.source else None
        tail = None
        if count * size < length:
            source, now, ecn = arrival
            tail = self._open(source, bytes(self._view[count * size : length]), now, ecn)
        batch = _Batch(sa, rows, count, arrival.ecn)
        tun = self._networks.get(sa.child.network)
        if isinstance(tun, OffloadTun):
            tail = self._deliver(tun, batch, tail)
        else:
            self._lost["device refused"] += count
        if tail is not None:
            self._give(tail)
        if moved is not None:
            self._tell_moved(sa.child.id, moved)
        return True

    def _deliver(self, tun: OffloadTun, batch: _Batch, tail: Delivered | None) -> Delivered | None:
        """Give the packets of a batch to the device, in order, and `tail` with the last if it goes with them; otherwise
        that is given back."""
        joiner, rows, count = self._joiner, batch.rows, batch.number
        form = joiner.form_untrusted(rows, count)
        if form is None or not (form.is_tcp or tun.joins_udp):
            self._deliver_singly(tun, batch, Run(0, count))
            return tail
        *runs, last = joiner.runs(rows, count, form)
        for run in runs:
            self._deliver_run(tun, batch, run, form)
        joined = b""
        fits = tail is not None and tail.moved is None and tail.child_id == batch.sa.child.id
        if tail is not None and fits and joiner.continues_untrusted(rows, last, form, tail.packet):
            joined, tail = tail.packet, None
        self._deliver_run(tun, batch, last, form, joined)
        return tail

    def _deliver_run(self, tun: OffloadTun, batch: _Batch, run: Run, form: Form, tail: bytes = b"") -> None:
        """One super-packet, or packet by packet where the kernel does not take it."""
        number = run.end - run.start
        if number == 1 and not tail:
            self._deliver_singly(tun, batch, run)
            return
        first = bytes(batch.rows.views[run.start][: form.payload_at])
        head = self._engine.admit_run(batch.sa, first, number, form.size, batch.ecn)
        if head is None:
            if tail:
                self._put(tun, tail)
            return
        whole = self._joiner.join(batch.rows, run, form, head, tail)
        _describe(whole, form)
        if not tun.write_whole(whole):
            batch.sa.bytes -= number * form.size
            self._deliver_singly(tun, batch, run)
            if tail:
                self._put(tun, tail)

    def _deliver_singly(self, tun: OffloadTun, batch: _Batch, run: Run) -> None:
        admit = self._engine.admit_text
        for row in batch.rows.views[run.start : run.end]:
            packet = admit(batch.sa, bytes(row), batch.ecn)
            if not isinstance(packet, Refused):
                self._put(tun, packet)

    def _put(self, tun: OffloadTun, packet: bytes) -> None:
        if not tun.write(packet):
            self._lost["device refused"] += 1


def _traffic_class(packet: bytearray | memoryview, at: int) -> int:
    """Of a packet at an offset: what the outer header copies."""
    if packet[at] >> 4 == 4:
        return packet[at + 1]
    return (packet[at] & 15) << 4 | packet[at + 1] >> 4


def _describe(whole: memoryview, form: Form) -> None:
    """The virtio header of a super-packet that was joined."""
    if not form.is_tcp:
        kind, sum_at = GSO_UDP, 6
    else:
        kind, sum_at = GSO_TCPV4 if form.transport_at == 20 else GSO_TCPV6, 16
    segment = form.size - form.payload_at
    HEADER.pack_into(whole, 0, NEEDS_CSUM, kind, form.payload_at, segment, form.transport_at, sum_at)
