"""RPC messages: one MessagePack array in one UDP datagram.

    request   [1, 0, id, attempt, method, args]
    result    [1, 1, id, attempt, held, result]
    refusal   [1, 2, id, attempt, code, text]

`attempt` counts the transmissions of a request from 0; the answer names the one that it answers and for how long it
was `held` (milliseconds), so that a round-trip time can be taken from each of them, as RFC 7323's timestamps allow.
"""

from __future__ import annotations

from dataclasses import dataclass

from p2pvpn.core.errors import WireError

from .packing import list_untrusted, pack, shape_untrusted, unpack_untrusted

VERSION = 1
MAX_MESSAGE_BYTES = 8192
"""Nothing larger is sent or parsed."""
GOOD_MESSAGE_BYTES = 1200
"""What fits every tunnel in one packet (IPv6's 1,280 less headers): larger ones are fragmented, so keep below."""
MIN_ID_BYTES = 8
MAX_ID_BYTES = 16
MAX_ATTEMPT = 255
MAX_METHOD_BYTES = 32
MAX_REASON_BYTES = 200
MAX_ARGUMENTS = 64

_REQUEST = 0
_RESULT = 1
_REFUSAL = 2


@dataclass(frozen=True, slots=True)
class Request:
    """Please run `method`."""

    id: bytes
    attempt: int
    method: str
    args: list[object]


@dataclass(frozen=True, slots=True)
class Result:
    """What it returned, `held_ms` after the request came."""

    id: bytes
    attempt: int
    held_ms: int
    value: object


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why it did not run, or not to its end."""

    id: bytes
    attempt: int
    code: int
    text: str


Message = Request | Result | Refusal


def build(message: Message) -> bytes:
    """Wire bytes, whatever their number."""
    if isinstance(message, Request):
        tail: list[object] = [message.id, message.attempt, message.method, list(message.args)]
        return pack([VERSION, _REQUEST, *tail])
    if isinstance(message, Result):
        return pack([VERSION, _RESULT, message.id, message.attempt, message.held_ms, message.value])
    return pack([VERSION, _REFUSAL, message.id, message.attempt, message.code, message.text[:MAX_REASON_BYTES]])


def parse_untrusted(data: bytes) -> Message:
    """Raises WireError for everything that is not one of the three. Arguments and results are any nested value."""
    fields = unpack_untrusted(data, MAX_MESSAGE_BYTES)
    if type(fields) is not list or len(fields) != 6:
        raise WireError("a message has six fields")
    version, kind, message_id, attempt = shape_untrusted(fields[:4], int, int, bytes, int)
    if version != VERSION:
        raise WireError(f"message version {version}")
    if not MIN_ID_BYTES <= len(message_id) <= MAX_ID_BYTES or not 0 <= attempt <= MAX_ATTEMPT:
        raise WireError("message ID or attempt out of range")
    if kind == _REQUEST:
        method, args = shape_untrusted(fields[4:], str, list)
        if len(method) > MAX_METHOD_BYTES or len(args) > MAX_ARGUMENTS:
            raise WireError("a method name too long or too many arguments")
        return Request(message_id, attempt, method, args)
    if kind == _RESULT:
        (held_ms,) = list_untrusted(fields[4:5], int, 1)
        if held_ms < 0:
            raise WireError("an answer held for less than no time")
        return Result(message_id, attempt, held_ms, fields[5])
    if kind == _REFUSAL:
        code, text = shape_untrusted(fields[4:], int, str)
        if not 0 <= code <= 0xFFFF:
            raise WireError("a refusal code out of range")
        return Refusal(message_id, attempt, code, text)
    raise WireError(f"message kind {kind}")
