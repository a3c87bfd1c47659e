"""The user plane's worker process: TUN devices, ESP sockets and the table of SAs in one epoll loop.

    TUN ---- read ----> EspEngine.outbound ----> ESP socket (one per address family)
    TUN <--- write ---- EspEngine.inbound  <---- ESP socket
                              ^
    daemon <==== commands, answers, trapped packets (SOCK_SEQPACKET) ====> control

This is the loop that takes one packet after the other; `batch_worker` is the fast one, where numpy is installed and the
kernel has the offloads. Neither imports asyncio: that costs 5 to 20 times the throughput. Rules:

* Commands are executed in order. On an unknown SPI, or a packet that no SA covers, what waits on the control channel is
  taken first and the packet tried once more: the daemon may have answered an IKE request a moment ago, and the peer's
  first ESP packet can be faster than its message to us.
* It dies with the daemon (PR_SET_PDEATHSIG, and the end of the control channel), and its TUN devices with it.
* Trapped packets are told as long as the channel has room; the newest are dropped then. Answers are never dropped.
"""

from __future__ import annotations

import functools
import select
import socket
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from p2pvpn.core.address import Endpoint
from p2pvpn.core.errors import LocalError
from p2pvpn.esp.engine import Delivered, EspEngine, Reason, Refused, Sealed, TooBig, Trapped
from p2pvpn.esp.ration import Service

from .sender import Sender
from .spi_filter import SpiFilter
from .tun import Tun
from .udp import ANCILLARY_BYTES, MAX_DATAGRAM_BYTES, received
from .worker_messages import (
    MAX_MESSAGE_BYTES,
    MOVED,
    TRAPPED,
    Op,
    child_of,
    pack,
    path_of,
    service_of,
    unpack,
)

BATCH = 64
"""Packets taken from one descriptor before the others get their turn."""


class Worker:
    """All state of the process. `run` returns when the daemon is gone."""

    def __init__(self, control: socket.socket, esp_sockets: list[socket.socket]) -> None:
        self._engine = EspEngine()
        self._control = control
        self._sender = Sender({sock.family: sock for sock in esp_sockets}, self._engine.narrow_path)
        self._tuns: dict[int, tuple[str, Tun]] = {}
        self._networks: dict[str, Tun] = {}
        self._answers: deque[bytes] = deque()
        self._lost: Counter[str] = Counter()
        self._buffer = bytearray(MAX_DATAGRAM_BYTES)
        self._view = memoryview(self._buffer)
        self._alive = True
        self._waits_for_room = False
        self._epoll = select.epoll()
        control.setblocking(False)
        self._epoll.register(control.fileno(), select.EPOLLIN)
        self._handlers: dict[int, Callable[[], None]] = {control.fileno(): self._on_control}
        self._filter = SpiFilter(esp_sockets)
        for sock in esp_sockets:
            self._epoll.register(sock.fileno(), select.EPOLLIN)
            self._handlers[sock.fileno()] = functools.partial(self._on_esp, sock)
        self._extra: dict[int, socket.socket] = {}
        """Further ESP sockets by port."""
        self._received_fds: list[int] = []

    def run(self) -> None:
        """Serve until the control channel ends."""
        while self._alive:
            if self._filter.wait_s() == 0.0:
                self._filter.settle(self._engine.inbound_spis())
            for fd, events in self._epoll.poll(self._filter.wait_s()):
                if fd in self._tuns:
                    if events & select.EPOLLERR:
                        raise SystemExit("somebody removed the TUN device")
                    self._on_tun(fd)
                elif fd in self._handlers:
                    self._handlers[fd]()

    # ------------------------------------------------------------------ packets

    def _on_tun(self, fd: int) -> None:
        network, tun = self._tuns[fd]
        outbound, read = self._outbound, tun.read
        now = time.monotonic()
        for _ in range(BATCH):
            packet = read()
            if packet is None or not outbound(network, tun, packet, now):
                break
        self._sender.flush()

    def _outbound(self, network: str, tun: Tun, packet: bytes, now: float) -> bool:
        """A packet of the device. False when the device went away with the commands that were executed meanwhile."""
        result = self._engine.outbound(network, packet, now)
        if isinstance(result, Sealed):
            path, datagram, traffic_class, more = result
            self._sender.put(path, datagram, traffic_class)
            for datagram in more:
                self._sender.put(path, datagram, traffic_class)
        elif isinstance(result, Trapped):
            self._drain_control()
            if self._networks.get(network) is not tun:
                return False
            self._second_try(network, tun, packet, now)
        elif isinstance(result, TooBig) and not tun.write(result.reply):
            self._lost["device refused"] += 1
        return True

    def _second_try(self, network: str, tun: Tun, packet: bytes, now: float) -> None:
        """A packet that no SA covered, after the commands that waited were executed."""
        result = self._engine.outbound(network, packet, now)
        if isinstance(result, Sealed):
            self._transmit(result)
        elif isinstance(result, Trapped):
            self._tell([0, TRAPPED, network, packet])
        elif isinstance(result, TooBig) and not tun.write(result.reply):
            self._lost["device refused"] += 1

    def _on_esp(self, sock: socket.socket) -> None:
        take, receive, into, view = self._take, sock.recvmsg_into, [self._buffer], self._view
        is_ipv6 = sock.family == socket.AF_INET6
        now = time.monotonic()
        left = BATCH
        while left > 0:
            try:
                length, control, _, source = receive(into, ANCILLARY_BYTES)
            except BlockingIOError:
                return
            except OSError:
                left -= 1
                continue  # a soft error of an earlier datagram
            if is_ipv6:
                source = source[:2]
            size, ecn = received(control)
            left -= 1
            for at in range(0, length, size or length or 1):
                take(source, bytes(view[at : min(at + size, length) if size else length]), now, ecn)
                left -= 1

    def _take(self, source: tuple[str, int], data: bytes, now: float, ecn: int) -> None:
        """One datagram of the wire."""
        delivered = self._open(source, data, now, ecn)
        if delivered is not None:
            self._give(delivered)

    def _open(self, source: tuple[str, int], data: bytes, now: float, ecn: int) -> Delivered | None:
        """What a datagram holds for a network."""
        result = self._engine.inbound(source, data, now, ecn)
        if isinstance(result, Refused):
            if result.reason is not Reason.UNKNOWN_SPI:
                return None
            self._drain_control()
            result = self._engine.inbound(source, data, now, ecn)
            if isinstance(result, Refused):
                if result.reason is Reason.UNKNOWN_SPI:
                    self._engine.drops[Reason.UNKNOWN_SPI] += 1
                return None
        return result

    def _give(self, delivered: Delivered) -> None:
        network, child_id, packet, moved = delivered
        tun = self._networks.get(network)
        if tun is None or not tun.write(packet):
            self._lost["device refused"] += 1
        if moved is not None:
            self._tell_moved(child_id, moved)

    def _tell_moved(self, child_id: int, source: Endpoint) -> None:
        self._tell([0, MOVED, child_id, source.host, source.port])

    def _transmit(self, sealed: Sealed) -> None:
        self._sender.put(sealed.path, sealed.datagram, sealed.traffic_class)
        for datagram in sealed.more:
            self._sender.put(sealed.path, datagram, sealed.traffic_class)

    # ------------------------------------------------------------------ the daemon

    def _on_control(self) -> None:
        self._flush_answers()
        self._drain_control()

    def _drain_control(self) -> None:
        """Execute every command that waits."""
        while self._alive:
            try:
                data, self._received_fds, _, _ = socket.recv_fds(self._control, MAX_MESSAGE_BYTES, 1)
            except BlockingIOError:
                return
            except ConnectionResetError:
                data = b""
            if not data:
                self._alive = False
                return
            serial, op, *arguments = unpack(data)
            try:
                answer = [serial, True, self._execute(Op(op), arguments)]
            except LocalError as error:
                answer = [serial, False, str(error), error.hint]
            self._answers.append(pack(answer))
            self._flush_answers()

    def _flush_answers(self) -> None:
        while self._answers:
            try:
                self._control.send(self._answers[0])
            except BlockingIOError:
                self._wait_for_room(True)
                return
            except OSError:
                self._alive = False
                return
            self._answers.popleft()
        self._wait_for_room(False)

    def _wait_for_room(self, wanted: bool) -> None:
        if wanted != self._waits_for_room:
            self._waits_for_room = wanted
            self._epoll.modify(self._control.fileno(), select.EPOLLIN | (select.EPOLLOUT if wanted else 0))

    def _tell(self, event: list[Any]) -> None:
        """An event goes up if there is room and no answer waits before it."""
        try:
            if not self._answers:
                self._control.send(pack(event))
                return
        except OSError:
            pass
        self._lost[event[1]] += 1

    def _execute(self, op: Op, arguments: list[Any]) -> Any:
        """Carry a command out. Raises LocalError."""
        engine = self._engine
        match op:
            case Op.OPEN:
                return self._open_network(arguments[0], service_of(arguments[1:]))
            case Op.CLOSE:
                self._close_network(arguments[0])
            case Op.INSTALL:
                engine.install(child_of(arguments))
                self._filter.changed(added=True)
            case Op.USE:
                engine.use(arguments[0])
            case Op.MOVE:
                engine.move(arguments[0], path_of(arguments[1:]))
            case Op.REMOVE:
                engine.remove(arguments[0])
                self._filter.changed(added=False)
            case Op.LISTEN:
                self._listen(arguments[0])
            case Op.UNLISTEN:
                self._unlisten(arguments[0])
            case Op.INJECT:
                self._inject(arguments[0], arguments[1])
            case Op.USAGE:
                return {child_id: list(usage) for child_id, usage in engine.usage(arguments[0]).items()}
            case Op.COUNTERS:
                refused = {reason.name: count for reason, count in engine.drops.items()}
                return {**refused, **self._lost, **self._sender.lost}
        return None

    def _listen(self, port: int) -> None:
        """ESP comes and goes by one more socket, whose descriptor came with the command."""
        self._unlisten(port)
        sock = self._extra[port] = socket.socket(fileno=self._received_fds.pop())
        self._epoll.register(sock.fileno(), select.EPOLLIN)
        self._handlers[sock.fileno()] = functools.partial(self._on_esp, sock)
        self._filter.add(sock)
        self._sender.open_port(port, sock)

    def _unlisten(self, port: int) -> None:
        sock = self._extra.pop(port, None)
        if sock is not None:
            self._sender.close_port(port)
            self._filter.remove(sock)
            self._epoll.unregister(sock.fileno())
            del self._handlers[sock.fileno()]
            sock.close()

    def _open_network(self, network: str, service: Service) -> str:
        if network in self._networks:
            raise LocalError(f"the network {network!r} has a device already")
        tun = self._new_tun()
        self._networks[network] = tun
        self._engine.serve(network, service)
        self._tuns[tun.fd] = (network, tun)
        self._epoll.register(tun.fd, select.EPOLLIN)
        return tun.name

    def _new_tun(self) -> Tun:
        return Tun()

    def _close_network(self, network: str) -> None:
        self._engine.remove_network(network)
        self._filter.changed(added=False)
        tun = self._networks.pop(network, None)
        if tun is not None:
            self._epoll.unregister(tun.fd)
            del self._tuns[tun.fd]
            tun.close()

    def _inject(self, network: str, packets: list[bytes]) -> None:
        """Packets that were trapped before; what no SA covers even now is dropped, not trapped again."""
        now = time.monotonic()
        tun = self._networks.get(network)
        for packet in packets:
            result = self._engine.outbound(network, packet, now)
            if isinstance(result, Sealed):
                self._transmit(result)
            elif isinstance(result, TooBig) and tun is not None:
                tun.write(result.reply)
            elif isinstance(result, Trapped):
                self._lost["injected too early"] += 1
        self._sender.flush()
