"""The Port Control Protocol on the wire (RFC 6887): MAP and ANNOUNCE.

     0                   1                   2                   3
     0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
    |  Version = 2  |R|   Opcode    |   Reserved    |  Result Code  |     section 7.1 (request: 16 reserved bits)
    |                           Lifetime, s                         |     and 7.2 (response)
    |  request: the client's IP address, 128 bits                   |
    |  response: epoch time, s, and 96 reserved bits                |

    |                     Mapping Nonce, 96 bits                    |     MAP, section 11.1
    |   Protocol    |               Reserved, 24 bits               |
    |         Internal Port         |  Suggested or assigned port   |
    |  Suggested or assigned external address, 128 bits             |

IPv4 addresses travel as IPv4-mapped IPv6 ones (section 5). Options are not used; those of an answer are skipped.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from enum import IntEnum

from p2pvpn.core.address import Endpoint, IpAddress, normal_ip
from p2pvpn.core.errors import WireError
from p2pvpn.core.wire import Reader

PORT = 5351
"""Of the server."""
ANNOUNCE_PORT = 5350
"""Of clients, to which servers multicast ANNOUNCE (section 14.1)."""
VERSION = 2
UDP = 17
NONCE_BYTES = 12
HEADER_BYTES = 24
MAX_BYTES = 1100
"""Of a message (section 7)."""
_RESPONSE = 0x80


class Opcode(IntEnum):
    ANNOUNCE = 0
    MAP = 1


class Result(IntEnum):
    """Section 7.4."""

    SUCCESS = 0
    UNSUPP_VERSION = 1
    NOT_AUTHORIZED = 2
    MALFORMED_REQUEST = 3
    UNSUPP_OPCODE = 4
    UNSUPP_OPTION = 5
    MALFORMED_OPTION = 6
    NETWORK_FAILURE = 7
    NO_RESOURCES = 8
    UNSUPP_PROTOCOL = 9
    USER_EX_QUOTA = 10
    CANNOT_PROVIDE_EXTERNAL = 11
    ADDRESS_MISMATCH = 12
    EXCESSIVE_REMOTE_PEERS = 13


@dataclass(frozen=True, slots=True)
class Response:
    """An answer. `nonce`, `protocol`, `internal_port` and `external` are of MAP; None and 0 in any other."""

    opcode: int
    result: int
    lifetime_s: int
    epoch_s: int
    nonce: bytes | None = None
    protocol: int = 0
    internal_port: int = 0
    external: Endpoint | None = None


def map_request(client: IpAddress, nonce: bytes, port: int, lifetime_s: int, suggested: Endpoint | None) -> bytes:
    """Ask that UDP to an external port is forwarded to `port`; a lifetime of 0 takes it back (section 15)."""
    if suggested is None:
        # All zeros of the family: no preference (section 11.1).
        suggested = Endpoint("0.0.0.0" if client.version == 4 else "::", 0)  # noqa: S104 (no address to bind)
    header = bytes((VERSION, Opcode.MAP, 0, 0)) + lifetime_s.to_bytes(4, "big") + _packed(client)
    ports = port.to_bytes(2, "big") + suggested.port.to_bytes(2, "big")
    return header + nonce + bytes((UDP, 0, 0, 0)) + ports + _packed(suggested.ip)


def parse_response_untrusted(data: bytes) -> Response:
    """Raises WireError for anything that is no PCP answer, of another version too."""
    if not HEADER_BYTES <= len(data) <= MAX_BYTES or len(data) % 4:
        raise WireError(f"a PCP message of {len(data)} bytes")
    reader = Reader(data)
    if reader.u8() != VERSION:
        raise WireError("another version of PCP")
    opcode = reader.u8()
    if not opcode & _RESPONSE:
        raise WireError("a PCP request")
    opcode &= ~_RESPONSE
    reader.u8()
    result = reader.u8()
    lifetime_s, epoch_s = reader.u32(), reader.u32()
    reader.take(12)
    if opcode != Opcode.MAP or not reader.left:
        return Response(opcode, result, lifetime_s, epoch_s)
    nonce = reader.take(NONCE_BYTES)
    protocol = reader.u8()
    reader.take(3)
    internal_port, external_port = reader.u16(), reader.u16()
    host = normal_ip(str(ipaddress.IPv6Address(reader.take(16))))
    external = Endpoint(str(host), external_port)
    return Response(opcode, result, lifetime_s, epoch_s, nonce, protocol, internal_port, external)


def unsupported_version_untrusted(data: bytes) -> int | None:
    """The version that a server speaks when it says that it does not speak ours; None for any other answer.

    A NAT-PMP server says so in eight bytes of its own version 0 (RFC 6886 section 3.5, RFC 6887 appendix A).
    """
    if not 4 <= len(data) <= MAX_BYTES or not data[1] & _RESPONSE or data[0] == VERSION:
        return None
    result = data[3] if data[0] else int.from_bytes(data[2:4], "big")
    return data[0] if result == Result.UNSUPP_VERSION else None


def _packed(address: IpAddress) -> bytes:
    if isinstance(address, ipaddress.IPv4Address):
        return bytes(10) + b"\xff\xff" + address.packed
    return address.packed
