"""The `kademlia` package, with our RPC engine, store and policy in place of its own. No other file imports it.

What is used of it: `Node` and the XOR metric, `RoutingTable`, `NodeHeap` and the base of its crawls, and `Server` as
what holds them together. What is replaced, and why:

    rpcudp's engine       never repeats a lost datagram, calls any method that a packet names     -> `rpc`
    welcome_if_new        every source becomes a contact and is sent the whole store              -> the document's hubs
    handle_call_response  one lost answer removes a contact, five silent seconds remove all       -> hubs stay
    republish, refresh    records that never expire; a loop over keys per contact                 -> `hub` syncs
    ValueSpiderCrawl      the most frequent value wins, one dead hub stalls a round               -> RecordCrawl

With up to KSIZE hubs every hub holds every record; with more, the KSIZE nearest to its key do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from ipaddress import IPv6Address
from typing import Any, NoReturn

from kademlia.crawling import SpiderCrawl
from kademlia.network import Server
from kademlia.node import Node
from kademlia.protocol import KademliaProtocol
from kademlia.storage import IStorage

from p2pvpn.core.errors import LocalError, WireError
from p2pvpn.core.ids import NetworkId, PeerId, overlay_address
from p2pvpn.core.ports import WallClock

from .background import Background
from .found import find_all
from .rpc import RpcError, RpcNode
from .storage import RecordStore

KSIZE = 20
"""Replicas of a record."""
CRAWL_S = 0.6
"""How long a crawl waits for hubs that are not known to be silent: four transmissions on an ordinary path."""

Answer = tuple[bool, Any]
"""What kademlia's calls return: whether an answer came, and the answer."""


class _Storage(IStorage):  # type: ignore[misc]
    """The record store as kademlia sees it: to read. Records enter through the policy, and nobody republishes them."""

    def __init__(self, store: RecordStore, wall: WallClock) -> None:
        self._store = store
        self._wall = wall

    def __setitem__(self, key: bytes, value: bytes) -> NoReturn:
        raise LocalError("records enter the store through the acceptance policy")

    def __getitem__(self, key: bytes) -> bytes:
        value = self.get(key)
        if value is None:
            raise KeyError(key)
        return value

    def get(self, key: bytes, default: bytes | None = None) -> bytes | None:
        rows = self._store.find(key, self._wall())
        return max(rows, key=lambda row: row.sequence).raw if rows else default

    def iter_older_than(self, seconds_old: float) -> list[tuple[bytes, bytes]]:
        return []

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        rows = self._store.listing("", b"", len(self._store))
        return iter([(row.key, row.raw) for row in rows])


class HubProtocol(KademliaProtocol):  # type: ignore[misc]
    """kademlia's protocol over `RpcNode`: its calls go out by it, its socket is never opened."""

    def __init__(
        self, source_node: Node, storage: IStorage, ksize: int, rpc: RpcNode, admits: Callable[[Node], bool]
    ) -> None:
        super().__init__(source_node, storage, ksize)
        self.rpc = rpc
        self.admits = admits

    def datagram_received(self, data: bytes, addr: object) -> None:
        """Nothing arrives here: datagrams are the RPC engine's."""

    def welcome_if_new(self, node: Node) -> None:
        """Only hubs of the network document enter the table, and nothing is pushed at them."""
        if self.admits(node) and self.router.is_new_node(node):
            self.router.add_contact(node)

    def handle_call_response(self, result: Answer, node: Node) -> Answer:
        """A hub that did not answer stays in the table: the document says who is a hub, not the weather."""
        if result[0]:
            self.welcome_if_new(node)
        return result

    async def call_ping(self, node_to_ask: Node) -> Answer:
        return await self._call(node_to_ask, "dht.ping", [])

    async def call_store(self, node_to_ask: Node, key: bytes, value: bytes) -> Answer:
        return await self._call(node_to_ask, "dht.store", [key, value, 0])

    async def call_find_value(self, node_to_ask: Node, node_to_find: Node) -> Answer:
        """All that a hub has under a key; the answer is a `Found`."""

        async def ask(args: list[object]) -> object:
            return await self.rpc.request(IPv6Address(node_to_ask.ip), "dht.find", args)

        result: Answer
        try:
            result = True, await find_all(ask, node_to_find.id)
        except (RpcError, WireError):
            result = False, None
        return self.handle_call_response(result, node_to_ask)

    async def _call(self, node: Node, method: str, args: Sequence[object]) -> Answer:
        try:
            result = True, await self.rpc.request(IPv6Address(node.ip), method, args)
        except RpcError:
            result = False, None
        return self.handle_call_response(result, node)


class RecordCrawl(SpiderCrawl):  # type: ignore[misc]
    """Asks all near hubs at once and ends with the first that has what is sought; late answers are taken in too.

    `absorb` verifies and stores a record, and says whether it is one that was sought.
    """

    def __init__(
        self,
        protocol: HubProtocol,
        node: Node,
        peers: list[Node],
        hubs: Callable[[bytes], Node | None],
        absorb: Callable[[bytes], bool],
    ) -> None:
        super().__init__(protocol, node, peers, KSIZE, KSIZE)
        self._hubs = hubs
        self._absorb = absorb

    async def find(self, background: Background) -> bool:
        """Whether a record was found; then it is in the store. Silent hubs are asked, but not waited for."""
        loop = asyncio.get_running_loop()
        until = loop.time() + CRAWL_S
        awaited: set[asyncio.Task[bool]] = set()
        while True:
            for peer in self.nearest.get_uncontacted():
                self.nearest.mark_contacted(peer)
                task = background.spawn(self._ask(peer), f"crawl {peer}")
                if not self.protocol.rpc.is_silent(IPv6Address(peer.ip)):
                    awaited.add(task)
            if not awaited or loop.time() >= until:
                return False
            done, awaited = await asyncio.wait(
                awaited, timeout=until - loop.time(), return_when=asyncio.FIRST_COMPLETED
            )
            if any(not task.cancelled() and task.result() for task in done):
                return True

    async def _ask(self, peer: Node) -> bool:
        ok, found = await self.protocol.call_find_value(peer, self.node)
        if not ok:
            return False
        nearer = [self._hubs(peer_id) for peer_id in found.nearer]
        self.nearest.push([node for node in nearer if node is not None])
        sought = [self._absorb(raw) for raw in found.records]
        return any(sought)


class Overlay(Server):  # type: ignore[misc]
    """The hubs of a network as one of them sees them."""

    protocol_class = HubProtocol

    def __init__(self, rpc: RpcNode, me: PeerId, network: NetworkId, store: RecordStore, wall: WallClock) -> None:
        super().__init__(ksize=KSIZE, alpha=KSIZE, node_id=bytes(me), storage=_Storage(store, wall))
        self._rpc = rpc
        self._network = network
        self._nodes: dict[bytes, Node] = {}
        self.addresses: frozenset[IPv6Address] = frozenset()
        self.protocol: HubProtocol = self._create_protocol()

    def _create_protocol(self) -> HubProtocol:
        return self.protocol_class(self.node, self.storage, self.ksize, self._rpc, self.admits)

    async def listen(self, port: int, interface: str = "") -> None:
        """No socket of its own, and no refresh."""

    async def _refresh_table(self) -> None:
        """Contacts come from the network document, and nobody republishes for someone else."""

    async def get(self, key: object) -> NoReturn:
        raise LocalError("records are found by `crawl`")

    async def set(self, key: object, value: object) -> NoReturn:
        raise LocalError("records are published by a DhtClient")

    def set_hubs(self, hubs: Sequence[PeerId]) -> None:
        """The hubs of the network document; this one may be among them."""
        nodes = {
            bytes(hub): Node(bytes(hub), str(overlay_address(self._network, hub)), self._rpc.port)
            for hub in hubs
            if hub != self.node.id
        }
        for node_id, node in self._nodes.items():
            if node_id not in nodes:
                self.protocol.router.remove_contact(node)
        self._nodes = nodes
        self.addresses = frozenset(IPv6Address(node.ip) for node in nodes.values())
        for node in nodes.values():
            self.protocol.welcome_if_new(node)

    def admits(self, node: Node) -> bool:
        """Whether this is one of the hubs, at its own address."""
        known = self._nodes.get(node.id)
        return known is not None and known.same_home_as(node)

    @property
    def node_ids(self) -> list[bytes]:
        """The other hubs."""
        return list(self._nodes)

    def near(self, key: bytes) -> list[Node]:
        """The other hubs nearest to a key, KSIZE at most."""
        nodes: list[Node] = self.protocol.router.find_neighbors(Node(key))
        return nodes

    def is_mine(self, key: bytes) -> bool:
        """Whether this hub is one of the KSIZE nearest to a key."""
        target = Node(key)
        own = self.node.distance_to(target)
        nearer = [node for node in self._nodes.values() if node.distance_to(target) < own]
        return len(nearer) < KSIZE

    async def crawl(self, key: bytes, absorb: Callable[[bytes], bool], background: Background) -> bool:
        """Ask the other hubs for a key; `absorb(raw)` takes in what they have. Whether something was found."""
        crawl = RecordCrawl(self.protocol, Node(key), self.near(key), self._nodes.get, absorb)
        return bool(await crawl.find(background))

    async def hand_on(self, node: Node, key: bytes, raw: bytes) -> None:
        """Give a record to another hub, which may have it already, or a newer one."""
        await self.protocol.call_store(node, key, raw)
