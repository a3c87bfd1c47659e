"""One end of a stream: a TCP connection on one side, a UDP socket on a loopback address on the other.

    TCP --> TLS --> frames --> datagrams --> UDP socket --> our own UDP port (or a relay port of ours)
    TCP <-- TLS <-- frames <-- datagrams <-- UDP socket <--

Datagrams of one size and SPI go to the socket in one call (UDP_SEGMENT) and come from it so (UDP_GRO): the kernel cuts
and joins them. When TCP stalls, the oldest datagrams are dropped: what waits too long is worth less than what is new,
and the sources slow down by what is missing, as they would on UDP.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence

from p2pvpn.core.errors import WireError
from p2pvpn.ike.stream import FrameReader, build_frame

from .tls import TlsPipe
from .udp import ANCILLARY_BYTES, MAX_DATAGRAM_BYTES, received

MAX_WAITING_BYTES = 256 << 10
"""Datagrams that wait for TCP: 50 ms at 40 Mbit/s, more would be delay and nothing else."""
WRITE_AHEAD_BYTES = 64 << 10
"""Sealed bytes that wait for the TCP socket before datagrams do."""
UNSENT_BYTES = 128 << 10
"""What the kernel takes beyond what is in flight (TCP_NOTSENT_LOWAT): its own buffer may be 4 MB of delay."""
SILENCE_MS = 8_000
"""Bytes that TCP gets no word of for so long: the connection is dead (TCP_USER_TIMEOUT, RFC 5482)."""
KEEPALIVE_S, KEEPALIVE_PAUSE_S = 45, 5
"""TCP's own keepalives on an idle connection: routers forget one after five minutes (RFC 5382 asks for two hours), and
a hub that is gone is noticed."""
BATCH = 16
"""Reads of the UDP socket before others have their turn; with UDP_GRO up to 64 KB each."""
MAX_RUN = 60
MAX_RUN_BYTES = 60_000
"""Of one call with UDP_SEGMENT."""
SOCKET_BYTES = 1 << 20

_SOL_UDP, _UDP_SEGMENT, _UDP_GRO = 17, 103, 104
_TCP_USER_TIMEOUT, _TCP_NOTSENT_LOWAT = 18, 25
_SO_RCVBUFFORCE = 33
_SEGMENT = struct.Struct("=H")
_ESP_FIRST = 0xC0


class StreamEnd(asyncio.Protocol):
    """`on_ready` is called when TLS is up, `on_head` when a client has said what it wants (0 or a relay port), both
    at most once; `on_closed` when it is over, in any case.
    """

    def __init__(self, tls: TlsPipe | None, *, server: bool) -> None:
        """Without `tls` it is a plain stream."""
        self.on_ready: Callable[[], None] = lambda: None
        self.on_head: Callable[[int], None] = lambda port: None
        self.on_closed: Callable[[], None] = lambda: None
        self.tls = tls
        self.failure: WireError | None = None
        self.dropped = 0
        """Datagrams that TCP was too slow for."""
        self.heard_at = asyncio.get_running_loop().time()
        """When the other side last sent anything."""
        self._server = server
        self._reader = FrameReader(wants_head=server)
        self._transport: asyncio.Transport | None = None
        self._udp: socket.socket | None = None
        self._loop = asyncio.get_running_loop()
        self._is_paused = False
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._closed = False
        self._segments = True

    # TCP.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=WRITE_AHEAD_BYTES)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, SILENCE_MS)
                sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, UNSENT_BYTES)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_PAUSE_S)
        if self.tls is not None and not self._server:
            self.tls.start()
            self._flush()

    def data_received(self, data: bytes) -> None:
        self.heard_at = self._loop.time()
        try:
            self._take_untrusted(data)
        except WireError as problem:
            self.failure = problem
            self._flush()  # TLS says why
            self.close()

    def _take_untrusted(self, data: bytes) -> None:
        if self.tls is not None:
            was_ready = self.tls.is_ready
            data = self.tls.receive_untrusted(data)
            self._flush()
            if self.tls.is_ready and not was_ready:
                self.on_ready()
        had_head = self._reader.port is not None
        datagrams = self._reader.feed_untrusted(data) if data else []
        if not had_head and self._reader.port is not None:
            self.on_head(self._reader.port)
        if self._udp is not None and datagrams:
            self._deliver(self._udp, datagrams)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, problem: Exception | None) -> None:
        self.close()

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False
        frames, self._waiting, self._waiting_bytes = b"".join(self._waiting), deque(), 0
        if frames:
            self.write(frames)

    def write(self, data: bytes) -> None:
        """Send bytes of the stream."""
        if self._closed or self._transport is None:
            return
        if self.tls is None:
            self._transport.write(data)
        else:
            self.tls.seal(data)
            self._flush()

    def _flush(self) -> None:
        assert self.tls is not None
        data = self.tls.take()
        if data and self._transport is not None:
            self._transport.write(data)

    # UDP.

    def attach(self, udp: socket.socket) -> None:
        """Exchange datagrams with this connected socket from now on; it is ours to close."""
        udp.setblocking(False)
        with contextlib.suppress(OSError):
            udp.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, SOCKET_BYTES)
        with contextlib.suppress(OSError):
            udp.setsockopt(_SOL_UDP, _UDP_GRO, 1)
        self._udp = udp
        self._loop.add_reader(udp, self._on_udp, udp)

    def _on_udp(self, udp: socket.socket) -> None:
        frames: list[bytes] = []
        for _ in range(BATCH):
            try:
                data, control, _, _ = udp.recvmsg(MAX_DATAGRAM_BYTES, ANCILLARY_BYTES)
            except BlockingIOError:
                break
            except OSError:
                continue  # a soft error of an earlier datagram
            size = received(control)[0] or len(data)
            frames += [build_frame(data[at : at + size]) for at in range(0, len(data), size or 1)]
        if not self._is_paused:
            self.write(b"".join(frames))
            return
        for frame in frames:
            self._waiting.append(frame)
            self._waiting_bytes += len(frame)
        while self._waiting_bytes > MAX_WAITING_BYTES:
            self._waiting_bytes -= len(self._waiting.popleft())
            self.dropped += 1

    def _deliver(self, udp: socket.socket, datagrams: Sequence[bytes]) -> None:
        at, count = 0, len(datagrams)
        while at < count:
            end = self._run_end(datagrams, at)
            if end - at == 1 or not self._send_run(udp, datagrams[at:end]):
                for datagram in datagrams[at:end]:
                    with contextlib.suppress(OSError):  # full, or nobody listens: lost, as on UDP
                        udp.send(datagram)
            at = end

    def _run_end(self, datagrams: Sequence[bytes], start: int) -> int:
        """Where a run of ESP of one SA ends: all of one size, but for a shorter last one."""
        first = datagrams[start]
        size = len(first)
        end = start + 1
        if not self._segments or first[0] < _ESP_FIRST:
            return end
        limit = min(len(datagrams), start + MAX_RUN, start + max(1, MAX_RUN_BYTES // size))
        while end < limit and len(datagrams[end]) <= size and datagrams[end][:4] == first[:4]:
            end += 1
            if len(datagrams[end - 1]) < size:
                break
        return end

    def _send_run(self, udp: socket.socket, run: Sequence[bytes]) -> bool:
        try:
            udp.sendmsg(run, [(_SOL_UDP, _UDP_SEGMENT, _SEGMENT.pack(len(run[0])))])
        except BlockingIOError:
            return True
        except OSError:
            self._segments = False
            return False
        return True

    # The end.

    @property
    def waiting_bytes(self) -> int:
        """Bytes that wait for TCP."""
        return self._waiting_bytes

    @property
    def local_host(self) -> str:
        """Our address of the TCP connection."""
        name = self._transport.get_extra_info("sockname") if self._transport is not None else None
        return str(name[0]) if name else ""

    @property
    def is_closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """End the connection, whatever still waits."""
        if self._closed:
            return
        self._closed = True
        self._waiting.clear()
        if self._udp is not None:
            self._loop.remove_reader(self._udp)
            self._udp.close()
        if self._transport is not None:
            if self.failure is None:
                self._transport.abort()
            else:
                self._transport.close()
        self.on_closed()
