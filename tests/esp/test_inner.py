"""Inner packets: lengths, flows, ECN, ICMP errors, fragments."""

from __future__ import annotations

import ipaddress
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pvpn.core.errors import WireError
from p2pvpn.esp.inner import (
    NO_PORT,
    checksum,
    flow_untrusted,
    fragments,
    is_link_scoped,
    may_fragment,
    too_big,
    traffic_class,
    trimmed_untrusted,
    with_outer_ecn,
)

from .packets import ALICE, ALICE6, BOB, BOB6, ipv4, ipv6, ones_complement, ports


@given(st.binary(max_size=120))
def test_the_checksum_makes_the_sum_come_out_right(data):
    whole = data + b"\0" * (len(data) & 1)
    assert ones_complement(whole + checksum(data).to_bytes(2, "big")) in (0xFFFF, 0)


@given(st.binary(max_size=200))
def test_any_bytes_are_an_ip_packet_or_a_wire_error(data):
    try:
        packet = trimmed_untrusted(data)
        flow_untrusted(packet)
    except WireError:
        return
    assert data.startswith(packet)


@given(st.sampled_from([b"\x45", b"\x46", b"\x60"]), st.binary(min_size=39, max_size=300), st.integers(0, 200))
def test_ip_like_bytes_never_escape_the_parser(first, rest, total):
    data = bytearray(first + rest)
    data[2:4] = (20 + total).to_bytes(2, "big")
    if first == b"\x60":
        data[4:6] = total.to_bytes(2, "big")
    try:
        packet = trimmed_untrusted(bytes(data))
        flow_untrusted(packet)
        too_big(packet, 1280)
        with_outer_ecn(packet, 3)
    except WireError:
        return


def test_bytes_after_the_end_are_cut_off():
    for packet in (ipv4(ALICE, BOB, b"hello"), ipv6(ALICE6, BOB6, b"hello")):
        assert trimmed_untrusted(packet + bytes(30)) == packet
        with pytest.raises(WireError):
            trimmed_untrusted(packet[:-1])


def test_the_flow_of_a_packet():
    assert flow_untrusted(ipv4(ALICE, BOB, ports(1000, 53))) == (17, 1000, 53)
    assert flow_untrusted(ipv4(ALICE, BOB, ports(1000, 53), options=b"\x01" * 8)) == (17, 1000, 53)
    assert flow_untrusted(ipv4(ALICE, BOB, ports(1000, 53), flags=0x0001)) == (17, NO_PORT, NO_PORT)
    assert flow_untrusted(ipv4(ALICE, BOB, b"\x08\x00\x00\x00", protocol=1)) == (1, 0x0800, 0x0800)
    assert flow_untrusted(ipv6(ALICE6, BOB6, ports(1000, 53))) == (17, 1000, 53)
    hop_by_hop = b"\x11\x00" + bytes(6)
    assert flow_untrusted(ipv6(ALICE6, BOB6, hop_by_hop + ports(1000, 53), protocol=0)) == (17, 1000, 53)
    first, later = b"\x11\0\0\1\0\0\0\1", b"\x11\0\0\x80\0\0\0\1"
    assert flow_untrusted(ipv6(ALICE6, BOB6, first + ports(1000, 53), protocol=44)) == (17, 1000, 53)
    assert flow_untrusted(ipv6(ALICE6, BOB6, later + ports(1000, 53), protocol=44)) == (17, NO_PORT, NO_PORT)


def test_endless_extension_headers_are_refused():
    with pytest.raises(WireError):
        flow_untrusted(ipv6(ALICE6, BOB6, bytes(400), protocol=0))


NOT_ECT, ECT_1, ECT_0, CE = range(4)
# RFC 6040 figure 4, read row by row.
FIGURE_4 = {
    NOT_ECT: {NOT_ECT: NOT_ECT, ECT_0: NOT_ECT, ECT_1: NOT_ECT, CE: None},
    ECT_0: {NOT_ECT: ECT_0, ECT_0: ECT_0, ECT_1: ECT_1, CE: CE},
    ECT_1: {NOT_ECT: ECT_1, ECT_0: ECT_1, ECT_1: ECT_1, CE: CE},
    CE: {NOT_ECT: CE, ECT_0: CE, ECT_1: CE, CE: CE},
}


@pytest.mark.parametrize(("inner", "outer"), list(itertools.product(range(4), range(4))))
def test_ecn_is_combined_as_rfc_6040_says(inner, outer):
    for packet in (ipv4(ALICE, BOB, b"data", tos=0xB8 | inner), ipv6(ALICE6, BOB6, b"data", tclass=0xB8 | inner)):
        combined = with_outer_ecn(packet, 0xFC | outer)
        expected = FIGURE_4[inner][outer]
        if expected is None:
            assert combined is None
            continue
        assert traffic_class(combined) == 0xB8 | expected
        if packet[0] >> 4 == 4:
            assert ones_complement(combined[:20]) == 0xFFFF


def test_link_scoped_destinations_are_told_apart():
    for scoped in ("224.0.0.251", "169.254.1.1", "255.255.255.255"):
        assert is_link_scoped(ipv4(ALICE, scoped))
    for scoped in ("ff02::fb", "fe80::1", "ff01::1", "febf::1"):
        assert is_link_scoped(ipv6(ALICE6, scoped))
    for routed in ("239.1.1.1", "10.0.0.1", "224.0.1.1"):
        assert not is_link_scoped(ipv4(ALICE, routed))
    for routed in ("ff05::1", "ff0e::1", "fd00::1", "fec0::1"):
        assert not is_link_scoped(ipv6(ALICE6, routed))


def test_too_big_for_ipv4_names_the_mtu_and_quotes_the_packet():
    packet = ipv4(ALICE, BOB, ports(1, 2) + bytes(1400))
    reply = too_big(packet, 1280)
    assert ipaddress.IPv4Address(reply[12:16]) == ipaddress.IPv4Address(BOB)
    assert ipaddress.IPv4Address(reply[16:20]) == ipaddress.IPv4Address(ALICE)
    assert ones_complement(reply[:20]) == ones_complement(reply[20:]) == 0xFFFF
    assert reply[20:22] == b"\x03\x04"
    assert int.from_bytes(reply[26:28], "big") == 1280
    assert reply[28:] == packet[:28]
    assert int.from_bytes(reply[2:4], "big") == len(reply)


def test_too_big_for_ipv6_names_the_mtu_and_quotes_the_packet():
    packet = ipv6(ALICE6, BOB6, ports(1, 2) + bytes(1400))
    reply = too_big(packet, 1100)
    assert len(reply) == 1280
    assert reply[8:24] == packet[24:40]
    assert reply[24:40] == packet[8:24]
    pseudo = reply[8:40] + (len(reply) - 40).to_bytes(4, "big") + b"\0\0\0\x3a"
    assert ones_complement(pseudo + reply[40:]) == 0xFFFF
    assert reply[40:42] == b"\x02\x00"
    assert int.from_bytes(reply[44:48], "big") == 1280
    assert reply[48:] == packet[: len(reply) - 48]


def test_no_icmp_error_about_an_icmp_error_or_a_group():
    assert too_big(ipv4(ALICE, BOB, b"\x03\x04" + bytes(1400), protocol=1), 1280) is None
    assert too_big(ipv4(ALICE, BOB, b"\x08\x00" + bytes(1400), protocol=1), 1280) is not None
    assert too_big(ipv6(ALICE6, BOB6, b"\x02\x00" + bytes(1400), protocol=58), 1280) is None
    assert too_big(ipv6(ALICE6, BOB6, b"\x80\x00" + bytes(1400), protocol=58), 1280) is not None
    assert too_big(ipv4("239.0.0.1", BOB, bytes(1400)), 1280) is None
    assert too_big(ipv6("ff05::1", BOB6, bytes(1400)), 1280) is None


@given(
    st.integers(0, 4000), st.integers(576, 1400), st.sampled_from([0, 0x2000 | 30, 185]), st.sampled_from([0, 4, 12])
)
def test_fragments_put_together_are_the_packet(size, mtu, field, options):
    payload = bytes(n & 255 for n in range(size))
    packet = ipv4(ALICE, BOB, payload, flags=field, options=(b"\x07" + bytes([options]) + bytes(10))[:options])
    pieces = fragments(packet, mtu)
    header = 20 + options
    out = bytearray(size)
    for number, piece in enumerate(pieces):
        assert len(piece) <= mtu
        assert ones_complement(piece[:header]) == 0xFFFF
        assert int.from_bytes(piece[2:4], "big") == len(piece)
        at = int.from_bytes(piece[6:8], "big")
        last = number == len(pieces) - 1
        assert bool(at & 0x2000) == (not last or bool(field & 0x2000))
        start = ((at & 0x1FFF) - (field & 0x1FFF)) * 8
        out[start : start + len(piece) - header] = piece[header:]
        if number and options:
            assert piece[20] == 1
    assert bytes(out) == payload


def test_only_ipv4_without_df_may_be_fragmented():
    assert may_fragment(ipv4(ALICE, BOB, flags=0))
    assert not may_fragment(ipv4(ALICE, BOB, flags=0x4000))
    assert not may_fragment(ipv6(ALICE6, BOB6))
