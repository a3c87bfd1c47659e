"""Payloads, proposals, messages: what is built is parsed, and what is damaged is WireError and nothing else."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pvpn.core.address import Path
from p2pvpn.core.errors import WireError
from p2pvpn.core.selector import Selector
from p2pvpn.ike import payloads as p
from p2pvpn.ike.config import IkeId
from p2pvpn.ike.message import (
    HEADER_BYTES,
    Header,
    build_chain,
    build_clear,
    parse_chain_untrusted,
    parse_clear_untrusted,
    parse_header_untrusted,
    walk_untrusted,
)
from p2pvpn.ike.proposals import Proposal, Transform, build_proposals, parse_proposals_untrusted
from p2pvpn.ike.rules import check_untrusted

from .test_dialogue import pair

u8 = st.integers(0, 255)
u16 = st.integers(0, 65535)
transforms = st.builds(Transform, u8, u16, u16)
proposals = st.lists(
    st.builds(Proposal, u8, u8, st.binary(max_size=8), st.lists(transforms, max_size=12).map(tuple)),
    min_size=1,
    max_size=6,
).map(tuple)


@st.composite
def selector(draw) -> Selector:
    kind = draw(st.sampled_from((IPv4Address, IPv6Address)))
    limit = (1 << kind(0).max_prefixlen) - 1
    return Selector(
        kind(draw(st.integers(0, limit))), kind(draw(st.integers(0, limit))), draw(u8), draw(u16), draw(u16)
    )


selector_lists = st.lists(selector(), max_size=8).map(tuple)
same_size = st.integers(1, 16).flatmap(lambda size: st.lists(st.binary(min_size=size, max_size=size), max_size=8))
payload = st.one_of(
    st.builds(p.SecurityAssociation, proposals),
    st.builds(p.KeyExchangeData, u16, st.binary(min_size=1, max_size=100)),
    st.builds(p.IdInitiator, u8, st.binary(max_size=40)),
    st.builds(p.IdResponder, u8, st.binary(max_size=40)),
    st.builds(p.Certificate, u8, st.binary(min_size=1, max_size=60)),
    st.builds(p.CertificateRequest, u8, st.binary(max_size=60)),
    st.builds(p.Authentication, u8, st.binary(max_size=60)),
    st.builds(p.Nonce, st.binary(min_size=16, max_size=256)),
    st.builds(p.Notification, u8, u16, st.binary(max_size=8), st.binary(max_size=30)),
    st.builds(p.Delete, u8, same_size.map(tuple)),
    st.builds(p.VendorId, st.binary(max_size=30)),
    st.builds(p.SelectorsInitiator, selector_lists),
    st.builds(p.SelectorsResponder, selector_lists),
    st.builds(p.Configuration, u8, st.binary(max_size=30)),
    st.builds(p.Eap, st.binary(max_size=30)),
)
chains = st.lists(payload, max_size=10)
headers = st.builds(
    Header,
    st.binary(min_size=8, max_size=8).filter(any),
    st.binary(min_size=8, max_size=8),
    u8,
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)


@given(headers, chains)
def test_a_message_comes_back_as_it_was_built(header, chain):
    message = parse_clear_untrusted(build_clear(header, chain))
    assert message.header == header
    assert list(message.payloads) == chain


@given(proposals)
def test_proposals_come_back_as_they_were_built(offered):
    assert parse_proposals_untrusted(build_proposals(offered)) == offered


@given(st.data())
def test_a_damaged_message_is_a_wire_error_and_nothing_else(data):
    raw = bytearray(build_clear(data.draw(headers), data.draw(chains)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.sampled_from(("set", "cut", "insert"))):
            case "set":
                raw[at] = data.draw(u8)
            case "cut":
                del raw[at : at + data.draw(st.integers(1, 8))]
            case _:
                raw[at:at] = data.draw(st.binary(max_size=8))
        if not raw:
            break
    for length in (None, len(raw)):
        if length is not None and len(raw) >= HEADER_BYTES:
            raw[24:28] = length.to_bytes(4, "big")
        try:
            check_untrusted(parse_clear_untrusted(bytes(raw)))
        except WireError:
            continue


@given(u8, st.binary(max_size=200))
def test_no_body_of_any_type_does_harm(kind, body):
    for parse in (p.parse_payload_untrusted, parse_chain_untrusted, walk_untrusted):
        try:
            parse(kind, body)
        except WireError:
            continue


@given(st.binary(max_size=300))
def test_no_datagram_does_harm_to_an_endpoint(data):
    world, alice, bob = pair()
    alice.initiate(bob)
    for raw in (data, alice.sent()[0][:28] + data, alice.sent()[0][:16] + data):
        if len(raw) >= HEADER_BYTES:
            raw = raw[:24] + len(raw).to_bytes(4, "big") + raw[28:]
        bob.run(bob.ike.handle(Path(bob.address, alice.address), raw, world.now))
        alice.run(alice.ike.handle(Path(alice.address, bob.address), raw, world.now))
    assert len(bob.ike.sa_ids()) <= 1


def test_the_layout_of_a_request_is_that_of_the_rfc():
    """Field by field after RFC 7296 sections 3.1 to 3.4, 3.9 and 3.10."""
    header = Header(b"initiatr", bytes(8), 34, True, False, 0)
    offer = Proposal(1, 1, b"", (Transform(1, 20, 256), Transform(2, 5), Transform(4, 31)))
    raw = build_clear(
        header,
        [
            p.SecurityAssociation((offer,)),
            p.KeyExchangeData(31, b"k" * 32),
            p.Nonce(b"n" * 16),
            p.Notification(0, 16388, b"", b"h" * 20),
        ],
    )
    expected = (
        b"initiatr" + bytes(8) + bytes.fromhex("21 20 22 08 00000000 0000009c")
        + bytes.fromhex("22 00 0028 00 00 0024 01 01 00 03")
        + bytes.fromhex("03 00 000c 01 00 0014 800e 0100  03 00 0008 02 00 0005  00 00 0008 04 00 001f")
        + bytes.fromhex("28 00 0028 001f 0000") + b"k" * 32
        + bytes.fromhex("29 00 0014") + b"n" * 16
        + bytes.fromhex("00 00 001c 00 00 4004") + b"h" * 20
    )  # fmt: skip
    assert raw == expected


def test_traffic_selectors_look_like_the_rfc_draws_them():
    one = Selector(IPv4Address("192.0.2.0"), IPv4Address("192.0.2.255"), 17, 53, 53)
    raw = p.build_payload(p.SelectorsInitiator((one,)))
    assert raw == bytes.fromhex("01 000000 07 11 0010 0035 0035 c0000200 c00002ff")


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (33, ""),
        (33, "00000008 01010001"),  # fewer transforms than it says
        (33, "02000008 01010000"),  # more proposals than there are
        (33, "00000008 01010800"),  # an SPI that is not there
        (33, "00000010 01010001 00000008 01000014 ff"),
        (34, "001f0000"),
        (40, "00" * 15),
        (40, "00" * 257),
        (41, "0009"),
        (41, "00ff4004"),
        (42, "03040002 c0000001"),
        (42, "0300ffff"),
        (42, "0308ffff" + "00" * 8),
        (44, "02000000 0711 0010 0000 ffff c0000200 c00002ff"),
        (44, "01000000 0711 000c 0000 ffff c0000200 c00002ff"),
        (44, "01000000 0711 0003 0000 ffff c0000200 c00002ff"),
        (44, "00000000 00"),
    ],
)
def test_counts_and_lengths_that_lie_are_refused(kind, body):
    with pytest.raises(WireError):
        p.parse_payload_untrusted(kind, bytes.fromhex(body))


def test_a_chain_has_a_bounded_number_of_payloads():
    first, raw = build_chain([p.VendorId(b"")] * 65)
    with pytest.raises(WireError):
        walk_untrusted(first, raw)


def test_selectors_of_unknown_kinds_are_passed_over():
    known = bytes.fromhex("07 00 0010 0000 ffff 0a000000 0a0000ff")
    body = bytes.fromhex("02 000000 09 00 0008 deadbeef") + known
    parsed = p.parse_payload_untrusted(44, body)
    assert parsed == p.SelectorsInitiator((Selector.of_network("10.0.0.0/24"),))


def test_identities_print_without_surprises():
    assert str(IkeId.address("fd00::1")) == "fd00::1"
    assert str(IkeId.fqdn("hub.example")) == "hub.example"
    assert str(IkeId(2, b"a\x00\n\x1b[31m\xff")) == "a\\x00\\n\\x1b[31m\\xff"
    assert str(IkeId(5, b"short")) == "5:" + b"short".hex()
    assert IkeId.address("fd00::1") != IkeId.key_id(IkeId.address("fd00::1").data)


def test_a_header_is_28_bytes_of_one_version():
    header = Header(b"initiatr", b"respondr", 37, False, True, 7)
    raw = header.build(46, 28)
    assert parse_header_untrusted(raw) == (header, 46)
    for damaged in (raw[:27], raw + b"\0", bytes(8) + raw[8:], raw[:17] + b"\x10" + raw[18:]):
        with pytest.raises(WireError):
            parse_header_untrusted(damaged)
