"""A cursor over bytes from the network: every read is bounds-checked and raises WireError."""

from __future__ import annotations

from .errors import WireError


class Reader:
    """Reads big-endian fields from the front of a buffer. Copies what it returns."""

    __slots__ = ("_data", "_end", "_pos")

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._data = memoryview(data)
        self._pos = 0
        self._end = len(self._data)

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return self._end - self._pos

    @property
    def position(self) -> int:
        """Bytes read so far."""
        return self._pos

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if count < 0 or count > self._end - self._pos:
            raise WireError(f"wanted {count} bytes at offset {self._pos}, {self.left} left")
        start = self._pos
        self._pos = start + count
        return bytes(self._data[start : self._pos])

    def uint(self, width: int) -> int:
        """A big-endian unsigned integer of `width` bytes."""
        start = self._pos
        end = start + width
        if width < 0 or end > self._end:
            raise WireError(f"wanted {width} bytes at offset {start}, {self.left} left")
        self._pos = end
        return int.from_bytes(self._data[start:end], "big")

    def u8(self) -> int:
        at = self._pos
        if at >= self._end:
            raise WireError(f"wanted 1 byte at offset {at}, none left")
        self._pos = at + 1
        return self._data[at]

    def u16(self) -> int:
        return self.uint(2)

    def u32(self) -> int:
        return self.uint(4)

    def u64(self) -> int:
        return self.uint(8)

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(self.left)

    def sub(self, count: int) -> Reader:
        """A reader over the next `count` bytes."""
        return Reader(self.take(count))

    def end(self) -> None:
        """Fails unless everything was read."""
        if self.left:
            raise WireError(f"{self.left} bytes after the end")
