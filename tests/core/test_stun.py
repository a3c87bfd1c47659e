"""STUN messages: RFC 5769's vectors, our own round trips, and hostile bytes."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pvpn.core import stun
from p2pvpn.core.address import Endpoint
from p2pvpn.core.errors import TrustError, WireError

# RFC 5769 "Test Vectors for Session Traversal Utilities for NAT", sections 2.1 to 2.3; password of all three:
PASSWORD = b"VOkJxbRl1RmTxUk/WvJxBt"
REQUEST = bytes.fromhex(
    "000100582112a442b7e7a701bc34d686fa87dfae"
    "802200105354554e207465737420636c69656e74"
    "002400046e0001ff"
    "80290008932ff9b151263b36"
    "000600096576746a3a68367659202020"
    "000800149aeaa70cbfd8cb56781ef2b5b2d3f249c1b571a2"
    "80280004e57a3bcf"
)
RESPONSE_IPV4 = bytes.fromhex(
    "0101003c2112a442b7e7a701bc34d686fa87dfae"
    "8022000b7465737420766563746f7220"
    "002000080001a147e112a643"
    "000800142b91f599fd9e90c38c7489f92af9ba53f06be7d7"
    "80280004c07d4c96"
)
RESPONSE_IPV6 = bytes.fromhex(
    "010100482112a442b7e7a701bc34d686fa87dfae"
    "8022000b7465737420766563746f7220"
    "002000140002a1470113a9faa5d3f179bc25f4b5bed2b9d9"
    "00080014a382954e4be67bf11784c97c8292c275bfe3ed41"
    "80280004c8fb0b4c"
)
TRANSACTION = bytes(range(12))


def attribute(kind: int, value: bytes) -> bytes:
    return kind.to_bytes(2, "big") + len(value).to_bytes(2, "big") + value + bytes(-len(value) % 4)


def raw(*attributes: bytes, kind: int = 1, cookie: str = "2112a442", length: int | None = None) -> bytes:
    body = b"".join(attributes)
    size = len(body) if length is None else length
    return kind.to_bytes(2, "big") + size.to_bytes(2, "big") + bytes.fromhex(cookie) + TRANSACTION + body


def test_the_sample_request_of_rfc_5769_is_read_and_verified() -> None:
    message = stun.parse_untrusted(REQUEST)
    stun.verify(message, PASSWORD)
    assert message.message_class is stun.Class.REQUEST
    assert message.attributes["USERNAME"] == "evtj:h6vY"
    assert message.attributes["PRIORITY"] == 0x6E0001FF
    assert message.attributes["ICE-CONTROLLED"] == 0x932FF9B151263B36
    assert stun.username_untrusted(REQUEST) == b"evtj:h6vY"


@pytest.mark.parametrize(
    ("data", "mapped"),
    [
        (RESPONSE_IPV4, Endpoint("192.0.2.1", 32853)),
        (RESPONSE_IPV6, Endpoint("2001:db8:1234:5678:11:2233:4455:6677", 32853)),
    ],
)
def test_the_sample_responses_of_rfc_5769_are_read_and_verified(data: bytes, mapped: Endpoint) -> None:
    message = stun.parse_untrusted(data)
    stun.verify(message, PASSWORD)
    assert stun.mapped_address(message) == mapped
    assert stun.username_untrusted(data) is None


# The type of FINGERPRINT, at 100 and 101, may become that of another attribute, which is ignored there.
@pytest.mark.parametrize("position", [*range(100), *range(102, len(REQUEST))])
def test_no_byte_of_a_signed_message_can_change(position: int) -> None:
    data = bytearray(REQUEST)
    data[position] ^= 0x04
    with pytest.raises((WireError, TrustError)):
        stun.verify(stun.parse_untrusted(bytes(data)), PASSWORD)


@pytest.mark.parametrize("mapped", [Endpoint("198.51.100.7", 4500), Endpoint("2001:db8::7", 65535)])
def test_what_is_built_is_read_again(mapped: Endpoint) -> None:
    message = stun.parse_untrusted(stun.build(stun.success(TRANSACTION, mapped), b"key"))
    stun.verify(message, b"key")
    assert message.transaction_id == TRANSACTION
    assert stun.mapped_address(message) == mapped


def test_a_check_is_read_again() -> None:
    check = stun.request(TRANSACTION, username="a:b", priority=5, ice_controlling=2**64 - 1, use_candidate=None)
    message = stun.parse_untrusted(stun.build(check, b"key"))
    assert list(message.attributes)[:4] == ["USERNAME", "PRIORITY", "ICE-CONTROLLING", "USE-CANDIDATE"]
    assert list(message.attributes)[-2:] == ["MESSAGE-INTEGRITY", "FINGERPRINT"]


def test_building_twice_gives_the_same_bytes() -> None:
    check = stun.request(TRANSACTION, username="a:b")
    assert stun.build(check, b"key") == stun.build(check, b"key")


def test_an_error_is_read_again() -> None:
    message = stun.parse_untrusted(stun.build(stun.error(TRANSACTION, 487, "Role Conflict"), b"key"))
    assert message.message_class is stun.Class.ERROR
    assert message.error_code == 487


def test_an_indication_has_its_class() -> None:
    message = stun.parse_untrusted(stun.build(stun.indication(TRANSACTION)))
    assert message.message_class is stun.Class.INDICATION


@pytest.mark.parametrize("key", [b"", b"other"])
def test_another_key_does_not_verify(key: bytes) -> None:
    message = stun.parse_untrusted(stun.build(stun.request(TRANSACTION), b"key"))
    with pytest.raises(TrustError):
        stun.verify(message, key)


def test_a_message_without_integrity_does_not_verify() -> None:
    message = stun.parse_untrusted(stun.build(stun.request(TRANSACTION)))
    with pytest.raises(TrustError):
        stun.verify(message, b"key")


def test_what_stands_behind_the_integrity_is_not_believed() -> None:
    signed = stun.build(stun.request(TRANSACTION, priority=1), b"key")[20:-8]  # Without FINGERPRINT.
    message = stun.parse_untrusted(raw(signed, attribute(0x0025, b"")))
    assert "USE-CANDIDATE" not in message.attributes


def test_a_transaction_id_has_twelve_bytes() -> None:
    with pytest.raises(ValueError, match="12 bytes"):
        stun.request(b"short")


def test_a_response_without_an_address_has_none() -> None:
    with pytest.raises(WireError):
        stun.mapped_address(stun.parse_untrusted(raw(kind=0x0101)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        REQUEST[:19],
        REQUEST[:-1],
        REQUEST + b"\0",
        raw(cookie="2112a443"),
        raw(kind=0xC001),
        raw(kind=0x0003),  # Allocate
        raw(length=4),
        raw(attribute(0x0006, b"ab")[:-1], length=7),
        raw(b"\x00\x06\x00\x08abcd"),  # an attribute beyond the end
        raw(b"\x00\x06"),
        raw(attribute(0x0006, b"\xff\xfe")),  # not UTF-8
        raw(attribute(0x0024, b"\x01")),  # a short fixed-width attribute
        raw(attribute(0x0020, b"\x00\x07\x00\x01\x7f\x00\x00\x01")),  # no such family
        raw(attribute(0x0006, b"a"), attribute(0x0006, b"b")),  # twice
        raw(attribute(0x0042, b"what")),  # has to be understood
        raw(attribute(0x8028, b"\0\0\0\0")),  # a wrong fingerprint
        stun.build(stun.request(TRANSACTION))[:2] + b"\x00\x10" + stun.build(stun.request(TRANSACTION))[4:] + raw()[:8],
        raw(attribute(0x8022, b"x" * 1480)),  # longer than a frame
    ],
)
def test_what_is_no_binding_message_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        stun.parse_untrusted(data)


def test_attributes_that_may_be_ignored_are() -> None:
    message = stun.parse_untrusted(raw(attribute(0xC057, b"\0\0\0\1"), attribute(0x0006, b"a:b")))
    assert message.attributes == {"USERNAME": "a:b"}


@given(st.binary(max_size=120))
def test_any_bytes_raise_nothing_but_wire_errors(data: bytes) -> None:
    for parse in (stun.parse_untrusted, stun.username_untrusted):
        with contextlib.suppress(WireError):
            parse(data)


ATTRIBUTE = st.tuples(
    st.one_of(
        st.sampled_from([0x06, 0x08, 0x09, 0x0C, 0x20, 0x24, 0x25, 0x8028, 0x8029, 0x802A]), st.integers(0, 0xFFFF)
    ),
    st.binary(max_size=24),
)


@given(st.lists(ATTRIBUTE, max_size=6), st.sampled_from([0x0001, 0x0011, 0x0101, 0x0111, 0x0003]))
def test_any_attributes_raise_nothing_but_wire_errors(attributes: list[tuple[int, bytes]], kind: int) -> None:
    data = raw(*(attribute(number, value) for number, value in attributes), kind=kind)
    try:
        message = stun.parse_untrusted(data)
    except WireError:
        return
    with pytest.raises(TrustError):
        stun.verify(message, b"key")


@given(st.text(max_size=60), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.binary(min_size=1, max_size=40))
def test_any_check_survives_the_wire(username: str, priority: int, tie_breaker: int, key: bytes) -> None:
    check = stun.request(TRANSACTION, username=username, priority=priority, ice_controlled=tie_breaker)
    data = stun.build(check, key)
    message = stun.parse_untrusted(data)
    stun.verify(message, key)
    assert message.attributes["USERNAME"] == username
    assert stun.username_untrusted(data) == username.encode()
    assert message.attributes["PRIORITY"] == priority
    assert message.attributes["ICE-CONTROLLED"] == tie_breaker
