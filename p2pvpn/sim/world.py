"""Worlds: an Internet with homes behind NATs, hubs and peers with real identities, from one seed.

    world = World(seed=7)
    hub = world.hub("hub1")
    alice = world.peer("alice", behind=world.home("symmetric"))
    bob = world.peer("bob", behind=world.home("port-restricted"))
    world.verdict(alice, bob)            what the oracle says of the pair
    world.run(story(alice, bob))         on virtual time

Everything that the engine needs of a machine is in its `Machine`: the host with its ports and its profile. Starting
the engine is `start.start_node`; nothing here depends on it.

Addresses: hubs are at 192.0.2.n and 2001:db8:ffff::n, homes' lines at 198.51.100.n and then in 198.18.0.0/16, peers
without a home at 203.0.113.n and then in 198.19.0.0/16. LANs are 192.168.n.0/24 unless told otherwise.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Any, TypeVar

from p2pvpn.core.address import Endpoint
from p2pvpn.core.errors import LocalError
from p2pvpn.crypto.signatures import seeded_key
from p2pvpn.identity.admin import AdminNetwork
from p2pvpn.identity.document import NetworkDocument
from p2pvpn.identity.enrolment import Issuer, JoinResult, issuer_of_untrusted, join_request
from p2pvpn.identity.genesis import Genesis
from p2pvpn.identity.grants import Request
from p2pvpn.identity.keys import PeerKey
from p2pvpn.identity.profile import Profile

from .host import UNDERLAY_PORT, SimHost, current_host
from .internet import ACCESS, LAN, Internet, Quality, Segment
from .loop import DEFAULT_LIMIT_S, SeededEntropy, SimWallClock, VirtualLoop, seeded
from .nat import Firewall, NatKind, Rule
from .oracle import Box, Side, Verdict, verdict
from .router import Router
from .trace import Trace

T = TypeVar("T")

HUB_EXTRA_PORTS = (500, 3478)
"""Where hubs answer STUN (and plain IKE) besides the shared port."""
ENROLMENT_S = 0.12
"""A TLS connection, a request and its answer: three round trips of 40 ms."""


@dataclass(slots=True)
class Home:
    """A LAN with its router. `ipv4` and `ipv6` are its boxes for the oracle, outwards; None is no such family."""

    name: str
    lan: Segment
    router: Router
    above: Home | None
    hosts: Iterator[int]

    @property
    def ipv4(self) -> tuple[Box, ...]:
        """NATs from here to the public Internet, as they are now."""
        own = () if self.router.nat is None else (Box.of(self.name, self.router.nat.kind),)
        return own + (self.above.ipv4 if self.above is not None else ())

    @property
    def ipv6(self) -> tuple[Box, ...] | None:
        """Firewalls from here to the public Internet, or None without IPv6."""
        if all(prefix.version == 4 for prefix in self.lan.prefixes):
            return None
        return self._firewalls()

    def _firewalls(self) -> tuple[Box, ...]:
        firewall = self.router.firewall
        own = () if firewall is None else (Box.firewall(self.name, firewall.filtering),)
        return own + (self.above._firewalls() if self.above is not None else ())

    @property
    def blocks_udp(self) -> bool:
        return self.router.blocks_udp or (self.above is not None and self.above.blocks_udp)

    @property
    def edge(self) -> str:
        """The node of this home on the public Internet."""
        return self.router.name if self.above is None else self.above.edge

    def next_addresses(self) -> list[str]:
        """Addresses for one more host."""
        number = next(self.hosts)
        return [str(prefix.network_address + number) for prefix in self.lan.prefixes]


@dataclass(slots=True)
class Machine:
    """A host with its identity, and where it is. `home` is None on the public Internet."""

    host: SimHost
    profile: Profile
    home: Home | None

    @property
    def name(self) -> str:
        return self.host.name

    @property
    def overlay(self) -> IPv6Address:
        """The address that follows from network and key."""
        return self.profile.member.overlay

    @property
    def is_hub(self) -> bool:
        return self.profile.member.is_hub

    @property
    def edge(self) -> str:
        """The node on the public Internet that its packets come from."""
        return self.name if self.home is None else self.home.edge

    def side(self) -> Side:
        """Where the machine is, for the oracle."""
        hosts = [host for interface in self.host.interfaces for host in interface.hosts]
        has_v4, has_v6 = (any((":" in host) == ipv6 for host in hosts) for ipv6 in (False, True))
        home = self.home
        if home is None:
            return Side(("host", self.name), () if has_v4 else None, () if has_v6 else None)
        families = home.ipv4 if has_v4 else None, home.ipv6 if has_v6 else None
        return Side(("lan", home.name), *families, home.blocks_udp)


class SimResolver:
    """mesh.ports.Resolver: numeric addresses, and the names in `names`."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}

    async def resolve(self, address: str, default_port: int) -> Sequence[Endpoint]:
        try:
            return [Endpoint.parse(address, default_port)]
        except ValueError:
            name, _, port = address.partition(":")
        number = int(port) if port.isdigit() else default_port
        return [Endpoint.of(host, number) for host in self.names.get(name, [])]


class World:
    """One simulated world. Two worlds of one seed, built and used alike, give the same trace."""

    def __init__(self, seed: int = 0, *, network: str = "sim") -> None:
        self.seed = seed
        self.loop = VirtualLoop()
        self.internet = Internet(self.loop, seed)
        self.trace = Trace(self.loop)
        self.resolver = SimResolver()
        self.wall = SimWallClock(self.loop)
        self.machines: dict[str, Machine] = {}
        self.homes: dict[str, Home] = {}
        self.admin = _seeded_admin(network, seed, self.wall())
        self.issuers: dict[str, Issuer] = {}
        """Issuers by the name of their hub."""
        self.loop.network = self
        self._lines = _addresses("198.51.100.0/24", "198.18.0.0/16")
        self._hosts = _addresses("203.0.113.0/24", "198.19.0.0/16")
        self._hub_numbers = iter(range(1, 255))
        self._lans = (f"192.168.{n}.0/24" if n < 256 else f"10.{n >> 8}.{n & 255}.0/24" for n in range(1, 1 << 16))
        self._lan_numbers = iter(range(1, 1 << 16))

    # ------------------------------------------------------------------ places

    def home(
        self,
        nat: NatKind | str = "port-restricted",
        *,
        name: str = "",
        behind: Home | None = None,
        lan: str | None = None,
        ipv6: bool = False,
        firewall: Rule | None = Rule.APD,
        blocks_udp: bool = False,
        pcp: bool = False,
        line: Quality = ACCESS,
    ) -> Home:
        """A LAN behind a router: `nat` is a kind or its name, or `none` for public IPv4 addresses inside.

        `behind` puts it into another home's LAN (a carrier's network, say: `lan="100.64.0.0/10"`); `ipv6` gives it a
        prefix of its own behind a `firewall`, also there. With `pcp` the router maps ports (RFC 6887).
        """
        name = name or f"home{len(self.homes) + 1}"
        if name in self.homes:
            raise LocalError(f"there is a {name} already")
        kind = None if nat == "none" else NatKind.of(nat) if isinstance(nat, str) else nat
        number = next(self._lan_numbers)
        prefixes = [lan or (next(self._lans) if kind is not None else f"198.19.{255 - number % 128}.0/24")]
        above = self.internet.public if behind is None else behind.lan
        outside = [next(self._lines)] if behind is None else behind.next_addresses()[:1]
        if ipv6:
            prefixes.append(f"2001:db8:{number:x}::/64")
            outside.append(f"2001:db8:fffe::{number:x}")
        segment = self.internet.segment(f"{name} LAN", *prefixes)
        router = Router(
            f"{name} router",
            segment,
            above,
            inside=[str(prefix.network_address + 1) for prefix in segment.prefixes],
            outside=outside,
            nat=kind,
            firewall=Firewall(firewall) if ipv6 and firewall is not None else None,
            line=line,
            blocks_udp=blocks_udp,
            pcp=pcp,
        )
        outer = behind if ipv6 else None
        while outer is not None:  # every network further out knows the way to the prefix
            outer.router.outside.segment.route(segment.prefixes[1], outer.router.outside)
            outer = outer.above
        home = self.homes[name] = Home(name, segment, router, behind, iter(range(2, 1 << 16)))
        return home

    def renumber(self, home: Home) -> None:
        """The provider gives the line of a home another public address."""
        home.router.renumber(next(self._lines))

    def move(self, machine: Machine, to: Home | None) -> None:
        """Carry a machine to another home, or to the public Internet: it leaves the old network at once."""
        if to is None:
            machine.host.move(self.internet.public, next(self._hosts), quality=ACCESS)
        else:
            machine.host.move(to.lan, *to.next_addresses(), quality=LAN)
        machine.home = to

    def cut(self, some: Iterable[Machine], others: Iterable[Machine]) -> None:
        """Partition: nothing passes the public Internet between the two groups, until `internet.heal()`."""
        self.internet.cut((one.edge for one in some), (other.edge for other in others))

    # ------------------------------------------------------------------ machines

    def hub(
        self,
        name: str = "",
        *,
        issuer: bool | None = None,
        ipv6: bool = False,
        quality: Quality = ACCESS,
        clock_skew_s: float = 0.0,
    ) -> Machine:
        """A hub on the public Internet, granted by the admin; the first one issues certificates unless told not to."""
        name = name or f"hub{sum(m.is_hub for m in self.machines.values()) + 1}"
        number = next(self._hub_numbers)
        addresses = [f"192.0.2.{number}"] + ([f"2001:db8:ffff::{number:x}"] if ipv6 else [])
        host = self._host(name, extra_ports=HUB_EXTRA_PORTS, clock_skew_s=clock_skew_s)
        host.attach(self.internet.public, *addresses, quality=quality)
        listed = ",".join(str(Endpoint.of(address, UNDERLAY_PORT)) for address in addresses)
        issues = not self.issuers if issuer is None else issuer
        profile = self._granted(name, hub=listed, issuer=issues)
        if issues:
            made = profile.make_issuer(entropy=host.entropy)
            assert made is not None
            self.issuers[name] = made
        return self._add(host, profile, None)

    def peer(
        self,
        name: str,
        *,
        behind: Home | None = None,
        quality: Quality | None = None,
        clock_skew_s: float = 0.0,
        prefixes: Sequence[str] = (),
        groups: Sequence[str] = (),
        ipv6: bool = False,
    ) -> Machine:
        """A peer in a home, or on the public Internet. It joins by a token of an issuer, if there is one.

        With `prefixes` (a gateway) or `groups`, or without an issuer, the admin grants it. On the public Internet
        `ipv6` gives it an address of that family too; in a home it has what the home has.
        """
        host = self._host(name, clock_skew_s=clock_skew_s)
        if behind is None:
            addresses = [next(self._hosts)] + ([f"2001:db8:fffd::{len(self.machines) + 1:x}"] if ipv6 else [])
            host.attach(self.internet.public, *addresses, quality=quality or ACCESS)
        else:
            host.attach(behind.lan, *behind.next_addresses(), quality=quality or LAN)
        if prefixes or groups or not self.issuers:
            profile = self._granted(name, prefixes=prefixes, groups=groups)
        else:
            profile = self._joined(name)
        return self._add(host, profile, behind)

    def _host(self, name: str, **options: Any) -> SimHost:
        if name in self.machines:
            raise LocalError(f"there is a {name} already")
        return SimHost(self.internet, name, **options)

    def _add(self, host: SimHost, profile: Profile, home: Home | None) -> Machine:
        machine = self.machines[host.name] = Machine(host, profile, home)
        profile.save(host.store.write)
        return machine

    def _granted(self, name: str, **grant: Any) -> Profile:
        key = seeded_peer_key(self.seed, name)
        return Profile.from_grant(key, self.admin.grant(Request.create(key, name), wall=self.wall(), **grant))

    def _joined(self, name: str) -> Profile:
        """By token and request, through the issuer's own code."""
        key = seeded_peer_key(self.seed, name)
        issuer = next(iter(self.issuers.values()))
        issuer.trust.replace_document(self.admin.document)
        token = issuer.invite(name, self.wall())
        answer = issuer.handle_untrusted(join_request(token, key), self.wall())
        return Profile.from_join(key, JoinResult.parse_untrusted(answer))

    def publish(self, machines: Iterable[Machine] | None = None) -> None:
        """Give the admin's newest document to these machines, or to all, as an operator would to one hub."""
        for machine in self.machines.values() if machines is None else machines:
            if machine.profile.adopt_document(self.admin.document):
                machine.profile.save(machine.host.store.write)

    def renew_of(self, machine: Machine) -> Callable[[Endpoint, bytes], Awaitable[bytes]]:
        """mesh.ports.Renew for a machine: enrolment is TCP, so it stands here for the connection.

        Raises LocalError, after the time that a connection takes, when the issuer's hub does not answer.
        """

        async def renew(endpoint: Endpoint, request: bytes) -> bytes:
            await asyncio.sleep(ENROLMENT_S)
            hub = next((other for other in self.machines.values() if other.host.owns(endpoint.host)), None)
            wanted = issuer_of_untrusted(request)
            issuer = None if hub is None else self.issuers.get(hub.name)
            if (
                hub is None
                or issuer is None
                or hub.profile.member.peer_id != wanted
                or not self._connects(machine, hub)
            ):
                raise LocalError(f"no issuer answers at {endpoint}")
            return issuer.handle_untrusted(request, hub.host.wall())

        return renew

    def _connects(self, machine: Machine, hub: Machine) -> bool:
        cut = frozenset((machine.edge, hub.edge)) in self.internet.cuts
        return machine.host.is_running and hub.host.is_running and not cut

    # ------------------------------------------------------------------ running

    def run(self, story: Coroutine[Any, Any, T], limit_s: float = DEFAULT_LIMIT_S) -> T:
        """Run a story on virtual time; see VirtualLoop.run."""
        return self.loop.run(story, limit_s)

    def verdict(self, one: Machine, other: Machine) -> Verdict:
        """What must be possible between two machines where they are now."""
        return verdict(one.side(), other.side())

    def close(self) -> None:
        """End every task and close the loop."""
        self.loop.close()

    def __enter__(self) -> World:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def open_udp(
        self, protocol: asyncio.DatagramProtocol, local: tuple[str, int] | None, remote: tuple[str, int] | None
    ) -> asyncio.DatagramTransport:
        """loop.UdpNetwork: on the host whose code asks, else on the one host that has the address."""
        local = local or ("::", 0)
        host = current_host.get()
        if host is None:
            wildcard = local[0] in ("", "0.0.0.0", "::")  # noqa: S104 (compared, not bound)
            owners = [] if wildcard else [m.host for m in self.machines.values() if m.host.owns(local[0])]
            if len(owners) != 1:
                raise OSError(errno.EADDRNOTAVAIL, f"{len(owners)} hosts have the address {local[0]}")
            host = owners[0]
        return host.open_udp(protocol, local, remote)


def seeded_peer_key(seed: int, name: str) -> PeerKey:
    """The same key for the same seed and name, so that overlay addresses and who yields to whom repeat."""
    return PeerKey(seeded_key(seeded(seed, f"key/{name}").randbytes(64)))


def _seeded_admin(name: str, seed: int, wall: float) -> AdminNetwork:
    entropy = SeededEntropy(seed, f"admin/{name}")
    root, recovery = (seeded_peer_key(seed, f"{name}/{role}") for role in ("root", "recovery"))
    genesis = Genesis.create(name, root, recovery.public_key, wall=wall, entropy=entropy)
    document = NetworkDocument(genesis.network_id, 1, int(wall)).sign(root)
    return AdminNetwork(genesis, document, root, entropy, recovery_key=recovery)


def _addresses(*prefixes: str) -> Iterator[str]:
    for prefix in prefixes:
        for address in ipaddress.ip_network(prefix).hosts():
            yield str(address)
