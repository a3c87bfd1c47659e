"""One end of a tunnel with the real port, plane and worker, told what to do by lines of JSON on its standard input.

    in   [command, argument ..]           one per line, executed in order
    out  {"answer": value}                or {"error": text}, one per command
         {"event": name, "arguments": []} trapped, moved, died, change, datagram: whenever they happen

    python -m tools.bench.endpoint PORT [user|plain|kernel]      (plain: user, one packet at a time)

The benchmark runs it, and the tests that need two machines. SAs are given as base64 of what the daemon tells its
worker.
"""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import json
import sys
from dataclasses import asdict
from typing import Any

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.child import ChildSa
from p2pvpn.core.errors import LocalError
from p2pvpn.host.guard import Guard
from p2pvpn.host.kernel_plane import KernelPlane
from p2pvpn.host.netlink import Netlink
from p2pvpn.host.underlay import Underlay
from p2pvpn.host.user_plane import UserPlane
from p2pvpn.host.worker_messages import child_fields, child_of, pack, unpack

NETWORK = "bench"


def encode_child(child: ChildSa) -> str:
    """A Child SA as the `install` command takes it."""
    return base64.b64encode(pack(child_fields(child))).decode()


def _say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


class _Endpoint:
    """The port and the plane, and a method per command."""

    def __init__(self, netlink: Netlink, underlay: Underlay, guard: Guard, plane: str) -> None:
        self.netlink, self.underlay, self.guard = netlink, underlay, guard
        self.plane: KernelPlane | UserPlane
        if plane == "kernel":
            self.plane = KernelPlane(underlay.esp_sockets, netlink, guard)
        else:
            self.plane = UserPlane(underlay.esp_sockets, netlink, guard, plain=plane == "plain")
        self.plane.extra_socket = underlay.esp_at
        self.plane.on_trapped = lambda network, packet: _say(event="trapped", arguments=[network, packet.hex()])
        self.plane.on_moved = lambda child_id, source: _say(event="moved", arguments=[child_id, str(source)])
        self.plane.on_died = lambda: _say(event="died", arguments=[])
        underlay.on_change = lambda: _say(event="change", arguments=[])
        underlay.on_datagram = lambda path, data: _say(event="datagram", arguments=[str(path), data.hex()])

    async def start(self) -> int:
        await self.plane.start()
        return self.plane.worker_pid or 0

    async def open(self, addresses: list[str], routes: list[str], mtu: int) -> str:
        return await self.plane.open_network(
            NETWORK,
            [ipaddress.ip_address(address) for address in addresses],
            [ipaddress.ip_network(route) for route in routes],
            mtu,
        )

    async def close(self) -> None:
        await self.plane.close_network(NETWORK)

    async def install(self, child: str) -> None:
        await self.plane.install(child_of(unpack(base64.b64decode(child))))

    async def use(self, child_id: int) -> None:
        await self.plane.use(child_id)

    async def connect(self, child: str) -> None:
        """Install and use."""
        sa = child_of(unpack(base64.b64decode(child)))
        await asyncio.gather(self.plane.install(sa), self.plane.use(sa.id))

    async def move(self, child_id: int, local: str, remote: str) -> None:
        await self.plane.move(child_id, Path(Endpoint.parse(local), Endpoint.parse(remote)))

    async def listen(self) -> int:
        (port,) = self.underlay.open_extra(1)
        await self.plane.listen(port)
        return port

    async def unlisten(self, port: int) -> None:
        await self.plane.unlisten(port)
        self.underlay.close_extra(port)

    async def remove(self, child_id: int) -> None:
        await self.plane.remove(child_id)

    async def inject(self, packets: list[str]) -> None:
        await self.plane.inject(NETWORK, [bytes.fromhex(packet) for packet in packets])

    async def usage(self, child_ids: list[int]) -> dict[int, dict[str, Any]]:
        return {child_id: asdict(usage) for child_id, usage in (await self.plane.usage(child_ids)).items()}

    async def counters(self) -> dict[str, int]:
        return await self.plane.counters()

    async def endpoints(self) -> list[str]:
        return [str(endpoint) for endpoint in self.underlay.local_endpoints()]

    async def send(self, local: str, remote: str, data: str) -> None:
        self.underlay.send(Path(Endpoint.parse(local), Endpoint.parse(remote)), bytes.fromhex(data))

    async def stop(self) -> None:
        await self.plane.stop()
        await self.guard.close()
        self.underlay.close()
        self.netlink.close()


_COMMANDS = {
    "start": _Endpoint.start,
    "open": _Endpoint.open,
    "close": _Endpoint.close,
    "install": _Endpoint.install,
    "use": _Endpoint.use,
    "connect": _Endpoint.connect,
    "move": _Endpoint.move,
    "listen": _Endpoint.listen,
    "unlisten": _Endpoint.unlisten,
    "remove": _Endpoint.remove,
    "inject": _Endpoint.inject,
    "usage": _Endpoint.usage,
    "counters": _Endpoint.counters,
    "endpoints": _Endpoint.endpoints,
    "send": _Endpoint.send,
    "stop": _Endpoint.stop,
}


async def serve(port: int, plane: str) -> None:
    """Open the port and carry out commands until the standard input ends."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=1 << 20)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    netlink = await Netlink.open()
    try:
        underlay = await Underlay.open(netlink, port)
    except LocalError as error:
        _say(error=str(error))
        netlink.close()
        return
    endpoint = _Endpoint(netlink, underlay, Guard(), plane)
    _say(answer=underlay.port)
    while line := await reader.readline():
        command, *arguments = json.loads(line)
        try:
            _say(answer=await _COMMANDS[command](endpoint, *arguments))  # type: ignore[operator]
        except LocalError as error:
            _say(error=str(error))
        if command == "stop":
            return
    await endpoint.stop()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "user"))
