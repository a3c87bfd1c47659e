"""The form of records: one encoding each, and nothing but WireError for anything else."""

from __future__ import annotations

import ipaddress
from ipaddress import IPv6Address
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pvpn.core.address import Endpoint
from p2pvpn.core.errors import WireError
from p2pvpn.core.ids import NetworkId, PeerId
from p2pvpn.dht import found, messages, records, sync
from p2pvpn.dht.messages import Refusal, Request, Result
from p2pvpn.dht.records import Body, LocatorBody, NameBody, RouteBody
from p2pvpn.dht.storage import RecordStore

from .world import NETWORK, Registry

peer_ids = st.binary(min_size=20, max_size=20).map(PeerId)
usable = st.ip_addresses().filter(lambda a: not (a.is_multicast or a.is_unspecified or getattr(a, "ipv4_mapped", None)))
endpoints = st.builds(Endpoint.of, usable.map(str), st.integers(1, 65535))
prefixes = st.builds(
    lambda address, length: ipaddress.ip_network(f"{address}/{length}", strict=False),
    st.ip_addresses(),
    st.integers(0, 32),
)
bodies: st.SearchStrategy[Body] = st.one_of(
    st.builds(
        LocatorBody,
        st.lists(peer_ids, max_size=records.MAX_HUBS).map(tuple),
        st.lists(endpoints, max_size=records.MAX_ENDPOINTS).map(tuple),
    ),
    st.builds(
        NameBody,
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=63),
        st.ip_addresses(v=6),
    ),
    st.builds(RouteBody, prefixes, st.integers(0, 255)),
)
nested: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=40) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=6),
    max_leaves=20,
)


def fields_of(raw: bytes) -> list[Any]:
    return msgpack.unpackb(raw)


@given(body=bodies, sequence=st.integers(0, 2**63 - 1), expires=st.integers(0, 2**63 - 1), subject=peer_ids)
def test_what_was_built_is_parsed_again(body: Body, sequence: int, expires: int, subject: PeerId) -> None:
    raw = records.build(
        NETWORK, subject, body, sequence=sequence, expires=expires, sign=lambda data: b"signed", certificate=b"leaf"
    )
    record = records.parse_untrusted(raw)
    assert (record.body, record.sequence, record.expires, record.subject) == (body, sequence, expires, subject)
    assert record.raw == raw
    assert record.signed_part == records.SIGNING_CONTEXT + msgpack.packb(fields_of(raw)[:7])
    assert len(records.key_of(record)) == 20


def test_each_kind_is_found_where_its_readers_look() -> None:
    who = Registry().join("desktop")
    prefix = ipaddress.ip_network("192.0.2.0/24")
    for body, key in (
        (LocatorBody((), ()), records.key_of_locator(NETWORK, who.overlay)),
        (NameBody("Desktop", who.overlay), records.key_of_name(NETWORK, "desktop")),
        (RouteBody(prefix), records.key_of_route(NETWORK, prefix)),
    ):
        assert records.key_of(records.parse_untrusted(who.record(body=body))) == key
    other = NetworkId(bytes(32))
    keys = {
        records.key_of_locator(NETWORK, who.overlay),
        records.key_of_locator(other, who.overlay),
        records.key_of_name(NETWORK, str(who.overlay)),
        records.key_of_route(NETWORK, ipaddress.ip_network(who.overlay)),
    }
    assert len(keys) == 4


def test_an_ordinary_record_fits_one_packet_with_its_frame() -> None:
    who = Registry().join("laptop")
    body = LocatorBody(
        tuple(PeerId(bytes([n]) * 20) for n in range(3)), tuple(Endpoint.of(f"2001:db8::{n}", 4500) for n in range(4))
    )
    raw = who.record(body=body)
    store = messages.build(Request(bytes(12), 3, "dht.store", [bytes(20), raw, 1]))
    assert len(store) <= messages.GOOD_MESSAGE_BYTES
    assert len(messages.build(Result(bytes(12), 3, 500, found.Found((raw,)).value))) <= messages.GOOD_MESSAGE_BYTES


def test_bodies_beyond_their_bounds_are_not_built() -> None:
    who = Registry().join("laptop")
    for body in (
        LocatorBody(tuple(PeerId(bytes([n]) * 20) for n in range(9)), ()),
        LocatorBody((), tuple(Endpoint.of("192.0.2.1", n) for n in range(1, 18))),
        LocatorBody((), (Endpoint.of("192.0.2.1", 0),)),
        LocatorBody((), (Endpoint.of("0.0.0.0", 1),)),
        LocatorBody((), (Endpoint.of("ff02::1", 1),)),
        NameBody("", who.overlay),
        NameBody("x" * 256, who.overlay),
        RouteBody(ipaddress.ip_network("10.0.0.0/8"), 256),
    ):
        with pytest.raises(ValueError, match="accept"):
            who.record(body=body)
    with pytest.raises(ValueError, match="accept"):
        who.record(certificate=bytes(records.MAX_RECORD_BYTES))


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f[:7],
        lambda f: [*f, b""],
        lambda f: [True, *f[1:]],
        lambda f: [4, *f[1:]],
        lambda f: [2, *f[1:]],
        lambda f: [f[0], f[1] + b"x", *f[2:]],
        lambda f: [*f[:2], f[2][:-1], *f[3:]],
        lambda f: [*f[:3], -1, *f[4:]],
        lambda f: [*f[:3], 2**64 - 1, *f[4:]],
        lambda f: [*f[:3], 1.5, *f[4:]],
        lambda f: [*f[:4], None, *f[5:]],
        lambda f: [*f[:5], {}, *f[6:]],
        lambda f: [*f[:5], [[], [], []], *f[6:]],
        lambda f: [*f[:5], [[b"short"], []], *f[6:]],
        lambda f: [*f[:5], [[], [b"\x00" * 10 + b"\xff\xff\xc0\x00\x02\x01\x11\x94"]], *f[6:]],
        lambda f: [*f[:6], "text", f[7]],
        lambda f: [*f[:7], 5],
        lambda f: [*f[:7], msgpack.Timestamp(1)],
        lambda f: {"kind": 1},
        lambda f: [3, *f[1:5], [[b"\x0a\x00\x00\x01", 8], 0], *f[6:]],
        lambda f: [3, *f[1:5], [[b"\x0a\x00\x00\x00", 33], 0], *f[6:]],
    ],
)
def test_other_shapes_are_refused(change: Any) -> None:
    raw = Registry().join("laptop").record()
    with pytest.raises(WireError):
        records.parse_untrusted(msgpack.packb(change(fields_of(raw))))


def test_other_encodings_of_the_same_values_are_refused() -> None:
    raw = Registry().join("laptop").record()
    assert raw[:2] == b"\x98\x01"
    for other in (
        b"\x98\xcc\x01" + raw[2:],  # the kind in two bytes
        b"\xdc\x00\x08" + raw[1:],  # the array with a long header
        raw.replace(b"\xc4\x20" + NETWORK, b"\xc5\x00\x20" + NETWORK),  # the network with a long header
        raw + b"\x00",
        raw[:-1],
    ):
        with pytest.raises(WireError):
            records.parse_untrusted(other)


def test_deep_nesting_is_refused_at_once() -> None:
    for depth in (10, 500, 2000):
        with pytest.raises(WireError):
            records.parse_untrusted(b"\x91" * depth + b"\xc0")
        with pytest.raises(WireError):
            messages.parse_untrusted(b"\x91" * depth + b"\xc0")
    assert isinstance(messages.parse_untrusted(messages.build(Result(bytes(8), 0, 0, [[[[]]]]))), Result)


GOOD_RECORD = Registry().join("laptop").record(body=LocatorBody((), (Endpoint.of("192.0.2.1", 4500),)))
GOOD_MESSAGE = messages.build(Request(bytes(12), 0, "dht.find", [bytes(20), b"", 0]))


@settings(max_examples=300)
@given(
    data=st.one_of(
        st.binary(max_size=200),
        nested.map(msgpack.packb),
        st.tuples(
            st.sampled_from([GOOD_RECORD, GOOD_MESSAGE]), st.integers(0, len(GOOD_RECORD) - 1), st.integers(0, 255)
        ).map(lambda t: t[0][: t[1]] + bytes([t[2]]) + t[0][t[1] + 1 :]),
    )
)
def test_parsers_raise_nothing_but_wire_errors(data: bytes) -> None:
    for parse in (records.parse_untrusted, messages.parse_untrusted):
        try:
            value = parse(data)
        except WireError:
            continue
        again = value.raw if isinstance(value, records.Record) else messages.build(value)
        assert parse(again) == value


@given(value=nested)
def test_readers_of_arguments_and_results_raise_nothing_but_wire_errors(value: Any) -> None:
    store = RecordStore()
    for read in (
        found.wanted_untrusted,
        found.found_untrusted,
        lambda args: sync.compare(store, args),
        lambda args: sync.fetch(store, args, 0.0),
    ):
        try:
            read(value)
        except WireError:
            continue


@given(
    message=st.one_of(
        st.builds(
            Request,
            st.binary(min_size=8, max_size=16),
            st.integers(0, 255),
            st.text(max_size=8),
            st.lists(nested, max_size=4),
        ),
        st.builds(Result, st.binary(min_size=8, max_size=16), st.integers(0, 255), st.integers(0, 2**32), nested),
        st.builds(
            Refusal,
            st.binary(min_size=8, max_size=16),
            st.integers(0, 255),
            st.integers(0, 65535),
            st.text(max_size=40),
        ),
    )
)
def test_messages_come_back_as_they_were_sent(message: messages.Message) -> None:
    assert messages.parse_untrusted(messages.build(message)) == message


def test_pages_hold_what_fits_and_lead_from_one_to_the_next() -> None:
    registry = Registry()
    store = RecordStore()
    prefix = ipaddress.ip_network("10.9.0.0/16")
    for number in range(5):
        who = registry.join(f"gateway{number}")
        record = records.parse_untrusted(who.record(body=RouteBody(prefix)))
        store.put(record, records.key_of(record), 1_800_000_000.0)
    rows = store.find(records.key_of_route(NETWORK, prefix), 1_800_000_000.0)
    collected: list[bytes] = []
    after = b""
    for _ in range(len(rows)):
        page = found.page(rows, after)
        assert page.records
        collected += page.records
        after = page.next
    assert collected == [row.raw for row in rows]
    assert after == b""
    assert IPv6Address(records.parse_untrusted(collected[0]).overlay)
