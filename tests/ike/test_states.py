"""The table of states is total: every state meets every step and every message, and only what has a row changes it."""

from __future__ import annotations

import itertools

import pytest

from p2pvpn.core.address import Path
from p2pvpn.core.errors import LocalError
from p2pvpn.crypto.kex import KexMethod
from p2pvpn.ike.codes import Exchange
from p2pvpn.ike.message import build_chain
from p2pvpn.ike.notifies import Notify
from p2pvpn.ike.payloads import Delete
from p2pvpn.ike.rules import RULES
from p2pvpn.ike.states import REQUESTS, TRANSITIONS, State, Step, after
from p2pvpn.ike.tasks.responders import RESPONDERS

from .evil import Evil
from .test_dialogue import pair
from .world import selectors


@pytest.mark.parametrize(("state", "step"), list(itertools.product(State, Step)))
def test_a_step_has_a_row_with_a_story_or_is_our_error(state, step):
    row = TRANSITIONS.get((state, step))
    if row is None:
        with pytest.raises(LocalError):
            after(state, step)
    else:
        assert after(state, step) is row[0]
        assert row[1].endswith(".")


def test_every_state_can_be_reached_and_left_and_only_the_last_is_final():
    assert {row[0] for row in TRANSITIONS.values()} | {State.INIT_SENT, State.INIT_ANSWERED} == set(State)
    assert {state for state, _ in TRANSITIONS} == set(State) - {State.CLOSED}
    assert all(any((state, step) in TRANSITIONS for state in State) for step in Step)


def test_what_a_state_admits_has_a_rule_and_a_responder():
    assert set(REQUESTS) == set(State)
    for exchange in frozenset().union(*REQUESTS.values()):
        assert (exchange, False) in RULES
        assert exchange in RESPONDERS


def half(world, alice, bob, *, lose):
    world.fate = lambda path, data: () if data[18] == lose and path.local == alice.address else (0.01,)
    alice.initiate(bob)
    world.run(0.3)


def in_state(state: State):
    """A world in which bob (alice for the initiator's states) has an SA in that state, and who that is."""
    mixing = state in (State.MIXING_SENT, State.MIXING_DUE)
    world, alice, bob = pair(liveness_s=None, additional_kexes=((KexMethod.ML_KEM_768,),) * mixing)
    if mixing:
        half(world, alice, bob, lose=43)
        return (world, bob, alice) if state is State.MIXING_DUE else (world, alice, bob)
    if state is State.INIT_SENT:
        half(world, alice, bob, lose=34)
        return world, alice, bob
    if state in (State.INIT_ANSWERED, State.AUTH_SENT):
        half(world, alice, bob, lose=35)
        return (world, bob, alice) if state is State.INIT_ANSWERED else (world, alice, bob)
    alice.initiate(bob)
    world.run(1)
    if state is State.DELETING:
        world.fate = lambda path, data: ()
        bob.do("close", bob.sa, world.now, "enough")
    elif state is State.LINGERING:
        world.fate = lambda path, data: () if path.local == bob.address else (0.01,)
        alice.do("close", alice.sa, world.now, "enough")
        world.run(0.1)
    elif state is State.CLOSED:
        bob.do("drop", bob.sa)
    return world, bob, alice


LIVING = [state for state in State if state is not State.CLOSED]


@pytest.mark.parametrize("state", LIVING)
def test_the_states_can_be_made(state):
    _world, host, _ = in_state(state)
    (sa,) = host.ike.sa_ids()
    assert host.ike.view(sa).state == state.name


AWAITED = {(State.AUTH_SENT, Exchange.IKE_AUTH), (State.MIXING_SENT, Exchange.IKE_INTERMEDIATE)}
NOT_ADMITTED = [
    (state, exchange, response)
    for state in LIVING
    if state is not State.INIT_SENT  # there are no keys yet
    for exchange in (*Exchange, 38, 99)
    for response in (False, True)
    if (response and (state, exchange) not in AWAITED) or (not response and exchange not in REQUESTS[state])
]


@pytest.mark.parametrize(("state", "exchange", "response"), NOT_ADMITTED)
def test_a_message_that_a_state_does_not_admit_changes_nothing(state, exchange, response):
    world, host, other = in_state(state)
    (sa,) = host.ike.sa_ids()
    (theirs,) = other.ike.sa_ids()
    before = host.ike.view(sa)
    evil = Evil(other, theirs, host)
    expected = host.ike._by_id[sa].answers.expected_id
    for first, chain in (build_chain([]), build_chain([Delete(1)])):
        for number in (expected, expected + 1, 5):
            packet = evil.packet(exchange, first, chain, message_id=number, response=response)
            assert host.ike.handle(Path(host.address, other.address), packet, world.now) == []
    assert host.ike.view(sa) == before


WISHES = [
    *("move", "adopt", "inform", "probe", "heard", "close", "drop", "tick", "export"),
    *("rekey", "rekey_child", "add_child", "close_child"),
]


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("wish", WISHES)
def test_every_wish_is_answered_in_every_state(state, wish):
    world, host, other = in_state(state)
    sa = (host.ike.sa_ids() or [1])[0]
    path = Path(host.address, other.address)
    arguments = {
        "move": (sa, path, world.now),
        "adopt": (sa, path, world.now),
        "inform": (sa, [Notify(40961)], world.now),
        "probe": (sa, world.now),
        "heard": (sa, world.now),
        "close": (sa, world.now, "enough"),
        "drop": (sa,),
        "tick": (world.now + 1000,),
        "export": (sa, b"label", 16),
        "rekey": (sa, world.now),
        "rekey_child": (sa, 1, world.now),
        "add_child": (sa, selectors("fd00::/16"), selectors("fd00::/16"), world.now),
        "close_child": (sa, 1, world.now),
    }[wish]
    try:
        out = getattr(host.ike, wish)(*arguments)
    except LocalError:
        assert wish in ("inform", "export", "add_child")
        assert state is not State.ESTABLISHED
    else:
        if wish != "export":
            host.run(out)
    world.run(200)
    if wish in ("close", "drop"):
        assert host.ike.sa_ids() == []
        assert not host.installed
