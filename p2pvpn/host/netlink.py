"""The machine's links, addresses and routes over rtnetlink; with `host.xfrm_messages` the only importer of pyroute2.

Requests go through one `AsyncIPRoute`. Notifications come by a socket of our own whose messages are only looked at for
what kind they are: they say *that* something changed, and a fresh look at the addresses says what. So nothing queues up
in this process, and when the kernel's own queue overflows (ENOBUFS) that is one more "something changed".
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from p2pvpn.core.address import IpAddress, IpNetwork, normal_ip
from p2pvpn.core.errors import Fault, LocalError

DEVICE_PREFIX = "p2pvpn"
"""Names of our own TUN devices start so; their addresses are never candidates."""
DEBOUNCE_S = 0.05
"""A change of network is a burst of notifications over some milliseconds; it is told once."""

_RTMGRP_LINK, _RTMGRP_IPV4_IFADDR, _RTMGRP_IPV4_ROUTE = 0x1, 0x10, 0x40
_RTMGRP_IPV6_IFADDR, _RTMGRP_IPV6_ROUTE = 0x100, 0x400
_GROUPS = _RTMGRP_LINK | _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV4_ROUTE | _RTMGRP_IPV6_IFADDR | _RTMGRP_IPV6_ROUTE
_LINK_MESSAGES, _ROUTE_MESSAGES = (16, 17), (24, 25)
"""RTM_NEW.. and RTM_DEL.. of each; what else comes is of addresses."""
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_INDEX = struct.Struct("=4xi")
"""Where both ifinfomsg and ifaddrmsg have the index of the link."""
_IFINFOMSG_BYTES = 16
_IFLA_IFNAME = 3
_IFF_UP, _IFF_LOOPBACK, _IFF_RUNNING = 0x1, 0x8, 0x40
_IFA_F_TEMPORARY, _IFA_F_NODAD, _IFA_F_DADFAILED, _IFA_F_DEPRECATED, _IFA_F_TENTATIVE = 0x01, 0x02, 0x08, 0x20, 0x40
_UNUSABLE = _IFA_F_TEMPORARY | _IFA_F_DADFAILED | _IFA_F_DEPRECATED | _IFA_F_TENTATIVE
_IFA_F_NOPREFIXROUTE = 0x200
_MAIN_TABLE = 254
_OUR_PROTOCOL = 112
"""Of the routes that outlive us when we are killed, so that they are told from others (rtm_protocol)."""
_BARRIER: dict[str, Any] = {"type": "unreachable", "priority": 1 << 24, "proto": _OUR_PROTOCOL}
"""Preferred to nothing but the lack of a route."""
_SUPER_PACKETS = {"gso_max_size": 60_000, "gso_max_segs": 64}
"""Of a device that takes them: cut and sealed, the packets must fit one send call of 65,507 bytes and 64 datagrams."""
_QUEUE_PACKETS = 1000
"""Transmit queue of a TUN device: a burst of one TCP window at a gigabit and 10 ms."""


@dataclass(frozen=True, slots=True, order=True)
class LocalAddress:
    """An address of the machine that others may reach: not loopback, not link-local, not of our own devices.

    Temporary IPv6 addresses (RFC 8981) are left out: they change without need, and peers are authenticated members.
    """

    interface: str
    host: str
    prefix_length: int


@dataclass(frozen=True, slots=True)
class Gateway:
    """A router that a default route leads to; a link-local address carries its zone."""

    host: str
    interface: str


class Netlink:
    """Requests and notifications. Make it with `open`, in the network namespace that it is about."""

    def __init__(self, requests: AsyncIPRoute, events: socket.socket) -> None:
        self._requests = requests
        self._events = events
        self._watchers: list[Callable[[], None]] = []
        self._own: set[int] = set()
        self._pending: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(events, self._on_events)

    @classmethod
    async def open(cls) -> Netlink:
        """Raises LocalError when the kernel refuses netlink sockets."""
        try:
            events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
            events.bind((0, _GROUPS))
        except OSError as error:
            raise LocalError(f"rtnetlink: {error.strerror}") from None
        requests = AsyncIPRoute(groups=0)
        await requests.setup_endpoint()
        return cls(requests, events)

    def close(self) -> None:
        if self._pending is not None:
            self._pending.cancel()
        self._loop.remove_reader(self._events)
        self._events.close()
        self._requests.close()

    # ------------------------------------------------------------------ what is there

    async def addresses(self) -> tuple[LocalAddress, ...]:
        """The usable addresses of links that are up, sorted."""
        links: dict[int, str] = {}
        async for link in await self._requests.get_links():
            flags, name = link["flags"], link.get("ifname")
            if flags & _IFF_LOOPBACK or not flags & _IFF_UP or not flags & _IFF_RUNNING:
                continue
            if not name.startswith(DEVICE_PREFIX):
                links[link["index"]] = name
        found: set[LocalAddress] = set()
        async for entry in await self._requests.get_addr():
            flags = entry.get("flags") or 0
            text = entry.get("local") or entry.get("address")
            if entry["index"] not in links or flags & _UNUSABLE or text is None:
                continue
            ip = normal_ip(text)
            if not ip.is_link_local:
                found.add(LocalAddress(links[entry["index"]], str(ip), entry["prefixlen"]))
        return tuple(sorted(found))

    async def gateways(self) -> tuple[Gateway, ...]:
        """The routers of the main table's default routes, the preferred first."""
        found: list[tuple[int, Gateway]] = []
        async for entry in await self._requests.get_routes(table=_MAIN_TABLE):
            target, device = entry.get("gateway"), entry.get("oif")
            if entry["dst_len"] or target is None or device is None:
                continue
            name = await self._name(device)
            if not name.startswith(DEVICE_PREFIX):
                host = (
                    f"{target}%{name}" if normal_ip(target).version == 6 and normal_ip(target).is_link_local else target
                )
                found.append((entry.get("priority") or 0, Gateway(host, name)))
        return tuple(gateway for _, gateway in sorted(found, key=lambda item: item[0]))

    # ------------------------------------------------------------------ what changes

    def watch(self, watcher: Callable[[], None]) -> None:
        """Call `watcher` after each burst of changes of links, addresses or the default route."""
        self._watchers.append(watcher)

    def unwatch(self, watcher: Callable[[], None]) -> None:
        self._watchers.remove(watcher)

    def _on_events(self) -> None:
        matters = False
        for _ in range(64):  # others get their turn; the reader is called again
            try:
                data = self._events.recv(65536)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                matters = True
                continue
            matters = self._matters(data) or matters
        if matters and self._pending is None:
            self._pending = self._loop.call_later(DEBOUNCE_S, self._tell)

    def _matters(self, data: bytes) -> bool:
        """Whether a batch of notifications has one of a link or address that is not ours, or of the default route."""
        found = False
        at = 0
        while at + _HEADER.size <= len(data):
            length, kind, *_ = _HEADER.unpack_from(data, at)
            if length < _HEADER.size or at + length > len(data):
                return True
            body = data[at + _HEADER.size : at + length]
            at += (length + 3) & ~3
            if len(body) < _INDEX.size:
                continue
            if kind in _ROUTE_MESSAGES:
                found = found or body[1] == 0  # rtm_dst_len
                continue
            index = _INDEX.unpack_from(body)[0]
            if kind in _LINK_MESSAGES and _link_name(body).startswith(DEVICE_PREFIX):
                self._own.add(index)
            elif index not in self._own:
                found = True
            elif kind == _LINK_MESSAGES[0]:  # the index of a device of ours went to another
                self._own.discard(index)
                found = True
        return found

    def _tell(self) -> None:
        self._pending = None
        for watcher in list(self._watchers):
            watcher()

    # ------------------------------------------------------------------ what we set up

    async def set_up_device(
        self, name: str, addresses: Sequence[IpAddress], routes: Sequence[IpNetwork], mtu: int
    ) -> None:
        """Give a TUN device its MTU, addresses (each alone, not its subnet) and routes, and bring it up.

        Raises LocalError with what the kernel said, or with whose route is in the way.
        """
        index = await self.index(name)
        await self._require_free(routes, index)
        _prepare_ipv6(name)
        await self._ask("link", "set", index=index, mtu=mtu, txqlen=_QUEUE_PACKETS, state="up", **_SUPER_PACKETS)
        for address in addresses:
            options: dict[str, Any] = {"address": str(address), "prefixlen": address.max_prefixlen}
            if address.version == 6:
                options["flags"] = _IFA_F_NODAD | _IFA_F_NOPREFIXROUTE
            await self._ask("addr", "add", index=index, **options)
        for route in routes:
            await self.add_route(name, route)

    async def add_barriers(self, routes: Sequence[IpNetwork]) -> None:
        """Behind the routes to a device: without it, packets go nowhere, rather than out in the clear.

        Raises LocalError.
        """
        for route in routes:
            await self._ask("route", "replace", dst=str(route), **_BARRIER)

    async def remove_barriers(self, routes: Sequence[IpNetwork]) -> None:
        for route in routes:
            with contextlib.suppress(LocalError):  # somebody did it for us
                await self._ask("route", "del", dst=str(route), **_BARRIER)

    async def clear_barriers(self) -> None:
        """Remove those that a dead daemon left."""
        left = []
        async for entry in await self._requests.get_routes(table=_MAIN_TABLE):
            if entry["proto"] == _OUR_PROTOCOL and entry.get("dst") is not None:
                left.append(ipaddress.ip_network(f"{entry.get('dst')}/{entry['dst_len']}"))
        await self.remove_barriers(left)

    async def _require_free(self, wanted: Sequence[IpNetwork], own: int) -> None:
        """Raises LocalError when another device has a route to a part of what we are about to route.

        Ours would silently take the other's traffic, or the other keep ours. Routes of the main table only, as `ip
        route` shows them; a default route, or any other wider one, is not in the way.
        """
        async for entry in await self._requests.get_routes(table=_MAIN_TABLE):
            target, device = entry.get("dst"), entry.get("oif")
            if target is None or device is None or device == own or entry["proto"] == _OUR_PROTOCOL:
                continue
            found = ipaddress.ip_network(f"{target}/{entry['dst_len']}", strict=False)
            for network in wanted:
                if found.version == network.version and found.subnet_of(network):  # type: ignore[arg-type]
                    raise LocalError(
                        f"{found} is routed to {await self._name(device)} already, inside of our {network}",
                        hint="take down whatever made that route (ip route shows it), then: p2pvpn restart",
                        fault=Fault.MACHINE,
                    )

    async def _name(self, index: int) -> str:
        found = [link.get("ifname") async for link in await self._requests.get_links(index)]
        return str(found[0]) if found else f"device {index}"

    async def add_route(self, name: str, route: IpNetwork) -> None:
        """Send a prefix to the device. Raises LocalError."""
        await self._ask("route", "replace", dst=str(route), oif=await self.index(name))

    async def remove_route(self, name: str, route: IpNetwork) -> None:
        """Raises LocalError when there is no such route."""
        await self._ask("route", "del", dst=str(route), oif=await self.index(name))

    async def index(self, name: str) -> int:
        found = await self._requests.link_lookup(ifname=name)
        if not found:
            raise LocalError(f"there is no network device {name}")
        return int(found[0])

    async def _ask(self, kind: str, command: str, **options: Any) -> None:
        call = {"link": self._requests.link, "addr": self._requests.addr, "route": self._requests.route}[kind]
        try:
            await call(command, **options)
        except NetlinkError as error:
            what = options.get("dst") or options.get("address") or f"mtu {options.get('mtu')}"
            raise LocalError(f"{kind} {command} {what}: {error.args[1]}") from None


def _link_name(body: bytes) -> str:
    """The name in a link notification: ifinfomsg, then attributes."""
    at = _IFINFOMSG_BYTES
    while at + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, at)
        if length < _ATTRIBUTE.size:
            break
        if kind == _IFLA_IFNAME:
            return body[at + _ATTRIBUTE.size : at + length].rstrip(b"\0").decode(errors="replace")
        at += (length + 3) & ~3
    return ""


def _prepare_ipv6(name: str) -> None:
    """No link-local address, so no router solicitations; and IPv6 even where new devices have it off."""
    for setting, value in (("addr_gen_mode", "1"), ("disable_ipv6", "0")):
        with contextlib.suppress(OSError):  # a kernel without IPv6, or /proc mounted read-only
            Path(f"/proc/sys/net/ipv6/conf/{name}/{setting}").write_text(value)
