"""A peer's side of the DHT: publish to every hub it has a tunnel to, ask several at once, believe nothing unchecked.

A look-up ends with the first valid answer, so a dead or lying hub costs nothing when another is right. Answers that
come later are compared: a higher sequence replaces what was returned (`on_newer`), and hubs that lacked the record
are asked for that sequence, upon which they fetch it from the others (only hubs and the subject itself may store).
`Not found` is believed when every hub that is not known to be silent said so, or one did and the others had time.

The newest record seen of each subject under a key is remembered until it expires: older ones are refused, so that no
hub can roll a peer back, and it is still the answer when the hubs have lost it or withhold it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv6Address

from p2pvpn.core.errors import RemoteError, WireError
from p2pvpn.core.ids import PeerId
from p2pvpn.core.limits import BoundedTable
from p2pvpn.core.ports import WallClock

from .background import Background
from .found import find_all
from .packing import shape_untrusted
from .policy import AcceptancePolicy, Reason, RecordRefused
from .records import Record, key_of, parse_untrusted
from .rpc import Code, RpcError, RpcNode, RpcRefusedError

LOOKUP_S = 3.0
"""After which nobody has answered."""
NEGATIVE_S = 0.8
"""Before `not found` is believed, when others than who said so have not answered: longer than a hub asks its
neighbours, which is what the others may still be doing."""
CONTRADICT_S = 0.25
"""How long the others have to contradict a `not found` that itself came late."""
MISS_S = 1.0
"""How long `not found` is remembered: packets for an address that nobody has must not become a flood of questions."""
MAX_ASKED = 8
"""Hubs asked at once."""
MAX_KEYS = 8192
"""Keys with remembered records or sequences."""


class NoHubAnsweredError(RemoteError):
    """No hub gave an answer that could be used: nothing is known, neither yes nor no."""


@dataclass(slots=True)
class _Known:
    """What this peer remembers of one key: the newest record of each subject, and whether it may serve unasked."""

    records: dict[PeerId, Record] = field(default_factory=dict)
    cached: bool = False
    missed_until: float = 0.0


@dataclass(slots=True)
class _Heard:
    """The answer of one hub: the highest sequence it had, or that it gave nothing that can be used."""

    usable: bool
    sequence: int = -1


class DhtClient:
    """One peer's look-ups and publications in one network.

    `on_newer` hears of a record with a higher sequence than a look-up had returned, in the background.
    """

    def __init__(
        self,
        rpc: RpcNode,
        policy: AcceptancePolicy,
        wall: WallClock,
        *,
        on_newer: Callable[[Record], None] = lambda record: None,
    ) -> None:
        self.on_newer = on_newer
        self.refusals: dict[Reason, int] = dict.fromkeys(Reason, 0)
        self._rpc = rpc
        self._policy = policy
        self._wall = wall
        self._hubs: dict[PeerId, IPv6Address] = {}
        self._known: BoundedTable[bytes, _Known] = BoundedTable(MAX_KEYS)
        self._published: BoundedTable[bytes, bytes] = BoundedTable(MAX_KEYS)
        self._lookups: dict[bytes, asyncio.Task[bool]] = {}
        self._background = Background()

    def set_hubs(self, hubs: Sequence[tuple[PeerId, IPv6Address]]) -> None:
        """The hubs that there are tunnels to now. New ones are given what this peer has published."""
        new = {address for peer_id, address in hubs if peer_id not in self._hubs}
        self._hubs = dict(hubs)
        wall = self._wall()
        for key, raw in self._published.items():
            if parse_untrusted(raw).expires <= wall:
                self._published.pop(key)
                continue
            for address in sorted(new):
                self._background.spawn(self._store(address, key, raw), f"publish to {address}")

    async def publish(self, raw: bytes, need: int = 1) -> int:
        """Store a record of ours at every hub; returns the number of hubs that have it as soon as that is `need`.

        The rest goes on in the background. When fewer than `need` take it, all have been tried. Raises RecordRefused
        when every hub that answered refused it, and NoHubAnsweredError when none did.
        """
        key = key_of(parse_untrusted(raw))
        self._published.put(key, raw)
        stores = {self._background.spawn(self._store(hub, key, raw), "publish") for hub in self._ranked()}
        kept, refused = 0, None
        while stores and kept < need:
            done, stores = await asyncio.wait(stores, return_when=asyncio.FIRST_COMPLETED)
            for store in done:
                outcome = None if store.cancelled() else store.result()
                kept += outcome is True
                refused = outcome if isinstance(outcome, Reason) else refused
        if kept:
            return kept
        if refused is not None:
            raise RecordRefused(refused, "by every hub that answered")
        raise NoHubAnsweredError("no hub took the record", hint="Is there a tunnel to any hub?")

    async def lookup(self, key: bytes, *, fresh: bool = False) -> Record | None:
        """The record of a locator's or name's key, or None when there is none. Raises NoHubAnsweredError.

        Remembered records serve until half of their life is over, unless it has to be `fresh`.
        """
        records = await self.lookup_all(key, fresh=fresh)
        return max(records, key=lambda record: record.sequence, default=None)

    async def lookup_all(self, key: bytes, *, fresh: bool = False) -> list[Record]:
        """Every publisher's record under a key, by subject: gateways of a prefix. Raises NoHubAnsweredError."""
        remembered = None if fresh else self.remembered(key)
        if remembered is not None:
            return remembered
        lookup = self._lookups.get(key)
        if lookup is None:
            lookup = self._background.spawn(self._lookup(key), f"look-up {key.hex()[:12]}")
            self._lookups[key] = lookup
        await asyncio.wait((lookup,))
        if lookup.cancelled() or not lookup.result():
            raise NoHubAnsweredError("no hub answered", hint="Is there a tunnel to any hub?")
        return self._alive(self._know(key))

    def remembered(self, key: bytes) -> list[Record] | None:
        """What a look-up would answer without asking anybody; None when it would ask."""
        known = self._known.get(key)
        if known is None or not known.cached:
            return None
        records, wall = self._alive(known), self._wall()
        if records:
            return records if all(wall < _half_life(record) for record in records) else None
        return [] if asyncio.get_running_loop().time() < known.missed_until else None

    def forget(self, key: bytes | None = None) -> None:
        """Look this key, or everything, up anew. The highest sequences seen stay remembered."""
        for known_key, known in self._known.items():
            if key in (None, known_key):
                known.cached = False

    async def close(self) -> None:
        """End what goes on in the background."""
        await self._background.close()

    # Looking up

    async def _lookup(self, key: bytes) -> bool:
        """Whether any hub gave a usable answer; what they knew is remembered then."""
        floor = max((record.sequence for record in self._alive(self._know(key))), default=0)
        hubs = self._ranked()[:MAX_ASKED]
        asked = {self._background.spawn(self._ask(hub, key, floor), f"find at {hub}"): hub for hub in hubs}
        try:
            answered = await self._first_answer(asked, floor)
        finally:
            del self._lookups[key]
        known = self._know(key)
        if answered:
            known.cached = True
            known.missed_until = asyncio.get_running_loop().time() + MISS_S
        self._background.spawn(self._repair(asked, key), "read repair")
        return answered

    async def _first_answer(self, asked: dict[asyncio.Task[_Heard], IPv6Address], floor: int) -> bool:
        """Wait for a record, or for `no` from all who can be expected to answer. Whether anybody answered."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        until = began + LOOKUP_S
        silent = {task for task, hub in asked.items() if self._rpc.is_silent(hub)}
        pending = set(asked)
        answered = False
        while loop.time() < until:
            expected = pending - silent if answered or pending - silent else pending
            if not expected:
                break
            # Who was silent is not waited for, and is heard all the same: it may be back, and the others dead.
            done, pending = await asyncio.wait(
                pending, timeout=until - loop.time(), return_when=asyncio.FIRST_COMPLETED
            )
            heard = [task.result() for task in done if not task.cancelled()]
            if any(one.usable and one.sequence >= floor for one in heard):
                return True
            if not answered and any(one.usable for one in heard):
                answered = True
                until = min(until, max(began + NEGATIVE_S, loop.time() + CONTRADICT_S))
        return answered

    async def _ask(self, hub: IPv6Address, key: bytes, at_least: int) -> _Heard:
        """Ask one hub, check what it says, and remember what is true and new."""

        async def request(args: list[object]) -> object:
            return await self._rpc.request(hub, "dht.find", args, timeout=LOOKUP_S)

        try:
            found = await find_all(request, key, at_least)
        except (RpcError, WireError):
            return _Heard(False)
        highest, usable = -1, not found.records
        for raw in found.records:
            try:
                highest = max(highest, self._take(raw, key))
                usable = True
            except RecordRefused as refused:
                self.refusals[refused.reason] += 1
                usable = usable or refused.reason in (Reason.STALE, Reason.EXPIRED)
        return _Heard(usable, highest)

    def _take(self, raw: bytes, key: bytes) -> int:
        """The sequence of a record, which is remembered if it is the newest. Raises RecordRefused."""
        known = self._know(key)
        same = next((record for record in known.records.values() if record.raw == raw), None)
        wall = self._wall()
        if same is not None and same.expires > wall:
            return same.sequence
        record = self._policy.check(raw, key, wall)
        newest = known.records.get(record.subject)
        if newest is not None and newest.expires > wall and newest.sequence >= record.sequence:
            raise RecordRefused(Reason.STALE)
        known.records[record.subject] = record
        if key not in self._lookups:
            self.on_newer(record)
        return record.sequence

    async def _repair(self, asked: dict[asyncio.Task[_Heard], IPv6Address], key: bytes) -> None:
        """Hear the rest, then point hubs that are behind to the newest sequence: they fetch it from the others."""
        if asked:
            await asyncio.wait(asked)
        best = max((record.sequence for record in self._alive(self._know(key))), default=-1)
        for task, hub in asked.items():
            if not task.cancelled() and task.result().usable and task.result().sequence < best:
                await self._ask(hub, key, best)

    def _know(self, key: bytes) -> _Known:
        known = self._known.get(key)
        if known is None:
            known = _Known()
            self._known.put(key, known)
        return known

    def _alive(self, known: _Known) -> list[Record]:
        wall = self._wall()
        for subject in [subject for subject, record in known.records.items() if record.expires <= wall]:
            del known.records[subject]
        return [known.records[subject] for subject in sorted(known.records)]

    def _ranked(self) -> list[IPv6Address]:
        return sorted(self._hubs.values(), key=lambda hub: (self._rpc.is_silent(hub), hub))

    # Publishing

    async def _store(self, hub: IPv6Address, key: bytes, raw: bytes) -> Reason | bool:
        """True when the hub has it, why not when it refused, False when it did not answer."""
        try:
            shape_untrusted(await self._rpc.request(hub, "dht.store", [key, raw, 1]), int)
        except RpcRefusedError as refused:
            code = refused.code - Code.APPLICATION
            return Reason(code) if 0 <= code < len(Reason) else False
        except (RpcError, WireError):
            return False
        return True


def _half_life(record: Record) -> float:
    return (record.sequence / 1000 + record.expires) / 2
