"""A relay's user-space forwarder with what it hands up, and the sockets of those who use it; for tests on loopback."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager

from p2pvpn.core.address import Endpoint
from p2pvpn.host.forwarder import UserForwarder

V4, V6 = "127.0.0.1", "::1"


class Source:
    """A peer's socket."""

    def __init__(self, host: str = V4) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.sock = socket.socket(family, socket.SOCK_DGRAM)
        self.sock.setblocking(False)
        self.sock.bind((host, 0))
        self.at = Endpoint.of(*self.sock.getsockname()[:2])

    def send(self, port: int, data: bytes, host: str | None = None) -> None:
        self.sock.sendto(data, (host or self.at.host, port))

    async def receive(self) -> tuple[bytes, Endpoint]:
        async with asyncio.timeout(10):
            data, address = await asyncio.get_running_loop().sock_recvfrom(self.sock, 65_536)
        return data, Endpoint.of(address[0], address[1])

    async def data(self) -> bytes:
        return (await self.receive())[0]

    def is_silent(self) -> bool:
        try:
            self.sock.recv(65_536)
        except BlockingIOError:
            return True
        return False

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


class Relay:
    """A forwarder, and the packets it handed up."""

    def __init__(self, **options) -> None:
        self.forwarder = UserForwarder(**options)
        self.up: asyncio.Queue[tuple[int, Endpoint, bytes]] = asyncio.Queue()
        self.forwarder.on_unbound = lambda *packet: self.up.put_nowait(packet)

    async def handed_up(self) -> tuple[int, Endpoint, bytes]:
        async with asyncio.timeout(10):
            return await self.up.get()

    async def pair_of(self, a: Source, b: Source) -> tuple[int, int]:
        port_a, port_b = await self.forwarder.open_pair()
        self.forwarder.bind(port_a, a.at)
        self.forwarder.bind(port_b, b.at)
        await self.settled()
        return port_a, port_b

    async def settled(self) -> None:
        """The worker has done all it was told: it answers in order."""
        self.forwarder.close_pair((await self.forwarder.open_pair())[0])


async def until(condition) -> None:
    """Wait for what another process does and does not tell."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@asynccontextmanager
async def relay(**options):
    it = Relay(**options)
    await it.forwarder.start()
    try:
        yield it
    finally:
        await it.forwarder.close()


def free_range(count: int) -> range:
    """Ports that are free now, below the ephemeral ones."""
    for first in range(31_000, 32_000, count):
        socks = [socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) for _ in range(count)]
        try:
            for offset, sock in enumerate(socks):
                sock.bind(("::", first + offset))
        except OSError:
            continue
        finally:
            for sock in socks:
                sock.close()
        return range(first, first + count)
    raise AssertionError("no free ports")
