"""The relay forwarder in user space: the daemon's end, which implements `mesh.ports.Forwarder`.

Packets move in a process of their own (`forward_worker`). This end keeps a mirror of ports and bindings: a worker that
dies is started again with the same ports and bindings, since forwarding has no state beyond them, and peers notice
nothing but the packets lost in between.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

import p2pvpn
from p2pvpn.core.address import Endpoint
from p2pvpn.core.errors import LocalError

from .forward_worker import (
    ANSWER,
    BIND,
    CLOSE,
    HEAD,
    MAX_MESSAGE_BYTES,
    ONE_USAGE,
    OPEN,
    OPENED,
    PACKET,
    PORT,
    PORT_PAIR,
    USAGE,
)

DEFAULT_PORTS = range(20_000, 30_000)
"""Below the kernel's ephemeral ports (32768 and up), above what services listen on: one line in a firewall."""
RESTART_S = 1.0
"""Before a worker that died is replaced, so that one that cannot live does not eat the machine."""
STOP_S = 2.0
"""A worker ends at once when its control socket closes; after this it is killed."""
MAX_BACKLOG = 1024
"""Messages that wait for a busy worker; beyond it answers are dropped, like any packet."""

_log = logging.getLogger(__name__)


class UserForwarder:
    """`mesh.ports.Forwarder` over a worker process. `start` before use, `close` at the end."""

    def __init__(self, ports: range = DEFAULT_PORTS, *, restart_s: float = RESTART_S) -> None:
        self.on_unbound: Callable[[int, Endpoint, bytes], None] = _ignore
        self._range = ports
        self._restart_s = restart_s
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._restart: asyncio.TimerHandle | None = None
        self._backlog: deque[bytes] = deque()
        self._requests: dict[int, asyncio.Future[tuple[int, int]]] = {}
        self._next_request = 1
        self._twins: dict[int, int] = {}
        self._bound: dict[int, Endpoint] = {}
        self._usage: dict[int, tuple[float, int]] = {}
        self._earlier_bytes: dict[int, int] = {}

    @property
    def pid(self) -> int | None:
        """The worker's process, while it lives."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Start the worker. Raises LocalError."""
        try:
            self._spawn()
        except OSError as problem:
            raise LocalError(f"cannot start the relay process: {problem}") from problem

    async def close(self) -> None:
        """End the worker and with it every pair."""
        if self._restart is not None:
            self._restart.cancel()
        process, self._process = self._process, None
        self._hang_up("the relay was closed")
        if process is not None:
            loop = asyncio.get_running_loop()
            try:
                await loop.run_in_executor(None, process.wait, STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                await loop.run_in_executor(None, process.wait)

    # --- mesh.ports.Forwarder

    async def open_pair(self) -> tuple[int, int]:
        if self._control is None:
            raise LocalError("the relay process does not run")
        request, self._next_request = self._next_request, self._next_request + 1
        answer: asyncio.Future[tuple[int, int]] = asyncio.get_running_loop().create_future()
        self._requests[request] = answer
        self._tell(OPEN + PORT_PAIR.pack(request, 0, 0))
        try:
            return await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                self.close_pair(answer.result()[0])
            raise
        finally:
            del self._requests[request]

    def bind(self, port: int, source: Endpoint) -> None:
        if port in self._twins:
            self._bound[port] = source
            self._tell(BIND + PORT.pack(port) + source.packed())

    def answer(self, port: int, to: Endpoint, data: bytes) -> None:
        if port in self._twins and len(self._backlog) < MAX_BACKLOG:
            packed = to.packed()
            self._tell(ANSWER + HEAD.pack(port, len(packed)) + packed + data)

    def used_at(self, port: int) -> tuple[float, int]:
        """As `mesh.ports.Forwarder` has it, up to a second old; (0.0, 0) for what was never used or is closed."""
        return self._usage.get(self._key(port), (0.0, 0))

    def close_pair(self, port: int) -> None:
        if port not in self._twins:
            return
        key, twin = self._key(port), self._twins[port]
        for number in (port, twin):
            del self._twins[number]
            self._bound.pop(number, None)
        self._usage.pop(key, None)
        self._earlier_bytes.pop(key, None)
        self._tell(CLOSE + PORT.pack(port))

    # --- the worker

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        words = [str(theirs.fileno()), str(self._range[0]), str(self._range[-1])]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "p2pvpn.host.forward_worker", *words],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": _our_path()},
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self._control = ours
        asyncio.get_running_loop().add_reader(ours, self._on_readable)

    def _respawn(self) -> None:
        """A new worker with the pairs and bindings of the former one."""
        self._restart = None
        try:
            self._spawn()
        except OSError as problem:
            _log.error("cannot start the relay process again: %s", problem)
            self._restart = asyncio.get_running_loop().call_later(self._restart_s, self._respawn)
            return
        self._earlier_bytes = {port: total for port, (_, total) in self._usage.items()}
        for port, twin in self._twins.items():
            if port == self._key(port):
                self._tell(OPEN + PORT_PAIR.pack(0, port, twin))
        for port, source in self._bound.items():
            self._tell(BIND + PORT.pack(port) + source.packed())

    def _hang_up(self, reason: str) -> None:
        if self._control is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._control)
            loop.remove_writer(self._control)
            self._control.close()
            self._control = None
        self._backlog.clear()
        for answer in self._requests.values():
            if not answer.done():
                answer.set_exception(LocalError(reason))

    def _worker_died(self) -> None:
        assert self._process is not None
        code = self._process.wait()  # its control socket is closed, so it is gone
        self._process = None
        _log.error("the relay process ended with code %d, it is started again", code)
        self._hang_up("the relay process ended")
        self._restart = asyncio.get_running_loop().call_later(self._restart_s, self._respawn)

    def _tell(self, message: bytes) -> None:
        """In order; waits in the backlog while the worker is busy."""
        if self._control is None:
            return  # told by `_respawn`
        if not self._backlog:
            try:
                self._control.send(message)
                return
            except BlockingIOError:
                asyncio.get_running_loop().add_writer(self._control, self._on_writable)
            except OSError:
                return  # `_on_readable` sees the end
        self._backlog.append(message)

    def _on_writable(self) -> None:
        assert self._control is not None
        try:
            while self._backlog:
                self._control.send(self._backlog[0])
                self._backlog.popleft()
        except BlockingIOError:
            return
        except OSError:
            self._backlog.clear()
        asyncio.get_running_loop().remove_writer(self._control)

    def _on_readable(self) -> None:
        for _ in range(64):  # then other callbacks have their turn
            if self._control is None:
                return
            try:
                message = self._control.recv(MAX_MESSAGE_BYTES)
            except BlockingIOError:
                return
            except OSError:
                message = b""
            if not message:
                self._worker_died()
                return
            self._on_message(message[:1], message[1:])

    def _on_message(self, kind: bytes, body: bytes) -> None:
        if kind == PACKET:
            port, length = HEAD.unpack_from(body)
            end = HEAD.size + length
            if port in self._twins:
                self.on_unbound(port, Endpoint.unpack_untrusted(body[HEAD.size : end]), body[end:])
        elif kind == USAGE:
            for port, at, total in ONE_USAGE.iter_unpack(body):
                if port in self._twins:
                    key = self._key(port)
                    self._usage[key] = (at, total + self._earlier_bytes.get(key, 0))
        elif kind == OPENED:
            self._on_opened(body)

    def _on_opened(self, body: bytes) -> None:
        request, port_a, port_b = PORT_PAIR.unpack_from(body)
        answer = self._requests.get(request)
        if answer is not None and not answer.done():
            if port_a:
                self._twins |= {port_a: port_b, port_b: port_a}
                answer.set_result((port_a, port_b))
            else:
                answer.set_exception(LocalError(body[PORT_PAIR.size :].decode()))
        elif request and port_a:
            self._tell(CLOSE + PORT.pack(port_a))  # whoever asked has left
        elif not port_a:
            _log.error("a relay pair is lost: %s", body[PORT_PAIR.size :].decode())

    def _key(self, port: int) -> int:
        """The lower port of the pair names it."""
        return min(port, self._twins.get(port, port))


def _our_path() -> str:
    """PYTHONPATH for the worker: it must find the package that runs here."""
    ours, former = str(Path(p2pvpn.__file__).parent.parent), os.environ.get("PYTHONPATH", "")
    return ours + (os.pathsep + former if former else "")


def _ignore(port: int, source: Endpoint, data: bytes) -> None:
    """Until the relay listens."""
