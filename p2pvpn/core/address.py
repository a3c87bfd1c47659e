"""Where packets go: endpoints and paths, in one normal form."""

from __future__ import annotations

import functools
import ipaddress
from typing import NamedTuple

from .errors import WireError

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


STREAM_NETWORK = ipaddress.IPv4Network("127.64.0.0/10")
"""Loopback addresses that stand for streams: what carries datagrams over TCP has an endpoint here, and nothing else."""


def normal_ip(host: str) -> IpAddress:
    """Parse an address; IPv4-mapped IPv6 becomes IPv4 and a zone is dropped. Raises ValueError."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


class Endpoint(NamedTuple):
    """A UDP address: the numeric host in its normal textual form, and the port."""

    host: str
    port: int

    @classmethod
    def of(cls, host: str, port: int) -> Endpoint:
        """From any spelling of a numeric address. Raises ValueError."""
        if not 0 <= port <= 65535:
            raise ValueError(f"port {port} is not in 0..65535")
        return cls(str(normal_ip(host)), port)

    @classmethod
    def parse(cls, text: str, default_port: int | None = None) -> Endpoint:
        """From `192.0.2.1:4500` or `[2001:db8::1]:4500`. Raises ValueError."""
        host, port = text, ""
        if text.startswith("["):
            host, bracket, tail = text[1:].partition("]")
            if not bracket or (tail and not tail.startswith(":")):
                raise ValueError(f"{text!r} is not an endpoint")
            port = tail[1:]
        elif text.count(":") == 1:
            host, _, port = text.partition(":")
        if port:
            if not port.isascii() or not port.isdigit():
                raise ValueError(f"{port!r} is not a port")
            return cls.of(host, int(port))
        if default_port is None:
            raise ValueError(f"{text!r} has no port")
        return cls.of(host, default_port)

    @property
    def ip(self) -> IpAddress:
        return ipaddress.ip_address(self.host)

    @property
    def is_ipv6(self) -> bool:
        return ":" in self.host

    @property
    def is_unspecified(self) -> bool:
        return self.host in ("0.0.0.0", "::")  # noqa: S104 (compared, not bound)

    @property
    def is_stream(self) -> bool:
        """Whether a stream over TCP stands behind it, on this machine."""
        return self.host.startswith("127.") and self.ip in STREAM_NETWORK

    def packed(self) -> bytes:
        """4 or 16 address bytes, then 2 port bytes."""
        return _packed_host(self.host) + self.port.to_bytes(2, "big")

    @classmethod
    def unpack_untrusted(cls, data: bytes) -> Endpoint:
        """The inverse of `packed`. Raises WireError."""
        if len(data) not in (6, 18):
            raise WireError(f"an endpoint has 6 or 18 bytes, not {len(data)}")
        return cls(str(normal_ip(str(ipaddress.ip_address(data[:-2])))), int.from_bytes(data[-2:], "big"))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if self.is_ipv6 else f"{self.host}:{self.port}"


@functools.lru_cache(maxsize=1024)
def _packed_host(host: str) -> bytes:
    """Few addresses are asked for again and again."""
    return ipaddress.ip_address(host).packed


class Path(NamedTuple):
    """A way to reach a peer: from one of our endpoints to one of its (or to a relay port that stands for it).

    A local host of `0.0.0.0` or `::` leaves the source address to the kernel's routing.
    """

    local: Endpoint
    remote: Endpoint

    def __str__(self) -> str:
        return f"{self.local} > {self.remote}"


def any_local(remote: Endpoint, port: int) -> Path:
    """The path to `remote` from our `port` on whichever address routing picks."""
    return Path(Endpoint("::" if remote.is_ipv6 else "0.0.0.0", port), remote)  # noqa: S104
