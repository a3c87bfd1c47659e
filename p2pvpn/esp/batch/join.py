"""Rows of plaintext to super-packets: what the kernel's generic receive offload would make of them.

Neighbours are joined when nothing is lost by it: the same flow and headers, no fragments, no IPv4 options or IPv6
extension headers, TCP sequence numbers without a gap and flags that mean nothing by themselves, every checksum right.
A packet whose checksum is wrong is never joined, since the super-packet's would be right: it goes on as it is, and its
receiver sees that it is damaged.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from p2pvpn.esp.inner import checksum
from p2pvpn.esp.packet import NEXT_IPV4, NEXT_IPV6, TRAILER_BYTES, trailer_of

from .rows import MODULUS, WORD, Rows, little_sum, swapped

MAX_PACKET_BYTES = 0xFFFF
MAX_FORMS = 256
"""Forms whose masks are remembered."""
_TCP, _UDP = 6, 17
_ACK, _FIN_PSH, _NOT_FIN_PSH = 0x10, 0x09, 0xF6
_ENDS_A_RUN = 0xAF
"""TCP flags that a segment may not have when another is joined to it: all but ACK and ECE."""


class Form(NamedTuple):
    """What all rows of a batch have in common: sizes in bytes, and where the transport header begins."""

    is_tcp: bool
    transport_at: int
    payload_at: int
    size: int


class Run(NamedTuple):
    """Rows that make one super-packet; a single one goes on by itself."""

    start: int
    end: int


class Joiner:
    """Finds runs in rows and writes super-packets, one after the other, behind `room` bytes for a header."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._buffer = bytearray(room + MAX_PACKET_BYTES)
        self._view = memoryview(self._buffer)
        self._array = np.frombuffer(self._buffer, np.uint8)[room:]
        self._masks: dict[Form, tuple[np.ndarray, np.ndarray]] = {}

    def form_untrusted(self, rows: Rows, count: int) -> Form | None:
        """What the first `count` rows have in common; None when they have to be looked at one by one."""
        array, first = rows.array, rows.views[0]
        size = rows.size - TRAILER_BYTES - first[-2]
        next_header = first[-1]
        if next_header not in (NEXT_IPV4, NEXT_IPV6) or size < 28 or first[-2] > 3:
            return None
        trailer = trailer_of(size, next_header)
        if len(trailer) != rows.size - size:
            return None
        if np.count_nonzero(array[:count, size:] != np.frombuffer(trailer, np.uint8)):
            return None
        if next_header == NEXT_IPV4:
            transport_at, protocol = 20, first[9]
            if first[0] != 0x45 or first[2] << 8 | first[3] != size or (first[6] & 0x3F) | first[7]:
                return None
        else:
            transport_at, protocol = 40, first[6]
            if first[0] >> 4 != 6 or first[4] << 8 | first[5] != size - 40:
                return None
        if protocol == _TCP and size >= transport_at + 20:
            payload_at = transport_at + (first[transport_at + 12] >> 4) * 4
            if payload_at < transport_at + 20:
                return None
        elif protocol == _UDP and first[transport_at + 4] << 8 | first[transport_at + 5] == size - transport_at:
            payload_at = transport_at + 8
        else:
            return None
        return Form(protocol == _TCP, transport_at, payload_at, size) if payload_at < size else None

    def runs(self, rows: Rows, count: int, form: Form) -> list[Run]:
        """The first `count` rows, in order, cut where two neighbours must not be joined. A row that is not of the form
        is a run of its own."""
        array = rows.array[:count]
        headers = rows.words[:count, : form.payload_at // 4]
        flow_mask, form_mask = self._masks_of(form)
        differences = (headers[1:] ^ headers[:-1]) & flow_mask
        wrong = self._wrong(rows, count, form)
        if np.count_nonzero(differences):
            broken = differences.any(axis=1)
            other_form = ((headers ^ headers[0]) & form_mask).any(axis=1)
            wrong = other_form if wrong is None else wrong | other_form
        else:
            broken = np.zeros(count - 1, bool)
        at = form.transport_at
        if form.transport_at == 20 and not rows.views[0][6] & 0x40:
            numbers = rows.field(4, ">u2")[:count].astype(np.int64)
            broken |= (numbers[1:] - numbers[:-1]) & 0xFFFF != 1
        if form.is_tcp:
            numbers = rows.field(at + 4, ">u4")[:count].astype(np.uint32)
            broken |= numbers[1:] - numbers[:-1] != form.size - form.payload_at  # modulo 2**32, as they are
            flags = array[:, at + 13]
            if np.count_nonzero(flags[:-1] != _ACK) or flags[-1] & _NOT_FIN_PSH != _ACK:
                broken |= (flags[:-1] & _ENDS_A_RUN != 0) | (flags[:-1] & _ACK == 0)
                broken |= (flags[1:] ^ flags[:-1]) & _NOT_FIN_PSH != 0
        if wrong is not None:
            broken |= wrong[1:] | wrong[:-1]
        ends = [*(np.flatnonzero(broken) + 1).tolist(), count] if np.count_nonzero(broken) else [count]
        return [Run(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def _masks_of(self, form: Form) -> tuple[np.ndarray, np.ndarray]:
        """Which bits of the headers must be the same in neighbours, and which in all rows of the form."""
        masks = self._masks.get(form)
        if masks is None:
            if len(self._masks) >= MAX_FORMS:
                self._masks.clear()
            flow, common = np.full(form.payload_at, 0xFF, np.uint8), np.zeros(form.payload_at, np.uint8)
            at = form.transport_at
            if at == 20:
                flow[4:6] = flow[10:12] = 0
                common[[0, 2, 3, 6, 7, 9]] = 0xFF
            else:
                common[0], common[4:7] = 0xF0, 0xFF
            if form.is_tcp:
                flow[at + 4 : at + 8] = flow[at + 13] = flow[at + 16 : at + 18] = 0
                common[at + 12] = 0xF0
            else:
                flow[at + 6 : at + 8] = 0
                common[at + 4 : at + 6] = 0xFF
            masks = self._masks[form] = flow.view(WORD), common.view(WORD)
        return masks

    def _wrong(self, rows: Rows, count: int, form: Form) -> np.ndarray | None:
        """Which rows have a wrong checksum in the IPv4 or the transport header, or none; None when no row does."""
        at, words = form.transport_at, rows.words[:count]
        wrong = None
        if at == 20:
            sums = words[:, :5].sum(axis=1, dtype=np.int64) % MODULUS
            if np.count_nonzero(sums):
                wrong = sums != 0
        trailer_sum = little_sum(bytes(form.size % 2) + rows.views[0][form.size :])
        rest = _protocol_sum(form, form.size) - trailer_sum
        # The addresses of the pseudo header stand right before the transport header in both families.
        addresses_at = 12 if at == 20 else 8
        sums = (words[:, addresses_at // 4 :].sum(axis=1, dtype=np.int64) + rest) % MODULUS
        if np.count_nonzero(sums):
            wrong = sums != 0 if wrong is None else wrong | (sums != 0)
        if not form.is_tcp:
            absent = rows.field(at + 6, "<u2")[:count] == 0
            if np.count_nonzero(absent):
                wrong = absent if wrong is None else wrong | absent
        return wrong

    def continues_untrusted(self, rows: Rows, run: Run, form: Form, packet: bytes) -> bool:
        """Whether a shorter whole packet is the next one after those of the run, so that it may be the last of its
        super-packet."""
        last = bytes(rows.views[run.end - 1][: form.payload_at])
        at, size = form.transport_at, len(packet)
        if (
            not form.payload_at < size < form.size
            or form.payload_at + (run.end - run.start) * (form.size - form.payload_at) + size - form.payload_at
            > MAX_PACKET_BYTES
        ):
            return False
        expected = bytearray(last)
        _set_sizes(expected, form, size)
        if at == 20:
            if not last[6] & 0x40 and (packet[4] << 8 | packet[5]) != ((last[4] << 8 | last[5]) + 1) & 0xFFFF:
                return False
            expected[4:6], expected[10:12] = packet[4:6], packet[10:12]
            if little_sum(packet[:20]):
                return False
        field = at + (16 if form.is_tcp else 6)
        if form.is_tcp:
            number = int.from_bytes(last[at + 4 : at + 8], "big") + form.size - form.payload_at
            expected[at + 4 : at + 8] = (number & 0xFFFFFFFF).to_bytes(4, "big")
            if last[at + 13] & _ENDS_A_RUN or not last[at + 13] & _ACK:
                return False
            expected[at + 13] |= packet[at + 13] & _FIN_PSH
        elif packet[field : field + 2] == b"\0\0":
            return False
        expected[field : field + 2] = packet[field : field + 2]
        if packet[: form.payload_at] != expected:
            return False
        return (little_sum(packet[at:]) + _pseudo_sum(packet, form, size)) % MODULUS == 0

    def join(self, rows: Rows, run: Run, form: Form, head: bytes, tail: bytes = b"") -> memoryview:
        """The super-packet of a run, with `head` for its headers (its first row's but for the ECN field), and the
        payload of `tail` behind it. `room` bytes come first. Valid until the next call."""
        at, payload_at, count = form.transport_at, form.payload_at, run.end - run.start
        segment = form.size - payload_at
        end = payload_at + count * segment
        self._array[payload_at:end].reshape(count, segment)[:] = rows.array[run.start : run.end, payload_at : form.size]
        room = self._room
        if tail:
            rest = len(tail) - payload_at
            self._view[room + end : room + end + rest] = memoryview(tail)[payload_at:]
            end += rest
        whole = bytearray(head)
        _set_sizes(whole, form, end)
        if at == 20:
            whole[10:12] = b"\0\0"
            whole[10:12] = checksum(bytes(whole[:20])).to_bytes(2, "big")
        if form.is_tcp:
            last = tail or rows.views[run.end - 1]
            whole[at + 13] |= last[at + 13] & _FIN_PSH
        field = at + (16 if form.is_tcp else 6)
        pseudo = _pseudo_sum(whole, form, end)
        whole[field : field + 2] = pseudo.to_bytes(2, "little")
        self._view[room : room + payload_at] = whole
        return self._view[: room + end]


def _set_sizes(head: bytearray, form: Form, size: int) -> None:
    """The length fields of a packet of `size` bytes."""
    at = form.transport_at
    if at == 20:
        head[2:4] = size.to_bytes(2, "big")
    else:
        head[4:6] = (size - 40).to_bytes(2, "big")
    if not form.is_tcp:
        head[at + 4 : at + 6] = (size - at).to_bytes(2, "big")


def _pseudo_sum(head: bytes | bytearray, form: Form, size: int) -> int:
    """The sum of the pseudo header (RFC 9293 section 3.1, RFC 8200 section 8.1) of a packet of `size` bytes."""
    addresses = bytes(head[12:20] if form.transport_at == 20 else head[8:40])
    return (little_sum(addresses) + _protocol_sum(form, size)) % MODULUS


def _protocol_sum(form: Form, size: int) -> int:
    """The pseudo header without the addresses."""
    return swapped(_TCP if form.is_tcp else _UDP) + swapped(size - form.transport_at)
