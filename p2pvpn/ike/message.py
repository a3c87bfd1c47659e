"""The IKE header, the chain of payloads, and whole messages (RFC 7296 sections 3.1 and 3.2).

    header:          | SPIi 8 | SPIr 8 | next u8 | version u8 | exchange u8 | flags u8 | message id u32 | length u32 |
    generic header:  | next u8 | critical 1 bit, zero 7 bits | length u16, of header and body |

Messages of IKE_SA_INIT are chains in the clear. All others consist of the header and one Encrypted (or Encrypted
Fragment) payload; `protect` opens those, and what is inside is such a chain again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from p2pvpn.core.errors import WireError
from p2pvpn.core.wire import Reader

from .codes import PayloadType
from .notifies import Notify
from .payloads import Notification, Payload, build_payload, parse_payload_untrusted

SPI_BYTES = 8
NO_SPI = bytes(SPI_BYTES)
HEADER_BYTES = 28
GENERIC_BYTES = 4
MAJOR_VERSION = 2
FLAG_INITIATOR = 0x08
FLAG_RESPONSE = 0x20
CRITICAL = 0x80
MAX_PAYLOADS = 64
"""An IKE_AUTH with a certificate chain has about 20."""
MAX_MESSAGE_BYTES = 65535

P = TypeVar("P")


class VersionError(WireError):
    """A higher major version than ours: answered with INVALID_MAJOR_VERSION (RFC 7296 section 2.5)."""


class CriticalPayloadError(WireError):
    """A payload that we do not know and must not pass over (RFC 7296 section 2.5)."""

    def __init__(self, kind: int) -> None:
        super().__init__(f"critical payload of the unknown type {kind}")
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Header:
    """`initiator` says who began the IKE SA, not this exchange; `response` is the direction of this message."""

    spi_i: bytes
    spi_r: bytes
    exchange: int
    initiator: bool
    response: bool
    message_id: int

    def build(self, next_payload: int, length: int) -> bytes:
        """28 bytes; `length` is that of the whole message."""
        flags = (FLAG_INITIATOR if self.initiator else 0) | (FLAG_RESPONSE if self.response else 0)
        return (
            self.spi_i
            + self.spi_r
            + bytes([next_payload, MAJOR_VERSION << 4, self.exchange, flags])
            + self.message_id.to_bytes(4, "big")
            + length.to_bytes(4, "big")
        )


@dataclass(frozen=True, slots=True)
class Message:
    """A header and the payloads in order.

    `inner` is the plaintext chain of a protected message, else empty, and `inner_first` the type of its first payload.
    """

    header: Header
    payloads: tuple[Payload, ...]
    inner: bytes = b""
    inner_first: int = PayloadType.NONE

    def first(self, cls: type[P]) -> P | None:
        """The first payload of a class, or None."""
        return next((payload for payload in self.payloads if isinstance(payload, cls)), None)

    def one(self, cls: type[P]) -> P:
        """The payload of a class. Raises WireError when there is none."""
        payload = self.first(cls)
        if payload is None:
            raise WireError(f"no {cls.__name__} payload")
        return payload

    def all(self, cls: type[P]) -> list[P]:
        return [payload for payload in self.payloads if isinstance(payload, cls)]

    @property
    def notifies(self) -> list[Notify]:
        return [payload.notify for payload in self.all(Notification)]

    def notify(self, kind: int) -> Notify | None:
        """The first notification of a type, or None."""
        for payload in self.payloads:
            if isinstance(payload, Notification) and payload.type == kind:
                return payload.notify
        return None

    @property
    def error(self) -> Notify | None:
        """The first notification of an error, or None."""
        return next((one for one in self.notifies if one.is_error), None)


def parse_header_untrusted(data: bytes) -> tuple[Header, int]:
    """The header and its Next Payload. Raises WireError; VersionError for a higher major version.

    The length field must be that of the datagram.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError("a message that no datagram holds")
    reader = Reader(data)
    spi_i, spi_r = reader.take(SPI_BYTES), reader.take(SPI_BYTES)
    next_payload, version, exchange, flags = reader.u8(), reader.u8(), reader.u8(), reader.u8()
    message_id, length = reader.u32(), reader.u32()
    if version >> 4 > MAJOR_VERSION:
        raise VersionError(f"IKE version {version >> 4}")
    if version >> 4 < MAJOR_VERSION:
        raise WireError(f"IKE version {version >> 4}")
    if length != len(data):
        raise WireError(f"the header says {length} bytes, the datagram has {len(data)}")
    if spi_i == NO_SPI:
        raise WireError("the initiator's SPI is zero")
    header = Header(spi_i, spi_r, exchange, bool(flags & FLAG_INITIATOR), bool(flags & FLAG_RESPONSE), message_id)
    return header, next_payload


def walk_untrusted(next_payload: int, data: bytes) -> list[tuple[int, bool, bytes]]:
    """(type, critical, body) of each payload in a chain. Raises WireError."""
    reader = Reader(data)
    found: list[tuple[int, bool, bytes]] = []
    while next_payload != PayloadType.NONE:
        if len(found) == MAX_PAYLOADS:
            raise WireError("too many payloads")
        kind = next_payload
        next_payload, flags, length = reader.u8(), reader.u8(), reader.u16()
        found.append((kind, bool(flags & CRITICAL), reader.take(length - GENERIC_BYTES)))
    reader.end()
    return found


def parse_chain_untrusted(next_payload: int, data: bytes) -> tuple[Payload, ...]:
    """The payloads of a chain, unknown ones left out. Raises WireError; CriticalPayloadError for unknown critical ones.

    Encrypted payloads have no place inside a chain.
    """
    payloads = []
    for kind, critical, body in walk_untrusted(next_payload, data):
        if kind in (PayloadType.SK, PayloadType.SKF):
            raise WireError("an encrypted payload inside a chain")
        payload = parse_payload_untrusted(kind, body)
        if payload is not None:
            payloads.append(payload)
        elif critical:
            raise CriticalPayloadError(kind)
    return tuple(payloads)


def build_chain(payloads: Sequence[Payload]) -> tuple[int, bytes]:
    """The type of the first payload and the bytes of all."""
    out = b""
    for index, payload in enumerate(payloads):
        body = build_payload(payload)
        following = payloads[index + 1].TYPE if index + 1 < len(payloads) else PayloadType.NONE
        out += bytes([following, 0]) + (GENERIC_BYTES + len(body)).to_bytes(2, "big") + body
    return (payloads[0].TYPE if payloads else PayloadType.NONE), out


def build_clear(header: Header, payloads: Sequence[Payload]) -> bytes:
    """A whole message in the clear."""
    first, chain = build_chain(payloads)
    return header.build(first, HEADER_BYTES + len(chain)) + chain


def parse_clear_untrusted(data: bytes) -> Message:
    """A whole message in the clear. Raises WireError."""
    header, next_payload = parse_header_untrusted(data)
    return Message(header, parse_chain_untrusted(next_payload, data[HEADER_BYTES:]))


def notifications(notifies: Iterable[Notify]) -> list[Payload]:
    """As payloads."""
    return [Notification.of(notify) for notify in notifies]
