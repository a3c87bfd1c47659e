"""A small world for the DHT: members with real keys, a verifier of toy certificates, and tunnels that lose packets."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from p2pvpn.core.errors import TrustError
from p2pvpn.core.ids import NetworkId, PeerId, overlay_address
from p2pvpn.core.selector import Selector
from p2pvpn.crypto import signatures
from p2pvpn.dht import records
from p2pvpn.dht.client import DhtClient
from p2pvpn.dht.hub import HubNode
from p2pvpn.dht.policy import AcceptancePolicy
from p2pvpn.dht.records import Body, LocatorBody
from p2pvpn.dht.rpc import DHT_PORT, RpcNode
from p2pvpn.dht.storage import RecordStore
from p2pvpn.identity.member import Member, Role
from p2pvpn.sim.loop import SeededEntropy, SimWallClock, VirtualLoop, seeded

NETWORK = NetworkId(bytes(range(32)))
WALL = 1_800_000_000.0
CERTIFICATE_BYTES = 700
RTT_S = 0.055
"""A round trip through the tunnels, and what it takes to answer."""


class Registry:
    """Issues certificates that mean something only to its own `verify_leaf`."""

    def __init__(self) -> None:
        self.members: dict[bytes, Member] = {}
        self.verifications = 0

    def verify_leaf(self, der: bytes, wall: float) -> Member:
        self.verifications += 1
        member = self.members.get(der)
        if member is None:
            raise TrustError("not a certificate of ours")
        if not member.not_before <= wall <= member.not_after:
            raise TrustError("the certificate has expired")
        return member

    def join(self, name: str, *, roles: tuple[Role, ...] = (), blocks: tuple[str, ...] = (), ipv4: str = "") -> Person:
        key = signatures.generate_key()
        public = key.public_key()
        peer_id = PeerId.of_key(signatures.subject_public_key(public))
        overlay = overlay_address(NETWORK, peer_id)
        serial = len(self.members) + 1
        certificate = (b"certificate %d of %s " % (serial, name.encode())).ljust(CERTIFICATE_BYTES, b".")
        self.members[certificate] = Member(
            network=NETWORK,
            peer_id=peer_id,
            name=name,
            roles=frozenset(roles),
            groups=frozenset(),
            ipv4=IPv4Address(ipv4) if ipv4 else None,
            blocks=(Selector.of_address(overlay), *(Selector.of_network(block) for block in blocks)),
            public_key=public,
            not_before=WALL - 300,
            not_after=WALL + 7 * 86400,
            serial=serial,
            issuer=bytes(20),
            certificate=certificate,
        )
        return Person(name, peer_id, records.signer(key), certificate)


@dataclass(frozen=True)
class Person:
    """A member, with its key."""

    name: str
    peer_id: PeerId
    sign: Callable[[bytes], bytes]
    certificate: bytes

    @property
    def overlay(self) -> IPv6Address:
        return overlay_address(NETWORK, self.peer_id)

    @property
    def key(self) -> bytes:
        return records.key_of_locator(NETWORK, self.overlay)

    def record(
        self,
        wall: float = WALL,
        body: Body | None = None,
        *,
        lifetime: int | None = None,
        subject: PeerId | None = None,
        network: NetworkId = NETWORK,
        certificate: bytes | None = None,
    ) -> bytes:
        body = body or LocatorBody((), ())
        lifetime = records.LIFETIME_S[body.kind] if lifetime is None else lifetime
        return records.build(
            network,
            subject or self.peer_id,
            body,
            sequence=int(wall * 1000),
            expires=int(wall) + lifetime,
            sign=self.sign,
            certificate=certificate or self.certificate,
        )

    def impersonating(self, other: Person) -> Person:
        """Who signs with its own key in the other's name."""
        return replace(other, sign=self.sign)


class Tunnels:
    """Every overlay address reaches every other, after `delay_s`, except for what is lost or cut."""

    def __init__(self, loop: VirtualLoop, seed: int = 1, delay_s: float = 0.025, loss: float = 0.0) -> None:
        self.loop = loop
        self.delay_s = delay_s
        self.loss = loss
        self.duplication = 0.0
        self.down: set[str] = set()
        self.sent = 0
        self.largest = 0
        self.by_host: dict[str, int] = {}
        self._rng = seeded(seed, "tunnels")
        self._bound: dict[tuple[str, int], asyncio.DatagramProtocol] = {}
        loop.network = self

    def open_udp(
        self, protocol: asyncio.DatagramProtocol, local: tuple[str, int] | None, remote: tuple[str, int] | None
    ) -> asyncio.DatagramTransport:
        assert local is not None
        if local in self._bound:
            raise OSError("address in use")
        self._bound[local] = protocol
        return _Transport(self, local)

    def send(self, source: tuple[str, int], target: tuple[str, int], data: bytes) -> None:
        self.sent += 1
        self.largest = max(self.largest, len(data))
        self.by_host[source[0]] = self.by_host.get(source[0], 0) + 1
        for _ in range(1 + (self._rng.random() < self.duplication)):
            if self._rng.random() >= self.loss:
                delay_s = self.delay_s * (0.9 + 0.2 * self._rng.random())
                self.loop.call_later(delay_s, self._deliver, source, target, data)

    def _deliver(self, source: tuple[str, int], target: tuple[str, int], data: bytes) -> None:
        protocol = self._bound.get(target)
        if protocol is not None and not self.down & {source[0], target[0]}:
            protocol.datagram_received(data, (source[0], source[1], 0, 0))

    def close(self, local: tuple[str, int]) -> None:
        self._bound.pop(local, None)


class _Transport(asyncio.DatagramTransport):
    def __init__(self, tunnels: Tunnels, local: tuple[str, int]) -> None:
        super().__init__()
        self._tunnels = tunnels
        self._local = local
        self._closed = False

    def sendto(self, data: Any, addr: Any = None) -> None:
        self._tunnels.send(self._local, (addr[0], addr[1]), bytes(data))

    def close(self) -> None:
        self._closed = True
        self._tunnels.close(self._local)

    def is_closing(self) -> bool:
        return self._closed


class _Failures(logging.Handler):
    """What failed where nobody was waiting."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(f"{record.getMessage()}: {record.exc_info[1] if record.exc_info else ''}")


class World:
    """Hubs and peers on virtual time."""

    def __init__(self, seed: int = 1, loss: float = 0.0, delay_s: float = 0.025) -> None:
        self.seed = seed
        self.loop = VirtualLoop()
        self.tunnels = Tunnels(self.loop, seed, delay_s, loss)
        self.wall = SimWallClock(self.loop)
        self.registry = Registry()
        self.policy = AcceptancePolicy(NETWORK, self.registry.verify_leaf)
        self.hubs: list[Hub] = []
        self._rpcs = 0

    def run(self, story: Any, limit_s: float = 3600.0) -> Any:
        failures = _Failures()
        logger = logging.getLogger("p2pvpn.dht.background")
        logger.addHandler(failures)
        try:
            result = self.loop.run(story, limit_s)
        finally:
            self.loop.close()
            logger.removeHandler(failures)
        assert failures.seen == []
        return result

    @property
    def now(self) -> float:
        return self.loop.time()

    async def rpc(self, who: Person) -> RpcNode:
        self._rpcs += 1
        rpc = RpcNode(who.overlay, DHT_PORT, SeededEntropy(self.seed, f"rpc {self._rpcs}"))
        await rpc.open()
        return rpc

    async def add_hubs(self, count: int, **options: Any) -> list[Hub]:
        people = [self.registry.join(f"hub{number}", roles=(Role.HUB,)) for number in range(count)]
        for who in people:
            self.hubs.append(Hub(self, who, **options))
        await asyncio.gather(*(hub.start() for hub in self.hubs))
        return self.hubs

    async def client(self, who: Person, hubs: list[Hub] | None = None, **options: Any) -> DhtClient:
        client = DhtClient(await self.rpc(who), self.policy, self.wall, **options)
        client.set_hubs([(hub.who.peer_id, hub.who.overlay) for hub in (self.hubs if hubs is None else hubs)])
        return client

    async def peer(self, name: str, **options: Any) -> tuple[Person, DhtClient]:
        who = self.registry.join(name)
        return who, await self.client(who, **options)


class Hub:
    """A hub that can crash and come back, with or without its records."""

    def __init__(self, world: World, who: Person, **options: Any) -> None:
        self.world = world
        self.who = who
        self.options = options
        self.node: HubNode
        self.rpc: RpcNode

    async def start(self, backend: Any = None) -> None:
        self.rpc = await self.world.rpc(self.who)
        store = RecordStore(backend)
        self.node = HubNode(self.rpc, self.who.peer_id, self.world.policy, store, self.world.wall, **self.options)
        self.node.set_hubs([hub.who.peer_id for hub in self.world.hubs])
        await self.node.start()

    async def stop(self) -> None:
        await self.node.stop()
        await self.rpc.close()

    def silence(self) -> None:
        self.world.tunnels.down.add(str(self.who.overlay))

    def revive(self) -> None:
        self.world.tunnels.down.discard(str(self.who.overlay))

    def has(self, who: Person) -> bool:
        return bool(self.node.store.find(who.key, self.world.wall()))


def took(world: World, since: float) -> float:
    return world.now - since
