"""Endpoints on a wire in virtual time: delay, loss, duplication, reordering, and a hand in between."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterable

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.child import ChildSa
from p2pvpn.core.datagram import SPI_MARK
from p2pvpn.core.output import Effect, Event, Output, Transmit
from p2pvpn.core.selector import Selector
from p2pvpn.ike.config import Credential, IkeSettings, Initiate
from p2pvpn.ike.endpoint import IkeEndpoint
from p2pvpn.ike.outputs import InstallChild, MoveChild, RemoveChild, SaEstablished, UseChild

from .people import ike_id


def selectors(*networks: str) -> tuple[Selector, ...]:
    return tuple(Selector.of_network(one) for one in networks)


class Host:
    """An endpoint of the protocol, its addresses, and a plane that only keeps books."""

    def __init__(self, world: World, name: str, address: str, credentials: Iterable[Credential], settings: IkeSettings):
        self.world = world
        self.name = name
        self.address = Endpoint.of(address, 4500)
        self.addresses = {self.address}
        self.random = random.Random(f"{name}/{world.seed}")
        children = itertools.count(1)
        spis = itertools.count(self.random.getrandbits(24))
        self.key_log: list[tuple[str, str]] = []
        self.ike = IkeEndpoint(
            settings,
            self.random.randbytes,
            lambda: next(children),
            lambda: SPI_MARK | next(spis),
            lambda table, line: self.key_log.append((table, line)),
        )
        self.credentials = tuple(credentials)
        self.ike.set_credentials(self.credentials)
        self.log: list[Output] = []
        self.installed: dict[int, ChildSa] = {}
        self.used: set[int] = set()
        self.paths: dict[int, Path] = {}

    def initiate(self, peer: Host, **more) -> int:
        defaults = {
            "credential": self.credentials[0],
            "path": Path(self.address, peer.address),
            "remote_id": ike_id(peer.name),
            "local": selectors("fd00::/16"),
            "remote": selectors("fd00::/16"),
        }
        sa, out = self.ike.initiate(Initiate(**{**defaults, **more}), self.world.now)
        self.run(out)
        return sa

    def run(self, outputs: list[Output]) -> None:
        for one in outputs:
            self.log.append(one)
            if isinstance(one, Transmit):
                self.world.send(self, one)
            elif isinstance(one, InstallChild):
                assert one.child.id not in self.installed
                self.installed[one.child.id] = one.child
                self.paths[one.child.id] = one.child.path
            elif isinstance(one, UseChild):
                assert one.child_id in self.installed
                self.used.add(one.child_id)
            elif isinstance(one, MoveChild):
                assert one.child_id in self.installed
                self.paths[one.child_id] = one.path
            elif isinstance(one, RemoveChild):
                del self.installed[one.child_id]
                self.used.discard(one.child_id)
            else:
                assert isinstance(one, Event | Effect)

    def events(self, kind: type | None = None) -> list:
        wanted = Event if kind is None else kind
        return [one for one in self.log if isinstance(one, wanted)]

    def sent(self) -> list[bytes]:
        return [one.data for one in self.log if isinstance(one, Transmit)]

    @property
    def sa(self) -> int:
        """The one SA that was established."""
        (only,) = self.events(SaEstablished)
        return only.sa

    def do(self, command: str, *args) -> None:
        """A wish of the engine, by its name."""
        self.run(getattr(self.ike, command)(*args))


class World:
    """The wire. `fate` says what becomes of a packet: the delays of its copies, none when it is lost."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.now = 1000.0
        self.random = random.Random(seed)
        self.hosts: list[Host] = []
        self.fate: Callable[[Path, bytes], Iterable[float]] = lambda path, data: (0.01,)
        self.tamper: Callable[[Path, bytes], bytes] = lambda path, data: data
        self.nat: Callable[[Path], Path] = lambda path: path
        self._order = itertools.count()
        self._flying: list[tuple[float, int, Path, bytes]] = []
        self.wire: list[tuple[Path, bytes]] = []

    def host(self, name: str, address: str, *credentials: Credential, **settings) -> Host:
        # One key exchange, unless a dialogue is about several.
        host = Host(self, name, address, credentials, IkeSettings(**{"additional_kexes": (), **settings}))
        self.hosts.append(host)
        return host

    def send(self, sender: Host, one: Transmit) -> None:
        if one.path.local not in sender.addresses:
            return
        self.wire.append((one.path, one.data))
        for delay in self.fate(one.path, one.data):
            self.inject(self.nat(one.path), self.tamper(one.path, one.data), delay)

    def inject(self, path: Path, data: bytes, delay: float = 0.0) -> None:
        """A packet on the wire, `path` as its sender sees it."""
        heapq.heappush(self._flying, (self.now + delay, next(self._order), path, data))

    def run(self, seconds: float = 60.0) -> None:
        """Lets everything happen until then."""
        end = self.now + seconds
        while True:
            due = [host.ike.next_deadline() for host in self.hosts]
            times = [at for at in due if at is not None] + [one[0] for one in self._flying[:1]]
            if not times or min(times) > end:
                break
            self.now = max(self.now, min(times))
            while self._flying and self._flying[0][0] <= self.now:
                _, _, path, data = heapq.heappop(self._flying)
                for host in self.hosts:
                    if path.remote in host.addresses:
                        host.run(host.ike.handle(Path(path.remote, path.local), data, self.now))
            for host in self.hosts:
                at = host.ike.next_deadline()
                if at is not None and at <= self.now:
                    host.run(host.ike.tick(self.now))
        self.now = end
