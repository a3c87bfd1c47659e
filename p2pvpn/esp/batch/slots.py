"""Packets as the TUN device gave them, each in a slot of its own, to rows: those of one size and pair of addresses.

    slot:  6 bytes free | virtio header, 10 bytes | packet | room for the ESP padding ..   2048 bytes

The kernel leaves transport checksums to a device with checksum offload: the virtio header says from where to sum, and
where the sum goes; the field holds that of the pseudo header. All packets of a batch have the same virtio header.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from p2pvpn.esp.packet import NEXT_IPV4, NEXT_IPV6, trailer_of

from .rows import MODULUS, WORD, little_sum

SLOT_BYTES = 2048
SLOTS = 64
PACKET_AT = 16
"""Aligned, so that words can be summed."""
HEADER_AT = 6
MAX_SIZES = 48
"""Sizes whose memoryviews are remembered."""
_HEAD = slice(HEADER_AT, PACKET_AT + 2)
"""Virtio header, version and traffic class."""
_PAIR_IPV4 = slice(PACKET_AT + 12, PACKET_AT + 20)
_PAIR_IPV6 = slice(PACKET_AT + 8, PACKET_AT + 40)


class Slots:
    """A buffer with the slots, and what can be done with many of them at once."""

    def __init__(self) -> None:
        self.buffer = bytearray(SLOTS * SLOT_BYTES)
        self._array = np.frombuffer(self.buffer, np.uint8).reshape(SLOTS, SLOT_BYTES)
        self._words = self._array.view(WORD)
        self._views: dict[int, list[memoryview]] = {}

    def groups(self, sizes: list[int]) -> Iterator[tuple[int, int]]:
        """First and one past the last of neighbours that are alike: size, virtio header, version, traffic class and
        addresses. `sizes` are those of the packets in the first slots."""
        count = len(sizes)
        if count > 1:
            array = self._array[:count]
            lengths = np.array(sizes)
            differs = lengths[1:] != lengths[:-1]
            differs |= (array[1:, _HEAD] != array[:-1, _HEAD]).any(axis=1)
            pair = _PAIR_IPV4 if self.buffer[PACKET_AT] >> 4 == 4 else _PAIR_IPV6
            differs |= (array[1:, pair] != array[:-1, pair]).any(axis=1)
            if pair is _PAIR_IPV4 and (array[:, PACKET_AT] >> 4 != 4).any():
                differs |= (array[1:, _PAIR_IPV6] != array[:-1, _PAIR_IPV6]).any(axis=1)
            start = 0
            for end in (np.flatnonzero(differs) + 1).tolist():
                yield start, end
                start = end
            yield start, count
        elif count:
            yield 0, 1

    def rows(self, start: int, end: int, size: int, checksum: tuple[int, int] | None) -> list[memoryview]:
        """The packets of `size` bytes in these slots as rows: padded, and with their checksums from byte
        `checksum[0]`, a multiple of four, put at that place plus `checksum[1]`."""
        version = self.buffer[start * SLOT_BYTES + PACKET_AT] >> 4
        trailer = trailer_of(size, NEXT_IPV4 if version == 4 else NEXT_IPV6)
        end_at = PACKET_AT + size + len(trailer)
        padding = np.frombuffer(trailer, np.uint8)
        self._array[start:end, end_at - len(trailer) : end_at] = padding
        if checksum is not None:
            first, offset = checksum
            trailer_sum = little_sum(bytes(size % 2) + trailer)
            sums = self._words[start:end, (PACKET_AT + first) // 4 : end_at // 4].sum(axis=1, dtype=np.int64)
            found = (trailer_sum - sums) % MODULUS
            if offset == 6:
                found[found == 0] = 0xFFFF  # UDP: zero would say that there is none (RFC 768)
            field = start * SLOT_BYTES + PACKET_AT + first + offset
            np.ndarray((end - start,), "<u2", self.buffer, field, (SLOT_BYTES,))[:] = found
        views = self._views.get(end_at)
        if views is None:
            if len(self._views) >= MAX_SIZES:
                self._views.clear()
            view = memoryview(self.buffer)
            views = self._views[end_at] = [
                view[at + PACKET_AT : at + end_at] for at in range(0, SLOTS * SLOT_BYTES, SLOT_BYTES)
            ]
        return views[start:end]
