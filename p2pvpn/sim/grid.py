"""The NAT grid: two peers, each somewhere, three hubs, and how the two come together, judged by the oracle.

A *place* is a NAT (or none), perhaps in a carrier's network that translates again, perhaps with IPv6. A *cell* is two
places. `run` simulates one: the peers attach, one pings the other, the first answer is timed, then the moment from
which both ends say that the path is direct. Checks are counted on the wire, where they leave the peers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from itertools import combinations_with_replacement

from p2pvpn.core.datagram import Kind, classify
from p2pvpn.mesh.events import MeshEvent, PathChanged, PeerConnected
from p2pvpn.mesh.network import Network
from p2pvpn.mesh.node import Node

from .application import Pinger, ping
from .internet import Crossing
from .loop import DEFAULT_LIMIT_S
from .nat import Ports, Rule
from .oracle import Verdict
from .start import start_node
from .world import Home, Machine, World

HUBS = 3
ATTACH_S = 15.0
"""A peer is attached to two hubs by then, wherever it is."""
PUBLISH_S = 0.5
"""From the attachment until the locators are published."""
PING_S = 0.1
"""Between two packets of the caller."""
WAIT_S = {
    Verdict.DIRECT: 10.0,
    Verdict.PREDICTED: 60.0,
    Verdict.BIRTHDAY: 60.0,
    Verdict.RELAYED: 20.0,
    Verdict.STREAM: 20.0,
}
"""How long a direct path is waited for: sending alone, guesses at a bounded rate, and to see that there is none."""
POLL_S = 0.02
END_PINGS, END_WAIT_S = 3, 2.0
"""In the end the two must still reach each other."""


class Six(Enum):
    """IPv6 at a place, besides IPv4."""

    NO = ""
    OPEN = "open"
    FILTERED = "filtered"
    """Behind a firewall that lets answers in alone (RFC 6092)."""
    ONLY = "only"
    """The same, and there is no IPv4."""


class Shared(Enum):
    """What two peers have in common."""

    NOTHING = ""
    LAN = "LAN"
    CARRIER = "carrier"
    """The network of the carrier whose NAT both homes are behind."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one peer is: `nat` and `carrier` are kinds of NAT by name; `none` is a public address."""

    nat: str = "none"
    carrier: str = ""
    six: Six = Six.NO
    blocks_udp: bool = False

    def __str__(self) -> str:
        words = [self.nat] + ([f"in {self.carrier}"] if self.carrier else [])
        words += [f"IPv6 {self.six.value}"] if self.six is not Six.NO else []
        return " ".join(words + (["no UDP"] if self.blocks_udp else []))


@dataclass(frozen=True, slots=True)
class Cell:
    """Two places; if they share the LAN or the carrier, that of `one` counts."""

    one: Place
    other: Place
    shared: Shared = Shared.NOTHING

    def __str__(self) -> str:
        return f"{self.one} - {self.other}" + (
            f", same {self.shared.value}" if self.shared is not Shared.NOTHING else ""
        )


PORT_RESTRICTED, SYMMETRIC = "ei/apd/random", "apd/apd/random"
ALLOCATIONS = (Ports.RANDOM, Ports.SEQUENTIAL, Ports.PRESERVE)
NATS = [
    f"{mapping.value}/{filtering.value}/{ports.value}"
    for mapping in Rule
    for filtering in Rule
    for ports in ALLOCATIONS
    if mapping is not Rule.EI or filtering is Rule.APD or ports is Ports.RANDOM
]
"""Every mapping with every filtering and every allocation of ports (RFC 4787); an endpoint-independent mapping is
allocated once, so how is varied for its strictest filter only."""
PLACES = [
    Place(),
    *(Place(nat) for nat in NATS),
    Place(PORT_RESTRICTED, PORT_RESTRICTED),
    Place(PORT_RESTRICTED, SYMMETRIC),
    Place(PORT_RESTRICTED, "apd/apd/sequential"),
    Place(SYMMETRIC, six=Six.OPEN),
    Place(SYMMETRIC, six=Six.FILTERED),
    Place(SYMMETRIC, six=Six.ONLY),
    Place(PORT_RESTRICTED, blocks_udp=True),
]
SPECIAL = [
    *(Cell(Place(nat), Place(nat), Shared.LAN) for nat in (PORT_RESTRICTED, f"{SYMMETRIC}/no-hairpin")),
    *(
        Cell(Place(nat, carrier), Place(nat, carrier), Shared.CARRIER)
        for nat in (PORT_RESTRICTED, SYMMETRIC)
        for carrier in ("ei/ei/random", PORT_RESTRICTED, f"{PORT_RESTRICTED}/no-hairpin", SYMMETRIC)
    ),
]
"""Peers that share a network."""


def all_cells() -> list[Cell]:
    """Every unordered pair of places, and those with something in common."""
    return [Cell(*places) for places in combinations_with_replacement(PLACES, 2)] + SPECIAL


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one cell fared. Times in seconds since the caller's first packet, None for never.

    `checks` are the STUN requests and answers that both peers sent, other than to hubs, until the direct path was in
    use or, if there is none, until the end. `problem` says what broke, if anything did.
    """

    cell: Cell
    seed: int
    verdict: Verdict
    connected: bool = False
    direct: bool = False
    first_answer_s: float | None = None
    direct_s: float | None = None
    checks: int = 0
    lost: int = 0
    """Packets of the application without an answer, of those after the first that was answered."""
    problem: str = ""
    diagram: str = ""

    @property
    def is_as_promised(self) -> bool:
        """Connected, and direct if the oracle says so; one run says nothing about a share."""
        return self.connected and (self.direct or self.verdict.direct_share < 1.0) and not self.problem


def run(cell: Cell, seed: int = 1, *, draw: bool = False) -> Outcome:
    """Simulate one cell; with `draw`, the outcome has the sequence diagram of its datagrams."""
    with World(seed) as world:
        stage = _Stage(cell, world)
        if draw:
            world.trace.watch(world.internet)
        outcome = stage.play()
        return replace(outcome, diagram=world.trace.diagram(stage.columns())) if draw else outcome


class _Stage:
    """One cell's world and its story."""

    def __init__(self, cell: Cell, world: World) -> None:
        self._cell = cell
        self._world = world
        self._hubs = [world.hub(ipv6=True) for _ in range(HUBS)]
        self._hub_hosts = {host for hub in self._hubs for host in hub.host.interfaces[0].hosts}
        home = self._home(cell.one)
        self._a = self._peer("a", cell.one, home)
        if cell.shared is Shared.NOTHING:
            home = self._home(cell.other)
        elif cell.shared is Shared.CARRIER:
            assert home is not None
            home = self._home(cell.other, home.above)
        self._b = self._peer("b", cell.other, home)
        world.publish()
        self._nodes: dict[str, Node] = {}
        self._checks = 0
        self._went_direct: dict[str, float] = {}

    def _home(self, place: Place, carrier: Home | None = None) -> Home | None:
        if place.nat == "none":
            return None
        if place.carrier and carrier is None:
            carrier = self._world.home(place.carrier, lan="100.64.0.0/10")
        return self._world.home(
            place.nat,
            behind=carrier,
            ipv6=place.six is not Six.NO,
            firewall=None if place.six is Six.OPEN else Rule.APD,
            blocks_udp=place.blocks_udp,
        )

    def _peer(self, name: str, place: Place, home: Home | None) -> Machine:
        peer = self._world.peer(name, behind=home, ipv6=home is None and place.six is not Six.NO)
        if place.six is Six.ONLY:
            for interface in peer.host.interfaces:
                interface.readdress(*(str(address) for address in interface.addresses if address.version == 6))
        return peer

    def columns(self) -> list[str]:
        """Hosts of a diagram: each peer with its routers, the hubs in the middle."""
        chains = []
        for machine in (self._a, self._b):
            chains.append([machine.name])
            home = machine.home
            while home is not None:
                chains[-1].append(home.router.name)
                home = home.above
        names = [*chains[0], *(hub.name for hub in self._hubs), *reversed(chains[1])]
        return list(dict.fromkeys(names))

    def play(self) -> Outcome:
        verdict = self._world.verdict(self._a, self._b)
        try:
            return self._world.run(self._story(verdict), DEFAULT_LIMIT_S)
        except Exception as problem:  # noqa: BLE001 (a broken engine is a result, too)
            return Outcome(self._cell, self._world.seed, verdict, problem=f"{type(problem).__name__}: {problem}")

    async def _story(self, verdict: Verdict) -> Outcome:
        for machine in (*self._hubs, self._a, self._b):
            await self._start(machine)
        attached = await self._until(lambda: self._attached(self._a) and self._attached(self._b), ATTACH_S)
        await asyncio.sleep(PUBLISH_S)
        self._world.internet.taps.append(self._count)
        began = self._world.loop.time()
        pinger = Pinger(self._a.host, self._b.overlay, count=None, interval_s=PING_S)
        direct = await self._until(lambda: self._is_direct, WAIT_S[verdict])
        checks = self._checks
        report = await pinger.stop()
        first = report.first_answer_s
        last = await ping(self._b.host, self._a.overlay, count=END_PINGS, wait_s=END_WAIT_S)
        return Outcome(
            self._cell,
            self._world.seed,
            verdict,
            connected=first is not None and last.answered > 0,
            direct=direct,
            first_answer_s=first,
            direct_s=max(self._went_direct.get(name, began) for name in "ab") - began if direct else None,
            checks=checks,
            lost=sum(number > min(report.rtts_s, default=0) for number in report.lost),
            problem="" if attached else "not attached to two hubs",
        )

    async def _start(self, machine: Machine) -> None:
        name = machine.name

        def hear(event: MeshEvent) -> None:
            other = "b" if name == "a" else "a"
            if isinstance(event, PeerConnected | PathChanged) and event.peer == other and event.path != "relayed":
                self._went_direct.setdefault(name, self._world.loop.time())

        self._nodes[name] = await start_node(self._world, machine, emit=hear)

    def _network(self, machine: Machine) -> Network:
        return next(iter(self._nodes[machine.name].networks.values()))

    def _attached(self, machine: Machine) -> bool:
        return len(self._network(machine).attachments.connected()) >= 2

    @property
    def _is_direct(self) -> bool:
        """Whether both ends say so."""
        for machine, other in ((self._a, self._b), (self._b, self._a)):
            session = self._network(machine).sessions.get(other.overlay)
            if session is None or session.path_kind is None or session.path_kind.value == "relayed":
                return False
        return True

    async def _until(self, true: Callable[[], bool], limit_s: float) -> bool:
        until = self._world.loop.time() + limit_s
        while not true():
            if self._world.loop.time() >= until:
                return False
            await asyncio.sleep(POLL_S)
        return True

    def _count(self, crossing: Crossing) -> None:
        if crossing.sender in ("a", "b") and crossing.datagram.destination.host not in self._hub_hosts:
            self._checks += classify(crossing.datagram.data) is Kind.STUN
