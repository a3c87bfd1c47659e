"""How a hub learns what it missed: it compares digests with a neighbour and fetches what is missing or newer there.

    dht.sync    [prefix, our mark, after] -> [0]                        the same below this prefix
                                             [1, [mark x 16]]           look at the children
                                             [2, [[slot, sequence]..], more]   the leaf, in pages
    dht.fetch   [slot]                    -> [record] or []

Each side pulls for itself, so that neither can push anything at the other, and what is fetched passes the same check
as every store. A pull is bounded in requests and in time; one that was cut short or met loss says so, and is repeated
soon. One that meets an answer out of bounds ends there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Any

from p2pvpn.core.errors import WireError
from p2pvpn.core.limits import BoundedTable
from p2pvpn.core.ports import WallClock

from .digest import CHILDREN, DEPTH, EMPTY_MARK, MARK_BYTES
from .packing import list_untrusted, shape_untrusted
from .policy import RecordRefused
from .records import KEY_BYTES
from .rpc import RpcError, RpcNode, RpcTimeoutError
from .storage import SLOT_BYTES, RecordStore

LEAF_ROWS = 16
"""Rows in one answer: 16 of 52 bytes fit one packet, and a node with no more is not divided."""
WIDTH = 48
"""Requests under way at a time."""
MAX_COMPARISONS = 20_000
"""In one pull: every node of the tree, and the pages of 200,000 records."""
PULL_S = 120.0
REFUSED_S = 120.0
"""Before a record that was refused is fetched again: a new document or a corrected clock may have changed our mind."""
MAX_REFUSED = 10_000
"""Refused records that are remembered, by hub: what one hub makes up does not hide what another has."""

_log = logging.getLogger(__name__)
_SAME, _CHILDREN, _LEAF = 0, 1, 2


def compare(store: RecordStore, args: object) -> list[object]:
    """Answer `dht.sync`. Raises WireError."""
    prefix, mark, after = shape_untrusted(args, str, bytes, bytes)
    if len(prefix) > DEPTH or not set(prefix) <= set(CHILDREN) or len(after) not in (0, SLOT_BYTES):
        raise WireError("a prefix or cursor out of range")
    if mark == store.digest.mark(prefix):
        return [_SAME]
    if store.digest.count(prefix) > LEAF_ROWS and len(prefix) < DEPTH and not after:
        return [_CHILDREN, store.digest.children(prefix)]
    rows = store.listing(prefix, after, LEAF_ROWS + 1)
    return [_LEAF, [[row.slot, row.sequence] for row in rows[:LEAF_ROWS]], len(rows) > LEAF_ROWS]


def fetch(store: RecordStore, args: object, wall: float) -> list[object]:
    """Answer `dht.fetch`. Raises WireError."""
    (slot,) = shape_untrusted(args, bytes)
    row = store.at(slot, wall)
    return [row.raw] if row is not None else []


@dataclass(slots=True)
class Pulled:
    """What a pull brought. Unless `complete`, there may be more to fetch."""

    records: int = 0
    complete: bool = True


class Puller:
    """Pulls from neighbours into one store. `accept(raw, key)` verifies and stores, or raises RecordRefused."""

    def __init__(
        self,
        rpc: RpcNode,
        store: RecordStore,
        wall: WallClock,
        accept: Callable[[bytes, bytes], object],
        is_mine: Callable[[bytes], bool],
    ) -> None:
        self._rpc = rpc
        self._store = store
        self._wall = wall
        self._accept = accept
        self._is_mine = is_mine
        self._fetching: set[bytes] = set()
        self._refused: BoundedTable[tuple[IPv6Address, bytes], tuple[int, float]] = BoundedTable(MAX_REFUSED)

    async def pull(self, hub: IPv6Address) -> Pulled:
        """Fetch what `hub` has and we lack."""
        pulled = Pulled()
        try:
            async with asyncio.timeout(PULL_S):
                await self._pull(hub, pulled)
        except (TimeoutError, RpcTimeoutError):
            pulled.complete = False
        except WireError as problem:
            _log.warning("hub %s answers what it should not: %s", hub, problem)
        return pulled

    async def _pull(self, hub: IPv6Address, pulled: Pulled) -> None:
        todo: list[tuple[str, bytes]] = [("", b"")]
        for _ in range(0, MAX_COMPARISONS, WIDTH):
            if not todo:
                return
            batch, todo = todo[:WIDTH], todo[WIDTH:]
            wanted: list[tuple[bytes, int]] = []
            for place, answer in zip(batch, await self._ask_all(hub, "dht.sync", self._questions(batch)), strict=True):
                if answer is None:
                    pulled.complete = False
                else:
                    todo += self._read_untrusted(hub, place, answer, wanted)
            for start in range(0, len(wanted), WIDTH):
                await self._fetch(hub, wanted[start : start + WIDTH], pulled)
        pulled.complete = False

    def _questions(self, places: Iterable[tuple[str, bytes]]) -> list[list[object]]:
        self._store.expire(self._wall())
        return [[prefix, self._store.digest.mark(prefix), after] for prefix, after in places]

    def _read_untrusted(
        self, hub: IPv6Address, place: tuple[str, bytes], answer: object, wanted: list[tuple[bytes, int]]
    ) -> list[tuple[str, bytes]]:
        """Where to look next; what to fetch goes to `wanted`. Raises WireError."""
        prefix, after = place
        if answer == [_SAME]:
            return []
        if type(answer) is list and len(answer) == 2 and answer[0] == _CHILDREN and len(prefix) < DEPTH:
            marks = list_untrusted(answer[1], bytes, len(CHILDREN))
            if len(marks) != len(CHILDREN) or any(len(mark) != MARK_BYTES for mark in marks):
                raise WireError("not the marks of 16 children")
            children = zip(CHILDREN, marks, strict=True)
            return [
                (prefix + digit, b"")
                for digit, mark in children
                if mark not in (EMPTY_MARK, self._store.digest.mark(prefix + digit))
            ]
        kind, items, more = shape_untrusted(answer, int, list, bool)
        if kind != _LEAF or len(items) > LEAF_ROWS or (more and not items):
            raise WireError("not a leaf")
        for item in items:
            slot, sequence = shape_untrusted(item, bytes, int)
            if len(slot) != SLOT_BYTES or slot <= after or not slot.hex().startswith(prefix):
                raise WireError("a slot out of order")
            after = slot
            if self._is_wanted(hub, slot, sequence):
                wanted.append((slot, sequence))
        return [(prefix, after)] if more else []

    def _is_wanted(self, hub: IPv6Address, slot: bytes, sequence: int) -> bool:
        own = self._store.at(slot, self._wall())
        if own is not None and own.sequence >= sequence:
            return False
        refused = self._refused.peek((hub, slot))
        if refused is not None and refused[0] >= sequence and asyncio.get_running_loop().time() < refused[1]:
            return False
        return slot not in self._fetching and self._is_mine(slot[:KEY_BYTES])

    async def _fetch(self, hub: IPv6Address, wanted: Sequence[tuple[bytes, int]], pulled: Pulled) -> None:
        self._fetching.update(slot for slot, _ in wanted)
        try:
            answers = await self._ask_all(hub, "dht.fetch", [[slot] for slot, _ in wanted])
        finally:
            self._fetching.difference_update(slot for slot, _ in wanted)
        for (slot, sequence), answer in zip(wanted, answers, strict=True):
            if answer is None:
                pulled.complete = False
                continue
            try:
                (raw,) = shape_untrusted(answer, bytes)
                self._accept(raw, slot[:KEY_BYTES])
                pulled.records += 1
            except (WireError, RecordRefused):
                self._refused.put((hub, slot), (sequence, asyncio.get_running_loop().time() + REFUSED_S))

    async def _ask_all(self, hub: IPv6Address, method: str, questions: Sequence[list[object]]) -> list[Any]:
        """The answers in order, None for those that failed. Raises RpcTimeoutError when nobody answers at all."""

        async def ask(question: list[object]) -> object:
            try:
                return await self._rpc.request(hub, method, question)
            except RpcError:
                return None

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(question)) for question in questions]
        answers = [task.result() for task in tasks]
        if all(answer is None for answer in answers):
            raise RpcTimeoutError(f"{hub} does not answer {method}")
        return answers
