"""What counts as one source of connections."""

from __future__ import annotations

from ipaddress import IPv6Address
from typing import Any

from p2pvpn.core.address import normal_ip


def source_of(peername: Any) -> str:
    """Of a socket's peer name: its IPv4 address, or the /64 that an IPv6 host has to itself."""
    ip = normal_ip(str(peername[0]) if peername else "::")
    return str(IPv6Address(int(ip) >> 64 << 64)) if isinstance(ip, IPv6Address) else str(ip)
