"""Datagrams that lie one behind the other, as UDP_GRO receives them, to rows of plaintext.

A batch is opened here when all its datagrams are of one SA and their sequence numbers are consecutive and above
everything that came before: then one comparison is the check against replay. Everything else is for
`EspEngine.inbound`, datagram by datagram, and so is a batch of which a single integrity check value does not hold;
nothing of it was accepted then.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from p2pvpn.crypto.aead import BadIcv
from p2pvpn.esp.packet import HEADER_BYTES, ICV_BYTES, IV_BYTES, SHORTEST_BYTES, Opener
from p2pvpn.esp.sa import InboundSa

from .rows import Rows

MAX_ROWS = 128
"""Datagrams of one batch: what newer kernels send at once; they receive 64."""
MAX_LAYOUTS = 48
"""Sizes that are remembered; each costs some 60 KB."""
BUFFER_BYTES = 1 << 16
_LOW = 0xFFFFFFFF


class _Layout:
    """Views of the buffer for datagrams of one size."""

    __slots__ = ("aads", "head", "iv", "rows", "sealed")

    def __init__(self, buffer: bytearray, plain: bytearray, size: int) -> None:
        count = min(MAX_ROWS, BUFFER_BYTES // size)
        view = memoryview(buffer)
        starts = range(0, count * size, size)
        self.head = np.ndarray((count,), ">u8", buffer, 0, (size,))
        self.iv = np.ndarray((count, IV_BYTES), np.uint8, buffer, HEADER_BYTES, (size, 1))
        self.aads = [view[at : at + HEADER_BYTES] for at in starts]
        self.sealed = [view[at + HEADER_BYTES + IV_BYTES : at + size] for at in starts]
        self.rows = Rows(plain, size - HEADER_BYTES - IV_BYTES - ICV_BYTES, count)


class Opening:
    """`buffer` is where datagrams are received; the rows of one batch are valid until the next is opened."""

    def __init__(self) -> None:
        self.buffer = bytearray(BUFFER_BYTES)
        self._plain = bytearray(BUFFER_BYTES)
        self._layouts: dict[int, _Layout] = {}
        self._steps = np.arange(MAX_ROWS, dtype=np.uint64)
        nonces = np.zeros((MAX_ROWS, 12), np.uint8)
        self._salts, self._nonce_ivs = nonces[:, :4], nonces[:, 4:]
        self._nonces = [row.data for row in nonces]
        extended = np.zeros((MAX_ROWS, 12), np.uint8)
        self._extended_spi = np.ndarray((MAX_ROWS,), ">u4", extended, 0, (12,))
        self._extended_number = np.ndarray((MAX_ROWS,), ">u8", extended, 4, (12,))
        self._extended_aads = [row.data for row in extended]
        self._sa: InboundSa | None = None

    def open_untrusted(self, sa: InboundSa, size: int, count: int, now: float) -> Rows | None:
        """The plaintexts of `count` datagrams of `size` bytes at the start of the buffer, of which the first has the
        SA's SPI; they count as received then. None, and nothing happened, when they must be looked at one by one."""
        if not 1 <= count <= MAX_ROWS or count * size > BUFFER_BYTES or size < SHORTEST_BYTES or size & 3:
            return None
        layout = self._layouts.get(size)
        if layout is None:
            if len(self._layouts) >= MAX_LAYOUTS:
                self._layouts.clear()
            layout = self._layouts[size] = _Layout(self.buffer, self._plain, size)
        heads, steps = layout.head[:count], self._steps[:count]
        head = int(heads[0])
        low = head & _LOW
        if low + count - 1 > _LOW or np.count_nonzero(heads - steps != head):
            return None
        window, opener = sa.window, sa.opener
        if not isinstance(opener, Opener):
            return None
        first = window.whole(low)
        if first <= window.top:
            return None
        if sa is not self._sa:
            self._salts[:] = np.frombuffer(opener.salt, np.uint8)
            self._extended_spi[:] = head >> 32
            self._sa = sa
        self._nonce_ivs[:count] = layout.iv[:count]
        aads = layout.aads
        if sa.esn:
            self._extended_number[:count] = steps + first
            aads = self._extended_aads
        rows = layout.rows
        try:
            deque(map(opener.decrypt_into, self._nonces[:count], layout.sealed, aads, rows.views), 0)
        except BadIcv:
            return None
        window.accept_run(first, count)
        sa.packets += count
        sa.last_at = now
        return rows
