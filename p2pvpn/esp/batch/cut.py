"""A super-packet of the kernel to rows: what a network card with segmentation offload would send.

    | IP header | TCP or UDP header | payload of `segment` bytes, again and again, the last maybe shorter |

All segments get the headers of the whole, with lengths, IPv4 identification (RFC 6864), TCP sequence number and flags
and checksums of their own: CWR stays on the first alone (RFC 3168 section 6.1.2), FIN and PSH on the last. The
transport checksum of the whole is the sum of its pseudo header with its length, as the virtio header promises, so those
of the segments follow from it whatever IPv6 extension headers there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from p2pvpn.core.errors import WireError
from p2pvpn.esp.inner import checksum
from p2pvpn.esp.packet import NEXT_IPV4, NEXT_IPV6, trailer_of

from .rows import MODULUS, Rows, little_sum, swapped
from .sealing import rows_for

MAX_SHAPES = 16
"""Kinds of super-packet that are remembered; each costs 70 KB."""
_FIN, _PSH, _CWR = 0x01, 0x08, 0x80
_LOW = 0xFFFFFFFF


class Plan(NamedTuple):
    """Where things are in a super-packet of `size` bytes: transport header and payload, and how it is to be cut."""

    version: int
    is_tcp: bool
    transport_at: int
    payload_at: int
    segment: int
    size: int

    @property
    def segment_size(self) -> int:
        """Bytes of the largest packet that comes out."""
        return min(self.payload_at + self.segment, self.size)


class Piece(NamedTuple):
    """Rows to seal, and a last packet that is shorter (or empty)."""

    rows: list[memoryview]
    tail: bytes


class _Shape:
    """The rows for super-packets whose parts have the same sizes, with their padding, and views of the fields."""

    def __init__(self, plan: Plan) -> None:
        size, at = plan.payload_at + plan.segment, plan.transport_at
        trailer = trailer_of(size, NEXT_IPV4 if plan.version == 4 else NEXT_IPV6)
        row = size + len(trailer)
        self.rows = Rows(bytearray(row * rows_for(row)), row, rows_for(row))
        self.headers = self.rows.array[:, : plan.payload_at]
        self.payload = self.rows.array[:, plan.payload_at : size]
        self.rows.array[:, size:] = np.frombuffer(trailer, np.uint8)
        self.words = self.rows.words[:, at // 4 :]
        self.trailer_sum = int(self.rows.words[0].sum(dtype=np.int64)) % MODULUS
        field = self.rows.field
        self.identification, self.header_checksum = field(4, ">u2"), field(10, ">u2")
        if plan.is_tcp:
            self.sequence, self.flags = field(at + 4, ">u4"), field(at + 13, "u1")
        self.checksum = field(at + (16 if plan.is_tcp else 6), "<u2")
        self.steps = np.arange(self.rows.count, dtype=np.int64)
        self.offsets = self.steps * plan.segment


class Cutter:
    """Cuts one super-packet after the other; pieces are valid until the next one is asked for."""

    def __init__(self) -> None:
        self._shapes: dict[tuple[int, bool, int, int, int], _Shape] = {}

    def cut(self, packet: memoryview, plan: Plan) -> Iterator[Piece]:
        """The segments, in order."""
        key = plan[:5]
        shape = self._shapes.get(key)
        if shape is None:
            if len(self._shapes) >= MAX_SHAPES:
                self._shapes.clear()
            shape = self._shapes[key] = _Shape(plan)
        head = _head(packet, plan, plan.segment)
        header_sum = int.from_bytes(head[: plan.transport_at], "big") % MODULUS
        if plan.is_tcp:
            head[plan.transport_at + 13] &= ~(_FIN | _PSH | _CWR) & 0xFF
        row_header = np.frombuffer(head, np.uint8)
        constant = shape.trailer_sum - _pseudo_sum(packet, plan, plan.segment)
        source = np.frombuffer(packet, np.uint8)
        segment, whole = plan.segment, (plan.size - plan.payload_at) // plan.segment
        done = 0
        while done < whole:
            count = min(shape.rows.count, whole - done)
            start = plan.payload_at + done * segment
            shape.headers[:count] = row_header
            shape.payload[:count] = source[start : start + count * segment].reshape(count, segment)
            is_last = done + count == whole
            rest = plan.size - plan.payload_at - whole * segment if is_last else 0
            if plan.version == 4:
                _identify(shape, _identification(packet) + done, count, header_sum)
            if plan.is_tcp:
                _sequence(shape, plan, packet, range(done, done + count), ends=is_last and not rest)
            sums = shape.words[:count].sum(axis=1, dtype=np.int64)
            checksums = (constant - sums) % MODULUS
            if not plan.is_tcp:
                checksums[checksums == 0] = 0xFFFF  # RFC 768: zero would say that there is none
            shape.checksum[:count] = checksums
            done += count
            yield Piece(shape.rows.views[:count], _last(packet, plan, done, rest) if rest else b"")
        if not whole:
            yield Piece([], _last(packet, plan, 0, plan.size - plan.payload_at))

    def packets(self, packet: memoryview, plan: Plan) -> list[bytes]:
        """The segments by themselves."""
        out: list[bytes] = []
        for rows, tail in self.cut(packet, plan):
            out += [bytes(row[: plan.payload_at + plan.segment]) for row in rows]
            if tail:
                out.append(tail)
        return out


def plan_of(packet: memoryview, transport_at: int, segment: int, *, is_tcp: bool) -> Plan:
    """How a super-packet is to be cut. Raises WireError unless its headers and lengths fit the bytes."""
    size = len(packet)
    if size < transport_at + (20 if is_tcp else 8) or segment <= 0 or transport_at % 4:
        raise WireError("a super-packet without whole headers")
    version = packet[0] >> 4
    if version == 4:
        fits = transport_at == (packet[0] & 15) * 4 and transport_at >= 20
    else:
        fits = version == 6 and transport_at >= 40
    header = (packet[transport_at + 12] >> 4) * 4 if is_tcp else 8
    payload_at = transport_at + header
    if not fits or (is_tcp and header < 20) or size <= payload_at:
        raise WireError("a super-packet whose lengths do not fit")
    if payload_at + segment > 0xFFFF:
        segment = size - payload_at
    return Plan(version, is_tcp, transport_at, payload_at, segment, size)


def _head(packet: memoryview, plan: Plan, payload: int) -> bytearray:
    """The headers of a segment: lengths are right, and the fields that differ from row to row are those of the whole,
    but for both checksums and, in IPv4, the identification, which are zero."""
    head = bytearray(packet[: plan.payload_at])
    at, size = plan.transport_at, plan.payload_at + payload
    if plan.version == 4:
        head[2:4] = size.to_bytes(2, "big")
        head[4:6] = head[10:12] = b"\0\0"
    else:
        head[4:6] = (size - 40).to_bytes(2, "big")
    if plan.is_tcp:
        head[at + 16 : at + 18] = b"\0\0"
    else:
        head[at + 4 : at + 6] = (size - at).to_bytes(2, "big")
        head[at + 6 : at + 8] = b"\0\0"
    return head


def _pseudo_sum(packet: memoryview, plan: Plan, payload: int) -> int:
    """The sum of a segment's pseudo header: that of the whole with the length of the segment instead of its own."""
    field = plan.transport_at + (16 if plan.is_tcp else 6)
    whole, segment = plan.size - plan.transport_at, plan.payload_at + payload - plan.transport_at
    return (little_sum(bytes(packet[field : field + 2])) - swapped(whole) + swapped(segment)) % MODULUS


def _identification(packet: memoryview) -> int:
    return packet[4] << 8 | packet[5]


def _identify(shape: _Shape, first: int, count: int, header_sum: int) -> None:
    """IPv4 identifications from `first` on, and header checksums to a header that sums up to `header_sum` without."""
    numbers = shape.steps[:count] + first
    if 0 < header_sum < MODULUS - first - count:
        shape.header_checksum[:count] = (MODULUS - header_sum) - numbers
    else:
        numbers &= 0xFFFF
        shape.header_checksum[:count] = -(numbers + header_sum) % MODULUS
    shape.identification[:count] = numbers


def _sequence(shape: _Shape, plan: Plan, packet: memoryview, segments: range, *, ends: bool) -> None:
    """TCP sequence numbers and flags of these segments of the whole; the last of them `ends` it or not. The rows have
    the flags of one in the middle."""
    at, count = plan.transport_at, len(segments)
    first = (int.from_bytes(packet[at + 4 : at + 8], "big") + segments.start * plan.segment) & _LOW
    numbers = shape.offsets[:count] + first
    shape.sequence[:count] = numbers & _LOW if first + count * plan.segment > _LOW else numbers
    flags = packet[at + 13]
    if not segments.start and flags & _CWR:
        shape.flags[0] |= _CWR
    if ends and flags & (_FIN | _PSH):
        shape.flags[count - 1] |= flags & (_FIN | _PSH)


def _last(packet: memoryview, plan: Plan, done: int, rest: int) -> bytes:
    """The last packet, with the `rest` of the payload, after `done` segments."""
    head = _head(packet, plan, rest)
    at = plan.transport_at
    if plan.version == 4:
        head[4:6] = ((_identification(packet) + done) & 0xFFFF).to_bytes(2, "big")
        head[10:12] = checksum(bytes(head[:at])).to_bytes(2, "big")
    if plan.is_tcp:
        first = int.from_bytes(head[at + 4 : at + 8], "big")
        head[at + 4 : at + 8] = ((first + done * plan.segment) & 0xFFFFFFFF).to_bytes(4, "big")
        if done:
            head[at + 13] &= ~_CWR & 0xFF
    out = head + packet[plan.size - rest :]
    found = -(little_sum(bytes(out[at:])) + _pseudo_sum(packet, plan, rest)) % MODULUS
    field = at + (16 if plan.is_tcp else 6)
    out[field : field + 2] = (found if found or plan.is_tcp else 0xFFFF).to_bytes(2, "little")
    return bytes(out)
