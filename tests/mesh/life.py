"""A small simulated life: three hubs, peers a and b, the real engine on each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from p2pvpn.mesh.events import MeshEvent
from p2pvpn.mesh.network import Network
from p2pvpn.mesh.node import Node
from p2pvpn.mesh.tuning import Tuning
from p2pvpn.sim.application import Pinger, Report
from p2pvpn.sim.internet import Quality
from p2pvpn.sim.start import start_node
from p2pvpn.sim.world import Home, Machine, World

ATTACH_S = 5.0
"""Virtual seconds in which everybody is attached."""


class Life:
    """Builds the world, runs a story in it, and answers questions about it."""

    def __init__(
        self,
        seed: int,
        nat_a: str = "port-restricted",
        nat_b: str = "port-restricted",
        tuning: Tuning | None = None,
        *,
        pcp: bool | str = False,
        hub_delays_s: Sequence[float] = (0.010, 0.010, 0.010),
    ) -> None:
        """With `pcp` the routers map ports, or that of the peer of this name does; the delays are of hubs' lines."""
        self.world = World(seed)
        self.tuning = tuning
        self.hubs = [self.world.hub(quality=Quality(delay_s=delay_s)) for delay_s in hub_delays_s]
        self.homes: dict[str, Home] = {}
        self._pcp = pcp
        self.a = self._peer("a", nat_a)
        self.b = self._peer("b", nat_b)
        self.world.publish()
        self.nodes: dict[str, Node] = {}
        self.events: list[tuple[str, MeshEvent]] = []
        self.watch: Callable[[], Coroutine[Any, Any, None]] | None = None
        """Runs beside the start, if it is given."""

    def _peer(self, name: str, nat: str) -> Machine:
        if nat == "none":
            return self.world.peer(name)
        self.homes[name] = self.world.home(nat, name=f"home {name}", pcp=self._pcp in (True, name))
        return self.world.peer(name, behind=self.homes[name])

    def run(self, story: Coroutine[Any, Any, None], limit_s: float = 7200.0) -> None:
        """Start everybody, let them attach, tell the story, end everybody."""

        async def whole() -> None:
            for machine in list(self.world.machines.values()):
                await self.start(machine)
            watching = asyncio.create_task(self.watch()) if self.watch is not None else None
            await asyncio.sleep(ATTACH_S)
            if watching is not None:
                await watching
            await story
            for name, node in self.nodes.items():
                if self.world.machines[name].host.is_running:
                    await node.close()

        with self.world:
            self.world.run(whole(), limit_s)

    async def start(self, machine: Machine) -> Node:
        name = machine.name

        def hear(event: MeshEvent) -> None:
            self.events.append((name, event))

        self.nodes[name] = node = await start_node(self.world, machine, emit=hear, tuning=self.tuning)
        return node

    def network(self, machine: Machine) -> Network:
        return next(iter(self.nodes[machine.name].networks.values()))

    def path(self, machine: Machine, other: Machine) -> str | None:
        """How `machine` reaches `other` now."""
        session = self.network(machine).sessions.get(other.overlay)
        kind = session.path_kind if session is not None else None
        return kind.value if kind is not None else None

    def remote(self, machine: Machine, other: Machine) -> str:
        """Where `machine` sends to reach `other`."""
        current = self.network(machine).sessions[other.overlay].current
        assert current is not None
        return str(current.path.remote)

    async def ping(self, machine: Machine, other: Machine, count: int = 20, interval_s: float = 0.05) -> Report:
        return await Pinger(machine.host, other.overlay, count=count, interval_s=interval_s).done()

    def heard(self, machine: Machine, kind: type[MeshEvent]) -> list[MeshEvent]:
        """Events of one kind at one machine."""
        return [event for name, event in self.events if name == machine.name and isinstance(event, kind)]

    def relaying_hub(self) -> Machine:
        """The hub whose relay a's SA with b began on."""
        session = self.network(self.a).sessions[self.b.overlay]
        assert session.current is not None
        assert session.current.relay is not None
        address = session.current.relay.endpoint.host
        return next(hub for hub in self.hubs if hub.host.owns(address))
