"""Roaming, case by case: how long traffic stands still when the network changes under a live connection.

    outage = run("address", seed=3)

Two peers behind port-restricted NATs talk directly, 50 ms there and back, with the losses of a campaign's lines. One
pings the other every 20 ms while something happens to its network, or to the other's. The outage is the longest time
between two answers; where the machine has no network at all for a while, the time from when it has one again to the
first answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import pairwise

from p2pvpn.mesh.network import Network
from p2pvpn.mesh.node import Node

from .application import Pinger
from .internet import LAN, Quality
from .nat import NatKind
from .plan import HUB_LINE, LINE
from .start import start_node
from .world import Home, Machine, World

ATTACH_S = 6.0
"""Everybody is attached and has published by then."""
SETTLE_S = 3.0
"""A direct path is in use, and was for a while."""
AFTER_S = 12.0
"""How long the traffic goes on after the change."""
SPACING_S = 0.02
OVERLAP_S, GAP_S = 1.0, 3.0
"""How long two networks are up at once, and how long none is."""
NIGHT_S = 8 * 3600.0
MOBILE = "ei/apd/random"
"""What a mobile network's NAT is like: one mapping for all destinations, at any port."""


@dataclass(frozen=True, slots=True)
class Outage:
    """What a run saw. `seconds` is None when nothing was answered any more."""

    case: str
    seed: int
    seconds: float | None
    lost: int
    path: str


class Scene:
    """Three hubs, a and b, each at home, and what can happen to them."""

    def __init__(self, seed: int, nat: str = "port-restricted") -> None:
        self.world = World(seed)
        self.hubs = [self.world.hub(quality=HUB_LINE) for _ in range(3)]
        self.homes = {name: self.world.home(nat, name=f"home {name}", line=LINE) for name in "ab"}
        self.a, self.b = (self.world.peer(name, behind=self.homes[name]) for name in "ab")
        self.world.publish()
        self.nodes: dict[str, Node] = {}
        self.again_at: float | None = None
        """When the machine had a network again, after a time with none."""

    def network(self, machine: Machine) -> Network:
        return next(iter(self.nodes[machine.name].networks.values()))

    def path(self) -> str:
        session = self.network(self.a).sessions.get(self.b.overlay)
        kind = session.path_kind if session is not None else None
        return "none" if kind is None else kind.value

    def elsewhere(self, nat: str = "port-restricted") -> Home:
        """Another home, on a line of its own."""
        return self.world.home(nat, line=LINE)

    def move(self, machine: Machine, nat: str = "port-restricted") -> None:
        if nat == "none":
            quality = Quality(LINE.delay_s + LAN.delay_s, LINE.jitter_s, LINE.loss, LINE.duplicate, LINE.reorder)
            machine.host.move(self.world.internet.public, "203.0.113.77", quality=quality)
            machine.home = None
        else:
            self.world.move(machine, self.elsewhere(nat))

    async def story(self, happen: Change) -> Outage:
        for machine in list(self.world.machines.values()):
            self.nodes[machine.name] = await start_node(self.world, machine)
        await asyncio.sleep(ATTACH_S)
        pinger = Pinger(self.a.host, self.b.overlay, count=None, interval_s=SPACING_S)
        await asyncio.sleep(SETTLE_S)
        began = self._time()
        await happen(self)
        await asyncio.sleep(AFTER_S)
        report = await pinger.stop()
        outage = self._outage(sorted(report.arrived_at.values()), began)
        seen = Outage("", self.world.seed, outage, len(report.lost), self.path())
        for name, node in self.nodes.items():
            if self.world.machines[name].host.is_running:
                await node.close()
        return seen

    def _time(self) -> float:
        """On the clock of a, which stands while it sleeps."""
        return self.a.host.context.run(self.world.loop.time)

    def _outage(self, arrived_at: list[float], began: float) -> float | None:
        if self.again_at is not None:
            return next((at - self.again_at for at in arrived_at if at >= self.again_at), None)
        if not arrived_at or arrived_at[-1] < began + AFTER_S / 2:
            return None
        return max(later - earlier for earlier, later in pairwise(arrived_at) if later >= began)

    def back(self) -> None:
        """The machine has a network again: count from here."""
        self.again_at = self._time()


Change = Callable[[Scene], Awaitable[None]]


async def _address(scene: Scene) -> None:
    scene.a.host.readdress(scene.a.host.interfaces[0], *scene.homes["a"].next_addresses())


async def _line(scene: Scene) -> None:
    scene.homes["a"].router.renumber("198.51.100.200")


async def _line_of_b(scene: Scene) -> None:
    scene.homes["b"].router.renumber("198.51.100.200")


async def _flush(scene: Scene) -> None:
    scene.homes["a"].router.flush()


async def _flush_of_b(scene: Scene) -> None:
    scene.homes["b"].router.flush()


async def _nat_to_nat(scene: Scene) -> None:
    scene.move(scene.a)


async def _nat_to_none(scene: Scene) -> None:
    scene.move(scene.a, "none")


async def _nat_to_symmetric(scene: Scene) -> None:
    scene.move(scene.a, "symmetric")


async def _wifi_to_lte(scene: Scene) -> None:
    """Both up for a moment."""
    wifi, lte = scene.a.host.interfaces[0], scene.elsewhere(MOBILE)
    scene.a.host.attach(lte.lan, *lte.next_addresses())
    await asyncio.sleep(OVERLAP_S)
    scene.a.host.detach(wifi)


async def _wifi_gone_then_lte(scene: Scene) -> None:
    lte = scene.elsewhere(MOBILE)
    scene.a.host.detach(scene.a.host.interfaces[0])
    await asyncio.sleep(GAP_S)
    scene.a.host.attach(lte.lan, *lte.next_addresses())
    scene.back()


async def _both_ends(scene: Scene) -> None:
    scene.move(scene.a)
    scene.move(scene.b)


async def _other_end(scene: Scene) -> None:
    scene.move(scene.b)


async def _night(scene: Scene) -> None:
    scene.a.host.suspend()
    await asyncio.sleep(NIGHT_S)
    scene.a.host.resume()
    scene.back()


async def _night_elsewhere(scene: Scene) -> None:
    """Asleep on the way to work."""
    scene.a.host.suspend()
    await asyncio.sleep(NIGHT_S)
    scene.a.host.resume()
    scene.move(scene.a)
    scene.back()


async def _nap(scene: Scene) -> None:
    scene.a.host.suspend()
    await asyncio.sleep(20.0)
    scene.a.host.resume()
    scene.back()


async def _hub_dies(scene: Scene) -> None:
    """The one that relayed."""
    session = scene.network(scene.a).sessions[scene.b.overlay]
    relay = None if session.current is None else session.current.relay
    hub = next((one for one in scene.hubs if relay is not None and one.host.owns(relay.endpoint.host)), scene.hubs[0])
    hub.host.crash()


async def _hostile(scene: Scene) -> None:
    for home in scene.homes.values():
        home.router.replace_nat(NatKind.of("symmetric"))


@dataclass(frozen=True, slots=True)
class Case:
    """What happens, in words, and behind which NATs. `most_runs`: eight hours of everybody else take a minute."""

    words: str
    happen: Change
    nat: str = "port-restricted"
    most_runs: int | None = None


CASES: dict[str, Case] = {
    "address": Case("another address on the same network (DHCP)", _address),
    "line": Case("another public address of the line", _line),
    "line-b": Case("the same, at the other end", _line_of_b),
    "nat-to-nat": Case("to another network, behind another NAT", _nat_to_nat),
    "nat-to-none": Case("to a network without a NAT", _nat_to_none),
    "nat-to-symmetric": Case("to a network with a symmetric NAT", _nat_to_symmetric),
    "other-end": Case("the other end moves to another network", _other_end),
    "both-ends": Case("both ends move at once", _both_ends),
    "wifi-lte": Case("Wi-Fi to LTE, both up for a second", _wifi_to_lte),
    "wifi-gap-lte": Case("Wi-Fi to LTE, 3 s with neither", _wifi_gone_then_lte),
    "night": Case("8 h of sleep", _night, most_runs=2),
    "night-elsewhere": Case("8 h of sleep, awake in another network", _night_elsewhere, most_runs=2),
    "nap": Case("20 s of sleep", _nap),
    "flush": Case("the NAT forgets everything", _flush),
    "flush-b": Case("the same, at the other end", _flush_of_b),
    "flush-random": Case("the same, and takes other ports", _flush, MOBILE),
    "flush-random-b": Case("the same, at the other end", _flush_of_b, MOBILE),
    "flush-relayed": Case("both symmetric, relayed: the NAT forgets", _flush, "symmetric"),
    "flush-relayed-b": Case("the same, at the other end", _flush_of_b, "symmetric"),
    "move-relayed": Case("both symmetric, relayed: to another network", _nat_to_symmetric, "symmetric"),
    "hostile": Case("both NATs become symmetric: direct to relayed", _hostile),
    "hub": Case("a hub is killed under a direct path", _hub_dies),
    "hub-relayed": Case("a hub is killed under a relayed path", _hub_dies, "symmetric"),
}


def run(case: str, seed: int) -> Outage:
    """One run of one case. Raises KeyError for an unknown one."""
    what = CASES[case]
    scene = Scene(seed, what.nat)
    with scene.world as world:
        seen = world.run(scene.story(what.happen), NIGHT_S + 600.0)
    return Outage(case, seed, seen.seconds, seen.lost, seen.path)
