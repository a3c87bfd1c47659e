"""The user plane: a worker process that encrypts, behind the `Plane` port of the engine.

Commands are written to the worker's control channel the moment they are asked for, in order; awaiting them waits for
the worker's answer, so that an SA is installed before the message that tells the peer so leaves.

A worker that dies takes all its SAs with it. They are never installed again, in a new worker either: their sequence
numbers are lost, and numbers that repeat would repeat nonces. `on_died` tells the engine to start over: close its IKE
SAs, `start` the plane again, open its networks, connect anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path as FilePath
from typing import Any

import p2pvpn
from p2pvpn.core.address import Endpoint, IpAddress, IpNetwork, Path
from p2pvpn.core.child import ChildSa
from p2pvpn.core.errors import Fault, LocalError
from p2pvpn.mesh.ports import SaUsage
from p2pvpn.mesh.rations import call_service

from .guard import Guard
from .netlink import Netlink
from .tun import MAX_MTU, MIN_MTU
from .udp import no_socket
from .worker_messages import (
    INJECT_BYTES,
    MAX_MESSAGE_BYTES,
    MOVED,
    TRAPPED,
    Op,
    child_fields,
    pack,
    path_fields,
    service_fields,
    unpack,
)
from .worker_process import AUTO, PLAIN

BATCH = 64
"""Messages of the worker taken per wake-up, so that a flood of trapped packets leaves the loop to others."""
CHANNEL_BYTES = 1 << 20
"""Buffer of the control channel in each direction: some hundred trapped packets."""
STOP_S = 2.0
"""A worker that does not end by itself in this time after its channel closed is killed."""


def _ignore(*_: object) -> None:
    """Before the engine listens."""


class UserPlane:
    """Implements `mesh.ports.Plane`. `start` it before anything else; it may be started again after `on_died`."""

    def __init__(
        self, esp_sockets: Sequence[socket.socket], netlink: Netlink, guard: Guard, *, plain: bool = False
    ) -> None:
        """`plain` is for a worker without numpy and offloads even where there are such."""
        self._kind = PLAIN if plain else AUTO
        self.on_trapped: Callable[[str, bytes], None] = _ignore
        self.on_moved: Callable[[int, Endpoint], None] = _ignore
        self.on_died: Callable[[], None] = _ignore
        """The worker ended by itself or was killed; every SA and device is gone."""
        self._esp_sockets = tuple(esp_sockets)
        self._netlink = netlink
        self._guard = guard
        self._loop = asyncio.get_running_loop()
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._channel: socket.socket | None = None
        self.extra_socket: Callable[[int], socket.socket] = no_socket
        """The ESP socket at a further port of the underlay. Raises LocalError."""
        self._outgoing: deque[tuple[bytes, tuple[int, ...]]] = deque()
        """Commands, each with the descriptors that go along."""
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._serial = 0
        self._devices: dict[str, str] = {}
        self._routes: dict[str, tuple[IpNetwork, ...]] = {}
        self._ended: asyncio.Future[None] | None = None
        self._stopping = False

    # ------------------------------------------------------------------ the process

    async def start(self) -> None:
        """Start the worker. Call it in the main thread: the worker is killed when the thread that started it ends."""
        if self._process is not None:
            raise LocalError("the user plane runs already")
        for device in self._devices.values():
            await self._guard.release(device)
        self._devices.clear()
        if not self._routes:  # else they stand in the way of plaintext until the networks are open again
            await self._netlink.clear_barriers()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            for end in (ours, theirs):
                end.setblocking(False)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CHANNEL_BYTES)
            try:
                self._process = _spawn(self._kind, [theirs.fileno(), *(sock.fileno() for sock in self._esp_sockets)])
            except OSError as error:
                ours.close()
                raise LocalError(f"starting the worker: {error.strerror}") from None
        self._stopping = False
        self._channel = ours
        self._pidfd = os.pidfd_open(self._process.pid)
        self._ended = self._loop.create_future()
        self._loop.add_reader(ours, self._on_readable)
        self._loop.add_reader(self._pidfd, self._on_exit)
        await self._ask(Op.COUNTERS)

    async def stop(self) -> None:
        """End the worker; its devices and SAs go with it. Waits until they are gone."""
        process, ended = self._process, self._ended
        if process is None or ended is None:
            return
        self._stopping = True
        self._close_channel()
        try:
            await asyncio.wait_for(asyncio.shield(ended), STOP_S)
        except TimeoutError:
            process.kill()
            await ended
        for network, device in self._devices.items():
            await self._netlink.remove_barriers(self._routes.pop(network, ()))
            await self._guard.release(device)
        self._devices.clear()

    @property
    def takes_streams(self) -> bool:
        """Whether ESP may come in by the loopback device."""
        return True

    @property
    def worker_pid(self) -> int | None:
        """The worker's process, while there is one."""
        return self._process.pid if self._process is not None else None

    def _on_exit(self) -> None:
        """The process is gone, and so are its descriptors and devices."""
        process, ended = self._process, self._ended
        assert process is not None and ended is not None  # noqa: PT018 (both are set as long as the reader is)
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        process.wait()
        self._process = None
        self._close_channel()
        ended.set_result(None)
        if not self._stopping:
            self.on_died()

    def _close_channel(self) -> None:
        if self._channel is not None:
            self._loop.remove_reader(self._channel)
            self._loop.remove_writer(self._channel)
            self._channel.close()
            self._channel = None
        self._outgoing.clear()
        waiting, self._answers = self._answers, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(LocalError("the user plane's worker is gone"))

    # ------------------------------------------------------------------ the channel

    def _ask(self, op: Op, *arguments: Any, descriptors: tuple[int, ...] = ()) -> asyncio.Future[Any]:
        """Write a command; the future has the answer, or LocalError."""
        future: asyncio.Future[Any] = self._loop.create_future()
        if self._channel is None:
            future.set_exception(LocalError("the user plane does not run"))
            return future
        self._serial += 1
        self._answers[self._serial] = future
        self._outgoing.append((pack([self._serial, op.value, *arguments]), descriptors))
        if len(self._outgoing) == 1:
            self._write()
        return future

    def _write(self) -> None:
        channel = self._channel
        while channel is not None and self._outgoing:
            try:
                data, descriptors = self._outgoing[0]
                socket.send_fds(channel, [data], descriptors)
            except BlockingIOError:
                self._loop.add_writer(channel, self._write)
                return
            except OSError:
                return  # the worker is ending; its exit is told by the pidfd
            self._outgoing.popleft()
        if channel is not None:
            self._loop.remove_writer(channel)

    def _on_readable(self) -> None:
        for _ in range(BATCH):
            if self._channel is None:
                return
            try:
                data = self._channel.recv(MAX_MESSAGE_BYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                # The worker closed its end: it is ending, or as good as dead. The pidfd tells the rest.
                self._loop.remove_reader(self._channel)
                if self._process is not None:
                    self._process.kill()
                return
            self._on_message(unpack(data))

    def _on_message(self, message: list[Any]) -> None:
        serial, *rest = message
        if serial:
            future = self._answers.pop(serial, None)
            if future is None or future.done():
                return
            if rest[0]:
                future.set_result(rest[1])
            else:
                future.set_exception(LocalError(rest[1], hint=rest[2], fault=Fault.MACHINE))
        elif rest[0] == TRAPPED:
            self.on_trapped(rest[1], rest[2])
        elif rest[0] == MOVED:
            self.on_moved(rest[1], Endpoint(rest[2], rest[3]))

    # ------------------------------------------------------------------ mesh.ports.Plane

    async def open_network(
        self, network: str, addresses: Sequence[IpAddress], routes: Sequence[IpNetwork], mtu: int
    ) -> str:
        if not MIN_MTU <= mtu <= MAX_MTU:
            raise LocalError(f"an MTU of {mtu} is not in {MIN_MTU}..{MAX_MTU}")
        device = str(await self._ask(Op.OPEN, network, *service_fields(call_service(addresses))))
        self._devices[network] = device
        try:
            await self._guard.protect(device, routes)
            await self._netlink.set_up_device(device, addresses, routes, mtu)
            self._routes[network] = tuple(routes)
            await self._netlink.add_barriers(routes)
        except BaseException:
            with contextlib.suppress(LocalError):
                await self.close_network(network)
            raise
        return device

    async def close_network(self, network: str) -> None:
        device = self._devices.pop(network, None)
        try:
            await self._ask(Op.CLOSE, network)
        finally:
            if device is not None:
                await self._netlink.remove_barriers(self._routes.pop(network, ()))
                await self._guard.release(device)

    async def install(self, child: ChildSa) -> None:
        await self._ask(Op.INSTALL, *child_fields(child))

    async def use(self, child_id: int) -> None:
        await self._ask(Op.USE, child_id)

    async def move(self, child_id: int, path: Path) -> None:
        await self._ask(Op.MOVE, child_id, *path_fields(path))

    async def remove(self, child_id: int) -> None:
        await self._ask(Op.REMOVE, child_id)

    async def listen(self, port: int) -> None:
        await self._ask(Op.LISTEN, port, descriptors=(self.extra_socket(port).fileno(),))

    async def unlisten(self, port: int) -> None:
        await self._ask(Op.UNLISTEN, port)

    async def inject(self, network: str, packets: Sequence[bytes]) -> None:
        waiting: list[asyncio.Future[Any]] = []
        batch: list[bytes] = []
        size = 0
        for packet in packets:
            if batch and size + len(packet) > INJECT_BYTES:
                waiting.append(self._ask(Op.INJECT, network, batch))
                batch, size = [], 0
            batch.append(packet)
            size += len(packet)
        if batch:
            waiting.append(self._ask(Op.INJECT, network, batch))
        await asyncio.gather(*waiting)

    async def usage(self, child_ids: Sequence[int]) -> dict[int, SaUsage]:
        answer = await self._ask(Op.USAGE, list(child_ids))
        return {child_id: SaUsage(*counters) for child_id, counters in answer.items()}

    async def counters(self) -> dict[str, int]:
        """Packets that went no further, by reason."""
        return dict(await self._ask(Op.COUNTERS))


def _spawn(kind: str, descriptors: list[int]) -> subprocess.Popen[bytes]:
    """The worker, with these descriptors: the control channel, then the ESP sockets. Raises OSError."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "p2pvpn.host.worker_process", kind, str(os.getpid()), *map(str, descriptors)],
        pass_fds=descriptors,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": _python_path(), "OPENBLAS_NUM_THREADS": "1"},
    )


def _python_path() -> str:
    """Where the worker finds this very package, whatever its working directory; nothing else is looked for there."""
    ours = str(FilePath(p2pvpn.__path__[0]).parent)
    others = os.environ.get("PYTHONPATH")
    return f"{ours}{os.pathsep}{others}" if others else ours
