"""MessagePack as this package uses it: arrays, byte strings, text and integers, bounded, without maps or extensions."""

from __future__ import annotations

from typing import Any

import msgpack

from p2pvpn.core.errors import WireError

MAX_ARRAY_ITEMS = 256
MAX_TEXT_BYTES = 1024


def pack(value: object) -> bytes:
    """The encoding of nested lists of bytes, text, integers, booleans and None; each integer in its shortest form."""
    packed: bytes = msgpack.packb(value)
    return packed


def unpack_untrusted(data: bytes, max_bytes: int) -> object:
    """One value of at most `max_bytes`, arrays as lists. Raises WireError."""
    if len(data) > max_bytes:
        raise WireError(f"{len(data)} bytes where {max_bytes} are the most")
    try:
        value: object = msgpack.unpackb(
            data,
            max_array_len=MAX_ARRAY_ITEMS,
            max_map_len=0,
            max_ext_len=0,
            max_str_len=MAX_TEXT_BYTES,
            max_bin_len=max_bytes,
        )
    except Exception as problem:  # noqa: BLE001 (the codec's own set of errors is open)
        raise WireError(f"not MessagePack of ours: {type(problem).__name__}") from None
    return value


def shape_untrusted(value: object, *types: type) -> list[Any]:
    """The items of a list of exactly these types (a boolean is no integer). Raises WireError."""
    if type(value) is not list or len(value) != len(types):
        raise WireError(f"wanted a list of {len(types)} items")
    if any(type(item) is not wanted for item, wanted in zip(value, types, strict=True)):
        raise WireError("an item of a wrong type")
    return value


def list_untrusted(value: object, wanted: type, most: int) -> list[Any]:
    """A list of at most `most` items of one type. Raises WireError."""
    if type(value) is not list or len(value) > most or any(type(item) is not wanted for item in value):
        raise WireError(f"wanted a list of at most {most} items of one type")
    return value
