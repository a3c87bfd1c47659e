"""Rekeying of Child SAs and IKE SAs: alone, at the same time on both sides, crossed with deletions, on bad wires.

The scenarios have the names of strongSwan's state-machine tests (child_rekey, ike_rekey, child_delete, ike_delete).
"""

from __future__ import annotations

import pytest

from p2pvpn.core.output import Transmit
from p2pvpn.crypto.kex import KexMethod
from p2pvpn.ike.message import parse_header_untrusted
from p2pvpn.ike.notifies import Notify
from p2pvpn.ike.outputs import (
    ChildAdded,
    ChildClosed,
    ChildFailed,
    ChildRekeyed,
    Informed,
    InstallChild,
    RekeyFailed,
    RemoveChild,
    SaClosed,
    SaMoved,
    SaRekeyed,
    UseChild,
)

from . import schedules
from .schedules import CREDENTIALS, check
from .test_dialogue import assert_mated
from .traffic import Planes
from .world import World, selectors

CREATE, INFORMATIONAL, FOLLOWUP = 36, 37, 44
KEM = ((KexMethod.ML_KEM_768,),)
PLAIN = {}
MULTIPLE = {"additional_kexes": KEM, "child_additional_kexes": KEM}


def up(seed: int = 0, theirs: dict | None = None, **settings):
    """An established pair under traffic."""
    world = World(seed)
    alice = world.host("alice", "192.0.2.1", CREDENTIALS["alice"], **{"later_s": 2.0, **settings})
    bob = world.host("bob", "192.0.2.2", CREDENTIALS["bob"], **{"later_s": 2.0, **settings, **(theirs or {})})
    planes = Planes(world, [alice, bob])
    alice.initiate(bob, local=selectors("fd00::a/128"), remote=selectors("fd00::b/128"))
    planes.run(1)
    alice.do("probe", 1, world.now)  # now the responder knows that its answer to IKE_AUTH arrived
    planes.run(1)
    return world, alice, bob, planes


def child(host) -> int:
    return next(iter(host.ike._by_id[1].children.live))


def settle(world, alice, bob, planes, seconds: float = 60.0) -> None:
    """Traffic goes on, then nothing is in flight any more; all is well."""
    for _ in range(60):
        planes.step(0.1)
    planes.run(seconds)
    check(alice, bob, planes)


def drop_first(world, host, exchange: int, *, response: bool, count: int = 1) -> None:
    """The wire loses the first messages of that kind from `host`."""
    left = [count]

    def fate(path, data):
        header, _ = parse_header_untrusted(data)
        if left[0] and path.local == host.address and (header.exchange, header.response) == (exchange, response):
            left[0] -= 1
            return ()
        return (0.01,)

    world.fate = fate


def delay_first(world, host, exchange: int, *, response: bool, seconds: float) -> None:
    """The wire holds back the first message of that kind, retransmissions are faster... and lost."""
    held = []

    def fate(path, data):
        header, _ = parse_header_untrusted(data)
        if path.local == host.address and (header.exchange, header.response) == (exchange, response):
            if not held:
                held.append((world.now, data))
                return (seconds,)
            if data == held[0][1] and world.now < held[0][0] + seconds:
                return ()
        return (0.01,)

    world.fate = fate


MODES = pytest.mark.parametrize("mode", [PLAIN, MULTIPLE], ids=["one key exchange", "several key exchanges"])
WHO = pytest.mark.parametrize("who", ["initiator", "responder"])


def roles(alice, bob, who: str):
    return (alice, bob) if who == "initiator" else (bob, alice)


@MODES
@WHO
def test_child_rekey_regular(mode, who):
    world, alice, bob, planes = up(**mode)
    one, _other = roles(alice, bob, who)
    old = child(one)
    one.do("rekey_child", 1, old, world.now)
    settle(world, alice, bob, planes)
    (told,) = one.events(ChildRekeyed)
    assert told.old_id == old
    assert len(alice.events(ChildRekeyed)) == len(bob.events(ChildRekeyed)) == 1
    assert_mated(alice, bob)


def test_the_order_of_effects_loses_no_packet():
    world, alice, bob, _planes = up()
    before = len(alice.log), len(bob.log)
    alice.do("rekey_child", 1, child(alice), world.now)
    world.run(30)
    kinds = [[type(one) for one in host.log[start:]] for host, start in zip((alice, bob), before, strict=True)]
    assert kinds[0][:6] == [Transmit, InstallChild, UseChild, ChildRekeyed, Transmit, RemoveChild]
    assert kinds[1][:6] == [InstallChild, Transmit, UseChild, Transmit, ChildRekeyed, RemoveChild]
    removed = [one for one in bob.log if isinstance(one, RemoveChild)]
    assert removed[0].child_id == 1


@MODES
@WHO
def test_ike_rekey_regular(mode, who):
    world, alice, bob, planes = up(**mode)
    one, other = roles(alice, bob, who)
    before = one.ike.export(1, b"x", 16)
    one.do("rekey", 1, world.now)
    settle(world, alice, bob, planes)
    (told,) = one.events(SaRekeyed)
    assert told == other.events(SaRekeyed)[0].__class__(told.sa, told.old_spis, told.new_spis, told.at)
    assert one.ike.view(1).spi_i == told.new_spis[0]
    assert one.ike.export(1, b"x", 16) == other.ike.export(1, b"x", 16) != before
    assert alice.ike.view(1).initiator
    assert not bob.ike.view(1).initiator
    if mode:
        assert "ML_KEM_768" in one.ike.view(1).suite
    # The family goes on: again, by the other side, and everything works in the new SA.
    other.do("rekey", 1, world.now)
    world.run(1)
    other.do("inform", 1, [Notify(40961, b"hello")], world.now)
    one.do("rekey_child", 1, child(one), world.now)
    settle(world, alice, bob, planes)
    assert one.events(Informed)
    assert len(one.events(SaRekeyed)) == 2


@MODES
@pytest.mark.parametrize("what", ["rekey_child", "rekey"])
@pytest.mark.parametrize("seed", range(6))
def test_collision(mode, what, seed):
    """Both at once; which side has the lowest nonce is decided by the seed."""
    world, alice, bob, planes = up(seed, **mode)
    for host in (alice, bob):
        host.do(what, *((1, child(host), world.now) if what == "rekey_child" else (1, world.now)))
    settle(world, alice, bob, planes)
    kind = ChildRekeyed if what == "rekey_child" else SaRekeyed
    assert len(alice.events(kind)) == len(bob.events(kind)) == 1


@MODES
@pytest.mark.parametrize("what", ["rekey_child", "rekey"])
@pytest.mark.parametrize("response", [False, True], ids=["delayed_request", "delayed_response"])
@pytest.mark.parametrize("exchange", [CREATE, INFORMATIONAL, FOLLOWUP])
@pytest.mark.parametrize("seed", range(3))
def test_collision_delayed(mode, what, response, exchange, seed):
    world, alice, bob, planes = up(seed, **mode)
    delay_first(world, bob, exchange, response=response, seconds=0.7)
    for host in (alice, bob):
        host.do(what, *((1, child(host), world.now) if what == "rekey_child" else (1, world.now)))
    settle(world, alice, bob, planes)


@MODES
@pytest.mark.parametrize("what", ["rekey_child", "rekey"])
@pytest.mark.parametrize("response", [False, True], ids=["dropped_request", "dropped_response"])
@pytest.mark.parametrize("exchange", [CREATE, INFORMATIONAL])
@pytest.mark.parametrize("seed", range(3))
def test_collision_dropped(mode, what, response, exchange, seed):
    world, alice, bob, planes = up(seed, **mode)
    drop_first(world, alice, exchange, response=response, count=2)
    for host in (alice, bob):
        host.do(what, *((1, child(host), world.now) if what == "rekey_child" else (1, world.now)))
    settle(world, alice, bob, planes)


@MODES
@pytest.mark.parametrize("what", ["rekey_child", "rekey"])
@pytest.mark.parametrize("both", [False, True], ids=["ke_invalid", "collision_ke_invalid"])
@pytest.mark.parametrize("lose", [False, True], ids=["", "delayed_retry"])
@pytest.mark.parametrize("seed", range(3))
def test_ke_invalid(mode, what, both, lose, seed):
    p256_first = (KexMethod.ECP_256, KexMethod.CURVE25519)
    theirs = {"kexes": p256_first, "child_kexes": (KexMethod.ECP_256,)}
    world, alice, bob, planes = up(seed, theirs, **{**mode, "kexes": (KexMethod.CURVE25519, KexMethod.ECP_256)})
    # The responder takes nothing but its own group.
    for host, group in ((alice, KexMethod.CURVE25519), (bob, KexMethod.ECP_256)):
        object.__setattr__(host.ike._local.settings, "kexes", (group, *set(p256_first) - {group}))
    if lose:
        drop_first(world, alice, CREATE, response=False, count=3)
    for host in (alice, bob) if both else (alice,):
        host.do(what, *((1, child(host), world.now) if what == "rekey_child" else (1, world.now)))
    settle(world, alice, bob, planes)


@MODES
@pytest.mark.parametrize("gap_s", [0.0, 0.005, 0.015, 0.025, 0.045, 3.0])
@pytest.mark.parametrize("first", ["rekey_child", "rekey"])
def test_collision_mixed(mode, gap_s, first):
    """One side rekeys the Child SA, the other the IKE SA: TEMPORARY_FAILURE for one of them, and again later."""
    world, alice, bob, planes = up(**mode)
    second = {"rekey_child": "rekey", "rekey": "rekey_child"}[first]
    for host, what in ((alice, first), (bob, second)):
        host.do(what, *((1, child(host), world.now) if what == "rekey_child" else (1, world.now)))
        planes.run(gap_s)
    settle(world, alice, bob, planes)
    assert len(alice.events(SaRekeyed)) == 1
    assert len(alice.events(ChildRekeyed)) == len(bob.events(ChildRekeyed)) == 1


@pytest.mark.parametrize("what", ["rekey_child", "rekey"])
@pytest.mark.parametrize("gap_s", [0.0, 0.005, 0.015, 0.025])
@pytest.mark.parametrize("who", ["alice", "bob"])
@pytest.mark.parametrize("mode", [PLAIN, MULTIPLE], ids=["one key exchange", "several"])
def test_collision_ike_delete(what, gap_s, who, mode):
    """Whatever is under way, the end of the IKE SA is the end of everything."""
    world, alice, bob, planes = up(**mode)
    one, other = (alice, bob) if who == "alice" else (bob, alice)
    one.do(what, *((1, child(one), world.now) if what == "rekey_child" else (1, world.now)))
    planes.run(gap_s)
    other.do("close", 1, world.now, "enough")
    planes.run(120)
    for host in (alice, bob):
        assert len(host.events(SaClosed)) == 1
        assert not host.ike._by_id
        assert not host.installed


@pytest.mark.parametrize("gap_s", [0.0, 0.005, 0.015, 0.025, 0.045])
@pytest.mark.parametrize("lost", [False, True])
def test_collision_delete(gap_s, lost):
    """One side rekeys the Child SA that the other deletes: both agree on what is left."""
    world, alice, bob, planes = up()
    if lost:
        drop_first(world, bob, INFORMATIONAL, response=False, count=2)
    alice.do("rekey_child", 1, child(alice), world.now)
    planes.run(gap_s)
    bob.do("close_child", 1, child(bob), world.now)
    planes.run(60)
    spis = {(one.spi_in, one.spi_out) for one in alice.installed.values()}
    assert spis == {(one.spi_out, one.spi_in) for one in bob.installed.values()}
    assert len(spis) <= 1
    assert alice.ike.view(1).state == bob.ike.view(1).state == "ESTABLISHED"


def test_child_delete_regular_and_collision():
    for both in (False, True):
        world, alice, bob, planes = up()
        alice.do("close_child", 1, child(alice), world.now)
        if both:
            bob.do("close_child", 1, child(bob), world.now)
        planes.run(30)
        assert not alice.installed
        assert not bob.installed
        assert len(bob.events(ChildClosed)) == (0 if both else 1)
        assert alice.ike.view(1).state == bob.ike.view(1).state == "ESTABLISHED"


def test_responder_lost_sa():
    """CHILD_SA_NOT_FOUND: what the peer does not know is removed here too, and the IKE SA stands."""
    world, alice, bob, planes = up()
    bob.ike._by_id[1].children.forget(child(bob))
    alice.do("rekey_child", 1, child(alice), world.now)
    planes.run(30)
    assert alice.events(ChildClosed)
    assert not alice.installed
    assert not alice.events(ChildRekeyed)
    assert alice.ike.view(1).state == "ESTABLISHED"


def test_childless_manual():
    """The first Child SA can come later."""
    world = World()
    alice = world.host("alice", "192.0.2.1", CREDENTIALS["alice"])
    bob = world.host("bob", "192.0.2.2", CREDENTIALS["bob"])
    alice.initiate(bob, childless=True)
    world.run(1)
    alice.do("add_child", 1, selectors("fd00::a/128"), selectors("fd00::b/128"), world.now)
    world.run(1)
    assert_mated(alice, bob)
    assert alice.events(ChildAdded)
    assert bob.events(ChildAdded)


def test_more_children_up_to_the_limit():
    world, alice, bob, _planes = up(theirs={"children_max": 3})
    for _ in range(4):
        alice.do("add_child", 1, selectors("fd00:a::/32"), selectors("fd00:b::/32"), world.now)
        world.run(1)
    assert len(bob.installed) == len(alice.installed) == 3
    assert [one.reason for one in alice.events(ChildFailed)] == ["the peer says NO_ADDITIONAL_SAS"] * 2
    assert alice.ike.view(1).state == "ESTABLISHED"


def test_a_child_outside_the_identity_is_refused_and_the_sa_stands():
    world, alice, bob, _planes = up()
    alice.do("add_child", 1, selectors("fd00::c/128"), selectors("fd00::b/128"), world.now)
    world.run(1)
    assert "TS_UNACCEPTABLE" in alice.events(ChildFailed)[0].reason
    assert len(bob.installed) == 1


def test_a_rekeying_that_the_peer_does_not_want_is_told():
    world, alice, bob, _planes = up()
    object.__setattr__(bob.ike._local.settings, "prfs", ())
    alice.do("rekey", 1, world.now)
    world.run(1)
    assert alice.events(RekeyFailed)[0].reason == "the peer says NO_PROPOSAL_CHOSEN"
    assert alice.ike.view(1).state == "ESTABLISHED"


def test_what_waits_and_what_is_under_way_survives_the_rekeying_of_the_ike_sa():
    world, alice, bob, planes = up()
    bob.do("inform", 1, [Notify(40961, b"under way")], world.now)
    alice.do("rekey", 1, world.now)
    alice.do("inform", 1, [Notify(40962, b"waits")], world.now)
    drop_first(world, bob, INFORMATIONAL, response=False, count=3)
    settle(world, alice, bob, planes)
    assert Notify(40961, b"under way") in alice.events(Informed)[0].notifies
    assert bob.events(Informed)[0].notifies == (Notify(40962, b"waits"),)


@pytest.mark.parametrize("gap_s", [0.0, 0.005, 0.015, 0.025])
@pytest.mark.parametrize("moves_first", [False, True])
def test_a_move_and_a_rekeying_of_the_ike_sa_at_once(gap_s, moves_first):
    world, alice, bob, planes = up()
    elsewhere = alice.address._replace(host="192.0.2.77")
    alice.addresses.add(elsewhere)
    path = alice.ike.view(1).path._replace(local=elsewhere)
    steps = [lambda: alice.do("move", 1, path, world.now), lambda: bob.do("rekey", 1, world.now)]
    for step in steps if moves_first else steps[::-1]:
        step()
        planes.run(gap_s)
    settle(world, alice, bob, planes)
    assert alice.ike.view(1).path == path
    assert bob.ike.view(1).path.remote == elsewhere
    assert alice.events(SaMoved)
    assert len(bob.events(SaRekeyed)) == 1


def test_the_responder_moves_nothing_after_it_rekeyed():
    """The original initiator of MOBIKE is the one of the first SA (RFC 4555)."""
    world, alice, bob, planes = up()
    bob.do("rekey", 1, world.now)
    settle(world, alice, bob, planes)
    sa = alice.ike._by_id[1]
    assert (sa.initiator, sa.dialled) == (False, True)
    elsewhere = alice.address._replace(host="192.0.2.77")
    alice.addresses.add(elsewhere)
    alice.do("move", 1, alice.ike.view(1).path._replace(local=elsewhere), world.now)
    planes.run(1)
    assert bob.events(SaMoved)


def test_an_end_after_a_rekeying_is_an_end():
    world, alice, bob, planes = up()
    alice.do("rekey", 1, world.now)
    planes.run(0.5)
    bob.do("close", 1, world.now, "enough")
    planes.run(90)
    assert len(alice.events(SaClosed)) == len(bob.events(SaClosed)) == 1
    for host in (alice, bob):
        assert not host.ike._by_id
        assert not host.ike._by_spi
        assert not host.ike._doorstep._inits
        assert not host.installed


@pytest.mark.parametrize("first", range(0, 40, 20))
def test_seeded_schedules_end_with_one_sa_and_no_packet_lost(first):
    assert schedules.main(20, first) == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_many_seeded_schedules():
    assert schedules.main(1000, 100_000) == 0


def test_what_the_peer_cannot_do_now_is_asked_again_later_and_not_at_once():
    world, alice, bob, planes = up()
    drop_first(world, bob, CREATE, response=True, count=2)
    bob.do("rekey_child", 1, child(bob), world.now)
    alice.do("rekey", 1, world.now)
    before = world.now
    settle(world, alice, bob, planes)
    (told,) = alice.events(SaRekeyed)
    assert told.at - before > 2.0
