"""Starts the real engine on a simulated machine."""

from __future__ import annotations

from collections.abc import Callable

from p2pvpn.mesh.events import MeshEvent
from p2pvpn.mesh.node import Node
from p2pvpn.mesh.tuning import Tuning

from .world import Machine, World


async def start_node(
    world: World,
    machine: Machine,
    *,
    emit: Callable[[MeshEvent], None] = lambda event: None,
    tuning: Tuning | None = None,
) -> Node:
    """The engine of `machine`, with its network up; it attaches to hubs in the background.

    `emit` hears its events; all of them also go into the world's trace.
    """

    host = machine.host

    def on_event(event: MeshEvent) -> None:
        if not host.is_running:
            return
        world.trace.note(machine.name, event.kind, str(event))
        emit(event)

    async def start() -> Node:
        node = Node(
            underlay=host.underlay,
            plane=host.plane,
            forwarder=host.forwarder if machine.is_hub else None,
            streams=host.streams,
            resolver=world.resolver,
            entropy=host.entropy,
            wall=host.wall,
            emit=on_event,
            tuning=tuning,
            port_mapper=host.port_mapper if any(home.router.pcp for home in world.homes.values()) else None,
        )
        await node.start()
        await node.add_network(machine.profile, host.store)
        return node

    return await host.spawn(start(), "start")
