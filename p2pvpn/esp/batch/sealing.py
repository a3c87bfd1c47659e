"""Rows of plaintext to datagrams that lie one behind the other, as UDP_SEGMENT sends them.

The output buffer is shared by all sizes; per size there is a layout: strided views of the header fields of all rows,
and a memoryview for each row, which would cost as much to make as a tenth of sealing it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from p2pvpn.esp.packet import HEADER_BYTES, ICV_BYTES, IV_BYTES, Sealer
from p2pvpn.esp.sa import OutboundSa

MAX_ROWS = 64
"""Datagrams of one UDP_SEGMENT call that every kernel takes."""
MAX_BATCH_BYTES = 65000
"""Bytes of one call; with headers they must fit an IPv4 packet."""
ROW_OVERHEAD_BYTES = HEADER_BYTES + IV_BYTES + ICV_BYTES
"""What a datagram has besides its row of plaintext."""
MAX_LAYOUTS = 48
"""Sizes that are remembered; each costs some 40 KB."""
_BUFFER_BYTES = 1 << 16
_LOW = 0xFFFFFFFF


class _Layout:
    """Views of the output for datagrams of one size."""

    __slots__ = ("aads", "head", "iv", "outs")

    def __init__(self, buffer: bytearray, size: int) -> None:
        count = rows_for(size - ROW_OVERHEAD_BYTES)
        view = memoryview(buffer)
        self.head = np.ndarray((count,), ">u8", buffer, 0, (size,))
        self.iv = np.ndarray((count,), ">u8", buffer, HEADER_BYTES, (size,))
        self.aads = [view[at : at + HEADER_BYTES] for at in range(0, count * size, size)]
        self.outs = [view[at + HEADER_BYTES + IV_BYTES : at + size] for at in range(0, count * size, size)]


def rows_for(size: int) -> int:
    """How many rows of `size` bytes one call seals."""
    return min(MAX_ROWS, MAX_BATCH_BYTES // (size + ROW_OVERHEAD_BYTES))


class Sealing:
    """The output of one batch after the other."""

    def __init__(self) -> None:
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._layouts: dict[int, _Layout] = {}
        self._steps = np.arange(MAX_ROWS, dtype=np.uint64)
        nonces = np.zeros((MAX_ROWS, 12), np.uint8)
        self._salts = nonces[:, :4]
        self._nonce_iv = np.ndarray((MAX_ROWS,), ">u8", nonces, 4, (12,))
        self._nonces = [row.data for row in nonces]
        extended = np.zeros((MAX_ROWS, 12), np.uint8)
        self._extended_spi = np.ndarray((MAX_ROWS,), ">u4", extended, 0, (12,))
        self._extended_number = np.ndarray((MAX_ROWS,), ">u8", extended, 4, (12,))
        self._extended_aads = [row.data for row in extended]
        self._sa: OutboundSa | None = None

    def seal(self, sa: OutboundSa, first: int, rows: Sequence[memoryview], tail: bytes = b"") -> memoryview:
        """The datagrams of `rows`, which have sequence numbers of the SA from `first` on, and behind them `tail`, a
        datagram that is sealed already. Valid until the next call."""
        sealer = sa.sealer
        if not isinstance(sealer, Sealer):
            raise TypeError("only combined ciphers seal batches")
        count = len(rows)
        if sa is not self._sa:
            self._salts[:] = np.frombuffer(sealer.salt, np.uint8)
            self._extended_spi[:] = sealer.spi
            self._sa = sa
        size = len(rows[0]) + ROW_OVERHEAD_BYTES
        layout = self._layouts.get(size)
        if layout is None:
            if len(self._layouts) >= MAX_LAYOUTS:
                self._layouts.clear()
            layout = self._layouts[size] = _Layout(self._buffer, size)
        numbers = self._steps[:count] + first
        layout.head[:count] = (numbers & _LOW if first + count > _LOW else numbers) + (sealer.spi << 32)
        layout.iv[:count] = numbers
        self._nonce_iv[:count] = numbers
        if sealer.esn:
            self._extended_number[:count] = numbers
            aads = self._extended_aads
        else:
            aads = layout.aads
        deque(map(sealer.encrypt_into, self._nonces[:count], rows, aads, layout.outs), 0)
        end = count * size
        if tail:
            self._view[end : end + len(tail)] = tail
        return self._view[: end + len(tail)]
