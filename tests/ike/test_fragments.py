"""IKE fragmentation (RFC 7383) between two endpoints, and from a peer that abuses it."""

from __future__ import annotations

import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.errors import WireError
from p2pvpn.ike.fragments import MAX_FRAGMENTS, Reassembly, split
from p2pvpn.ike.message import build_chain, notifications
from p2pvpn.ike.notifies import Notify
from p2pvpn.ike.outputs import Informed
from p2pvpn.ike.protect import Opened

from .evil import Evil
from .test_dialogue import assert_mated, member, pair
from .world import World

MARKER_BYTES = 4


def long_chains(**settings):
    world = World(settings.pop("seed", 0))
    alice = world.host("alice", "192.0.2.1", member("alice", padding_certificates=5), **settings)
    bob = world.host("bob", "192.0.2.2", member("bob", padding_certificates=5), **settings)
    return world, alice, bob


@pytest.mark.parametrize("size", [576, 1232, 1400])
def test_long_messages_travel_in_pieces_of_the_size_that_was_set(size):
    world, alice, bob = long_chains(fragment_bytes=size)
    alice.initiate(bob)
    world.run(1)
    assert_mated(alice, bob)
    assert max(len(data) for _, data in world.wire) <= size - MARKER_BYTES
    pieces = collections.Counter((path.local, data[16]) for path, data in world.wire)
    assert pieces[alice.address, 53] > 1
    assert pieces[bob.address, 53] > 1


@pytest.mark.parametrize("seed", range(12))
def test_lost_and_shuffled_pieces_are_sent_again_until_they_are_all_there(seed):
    world, alice, bob = long_chains(seed=seed, fragment_bytes=576, setup_tries=10)
    dice = world.random
    world.fate = lambda path, data: [dice.uniform(0, 0.3) for _ in range(dice.choice((0, 1, 1, 1, 2)))]
    alice.initiate(bob)
    world.run(29)
    assert_mated(alice, bob)


def test_the_stored_answer_is_sent_once_for_a_repeated_request_in_pieces():
    world, alice, bob = long_chains(fragment_bytes=576)
    alice.initiate(bob)
    world.run(1)
    request = [data for data in alice.sent() if data[16] == 53]
    answer = [data for data in bob.sent() if data[16] == 53]
    before = len(bob.sent())
    for data in request:
        bob.run(bob.ike.handle(Path(bob.address, alice.address), data, world.now))
    assert bob.sent()[before:] == answer


def up():
    world, alice, bob = pair(liveness_s=None)
    alice.initiate(bob)
    world.run(1)
    return world, alice, bob, Evil(alice, alice.sa, bob)


def whole(data: bytes):
    return build_chain(notifications([Notify(40961, data)]))


def in_pieces(evil: Evil, data: bytes, count: int) -> list[bytes]:
    first, chain = whole(data)
    size = -(-len(chain) // count)
    return [evil.fragment(37, first, chain[at * size : (at + 1) * size], at + 1, count) for at in range(count)]


@pytest.mark.parametrize(("number", "total"), [(0, 1), (2, 1), (1, 0), (0, 0), (1, 65), (1, 65535), (65535, 65535)])
def test_impossible_numbers_are_dropped_and_a_good_set_wins(number, total):
    _world, _alice, bob, evil = up()
    assert not evil.give(evil.fragment(37, 41, b"junk", number, total))
    good = in_pieces(evil, b"good", 2)
    for one in good:
        evil.give(one)
    assert bob.events(Informed)[0].notifies[0].data == b"good"


def test_the_first_of_two_pieces_with_one_number_counts():
    _world, _alice, bob, evil = up()
    one, two = in_pieces(evil, b"good data", 2)
    evil.give(one)
    evil.give(evil.fragment(37, 41, b"other content", 1, 2))
    evil.give(two)
    assert bob.events(Informed)[0].notifies[0].data == b"good data"


def test_a_larger_total_replaces_the_set_and_a_smaller_one_does_not():
    _world, _alice, bob, evil = up()
    small, large = in_pieces(evil, b"small", 2), in_pieces(evil, b"large", 3)
    evil.give(small[0])
    for one in large[:2]:
        evil.give(one)
    evil.give(small[1])
    assert not bob.events(Informed)
    evil.give(large[2])
    assert bob.events(Informed)[0].notifies[0].data == b"large"


def test_pieces_that_are_not_the_peers_are_not_kept():
    world, _alice, bob, evil = up()
    one, two = in_pieces(evil, b"good", 2)
    for at in range(10_000):
        forged = one[:-4] + at.to_bytes(4, "big")
        assert not bob.ike.handle(Path(bob.address, Endpoint.of("203.0.113.9", 1)), forged, world.now)
    sa = bob.ike._by_id[bob.sa]
    assert sum(part.held_bytes for part in sa._channel._pieces.values()) == 0
    evil.give(two)
    evil.give(one)
    assert bob.events(Informed)


def test_a_message_in_pieces_has_a_largest_size():
    _world, _alice, bob, evil = up()
    for number in range(1, 65):
        evil.give(evil.fragment(37, 41, bytes(1400), number, 64))
    sa = bob.ike._by_id[bob.sa]
    assert sum(part.held_bytes for part in sa._channel._pieces.values()) <= 32768
    assert not bob.events(Informed)


def test_a_piece_inside_a_piece_is_nonsense():
    _world, _alice, _bob, evil = up()
    answer = evil.ask_raw(37, 53, bytes.fromhex("00000008 00010001"))
    assert [one.type for one in answer] == [7]


@given(st.binary(min_size=1, max_size=5000), st.integers(300, 1500), st.randoms())
def test_any_chain_comes_back_whatever_the_order(chain, size, dice):
    pieces = split(chain, size)
    assert all(len(one) <= size for one in pieces)
    numbered = list(enumerate(pieces, start=1))
    dice.shuffle(numbered)
    table = Reassembly(32768)
    results = [
        table.add_untrusted(3, Opened(41 if number == 1 else 0, one, number, len(pieces))) for number, one in numbered
    ]
    assert results[:-1] == [None] * (len(pieces) - 1)
    assert (results[-1].first, results[-1].plain) == (41, chain)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 70), st.integers(0, 70), st.binary(max_size=900)), max_size=80)
)
def test_no_sequence_of_pieces_keeps_more_than_the_limit(steps):
    table = Reassembly(4096)
    for message_id, number, total, data in steps:
        try:
            table.add_untrusted(message_id, Opened(41, data, number, total))
        except WireError:
            assert not 1 <= number <= total <= MAX_FRAGMENTS or table.held_bytes == 0
        assert table.held_bytes <= 4096
