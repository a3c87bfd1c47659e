"""Tickets and marks: what goes over the wire, and what hostile bytes may do."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pvpn.core import stun
from p2pvpn.core.address import Endpoint
from p2pvpn.core.errors import WireError
from p2pvpn.core.secret import Secret
from p2pvpn.relay import binding
from p2pvpn.relay.wire import MAX_TICKET_BYTES, RelayTicket, counter_of, is_bind, transaction_id

from .world import entropy_of, wire_errors_only

KEY = Secret(bytes(range(32)))
TICKET = RelayTicket(20000, "0011223344556677.a", KEY, 600)

tickets = st.builds(
    RelayTicket,
    st.integers(1, 65535),
    st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=64),
    st.binary(min_size=32, max_size=32).map(Secret),
    st.integers(1, 86_400),
)


def test_a_ticket_has_the_layout_that_is_documented():
    expected = "01" + "4e20" + "00000258" + "12" + b"0011223344556677.a".hex() + bytes(range(32)).hex()
    assert TICKET.encode().hex() == expected


@settings(deadline=None)
@given(tickets)
def test_a_ticket_survives_the_wire(ticket):
    assert RelayTicket.decode_untrusted(ticket.encode()) == ticket
    assert len(ticket.encode()) <= MAX_TICKET_BYTES


@settings(deadline=None)
@given(
    st.binary(max_size=200)
    | tickets.map(RelayTicket.encode).flatmap(lambda good: st.binary(max_size=9).map(good.__add__))
)
def test_only_wire_errors_escape_the_ticket_parser(data):
    wire_errors_only(RelayTicket.decode_untrusted, data)


@pytest.mark.parametrize(
    ("field", "value"),
    [("version", b"\x02"), ("port", b"\0\0"), ("lifetime", bytes(4)), ("length", b"\0"), ("username", b" ")],
)
def test_a_ticket_with_an_impossible_field_is_refused(field, value):
    offset = {"version": 0, "port": 1, "lifetime": 3, "length": 7, "username": 8}[field]
    good = TICKET.encode()
    with pytest.raises(WireError):
        RelayTicket.decode_untrusted(good[:offset] + value + good[offset + len(value) :])


def test_a_ticket_does_not_show_its_key():
    assert bytes(range(32)).hex() not in repr(TICKET)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.binary(min_size=4, max_size=4))
def test_the_counter_survives_in_the_transaction_id(counter, random):
    assert counter_of(transaction_id(counter, random)) == counter


def test_a_bind_is_known_by_its_marks_and_other_stun_is_not():
    bind = binding.build_request(TICKET, transaction_id(1, b"abcd"), b"")
    check = stun.build(stun.request(b"twelve bytes", username="a:b", priority=1), b"key")
    assert is_bind(bind)
    assert is_bind(memoryview(bind))
    assert not is_bind(check)
    assert not is_bind(b"")
    assert not is_bind(bind[:19])
    assert not is_bind(bind + bytes(256))


def flipped(data: bytes, index: int, bit: int) -> bytes:
    out = bytearray(data)
    out[index % len(out)] ^= 1 << bit
    return bytes(out)


@settings(deadline=None)
@given(
    st.binary(max_size=300)
    | st.builds(
        flipped,
        st.just(binding.build_request(TICKET, transaction_id(1, b"abcd"), b"n" * 24)),
        st.integers(0, 400),
        st.integers(0, 7),
    )
    | st.binary(max_size=200).map(
        lambda tail: b"\0\1" + len(tail).to_bytes(2, "big") + bytes.fromhex("2112a442") + b"rly1" + bytes(8) + tail
    )
)
def test_only_wire_errors_escape_the_request_parser(data):
    wire_errors_only(binding.parse_request_untrusted, data)


@pytest.mark.parametrize("nonce", [b"", b"n" * 24])
@pytest.mark.parametrize("host", ["203.0.113.1", "2001:db8::1"])
def test_no_answer_is_longer_than_its_request(nonce, host):
    entropy = entropy_of(3)
    data = binding.build_request(TICKET, transaction_id(1, entropy(4)), nonce)
    request = binding.parse_request_untrusted(data)
    key = KEY.reveal()
    assert len(binding.build_success(request, key, Endpoint(host, 65535))) <= len(data)
    assert len(binding.build_challenge(request, key, b"n" * binding.NONCE_BYTES)) <= len(data)
