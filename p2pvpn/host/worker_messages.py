"""What the daemon and its user-plane worker say to each other: msgpack arrays over a SOCK_SEQPACKET pair.

    daemon -> worker   [serial, op, argument ..]          one `Op` each; executed in order; "listen" with a descriptor
    worker -> daemon   [serial, true, value]              its answer
                       [serial, false, text]              or why not
                       [0, "trapped", network, packet]    a packet that no SA in use covers
                       [0, "moved", child id, host, port] a new source of an SA's packets

Both ends are ours, so a message that does not parse is a bug and ends the worker. The worker imports this module, so it
imports no asyncio.
"""

from __future__ import annotations

import ipaddress
from enum import StrEnum
from typing import Any

import msgpack

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.child import ChildSa, EspSuite
from p2pvpn.core.secret import Secret
from p2pvpn.core.selector import Selector
from p2pvpn.esp.ration import Service

MAX_MESSAGE_BYTES = 128 << 10
"""Below the kernel's default for Unix sockets (208 KiB) with room for what it adds."""
INJECT_BYTES = 64 << 10
"""Packets of one inject message."""
TRAPPED, MOVED = "trapped", "moved"


class Op(StrEnum):
    """What the daemon may ask for."""

    OPEN = "open"
    CLOSE = "close"
    INSTALL = "install"
    USE = "use"
    MOVE = "move"
    REMOVE = "remove"
    LISTEN = "listen"
    UNLISTEN = "unlisten"
    INJECT = "inject"
    USAGE = "usage"
    COUNTERS = "counters"


def pack(message: list[Any]) -> bytes:
    return bytes(msgpack.packb(message, use_bin_type=True))


def unpack(data: bytes) -> list[Any]:
    message = msgpack.unpackb(data, raw=False, strict_map_key=False)
    if not isinstance(message, list) or not message:
        raise ValueError("a message is an array")
    return message


def path_fields(path: Path) -> list[Any]:
    return [path.local.host, path.local.port, path.remote.host, path.remote.port]


def path_of(fields: list[Any]) -> Path:
    local_host, local_port, remote_host, remote_port = fields
    return Path(Endpoint(local_host, local_port), Endpoint(remote_host, remote_port))


def service_fields(service: Service) -> list[Any]:
    return [sorted(service.addresses), service.port]


def service_of(fields: list[Any]) -> Service:
    addresses, port = fields
    return Service(frozenset(addresses), port)


def child_fields(child: ChildSa) -> list[Any]:
    return [
        child.id,
        child.network,
        child.suite.name,
        child.spi_in,
        child.spi_out,
        child.key_in.reveal(),
        child.key_out.reveal(),
        [_selector_fields(selector) for selector in child.local],
        [_selector_fields(selector) for selector in child.remote],
        path_fields(child.path),
        child.esn,
        child.transport_mode,
        child.mtu,
    ]


def child_of(fields: list[Any]) -> ChildSa:
    (child_id, network, suite, spi_in, spi_out, key_in, key_out, local, remote, path, esn, transport, mtu) = fields
    return ChildSa(
        child_id,
        network,
        EspSuite[suite],
        spi_in,
        spi_out,
        Secret(key_in),
        Secret(key_out),
        tuple(_selector_of(selector) for selector in local),
        tuple(_selector_of(selector) for selector in remote),
        path_of(path),
        esn=esn,
        transport_mode=transport,
        mtu=mtu,
    )


def _selector_fields(selector: Selector) -> list[Any]:
    return [
        selector.start.packed,
        selector.end.packed,
        selector.protocol,
        selector.start_port,
        selector.end_port,
    ]


def _selector_of(fields: list[Any]) -> Selector:
    start, end, protocol, start_port, end_port = fields
    return Selector(ipaddress.ip_address(start), ipaddress.ip_address(end), protocol, start_port, end_port)
