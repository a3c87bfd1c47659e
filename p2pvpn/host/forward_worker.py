"""The process that forwards relayed datagrams in user space: `python -m p2pvpn.host.forward_worker FD FIRST LAST`.

Each relay port has a *listener*, bound to the wildcard address of both families. Once a source is bound, it also has a
*flow*: a socket on the same port, bound to the address of ours that the source sends to and connected to the source.
The kernel then does the matching: a flow receives only what its source sent, and needs no address to send back.

    source A --> flow of port a --recvmsg, UDP_GRO--> UDP_SEGMENT, sendmsg--> flow of port b --> source B
    anybody --> listener of port a --> the daemon, rate-limited
    A's Binding requests, and everything while b has no flow --> the daemon, rate-limited

Control is a SOCK_SEQPACKET socket to the daemon, one message per packet (layouts below). When the daemon closes it or
dies, the process ends. A plain epoll loop; imports stay few, so that it starts quickly and stays small.
"""

from __future__ import annotations

import errno
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from p2pvpn.core.address import Endpoint
from p2pvpn.core.limits import TokenBucket
from p2pvpn.relay.wire import is_bind

OPEN, BIND, ANSWER, CLOSE = b"o", b"b", b"a", b"c"
"""Daemon to worker."""
OPENED, PACKET, USAGE = b"O", b"P", b"U"
"""Worker to daemon."""
PORT_PAIR = struct.Struct("=IHH")
"""OPEN and OPENED: number of the request, two ports. In OPEN, 0 is any; in OPENED, 0 is none, and text follows."""
PORT = struct.Struct("=H")
"""CLOSE; BIND has the packed endpoint after it."""
HEAD = struct.Struct("=HB")
"""ANSWER and PACKET: port, bytes of the packed endpoint; endpoint and datagram follow."""
ONE_USAGE = struct.Struct("=HdQ")
"""In USAGE, repeated: a port of the pair, monotonic time of its last packet, bytes so far."""

MAX_DATAGRAM_BYTES = 2048
"""Datagrams that the daemon sees: Binding requests and IKE messages fit into an Ethernet frame."""
MAX_MESSAGE_BYTES = 16_384
BATCH = 32
"""Receives per flow before others get their turn; with UDP_GRO, up to 64 datagrams each."""
REPORT_S = 1.0
"""Between usage reports: well below the idle limits of relays."""
UP_PER_SECOND, UP_BURST = 2000.0, 500.0
"""Packets handed to the daemon in all: at 0.1 ms each, a fifth of its core."""
PORT_UP_PER_SECOND, PORT_UP_BURST = 50.0, 64.0
"""And per port, so that one flooded port leaves the others their binds: a bind attempt has 8 requests."""
MUTE_S = 0.1
"""A listener without tokens is not read for so long; the kernel drops what overflows, at no cost to the loop."""
REMEMBERED_SOURCES = 16
"""Sources per port whose local address is remembered, until one of them is bound."""
FLOW_BUFFER_BYTES = 2 << 20
"""20 ms at a gigabit, for a process that shares its core."""
LISTENER_BUFFER_BYTES = 64 << 10
DESCRIPTORS = 65_536
"""Four per pair, for the largest port range that makes sense."""

_SO_RCVBUFFORCE, _SO_SNDBUFFORCE = 33, 32
_IP_PKTINFO = 8
_UDP_SEGMENT, _UDP_GRO = 103, 104
_IN_PKTINFO, _IN6_PKTINFO = struct.Struct("=i4s4s"), struct.Struct("=16si")
_SEGMENT_BYTES = struct.Struct("=H")
_ANCILLARY_BYTES = 128
_MAPPED = "::ffff:"
_NO_GSO = {errno.EINVAL, errno.EIO, errno.EMSGSIZE, errno.EOPNOTSUPP, errno.ENOPROTOOPT}

Handler = Callable[[float], None]


class _Pair:
    """What both ports share."""

    __slots__ = ("at", "bytes")

    def __init__(self) -> None:
        self.at = 0.0
        self.bytes = 0


class _Port:
    """One relay port. `local_of` remembers at which address of ours recent sources arrived."""

    __slots__ = ("bucket", "flow", "listener", "local_of", "number", "pair", "twin")

    def __init__(self, number: int, listener: socket.socket, pair: _Pair) -> None:
        self.number = number
        self.listener = listener
        self.pair = pair
        self.twin = self
        self.flow: _Flow | None = None
        self.local_of: dict[Endpoint, str] = {}
        self.bucket = TokenBucket(PORT_UP_PER_SECOND, PORT_UP_BURST)

    def remember(self, source: Endpoint, local: str) -> None:
        self.local_of.pop(source, None)
        self.local_of[source] = local
        if len(self.local_of) > REMEMBERED_SOURCES:
            del self.local_of[next(iter(self.local_of))]


class _Flow:
    """The bound source of a port. `local` is our address towards it, empty where routing picks one."""

    __slots__ = ("local", "sock", "source")

    def __init__(self, sock: socket.socket, source: Endpoint, local: str) -> None:
        self.sock = sock
        self.source = source
        self.local = local


class ForwardWorker:
    """The loop, the ports, and the daemon's messages."""

    def __init__(self, control: socket.socket, ports: range) -> None:
        self._control = control
        self._range = ports
        self._ports: dict[int, _Port] = {}
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._buffer = bytearray(65_536)
        self._view = memoryview(self._buffer)
        self._segmented: dict[int, list[tuple[int, int, bytes]]] = {}
        self._bucket = TokenBucket(UP_PER_SECOND, UP_BURST)
        self._muted: deque[tuple[float, int]] = deque()
        self._used: dict[_Pair, int] = {}
        self._report_at = 0.0
        self._replies: deque[bytes] = deque()
        self._running = True
        control.setblocking(False)
        self._watch(control, self._on_control)

    def run(self) -> None:
        """Until the daemon closes the control socket."""
        while self._running:
            now = time.monotonic()
            for fd, _ in self._epoll.poll(self._wait_s(now)):
                handler = self._handlers.get(fd)
                if handler is not None:
                    handler(now)
            now = time.monotonic()
            while self._muted and self._muted[0][0] <= now:
                with suppress(OSError):  # the port was closed meanwhile
                    self._epoll.modify(self._muted.popleft()[1], select.EPOLLIN)
            if self._used and self._report_at <= now:
                self._report(now)
            self._flush()

    def _wait_s(self, now: float) -> float:
        waits = [REPORT_S]
        if self._replies:
            waits.append(0.01)
        if self._muted:
            waits.append(self._muted[0][0] - now)
        if self._used:
            waits.append(self._report_at - now)
        elif not self._muted and not self._replies:
            return -1
        return max(0.0, min(waits))

    def _watch(self, sock: socket.socket, handler: Handler) -> None:
        self._handlers[sock.fileno()] = handler
        self._epoll.register(sock.fileno(), select.EPOLLIN)

    def _drop(self, sock: socket.socket) -> None:
        del self._handlers[sock.fileno()]
        self._epoll.unregister(sock.fileno())
        sock.close()

    # --- the packet path

    def _pump(self, port: _Port, flow: _Flow, now: float) -> None:
        """Move what the flow has received to the twin's flow."""
        onward = port.twin.flow
        buffer, view = self._buffer, self._view
        receive = flow.sock.recvmsg_into
        moved = 0
        for _ in range(BATCH):
            try:
                size, ancillary, _, _ = receive([buffer], 32)
            except BlockingIOError:
                break
            except OSError:
                continue  # an ICMP error about something sent earlier
            if not size:
                continue
            segment = int.from_bytes(ancillary[0][2][:4], sys.byteorder) if ancillary else size
            if onward is None or 0 in buffer[:size:segment]:
                moved += self._sort(port, flow, size, segment, now)
            elif segment >= size:
                moved += size
                _send(onward.sock, view[:size])
            else:
                moved += size
                self._send_segments(onward.sock, view[:size], segment)
        if moved:
            port.pair.at = now
            port.pair.bytes += moved
            self._used[port.pair] = port.number

    def _sort(self, port: _Port, flow: _Flow, size: int, segment: int, now: float) -> int:
        """The slow path: some datagram may be a Binding request, or the twin is not bound. Returns bytes forwarded."""
        moved = 0
        for start in range(0, size, segment):
            datagram = self._view[start : min(start + segment, size)]
            onward = port.twin.flow
            if onward is None or is_bind(datagram):
                self._hand_up(port, flow.source, flow.local, bytes(datagram), now)
            else:
                moved += len(datagram)
                _send(onward.sock, datagram)
        return moved

    def _send_segments(self, sock: socket.socket, data: memoryview, segment: int) -> None:
        ancillary = self._segmented.get(segment)
        if ancillary is None:
            ancillary = [(socket.SOL_UDP, _UDP_SEGMENT, _SEGMENT_BYTES.pack(segment))]
            self._segmented[segment] = ancillary
        try:
            sock.sendmsg([data], ancillary)
        except OSError as problem:
            if problem.errno in _NO_GSO or isinstance(problem, ConnectionRefusedError):
                for start in range(0, len(data), segment):
                    _send(sock, data[start : start + segment])

    # --- packets for the daemon

    def _listen(self, port: _Port, now: float) -> None:
        """A packet at the listener: from a source that is not bound, or from a bound one to another address of ours."""
        for _ in range(BATCH):
            if not port.bucket.has(now) or not self._bucket.has(now):
                self._epoll.modify(port.listener.fileno(), 0)
                self._muted.append((now + MUTE_S, port.listener.fileno()))
                return
            try:
                data, ancillary, flags, source = port.listener.recvmsg(MAX_DATAGRAM_BYTES, _ANCILLARY_BYTES)
            except BlockingIOError:
                return
            except OSError:
                continue
            if not flags & socket.MSG_TRUNC:
                self._hand_up(port, Endpoint.of(source[0], source[1]), _local_of(ancillary), data, now)

    def _hand_up(self, port: _Port, source: Endpoint, local: str, data: bytes, now: float) -> None:
        if len(data) > MAX_DATAGRAM_BYTES or not self._bucket.has(now) or not port.bucket.take(now):
            return
        self._bucket.take(now)
        port.remember(source, local)
        packed = source.packed()
        with suppress(OSError):
            self._control.send(PACKET + HEAD.pack(port.number, len(packed)) + packed + data)

    def _report(self, now: float) -> None:
        """Tell the usage of pairs that were used; what does not get through is told the next time."""
        self._report_at = now + REPORT_S
        pairs = list(self._used.items())
        per_message = (MAX_MESSAGE_BYTES - 1) // ONE_USAGE.size
        for start in range(0, len(pairs), per_message):
            some = pairs[start : start + per_message]
            text = b"".join(ONE_USAGE.pack(number, pair.at, pair.bytes) for pair, number in some)
            try:
                self._control.send(USAGE + text)
            except OSError:
                return
            for pair, _ in some:
                del self._used[pair]

    def _flush(self) -> None:
        """Answers to OPEN, which must not be lost."""
        with suppress(OSError):
            while self._replies:
                self._control.send(self._replies[0])
                self._replies.popleft()

    # --- the daemon's messages

    def _on_control(self, now: float) -> None:
        """All that is there, before any more packets move."""
        while self._running:
            try:
                message = self._control.recv(MAX_MESSAGE_BYTES)
            except BlockingIOError:
                return
            except OSError:
                message = b""
            if not message:
                self._running = False
                return
            kind, body = message[:1], message[1:]
            if kind == OPEN:
                self._open(*PORT_PAIR.unpack(body))
            elif kind == BIND:
                self._bind(PORT.unpack_from(body)[0], Endpoint.unpack_untrusted(body[PORT.size :]), now)
            elif kind == ANSWER:
                number, length = HEAD.unpack_from(body)
                end = HEAD.size + length
                self._answer(number, Endpoint.unpack_untrusted(body[HEAD.size : end]), body[end:])
            elif kind == CLOSE:
                self._close(*PORT.unpack(body))

    def _open(self, request: int, wanted_a: int, wanted_b: int) -> None:
        taken: list[tuple[int, socket.socket]] = []
        problem = "no relay port is left"
        try:
            for wanted in (wanted_a, wanted_b):
                taken.append(self._listener(wanted, {number for number, _ in taken}))
        except OSError as error:
            problem = f"no relay port can be opened: {error.strerror or error}"
        if len(taken) < 2:
            for _, sock in taken:
                sock.close()
            self._replies.append(OPENED + PORT_PAIR.pack(request, 0, 0) + problem.encode())
            return
        pair = _Pair()
        a, b = (_Port(number, sock, pair) for number, sock in taken)
        a.twin, b.twin = b, a
        for port in (a, b):
            self._ports[port.number] = port
            self._watch(port.listener, lambda now, port=port: self._listen(port, now))  # type: ignore[misc]
        self._replies.append(OPENED + PORT_PAIR.pack(request, a.number, b.number))

    def _listener(self, wanted: int, not_these: set[int]) -> tuple[int, socket.socket]:
        """A port and its listener: `wanted`, or one that nobody can foretell. Raises OSError."""
        if wanted:
            return wanted, _listening(wanted)
        start = int.from_bytes(os.urandom(4), "big")
        for offset in range(len(self._range)):
            number = self._range[(start + offset) % len(self._range)]
            if number in self._ports or number in not_these:
                continue
            try:
                return number, _listening(number)
            except OSError as problem:
                if problem.errno != errno.EADDRINUSE:
                    raise
        raise OSError(errno.EADDRINUSE, "all are in use")

    def _bind(self, number: int, source: Endpoint, now: float) -> None:
        port = self._ports.get(number)
        if port is None:
            return
        old = port.flow
        local = port.local_of.get(source, "")
        if old is not None and old.source == source and local in ("", old.local):
            return
        try:
            sock = _connected(number, source, local)
        except OSError:
            return  # our address is gone, or nothing leads to the source: it will bind again
        if old is not None:
            self._drop(old.sock)
        port.flow = flow = _Flow(sock, source, local)
        self._drain(port, flow, now)
        self._watch(sock, lambda now: self._pump(port, flow, now))
        with suppress(OSError):  # from here on, so that what was drained is one datagram each
            sock.setsockopt(socket.SOL_UDP, _UDP_GRO, 1)

    def _drain(self, port: _Port, flow: _Flow, now: float) -> None:
        """Between bind and connect the flow took packets from anybody: only its source's count."""
        while True:
            try:
                size, address = flow.sock.recvfrom_into(self._buffer)
            except BlockingIOError:
                return
            except OSError:
                continue
            if size and Endpoint.of(address[0], address[1]) == flow.source:
                port.pair.bytes += self._sort(port, flow, size, size, now)

    def _answer(self, number: int, to: Endpoint, data: bytes) -> None:
        port = self._ports.get(number)
        if port is None:
            return
        local = port.local_of.get(to) or (port.flow.local if port.flow and port.flow.source == to else "")
        mapped = port.listener.family == socket.AF_INET6 and not to.is_ipv6
        with suppress(OSError):
            host = _MAPPED + to.host if mapped else to.host
            port.listener.sendmsg([data], _packet_info(port.listener.family, local), 0, (host, to.port))

    def _close(self, number: int) -> None:
        port = self._ports.get(number)
        if port is None:
            return
        for side in (port, port.twin):
            del self._ports[side.number]
            self._drop(side.listener)
            if side.flow is not None:
                self._drop(side.flow.sock)
                side.flow = None
        self._used.pop(port.pair, None)


def _send(sock: socket.socket, data: memoryview) -> None:
    """Best effort. An ICMP error that is pending is reported instead of sending: once more then."""
    try:
        sock.send(data)
    except BlockingIOError:
        pass
    except OSError:
        with suppress(OSError):
            sock.send(data)


def _listening(number: int) -> socket.socket:
    """A wildcard socket of both families, or of IPv4 where there is no IPv6. Raises OSError when the port is taken."""
    try:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    except OSError:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, LISTENER_BUFFER_BYTES)
        sock.bind(("", number))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # after bind: only our own flows may join us
    except OSError:
        sock.close()
        raise
    return sock


def _connected(number: int, source: Endpoint, local: str) -> socket.socket:
    """A flow's socket. Raises OSError."""
    family = socket.AF_INET6 if source.is_ipv6 else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for forced, plain in ((_SO_RCVBUFFORCE, socket.SO_RCVBUF), (_SO_SNDBUFFORCE, socket.SO_SNDBUF)):
            try:
                sock.setsockopt(socket.SOL_SOCKET, forced, FLOW_BUFFER_BYTES)
            except OSError:
                sock.setsockopt(socket.SOL_SOCKET, plain, FLOW_BUFFER_BYTES)
        sock.bind((local, number))
        sock.connect((source.host, source.port))
    except OSError:
        sock.close()
        raise
    return sock


def _local_of(ancillary: list[tuple[int, int, bytes]]) -> str:
    """The address of ours that a packet was sent to; empty if the kernel did not say."""
    for level, kind, data in ancillary:
        if level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO:
            return socket.inet_ntop(socket.AF_INET6, data[:16]).removeprefix(_MAPPED)
        if level == socket.IPPROTO_IP and kind == _IP_PKTINFO:
            return socket.inet_ntoa(data[8:12])
    return ""


def _packet_info(family: int, local: str) -> list[tuple[int, int, bytes]]:
    """Ancillary data that makes `local` the source address."""
    if not local:
        return []
    if family == socket.AF_INET:
        return [(socket.IPPROTO_IP, _IP_PKTINFO, _IN_PKTINFO.pack(0, socket.inet_aton(local), bytes(4)))]
    address = socket.inet_pton(socket.AF_INET6, local if ":" in local else _MAPPED + local)
    return [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, _IN6_PKTINFO.pack(address, 0))]


def main() -> None:
    fd, first, last = (int(word) for word in sys.argv[1:4])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the daemon decides; Ctrl-C reaches the whole group
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (DESCRIPTORS, hard):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, max(limit, hard)))
            break
        except (OSError, ValueError):
            continue
    ForwardWorker(socket.socket(fileno=fd), range(first, last + 1)).run()
    os._exit(0)


if __name__ == "__main__":
    main()
