"""Deterministic msgpack: one value has one encoding, so what is signed can be hashed, compared and stored.

Values are arrays, byte strings, text, non-negative integers up to 2**63-1, booleans and nil: no maps, floats or
extensions. A decoder accepts bytes only if encoding what it read gives the same bytes again, which refuses every
longer form. Fields are read in order by a cursor that checks type and size; what follows the known fields is kept,
so that an older program carries a newer one's fields unharmed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import msgpack

from p2pvpn.core.errors import WireError

Value = bytes | str | int | bool | tuple["Value", ...] | None

MAX_DEPTH = 8
"""Arrays within arrays; the deepest of ours has five levels."""
MAX_UINT = 2**63 - 1
MAX_ITEMS = 16384
"""Entries of one array: bounds the work before the field's own limit is known."""


def pack(value: Value) -> bytes:
    """The one encoding of a value."""
    return cast(bytes, msgpack.packb(value, use_bin_type=True))


def unpack_untrusted(data: bytes, limit: int) -> Value:
    """The value that `pack` would turn into exactly these bytes, at most `limit` of them. Raises WireError."""
    if len(data) > limit:
        raise WireError(f"{len(data)} bytes where {limit} are allowed")
    try:
        value: Any = msgpack.unpackb(
            data, use_list=False, raw=False, max_map_len=0, max_ext_len=0, max_array_len=MAX_ITEMS
        )
        _check(value, 0)
        same = pack(value) == data
    except WireError:
        raise
    except Exception as problem:  # noqa: BLE001 (the codec's set of errors is open)
        raise WireError(f"not msgpack: {type(problem).__name__}") from None
    if not same:
        raise WireError("not the deterministic encoding")
    return cast(Value, value)


def _check(value: Any, depth: int) -> None:
    if isinstance(value, tuple):
        if depth >= MAX_DEPTH:
            raise WireError("arrays nested too deeply")
        for item in value:
            _check(item, depth + 1)
    elif isinstance(value, int):
        if not 0 <= value <= MAX_UINT:
            raise WireError("an integer out of range")
    elif value is not None and not isinstance(value, bytes | str):
        raise WireError(f"a {type(value).__name__} has no place here")


class Fields:
    """Reads the entries of one array in order; every read names its bound and raises WireError."""

    __slots__ = ("_pos", "_values", "_what")

    def __init__(self, values: Value, what: str) -> None:
        if not isinstance(values, tuple):
            raise WireError(f"{what} is not an array")
        self._values = values
        self._what = what
        self._pos = 0

    @classmethod
    def unpack_untrusted(cls, data: bytes, what: str, limit: int) -> Fields:
        """The fields of an encoded array of at most `limit` bytes."""
        return cls(unpack_untrusted(data, limit), what)

    def _next(self) -> Value:
        if self._pos >= len(self._values):
            raise WireError(f"{self._what} ends early")
        self._pos += 1
        return self._values[self._pos - 1]

    def kind(self, expected: str) -> None:
        """The text that opens every statement of ours, so that no signature can serve for another kind."""
        if self._next() != expected:
            raise WireError(f"{self._what} is not of kind {expected}")

    def raw(self, limit: int, *, at_least: int = 0) -> bytes:
        value = self._next()
        if not isinstance(value, bytes) or not at_least <= len(value) <= limit:
            raise WireError(f"{self._what} has a bad byte string")
        return value

    def exactly(self, size: int) -> bytes:
        return self.raw(size, at_least=size)

    def optional(self, limit: int) -> bytes | None:
        """A byte string or nil."""
        if self._pos < len(self._values) and self._values[self._pos] is None:
            self._pos += 1
            return None
        return self.raw(limit)

    def text(self, limit: int) -> str:
        """Text of at most `limit` characters."""
        value = self._next()
        if not isinstance(value, str) or len(value) > limit:
            raise WireError(f"{self._what} has a bad text")
        return value

    def uint(self, limit: int = MAX_UINT) -> int:
        value = self._next()
        if not isinstance(value, int) or isinstance(value, bool) or value > limit:
            raise WireError(f"{self._what} has a bad integer")
        return value

    def flag(self) -> bool:
        value = self._next()
        if not isinstance(value, bool):
            raise WireError(f"{self._what} has a bad flag")
        return value

    def array(self, limit: int) -> Fields:
        """A nested array of at most `limit` entries."""
        value = self._next()
        if not isinstance(value, tuple) or len(value) > limit:
            raise WireError(f"{self._what} has a bad array")
        return Fields(value, self._what)

    def arrays(self, limit: int) -> Iterator[Fields]:
        """The entries of a nested array of arrays."""
        inner = self.array(limit)
        while inner.left:
            yield inner.array(MAX_ITEMS)

    def raws(self, count: int, limit: int, *, at_least: int = 0) -> tuple[bytes, ...]:
        """A nested array of byte strings."""
        inner = self.array(count)
        return tuple(inner.raw(limit, at_least=at_least) for _ in range(inner.left))

    def texts(self, count: int, limit: int) -> tuple[str, ...]:
        """A nested array of texts."""
        inner = self.array(count)
        return tuple(inner.text(limit) for _ in range(inner.left))

    @property
    def left(self) -> int:
        """Entries not read yet."""
        return len(self._values) - self._pos

    def rest(self) -> tuple[Value, ...]:
        """All entries not read yet."""
        values = self._values[self._pos :]
        self._pos = len(self._values)
        return values

    def end(self) -> None:
        """Fails unless everything was read."""
        if self.left:
            raise WireError(f"{self._what} has fields after its end")
