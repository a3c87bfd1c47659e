"""How the worker sends: many datagrams of one size to one path by one system call.

UDP_SEGMENT lets the kernel cut one large write into datagrams of equal size, of which the last may be shorter. A burst
of packets from the TUN device mostly is such a run: full segments of one flow, or its acknowledgements. `put` gathers a
run, and `flush` sends it when the burst is read, so nothing waits. Where the kernel or the network card cannot do it,
datagrams go one by one.
"""

from __future__ import annotations

import errno
import select
import socket
import struct
from collections import Counter
from collections.abc import Callable, Sequence

from p2pvpn.core.address import Endpoint, Path

from .udp import Ancillary, allow_fragments, ancillary, path_mtu

MAX_RUN = 60
"""Datagrams of one call; the kernel takes 64 at least."""
MAX_RUN_BYTES = 65000
"""Bytes of one call; with headers they must fit an IPv4 packet."""
ROOM_WAIT_MS = 20
"""How long a full socket may hold the worker up: the card is slower than the sources, and what the device queues
meanwhile slows them down, where a loss would only make them send it again."""
MAX_WAYS = 4096
"""Paths whose socket and address are remembered."""

_SOL_UDP, _UDP_SEGMENT = 17, 103
_NO_SEGMENTATION = (errno.EIO, errno.EINVAL, errno.EOPNOTSUPP)
"""What a card without checksum offload (EIO) or an old kernel answers."""


class _Way:
    """How a path is sent to: socket, address, and control messages by traffic class."""

    __slots__ = ("address", "by_class", "path", "plain", "sock")

    def __init__(self, path: Path, sock: socket.socket) -> None:
        self.path = path
        self.sock = sock
        self.address = (path.remote.host, path.remote.port)
        self.plain = path.local.is_unspecified
        self.by_class: dict[int, Ancillary] = {}

    def control(self, traffic_class: int) -> Ancillary:
        found = self.by_class.get(traffic_class)
        if found is None:
            found = self.by_class[traffic_class] = ancillary(self.path, traffic_class)
        return found

    def send(self, datagram: bytes | memoryview, traffic_class: int) -> None:
        """Raises OSError."""
        try:
            if self.plain and not traffic_class:
                self.sock.sendto(datagram, self.address)
            else:
                self.sock.sendmsg((datagram,), self.control(traffic_class), 0, self.address)
        except BlockingIOError:
            self._wait()
            self.sock.sendmsg((datagram,), self.control(traffic_class), 0, self.address)

    def send_run(self, pieces: Sequence[bytes | memoryview], size: int, traffic_class: int) -> None:
        """Datagrams of `size` bytes. Raises OSError."""
        control = [*self.control(traffic_class), (_SOL_UDP, _UDP_SEGMENT, struct.pack("=H", size))]
        try:
            self.sock.sendmsg(pieces, control, 0, self.address)
        except BlockingIOError:
            self._wait()
            self.sock.sendmsg(pieces, control, 0, self.address)

    def _wait(self) -> None:
        """Until the socket has room, or for a while."""
        poll = select.poll()
        poll.register(self.sock, select.POLLOUT)
        poll.poll(ROOM_WAIT_MS)


class Sender:
    """The ESP sockets' sending side. `on_narrow(remote, mtu)` is told when a path carries less than thought."""

    def __init__(self, sockets: dict[int, socket.socket], on_narrow: Callable[[Endpoint, int], None]) -> None:
        self.lost: Counter[str] = Counter()
        """Datagrams that the kernel would not send, by the name of the error."""
        self._sockets = sockets
        self._extra: dict[int, socket.socket] = {}
        """Further IPv4 sockets by port, for paths that begin there."""
        self._on_narrow = on_narrow
        self._segments = True
        self._ways: dict[Path, _Way] = {}
        self._run: list[bytes] = []
        self._path: Path | None = None
        self._class = 0
        self._size = 0
        self._room = 0

    def open_port(self, port: int, sock: socket.socket) -> None:
        """Paths that begin at this port go from this socket."""
        self.flush()
        self._extra[port] = sock
        self._ways.clear()

    def close_port(self, port: int) -> None:
        """Not any more."""
        self.flush()
        del self._extra[port]
        self._ways.clear()

    def put(self, path: Path, datagram: bytes, traffic_class: int) -> None:
        """Send the datagram now or at the next `flush`, in order with the others."""
        size = len(datagram)
        run = self._run
        if run and (
            size > self._size
            or size > self._room
            or path is not self._path
            or traffic_class != self._class
            or len(run) == MAX_RUN
        ):
            self.flush()
        if not run:
            self._path = path
            self._class = traffic_class
            self._size = size
            self._room = MAX_RUN_BYTES
        run.append(datagram)
        self._room -= size
        if size < self._size:
            self.flush()

    def flush(self) -> None:
        """Send what was gathered."""
        run, path = self._run, self._path
        if not run or path is None:
            return
        way = self._ways.get(path) or self._open_way(path)
        if way is None:
            self.lost["no address family"] += len(run)
        elif len(run) == 1 or not self._send_run(way, run, self._size, len(run), self._class):
            for datagram in run:
                self._send_one(way, datagram, self._class)
        run.clear()

    def put_rows(self, path: Path, rows: memoryview, size: int, traffic_class: int) -> None:
        """Send datagrams of `size` bytes that lie one behind the other, the last perhaps shorter; MAX_RUN_BYTES and
        the kernel's 64 datagrams at most. They are sent when this returns, after those that were `put` before."""
        self.flush()
        way = self._ways.get(path) or self._open_way(path)
        count = -(-len(rows) // size)
        if way is None:
            self.lost["no address family"] += count
        elif count == 1 or not self._send_run(way, (rows,), size, count, traffic_class):
            for at in range(0, len(rows), size):
                self._send_one(way, rows[at : at + size], traffic_class)

    def _send_run(
        self, way: _Way, pieces: Sequence[bytes | memoryview], size: int, count: int, traffic_class: int
    ) -> bool:
        """One call for the whole run; False when each datagram must be tried by itself."""
        if not self._segments:
            return False
        try:
            way.send_run(pieces, size, traffic_class)
        except OSError as error:
            if error.errno in _NO_SEGMENTATION:
                self._segments = False
            elif error.errno != errno.EMSGSIZE:
                self._count(error, count)
                return True
            return False
        return True

    def _send_one(self, way: _Way, datagram: bytes | memoryview, traffic_class: int) -> None:
        """A datagram by itself. When it is too big, the path is narrower than thought: that is learned, and this one
        goes in fragments; so do IPv6 packets of the minimum MTU over paths that are narrower still."""
        try:
            way.send(datagram, traffic_class)
        except OSError as error:
            if error.errno != errno.EMSGSIZE:
                self._count(error, 1)
                return
            mtu = path_mtu(way.path)
            if mtu is not None:
                self._on_narrow(way.path.remote, mtu)
            self._send_in_fragments(way, datagram, traffic_class)

    def _send_in_fragments(self, way: _Way, datagram: bytes | memoryview, traffic_class: int) -> None:
        allow_fragments(way.sock, allowed=True)
        try:
            way.send(datagram, traffic_class)
        except OSError as error:
            self._count(error, 1)
        finally:
            allow_fragments(way.sock, allowed=False)

    def _count(self, error: OSError, datagrams: int) -> None:
        self.lost[errno.errorcode.get(error.errno or 0, "unknown error")] += datagrams

    def _open_way(self, path: Path) -> _Way | None:
        family = socket.AF_INET6 if path.remote.is_ipv6 else socket.AF_INET
        sock = self._extra.get(path.local.port) or self._sockets.get(family)
        if sock is None:
            return None
        if len(self._ways) >= MAX_WAYS:
            self._ways.clear()
        way = self._ways[path] = _Way(path, sock)
        return way
