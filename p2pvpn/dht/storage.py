"""The records that a hub keeps: bounded, newest sequence wins, gone when they expire, written behind to a backend.

Records come in verified (`policy`); the store decides which one stays:

    nothing there                       stays, if subject, key and store have room
    lower sequence than what is there   refused, STALE: nobody can roll a peer back
    equal sequence, same bytes          stays as it is
    equal sequence, other bytes         refused, CONFLICT: the first stays
    higher sequence                     replaces

A locator or a name has one live subject; the first stays until it expires or its subject replaces it (TAKEN). A route
key holds a record per publisher.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from p2pvpn.core.ids import PEER_ID_BYTES, PeerId

from .digest import DigestTree
from .policy import Reason, RecordRefused
from .records import KEY_BYTES, Kind, Record

MAX_RECORDS = 200_000
"""About three records for each of 65,000 peers."""
MAX_BYTES = 256 << 20
SUBJECT_RECORDS = 40
"""A locator, a name, an IPv4 address, and the prefixes of a large gateway."""
ROUTE_PUBLISHERS = 16
"""Gateways that may serve one prefix."""
SLOT_BYTES = KEY_BYTES + PEER_ID_BYTES
_BULK = 64
"""So many removals at once are cheaper by rebuilding the order than one by one."""


@dataclass(frozen=True, slots=True)
class Row:
    """A stored record. `slot` (key and subject) is unique; `sequence` in milliseconds, `expires` in seconds."""

    slot: bytes
    kind: Kind
    sequence: int
    expires: int
    raw: bytes

    @property
    def key(self) -> bytes:
        return self.slot[:KEY_BYTES]

    @property
    def subject(self) -> PeerId:
        return PeerId(self.slot[KEY_BYTES:])


class Stored(Enum):
    """What became of a record that was not refused."""

    NEW = "new"
    """It is kept from now on."""
    SAME = "same"
    """It was there already, byte for byte."""


class Backend(Protocol):
    """Where rows survive a restart. Calls come from one thread and must not block for long."""

    def load(self) -> Iterable[Row]:
        """Every row, in any order; the caller verifies them again."""
        ...

    def write(self, puts: Sequence[Row], deletes: Sequence[bytes]) -> None:
        """Make one batch of replacements and of slots to forget lasting, all of it or nothing, soon."""
        ...

    def close(self) -> None:
        """Finish writing and let go of the file."""
        ...


class RecordStore:
    """Records by key, at most `max_records` and `max_bytes`."""

    def __init__(
        self, backend: Backend | None = None, *, max_records: int = MAX_RECORDS, max_bytes: int = MAX_BYTES
    ) -> None:
        self.max_records = max_records
        self.max_bytes = max_bytes
        self.bytes_used = 0
        self.digest = DigestTree()
        self._backend = backend
        self._rows: dict[bytes, Row] = {}
        self._order: list[bytes] = []
        self._deaths: list[tuple[int, bytes]] = []
        self._counts: dict[bytes, int] = {}
        self._unwritten: dict[bytes, Row | None] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def put(self, record: Record, key: bytes, wall: float) -> Stored:
        """Keep a verified record. Raises RecordRefused."""
        self.expire(wall)
        slot = key + record.subject
        row = Row(slot, record.kind, record.sequence, record.expires, record.raw)
        old = self._rows.get(slot)
        if old is None:
            self._check_room(row)
        elif old.raw == row.raw:
            return Stored.SAME
        elif old.sequence >= row.sequence:
            raise RecordRefused(Reason.STALE if old.sequence > row.sequence else Reason.CONFLICT)
        if self.bytes_used + len(row.raw) - (len(old.raw) if old else 0) > self.max_bytes:
            raise RecordRefused(Reason.FULL)
        self._insert(row)
        self._unwritten[slot] = row
        return Stored.NEW

    def holds(self, key: bytes, raw: bytes, wall: float) -> bool:
        """Whether these very bytes are stored and alive: they were verified when they came."""
        return any(row.raw == raw for row in self.find(key, wall))

    def at(self, slot: bytes, wall: float) -> Row | None:
        """The live row of one slot."""
        row = self._rows.get(slot)
        return row if row is not None and row.expires > wall else None

    def find(self, key: bytes, wall: float) -> list[Row]:
        """The live rows of a key, by subject."""
        return [row for row in self._from(key, key) if row.expires > wall]

    def listing(self, prefix: str, after: bytes, count: int) -> list[Row]:
        """Up to `count` rows whose slots begin with these hexadecimal digits, in order, behind slot `after`."""
        low = bytes.fromhex(prefix.ljust(2 * SLOT_BYTES, "0"))
        found: list[Row] = []
        for row in self._from(max(low, after + b"\0" if after else low), b""):
            if len(found) == count or not row.slot.hex().startswith(prefix):
                break
            found.append(row)
        return found

    def expire(self, wall: float) -> int:
        """Forget what is dead; how many records that were."""
        dead: dict[bytes, None] = {}
        while self._deaths and self._deaths[0][0] <= wall:
            at, slot = heapq.heappop(self._deaths)
            row = self._rows.get(slot)
            if row is not None and row.expires == at:
                dead[slot] = None
        self._forget(list(dead))
        return len(dead)

    def remove_subject(self, subject: PeerId) -> int:
        """Forget every record of a peer (it was revoked); how many there were."""
        slots = [slot for slot in self._order if slot.endswith(subject)]
        self._forget(slots)
        return len(slots)

    def load(self, accept: Callable[[Row], object]) -> Iterator[None]:
        """Offer the backend's rows to `accept`, which puts them back if they still hold; one row a step."""
        for row in self._backend.load() if self._backend is not None else ():
            accept(row)
            kept = self._rows.get(row.slot)
            if kept is None:
                self._unwritten[row.slot] = None
            elif kept.raw == row.raw:
                self._unwritten.pop(row.slot, None)
            yield

    def flush(self) -> None:
        """Hand what changed since the last call to the backend, as one batch."""
        if not self._unwritten:
            return
        batch, self._unwritten = self._unwritten, {}
        if self._backend is not None:
            puts = [row for row in batch.values() if row is not None]
            self._backend.write(puts, [slot for slot, row in batch.items() if row is None])

    def close(self) -> None:
        """Write what is left, and close the backend."""
        self.flush()
        if self._backend is not None:
            self._backend.close()

    def _from(self, low: bytes, prefix: bytes) -> Iterator[Row]:
        for index in range(bisect_left(self._order, low), len(self._order)):
            slot = self._order[index]
            if not slot.startswith(prefix):
                return
            yield self._rows[slot]

    def _check_room(self, row: Row) -> None:
        others = sum(1 for _ in self._from(row.key, row.key))
        if others >= (ROUTE_PUBLISHERS if row.kind is Kind.ROUTE else 1):
            raise RecordRefused(Reason.TAKEN)
        if self._counts.get(row.slot[KEY_BYTES:], 0) >= SUBJECT_RECORDS:
            raise RecordRefused(Reason.QUOTA)
        if len(self._rows) >= self.max_records:
            raise RecordRefused(Reason.FULL)

    def _insert(self, row: Row) -> None:
        old = self._rows.get(row.slot)
        if old is None:
            insort(self._order, row.slot)
            subject = row.slot[KEY_BYTES:]
            self._counts[subject] = self._counts.get(subject, 0) + 1
        else:
            self.bytes_used -= len(old.raw)
            self.digest.remove(old.slot, old.sequence)
        self._rows[row.slot] = row
        self.bytes_used += len(row.raw)
        self.digest.add(row.slot, row.sequence)
        heapq.heappush(self._deaths, (row.expires, row.slot))
        if len(self._deaths) > 2 * len(self._rows) + _BULK:
            self._deaths = [(kept.expires, kept.slot) for kept in self._rows.values()]
            heapq.heapify(self._deaths)

    def _forget(self, slots: Sequence[bytes]) -> None:
        for slot in slots:
            row = self._rows.pop(slot)
            self.bytes_used -= len(row.raw)
            self.digest.remove(slot, row.sequence)
            subject = slot[KEY_BYTES:]
            self._counts[subject] -= 1
            if not self._counts[subject]:
                del self._counts[subject]
            self._unwritten[slot] = None
            if len(slots) < _BULK:
                del self._order[bisect_left(self._order, slot)]
        if len(slots) >= _BULK:
            self._order = [slot for slot in self._order if slot in self._rows]
