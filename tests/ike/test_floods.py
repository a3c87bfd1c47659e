"""Cookies, limits of half-open SAs, unprotected errors: what strangers can make us do."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.crypto.kex import KexMethod
from p2pvpn.ike.codes import Exchange
from p2pvpn.ike.message import HEADER_BYTES, NO_SPI, Header, build_clear, parse_clear_untrusted, parse_header_untrusted
from p2pvpn.ike.notifies import Notify, NotifyType
from p2pvpn.ike.payloads import KeyExchangeData, Nonce, Notification, SecurityAssociation
from p2pvpn.ike.proposals import Proposal, Transform

from .test_dialogue import assert_mated, member, pair
from .world import World


def request_of(dice: random.Random) -> bytes:
    """A good IKE_SA_INIT request, but for its origin."""
    world = World(dice.getrandbits(32))
    mallory = world.host("mallory", "203.0.113.1", member("carol"))
    mallory.initiate(mallory)
    return mallory.sent()[0]


def fresh(template: bytes, dice: random.Random) -> bytes:
    """The same with another SPI."""
    return dice.randbytes(8) + template[8:]


def flood(bob, count: int, *, sources: int = 1 << 24, template: bytes | None = None, seed: int = 1) -> list:
    dice = random.Random(seed)
    template = template or request_of(dice)
    out = []
    for _ in range(count):
        source = Endpoint(f"198.18.{dice.randrange(256)}.{dice.randrange(256)}", 1024 + dice.randrange(sources) % 60000)
        if sources == 1:
            source = Endpoint("198.18.0.1", 1024 + dice.randrange(60000))
        out += bob.ike.handle(Path(bob.address, source), fresh(template, dice), bob.world.now)
    return out


def errors(outputs: list) -> list[Notify]:
    return [one for out in outputs for one in parse_clear_untrusted(out.data).notifies if one.is_error]


def test_cookies_are_asked_for_above_the_threshold_and_honest_peers_still_get_in():
    world, alice, bob = pair()
    answers = flood(bob, 200)
    asked = [parse_clear_untrusted(one.data).notify(NotifyType.COOKIE) for one in answers]
    assert len(bob.ike.sa_ids()) == 30
    assert len([one for one in asked if one]) == 170
    alice.initiate(bob)
    began = world.now
    world.run(1)
    assert_mated(alice, bob)
    assert len(world.wire) == 6
    first, second = (parse_clear_untrusted(one) for one in alice.sent()[:2])
    assert second.payloads[0].type == NotifyType.COOKIE
    assert second.payloads[1:] == first.payloads
    assert second.header.message_id == 0
    assert alice.events()[0].at - began < 0.1


def test_cookie_and_another_group_together_take_six_messages_of_set_up():
    world = World()
    alice = world.host("alice", "192.0.2.1", member("alice"))
    bob = world.host("bob", "192.0.2.2", member("bob"), kexes=(KexMethod.ECP_256,), cookie_total=0)
    alice.initiate(bob)
    world.run(1)
    inits = [data for _, data in world.wire if parse_header_untrusted(data)[0].exchange == Exchange.IKE_SA_INIT]
    assert len(inits) == 6
    assert_mated(alice, bob)


def test_one_source_needs_cookies_before_the_others_do():
    _, _, bob = pair()
    flood(bob, 50, sources=1)
    assert len(bob.ike.sa_ids()) == 3


def test_a_cookie_is_good_for_one_sender_one_nonce_and_two_minutes():
    world, _, bob = pair(cookie_total=0)
    template = request_of(random.Random(5))
    source = Path(bob.address, Endpoint.of("198.18.0.1", 500))
    (asked,) = bob.ike.handle(source, template, world.now)
    cookie = parse_clear_untrusted(asked.data).notify(NotifyType.COOKIE)
    message = parse_clear_untrusted(template)

    def with_cookie(data: bytes, *payloads) -> bytes:
        return build_clear(message.header, [Notification.of(Notify(NotifyType.COOKIE, data)), *payloads])

    good = with_cookie(cookie.data, *message.payloads)
    others = [one if not isinstance(one, Nonce) else Nonce(bytes(32)) for one in message.payloads]
    elsewhere = Path(bob.address, Endpoint.of("198.18.0.2", 500))
    for path, packet in [
        (elsewhere, good),
        (source, with_cookie(cookie.data, *others)),
        (source, b"\x01" * 8 + good[8:]),
        (source, with_cookie(cookie.data[:-1], *message.payloads)),
        (source, with_cookie(bytes(20), *message.payloads)),
    ]:
        (answer,) = bob.ike.handle(path, packet, world.now)
        assert parse_clear_untrusted(answer.data).notify(NotifyType.COOKIE)
    world.now += 61
    assert len(bob.ike.handle(source, good, world.now)) == 1
    assert len(bob.ike.sa_ids()) == 1
    world.now += 121
    bob.ike.tick(world.now)
    (answer,) = bob.ike.handle(source, good, world.now)
    assert parse_clear_untrusted(answer.data).notify(NotifyType.COOKIE)


@pytest.mark.parametrize("size", [0, 65, 300])
def test_a_cookie_of_an_impossible_length_is_bad_syntax(size):
    world, _, bob = pair(cookie_total=0)
    message = parse_clear_untrusted(request_of(random.Random(5)))
    packet = build_clear(message.header, [Notification.of(Notify(NotifyType.COOKIE, bytes(size))), *message.payloads])
    out = bob.ike.handle(Path(bob.address, Endpoint.of("198.18.0.1", 500)), packet, world.now)
    assert [one.type for one in errors(out)] == [NotifyType.INVALID_SYNTAX]


def test_half_open_sas_are_bounded_even_with_cookies():
    world, alice, bob = pair(half_open_max=10, cookie_total=1000, cookie_per_source=1000)
    flood(bob, 100)
    assert len(bob.ike.sa_ids()) == 10
    alice.initiate(bob)
    world.run(20)
    assert not bob.installed
    world.run(40)
    alice.initiate(bob)
    world.run(1)
    assert_mated(alice, bob)


def test_a_source_has_its_share_and_no_more():
    _, _, bob = pair(half_open_per_source=5, cookie_per_source=1000)
    flood(bob, 100, sources=1)
    assert len(bob.ike.sa_ids()) == 5


def test_a_flood_costs_little_and_is_forgotten():
    world, alice, bob = pair()
    template = request_of(random.Random(1))
    began = time.process_time()
    flood(bob, 5000, template=template)
    spent = time.process_time() - began
    assert spent < 2.5, "5,000 requests in well under a millisecond each"
    assert len(bob.ike.sa_ids()) == 30
    world.run(31)
    assert not bob.ike.sa_ids()
    alice.initiate(bob)
    world.run(1)
    assert len(world.wire) == 4


def answers_to(packet: bytes, **settings) -> list:
    world, _, bob = pair(**settings)
    out = bob.ike.handle(Path(bob.address, Endpoint.of("198.18.0.1", 500)), packet, world.now)
    assert not bob.ike.sa_ids()
    return out


def test_what_is_wrong_with_a_request_is_said_once_without_keeping_anything():
    message = parse_clear_untrusted(request_of(random.Random(5)))
    sa, ke, nonce, *_rest = message.payloads

    def told(*payloads) -> list[int]:
        return [one.type for one in errors(answers_to(build_clear(message.header, list(payloads))))]

    assert told(ke, nonce) == [NotifyType.INVALID_SYNTAX]
    assert told(sa, nonce) == [NotifyType.INVALID_SYNTAX]
    assert told(sa, ke) == [NotifyType.INVALID_SYNTAX]
    assert told(sa, sa, ke, nonce) == [NotifyType.INVALID_SYNTAX]
    assert told(sa, ke, ke, nonce) == [NotifyType.INVALID_SYNTAX]
    assert told(sa, KeyExchangeData(ke.group, ke.data[:-1]), nonce) == [NotifyType.INVALID_SYNTAX]
    assert told(sa, KeyExchangeData(ke.group, bytes(32)), nonce) == [NotifyType.INVALID_SYNTAX]
    assert told(SecurityAssociation((Proposal(1, 1, b"", ()),)), ke, nonce) == [NotifyType.NO_PROPOSAL_CHOSEN]
    for missing in (1, 2, 4):
        kept = tuple(one for one in sa.proposals[0].transforms if one.type != missing)
        assert told(SecurityAssociation((Proposal(1, 1, b"", kept),)), ke, nonce) == [NotifyType.NO_PROPOSAL_CHOSEN]
    unknown = (*sa.proposals[0].transforms, Transform(6, 36))
    assert told(SecurityAssociation((Proposal(1, 1, b"", unknown),)), ke, nonce) == [NotifyType.NO_PROPOSAL_CHOSEN]


@pytest.mark.parametrize("group", [0, 1, 2, 14, 18, 25, 32, 1025, 65535])
def test_no_group_number_does_harm(group):
    message = parse_clear_untrusted(request_of(random.Random(5)))
    sa, ke, nonce, *rest = message.payloads
    out = answers_to(build_clear(message.header, [sa, KeyExchangeData(group, ke.data), nonce, *rest]))
    (told,) = errors(out)
    assert (told.type, told.data) == (NotifyType.INVALID_KE_PAYLOAD, b"\x00\x1f")


def chain(first: int, *payloads: tuple[int, int, bytes]) -> bytes:
    """A request with generic headers of our own making: (next, flags, body)."""
    body = b"".join(
        bytes([following, flags]) + (4 + len(data)).to_bytes(2, "big") + data for following, flags, data in payloads
    )
    return Header(b"\x01" * 8, NO_SPI, 34, True, False, 0).build(first, HEADER_BYTES + len(body)) + body


def test_an_unknown_critical_payload_is_named():
    (told,) = errors(answers_to(chain(200, (0, 0x80, b"what"))))
    assert (told.type, told.data) == (NotifyType.UNSUPPORTED_CRITICAL_PAYLOAD, b"\xc8")


def test_payloads_of_ike_version_1_are_passed_over():
    message = parse_clear_untrusted(request_of(random.Random(5)))
    whole = build_clear(message.header, message.payloads)
    first = whole[16]
    with_old = whole[:16] + bytes([1]) + whole[17:24] + (len(whole) + 8).to_bytes(4, "big")
    with_old += bytes([first, 0, 0, 8]) + b"old!" + whole[28:]
    world, _, bob = pair()
    bob.run(bob.ike.handle(Path(bob.address, Endpoint.of("198.18.0.1", 500)), with_old, world.now))
    assert len(bob.ike.sa_ids()) == 1


def test_a_later_version_is_told_so_and_an_earlier_one_nothing():
    packet = request_of(random.Random(5))
    (told,) = errors(answers_to(packet[:17] + b"\x30" + packet[18:]))
    assert told.type == NotifyType.INVALID_MAJOR_VERSION
    assert not answers_to(packet[:17] + b"\x10" + packet[18:])


def test_a_header_that_lies_about_the_length_is_dropped():
    packet = request_of(random.Random(5))
    for length in (0, 27, 28, len(packet) - 1, len(packet) + 1, 0xFFFFFFFF):
        assert not answers_to(packet[:24] + length.to_bytes(4, "big") + packet[28:])


def test_errors_to_one_source_are_rate_limited():
    world, _, bob = pair()
    bad = chain(200, (0, 0x80, b"what"))
    out = [bob.ike.handle(Path(bob.address, Endpoint.of("198.18.0.1", port)), bad, world.now) for port in range(1, 500)]
    assert len([one for one in out if one]) <= 4


def test_an_answer_before_authentication_is_at_most_three_times_the_question():
    world, alice, bob = pair()
    alice.initiate(bob)
    world.run(0.03)
    assert len(bob.sent()[0]) <= 3 * len(alice.sent()[0])


@pytest.mark.parametrize("exchange", [35, 36, 37, 43, 44, 99])
@pytest.mark.parametrize("response", [False, True])
def test_nothing_but_a_first_request_wakes_anybody(exchange, response):
    packet = request_of(random.Random(5))
    flags = 0x28 if response else 0x08
    assert not answers_to(packet[:18] + bytes([exchange, flags]) + packet[20:])
    assert not answers_to(packet[:19] + b"\x28" + packet[20:])
    assert not answers_to(packet[:20] + b"\x00\x00\x00\x01" + packet[24:])
    assert not answers_to(packet[:8] + b"\x07" * 8 + packet[16:])


def test_the_screen_lets_everything_pass_while_there_is_no_crowd():
    _world, _alice, bob = pair()
    template = request_of(random.Random(1))
    assert bob.ike.screen(("198.18.0.1", 4500), template, 0.0) is None
    assert bob.ike.init_counts.requests == 0


def test_the_screen_answers_a_crowd_with_the_same_cookies_and_counts_it():
    world, _alice, bob = pair()
    dice = random.Random(1)
    template = request_of(dice)
    flood(bob, 30, template=template)
    assert bob.ike.half_open == 30
    before = bob.ike.init_counts.requests
    for number in range(50):
        request, source = fresh(template, dice), Endpoint(f"198.18.7.{number}", 4500)
        answer = bob.ike.screen(source, request, world.now)
        (out,) = bob.ike.handle(Path(bob.address, source), request, world.now)
        assert answer == out.data
        cookie = parse_clear_untrusted(answer).notify(NotifyType.COOKIE)
        notify = bytes([template[16], 0]) + (8 + len(cookie.data)).to_bytes(2, "big") + b"\0\0\x40\x06" + cookie.data
        again = request[:16] + bytes([41]) + request[17:24] + (len(request) + len(notify)).to_bytes(4, "big")
        again += notify + request[28:]
        assert bob.ike.screen(source, again, world.now) is None, "it has its cookie"
        assert bob.ike.screen(Endpoint("198.18.8.1", 4500), again, world.now), "which is good for nobody else"
    assert bob.ike.init_counts.requests == before + 150
    assert bob.ike.half_open == 30


def test_in_a_crowd_what_was_answered_before_is_answered_again():
    world, alice, bob = pair()
    alice.initiate(bob)
    (request,) = alice.sent()
    path = Path(bob.address, alice.address)
    (first,) = bob.ike.handle(path, request, world.now)
    flood(bob, 200)
    assert bob.ike.screen(alice.address, request, world.now) is None
    assert bob.ike.handle(path, request, world.now) == [first]


@given(st.binary(max_size=400), st.booleans(), st.integers(0, 60))
def test_no_bytes_make_the_screen_raise_or_keep_anything(data, looks_right, cut):
    _world, _alice, bob = CROWD
    if looks_right:
        data = data[:8].ljust(8, b"x") + bytes(8) + bytes([data[9] if len(data) > 9 else 40, 0x20, 34, 8]) + data[cut:]
        data = data[:24].ljust(24, b"\0") + (len(data[24:]) + 28).to_bytes(4, "big") + data[24:]
    answer = bob.ike.screen(("198.18.0.1", 4500), data, 0.0)
    assert answer is None or answer == b"" or len(answer) <= 56
    assert bob.ike.half_open == 30


CROWD = pair()
flood(CROWD[2], 30)
