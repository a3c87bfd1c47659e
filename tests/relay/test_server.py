"""Dialogues with the relay: who is bound, who is not, and what an allocation costs."""

from __future__ import annotations

import random

import pytest

from p2pvpn.core import stun
from p2pvpn.core.address import Endpoint
from p2pvpn.relay.binding import build_request
from p2pvpn.relay.limits import RelayLimits
from p2pvpn.relay.server import Answer, Expiry, Refusal, RelayBound, RelayExpired, RelayRefused
from p2pvpn.relay.wire import RelayTicket, transaction_id

from .world import ALICE, ALICE_AT, BOB, BOB_AT, MALLORY, STRANGER_AT, Hub, Peer

KNOWN = {"known_a": ALICE_AT.host, "known_b": BOB_AT.host}


def bound_pair(hub: Hub, **known):
    allocation = hub.allocate(**known)
    alice, bob = Peer(hub, allocation.side_a, ALICE_AT), Peer(hub, allocation.side_b, BOB_AT, seed=8)
    alice.bind()
    bob.bind()
    assert alice.client.is_ready
    assert bob.client.is_ready
    return allocation, alice, bob


@pytest.mark.parametrize("known", [{}, KNOWN], ids=["by nonce", "by tunnel address"])
def test_bytes_pass_both_ways_unchanged_once_both_sides_are_bound(known):
    hub = Hub()
    allocation, _, _ = bound_pair(hub, **known)
    hub.receive(allocation.side_a.port, ALICE_AT, b"\xc0 to bob")
    hub.receive(allocation.side_b.port, BOB_AT, b"\xc0 to alice")
    assert hub.take() == [
        (allocation.side_b.port, BOB_AT, b"\xc0 to bob"),
        (allocation.side_a.port, ALICE_AT, b"\xc0 to alice"),
    ]
    assert [(e.owner, e.source) for e in hub.events] == [(ALICE, ALICE_AT), (BOB, BOB_AT)]


def test_the_address_of_the_tunnel_binds_in_one_round_trip_whatever_the_port():
    hub = Hub()
    allocation = hub.allocate(known_a=ALICE_AT.host)
    alice = Peer(hub, allocation.side_a, Endpoint(ALICE_AT.host, 61999))
    alice.bind()
    assert len(alice.requests) == 1
    assert hub.bound == {allocation.side_a.port: Endpoint(ALICE_AT.host, 61999)}


def test_another_address_has_to_echo_a_nonce():
    hub = Hub()
    allocation = hub.allocate(known_a="192.0.2.77")
    alice = Peer(hub, allocation.side_a, ALICE_AT)
    alice.bind()
    assert len(alice.requests) == 2
    assert alice.client.mapped == ALICE_AT


def test_an_ipv6_peer_and_an_ipv4_peer_meet():
    hub = Hub()
    allocation = hub.allocate(known_b=BOB_AT.host)
    six = Endpoint("2001:db8::a", 4500)
    alice, bob = Peer(hub, allocation.side_a, six), Peer(hub, allocation.side_b, BOB_AT)
    alice.bind()
    bob.bind()
    hub.receive(allocation.side_b.port, BOB_AT, b"hello")
    assert hub.take() == [(allocation.side_a.port, six, b"hello")]


def test_a_request_under_a_wrong_key_is_not_answered():
    hub = Hub()
    allocation = hub.allocate(**KNOWN)
    side = allocation.side_a
    Peer(hub, RelayTicket(side.port, side.username, allocation.side_b.key, 600), ALICE_AT).bind()
    assert hub.take() == []
    assert hub.bound == {}


def test_the_ticket_of_one_side_does_not_bind_the_other():
    hub = Hub()
    allocation = hub.allocate(**KNOWN)
    data = build_request(allocation.side_a, transaction_id(1, b"abcd"), b"")
    assert hub.receive(allocation.side_b.port, ALICE_AT, data) == []


def test_a_request_to_a_port_that_is_not_ours_is_ignored():
    hub = Hub()
    allocation = hub.allocate()
    data = build_request(allocation.side_a, transaction_id(1, b"abcd"), b"")
    assert hub.server.handle(9, ALICE_AT, data, hub.now) == []


def snapshot(server):
    """Everything a stranger might have changed."""
    sides = [side for pair in server._pairs.values() for side in pair.sides]
    return (
        [(s.source, s.counter, s.known, list(s.queue), s.bound_at) for s in sides],
        len(server),
        server.next_deadline(),
    )


def test_garbage_from_strangers_changes_nothing_and_is_never_answered():
    hub = Hub()
    allocation, alice, _ = bound_pair(hub, **KNOWN)
    before = snapshot(hub.server)
    chance = random.Random(5)
    genuine = alice.requests[-1]
    for _ in range(2000):
        data = bytearray(genuine)
        match chance.randrange(3):
            case 0:
                data = bytearray(chance.randbytes(chance.randrange(200)))
            case 1:
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            case 2:
                data = data[: chance.randrange(len(data))]
        source = Endpoint(f"203.0.113.{chance.randrange(1, 255)}", chance.randrange(1, 65535))
        hub.receive(chance.choice([allocation.side_a.port, allocation.side_b.port]), source, bytes(data))
    assert hub.take() == []
    assert snapshot(hub.server) == before


def test_a_captured_bind_replayed_from_elsewhere_neither_moves_the_binding_nor_is_answered():
    hub = Hub()
    _, alice, _ = bound_pair(hub, **KNOWN)
    before = snapshot(hub.server)
    for request in alice.requests:
        hub.receive(alice.ticket.port, STRANGER_AT, request)
        hub.receive(alice.ticket.port, Endpoint(ALICE_AT.host, 1), request)
    assert hub.take() == []
    assert snapshot(hub.server) == before


def test_a_captured_bind_does_not_undo_roaming():
    hub = Hub()
    _, alice, _ = bound_pair(hub, **KNOWN)
    old_request, old_source = alice.requests[-1], alice.seen_at
    alice.seen_at = Endpoint("192.0.2.200", 4500)
    alice.do(alice.client.rebind(hub.now))
    assert hub.bound[alice.ticket.port] == alice.seen_at
    hub.receive(alice.ticket.port, old_source, old_request)
    assert hub.bound[alice.ticket.port] == alice.seen_at
    assert hub.take() == []


def test_a_bind_that_was_suppressed_and_comes_from_elsewhere_gets_a_challenge_no_longer_than_itself():
    hub = Hub()
    allocation = hub.allocate(**KNOWN)
    data = build_request(allocation.side_a, transaction_id(5, b"abcd"), b"")
    hub.receive(allocation.side_a.port, STRANGER_AT, data)
    [(port, to, answer)] = hub.take()
    assert (port, to) == (allocation.side_a.port, STRANGER_AT)
    assert len(answer) <= len(data)
    assert stun.parse_untrusted(answer).error_code == 401
    assert hub.bound == {}


def test_challenges_to_one_address_are_rationed():
    hub = Hub(RelayLimits(challenges_per_second=5, challenge_burst=20))
    allocation = hub.allocate()
    for counter in range(1, 1001):
        data = build_request(allocation.side_a, transaction_id(counter, b"abcd"), b"")
        hub.receive(allocation.side_a.port, Endpoint(STRANGER_AT.host, counter), data)
    assert len(hub.take()) == 20
    hub.now += 1
    hub.receive(allocation.side_a.port, STRANGER_AT, data)
    assert len(hub.take()) == 1


def challenge_nonce(hub, allocation, source):
    hub.receive(allocation.side_a.port, source, build_request(allocation.side_a, transaction_id(1, b"abcd"), b""))
    [(_, _, answer)] = hub.take()
    return stun.parse_untrusted(answer).attributes["NONCE"]


@pytest.mark.parametrize(
    ("source", "wait_s", "bound"),
    [(ALICE_AT, 0, True), (ALICE_AT, 29, True), (ALICE_AT, 61, False), (STRANGER_AT, 0, False)],
    ids=["at once", "soon", "too late", "from another address"],
)
def test_a_nonce_is_good_for_one_source_and_a_short_time(source, wait_s, bound):
    hub = Hub()
    allocation = hub.allocate()
    nonce = challenge_nonce(hub, allocation, ALICE_AT)
    hub.now += wait_s
    hub.receive(allocation.side_a.port, source, build_request(allocation.side_a, transaction_id(2, b"abcd"), nonce))
    assert (hub.bound == {allocation.side_a.port: source}) is bound


def test_a_nonce_of_one_allocation_is_worthless_in_another():
    hub = Hub()
    one, two = hub.allocate(), hub.allocate()
    nonce = challenge_nonce(hub, one, ALICE_AT)
    hub.receive(two.side_a.port, ALICE_AT, build_request(two.side_a, transaction_id(2, b"abcd"), nonce))
    assert hub.bound == {}


def test_what_the_first_side_sends_is_kept_and_comes_first_and_in_order():
    hub = Hub()
    allocation = hub.allocate(**KNOWN)
    alice, bob = Peer(hub, allocation.side_a, ALICE_AT), Peer(hub, allocation.side_b, BOB_AT)
    alice.bind()
    for number in range(3):
        hub.receive(allocation.side_a.port, ALICE_AT, b"packet %d" % number)
    assert hub.take() == []
    bob.bind()
    hub.receive(allocation.side_a.port, ALICE_AT, b"packet 3")
    assert [data for _, to, data in hub.take() if to == BOB_AT] == [b"packet %d" % number for number in range(4)]


def test_packets_that_the_forwarder_handed_up_while_the_twin_bound_still_arrive():
    hub = Hub()
    allocation, _, _ = bound_pair(hub, **KNOWN)
    hub.do(hub.server.handle(allocation.side_a.port, ALICE_AT, b"in between", hub.now))
    assert hub.take() == [(allocation.side_b.port, BOB_AT, b"in between")]


@pytest.mark.parametrize(("size", "kept"), [(10, 8), (1500, 8), (5000, 2)])
def test_the_queue_is_bounded_in_datagrams_and_in_bytes(size, kept):
    hub = Hub(RelayLimits(queued_datagrams=8, queued_bytes=12_000))
    allocation = hub.allocate(**KNOWN)
    Peer(hub, allocation.side_a, ALICE_AT).bind()
    for _ in range(20):
        hub.receive(allocation.side_a.port, ALICE_AT, bytes(size))
    Peer(hub, allocation.side_b, BOB_AT).bind()
    assert [len(data) for _, _, data in hub.take()] == [size] * kept


def test_bytes_of_an_unbound_source_are_neither_kept_nor_sent():
    hub = Hub()
    allocation = hub.allocate(**KNOWN)
    hub.receive(allocation.side_a.port, ALICE_AT, b"not bound yet")
    Peer(hub, allocation.side_a, ALICE_AT).bind()
    Peer(hub, allocation.side_b, BOB_AT).bind()
    hub.receive(allocation.side_a.port, STRANGER_AT, b"me too")
    assert hub.take() == []


def test_roaming_replaces_the_binding_and_the_old_address_passes_no_more():
    hub = Hub()
    allocation, alice, _ = bound_pair(hub, **KNOWN)
    alice.seen_at = Endpoint("192.0.2.200", 999)
    alice.do(alice.client.rebind(hub.now))
    hub.receive(allocation.side_a.port, ALICE_AT, b"old")
    hub.receive(allocation.side_a.port, alice.seen_at, b"new")
    hub.receive(allocation.side_b.port, BOB_AT, b"back")
    assert hub.take() == [(allocation.side_b.port, BOB_AT, b"new"), (allocation.side_a.port, alice.seen_at, b"back")]
    assert isinstance(hub.events[-1], RelayBound)
    assert hub.events[-1].source == alice.seen_at


def test_the_tunnel_address_follows_the_tunnel():
    hub = Hub()
    allocation = hub.allocate(**KNOWN)
    hub.server.owner_at(ALICE, Endpoint("192.0.2.200", 0).ip)
    alice = Peer(hub, allocation.side_a, Endpoint("192.0.2.200", 5))
    alice.bind()
    assert len(alice.requests) == 1


# --- ends


def end_of(hub):
    hub.do(hub.server.tick(hub.now))
    return [(event.owner_a, event.owner_b, event.reason) for event in hub.events if isinstance(event, RelayExpired)]


def test_an_allocation_that_one_side_never_binds_ends():
    hub = Hub()
    allocation = hub.allocate(**KNOWN)
    Peer(hub, allocation.side_a, ALICE_AT).bind()
    hub.now += 59.9
    assert end_of(hub) == []
    hub.now += 0.1
    assert end_of(hub) == [(ALICE, BOB, Expiry.UNBOUND)]
    assert hub.closed == [allocation.side_a.port]
    assert hub.server.next_deadline() is None


def test_an_allocation_without_packets_and_binds_ends():
    hub = Hub()
    bound_pair(hub, **KNOWN)
    hub.now += 180
    assert end_of(hub) == [(ALICE, BOB, Expiry.IDLE)]


def test_packets_keep_an_allocation():
    hub = Hub()
    allocation, _, _ = bound_pair(hub, **KNOWN)
    for _ in range(9):
        hub.now += 50
        hub.do(hub.server.forwarded(allocation.side_b.port, hub.now, 100))
        assert end_of(hub) == []


def test_refreshes_keep_an_allocation():
    hub = Hub()
    _, alice, bob = bound_pair(hub, **KNOWN)
    for _ in range(200):
        hub.now += 20
        for peer in (alice, bob):
            peer.do(peer.client.tick(hub.now))
        assert end_of(hub) == []


def test_a_side_that_left_ends_the_allocation_though_the_other_still_sends():
    hub = Hub()
    allocation, alice, _ = bound_pair(hub, **KNOWN)
    for _ in range(29):
        hub.now += 20
        alice.do(alice.client.tick(hub.now))
        hub.do(hub.server.forwarded(allocation.side_a.port, hub.now, 100))
        assert end_of(hub) == []
    hub.now += 20
    hub.do(hub.server.forwarded(allocation.side_a.port, hub.now, 100))
    assert end_of(hub) == [(ALICE, BOB, Expiry.ABANDONED)]


def test_a_released_allocation_is_gone_and_its_room_is_free():
    hub = Hub(RelayLimits(allocations=1))
    allocation = hub.allocate()
    hub.do(hub.server.release(allocation.id, hub.now))
    assert hub.closed == [allocation.side_a.port]
    assert hub.server.release(allocation.id, hub.now) == []
    assert hub.server.may_allocate(ALICE, hub.now)
    hub.now += 100
    assert end_of(hub) == [(ALICE, BOB, Expiry.RELEASED)]


def test_releasing_a_peer_ends_what_it_takes_part_in_on_either_side():
    hub = Hub()
    hub.allocate()
    hub.allocate(owner_a=BOB, owner_b=ALICE)
    hub.allocate(owner_a=BOB, owner_b=MALLORY)
    hub.do(hub.server.release_owner(ALICE, hub.now))
    assert len(hub.server) == 1


# --- quotas


def refusal(hub, **owners):
    with pytest.raises(RelayRefused) as refused:
        hub.allocate(**owners)
    assert not hub.server.may_allocate(owners.get("owner_a", ALICE), hub.now)
    return refused.value.reason


def test_a_full_relay_refuses_everybody():
    hub = Hub(RelayLimits(allocations=2))
    hub.allocate()
    hub.allocate(owner_a=BOB)
    assert refusal(hub, owner_a=MALLORY) is Refusal.FULL


def test_a_peer_has_only_its_share_of_pairs_and_others_are_not_hurt():
    hub = Hub(RelayLimits(allocations_per_peer=3))
    for _ in range(3):
        hub.allocate()
    assert refusal(hub) is Refusal.PEER_FULL
    hub.allocate(owner_a=BOB)


def test_being_called_costs_nothing():
    hub = Hub(RelayLimits(allocations_per_peer=1))
    for _ in range(5):
        hub.next_port += 2
        hub.allocate(owner_a=type(ALICE)(bytes([hub.next_port % 251]) * 20), owner_b=BOB)
    assert hub.server.may_allocate(BOB, hub.now)


def test_a_peer_that_asks_too_fast_waits():
    hub = Hub(RelayLimits(allocation_burst=4, allocations_per_minute=60))
    for _ in range(4):
        hub.allocate()
    assert refusal(hub) is Refusal.RATE
    hub.now += 1
    hub.allocate()


def test_a_peer_that_relays_more_than_its_share_loses_the_pair_and_gets_none_until_the_share_is_back():
    hub = Hub(RelayLimits(bytes_per_second=1000, byte_burst=10_000))
    allocation = hub.allocate()
    assert hub.server.forwarded(allocation.side_a.port, hub.now, 9500) == []
    hub.do(hub.server.forwarded(allocation.side_b.port, hub.now, 10_001))
    assert end_of(hub) == [(ALICE, BOB, Expiry.BYTES)]
    assert refusal(hub) is Refusal.BYTES
    hub.now += 1
    hub.allocate()


def test_asking_does_not_count():
    hub = Hub(RelayLimits(allocation_burst=1))
    for _ in range(10):
        assert hub.server.may_allocate(ALICE, hub.now)
    hub.allocate()


def test_ports_are_never_shared_by_two_pairs():
    hub = Hub()
    allocation = hub.allocate()
    hub.next_port = allocation.side_a.port
    with pytest.raises(ValueError, match="not both free"):
        hub.allocate()


def test_a_thousand_pairs_end_at_their_own_time():
    hub = Hub(RelayLimits(allocations_per_peer=1000, allocation_burst=1000))
    for _ in range(1000):
        hub.allocate()
        hub.now += 0.01
    assert list(hub.server.ports()) == list(range(20000, 22000, 2))
    ended = 0
    while (at := hub.server.next_deadline()) is not None:
        hub.now = at
        ended = len(end_of(hub))
    assert ended == 1000


def test_answers_come_from_the_port_that_was_asked():
    hub = Hub()
    allocation = hub.allocate(**KNOWN)
    data = build_request(allocation.side_a, transaction_id(1, b"abcd"), b"")
    outputs = hub.receive(allocation.side_a.port, ALICE_AT, data)
    [answer] = [output for output in outputs if isinstance(output, Answer)]
    message = stun.parse_untrusted(answer.data)
    stun.verify(message, allocation.side_a.key.reveal())
    assert stun.mapped_address(message) == ALICE_AT
