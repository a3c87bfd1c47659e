"""A tiny deterministic Internet in virtual time: hosts, links with delay and loss, and RFC 4787 NATs."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from enum import Enum
from ipaddress import ip_network

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.output import Output, Transmit
from p2pvpn.core.secret import Secret
from p2pvpn.punch.agent import PunchAgent
from p2pvpn.punch.candidates import Candidate, CandidateKind, decode_candidates_untrusted, encode_candidates
from p2pvpn.punch.credentials import derive
from p2pvpn.punch.limits import PunchLimits
from p2pvpn.punch.mux import PunchMux
from p2pvpn.punch.reflector import reflect
from p2pvpn.punch.settings import PunchSettings

PORT = 4500


class Scope(Enum):
    EI = "endpoint-independent"
    AD = "address-dependent"
    APD = "address and port-dependent"


class Net:
    """The public Internet and the clock. `wan_s` is the one-way delay of hosts without one of their own."""

    def __init__(self, seed: int = 1, wan_s: float = 0.025, loss: float = 0.0) -> None:
        self.now = 1000.0
        self.rng = random.Random(seed)
        self.wan_s = wan_s
        self.loss = loss
        self.public: dict[str, Host | Nat] = {}
        self.delays: dict[tuple[str, str], float] = {}
        self.blocked: Callable[[Endpoint, Endpoint], bool] = lambda src, dst: False
        self.sent: list[tuple[float, Endpoint, Endpoint, bytes]] = []
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def entropy(self, count: int) -> bytes:
        return self.rng.randbytes(count)

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (max(when, self.now), next(self._order), action))

    def run(self, seconds: float) -> None:
        self.run_until(lambda: False, seconds)

    def run_until(self, done: Callable[[], bool], seconds: float) -> bool:
        """Whether `done` became true within so much virtual time; the clock stands at that moment then."""
        end = self.now + seconds
        stuck = 0
        while not done():
            if not self._heap or self._heap[0][0] > end:
                self.now = end
                return False
            when, _, action = heapq.heappop(self._heap)
            stuck = stuck + 1 if when == self.now else 0
            assert stuck < 5000, "time does not move"
            self.now = when
            action()
        return True

    def carry(self, src: Endpoint, dst: Endpoint, data: bytes) -> None:
        """A packet on the public Internet."""
        self.sent.append((self.now, src, dst, data))
        if self.blocked(src, dst) or self.rng.random() < self.loss:
            return
        delay = self.delays.get((src.host, dst.host), self.wan_s)
        self.at(self.now + delay, lambda: self.arrive(src, dst, data))

    def arrive(self, src: Endpoint, dst: Endpoint, data: bytes) -> None:
        owner = self.public.get(dst.host)
        if owner is not None:
            owner.arrive(src, dst, data)

    def packets_to(self, host: str) -> list[bytes]:
        return [data for _, _, dst, data in self.sent if dst.host == host]


class Nat:
    """One public address for the hosts behind it; hairpinning is absent. A Nat behind a Nat is a double NAT."""

    def __init__(
        self, outside: Net | Nat, address: str, mapping: Scope = Scope.EI, filtering: Scope = Scope.APD
    ) -> None:
        self.outside = outside
        self.net: Net = outside if isinstance(outside, Net) else outside.net
        self.address = address
        self.mapping = mapping
        self.filtering = filtering
        self.public: dict[str, Host | Nat] = {}
        self.lan_s = 0.0005
        self._ports: dict[tuple[Endpoint, object], int] = {}
        self._inside: dict[int, Endpoint] = {}
        self._contacts: dict[int, set[Endpoint]] = {}
        outside.public[address] = self

    def rebind(self) -> None:
        """Forget every mapping, as a router that was restarted."""
        self._ports.clear()
        self._inside.clear()
        self._contacts.clear()

    def carry(self, src: Endpoint, dst: Endpoint, data: bytes) -> None:
        """A packet on the inside: to a neighbour, or out."""
        neighbour = self.public.get(dst.host)
        if neighbour is not None:
            if not self.net.blocked(src, dst):
                self.net.at(self.net.now + self.lan_s, lambda: neighbour.arrive(src, dst, data))
            return
        if dst.host == self.address:
            return
        scope = {Scope.EI: None, Scope.AD: dst.host, Scope.APD: dst}[self.mapping]
        port = self._ports.get((src, scope))
        if port is None:
            port = src.port
            while port in self._inside:
                port = self.net.rng.randrange(20000, 60000)
            if self.mapping is not Scope.EI:
                port = self.net.rng.randrange(20000, 60000)
            self._ports[src, scope] = port
            self._inside[port] = src
            self._contacts[port] = set()
        self._contacts[port].add(dst)
        self.outside.carry(Endpoint(self.address, port), dst, data)

    def arrive(self, src: Endpoint, dst: Endpoint, data: bytes) -> None:
        """A packet from outside: passes when the filter knows its source."""
        inside = self._inside.get(dst.port)
        if inside is None:
            return
        contacts = self._contacts[dst.port]
        known = {
            Scope.EI: True,
            Scope.AD: src.host in {contact.host for contact in contacts},
            Scope.APD: src in contacts,
        }[self.filtering]
        owner = self.public.get(inside.host)
        if known and owner is not None:
            owner.arrive(src, inside, data)


class Host:
    """A machine with one shared socket, a mux, and agents."""

    def __init__(self, home: Net | Nat, *addresses: str, subnets: Sequence[str] = ()) -> None:
        self.home = home
        self.net: Net = home if isinstance(home, Net) else home.net
        self.addresses = list(addresses)
        self.mux = PunchMux()
        self.limits = PunchLimits([ip_network(subnet) for subnet in subnets])
        self.reflects = False
        self.unrouted: list[tuple[Path, bytes]] = []
        self.peers: list[Peer] = []
        self.events: list[tuple[float, Output]] = []
        for address in addresses:
            home.public[address] = self

    def move(self, home: Net | Nat, *addresses: str) -> None:
        """Roam: the old addresses are gone."""
        for address in self.addresses:
            self.home.public.pop(address, None)
        self.home, self.addresses = home, list(addresses)
        for address in addresses:
            home.public[address] = self

    def send(self, path: Path, data: bytes) -> None:
        host = path.local.host
        if path.local.is_unspecified:
            host = next((a for a in self.addresses if (":" in a) == path.remote.is_ipv6), "")
        if host in self.addresses:
            self.home.carry(Endpoint(host, path.local.port), path.remote, data)

    def arrive(self, src: Endpoint, dst: Endpoint, data: bytes) -> None:
        path = Path(dst, src)
        if self.reflects:
            answer = reflect(path, data)
            if answer is not None:
                self.send(path, answer)
                return
        outputs = self.mux.route(path, data, self.net.now)
        if outputs is None:
            self.unrouted.append((path, data))
            return
        self.take(outputs)

    def take(self, outputs: list[Output]) -> None:
        """What the driver of an agent does: send, note the events, set the alarms."""
        for output in outputs:
            if isinstance(output, Transmit):
                self.send(output.path, output.data)
            else:
                self.events.append((self.net.now, output))
        for peer in self.peers:
            peer.set_alarm()

    def hosts(self) -> list[Candidate]:
        return [Candidate.host(Endpoint(address, PORT)) for address in self.addresses]

    def reflexive(self) -> list[Candidate]:
        """As a hub on the public Internet would tell, for hosts behind NATs."""
        if isinstance(self.home, Net):
            return []
        hub = self.net.public.get("198.51.100.250") or Host(self.net, "198.51.100.250")
        assert isinstance(hub, Host)
        base = Endpoint(self.addresses[0], PORT)
        before = len(hub.unrouted)
        blocked, loss = self.net.blocked, self.net.loss
        self.net.blocked, self.net.loss = (lambda src, dst: False), 0.0
        self.home.carry(base, Endpoint("198.51.100.250", 3478), b"?" * 24)
        assert self.net.run_until(lambda: len(hub.unrouted) > before, 5.0)
        self.net.blocked, self.net.loss = blocked, loss
        return [Candidate(CandidateKind.REFLEXIVE, hub.unrouted[-1][0].remote, base)]

    def candidates(self) -> list[Candidate]:
        return self.hosts() + self.reflexive()


class Peer:
    """One side of a session: an agent on a host, driven by the clock of the net."""

    def __init__(
        self, host: Host, *, initiator: bool, controlling: bool | None = None, key: bytes = b"k", tie: int | None = None
    ) -> None:
        self.host = host
        self.net = host.net
        self._alarm: float | None = None

        def exporter(label: bytes, length: int) -> Secret:
            return Secret(hashlib.shake_256(key + label).digest(length))

        self.agent = PunchAgent(
            controlling=initiator if controlling is None else controlling,
            credentials=derive(exporter, initiator),
            tie_breaker=self.net.rng.getrandbits(64) if tie is None else tie,
            entropy=self.net.entropy,
            limits=host.limits,
            settings=PunchSettings(),
        )
        host.mux.register(self.agent)
        host.peers.append(self)

    def start(self, remote: list[Candidate], local: list[Candidate] | None = None) -> None:
        self.host.take(self.agent.start(self.host.candidates() if local is None else local, remote, self.net.now))

    @property
    def events(self) -> list[tuple[float, Output]]:
        return self.host.events

    def said(self, kind: type) -> list[tuple[float, Output]]:
        return [(at, event) for at, event in self.events if isinstance(event, kind)]

    @property
    def selected(self) -> Path | None:
        return self.agent.selected

    def set_alarm(self) -> None:
        deadline = self.agent.next_deadline()
        if deadline is not None and deadline != self._alarm:
            self._alarm = deadline
            self.net.at(deadline, lambda: self._wake(deadline))

    def _wake(self, deadline: float) -> None:
        if self._alarm == deadline:
            self._alarm = None
            self.host.take(self.agent.tick(self.net.now))


def connected(*peers: Peer) -> bool:
    return all(peer.selected is not None for peer in peers)


def pair_up(a: Host, b: Host, *, key: bytes = b"k", start: bool = True) -> tuple[Peer, Peer]:
    """A session between two hosts, the first of which initiates; candidates known to both at once."""
    one, two = Peer(a, initiator=True, key=key), Peer(b, initiator=False, key=key)
    if start:
        of_a, of_b = a.candidates(), b.candidates()
        one.start(remote_view(of_b), of_a)
        two.start(remote_view(of_a), of_b)
    return one, two


def remote_view(candidates: list[Candidate]) -> list[Candidate]:
    """Candidates as the peer decodes them."""
    return list(decode_candidates_untrusted(encode_candidates(candidates)))
