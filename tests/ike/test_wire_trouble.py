"""Loss, duplicates, reordering, replays, injected lies, dead peers: what the windows and timers are for."""

from __future__ import annotations

import collections

import pytest

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.errors import LocalError
from p2pvpn.crypto.kex import KexMethod
from p2pvpn.ike.codes import Exchange
from p2pvpn.ike.message import NO_SPI, Header, build_clear, notifications, parse_header_untrusted
from p2pvpn.ike.notifies import Notify, NotifyType
from p2pvpn.ike.outputs import (
    Informed,
    Liveness,
    PeerPathHint,
    SaClosed,
    SaEstablished,
    SaFailed,
    SendKeepalive,
)

from .test_dialogue import assert_mated, member, pair
from .world import World


def up(**settings):
    world, alice, bob = pair(**settings)
    alice.initiate(bob)
    world.run(1)
    return world, alice, bob


def header(data: bytes) -> Header:
    return parse_header_untrusted(data)[0]


@pytest.mark.parametrize("seed", range(20))
def test_set_up_survives_a_third_of_the_packets_lost_and_any_order(seed):
    world, alice, bob = pair(seed=seed, setup_tries=12)
    dice = world.random

    def fate(path, data):
        return [dice.uniform(0.001, 1.2) for _ in range(dice.choice((0, 1, 2)))]

    world.fate = fate
    alice.initiate(bob)
    world.run(29)
    world.fate = lambda path, data: (0.01,)
    world.run(31)
    assert_mated(alice, bob)
    assert len(alice.events(SaEstablished)) == len(bob.events(SaEstablished)) == 1


@pytest.mark.parametrize("additional", [(), ((KexMethod.ML_KEM_768,),)])
def test_a_lost_answer_is_sent_again_byte_by_byte(additional):
    world, alice, bob = pair(additional_kexes=additional)
    count = collections.Counter()

    def lose_first_answers(path, data):
        if path.local == bob.address:
            count[header(data).exchange] += 1
            return () if count[header(data).exchange] <= 2 else (0.01,)
        return (0.01,)

    world.fate = lose_first_answers
    alice.initiate(bob)
    world.run(10)
    assert_mated(alice, bob)
    for host in (alice, bob):
        for exchange in (Exchange.IKE_SA_INIT, Exchange.IKE_AUTH):
            packets = [one for one in host.sent() if header(one).exchange == exchange]
            assert len(packets) == 3
            assert len(set(packets)) == 1


def test_a_repeated_ike_sa_init_is_not_answered_with_a_later_answer():
    world, alice, bob = pair(additional_kexes=((KexMethod.ML_KEM_768,),))
    first = []

    def hold_the_last(path, data):
        first.append((path, data))
        return () if header(data).exchange == Exchange.IKE_AUTH else (0.01,)

    world.fate = hold_the_last
    alice.initiate(bob)
    world.run(0.2)
    path, data = first[0]
    before = len(bob.sent())
    bob.run(bob.ike.handle(Path(path.remote, path.local), data, world.now))
    assert len(bob.sent()) == before


def test_a_packet_lost_in_set_up_costs_little_more_than_a_round_trip():
    world, alice, bob = pair()
    lost = []

    def lose_one(path, data):
        if header(data).exchange == Exchange.IKE_AUTH and not lost:
            lost.append(data)
            return ()
        return (0.025,)

    world.fate = lose_one
    alice.initiate(bob)
    world.run(0.100 + 0.126)
    assert lost
    assert alice.events(SaEstablished)


def test_a_request_is_sent_again_at_once_when_the_way_is_open():
    world, alice, bob = pair()
    world.fate = lambda path, data: () if world.now < began + 0.02 else (0.01,)
    began = world.now
    alice.initiate(bob)
    world.run(0.03)
    (sa,) = alice.ike.sa_ids()
    alice.do("resend", sa, world.now)
    world.run(0.15)
    assert alice.events(SaEstablished)


def test_retransmissions_back_off_and_give_up():
    world, alice, bob = pair()
    world.fate = lambda path, data: ()
    began = world.now
    alice.initiate(bob, tag="nobody")
    world.run(20.5)
    assert len(world.wire) == 7  # six tries, and the early one that is not counted
    assert not alice.events()
    world.run(1)
    (failed,) = alice.events()
    assert failed.timed_out
    assert failed.tag == "nobody"
    assert world.now - began < 22
    assert not alice.ike.sa_ids()


def test_a_half_open_sa_dies_without_a_word():
    world, alice, bob = pair()
    world.fate = lambda path, data: () if header(data).exchange == Exchange.IKE_AUTH else (0.01,)
    alice.initiate(bob)
    world.run(20)
    assert bob.ike.sa_ids()
    world.run(31)
    assert not bob.ike.sa_ids()
    assert not bob.events()


def test_a_replay_of_the_whole_conversation_changes_nothing():
    world, alice, bob = up(liveness_s=None)
    alice.do("inform", alice.sa, [Notify(40961, b"once")], world.now)
    world.run(1)
    events = len(alice.events()), len(bob.events())
    for path, data in list(world.wire):
        for host in (alice, bob):
            mirrored = Path(host.address, Endpoint.of("203.0.113.9", 1))
            host.run(host.ike.handle(mirrored, data, world.now))
            host.run(host.ike.handle(Path(path.remote, path.local), data, world.now))
    world.run(60)
    assert (len(alice.events()), len(bob.events())) == events
    assert_mated(alice, bob)
    assert len(bob.ike.sa_ids()) == 1


def test_replayed_requests_do_not_make_an_amplifier():
    world, alice, bob = up()
    auth = next(one for one in alice.sent() if header(one).exchange == Exchange.IKE_AUTH)
    before = len(bob.sent())
    for _ in range(1000):
        bob.run(bob.ike.handle(Path(bob.address, Endpoint.of("203.0.113.9", 1)), auth, world.now))
    assert len(bob.sent()) - before <= 10


def lie(world, alice, bob, *notifies):
    """Unprotected errors in answer to alice's IKE_SA_INIT, before bob's answer."""
    first = header(alice.sent()[0])
    answer = Header(first.spi_i, NO_SPI, Exchange.IKE_SA_INIT, False, True, 0)
    for notify in notifies:
        packet = build_clear(answer, notifications([notify]))
        alice.run(alice.ike.handle(Path(alice.address, bob.address), packet, world.now))


@pytest.mark.parametrize(
    "notify",
    [
        Notify(NotifyType.NO_PROPOSAL_CHOSEN),
        Notify(NotifyType.INVALID_SYNTAX),
        Notify(NotifyType.AUTHENTICATION_FAILED),
        Notify(NotifyType.INVALID_KE_PAYLOAD, b"\x00\x13"),
        Notify(NotifyType.INVALID_KE_PAYLOAD, b"\x00\x02"),
        Notify(NotifyType.INVALID_KE_PAYLOAD, b"\x04\x01"),
        Notify(NotifyType.COOKIE, b""),
        Notify(NotifyType.COOKIE, bytes(65)),
        Notify(NotifyType.INVALID_MAJOR_VERSION),
        Notify(16407, b"\x01\x04\xc0\x00\x02\x09" + bytes(32)),
    ],
    ids=str,
)
def test_an_injected_error_does_not_stop_the_true_answer(notify):
    world, alice, bob = pair()
    alice.initiate(bob)
    lie(world, alice, bob, notify)
    world.run(5)
    assert_mated(alice, bob)


def test_an_all_zero_key_share_is_no_answer():
    world, alice, bob = pair()
    zeroed = []

    def zero(path, data):
        if path.local == bob.address and header(data).exchange == Exchange.IKE_SA_INIT and not zeroed:
            zeroed.append(data)
            at = data.index(b"\x00\x1f\x00\x00") + 4
            return data[:at] + bytes(32) + data[at + 32 :]
        return data

    world.tamper = zero
    alice.initiate(bob)
    world.run(5)
    assert zeroed
    assert_mated(alice, bob)


@pytest.mark.parametrize("exchange", [Exchange.IKE_SA_INIT, Exchange.IKE_AUTH, Exchange.INFORMATIONAL])
def test_packets_damaged_on_the_way_are_as_good_as_lost(exchange):
    world, alice, bob = pair(setup_tries=8)
    seen = collections.Counter()

    def damage(path, data):
        seen[header(data).exchange, path.local] += 1
        if header(data).exchange == exchange and seen[exchange, path.local] == 1 and exchange != Exchange.IKE_SA_INIT:
            return data[:-1] + bytes([data[-1] ^ 1])
        if header(data).exchange == exchange and seen[exchange, path.local] == 1:
            return data[:-4]
        return data

    world.tamper = damage
    alice.initiate(bob)
    world.run(10)
    alice.do("probe", alice.sa, world.now)
    world.run(10)
    assert alice.events(Liveness)
    assert_mated(alice, bob)


def test_a_downgrade_on_the_way_is_found_out_by_authentication():
    world, alice, bob = pair()

    def strip_aes256(path, data):
        if path.local == alice.address and header(data).exchange == Exchange.IKE_SA_INIT:
            return data.replace(b"\x80\x0e\x01\x00", b"\x80\x0e\x00\x80")
        return data

    world.tamper = strip_aes256
    alice.initiate(bob)
    world.run(60)
    assert not alice.events(SaEstablished)
    assert not bob.events(SaEstablished)


def test_either_side_can_end_it():
    for who in (0, 1):
        world, *both = up()
        ender, other = both[who], both[1 - who]
        ender.do("close", ender.sa, world.now, "enough")
        assert ender.installed, "what is on its way can still arrive"
        world.run(30)
        assert ender.events(SaClosed)[0].reason == "enough"
        assert other.events(SaClosed)[0].reason == "the peer closed it"
        for host in both:
            assert not host.installed
            assert not host.ike.sa_ids()


def test_both_sides_can_end_it_at_once():
    world, alice, bob = up()
    alice.do("close", alice.sa, world.now, "a")
    bob.do("close", bob.sa, world.now, "b")
    world.run(30)
    for host in (alice, bob):
        assert len(host.events(SaClosed)) == 1
        assert not host.installed
        assert not host.ike.sa_ids()


@pytest.mark.parametrize("seed", range(8))
def test_an_end_is_an_end_whatever_is_lost(seed):
    world, alice, bob = up(seed=seed)
    world.fate = lambda path, data: (0.01,) if world.random.random() < 0.4 else ()
    alice.do("close", alice.sa, world.now, "enough")
    world.run(200)
    for host in (alice, bob):
        assert len(host.events(SaClosed)) == 1
        assert not host.installed
        assert not host.ike.sa_ids()


def test_a_dropped_sa_says_nothing_and_the_peer_finds_out_by_itself():
    world, alice, bob = up()
    sent = len(alice.sent())
    alice.do("drop", alice.sa)
    assert not alice.installed
    world.run(120)
    assert len(alice.sent()) == sent
    assert not alice.events(SaClosed)
    assert bob.events(SaClosed)[0].reason == "the peer does not answer"
    assert not bob.installed


def test_a_silent_peer_is_probed_and_given_up():
    world, alice, bob = up(liveness_s=10)
    world.fate = lambda path, data: ()
    world.run(9)
    assert len(world.wire) == 4
    world.run(60)
    for host in (alice, bob):
        assert [type(one) for one in host.events()[-1:]] == [SaClosed]
        assert not host.installed


def test_a_living_peer_answers_and_quiet_sas_stay():
    world, alice, bob = up(liveness_s=10)
    world.run(300)
    assert_mated(alice, bob)
    assert len(alice.events(Liveness)) + len(bob.events(Liveness)) > 10


def test_traffic_puts_the_probe_off():
    world, alice, bob = up(liveness_s=10)
    for _ in range(20):
        world.run(5)
        alice.do("heard", alice.sa, world.now)
        bob.do("heard", bob.sa, world.now)
    assert not alice.events(Liveness)
    assert not bob.events(Liveness)


def test_notifications_arrive_once_and_in_order_over_a_bad_wire():
    world, alice, bob = up(seed=3)
    world.fate = lambda path, data: [world.random.uniform(0, 0.3) for _ in range(world.random.choice((0, 1, 1, 2)))]
    for number in range(10):
        alice.do("inform", alice.sa, [Notify(40961, bytes([number]))], world.now)
    world.run(120)
    told = [one.data[0] for event in bob.events(Informed) for one in event.notifies]
    assert told == list(range(10))


def test_the_queue_of_requests_is_bounded():
    world, alice, bob = up(queue_max=4)
    for _ in range(5):
        alice.do("inform", alice.sa, [Notify(40961)], world.now)
    with pytest.raises(LocalError):
        alice.do("inform", alice.sa, [Notify(40961)], world.now)
    world.run(1)
    assert len(bob.events(Informed)) == 5
    assert_mated(alice, bob)


def test_another_nat_port_is_a_hint_and_no_more():
    world, alice, bob = up()
    rebound = Endpoint.of("192.0.2.1", 61000)
    alice.addresses.add(rebound)
    world.nat = lambda path: Path(rebound, path.remote) if path.local == alice.address else path
    before = bob.ike.view(bob.sa).path
    for _ in range(3):
        alice.do("probe", alice.sa, world.now)
        world.run(1)
    assert len(alice.events(Liveness)) == 3
    (hint,) = bob.events(PeerPathHint)
    assert hint.path.remote == rebound
    assert bob.ike.view(bob.sa).path == before
    bob.do("adopt", bob.sa, hint.path, world.now)
    assert bob.ike.view(bob.sa).path == hint.path
    assert set(bob.paths.values()) == {hint.path}


def test_a_replayed_packet_from_elsewhere_is_no_hint():
    world, alice, bob = up()
    alice.do("probe", alice.sa, world.now)
    world.run(1)
    for data in alice.sent():
        bob.run(bob.ike.handle(Path(bob.address, Endpoint.of("203.0.113.9", 1)), data, world.now))
    assert not bob.events(PeerPathHint)


def test_keepalives_are_sent_behind_a_nat_alone():
    world, alice, bob = pair(liveness_s=None)
    public = Endpoint.of("198.51.100.1", 1025)
    alice.addresses.add(public)

    def translate(path):
        if path.local == alice.address:
            return Path(public, path.remote)
        return Path(path.local, alice.address) if path.remote == public else path

    world.nat = translate
    alice.initiate(bob)
    world.run(1)
    assert alice.ike.view(alice.sa).local_nat
    assert not bob.ike.view(bob.sa).local_nat
    world.run(100)
    keepalives = [one for one in alice.log if isinstance(one, SendKeepalive)]
    assert len(keepalives) == 5
    assert not [one for one in bob.log if isinstance(one, SendKeepalive)]


def test_an_attempt_can_be_called_off():
    world, alice, bob = pair()
    sa = alice.initiate(bob)
    alice.do("close", sa, world.now, "never mind")
    world.run(60)
    assert not alice.events()
    assert not alice.ike.sa_ids()
    assert not bob.ike.sa_ids()


def test_wishes_about_an_sa_that_is_gone_do_nothing():
    _world, alice, bob = pair()
    for command, *rest in (("probe", 0.0), ("close", 0.0, ""), ("drop",), ("inform", [], 0.0), ("heard", 0.0)):
        assert getattr(alice.ike, command)(77, *rest) == []
    assert alice.ike.move(77, Path(alice.address, bob.address), 0.0) == []
    with pytest.raises(LocalError):
        alice.ike.export(77, b"x", 1)


def test_without_credentials_nobody_answers():
    world = World()
    alice = world.host("alice", "192.0.2.1", member("alice"))
    bob = world.host("bob", "192.0.2.2")
    alice.initiate(bob)
    world.run(30)
    assert not bob.log
    assert alice.events(SaFailed)


def test_a_credential_that_cannot_sign_for_this_peer_fails_with_its_reason():
    world = World()
    alice = world.host("alice", "192.0.2.1", member("alice", schemes=()))
    bob = world.host("bob", "192.0.2.2", member("bob"))
    alice.initiate(bob, tag=1)
    world.run(1)
    (failed,) = alice.events(SaFailed)
    assert "signature schemes" in failed.reason
    assert not failed.timed_out
    world.run(40)
    assert not alice.ike.sa_ids()
    assert not bob.ike.sa_ids()


def test_a_timer_that_is_put_off_again_and_again_is_kept_once():
    world, alice, _ = up()
    for _ in range(500):
        alice.do("heard", alice.sa, world.now)
        world.run(0.01)
    assert len(alice.ike._deadlines) <= 2
