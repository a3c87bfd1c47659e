"""The simulated plane: the product's own ESP engine between a host's overlay stacks and its underlay.

What the worker process does with descriptors, this does with calls: packets out of a stack are sealed and sent,
datagrams of the ESP socket are opened and given to the stack. A command takes `COMMAND_S`, as one to a worker does, so
that whoever forgets to wait for one is found out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from p2pvpn.core.address import Endpoint, IpAddress, IpNetwork, Path
from p2pvpn.core.child import ChildSa
from p2pvpn.core.errors import LocalError
from p2pvpn.esp.engine import Delivered, EspEngine, Refused, Sealed, TooBig, Trapped
from p2pvpn.mesh.ports import SaUsage
from p2pvpn.mesh.rations import call_service

from .overlay import OverlayStack

COMMAND_S = 0.000_2
"""A round trip to a worker process on an idle machine."""


class SimPlane:
    """mesh.ports.Plane. `stacks` are the open networks; `engine.drops` says what was refused and why.

    `sealed` and `opened` count ESP packets.
    """

    on_trapped: Callable[[str, bytes], None]
    on_moved: Callable[[int, Endpoint], None]

    def __init__(self, send: Callable[[Path, bytes], None]) -> None:
        self.on_trapped = _ignore_trapped
        self.on_moved = _ignore_moved
        self.engine = EspEngine()
        self.stacks: dict[str, OverlayStack] = {}
        self.sealed = 0
        self.opened = 0
        self._send = send
        self._closed = False

    # ------------------------------------------------------------------ commands

    async def open_network(
        self, network: str, addresses: Sequence[IpAddress], routes: Sequence[IpNetwork], mtu: int
    ) -> str:
        await self._obey()
        if network in self.stacks:
            raise LocalError(f"network {network} is open already")
        self.engine.serve(network, call_service(addresses))
        self.stacks[network] = OverlayStack(addresses, routes, mtu, lambda packet: self._outbound(network, packet))
        return f"sim{len(self.stacks) - 1}"

    async def close_network(self, network: str) -> None:
        await self._obey()
        self.stacks.pop(network, None)
        self.engine.remove_network(network)

    async def install(self, child: ChildSa) -> None:
        await self._obey()
        self.engine.install(child)

    async def use(self, child_id: int) -> None:
        await self._obey()
        self.engine.use(child_id)

    async def move(self, child_id: int, path: Path) -> None:
        await self._obey()
        self.engine.move(child_id, path)

    async def remove(self, child_id: int) -> None:
        await self._obey()
        self.engine.remove(child_id)

    async def listen(self, port: int) -> None:
        """Every socket of the host brings its ESP here anyway."""
        await self._obey()

    async def unlisten(self, port: int) -> None:
        await self._obey()

    async def inject(self, network: str, packets: Sequence[bytes]) -> None:
        """Packets that no SA covers even now are lost, not trapped again."""
        await self._obey()
        for packet in packets:
            self._outbound(network, packet, trap=False)

    async def usage(self, child_ids: Sequence[int]) -> dict[int, SaUsage]:
        await self._obey()
        return {child_id: SaUsage(*usage) for child_id, usage in self.engine.usage(child_ids).items()}

    def close(self) -> None:
        """The process died: nothing goes in or out any more."""
        self._closed = True
        for stack in self.stacks.values():
            stack.sockets.close()
        self.stacks.clear()

    async def _obey(self) -> None:
        await asyncio.sleep(COMMAND_S)

    # ------------------------------------------------------------------ packets

    def _outbound(self, network: str, packet: bytes, *, trap: bool = True) -> None:
        if self._closed:
            return
        loop = asyncio.get_running_loop()
        match self.engine.outbound(network, packet, loop.time()):
            case Sealed(path, datagram, _, more):
                self.sealed += 1 + len(more)
                self._send(path, datagram)
                for other in more:
                    self._send(path, other)
            case Trapped():
                if trap:
                    loop.call_soon(self.on_trapped, network, packet)
            case TooBig(reply):
                stack = self.stacks.get(network)
                if stack is not None:
                    loop.call_soon(stack.receive, reply)

    def receive(self, source: Endpoint, datagram: bytes) -> None:
        """A datagram of the ESP socket."""
        if self._closed:
            return
        loop = asyncio.get_running_loop()
        outcome = self.engine.inbound(source, datagram, loop.time())
        if isinstance(outcome, Refused):
            return
        assert isinstance(outcome, Delivered)
        self.opened += 1
        if outcome.moved is not None:
            loop.call_soon(self.on_moved, outcome.child_id, outcome.moved)
        stack = self.stacks.get(outcome.network)
        if stack is not None:
            stack.receive(outcome.packet)


def _ignore_trapped(network: str, packet: bytes) -> None:
    """Until the engine listens."""


def _ignore_moved(child_id: int, source: Endpoint) -> None:
    """Until the engine listens."""
