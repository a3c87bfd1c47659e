"""A peer that has the keys and breaks the rules: its SA may die, nothing else does. Rows say what is answered."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2pvpn.core.address import Path
from p2pvpn.ike.codes import Exchange
from p2pvpn.ike.message import Header, build_chain, build_clear, notifications
from p2pvpn.ike.notifies import Notify, NotifyType
from p2pvpn.ike.outputs import (
    ChildClosed,
    ChildFailed,
    InstallChild,
    Refused,
    SaClosed,
    SaEstablished,
)
from p2pvpn.ike.payloads import (
    Authentication,
    Certificate,
    Configuration,
    Delete,
    IdInitiator,
    KeyExchangeData,
    Nonce,
    Notification,
    SecurityAssociation,
    SelectorsInitiator,
    SelectorsResponder,
)
from p2pvpn.ike.proposals import Proposal, Transform
from p2pvpn.ike.tasks.auth import AuthRequest

from .evil import Evil
from .test_dialogue import assert_mated, member, pair
from .world import World, selectors


def up():
    world, alice, bob = pair(liveness_s=None)
    alice.initiate(bob)
    world.run(1)
    return world, alice, bob, Evil(alice, alice.sa, bob)


def types(payloads) -> list[int] | None:
    return None if payloads is None else [one.type for one in payloads if isinstance(one, Notification)]


def assert_alive(world, alice, bob, evil) -> None:
    """The SA still answers (the real machine's window is moved behind what evil asked)."""
    evil.sa.requests.next_id = evil.next_id
    alice.do("probe", alice.sa, world.now)
    world.run(1)
    assert alice.ike.view(alice.sa).state == bob.ike.view(bob.sa).state == "ESTABLISHED"
    assert_mated(alice, bob)


ESP_OFFER = SecurityAssociation((Proposal(1, 3, b"\xc0\x00\x00\x99", (Transform(1, 20, 256), Transform(5, 0))),))
ANY = selectors("::/0")


def test_one_peer_gets_so_many_children_and_no_more():
    _world, _alice, bob, evil = up()
    asked = [ESP_OFFER, Nonce(bytes(32)), SelectorsInitiator(ANY), SelectorsResponder(ANY)]
    for _ in range(15):
        assert SecurityAssociation in {type(one) for one in evil.ask(Exchange.CREATE_CHILD_SA, asked)}
    for _ in range(10_000):
        assert types(evil.ask(Exchange.CREATE_CHILD_SA, asked)) == [NotifyType.NO_ADDITIONAL_SAS]
    assert len(bob.installed) == 16
    named = Notification(3, NotifyType.REKEY_SA, next(iter(bob.installed.values())).spi_out.to_bytes(4, "big"), b"")
    for _ in range(16):
        assert NotifyType.NO_ADDITIONAL_SAS not in types(evil.ask(Exchange.CREATE_CHILD_SA, [named, *asked]))
    assert types(evil.ask(Exchange.CREATE_CHILD_SA, [named, *asked])) == [NotifyType.NO_ADDITIONAL_SAS]
    assert len(bob.installed) == 32
    assert bob.ike.view(bob.sa).state == "ESTABLISHED"


@pytest.mark.parametrize(
    "spoiled",
    [
        pytest.param({"share": bytes(32)}, id="an all-zero key share"),
        pytest.param({"share": bytes(31)}, id="a short key share"),
        pytest.param({"spi": bytes(8)}, id="an SPI of zero"),
        pytest.param({"spi": b""}, id="no SPI"),
    ],
)
def test_a_rekeying_of_the_ike_sa_that_cannot_be_is_refused(spoiled):
    _world, _alice, bob, evil = up()
    spi, share = spoiled.get("spi", bytes(range(8))), spoiled.get("share", b"\x09" + bytes(31))
    offer = Proposal(1, 1, spi, (Transform(1, 20, 256), Transform(2, 5), Transform(4, 31)))
    payloads = [SecurityAssociation((offer,)), Nonce(bytes(32)), KeyExchangeData(31, share)]
    (kind,) = types(evil.ask(Exchange.CREATE_CHILD_SA, payloads))
    assert kind == (NotifyType.NO_PROPOSAL_CHOSEN if spi == b"" else NotifyType.INVALID_SYNTAX)
    assert len(bob.ike._by_id) == 1, "no successor"


@pytest.mark.parametrize("named", [(1, b"1234"), (3, b""), (3, b"12345678"), (2, b"1234")])
def test_a_rekeying_of_something_that_is_no_child_is_nonsense(named):
    _world, _alice, _bob, evil = up()
    notify = Notification(named[0], NotifyType.REKEY_SA, named[1], b"")
    asked = [notify, ESP_OFFER, Nonce(bytes(32)), SelectorsInitiator(ANY), SelectorsResponder(ANY)]
    assert types(evil.ask(Exchange.CREATE_CHILD_SA, asked)) == [NotifyType.INVALID_SYNTAX]


def test_a_key_exchange_that_nothing_waits_for_is_told_so():
    world, alice, bob, evil = up()
    link = Notification(0, NotifyType.ADDITIONAL_KEY_EXCHANGE, b"", b"a link")
    for payloads in ([KeyExchangeData(31, b"\x09" + bytes(31)), link], [KeyExchangeData(31, b"\x09" + bytes(31))]):
        assert types(evil.ask(Exchange.IKE_FOLLOWUP_KE, payloads)) == [NotifyType.STATE_NOT_FOUND]
    assert_alive(world, alice, bob, evil)


def test_deleting_spis_of_others_does_nothing():
    world, alice, bob, evil = up()
    unknown = tuple(number.to_bytes(4, "big") for number in range(1000))
    assert evil.ask(Exchange.INFORMATIONAL, [Delete(3, unknown)]) == []
    (own,) = bob.installed.values()
    assert evil.ask(Exchange.INFORMATIONAL, [Delete(3, (own.spi_in.to_bytes(4, "big"),))]) == []
    assert evil.ask(Exchange.INFORMATIONAL, [Delete(3, (bytes(8),))]) == []
    assert evil.ask(Exchange.INFORMATIONAL, [Delete(2, (own.spi_out.to_bytes(4, "big"),))]) == []
    assert_alive(world, alice, bob, evil)


def test_deleting_the_child_leaves_the_sa():
    _world, _alice, bob, evil = up()
    (child,) = bob.installed.values()
    answer = evil.ask(Exchange.INFORMATIONAL, [Delete(3, (child.spi_out.to_bytes(4, "big"),))])
    assert answer == [Delete(3, (child.spi_in.to_bytes(4, "big"),))]
    assert [one.child_id for one in bob.events(ChildClosed)] == [child.id]
    assert not bob.installed
    assert bob.ike.view(bob.sa).state == "ESTABLISHED"


def test_cookie2_and_nat_detection_are_answered_in_kind():
    world, alice, bob, evil = up()
    answer = evil.ask(
        Exchange.INFORMATIONAL,
        notifications(
            [
                Notify(NotifyType.COOKIE2, b"c" * 12),
                Notify(NotifyType.NAT_DETECTION_SOURCE_IP, b"odd"),
                Notify(NotifyType.NAT_DETECTION_DESTINATION_IP, b"length"),
            ]
        ),
    )
    assert [one.type for one in answer] == [16401, 16388, 16389]
    assert answer[0].data == b"c" * 12
    assert_alive(world, alice, bob, evil)


def test_an_unknown_critical_payload_is_named_and_the_sa_stands():
    world, alice, bob, evil = up()
    answer = evil.ask_raw(37, 200, bytes.fromhex("00 80 0005 00"))
    assert [(one.type, one.data) for one in answer] == [(NotifyType.UNSUPPORTED_CRITICAL_PAYLOAD, b"\xc8")]
    assert_alive(world, alice, bob, evil)


def test_unknown_payloads_and_notifications_are_passed_over():
    world, alice, bob, evil = up()
    assert evil.ask_raw(37, 200, bytes.fromhex("00 00 0005 00")) == []
    assert evil.ask(37, notifications([Notify(9999), Notify(20000)])) == []
    assert evil.ask(37, [Configuration(1, b"")]) == []
    assert_alive(world, alice, bob, evil)


@pytest.mark.parametrize(
    ("exchange", "first", "chain"),
    [
        (37, 42, "00 00 000c 03 04 0002 c0000001"),
        (37, 42, "00 00 0008 03 00 ffff"),
        (37, 41, "00 00 0008 00 09 4004"),
        (37, 41, "00 00 0008 00 00 4004 00"),
        (37, 41, "00 00 0003"),
        (37, 41, ""),
        (37, 33, "00 00 0004"),
        (37, 46, "00 00 0004"),
        (36, 40, "00 00 0014" + "00" * 16),
        (36, 33, "00 00 0004"),
    ],
)
def test_nonsense_is_answered_once_and_ends_its_own_sa(exchange, first, chain):
    world, _alice, bob, evil = up()
    answer = evil.ask_raw(exchange, first, bytes.fromhex(chain))
    assert types(answer) == [NotifyType.INVALID_SYNTAX]
    (closed,) = bob.events(SaClosed)
    assert "nonsense" in closed.reason
    assert not bob.installed
    assert evil.ask(37, []) is None
    world.run(30)
    assert not bob.ike.sa_ids()


def test_what_is_out_of_turn_gets_no_answer():
    world, alice, bob, evil = up()
    empty = (0, b"")
    now = evil.next_id
    for number in (now + 1, now + 2, 0, 1 << 31, 0xFFFFFFFF):
        assert not evil.give(evil.packet(37, *empty, message_id=number)) or number == now - 1
    assert not evil.give(evil.packet(35, *empty))
    assert not evil.give(evil.packet(43, *empty))
    assert not evil.give(evil.packet(99, *empty))
    assert not evil.give(evil.packet(37, *empty, response=True))
    assert not evil.give(evil.packet(37, *empty)[:-1])
    header = evil.header(37, now)
    assert not evil.give(build_clear(header, [Delete(1)]))
    backwards = Header(header.spi_i, header.spi_r, 37, False, False, now)
    assert not evil.give(evil.sealer.seal(backwards, 0, b""))
    assert not evil.give(evil.sealer.seal(Header(header.spi_i, b"x" * 8, 37, True, False, now), 0, b""))
    assert not evil.give(evil.sealer.seal(Header(b"x" * 8, header.spi_r, 37, True, False, now), 0, b""))
    assert_alive(world, alice, bob, evil)


def test_own_packets_played_back_do_nothing():
    world, alice, bob, evil = up()
    alice.do("probe", alice.sa, world.now)
    for data in list(alice.sent()):
        assert not alice.ike.handle(Path(alice.address, bob.address), data, world.now)
    world.run(1)
    evil.next_id += 1
    assert_alive(world, alice, bob, evil)


def half_way(change=lambda payloads: payloads, host_bob=None, **request):
    """Up to IKE_AUTH, which alice builds by the book and `change` spoils; the answer of bob."""
    world = World()
    alice = world.host("alice", "192.0.2.1", member("alice"))
    bob = world.host("bob", "192.0.2.2", member("bob"))
    world.fate = lambda path, data: () if data[18] == Exchange.IKE_AUTH else (0.01,)
    alice.initiate(bob, **request)
    world.run(0.3)
    (sa_id,) = alice.ike.sa_ids()
    evil = Evil(alice, sa_id, bob)
    task = evil.sa.requests.outstanding.task
    assert isinstance(task, AuthRequest)
    evil.next_id = 1
    return world, alice, bob, evil, change(task.request(evil.sa))


def without(*kinds):
    return lambda payloads: [one for one in payloads if not isinstance(one, kinds)]


def swapped(kind, new):
    return lambda payloads: [new if isinstance(one, kind) else one for one in payloads]


def test_the_book_version_comes_up():
    _world, _alice, bob, evil, payloads = half_way()
    assert evil.ask(35, payloads)
    assert bob.events(SaEstablished)


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        (without(IdInitiator), NotifyType.INVALID_SYNTAX),
        (without(Authentication), NotifyType.AUTHENTICATION_FAILED),
        (without(Certificate), NotifyType.AUTHENTICATION_FAILED),
        (without(SelectorsInitiator), NotifyType.INVALID_SYNTAX),
        (without(SecurityAssociation), NotifyType.INVALID_SYNTAX),
        (lambda payloads: [payloads[0], *payloads], NotifyType.INVALID_SYNTAX),
        (
            lambda payloads: payloads + [one for one in payloads if isinstance(one, Authentication)],
            NotifyType.INVALID_SYNTAX,
        ),
        (lambda payloads: [*payloads, *[Certificate(4, b"x")] * 8], NotifyType.INVALID_SYNTAX),
        (swapped(Certificate, Certificate(4, bytes(25_000))), NotifyType.INVALID_SYNTAX),
        (swapped(Certificate, Certificate(4, bytes(8_000))), NotifyType.AUTHENTICATION_FAILED),
        (swapped(Certificate, Certificate(12, b"http://x")), NotifyType.AUTHENTICATION_FAILED),
        (swapped(Authentication, Authentication(0, b"")), NotifyType.AUTHENTICATION_FAILED),
        (swapped(Authentication, Authentication(1, bytes(256))), NotifyType.AUTHENTICATION_FAILED),
        (swapped(Authentication, Authentication(2, bytes(32))), NotifyType.AUTHENTICATION_FAILED),
        (swapped(Authentication, Authentication(9, bytes(64))), NotifyType.AUTHENTICATION_FAILED),
        (swapped(Authentication, Authentication(13, bytes(64))), NotifyType.AUTHENTICATION_FAILED),
        (swapped(Authentication, Authentication(14, b"")), NotifyType.AUTHENTICATION_FAILED),
        (swapped(Authentication, Authentication(14, b"\xff" + bytes(90))), NotifyType.AUTHENTICATION_FAILED),
        (swapped(IdInitiator, IdInitiator(2, b"")), NotifyType.AUTHENTICATION_FAILED),
        (swapped(IdInitiator, IdInitiator(2, b"*")), NotifyType.AUTHENTICATION_FAILED),
        (swapped(IdInitiator, IdInitiator(2, b"alice\x00.evil")), NotifyType.AUTHENTICATION_FAILED),
        (swapped(IdInitiator, IdInitiator(2, bytes(8_000))), NotifyType.AUTHENTICATION_FAILED),
        (swapped(IdInitiator, IdInitiator(9, b"\x30\x80\xff")), NotifyType.AUTHENTICATION_FAILED),
        (swapped(IdInitiator, IdInitiator(0, b"\x30")), NotifyType.AUTHENTICATION_FAILED),
    ],
)
def test_a_spoiled_auth_is_refused_and_never_becomes_an_sa(change, answer):
    world, _alice, bob, evil, payloads = half_way(change)
    reply = evil.ask(35, payloads)
    assert [one.type for one in reply] == [answer]
    assert len(bob.events(Refused)) == 1
    assert not bob.events(SaEstablished)
    assert not bob.installed
    assert evil.ask(35, payloads) is None
    world.run(30)
    assert not bob.ike.sa_ids()


@pytest.mark.parametrize("exchange", [34, 36, 37, 43, 44])
def test_before_authentication_there_is_nothing_but_ike_auth(exchange):
    _world, _alice, bob, evil, payloads = half_way()
    for chain in ([], [Delete(1)], [ESP_OFFER, Nonce(bytes(32))]):
        assert not evil.give(evil.packet(exchange, *build_chain(chain)))
        assert not evil.give(evil.packet(exchange, *build_chain(chain), message_id=0))
    assert bob.ike.view(bob.ike.sa_ids()[0]).state == "INIT_ANSWERED"
    assert evil.ask(35, payloads)
    assert bob.events(SaEstablished)


@pytest.mark.parametrize("spi", [b"", bytes(4), b"\x00\x00\x00\xff", bytes(8)])
def test_an_esp_spi_that_cannot_be_is_refused(spi):
    offer = SecurityAssociation((Proposal(1, 3, spi, (Transform(1, 20, 256), Transform(5, 0))),))
    _world, _alice, bob, evil, payloads = half_way(swapped(SecurityAssociation, offer))
    assert types(evil.ask(35, payloads)) == [NotifyType.INVALID_SYNTAX]
    assert not bob.installed
    assert not [one for one in bob.log if isinstance(one, InstallChild)]


@pytest.mark.parametrize(
    "transforms",
    [
        (Transform(1, 12, 256), Transform(3, 2), Transform(5, 0)),
        (Transform(1, 12, 256), Transform(5, 0)),
        (Transform(1, 20, 256), Transform(3, 12), Transform(5, 0)),
        (Transform(1, 20, 257), Transform(5, 0)),
        (Transform(1, 20, -1), Transform(5, 0)),
        (Transform(1, 20, 256), Transform(5, 7)),
        (Transform(1, 20, 256), Transform(77, 1)),
        (Transform(5, 0),),
        (),
    ],
)
def test_a_child_without_a_proposal_for_us_is_refused_alone(transforms):
    offer = SecurityAssociation((Proposal(1, 3, b"\xc0\x00\x00\x99", transforms),))
    _world, _alice, bob, evil, payloads = half_way(swapped(SecurityAssociation, offer))
    assert NotifyType.NO_PROPOSAL_CHOSEN in types(evil.ask(35, payloads))
    assert bob.events(SaEstablished)
    assert bob.events(ChildFailed)


def test_a_child_offer_with_a_key_exchange_transform_is_taken_without_it():
    transforms = (Transform(1, 20, 256), Transform(4, 31), Transform(5, 0))
    offer = SecurityAssociation((Proposal(7, 3, b"\xc0\x00\x00\x99", transforms),))
    _world, _alice, _bob, evil, payloads = half_way(swapped(SecurityAssociation, offer))
    answer = next(one for one in evil.ask(35, payloads) if isinstance(one, SecurityAssociation)).proposals[0]
    assert answer.number == 7
    assert answer.transforms == (Transform(1, 20, 256), Transform(5, 0))


mutation = st.lists(
    st.tuples(st.integers(0, 4095), st.integers(0, 255), st.sampled_from("sic")), min_size=1, max_size=6
)


def mutated(chain: bytes, steps) -> bytes:
    raw = bytearray(chain)
    for at, value, how in steps:
        at %= len(raw) or 1
        if how == "s" and raw:
            raw[at] = value
        elif how == "i":
            raw[at:at] = bytes([value]) * (value % 9 + 1)
        else:
            del raw[at : at + value % 9 + 1]
    return bytes(raw)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutation)
def test_no_mutant_of_ike_auth_is_worse_than_a_refusal(steps):
    world, _alice, bob, evil, payloads = half_way()
    first, chain = build_chain(payloads)
    evil.give(evil.packet(35, first, mutated(chain, steps)))
    world.run(40)
    for event in bob.events(SaEstablished):
        assert event.remote.subject == "alice"
        for child in bob.installed.values():
            assert child.remote == selectors("fd00::a/128")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from((36, 37)), st.booleans(), mutation)
def test_no_mutant_in_an_established_sa_is_worse_than_its_end(exchange, response, steps):
    world, _alice, bob, evil = up()
    if exchange == 36:
        chain = [ESP_OFFER, Nonce(bytes(32)), SelectorsInitiator(ANY), SelectorsResponder(ANY)]
    else:
        chain = [Delete(3, (bytes(4),)), *notifications([Notify(40961, b"x"), Notify(NotifyType.COOKIE2, bytes(8))])]
    first, raw = build_chain(chain)
    if response:
        bob.do("inform", bob.sa, [Notify(40961)], world.now)
    evil.give(evil.packet(exchange, first, mutated(raw, steps), message_id=0 if response else None, response=response))
    world.run(60)
    assert len(bob.events(SaEstablished)) == 1
    assert len(bob.events(SaClosed)) <= 1
