"""User packets between two hosts of the dialogues: what the ESP planes would do with them, without the cryptography.

A host sends each packet over the Child SA that was put to use last; the wire delays and shuffles but never loses it; it
arrives when the receiver still accepts ESP of that SPI. So every packet that is lost was lost by the order of things.
"""

from __future__ import annotations

import heapq
import itertools
import random

from p2pvpn.core.child import ChildSa
from p2pvpn.core.output import Output
from p2pvpn.ike.outputs import InstallChild, RemoveChild, UseChild

from .world import Host, World


def is_main(child: ChildSa) -> bool:
    """The traffic is between one address on each side; other Child SAs have other selectors."""
    return child.remote[0].start == child.remote[0].end


class Planes:
    """The planes of some hosts, and what is in flight between them."""

    def __init__(self, world: World, hosts: list[Host]) -> None:
        self.world = world
        self.random = random.Random(f"traffic/{world.seed}")
        self.current: dict[Host, ChildSa | None] = dict.fromkeys(hosts)
        self.children: dict[Host, dict[int, ChildSa]] = {host: {} for host in hosts}
        self.sent = self.received = 0
        self.lost: list[str] = []
        self._order = itertools.count()
        self._flying: list[tuple[float, int, Host, int]] = []
        for host in hosts:
            self._watch(host)

    def _watch(self, host: Host) -> None:
        run = host.run

        def watched(outputs: list[Output]) -> None:
            for one in outputs:
                self._note(host, one)
            run(outputs)

        host.run = watched

    def _note(self, host: Host, one: Output) -> None:
        if isinstance(one, InstallChild):
            self.children[host][one.child.id] = one.child
        elif isinstance(one, UseChild):
            child = self.children[host][one.child_id]
            if is_main(child):
                self.current[host] = child
        elif isinstance(one, RemoveChild):
            gone = self.children[host].pop(one.child_id)
            if self.current[host] is gone:
                self.current[host] = None

    def step(self, seconds: float, delay: tuple[float, float] = (0.001, 0.5)) -> None:
        """A packet from every host, and time goes on."""
        for host, child in self.current.items():
            self.sent += 1
            if child is None:
                self.lost.append(f"{host.name} has nothing to send over")
                continue
            at = self.world.now + self.random.uniform(*delay)
            heapq.heappush(self._flying, (at, next(self._order), host, child.spi_out))
        self.run(seconds)

    def run(self, seconds: float) -> None:
        """Time goes on, and packets arrive in the middle of what IKE does."""
        end = self.world.now + seconds
        while self._flying and self._flying[0][0] <= end:
            at, _, sender, spi = heapq.heappop(self._flying)
            self.world.run(max(0.0, at - self.world.now))
            receiver = next(host for host in self.children if host is not sender)
            if any(child.spi_in == spi for child in self.children[receiver].values()):
                self.received += 1
            else:
                self.lost.append(f"{receiver.name} does not know {spi:08x}")
        self.world.run(max(0.0, end - self.world.now))
