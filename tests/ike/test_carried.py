"""IKE_SA_INIT carried to the peer by other means than the path that the rest takes."""

from __future__ import annotations

import random

import pytest

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.output import Transmit
from p2pvpn.ike.codes import Exchange
from p2pvpn.ike.message import parse_header_untrusted
from p2pvpn.ike.notifies import NotifyType

from .test_dialogue import assert_mated, pair
from .test_floods import flood, parse_clear_untrusted

CARRIED = Path(Endpoint("fd00::a", 0), Endpoint("fd00::b", 0))


def begin(alice, bob) -> tuple[int, bytes]:
    """Alice's SA and its first message, which does not go over the wire."""
    sa = alice.initiate(bob, path=CARRIED)
    return sa, alice.sent()[-1]


def carried_to(bob, message: bytes) -> list[bytes]:
    path = Path(CARRIED.remote, CARRIED.local)
    return [one.data for one in bob.ike.handle_carried(path, message, bob.world.now) if isinstance(one, Transmit)]


def test_the_rest_of_the_exchanges_goes_over_the_path_and_the_first_is_not_sent_again():
    world, alice, bob = pair()
    sa, message = begin(alice, bob)
    (answer,) = carried_to(bob, message)
    alice.do("go_on", sa, Path(alice.address, bob.address), answer, world.now)
    world.run(1)
    assert_mated(alice, bob)
    assert Exchange.IKE_SA_INIT not in {parse_header_untrusted(data)[0].exchange for _, data in world.wire}


@pytest.mark.parametrize("answer", [b"", b"x" * 28, bytes(500)])
def test_without_a_good_answer_the_first_message_goes_over_the_path_at_once(answer):
    world, alice, bob = pair()
    sa, _ = begin(alice, bob)
    alice.do("go_on", sa, Path(alice.address, bob.address), answer, world.now)
    began = world.now
    world.run(0.5)
    assert_mated(alice, bob)
    assert bob.ike.view(bob.sa).established_at - began < 0.1


def test_an_answer_to_another_message_is_ignored():
    world, alice, bob = pair()
    _, other = begin(alice, bob)
    (wrong,) = carried_to(bob, other)
    sa, _ = begin(alice, bob)
    alice.do("go_on", sa, Path(alice.address, bob.address), wrong, world.now)
    world.run(1)
    assert_mated(alice, bob)


def test_whoever_carries_a_message_twice_gets_the_same_answer():
    _, alice, bob = pair()
    _, message = begin(alice, bob)
    assert carried_to(bob, message) == carried_to(bob, message)
    assert len(bob.ike.sa_ids()) == 1


def test_a_flood_of_strangers_does_not_ask_a_carried_message_for_a_cookie():
    world, alice, bob = pair()
    flood(bob, 200)
    sa, message = begin(alice, bob)
    (answer,) = carried_to(bob, message)
    assert parse_clear_untrusted(answer).notify(NotifyType.COOKIE) is None
    alice.do("go_on", sa, Path(alice.address, bob.address), answer, world.now)
    world.run(1)
    assert_mated(alice, bob)


def test_half_open_sas_of_one_caller_are_bounded():
    _, alice, bob = pair(half_open_per_source=5)
    _, message = begin(alice, bob)
    dice = random.Random(1)
    for _ in range(20):
        carried_to(bob, dice.randbytes(8) + message[8:])
    assert len(bob.ike.sa_ids()) == 5


def test_nothing_but_a_first_request_is_carried():
    world, alice, bob = pair()
    alice.initiate(bob)
    world.run(1)
    for _, data in world.wire:
        header, _ = parse_header_untrusted(data)
        if header.exchange != Exchange.IKE_SA_INIT or header.response:
            assert carried_to(bob, data) == []
    assert carried_to(bob, b"") == carried_to(bob, b"\xff" * 100) == []
    assert len(bob.ike.sa_ids()) == 1


def test_an_established_sa_does_not_go_elsewhere_by_a_late_answer():
    world, alice, bob = pair()
    alice.initiate(bob)
    world.run(1)
    before = alice.ike.view(alice.sa).path
    alice.do("go_on", alice.sa, CARRIED, b"", world.now)
    assert alice.ike.view(alice.sa).path == before
