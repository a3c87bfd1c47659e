"""The shared UDP port: per address family three sockets that the kernel sorts datagrams into.

                               classic BPF on the SO_REUSEPORT group
    datagram on port 4500 -->  two top bits 11?            -- yes -->  socket 1: ESP
                          -->  IKE_SA_INIT, no cookie yet? -- yes -->  socket 2: strangers
                          -->  else                        ------->    socket 0: IKE, STUN, keepalives: control

So a flood of first messages overflows a buffer of its own, and neither those who stand nor those who brought a cookie
notice. All are bound to the wildcard address with packet info, so that new addresses of the machine need no new socket;
the local address of a path goes along with each datagram. `core.datagram` is the specification of the sorting. This
module imports no asyncio: the worker process uses it too.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import ipaddress
import socket
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from p2pvpn.core.address import Path
from p2pvpn.core.errors import Fault, LocalError

RECEIVE_BUFFER_BYTES = 8 << 20
"""50 ms of a gigabit, counted with the kernel's own overhead for each packet."""
SEND_BUFFER_BYTES = 4 << 20
STRANGERS_BUFFER_BYTES = 1 << 20
"""2,700 first messages: what waits longer than a tenth of a second in a flood is sent again anyhow."""
MAX_DATAGRAM_BYTES = 65535
CONTROL_INDEX, ESP_INDEX, STRANGERS_INDEX = 0, 1, 2
"""Order of binding, which is what the program's result counts."""

_SO_ATTACH_REUSEPORT_CBPF = 51
_SO_RCVBUFFORCE, _SO_SNDBUFFORCE = 33, 32
_IP_TOS, _IP_PKTINFO, _IP_MTU_DISCOVER, _IP_RECVTOS, _IP_MTU = 1, 8, 10, 13, 14
_IPV6_MTU_DISCOVER, _IPV6_MTU, _IPV6_DONTFRAG = 23, 24, 62
_SOL_UDP, _UDP_GRO = 17, 104
_PMTUDISC_WANT, _PMTUDISC_DO = 1, 2
_IN_PKTINFO = struct.Struct("=i4s4s")
_IN6_PKTINFO = struct.Struct("=16si")
ANCILLARY_BYTES = 128
"""Room for packet info and traffic class of either family."""
_PROGRAM = (
    (0x30, 0, 0, 0),  # ldb [0]: the first byte of the UDP payload; loads beyond its end end the program with 0
    (0x54, 0, 0, 0xC0),  # and #0xc0
    (0x15, 12, 0, 0xC0),  # jeq #0xc0, esp
    (0x20, 0, 0, 0),  # ld [0]: the non-ESP marker
    (0x15, 0, 9, 0),  # jeq #0, next, control
    (0x20, 0, 0, 12),  # ld [12]: the responder's SPI
    (0x15, 0, 7, 0),
    (0x20, 0, 0, 16),
    (0x15, 0, 5, 0),
    (0x30, 0, 0, 20),  # ldb [20]: the first payload
    (0x15, 3, 0, 41),  # jeq #NOTIFY, control
    (0x30, 0, 0, 22),  # ldb [22]: the exchange
    (0x15, 0, 1, 34),  # jeq #IKE_SA_INIT, next, control
    (0x06, 0, 0, STRANGERS_INDEX),  # ret
    (0x06, 0, 0, CONTROL_INDEX),  # control: ret
    (0x06, 0, 0, ESP_INDEX),  # esp: ret
)

_PAIR_PROGRAM = (
    (0x30, 0, 0, 0),  # ldb [0]
    (0x54, 0, 0, 0xC0),  # and #0xc0
    (0x15, 0, 1, 0xC0),  # jeq #0xc0, next, over it
    (0x06, 0, 0, ESP_INDEX),  # ret
    (0x06, 0, 0, CONTROL_INDEX),  # ret
)
"""For further ports, which have no socket for strangers."""

Ancillary = list[tuple[int, int, bytes]]


@dataclass(frozen=True, slots=True)
class UdpSockets:
    """The three sockets of one family, all non-blocking."""

    family: int
    control: socket.socket
    esp: socket.socket
    strangers: socket.socket

    def close(self) -> None:
        self.control.close()
        self.esp.close()
        self.strangers.close()


@dataclass(frozen=True, slots=True)
class SharedPort:
    """The sockets of all families that the machine has, on one port, and the lock that keeps a second daemon off it."""

    port: int
    pairs: tuple[UdpSockets, ...]
    lock: socket.socket

    def close(self) -> None:
        for pair in self.pairs:
            pair.close()
        self.lock.close()


def open_port(port: int) -> SharedPort:
    """Open `port` (0 for any free one) for IPv4 and IPv6.

    Raises LocalError when anybody else has it: SO_REUSEPORT by itself would let a second daemon of the same user share
    the port and take half of the traffic.
    """
    if port:
        return _open(port)
    for _ in range(16):  # a port free for one family may be taken in the other
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind(("", 0))
            candidate = probe.getsockname()[1]
        with contextlib.suppress(LocalError):
            return _open(candidate)
    raise LocalError("no UDP port is free in both address families")


def _open(port: int) -> SharedPort:
    lock = _lock(port)
    pairs: list[UdpSockets] = []
    try:
        for family in (socket.AF_INET, socket.AF_INET6):
            pair = _open_pair(family, port)
            if pair is not None:
                pairs.append(pair)
        if not pairs:
            raise LocalError("the machine has neither IPv4 nor IPv6", fault=Fault.MACHINE)
    except BaseException:
        for pair in pairs:
            pair.close()
        lock.close()
        raise
    return SharedPort(port, tuple(pairs), lock)


def _lock(port: int) -> socket.socket:
    """An abstract Unix socket: one per network namespace, as ports are, and gone with its process."""
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        lock.bind(f"\0p2pvpn-udp-{port}")
    except OSError as error:
        lock.close()
        if error.errno != errno.EADDRINUSE:
            raise LocalError(f"locking UDP port {port}: {error.strerror}", fault=Fault.MACHINE) from None
        raise LocalError(
            f"another p2pvpn daemon has UDP port {port}", hint="one daemon serves all networks", fault=Fault.MACHINE
        ) from None
    return lock


def _open_pair(family: int, port: int) -> UdpSockets | None:
    """The sockets, or None when the machine does not have this family."""
    try:
        with _udp_socket(family) as probe:
            probe.bind(("", port))
    except OSError as error:
        if error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            return None
        raise _bind_error(port, error) from None
    control, esp, strangers = sockets = [_udp_socket(family) for _ in range(3)]
    try:
        for sock in sockets:  # in this order: the program's result counts it
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.setblocking(False)
            _set_buffers(sock, STRANGERS_BUFFER_BYTES if sock is strangers else RECEIVE_BUFFER_BYTES)
            sock.bind(("", port))
        _attach(control)
        _receive_packet_info(control)
        _receive_packet_info(strangers)
        _receive_traffic_class(esp)
        _receive_batches(esp)
        allow_fragments(esp, allowed=False)
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise _bind_error(port, error) from None
    return UdpSockets(family, control, esp, strangers)


def open_plain(port: int, families: Sequence[int] = (socket.AF_INET, socket.AF_INET6)) -> tuple[socket.socket, ...]:
    """One non-blocking socket per family on a port (0 for any) where only the engine listens; families that it cannot
    be had in are left out.
    """
    found: list[socket.socket] = []
    for family in families:
        with contextlib.suppress(OSError):
            sock = _udp_socket(family)
            try:
                sock.setblocking(False)
                sock.bind(("", port))
                _receive_packet_info(sock)
            except OSError:
                sock.close()
                raise
            found.append(sock)
    return tuple(found)


def open_extra() -> socket.socket:
    """A further socket on a free IPv4 port, for everything that arrives there until `open_esp_beside`. Raises OSError.

    It is bound without SO_REUSEPORT, or the kernel might give one port twice.
    """
    control = _udp_socket(socket.AF_INET)
    try:
        control.setblocking(False)
        control.bind(("", 0))
        _receive_packet_info(control)
    except OSError:
        control.close()
        raise
    return control


def open_esp_beside(control: socket.socket) -> socket.socket:
    """The ESP socket to a further one: together they are a pair as the shared port has. Raises LocalError."""
    port = control.getsockname()[1]
    control.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    esp = _udp_socket(control.family)
    try:
        esp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        esp.setblocking(False)
        _set_buffers(esp, RECEIVE_BUFFER_BYTES)
        esp.bind(("", port))
        _attach(esp, _PAIR_PROGRAM)
        _receive_traffic_class(esp)
        _receive_batches(esp)
        allow_fragments(esp, allowed=False)
    except OSError as error:
        esp.close()
        raise _bind_error(port, error) from None
    return esp


def no_socket(port: int) -> socket.socket:
    """In the place of an underlay that opens no further ports. Raises LocalError."""
    raise LocalError(f"no socket is open at port {port}")


def _bind_error(port: int, error: OSError) -> LocalError:
    if error.errno == errno.EADDRINUSE:
        return LocalError(
            f"UDP port {port} is in use by another program",
            hint=f"ss -ulpn sport = :{port} says whose; p2pvpn up --port takes another one",
            fault=Fault.MACHINE,
        )
    return LocalError(f"opening UDP port {port}: {error.strerror}", fault=Fault.MACHINE)


def _udp_socket(family: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    return sock


def _set_buffers(sock: socket.socket, receive_bytes: int) -> None:
    for force, plain, size in (
        (_SO_RCVBUFFORCE, socket.SO_RCVBUF, receive_bytes),
        (_SO_SNDBUFFORCE, socket.SO_SNDBUF, SEND_BUFFER_BYTES),
    ):
        try:
            sock.setsockopt(socket.SOL_SOCKET, force, size)
        except PermissionError:
            sock.setsockopt(socket.SOL_SOCKET, plain, size)


def _attach(sock: socket.socket, lines: Sequence[tuple[int, int, int, int]] = _PROGRAM) -> None:
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in lines))
    program = struct.pack("@HP", len(lines), ctypes.addressof(code))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, program)


def _receive_packet_info(sock: socket.socket) -> None:
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)


def _receive_traffic_class(sock: socket.socket) -> None:
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_IP, _IP_RECVTOS, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, 1)


def _receive_batches(sock: socket.socket) -> None:
    """Let the kernel hand over several datagrams of one size and sender at once (UDP_GRO), where it can."""
    with contextlib.suppress(OSError):
        sock.setsockopt(_SOL_UDP, _UDP_GRO, 1)


def received(control: Ancillary) -> tuple[int, int]:
    """Of a datagram of the ESP socket: the size of the datagrams that it is a batch of, or 0, and the traffic class."""
    size = traffic_class = 0
    for level, _, data in control:
        if level == _SOL_UDP:
            size = int.from_bytes(data, sys.byteorder)
        else:
            traffic_class = int.from_bytes(data, sys.byteorder)
    return size, traffic_class


def allow_fragments(sock: socket.socket, *, allowed: bool) -> None:
    """Whether datagrams larger than the path's MTU are cut by the kernel, or refused with EMSGSIZE."""
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_WANT if allowed else _PMTUDISC_DO)
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_WANT if allowed else _PMTUDISC_DO)
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_DONTFRAG, 0 if allowed else 1)


def path_mtu(path: Path) -> int | None:
    """The MTU in bytes that the kernel knows for the way to the remote address, or None when there is no way."""
    family = socket.AF_INET6 if path.remote.is_ipv6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            if not path.local.is_unspecified:
                probe.bind((path.local.host, 0))
            probe.connect((path.remote.host, path.remote.port))
            if family == socket.AF_INET:
                return probe.getsockopt(socket.IPPROTO_IP, _IP_MTU)
            return probe.getsockopt(socket.IPPROTO_IPV6, _IPV6_MTU)
        except OSError:
            return None


def ancillary(path: Path, traffic_class: int = 0) -> Ancillary:
    """Control messages for sendmsg: the path's local address, unless it is left to routing, and the traffic class."""
    out: Ancillary = []
    if path.remote.is_ipv6:
        if not path.local.is_unspecified:
            info = _IN6_PKTINFO.pack(path.local.ip.packed, 0)
            out.append((socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, info))
        if traffic_class:
            out.append((socket.IPPROTO_IPV6, socket.IPV6_TCLASS, struct.pack("=i", traffic_class)))
    else:
        if not path.local.is_unspecified:
            out.append((socket.IPPROTO_IP, _IP_PKTINFO, _IN_PKTINFO.pack(0, path.local.ip.packed, bytes(4))))
        if traffic_class:
            out.append((socket.IPPROTO_IP, _IP_TOS, struct.pack("=i", traffic_class)))
    return out


def reply_ancillary(received: Ancillary) -> Ancillary:
    """Control messages for an answer from the address of ours that a datagram came to, whatever it was."""
    out: Ancillary = []
    for level, kind, data in received:
        if level == socket.IPPROTO_IP and kind == _IP_PKTINFO:
            out.append((level, kind, bytes(4) + data[4:8] + bytes(4)))
        elif level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO:
            out.append((level, kind, data[:16] + bytes(4)))
    return out


def local_address(received: Ancillary) -> str | None:
    """The address of ours that a datagram came to, from recvmsg's control messages."""
    for level, kind, data in received:
        if level == socket.IPPROTO_IP and kind == _IP_PKTINFO:
            return str(ipaddress.IPv4Address(_IN_PKTINFO.unpack_from(data)[1]))
        if level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO:
            return str(ipaddress.IPv6Address(_IN6_PKTINFO.unpack_from(data)[0]))
    return None
