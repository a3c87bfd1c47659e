"""The engine's end of the shared UDP port: everything but ESP, and the addresses of the machine."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import Callable, Sequence

from p2pvpn.core.address import Endpoint, IpNetwork, Path
from p2pvpn.core.errors import Fault, LocalError

from .netlink import Gateway, LocalAddress, Netlink
from .sleep import SleepWatch
from .udp import (
    ANCILLARY_BYTES,
    MAX_DATAGRAM_BYTES,
    SharedPort,
    ancillary,
    local_address,
    open_esp_beside,
    open_extra,
    open_plain,
    open_port,
    reply_ancillary,
)

log = logging.getLogger(__name__)

BATCH = 64
"""Datagrams taken per wake-up of a socket, so that a flood on it leaves the loop to others."""


def _ignore_datagram(path: Path, data: bytes) -> None:
    """Before the engine listens."""


def _screen_nothing(source: tuple[str, int], data: bytes) -> bytes | None:
    """Before the engine listens."""
    return None


def _ignore_change() -> None:
    """Before the engine listens."""


def _ignore_resume(slept_s: float) -> None:
    """Before the engine listens."""


class Underlay:
    """Implements `mesh.ports.Underlay`. Make it with `open`; `esp_sockets` are for the plane."""

    def __init__(self, shared: SharedPort, netlink: Netlink, addresses: tuple[LocalAddress, ...]) -> None:
        self.on_datagram: Callable[[Path, bytes], None] = _ignore_datagram
        self.screen: Callable[[tuple[str, int], bytes], bytes | None] = _screen_nothing
        self.on_change: Callable[[], None] = _ignore_change
        self.on_resume: Callable[[float], None] = _ignore_resume
        self._shared = shared
        self._netlink = netlink
        self._addresses = addresses
        self._gateways: tuple[Gateway, ...] = ()
        self._loop = asyncio.get_running_loop()
        self._looking: asyncio.Task[None] | None = None
        self._look_again = False
        self._sockets: dict[tuple[int, int], socket.socket] = {}
        """By family and port: the shared port first, then those of `listen_at` and `open_extra`."""
        self._extra: dict[int, socket.socket | None] = {}
        """Ports of `open_extra`, and the ESP socket of each that the plane asked for."""
        for pair in shared.pairs:
            self._listen(pair.control, shared.port)
            self._loop.add_reader(pair.strangers, self._receive, pair.strangers, shared.port)
        netlink.watch(self._on_change)
        self._sleep = SleepWatch(self._woke)

    @classmethod
    async def open(cls, netlink: Netlink, port: int = 4500) -> Underlay:
        """Open the port (0 for any). Raises LocalError when it is taken."""
        addresses = await netlink.addresses()
        underlay = cls(open_port(port), netlink, addresses)
        underlay._gateways = await netlink.gateways()
        return underlay

    def close(self) -> None:
        """Close every socket of the port, the plane's included."""
        self._netlink.unwatch(self._on_change)
        self._sleep.close()
        if self._looking is not None:
            self._looking.cancel()
        for pair in self._shared.pairs:
            self._loop.remove_reader(pair.strangers)
        for port in list(self._extra):
            self.close_extra(port)
        for (_, port), sock in self._sockets.items():
            self._loop.remove_reader(sock)
            if port != self.port:
                sock.close()
        self._shared.close()

    def listen_at(self, ports: Sequence[int]) -> Sequence[int]:
        for port in ports:
            if any(known == port for _, known in self._sockets):
                continue
            opened = open_plain(port)
            if not opened:
                log.warning("UDP port %d is in use by another program: peers learn less about their NATs from us", port)
            for sock in opened:
                self._listen(sock, port)
        return [port for port in ports if any(known == port for _, known in self._sockets)]

    def open_probe(self, ipv6: bool) -> int:
        opened = open_plain(0, [socket.AF_INET6 if ipv6 else socket.AF_INET])
        if not opened:
            raise LocalError("no socket can be had to measure with", fault=Fault.MACHINE)
        port: int = opened[0].getsockname()[1]
        self._listen(opened[0], port)
        return port

    def close_probe(self, port: int) -> None:
        for key, sock in list(self._sockets.items()):
            if key[1] == port != self.port:
                self._loop.remove_reader(sock)
                sock.close()
                del self._sockets[key]

    def open_extra(self, count: int) -> Sequence[int]:
        ports: list[int] = []
        with contextlib.suppress(OSError):  # no descriptor or port is left
            for _ in range(count):
                sock = open_extra()
                ports.append(sock.getsockname()[1])
                self._extra[ports[-1]] = None
                self._listen(sock, ports[-1])
        return ports

    def close_extra(self, port: int) -> None:
        if port in self._extra:
            sock, esp = self._sockets.pop((socket.AF_INET, port)), self._extra.pop(port)
            self._loop.remove_reader(sock)
            sock.close()
            if esp is not None:
                esp.close()

    def esp_at(self, port: int) -> socket.socket:
        """The socket that ESP comes in by at a port of `open_extra`, from now on. Raises LocalError."""
        if port not in self._extra:
            raise LocalError(f"no socket is open at port {port}")
        esp = self._extra[port] or open_esp_beside(self._sockets[socket.AF_INET, port])
        self._extra[port] = esp
        return esp

    def _listen(self, sock: socket.socket, port: int) -> None:
        self._sockets[sock.family, port] = sock
        self._loop.add_reader(sock, self._receive, sock, port)

    @property
    def port(self) -> int:
        return self._shared.port

    @property
    def esp_sockets(self) -> tuple[socket.socket, ...]:
        """The sockets that ESP comes in by, one per family."""
        return tuple(pair.esp for pair in self._shared.pairs)

    def local_endpoints(self) -> Sequence[Endpoint]:
        return [
            Endpoint(address.host, self.port)
            for address in self._addresses
            if (socket.AF_INET6 if ":" in address.host else socket.AF_INET, self.port) in self._sockets
        ]

    def local_networks(self) -> Sequence[IpNetwork]:
        return [ipaddress.ip_interface(f"{a.host}/{a.prefix_length}").network for a in self._addresses]

    def gateways(self) -> Sequence[str]:
        return [gateway.host for gateway in self._gateways]

    def send(self, path: Path, data: bytes) -> None:
        sock = self._sockets.get((socket.AF_INET6 if path.remote.is_ipv6 else socket.AF_INET, path.local.port))
        if sock is None:
            return
        with contextlib.suppress(OSError):
            sock.sendmsg([data], ancillary(path), 0, path.remote)

    def _receive(self, sock: socket.socket, port: int) -> None:
        for _ in range(BATCH):
            try:
                data, control, _, source = sock.recvmsg(MAX_DATAGRAM_BYTES, ANCILLARY_BYTES)
            except BlockingIOError:
                return
            except OSError:
                continue  # a soft error of an earlier datagram
            answer = self.screen(source[:2], data)
            if answer is not None:
                if answer:
                    with contextlib.suppress(OSError):
                        sock.sendmsg([answer], reply_ancillary(control), 0, source)
                continue
            host = local_address(control)
            if host is not None:
                path = Path(Endpoint(host, port), Endpoint.of(source[0], source[1]))
                self.on_datagram(path, data)

    def _woke(self, slept_s: float) -> None:
        self.on_resume(slept_s)

    def _on_change(self) -> None:
        if self._looking is not None:
            self._look_again = True
            return
        self._looking = self._loop.create_task(self._look())
        self._looking.add_done_callback(self._looked)

    async def _look(self) -> None:
        self._addresses = await self._netlink.addresses()
        self._gateways = await self._netlink.gateways()
        self.on_change()

    def _looked(self, task: asyncio.Task[None]) -> None:
        self._looking = None
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            self._loop.call_exception_handler({"message": "looking at the addresses failed", "exception": error})
        if self._look_again:
            self._look_again = False
            self._on_change()
