"""NAT-PMP on the wire (RFC 6886): what routers speak that are older than PCP. IPv4 only.

request   0 | 0                                                            the external address (section 3.2)
answer    0 | 128 | result, 2 | epoch, 4 | external IPv4 address, 4
request   0 | 1 | reserved, 2 | internal port, 2 | suggested port, 2 | lifetime, 4    map UDP (section 3.3)
answer    0 | 129 | result, 2 | epoch, 4 | internal port, 2 | mapped port, 2 | lifetime, 4
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from enum import IntEnum

from p2pvpn.core.errors import WireError
from p2pvpn.core.wire import Reader

VERSION = 0
MAX_BYTES = 16
_RESPONSE = 128


class Opcode(IntEnum):
    ADDRESS = 0
    MAP_UDP = 1


class Result(IntEnum):
    """Section 3.5."""

    SUCCESS = 0
    UNSUPPORTED_VERSION = 1
    NOT_AUTHORIZED = 2
    NETWORK_FAILURE = 3
    OUT_OF_RESOURCES = 4
    UNSUPPORTED_OPCODE = 5


@dataclass(frozen=True, slots=True)
class AddressResponse:
    """The router's external address; None with an error."""

    result: int
    epoch_s: int
    address: ipaddress.IPv4Address | None


@dataclass(frozen=True, slots=True)
class MapResponse:
    result: int
    epoch_s: int
    internal_port: int
    external_port: int
    lifetime_s: int


def address_request() -> bytes:
    return bytes((VERSION, Opcode.ADDRESS))


def map_request(port: int, suggested_port: int, lifetime_s: int) -> bytes:
    """Ask for a mapping of UDP; with a lifetime and a suggested port of 0, take it back (section 3.4)."""
    ports = port.to_bytes(2, "big") + suggested_port.to_bytes(2, "big")
    return bytes((VERSION, Opcode.MAP_UDP, 0, 0)) + ports + lifetime_s.to_bytes(4, "big")


def parse_response_untrusted(data: bytes) -> AddressResponse | MapResponse:
    """Raises WireError. Errors may come without the fields behind the epoch."""
    if len(data) > MAX_BYTES:
        raise WireError(f"{len(data)} bytes of NAT-PMP")
    reader = Reader(data)
    if reader.u8() != VERSION:
        raise WireError("not NAT-PMP")
    opcode = reader.u8() ^ _RESPONSE
    result, epoch_s = reader.u16(), reader.u32()
    if opcode == Opcode.ADDRESS:
        address = ipaddress.IPv4Address(reader.take(4)) if result == Result.SUCCESS else None
        return AddressResponse(result, epoch_s, address)
    if opcode != Opcode.MAP_UDP:
        raise WireError(f"NAT-PMP opcode {opcode}")
    if result != Result.SUCCESS:
        return MapResponse(result, epoch_s, 0, 0, 0)
    return MapResponse(result, epoch_s, reader.u16(), reader.u16(), reader.u32())
