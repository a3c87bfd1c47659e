"""The hub's side of the DHT: it keeps records, answers look-ups, hands records on to the other hubs, and catches up.

    dht.store   [key, record, hops] -> [1 new | 0 known]     refusals carry the reason of the policy
    dht.find    see `found`
    dht.sync    see `sync`
    dht.fetch   see `sync`
    dht.ping    [] -> [peer ID, records]

A record that a peer stores is verified, kept, and handed to the other hubs once (`hops` 1, then 0); what they miss,
they fetch when they next compare digests. A look-up for what is not here asks the other hubs before it says no.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from ipaddress import IPv6Address

from p2pvpn.core.errors import WireError
from p2pvpn.core.ids import PeerId, overlay_address
from p2pvpn.core.limits import BoundedTable, SourceLimiter
from p2pvpn.core.ports import WallClock

from . import sync
from .background import Background
from .found import Found, Wanted, page, wanted_untrusted
from .overlay import Overlay
from .packing import shape_untrusted
from .policy import AcceptancePolicy, Reason, RecordRefused
from .records import Record, parse_untrusted
from .rpc import Code, RpcNode, RpcRefusedError
from .storage import RecordStore, Row, Stored

SYNC_S = 30.0
"""Between comparisons with one neighbour, give or take a fifth."""
SYNC_RETRY_S = 2.0
"""After a comparison that failed; doubles up to SYNC_S."""
START_SYNC_S = 10.0
"""How long `start` waits for the first comparisons."""
WRITE_BEHIND_S = 1.0
"""What a crash may lose; the neighbours have it."""
STORE_RATE, STORE_BURST = 5.0, 60.0
"""Stores per second from one peer: a gateway publishes all its prefixes at once, then rests."""
CRAWL_RATE, CRAWL_BURST = 10.0, 60.0
"""Per second and peer: look-ups for what is not here, each of which asks every other hub."""
MAX_FORWARDS = 2048
"""Records on their way to other hubs; beyond that, digests do it."""
MISS_S = 1.0
"""How long `no` is believed after the other hubs were asked."""
MAX_MISSES = 4096
SOURCES = 65536
LOAD_SLICE = 100
"""Records verified between two turns of the loop, at the start."""

_log = logging.getLogger(__name__)

Allowed = Callable[[IPv6Address, Record], bool]
"""(who asks, record) -> whether the network document lets it know."""


class HubNode:
    """One hub. `on_stored` hears of every new record.

    `rpc` is opened and closed by its owner, as is the store's backend.
    """

    def __init__(
        self,
        rpc: RpcNode,
        me: PeerId,
        policy: AcceptancePolicy,
        store: RecordStore,
        wall: WallClock,
        *,
        allowed: Allowed = lambda asker, record: True,
        on_stored: Callable[[Record], None] = lambda record: None,
    ) -> None:
        self.store = store
        self.refusals: dict[Reason, int] = dict.fromkeys(Reason, 0)
        self._rpc = rpc
        self._me = me
        self._policy = policy
        self._wall = wall
        self._allowed = allowed
        self._on_stored = on_stored
        self._overlay = Overlay(rpc, me, policy.network, store, wall)
        self._puller = sync.Puller(rpc, store, wall, self._accept, self._overlay.is_mine)
        self._stores: SourceLimiter[IPv6Address] = SourceLimiter(STORE_RATE, STORE_BURST, SOURCES)
        self._crawlers: SourceLimiter[IPv6Address] = SourceLimiter(CRAWL_RATE, CRAWL_BURST, SOURCES)
        self._misses: BoundedTable[bytes, float] = BoundedTable(MAX_MISSES)
        self._crawls: dict[bytes, asyncio.Task[bool]] = {}
        self._neighbours: dict[IPv6Address, _Neighbour] = {}
        self._background = Background()
        self._forwards = Background()
        self._started = False
        rpc.is_hub = self.is_hub

    def is_hub(self, address: IPv6Address) -> bool:
        """Whether this overlay address is a hub's, ours included."""
        return address in self._overlay.addresses or address == self._rpc.local

    def set_hubs(self, hubs: Sequence[PeerId]) -> None:
        """The hubs of the network document, this one among them or not. New ones are compared with at once."""
        self._overlay.set_hubs(hubs)
        addresses = {overlay_address(self._policy.network, hub) for hub in hubs if hub != self._me}
        for address in set(self._neighbours) - addresses:
            self._neighbours.pop(address).task.cancel()
        if self._started:
            for address in sorted(addresses - set(self._neighbours)):
                self._neighbours[address] = _Neighbour(self._background.spawn(self._attend(address), f"sync {address}"))

    def nudge(self, hub: IPv6Address) -> None:
        """A tunnel to this hub came up: compare with it now."""
        neighbour = self._neighbours.get(hub)
        if neighbour is not None:
            neighbour.nudged.set()

    async def start(self) -> None:
        """Load and verify the stored records, serve, and fetch what the neighbours have, for START_SYNC_S at most."""
        for count, _ in enumerate(self.store.load(self._reload)):
            if count % LOAD_SLICE == LOAD_SLICE - 1:
                await asyncio.sleep(0)
        self._rpc.register("dht.store", self._on_store, repeatable=True)
        self._rpc.register("dht.find", self._on_find, repeatable=True)
        self._rpc.register("dht.sync", self._on_sync, repeatable=True)
        self._rpc.register("dht.fetch", self._on_fetch, repeatable=True)
        self._rpc.register("dht.ping", lambda sender, args: [bytes(self._me), len(self.store)], repeatable=True)
        self._started = True
        self._background.spawn(self._write_behind(), "write behind")
        self.set_hubs([PeerId(node_id) for node_id in self._overlay.node_ids])
        tried = [asyncio.ensure_future(neighbour.tried.wait()) for neighbour in self._neighbours.values()]
        if tried:
            _, late = await asyncio.wait(tried, timeout=START_SYNC_S)
            for waiter in late:
                waiter.cancel()

    async def stop(self) -> None:
        """Serve no more, and hand the last changes to the backend."""
        for method in ("dht.store", "dht.find", "dht.sync", "dht.fetch", "dht.ping"):
            self._rpc.unregister(method)
        await self._background.close()
        await self._forwards.close()
        self.store.flush()

    async def find(self, asker: IPv6Address, key: bytes) -> list[Record]:
        """What is stored under a key, here or at the other hubs, who are asked at the rate that `asker` may."""
        rows = self.store.find(key, self._wall())
        if not rows and self._crawlers.take(asker, asyncio.get_running_loop().time()):
            await self._look_elsewhere(Wanted(key))
            rows = self.store.find(key, self._wall())
        return [parse_untrusted(row.raw) for row in rows]

    # Methods

    def _on_store(self, sender: IPv6Address, args: object) -> object:
        key, raw, hops = shape_untrusted(args, bytes, bytes, int)
        if not 0 <= hops <= 1:
            raise WireError("a record handed on too often")
        hub = self.is_hub(sender)
        try:
            if not hub and not self._stores.take(sender, asyncio.get_running_loop().time()):
                raise RecordRefused(Reason.RATE)
            stored = self._accept(raw, key, None if hub else sender)
        except RecordRefused as refused:
            self.refusals[refused.reason] += 1
            raise RpcRefusedError(Code.APPLICATION + refused.reason, str(refused)) from None
        if stored is Stored.NEW and hops:
            self._hand_on(key, raw, sender)
        return [int(stored is Stored.NEW)]

    def _on_find(self, sender: IPv6Address, args: object) -> object:
        wanted = wanted_untrusted(args)
        rows = self.store.find(wanted.key, self._wall())
        if sender in self._overlay.addresses:
            nearer = () if rows else tuple(node.id for node in self._overlay.near(wanted.key))
            found = page(rows, wanted.after)
            return Found(found.records, found.next, nearer).value
        if wanted.after or any(row.sequence >= wanted.at_least for row in rows):
            return self._shown(sender, wanted, rows).value
        if not self._crawlers.take(sender, asyncio.get_running_loop().time()):
            raise RpcRefusedError(Code.BUSY, "too many look-ups for what is not here")
        return self._find_elsewhere(sender, wanted)

    def _on_sync(self, sender: IPv6Address, args: object) -> object:
        self._only_hubs(sender)
        self.store.expire(self._wall())
        return sync.compare(self.store, args)

    def _on_fetch(self, sender: IPv6Address, args: object) -> object:
        self._only_hubs(sender)
        return sync.fetch(self.store, args, self._wall())

    def _only_hubs(self, sender: IPv6Address) -> None:
        if not self.is_hub(sender):
            raise RpcRefusedError(Code.UNKNOWN_METHOD, "for hubs")

    # Records

    def _accept(self, raw: bytes, key: bytes, sender: IPv6Address | None = None) -> Stored:
        wall = self._wall()
        if self.store.holds(key, raw, wall):
            return Stored.SAME
        record = self._policy.check(raw, key, wall, sender)
        stored = self.store.put(record, key, wall)
        if stored is Stored.NEW:
            self._misses.pop(key)
            self._on_stored(record)
        return stored

    def _reload(self, row: Row) -> None:
        try:
            self._accept(row.raw, row.key)
        except RecordRefused as refused:
            _log.debug("a stored record is dropped: %s", refused)

    def _hand_on(self, key: bytes, raw: bytes, sender: IPv6Address) -> None:
        for node in self._overlay.near(key):
            address = IPv6Address(node.ip)
            if address != sender and not self._rpc.is_silent(address) and len(self._forwards) < MAX_FORWARDS:
                self._forwards.spawn(self._overlay.hand_on(node, key, raw), f"hand on to {node}")

    def _shown(self, asker: IPv6Address, wanted: Wanted, rows: Sequence[Row]) -> Found:
        return page([row for row in rows if self._allowed(asker, parse_untrusted(row.raw))], wanted.after)

    async def _find_elsewhere(self, asker: IPv6Address, wanted: Wanted) -> object:
        await self._look_elsewhere(wanted)
        return self._shown(asker, wanted, self.store.find(wanted.key, self._wall())).value

    async def _look_elsewhere(self, wanted: Wanted) -> None:
        believed_until = self._misses.peek(wanted.key)
        if believed_until is None or believed_until <= asyncio.get_running_loop().time():
            crawl = self._crawls.get(wanted.key)
            if crawl is None:
                crawl = self._background.spawn(self._crawl(wanted), f"crawl {wanted.key.hex()[:12]}")
                self._crawls[wanted.key] = crawl
            await asyncio.wait((crawl,))

    async def _crawl(self, wanted: Wanted) -> bool:
        def absorb(raw: bytes) -> bool:
            try:
                self._accept(raw, wanted.key)
            except RecordRefused as refused:
                self.refusals[refused.reason] += 1
            rows = self.store.find(wanted.key, self._wall())
            return any(row.sequence >= wanted.at_least for row in rows)

        try:
            found = await self._overlay.crawl(wanted.key, absorb, self._background)
        finally:
            del self._crawls[wanted.key]
        if not found:
            self._misses.put(wanted.key, asyncio.get_running_loop().time() + MISS_S)
        return found

    # Upkeep

    async def _attend(self, hub: IPv6Address) -> None:
        retry_s = SYNC_RETRY_S
        while True:
            pulled = await self._puller.pull(hub)
            neighbour = self._neighbours[hub]
            neighbour.tried.set()
            if pulled.records:
                _log.info("%d records came from hub %s", pulled.records, hub)
            pause_s, retry_s = (SYNC_S, SYNC_RETRY_S) if pulled.complete else (retry_s, min(2 * retry_s, SYNC_S))
            draw = int.from_bytes(self._rpc.entropy(2), "big") / 0x10000
            try:
                async with asyncio.timeout(pause_s * (0.8 + 0.4 * draw)):
                    await neighbour.nudged.wait()
            except TimeoutError:
                continue
            neighbour.nudged.clear()

    async def _write_behind(self) -> None:
        while True:
            await asyncio.sleep(WRITE_BEHIND_S)
            self.store.expire(self._wall())
            self.store.flush()


class _Neighbour:
    """Another hub and the task that keeps us level with it."""

    __slots__ = ("nudged", "task", "tried")

    def __init__(self, task: asyncio.Task[None]) -> None:
        self.task = task
        self.nudged = asyncio.Event()
        self.tried = asyncio.Event()
