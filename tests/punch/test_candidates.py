"""Candidates, their order, and their wire form."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pvpn.core.address import Endpoint
from p2pvpn.core.errors import LocalError, WireError
from p2pvpn.punch.candidates import (
    SIGNALLED,
    Candidate,
    CandidateKind,
    decode_candidates_untrusted,
    encode_candidates,
    is_usable,
    pair_priority,
    priority,
)

HOST, REFLEXIVE = CandidateKind.HOST, CandidateKind.REFLEXIVE


def remote(host: str, port: int = 4500, kind: CandidateKind = HOST) -> Candidate:
    return Candidate.remote(kind, Endpoint(host, port))


def entry(kind: int, packed: bytes) -> bytes:
    return bytes((kind, len(packed))) + packed


def test_priorities_are_those_of_rfc_8445() -> None:
    assert priority(remote("2001:db8::1")) == (126 << 24) + (65535 << 8) + 255
    kinds = sorted(CandidateKind, key=lambda kind: priority(remote("192.0.2.1", kind=kind)), reverse=True)
    assert kinds == [HOST, CandidateKind.DECLARED, CandidateKind.PEER_REFLEXIVE, CandidateKind.MAPPED, REFLEXIVE]
    assert all(0 < priority(remote("192.0.2.1", kind=kind)) < 2**31 for kind in CandidateKind)


def test_a_pair_has_the_same_rank_on_both_sides_and_the_roles_break_ties() -> None:
    assert pair_priority(5, 3) == (3 << 32) + 10 + 1
    assert pair_priority(3, 5) == (3 << 32) + 10


def test_a_list_travels_without_bases_and_in_one_order() -> None:
    here = Endpoint("10.0.0.5", 4500)
    ours = [
        Candidate(REFLEXIVE, Endpoint("192.0.2.1", 7777), here),
        Candidate.host(here),
        Candidate.host(Endpoint("2001:db8::5", 4500)),
        Candidate.host(here),
    ]
    data = encode_candidates(ours)
    assert data == encode_candidates(reversed(ours))
    assert here.packed() in data
    assert set(decode_candidates_untrusted(data)) == {
        remote("10.0.0.5"),
        remote("2001:db8::5"),
        remote("192.0.2.1", 7777, REFLEXIVE),
    }


def test_the_wire_form_is_this() -> None:
    assert encode_candidates([remote("192.0.2.1", 0x1194)]) == bytes.fromhex("01 01 06 c0000201 1194")
    assert decode_candidates_untrusted(b"\0") == ()


def test_peer_reflexive_candidates_stay_at_home() -> None:
    with pytest.raises(LocalError):
        encode_candidates([remote("192.0.2.1", kind=CandidateKind.PEER_REFLEXIVE)])


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "::1", "224.0.0.1", "ff02::1", "0.0.0.0", "::", "255.255.255.255", "0.1.2.3"]
)
def test_addresses_that_mean_no_peer_are_refused(host: str) -> None:
    assert not is_usable(Endpoint(host, 1).ip)
    with pytest.raises(LocalError):
        encode_candidates([remote(host)])
    with pytest.raises(WireError):
        decode_candidates_untrusted(b"\1" + entry(1, Endpoint(host, 4500).packed()))


def test_seventeen_candidates_are_too_many() -> None:
    many = [remote(f"192.0.2.{i}") for i in range(1, 18)]
    with pytest.raises(LocalError):
        encode_candidates(many)
    data = encode_candidates(many[:16])
    assert len(decode_candidates_untrusted(data)) == 16
    with pytest.raises(WireError):
        decode_candidates_untrusted(b"\x11" + data[1:] + entry(5, bytes.fromhex("c00002111194")))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\1",
        b"\1\1\6\xc0\0\2\1\x11",
        b"\1" + entry(1, bytes.fromhex("c00002011194")) + b"\0",
        b"\1" + entry(1, bytes.fromhex("c000020100001194")),
        b"\1" + entry(1, bytes.fromhex("c00002010000")),
        b"\2" + entry(1, bytes.fromhex("c00002011194")) * 2,
        b"\2" + entry(4, bytes.fromhex("c00002011194")) + entry(1, bytes.fromhex("c00002011194")),
        b"\1" + entry(1, bytes(10) + bytes.fromhex("ffffc00002011194")),  # IPv4 in IPv6 is IPv4
        b"\1" + entry(9, bytes(255)) + bytes(300),
    ],
)
def test_broken_lists_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        decode_candidates_untrusted(data)


def test_kinds_of_the_future_and_unsignalled_ones_are_skipped() -> None:
    data = b"\3" + entry(1, bytes.fromhex("c00002011194")) + entry(3, bytes(6)) + entry(200, b"whatever")
    assert decode_candidates_untrusted(data) == (remote("192.0.2.1", 0x1194),)


HOSTS = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(lambda ip: Endpoint.of(str(ip), 1).host)
CANDIDATES = st.builds(
    lambda kind, host, port: Candidate.remote(kind, Endpoint(host, port)),
    st.sampled_from(list(SIGNALLED.values())),
    HOSTS.filter(lambda host: is_usable(Endpoint(host, 1).ip)),
    st.integers(1, 65535),
)


@given(st.lists(CANDIDATES, max_size=16))
def test_every_list_survives_the_wire(candidates: list[Candidate]) -> None:
    decoded = decode_candidates_untrusted(encode_candidates(candidates))
    assert set(decoded) == set(candidates)
    assert encode_candidates(decoded) == encode_candidates(candidates)


@given(st.binary(max_size=600))
def test_any_bytes_raise_nothing_but_wire_errors(data: bytes) -> None:
    try:
        candidates = decode_candidates_untrusted(data)
    except WireError:
        return
    assert len(candidates) <= 16


@given(st.lists(st.tuples(st.integers(0, 8), st.binary(min_size=6, max_size=6)), max_size=4))
def test_what_is_accepted_is_canonical(entries: list[tuple[int, bytes]]) -> None:
    data = bytes((len(entries),)) + b"".join(entry(kind, packed) for kind, packed in entries)
    try:
        candidates = decode_candidates_untrusted(data)
    except WireError:
        return
    if all(kind in SIGNALLED for kind, _ in entries):
        assert encode_candidates(candidates) == data
