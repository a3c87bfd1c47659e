"""The table of SAs: two engines that talk to each other, and strangers that try to join in."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.child import EspSuite
from p2pvpn.core.errors import LocalError
from p2pvpn.core.selector import Selector
from p2pvpn.esp.engine import Delivered, EspEngine, Reason, Refused, Sealed, TooBig, Trapped
from p2pvpn.esp.packet import NEXT_IPV4, NEXT_IPV6, NEXT_NONE, Sealer
from p2pvpn.esp.sa import LAST_SEQUENCE

from .packets import (
    ALICE,
    ALICE6,
    ALICE_AT,
    BOB,
    BOB6,
    BOB_AT,
    CAROL,
    NETWORK,
    ipv4,
    ipv6,
    ones_complement,
    pair,
    ports,
    selectors,
)


def joined(*children, **options):
    """Alice's and Bob's engines with these Child SAs (one by default) installed and in use."""
    alice, bob = EspEngine(), EspEngine()
    for left, right in children or [pair(**options)]:
        alice.install(left)
        bob.install(right)
        alice.use(left.id)
        bob.use(right.id)
    return alice, bob


def refused(result):
    assert isinstance(result, Refused)
    return result.reason


@pytest.mark.parametrize("suite", EspSuite)
@pytest.mark.parametrize("esn", [False, True])
def test_packets_of_both_families_travel_both_ways(suite, esn):
    alice, bob = joined(suite=suite, esn=esn)
    for packet in (ipv4(ALICE, BOB, b"hello"), ipv6(ALICE6, BOB6, bytes(1300))):
        sealed = alice.outbound(NETWORK, packet, 1.0)
        assert isinstance(sealed, Sealed)
        assert sealed.path == Path(ALICE_AT, BOB_AT)
        assert packet not in sealed.datagram
        assert bob.inbound(ALICE_AT, sealed.datagram, 1.0) == Delivered(NETWORK, 1, packet)
    back = ipv6(BOB6, ALICE6, b"back")
    assert alice.inbound(BOB_AT, bob.outbound(NETWORK, back, 1.0).datagram, 2.0).packet == back


def test_nothing_is_sent_over_an_sa_before_it_is_used():
    left, right = pair()
    alice, bob = EspEngine(), EspEngine()
    alice.install(left)
    bob.install(right)
    assert alice.outbound(NETWORK, ipv4(ALICE, BOB), 0.0) == Trapped()
    bob.use(right.id)
    sealed = bob.outbound(NETWORK, ipv4(BOB, ALICE), 0.0)
    assert isinstance(alice.inbound(BOB_AT, sealed.datagram, 0.0), Delivered)


def test_a_new_sa_takes_the_traffic_and_the_former_keeps_receiving():
    first, second = pair(1), pair(2)
    alice, bob = joined(first, second)
    packet = ipv4(ALICE, BOB, b"x")
    sealed = alice.outbound(NETWORK, packet, 0.0)
    assert bob.inbound(ALICE_AT, sealed.datagram, 0.0).child_id == 2
    alice.remove(2)
    sealed = alice.outbound(NETWORK, packet, 0.0)
    assert bob.inbound(ALICE_AT, sealed.datagram, 0.0).child_id == 1
    alice.remove(1)
    assert alice.outbound(NETWORK, packet, 0.0) == Trapped()


def test_the_longest_prefix_wins_whatever_came_first():
    near = pair(1, right=selectors("10.9.0.2/32"))
    far = pair(2, right=selectors("10.9.0.0/16"))
    alice, bob = joined(near, far)
    to_bob = alice.outbound(NETWORK, ipv4(ALICE, BOB), 0.0)
    to_carol = alice.outbound(NETWORK, ipv4(ALICE, CAROL), 0.0)
    assert bob.inbound(ALICE_AT, to_bob.datagram, 0.0).child_id == 1
    assert bob.inbound(ALICE_AT, to_carol.datagram, 0.0).child_id == 2


def test_a_network_sees_only_its_own_sas():
    alice, _ = joined()
    assert alice.outbound("other", ipv4(ALICE, BOB), 0.0) == Trapped()
    alice.remove_network(NETWORK)
    assert alice.outbound(NETWORK, ipv4(ALICE, BOB), 0.0) == Trapped()
    assert alice.usage([1]) == {}


def test_a_source_that_is_not_ours_is_not_sent():
    alice, _ = joined()
    assert alice.outbound(NETWORK, ipv4(CAROL, BOB), 0.0) == Trapped()


@pytest.mark.parametrize(("source", "destination"), [(CAROL, ALICE), (BOB, CAROL), (ALICE, ALICE)])
def test_a_member_cannot_send_with_addresses_that_are_not_its_own(source, destination):
    left, right = pair()
    alice = EspEngine()
    alice.install(left)
    mallory = EspEngine()
    mallory.install(dataclasses.replace(right, local=selectors("0.0.0.0/0"), remote=selectors("0.0.0.0/0")))
    mallory.use(right.id)
    for _ in range(2):
        sealed = mallory.outbound(NETWORK, ipv4(source, destination), 0.0)
        assert refused(alice.inbound(BOB_AT, sealed.datagram, 0.0)) is Reason.WRONG_ADDRESS
    assert alice.drops[Reason.WRONG_ADDRESS] == 2
    assert isinstance(alice.inbound(BOB_AT, mallory.outbound(NETWORK, ipv4(BOB, ALICE), 0.0).datagram, 0.0), Delivered)


def test_ports_and_protocols_choose_the_sa():
    web = (Selector(*(Selector.of_address(BOB).start,) * 2, 6, 80, 80),)
    everything, narrow = pair(1), pair(2, right=web)
    alice, bob = joined(everything, narrow)

    def child(packet):
        return bob.inbound(ALICE_AT, alice.outbound(NETWORK, packet, 0.0).datagram, 0.0).child_id

    for _ in range(2):
        assert child(ipv4(ALICE, BOB, ports(999, 53), protocol=17)) == 1
        assert child(ipv4(ALICE, BOB, ports(999, 80), protocol=6)) == 2
        assert child(ipv4(ALICE, BOB, ports(999, 81), protocol=6)) == 1


def test_a_replayed_packet_is_refused():
    alice, bob = joined()
    sealed = [alice.outbound(NETWORK, ipv4(ALICE, BOB, bytes([n])), 0.0).datagram for n in range(4)]
    for number in (2, 0, 3, 1):
        assert isinstance(bob.inbound(ALICE_AT, sealed[number], 0.0), Delivered)
    for datagram in sealed:
        assert refused(bob.inbound(ALICE_AT, datagram, 0.0)) is Reason.REPLAYED


def test_a_forged_packet_uses_up_no_sequence_number():
    alice, bob = joined()
    datagram = alice.outbound(NETWORK, ipv4(ALICE, BOB), 0.0).datagram
    forged = datagram[:-1] + bytes([datagram[-1] ^ 1])
    assert refused(bob.inbound(ALICE_AT, forged, 0.0)) is Reason.FORGED
    ahead = datagram[:4] + b"\xff\xff\xff\xff" + datagram[8:]
    assert refused(bob.inbound(ALICE_AT, ahead, 0.0)) is Reason.FORGED
    assert isinstance(bob.inbound(ALICE_AT, datagram, 0.0), Delivered)


@settings(max_examples=300)
@given(st.binary(max_size=120), st.booleans())
def test_no_datagram_makes_the_engine_raise(data, marked):
    _, bob = joined()
    if marked:
        data = b"\xc0\0\0\3\0\0\0\1" + data
    assert isinstance(bob.inbound(ALICE_AT, data, 0.0), Refused)


@settings(max_examples=300)
@given(st.binary(max_size=120), st.sampled_from([b"", b"\x45", b"\x60"]), st.integers(1200, 1400))
def test_no_packet_of_the_device_makes_the_engine_raise(data, first, mtu):
    alice, _ = joined(mtu=mtu)
    alice.outbound(NETWORK, first + data, 0.0)
    alice.outbound(NETWORK, first + data + bytes(1500), 0.0)


@given(st.binary(max_size=100), st.sampled_from([4, 41, 59, 6]), st.sampled_from([b"", b"\x45", b"\x60"]))
def test_no_authentic_payload_makes_the_engine_raise(data, next_header, first):
    left, right = pair()
    bob = EspEngine()
    bob.install(right)
    cipher = Sealer(left.suite, left.key_out.reveal(), left.spi_out, esn=False)
    datagram = cipher.seal(1, first + data, next_header if next_header in (4, 41, 59) else 4)
    assert isinstance(bob.inbound(ALICE_AT, datagram, 0.0), Refused | Delivered)


def test_dummy_packets_and_disagreeing_next_headers_are_dropped():
    left, right = pair()
    bob = EspEngine()
    bob.install(right)
    cipher = Sealer(left.suite, left.key_out.reveal(), left.spi_out, esn=False)
    packet = ipv4(ALICE, BOB)
    assert refused(bob.inbound(ALICE_AT, cipher.seal(1, packet, NEXT_NONE), 0.0)) is Reason.DUMMY
    assert refused(bob.inbound(ALICE_AT, cipher.seal(2, packet, NEXT_IPV6), 0.0)) is Reason.BAD_INNER
    padded = bob.inbound(ALICE_AT, cipher.seal(3, packet + bytes(64), NEXT_IPV4), 0.0)
    assert padded == Delivered(NETWORK, 1, packet)


def test_an_unknown_spi_is_told_apart_and_a_keepalive_is_no_error():
    _, bob = joined()
    assert refused(bob.inbound(ALICE_AT, b"\xff" * 40, 0.0)) is Reason.UNKNOWN_SPI
    assert refused(bob.inbound(ALICE_AT, b"\xff", 0.0)) is Reason.KEEPALIVE
    assert refused(bob.inbound(ALICE_AT, b"\xff" * 39, 0.0)) is Reason.MALFORMED


def test_a_new_source_is_hinted_once_and_only_by_the_newest_packet():
    alice, bob = joined()
    elsewhere = Endpoint("198.51.100.7", 1234)
    old, *newer = [alice.outbound(NETWORK, ipv4(ALICE, BOB), 0.0).datagram for _ in range(6)]
    assert bob.inbound(ALICE_AT, newer[0], 0.0).moved is None
    assert bob.inbound(elsewhere, old, 0.0).moved is None
    assert bob.inbound(elsewhere, newer[1], 0.0).moved == elsewhere
    assert bob.inbound(("198.51.100.7", 1234), newer[2], 0.0).moved is None
    bob.move(1, Path(BOB_AT, elsewhere))
    assert bob.inbound(elsewhere, newer[3], 0.0).moved is None
    assert bob.inbound(ALICE_AT, newer[4], 0.0).moved == ALICE_AT


def test_a_move_keeps_sequence_numbers_and_window():
    alice, bob = joined()
    first = alice.outbound(NETWORK, ipv4(ALICE, BOB), 0.0)
    relay = Path(Endpoint("0.0.0.0", 4500), Endpoint("203.0.113.9", 30000))
    alice.move(1, relay)
    second = alice.outbound(NETWORK, ipv4(ALICE, BOB), 0.0)
    assert second.path == relay
    assert second.datagram[4:8] == b"\0\0\0\2"
    bob.move(1, relay)
    assert isinstance(bob.inbound(ALICE_AT, first.datagram, 0.0), Delivered)
    assert refused(bob.inbound(ALICE_AT, first.datagram, 0.0)) is Reason.REPLAYED


def test_the_sa_stops_for_ever_before_its_numbers_wrap():
    alice, bob = joined()
    alice._children[1].outbound.sequence = LAST_SEQUENCE - 1
    last = alice.outbound(NETWORK, ipv4(ALICE, BOB), 0.0)
    assert last.datagram[4:8] == b"\xff\xff\xff\xff"
    assert isinstance(bob.inbound(ALICE_AT, last.datagram, 0.0), Delivered)
    for _ in range(3):
        assert refused(alice.outbound(NETWORK, ipv4(ALICE, BOB), 0.0)) is Reason.EXHAUSTED
    assert alice.usage([1])[1].sequence_out == LAST_SEQUENCE


def test_with_esn_the_numbers_go_on():
    alice, bob = joined(esn=True)
    alice._children[1].outbound.sequence = LAST_SEQUENCE - 1
    bob._children[1].inbound.window.top = LAST_SEQUENCE - 1
    for number in range(5):
        packet = ipv4(ALICE, BOB, bytes([number]))
        assert bob.inbound(ALICE_AT, alice.outbound(NETWORK, packet, 0.0).datagram, 0.0).packet == packet
    assert alice.usage([1])[1].sequence_out == LAST_SEQUENCE + 4


def test_the_traffic_class_is_copied_out_and_congestion_is_copied_in():
    alice, bob = joined()
    for packet in (ipv4(ALICE, BOB, tos=0xBA), ipv6(ALICE6, BOB6, tclass=0xBA)):
        sealed = alice.outbound(NETWORK, packet, 0.0)
        assert sealed.traffic_class == 0xBA
        came = bob.inbound(ALICE_AT, sealed.datagram, 0.0, ecn=0x03).packet
        assert came[1] == (0xBB if packet[0] >> 4 == 4 else 0xB0)
    plain = alice.outbound(NETWORK, ipv4(ALICE, BOB), 0.0)
    assert refused(bob.inbound(ALICE_AT, plain.datagram, 0.0, ecn=0x03)) is Reason.CONGESTION


def test_a_packet_too_big_for_the_path_is_answered():
    alice, _ = joined(mtu=1300)
    for packet in (ipv4(ALICE, BOB, bytes(1281)), ipv6(ALICE6, BOB6, bytes(1261))):
        answer = alice.outbound(NETWORK, packet, 0.0)
        assert isinstance(answer, TooBig)
        field = answer.reply[26:28] if packet[0] >> 4 == 4 else answer.reply[46:48]
        assert int.from_bytes(field, "big") == 1300


def test_ipv4_without_df_is_cut_inside_the_tunnel():
    alice, bob = joined(mtu=1300)
    sealed = alice.outbound(NETWORK, ipv4(ALICE, BOB, random.Random(1).randbytes(3000), flags=0), 0.0)
    pieces = [bob.inbound(ALICE_AT, datagram, 0.0).packet for datagram in (sealed.datagram, *sealed.more)]
    assert len(pieces) == 3
    assert all(len(piece) <= 1300 and ones_complement(piece[:20]) == 0xFFFF for piece in pieces)


def test_a_narrow_path_lowers_the_mtu_until_the_sa_moves():
    alice, _ = joined(mtu=1400)
    packet = ipv4(ALICE, BOB, bytes(1380))
    assert isinstance(alice.outbound(NETWORK, packet, 0.0), Sealed)
    alice.narrow_path(BOB_AT, 1400)
    answer = alice.outbound(NETWORK, packet, 0.0)
    assert int.from_bytes(answer.reply[26:28], "big") == 1338
    alice.move(1, Path(ALICE_AT, Endpoint("198.51.100.1", 4500)))
    assert isinstance(alice.outbound(NETWORK, packet, 0.0), Sealed)


def test_ipv6_packets_of_the_minimum_mtu_are_sent_however_narrow_the_path():
    alice, _ = joined(mtu=1400)
    alice.narrow_path(BOB_AT, 1280)
    assert isinstance(alice.outbound(NETWORK, ipv6(ALICE6, BOB6, bytes(1240)), 0.0), Sealed)
    assert isinstance(alice.outbound(NETWORK, ipv6(ALICE6, BOB6, bytes(1241)), 0.0), TooBig)


def test_icmp_errors_are_bounded_in_rate():
    alice, _ = joined(mtu=1300)
    packet = ipv4(ALICE, BOB, bytes(1400))
    answers = [alice.outbound(NETWORK, packet, 0.0) for _ in range(1100)]
    assert sum(isinstance(answer, TooBig) for answer in answers) == 1000
    assert isinstance(alice.outbound(NETWORK, packet, 1.0), TooBig)


def test_usage_counts_inner_bytes_and_times():
    alice, bob = joined()
    packet = ipv4(ALICE, BOB, bytes(100))
    bob.inbound(ALICE_AT, alice.outbound(NETWORK, packet, 3.0).datagram, 4.0)
    out, came = alice.usage([1, 99]), bob.usage([1])[1]
    assert set(out) == {1}
    assert (out[1].packets_out, out[1].bytes_out, out[1].last_out_at, out[1].sequence_out) == (1, 120, 3.0, 1)
    assert (came.packets_in, came.bytes_in, came.last_in_at) == (1, 120, 4.0)
    assert (came.packets_out, came.last_out_at) == (0, 0.0)


def test_link_scoped_noise_is_not_trapped():
    alice, _ = joined()
    assert refused(alice.outbound(NETWORK, ipv6("fe80::1", "ff02::16"), 0.0)) is Reason.LINK_SCOPED
    assert alice.outbound(NETWORK, ipv4(ALICE, "239.1.2.3"), 0.0) == Trapped()


def test_an_id_or_spi_that_is_taken_is_refused():
    engine = EspEngine()
    left, _ = pair(1)
    engine.install(left)
    with pytest.raises(LocalError):
        engine.install(left)
    with pytest.raises(LocalError):
        engine.install(dataclasses.replace(left, id=2))
    with pytest.raises(LocalError):
        engine.install(dataclasses.replace(left, id=2, spi_in=0x1000))
    with pytest.raises(LocalError):
        engine.install(dataclasses.replace(pair(3)[0], transport_mode=True))
    with pytest.raises(LocalError):
        engine.use(7)
    with pytest.raises(LocalError):
        engine.move(7, left.path)
    engine.remove(7)


@given(st.lists(st.integers(0, 19), max_size=60))
def test_the_choice_of_sa_is_remembered_only_as_long_as_it_is_right(steps):
    """Using, removing and sending in any order agrees with a list of what is in use."""
    alice, bob = EspEngine(), EspEngine()
    order: list[int] = []
    for child_id in range(1, 5):
        left, right = pair(child_id)
        alice.install(left)
        bob.install(right)
    alive = set(range(1, 5))
    for step in steps:
        child_id = step % 4 + 1
        if step < 8 and child_id in alive:
            alice.use(child_id)
            order = [child_id, *(other for other in order if other != child_id)]
        elif step < 12:
            alice.remove(child_id)
            alive.discard(child_id)
            order = [other for other in order if other != child_id]
        else:
            sealed = alice.outbound(NETWORK, ipv4(ALICE, BOB), 0.0)
            if order:
                assert bob.inbound(ALICE_AT, sealed.datagram, 0.0).child_id == order[0]
            else:
                assert sealed == Trapped()
