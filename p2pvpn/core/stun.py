"""STUN messages (RFC 8489) on the codec of aioice, with the bounds and the errors that hostile input needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from aioice import stun as codec

from .address import Endpoint
from .datagram import STUN_COOKIE, STUN_HEADER_BYTES
from .errors import TrustError, WireError

Message = codec.Message
Class = codec.Class
Method = codec.Method

MAX_MESSAGE_BYTES = 1500
"""Checks, binding requests and answers of ours fit into one Ethernet frame."""
TRANSACTION_ID_BYTES = 12
USERNAME = 0x0006
MESSAGE_INTEGRITY = 0x0008
FINGERPRINT = 0x8028
COMPREHENSION_OPTIONAL = 0x8000
"""Attribute types from here on may be ignored by who does not know them (RFC 8489 section 14)."""


def request(transaction_id: bytes, **attributes: Any) -> Message:
    """A Binding request; attribute names are the RFC's in lower case with `_` for `-`."""
    return _message(Class.REQUEST, transaction_id, attributes)


def indication(transaction_id: bytes, **attributes: Any) -> Message:
    """A Binding indication (RFC 8445 section 11 keepalives)."""
    return _message(Class.INDICATION, transaction_id, attributes)


def success(transaction_id: bytes, mapped: Endpoint, **attributes: Any) -> Message:
    """A success response that tells the sender where its packet came from."""
    return _message(Class.RESPONSE, transaction_id, {"xor_mapped_address": tuple(mapped), **attributes})


def error(transaction_id: bytes, code: int, reason: str, **attributes: Any) -> Message:
    """An error response (RFC 8489 section 14.8)."""
    return _message(Class.ERROR, transaction_id, {"error_code": (code, reason), **attributes})


def _message(kind: Class, transaction_id: bytes, attributes: dict[str, Any]) -> Message:
    if len(transaction_id) != TRANSACTION_ID_BYTES:
        raise ValueError("a transaction ID has 12 bytes")
    named = {name.upper().replace("_", "-"): value for name, value in attributes.items()}
    return Message(Method.BINDING, kind, transaction_id, named)


def build(message: Message, key: bytes | None = None) -> bytes:
    """Wire bytes; with `key`, MESSAGE-INTEGRITY and FINGERPRINT are added (short-term credential)."""
    if key is not None:
        message.add_message_integrity(key)
    else:
        message.add_fingerprint()
    return bytes(message)


def parse_untrusted(data: bytes) -> Message:
    """A Binding message. Raises WireError for everything else, integrity is not looked at.

    The codec reads leniently (it checks neither the cookie nor that attributes end where the message ends, and of a
    repeated attribute it keeps the last), so the layout is checked here first. A message with an attribute that has
    to be understood and is not, is refused too: there is no server here that would have to say which (RFC 8489
    section 6.3.1).
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(f"a STUN message of {len(data)} bytes")
    seen: set[int] = set()
    for kind, _ in _attributes_untrusted(data):
        if FINGERPRINT in seen:
            raise WireError("an attribute after FINGERPRINT")
        if MESSAGE_INTEGRITY not in seen or kind == FINGERPRINT:
            if kind in codec.ATTRIBUTES_BY_TYPE:
                if kind in seen:
                    raise WireError(f"attribute {kind:#06x} twice")
            elif kind < COMPREHENSION_OPTIONAL:
                raise WireError(f"attribute {kind:#06x} has to be understood and is not")
        seen.add(kind)
    try:
        message = codec.parse_message(data)
    except Exception as problem:  # noqa: BLE001 (the codec's own set of errors is open)
        raise WireError(f"not a STUN message: {problem}") from None
    if message.message_method is not Method.BINDING:
        raise WireError("not a Binding message")
    return message


def username_untrusted(data: bytes) -> bytes | None:
    """The value of USERNAME, without looking at anything else. Raises WireError when attributes do not fit."""
    for kind, value in _attributes_untrusted(data):
        if kind == USERNAME:
            return value
    return None


def _attributes_untrusted(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and value of each attribute (RFC 8489 sections 5 and 14); each step consumes at least 4 bytes."""
    end = len(data)
    if end < STUN_HEADER_BYTES or data[0] >> 6 or data[4:8] != STUN_COOKIE:
        raise WireError("not a STUN message")
    length = int.from_bytes(data[2:4], "big")
    if length % 4 or length != end - STUN_HEADER_BYTES:
        raise WireError(f"a STUN length of {length} in {end} bytes")
    at = STUN_HEADER_BYTES
    while at < end:
        head = int.from_bytes(data[at : at + 4], "big")
        kind, size = head >> 16, head & 0xFFFF
        value = data[at + 4 : at + 4 + size]
        at += 4 + size + -size % 4
        if at > end:
            raise WireError(f"attribute {kind:#06x} ends behind the message")
        yield kind, value


def verify(message: Message, key: bytes) -> None:
    """Raises TrustError unless MESSAGE-INTEGRITY is there and holds under `key`."""
    if not message.check_message_integrity(key):
        raise TrustError("STUN message integrity does not hold")


def mapped_address(message: Message) -> Endpoint:
    """XOR-MAPPED-ADDRESS of a success response. Raises WireError when it is missing."""
    value = message.attributes.get("XOR-MAPPED-ADDRESS")
    if value is None:
        raise WireError("no XOR-MAPPED-ADDRESS")
    return Endpoint.of(*value)
