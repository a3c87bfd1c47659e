"""What a gateway gives to a client that asks for addresses: the configuration payload (RFC 7296 section 3.15).

CP:        | kind u8 | zero 3 | attribute ... |
attribute: | zero 1 bit, type 15 bits | length u16 | value |
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from p2pvpn.core.address import IpAddress, IpNetwork
from p2pvpn.core.errors import WireError
from p2pvpn.core.wire import Reader

from .payloads import Configuration

CFG_REQUEST, CFG_REPLY = 1, 2
IP4_ADDRESS, IP4_DNS, IP6_ADDRESS, IP6_DNS, IP4_SUBNET, IP6_SUBNET = 1, 3, 8, 10, 13, 15
MAX_ATTRIBUTES = 64
"""Of one payload; a client asks for a handful."""


@dataclass(frozen=True, slots=True)
class Lease:
    """Inner addresses of the client, resolvers, and the networks behind the gateway."""

    addresses: tuple[IpAddress, ...]
    dns: tuple[IpAddress, ...] = ()
    subnets: tuple[IpNetwork, ...] = ()

    def reply(self, asked: frozenset[int]) -> Configuration:
        """CFG_REPLY; an address only of a family that was asked for."""
        values: list[tuple[int, bytes]] = []
        for address in self.addresses:
            kind = IP4_ADDRESS if address.version == 4 else IP6_ADDRESS
            if kind in asked:
                values.append((kind, address.packed + (b"" if address.version == 4 else b"\x80")))
        values += [(IP4_DNS if one.version == 4 else IP6_DNS, one.packed) for one in self.dns]
        for net in self.subnets:
            if net.version == 4:
                values.append((IP4_SUBNET, net.network_address.packed + net.netmask.packed))
            else:
                values.append((IP6_SUBNET, net.network_address.packed + bytes([net.prefixlen])))
        return Configuration(CFG_REPLY, _build(values))

    @classmethod
    def of_untrusted(cls, payload: Configuration) -> Lease:
        """What a CFG_REPLY gives; attributes that we do not know are passed over. Raises WireError."""
        addresses: list[IpAddress] = []
        dns: list[IpAddress] = []
        subnets: list[IpNetwork] = []
        for kind, value in attributes_untrusted(payload):
            try:
                if kind in (IP4_ADDRESS, IP6_ADDRESS) and value:
                    addresses.append(ipaddress.ip_address(value[: 4 if kind == IP4_ADDRESS else 16]))
                elif kind in (IP4_DNS, IP6_DNS) and value:
                    dns.append(ipaddress.ip_address(value))
                elif kind == IP4_SUBNET and len(value) == 8:
                    net, mask = ipaddress.IPv4Address(value[:4]), ipaddress.IPv4Address(value[4:])
                    subnets.append(ipaddress.ip_network(f"{net}/{mask}", strict=False))
                elif kind == IP6_SUBNET and len(value) == 17:
                    subnets.append(ipaddress.ip_network((value[:16], value[16]), strict=False))
            except ValueError as problem:
                raise WireError(f"configuration attribute {kind}: {problem}") from None
        return cls(tuple(addresses), tuple(dns), tuple(subnets))


def request() -> Configuration:
    """CFG_REQUEST for all that a `Lease` has."""
    kinds = (IP4_ADDRESS, IP6_ADDRESS, IP4_DNS, IP6_DNS, IP4_SUBNET, IP6_SUBNET)
    return Configuration(CFG_REQUEST, _build((kind, b"") for kind in kinds))


def attributes_untrusted(payload: Configuration) -> list[tuple[int, bytes]]:
    """Type and value of each attribute. Raises WireError."""
    reader = Reader(payload.attributes)
    found: list[tuple[int, bytes]] = []
    while reader.left:
        if len(found) == MAX_ATTRIBUTES:
            raise WireError("too many configuration attributes")
        kind = reader.u16() & 0x7FFF
        found.append((kind, reader.take(reader.u16())))
    return found


def _build(values: Iterable[tuple[int, bytes]]) -> bytes:
    return b"".join(kind.to_bytes(2, "big") + len(value).to_bytes(2, "big") + value for kind, value in values)
