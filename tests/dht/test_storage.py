"""The store: newest wins, bounds hold, the dead leave, digests agree with the content."""

from __future__ import annotations

import ipaddress
import tracemalloc
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from p2pvpn.core.ids import PeerId
from p2pvpn.dht import records, storage
from p2pvpn.dht.digest import CHILDREN, DEPTH, EMPTY_MARK, DigestTree
from p2pvpn.dht.policy import Reason, RecordRefused
from p2pvpn.dht.records import LocatorBody, NameBody, Record, RouteBody, key_of, parse_untrusted
from p2pvpn.dht.storage import RecordStore, Row, Stored

from .world import NETWORK, WALL, Person, Registry

PREFIX = ipaddress.ip_network("10.9.0.0/16")


def subject_id(number: int) -> PeerId:
    return PeerId.of_key(number.to_bytes(4, "big"))


def locator(subject: int, sequence: int, expires: int, padding: int = 0) -> Record:
    raw = records.build(
        NETWORK,
        subject_id(subject),
        LocatorBody((), ()),
        sequence=sequence,
        expires=expires,
        sign=lambda data: b"signed",
        certificate=bytes(padding),
    )
    return parse_untrusted(raw)


def put(store: RecordStore, record: Record, wall: float = WALL) -> Stored:
    return store.put(record, key_of(record), wall)


def refusal(store: RecordStore, record: Record, wall: float = WALL) -> Reason:
    with pytest.raises(RecordRefused) as refused:
        put(store, record, wall)
    return refused.value.reason


def member(name: str = "laptop") -> Person:
    return Registry().join(name)


def test_the_newest_sequence_stays_and_nobody_rolls_it_back() -> None:
    store, who = RecordStore(), member()
    old, new = parse_untrusted(who.record(WALL - 10)), parse_untrusted(who.record(WALL))
    assert put(store, old) is Stored.NEW
    assert put(store, old) is Stored.SAME
    assert put(store, new) is Stored.NEW
    assert refusal(store, old) is Reason.STALE
    other = parse_untrusted(who.record(WALL, LocatorBody((who.peer_id,), ())))
    assert refusal(store, other) is Reason.CONFLICT
    assert [row.raw for row in store.find(who.key, WALL)] == [new.raw]
    assert store.holds(who.key, new.raw, WALL)
    assert not store.holds(who.key, old.raw, WALL)


def test_the_dead_are_not_found_and_leave() -> None:
    store, who = RecordStore(), member()
    put(store, parse_untrusted(who.record(WALL)))
    assert store.find(who.key, WALL + 599)
    assert not store.find(who.key, WALL + 600)
    assert store.expire(WALL + 600) == 1
    assert (len(store), store.bytes_used, store.digest.mark("")) == (0, 0, EMPTY_MARK)


def test_a_refreshed_record_lives_on_also_with_the_same_expiry() -> None:
    store = RecordStore()
    for sequence, expires in ((1, 100), (2, 100), (3, 200)):
        put(store, locator(7, sequence, expires), wall=50)
    assert store.expire(100) == 0
    assert len(store) == 1
    assert store.expire(200) == 1


def test_a_name_has_one_live_holder() -> None:
    registry, store = Registry(), RecordStore()
    first, second = registry.join("laptop"), registry.join("laptop")
    a, b = (parse_untrusted(who.record(body=NameBody("laptop", who.overlay))) for who in (first, second))
    put(store, a)
    assert refusal(store, b) is Reason.TAKEN
    later = WALL + 3600
    assert put(store, parse_untrusted(second.record(later, NameBody("laptop", second.overlay))), later) is Stored.NEW


def test_a_prefix_has_sixteen_publishers_at_most() -> None:
    registry, store = Registry(), RecordStore()
    gateways = [registry.join(f"gateway{number}") for number in range(storage.ROUTE_PUBLISHERS + 1)]
    routes = [parse_untrusted(who.record(body=RouteBody(PREFIX))) for who in gateways]
    for route in routes[:-1]:
        put(store, route)
    assert refusal(store, routes[-1]) is Reason.TAKEN
    rows = store.find(key_of(routes[0]), WALL)
    assert [row.subject for row in rows] == sorted(who.peer_id for who in gateways[:-1])


def test_quota_and_room_are_bounded() -> None:
    store, who = RecordStore(), member()
    for number in range(storage.SUBJECT_RECORDS):
        put(store, parse_untrusted(who.record(body=RouteBody(ipaddress.ip_network((number << 8, 24))))))
    beyond = parse_untrusted(who.record(body=RouteBody(ipaddress.ip_network("99.0.0.0/8"))))
    assert refusal(store, beyond) is Reason.QUOTA
    small = RecordStore(max_records=2)
    put(small, locator(1, 1, 2_000_000_000))
    put(small, locator(2, 1, 2_000_000_000))
    assert refusal(small, locator(3, 1, 2_000_000_000)) is Reason.FULL
    assert put(small, locator(2, 2, 2_000_000_000)) is Stored.NEW
    tight = RecordStore(max_bytes=1000)
    put(tight, locator(1, 1, 2_000_000_000, padding=500))
    assert refusal(tight, locator(2, 1, 2_000_000_000, padding=500)) is Reason.FULL
    assert refusal(tight, locator(1, 2, 2_000_000_000, padding=1500)) is Reason.FULL


def test_a_revoked_peers_records_go_all_at_once() -> None:
    store, who, other = RecordStore(), member(), member()
    put(store, parse_untrusted(who.record()))
    put(store, parse_untrusted(who.record(body=NameBody("laptop", who.overlay))))
    put(store, parse_untrusted(other.record()))
    assert store.remove_subject(who.peer_id) == 2
    assert len(store) == 1


class Shelf:
    """A backend in memory."""

    def __init__(self) -> None:
        self.rows: dict[bytes, Row] = {}
        self.batches = 0

    def load(self) -> Iterable[Row]:
        return list(self.rows.values())

    def write(self, puts: Sequence[Row], deletes: Sequence[bytes]) -> None:
        self.batches += 1
        self.rows.update((row.slot, row) for row in puts)
        for slot in deletes:
            self.rows.pop(slot, None)

    def close(self) -> None:
        """Nothing to let go of."""


def test_changes_are_written_behind_and_what_no_longer_holds_is_dropped_at_loading() -> None:
    shelf = Shelf()
    store = RecordStore(shelf)
    for subject in range(4):
        put(store, locator(subject, 1, 100 + subject), wall=50)
        put(store, locator(subject, 2, 200 + subject), wall=50)
    store.flush()
    store.flush()
    assert (len(shelf.rows), shelf.batches) == (4, 1)
    store.expire(200)
    store.close()
    assert len(shelf.rows) == 3

    again = RecordStore(shelf)
    put(again, locator(2, 9, 300), wall=201)

    def accept(row: Row) -> None:
        if row.expires > 202:
            try:
                again.put(parse_untrusted(row.raw), row.key, 201)
            except RecordRefused:
                return

    for _ in again.load(accept):
        pass
    again.flush()
    assert sorted(row.sequence for row in shelf.rows.values()) == [2, 9]


def test_two_thousand_peers_cost_what_they_may() -> None:
    rounds = [[locator(subject, n, 2_000_000_000 + n) for subject in range(2000)] for n in range(4)]
    tracemalloc.start()
    store = RecordStore()
    for records_of_round in rounds:
        for record in records_of_round:
            put(store, record)
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert used < 2000 * 1024, f"{used / 2000:.0f} bytes a record, besides the record"
    assert len(store._deaths) <= 2 * 2000 + 64 + 1


@settings(max_examples=25, stateful_step_count=30)
class StoreMachine(RuleBasedStateMachine):
    """Any sequence of changes leaves order, counts, bytes and digests as if they were computed anew."""

    def __init__(self) -> None:
        super().__init__()
        self.store = RecordStore(max_records=20)
        self.wall = 0

    @rule(subject=st.integers(0, 30), sequence=st.integers(0, 5), life=st.integers(1, 20))
    def put(self, subject: int, sequence: int, life: int) -> None:
        try:
            put(self.store, locator(subject, sequence, self.wall + life), self.wall)
        except RecordRefused:
            return

    @rule(by=st.integers(0, 8))
    def wait(self, by: int) -> None:
        self.wall += by
        self.store.expire(self.wall)

    @rule(subject=st.integers(0, 30))
    def revoke(self, subject: int) -> None:
        self.store.remove_subject(subject_id(subject))

    @invariant()
    def consistent(self) -> None:
        rows = self.store.listing("", b"", 100)
        assert len(rows) == len(self.store) <= 20
        assert [row.slot for row in rows] == sorted(row.slot for row in rows)
        assert self.store.bytes_used == sum(len(row.raw) for row in rows)
        tree = DigestTree()
        for row in rows:
            tree.add(row.slot, row.sequence)
        for prefix in ("", *CHILDREN):
            assert tree.mark(prefix) == self.store.digest.mark(prefix)
            below = self.store.listing(prefix, b"", 100)
            assert [row.slot for row in below] == [row.slot for row in rows if row.slot.hex().startswith(prefix)]
            assert self.store.digest.count(prefix) == len(below)
            assert (
                [row.slot for row in below[3:]] == [row.slot for row in self.store.listing(prefix, below[2].slot, 100)]
                if len(below) > 2
                else True
            )


TestStoreMachine = StoreMachine.TestCase


def test_digests_differ_where_content_does() -> None:
    one, two = DigestTree(), DigestTree()
    slots = [bytes([n * 7 % 256, n]) * 20 for n in range(200)]
    for slot in slots:
        one.add(slot, 1)
        two.add(slot, 1)
    assert one.mark("") == two.mark("")
    two.remove(slots[50], 1)
    two.add(slots[50], 2)
    path = slots[50].hex()[:DEPTH]
    for depth in range(DEPTH + 1):
        assert one.mark(path[:depth]) != two.mark(path[:depth])
    differing = [digit for digit, a, b in zip(CHILDREN, one.children(""), two.children(""), strict=True) if a != b]
    assert differing == [path[0]]
