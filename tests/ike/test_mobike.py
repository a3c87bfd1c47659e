"""Moving a live SA (RFC 4555), over good and bad wires."""

from __future__ import annotations

import pytest

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.output import Transmit
from p2pvpn.ike.codes import Exchange
from p2pvpn.ike.message import Header, build_chain, build_clear, notifications, parse_header_untrusted
from p2pvpn.ike.notifies import Notify, NotifyType
from p2pvpn.ike.outputs import Informed, Liveness, MoveChild, MoveFailed, SaClosed, SaMoved
from p2pvpn.ike.payloads import Notification

from .evil import Evil
from .test_dialogue import pair

OTHER = Endpoint.of("198.51.100.7", 4500)
THIRD = Endpoint.of("198.51.100.8", 4500)


def up(seed=0, **settings):
    world, alice, bob = pair(seed=seed, liveness_s=None, **settings)
    alice.addresses |= {OTHER, THIRD}
    alice.initiate(bob)
    world.run(1)
    return world, alice, bob


def proven(endpoint) -> bool:
    return True


def from_other(bob) -> Path:
    return Path(OTHER, bob.address)


def assert_on(alice, bob, local: Endpoint) -> None:
    assert alice.ike.view(alice.sa).path == Path(local, bob.address)
    assert bob.ike.view(bob.sa).path == Path(bob.address, local)
    assert set(alice.paths.values()) == {Path(local, bob.address)}
    assert set(bob.paths.values()) == {Path(bob.address, local)}


def kinds(host, since: int) -> list[type]:
    return [type(one) for one in host.log[since:]]


def test_a_proven_address_is_switched_to_before_the_answer():
    world, alice, bob = up(routable=proven)
    at = len(alice.log), len(bob.log)
    alice.do("move", alice.sa, from_other(bob), world.now)
    world.run(1)
    assert kinds(bob, at[1]) == [MoveChild, Transmit, SaMoved]
    assert kinds(alice, at[0]) == [Transmit, MoveChild, SaMoved]
    assert_on(alice, bob, OTHER)


def test_an_unproven_address_is_challenged_before_the_switch():
    world, alice, bob = up()
    at = len(bob.log)
    alice.do("move", alice.sa, from_other(bob), world.now)
    world.run(1)
    assert kinds(bob, at) == [Transmit, Transmit, MoveChild, SaMoved]
    assert_on(alice, bob, OTHER)


@pytest.mark.parametrize("after_s", [0.0, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04])
def test_a_probe_in_the_middle_of_two_moves_does_not_go_to_the_path_that_died(after_s):
    world, alice, bob = up()
    world.fate = lambda path, data: () if alice.address in path else (0.02,) if THIRD in path else (0.01,)
    alice.do("move", alice.sa, Path(THIRD, bob.address), world.now)
    world.run(0.021)
    alice.do("move", alice.sa, from_other(bob), world.now)
    world.run(after_s)
    bob.do("probe", bob.sa, world.now)
    world.run(1)
    assert_on(alice, bob, OTHER)
    assert bob.events(Liveness)


def test_nothing_moves_when_the_new_path_is_silent_and_the_sa_stays():
    world, alice, bob = up()
    world.fate = lambda path, data: () if OTHER in path else (0.01,)
    alice.do("move", alice.sa, from_other(bob), world.now)
    world.run(5)
    assert not alice.events(MoveFailed)
    world.run(30)
    (failed,) = alice.events(MoveFailed)
    assert failed.path == from_other(bob)
    assert_on(alice, bob, alice.address)
    assert not alice.events(SaMoved)
    alice.do("probe", alice.sa, world.now)
    world.run(1)
    assert alice.events(Liveness)


@pytest.mark.parametrize("routable", [False, True])
def test_when_only_the_way_back_is_dead_both_sides_end_on_the_old_path(routable):
    world, alice, bob = up(routable=lambda endpoint: routable)
    world.fate = lambda path, data: () if path.remote == OTHER else (0.01,)
    alice.do("move", alice.sa, from_other(bob), world.now)
    world.run(60)
    assert alice.events(MoveFailed)
    assert_on(alice, bob, alice.address)
    alice.do("probe", alice.sa, world.now)
    bob.do("probe", bob.sa, world.now)
    world.run(1)
    assert alice.events(Liveness)
    assert bob.events(Liveness)


def test_a_move_away_from_a_dead_path_takes_waiting_requests_along():
    world, alice, bob = up()
    world.fate = lambda path, data: () if alice.address in path else (0.01,)
    alice.do("inform", alice.sa, [Notify(40961, b"lost?")], world.now)
    bob.do("inform", bob.sa, [Notify(40962, b"too?")], world.now)
    world.run(3)
    alice.do("move", alice.sa, from_other(bob), world.now)
    world.run(3)
    assert_on(alice, bob, OTHER)
    assert len(bob.events(Informed)) == 1
    assert len(alice.events(Informed)) == 1


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("routable", [False, True])
def test_moves_survive_loss_and_both_sides_agree(seed, routable):
    world, alice, bob = up(seed, routable=lambda endpoint: routable, move_tries=10, tries=10)
    dice = world.random
    world.fate = lambda path, data: [dice.uniform(0, 0.4) for _ in range(dice.choice((0, 1, 1, 2)))]
    alice.do("move", alice.sa, from_other(bob), world.now)
    world.run(dice.choice((0.2, 2, 20)))
    alice.do("move", alice.sa, Path(THIRD, bob.address), world.now)
    bob.do("inform", bob.sa, [Notify(40961)], world.now)
    world.run(dice.choice((0.2, 2, 20)))
    alice.do("move", alice.sa, from_other(bob), world.now)
    world.run(400)
    assert not alice.events(SaClosed)
    assert not bob.events(SaClosed)
    assert_on(alice, bob, alice.ike.view(alice.sa).path.local)
    assert len(alice.events(Informed)) == 1


def test_two_moves_in_a_row_end_at_the_last():
    world, alice, bob = up()
    alice.do("move", alice.sa, from_other(bob), world.now)
    alice.do("move", alice.sa, Path(THIRD, bob.address), world.now)
    world.run(5)
    assert_on(alice, bob, THIRD)


def test_a_move_back_at_once_is_no_move():
    world, alice, bob = up()
    world.fate = lambda path, data: () if OTHER in path else (0.01,)
    alice.do("move", alice.sa, from_other(bob), world.now)
    world.run(0.2)
    alice.do("move", alice.sa, Path(alice.address, bob.address), world.now)
    world.run(5)
    assert_on(alice, bob, alice.address)


def rebound(world, alice, bob) -> Endpoint:
    """From now on a NAT makes alice appear elsewhere, and nothing else reaches her."""
    public = Endpoint.of("198.51.100.99", 31000)
    alice.addresses.add(public)

    def translate(path):
        if path.local == alice.address:
            return Path(public, path.remote)
        return Path(path.local, alice.address) if path.remote == public else Path(path.local, Endpoint("0.0.0.0", 9))

    world.nat = translate
    return public


def test_a_move_to_the_path_in_use_tells_the_peer_where_a_nat_put_us():
    world, alice, bob = up()
    public = rebound(world, alice, bob)
    bob.do("inform", bob.sa, [Notify(40961, b"lost at first")], world.now)
    world.run(2)
    alice.do("move", alice.sa, Path(alice.address, bob.address), world.now)
    world.run(2)
    assert bob.ike.view(bob.sa).path == Path(bob.address, public)
    assert set(bob.paths.values()) == {Path(bob.address, public)}
    assert alice.events(Informed)
    assert not alice.events(MoveFailed)
    assert alice.ike.view(alice.sa).path == Path(alice.address, bob.address)


def test_a_move_to_the_path_in_use_when_it_is_dead_ends_the_sa():
    world, alice, bob = up()
    world.fate = lambda path, data: ()
    alice.do("move", alice.sa, Path(alice.address, bob.address), world.now)
    world.run(10)
    assert alice.events(MoveFailed)
    world.run(60)
    assert alice.events(SaClosed)
    assert not alice.installed


def test_a_peer_without_a_use_for_the_new_addresses_says_so_and_nothing_moves():
    world, alice, bob = up()
    world.fate = lambda path, data: () if OTHER in path else (0.01,)
    alice.do("move", alice.sa, from_other(bob), world.now)
    evil = Evil(bob, bob.sa, alice)
    refusal = chain_of(Notify(NotifyType.UNACCEPTABLE_ADDRESSES))
    evil.give(evil.packet(37, *refusal, message_id=2, response=True))
    (failed,) = alice.events(MoveFailed)
    assert failed.reason == "the peer says UNACCEPTABLE_ADDRESSES"
    assert alice.ike.view(alice.sa).path == Path(alice.address, bob.address)


def test_only_the_original_initiator_moves():
    world, alice, bob = up()
    bob.do("move", bob.sa, Path(THIRD, alice.address), world.now)
    (failed,) = bob.events(MoveFailed)
    assert failed.sa == bob.sa
    evil = Evil(bob, bob.sa, alice)
    answer = evil.ask(Exchange.INFORMATIONAL, [Notification.of(Notify(NotifyType.UPDATE_SA_ADDRESSES))])
    assert answer == []
    assert not alice.events(SaMoved)


def test_a_move_that_was_never_proven_does_not_happen():
    """A peer names an address that is not its own: the traffic must not go there."""
    world, alice, bob = up()
    victim = Endpoint.of("203.0.113.5", 4500)
    evil = Evil(alice, alice.sa, bob)
    packet = evil.packet(37, *chain_of(Notify(NotifyType.UPDATE_SA_ADDRESSES)))
    bob.run(bob.ike.handle(Path(bob.address, victim), packet, world.now))
    world.run(5)
    assert not [one for one in bob.log if isinstance(one, MoveChild)]
    to_victim = [one for one in bob.log if isinstance(one, Transmit) and one.path.remote == victim]
    assert len(to_victim) <= 6


def chain_of(*notifies):
    return build_chain(notifications(notifies))


def test_a_wrong_cookie2_ends_the_sa():
    world, alice, bob = up()
    held = []

    def hold_answer(path, data):
        header, _ = parse_header_untrusted(data)
        if path.local == OTHER and header.response and header.exchange == Exchange.INFORMATIONAL:
            held.append(header)
            return ()
        return (0.01,)

    world.fate = hold_answer
    alice.do("move", alice.sa, from_other(bob), world.now)
    world.run(0.2)
    assert held
    evil = Evil(alice, alice.sa, bob)
    wrong = chain_of(Notify(NotifyType.COOKIE2, bytes(16)))
    evil.give(evil.packet(37, *wrong, message_id=held[0].message_id, response=True))
    assert "COOKIE2" in bob.events(SaClosed)[0].reason
    assert not bob.installed


def test_an_unprotected_update_moves_nothing():
    world, _alice, bob = up(routable=proven)
    sa = bob.ike.view(bob.sa)
    packet = build_clear(
        Header(sa.spi_i, sa.spi_r, 37, True, False, 2), notifications([Notify(NotifyType.UPDATE_SA_ADDRESSES)])
    )
    assert bob.ike.handle(Path(bob.address, OTHER), packet, world.now) == []


def test_a_replayed_update_does_not_move_back():
    world, alice, bob = up(routable=proven)
    alice.do("move", alice.sa, from_other(bob), world.now)
    world.run(1)
    update = alice.sent()[-1]
    alice.do("move", alice.sa, Path(THIRD, bob.address), world.now)
    world.run(1)
    bob.run(bob.ike.handle(Path(bob.address, OTHER), update, world.now))
    world.run(1)
    assert_on(alice, bob, THIRD)
    assert len(bob.events(SaMoved)) == 2
