"""Wire layouts declared once: a list of fields that both parses and builds.

A layout reads its fields from front to back into a dict of values, which become the arguments of a payload class, and
writes the attributes of such an object back in the same order. Reserved bytes are sent as zero and ignored on receipt
(RFC 7296 section 2.5).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from p2pvpn.core.errors import WireError
from p2pvpn.core.wire import Reader

Values = dict[str, Any]


class Field(Protocol):
    """One field: `read` puts what it finds into `values`, `write` gives the bytes for them."""

    def read(self, reader: Reader, values: Values) -> None: ...

    def write(self, values: Mapping[str, Any]) -> bytes: ...


class Uint:
    """A big-endian unsigned integer."""

    __slots__ = ("name", "width")

    def __init__(self, name: str, width: int) -> None:
        self.name = name
        self.width = width

    def read(self, reader: Reader, values: Values) -> None:
        values[self.name] = reader.uint(self.width)

    def write(self, values: Mapping[str, Any]) -> bytes:
        number: int = values[self.name]
        return number.to_bytes(self.width, "big")


class Zeros:
    """Reserved bytes."""

    __slots__ = ("count",)

    def __init__(self, count: int) -> None:
        self.count = count

    def read(self, reader: Reader, values: Values) -> None:
        reader.take(self.count)

    def write(self, values: Mapping[str, Any]) -> bytes:
        return bytes(self.count)


class SizeOf:
    """The length of a byte field that follows later, in one byte."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def read(self, reader: Reader, values: Values) -> None:
        values[self.name] = reader.u8()

    def write(self, values: Mapping[str, Any]) -> bytes:
        return bytes([len(values[self.name])])


class Sized:
    """Bytes whose length a `SizeOf` of the same name gave."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def read(self, reader: Reader, values: Values) -> None:
        values[self.name] = reader.take(values[self.name])

    def write(self, values: Mapping[str, Any]) -> bytes:
        data: bytes = values[self.name]
        return data


class Rest:
    """All bytes that are left, within bounds."""

    __slots__ = ("maximum", "minimum", "name")

    def __init__(self, name: str, minimum: int = 0, maximum: int = 65535) -> None:
        self.name = name
        self.minimum = minimum
        self.maximum = maximum

    def read(self, reader: Reader, values: Values) -> None:
        if not self.minimum <= reader.left <= self.maximum:
            raise WireError(f"{self.name} has {reader.left} bytes, not {self.minimum} to {self.maximum}")
        values[self.name] = reader.rest()

    def write(self, values: Mapping[str, Any]) -> bytes:
        data: bytes = values[self.name]
        return data


class Layout:
    """Fields in the order of the wire."""

    __slots__ = ("fields",)

    def __init__(self, *fields: Field) -> None:
        self.fields = fields

    def parse_untrusted(self, data: bytes) -> Values:
        """The values of all fields. Raises WireError, also when bytes are left over."""
        reader = Reader(data)
        values: Values = {}
        for field in self.fields:
            field.read(reader, values)
        reader.end()
        return values

    def build(self, values: Mapping[str, Any]) -> bytes:
        return b"".join(field.write(values) for field in self.fields)
