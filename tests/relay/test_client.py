"""The peer's side of the relay: patience, refreshes, roaming, and answers that are not the relay's."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pvpn.core import stun
from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.output import Transmit
from p2pvpn.relay.binding import NONCE_BYTES, build_challenge, parse_request_untrusted
from p2pvpn.relay.client import Loss, RelayClients, RelayLost, RelayReady

from .world import ALICE, ALICE_AT, BOB_AT, HUB, LOCAL, Hub, Peer, entropy_of


def peer_of(hub: Hub, known: str | None = ALICE_AT.host) -> Peer:
    return Peer(hub, hub.allocate(known_a=known).side_a, ALICE_AT)


def way_to(port: int) -> Path:
    return Path(LOCAL, Endpoint(HUB, port))


def relay_path(peer: Peer) -> Path:
    return way_to(peer.ticket.port)


def test_readiness_tells_the_path_the_mapped_address_and_the_round_trip():
    hub = Hub()
    peer = peer_of(hub)
    [request] = peer.client.bind(hub.now)
    hub.now += 0.03
    peer.do([request])
    [ready] = peer.events
    assert (ready.path, ready.mapped) == (relay_path(peer), ALICE_AT)
    assert ready.rtt_s == pytest.approx(0.03)


def run_until(peer: Peer, until: float, *, deaf: bool) -> list[float]:
    """Let the client's timers run; returns the instants at which it sent."""
    sent = []
    while (at := peer.client.next_deadline()) is not None and at <= until:
        peer.hub.now = at
        outputs = peer.client.tick(at)
        sent += [at for output in outputs if isinstance(output, Transmit)]
        peer.do(outputs, lose=10 if deaf else 0)
    return sent


def test_a_silent_relay_is_asked_quickly_then_slowly_then_given_up():
    hub = Hub()
    peer = peer_of(hub)
    start = hub.now
    peer.do(peer.client.bind(start), lose=1)
    sent = run_until(peer, start + 100, deaf=True)
    assert [round(at - start, 3) for at in sent] == [0.05, 0.15, 0.35, 0.75, 1.55, 3.15, 4.75]
    assert peer.events == [RelayLost(relay_path(peer), Loss.SILENT)]
    assert hub.now - start == pytest.approx(6.35)
    assert not peer.client.is_ready
    assert peer.client.next_deadline() is None
    peer.bind()
    assert peer.client.is_ready


def test_losing_requests_costs_only_a_retransmission():
    hub = Hub()
    peer = peer_of(hub)
    start = hub.now
    peer.do(peer.client.bind(start), lose=1)
    run_until(peer, start + 1, deaf=False)
    assert peer.client.is_ready
    assert len(peer.requests) == 2


def test_a_retransmission_binds_even_if_the_nat_changed_in_between():
    hub = Hub()
    peer = peer_of(hub)
    [request] = peer.client.bind(hub.now)
    hub.receive(peer.ticket.port, Endpoint(ALICE_AT.host, 1111), request.data)
    hub.take()
    peer.seen_at = Endpoint(ALICE_AT.host, 2222)
    run_until(peer, hub.now + 0.05, deaf=False)
    assert hub.bound[peer.ticket.port] == peer.seen_at
    assert peer.client.mapped == peer.seen_at


def test_a_binding_is_refreshed_every_twenty_seconds_without_news():
    hub = Hub()
    peer = peer_of(hub)
    peer.bind()
    start = hub.now
    assert run_until(peer, start + 65, deaf=False) == [start + 20, start + 40, start + 60]
    assert len(peer.events) == 1


def test_a_refresh_tells_news_when_the_nat_gave_another_mapping():
    hub = Hub()
    peer = peer_of(hub)
    peer.bind()
    peer.seen_at = Endpoint(ALICE_AT.host, 7)
    run_until(peer, hub.now + 20, deaf=False)
    assert [event.mapped for event in peer.events] == [ALICE_AT, peer.seen_at]
    assert hub.bound[peer.ticket.port] == peer.seen_at


def test_a_path_stays_usable_while_a_refresh_is_under_way_and_is_lost_when_nobody_answers():
    hub = Hub()
    peer = peer_of(hub)
    peer.bind()
    run_until(peer, hub.now + 20, deaf=True)
    assert peer.client.is_ready
    run_until(peer, hub.now + 10, deaf=True)
    assert isinstance(peer.events[-1], RelayLost)


def test_a_slow_relay_is_not_asked_twice_per_refresh():
    hub = Hub()
    peer = peer_of(hub)
    [request] = peer.client.bind(hub.now)
    hub.now += 0.6
    peer.do([request])
    start = hub.now
    hub.now += 20
    peer.client.tick(hub.now)
    assert peer.client.next_deadline() == pytest.approx(start + 20 + 0.9)


def test_after_a_network_change_the_relay_hears_of_it_at_once():
    hub = Hub()
    peer = peer_of(hub)
    peer.bind()
    peer.seen_at = BOB_AT
    peer.do(peer.client.rebind(hub.now))
    assert [event.mapped for event in peer.events] == [ALICE_AT, BOB_AT]
    assert hub.bound[peer.ticket.port] == BOB_AT


def test_a_relay_that_forgot_the_ticket_is_silent_and_so_lost():
    hub = Hub()
    peer = peer_of(hub)
    peer.bind()
    hub.do(hub.server.release_owner(ALICE, hub.now))
    run_until(peer, hub.now + 60, deaf=False)
    assert peer.events[-1] == RelayLost(relay_path(peer), Loss.SILENT)


def answer_to(request: Transmit, build, key: bytes) -> bytes:
    return build(parse_request_untrusted(request.data), key)


def test_answers_that_are_not_signed_with_the_ticket_change_nothing():
    hub = Hub()
    peer = peer_of(hub)
    [request] = peer.client.bind(hub.now)
    transaction = request.data[8:20]
    forged = [
        stun.build(stun.success(transaction, BOB_AT), b"another key"),
        stun.build(stun.success(transaction, BOB_AT)),
        stun.build(stun.error(transaction, 403, "go away"), b"another key"),
        stun.build(stun.error(transaction, 401, "", nonce=b"n" * NONCE_BYTES)),
    ]
    for data in forged:
        assert peer.client.handle(request.path, data, hub.now) == []
    assert not peer.client.is_ready
    peer.do([request])
    assert peer.client.is_ready


def test_a_signed_refusal_ends_the_attempt():
    hub = Hub()
    peer = peer_of(hub)
    [request] = peer.client.bind(hub.now)
    refusal = stun.build(stun.error(request.data[8:20], 403, "forbidden"), peer.ticket.key.reveal())
    assert peer.client.handle(request.path, refusal, hub.now) == [RelayLost(request.path, Loss.REFUSED)]


def test_a_relay_that_challenges_for_ever_is_given_up():
    hub = Hub()
    peer = peer_of(hub)
    [output] = peer.client.bind(hub.now)
    key = peer.ticket.key.reveal()
    rounds = 0
    while isinstance(output, Transmit):
        rounds += 1
        nonce = b"%024d" % rounds
        data = answer_to(output, lambda request, key, nonce=nonce: build_challenge(request, key, nonce), key)
        [output] = peer.client.handle(output.path, data, hub.now)
    assert rounds == 4
    assert output.reason is Loss.REFUSED


def test_a_challenge_that_comes_twice_is_answered_once():
    hub = Hub()
    peer = peer_of(hub, known=None)
    first = peer.client.bind(hub.now)
    second = peer.client.tick(hub.now + 0.05)
    for [request] in (first, second):
        hub.receive(peer.ticket.port, ALICE_AT, request.data)
    answers = [peer.client.handle(relay_path(peer), data, hub.now) for _, _, data in hub.take()]
    assert [len(outputs) for outputs in answers] == [1, 0]


def test_clients_are_told_apart_by_relay_and_other_stun_is_left_alone():
    hub = Hub()
    one, two = hub.allocate(known_a=ALICE_AT.host), hub.allocate(known_a=ALICE_AT.host)
    clients = RelayClients(entropy_of(4))
    requests = clients.open(one.side_a, way_to(one.side_a.port), hub.now)
    requests += clients.open(two.side_a, way_to(two.side_a.port), hub.now)
    assert len(clients) == 2
    for request in requests:
        hub.receive(request.path.remote.port, ALICE_AT, request.data)
    ready = []
    for port, _, data in hub.take():
        path = Path(LOCAL, Endpoint(HUB, port))
        assert clients.route(Path(LOCAL, BOB_AT), data, hub.now) is None
        ready += clients.route(path, data, hub.now)
        assert clients.route(path, data, hub.now) == []
    assert [type(event) for event in ready] == [RelayReady, RelayReady]
    check = stun.build(stun.request(b"twelve bytes", username="a:b"), b"key")
    assert clients.route(requests[0].path, check, hub.now) is None
    assert clients.route(requests[0].path, b"\xc0\0\0\1 esp", hub.now) is None
    assert len(clients.network_changed(hub.now)) == 2
    assert clients.next_deadline() == hub.now + 0.05
    assert len(clients.tick(hub.now + 0.05)) == 2
    clients.close(requests[0].path.remote)
    assert clients.at(requests[0].path.remote) is None
    assert len(clients) == 1


@settings(deadline=None)
@given(st.binary(max_size=120))
def test_nothing_that_a_relay_sends_raises(tail):
    hub = Hub()
    peer = peer_of(hub)
    [request] = peer.client.bind(hub.now)
    head = b"\1\1" + len(tail).to_bytes(2, "big") + bytes.fromhex("2112a442") + request.data[8:20]
    for data in (tail, head + tail, b"\1\x11" + (head + tail)[2:]):
        assert not peer.client.handle(request.path, data, hub.now)
    assert not peer.client.is_ready
