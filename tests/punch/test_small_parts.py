"""Credentials, limits, the mux and the reflector."""

from __future__ import annotations

import hashlib
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pvpn.core import stun
from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.errors import LocalError, TrustError
from p2pvpn.core.secret import Secret
from p2pvpn.punch.credentials import IceCredentials, derive
from p2pvpn.punch.limits import CHECKS_BURST, CHECKS_PER_S, SILENCE_S, SILENT_PACKETS, TA_S, PunchLimits
from p2pvpn.punch.proof import NO_PROOF, PROOF_BYTES, SLOT_S, Proofs
from p2pvpn.punch.reflector import REQUESTS_BURST, Reflector, reflect

from .fakenet import PORT, Host, Net, Peer, pair_up

HERE = Endpoint("192.0.2.1", PORT)
THERE = Endpoint("203.0.113.5", 5555)


def exporter(label: bytes, length: int) -> Secret:
    return Secret(hashlib.shake_256(label).digest(length))


class TestCredentials:
    def test_both_sides_derive_the_same(self) -> None:
        ours, theirs = derive(exporter, True), derive(exporter, False)
        assert (ours.local_ufrag, ours.local_password) == (theirs.remote_ufrag, theirs.remote_password)
        assert (ours.remote_ufrag, ours.remote_password) == (theirs.local_ufrag, theirs.local_password)
        assert ours.username_out == theirs.username_in
        assert ours.local_ufrag != ours.remote_ufrag
        assert len(ours.local_ufrag) == 8
        assert len(ours.local_password) == 24

    def test_passwords_do_not_print(self) -> None:
        ours = derive(exporter, True)
        assert ours.local_password.reveal().decode() not in repr(ours)

    @pytest.mark.parametrize(("ufrag", "password"), [("short", "p" * 22), ("u" * 8, "p" * 21), ("with:two", "p" * 22)])
    def test_weak_or_misspelt_ones_are_refused(self, ufrag: str, password: str) -> None:
        with pytest.raises(LocalError):
            IceCredentials(ufrag, Secret(password.encode()), "u" * 8, Secret(b"p" * 22))


class TestLimits:
    def test_slots_for_new_checks_are_apart(self) -> None:
        limits = PunchLimits()
        assert [limits.reserve_start(5.0) for _ in range(3)] == pytest.approx([5.0, 5.0 + TA_S, 5.0 + 2 * TA_S])
        assert limits.reserve_start(9.0) == 9.0

    def test_packets_to_unproven_addresses_have_a_rate(self) -> None:
        limits = PunchLimits()
        sent = sum(limits.take_rate(1.0 + step / 1000) for step in range(1000))
        assert CHECKS_PER_S <= sent <= CHECKS_PER_S + CHECKS_BURST

    def test_a_silent_address_gets_twenty_packets_whatever_the_port_and_new_ones_later(self) -> None:
        limits = PunchLimits()
        taken = [limits.take_silent(Endpoint("203.0.113.5", port), 1.0, permitted=True) for port in range(1, 41)]
        assert sum(taken) == SILENT_PACKETS
        assert not limits.take_silent(THERE, 1.0 + SILENCE_S - 1, permitted=True)
        assert limits.take_silent(THERE, 1.0 + SILENCE_S, permitted=True)

    def test_an_attested_session_has_a_count_of_its_own_at_an_address_that_others_found_silent(self) -> None:
        limits = PunchLimits()
        for _ in range(SILENT_PACKETS):
            limits.take_silent(THERE, 1.0, permitted=True)
        assert not limits.take_silent(THERE, 1.0, permitted=True)
        taken = [limits.take_silent(THERE, 1.0, permitted=True, session=b"peer") for _ in range(40)]
        assert sum(taken) == SILENT_PACKETS
        limits.answered(THERE, session=b"peer")
        assert limits.take_silent(THERE, 1.0, permitted=True, session=b"peer")
        assert limits.take_silent(THERE, 1.0, permitted=True)

    def test_an_answer_ends_the_count_and_a_check_earns_one_packet(self) -> None:
        limits = PunchLimits()
        for _ in range(SILENT_PACKETS):
            limits.take_silent(THERE, 1.0, permitted=True)
        limits.earn(THERE, 1.0)
        assert limits.take_silent(THERE, 1.0, permitted=True)
        assert not limits.take_silent(THERE, 1.0, permitted=True)
        limits.answered(THERE)
        assert limits.take_silent(THERE, 1.0, permitted=True)

    def test_who_is_not_permitted_gets_what_it_earned(self) -> None:
        limits = PunchLimits()
        assert not limits.take_silent(THERE, 1.0, permitted=False)
        limits.earn(THERE, 1.0)
        assert limits.take_silent(THERE, 1.0, permitted=False)
        assert not limits.take_silent(THERE, 1.0, permitted=False)

    @pytest.mark.parametrize("host", ["10.1.2.3", "172.31.0.1", "192.168.9.9", "100.100.1.1", "169.254.1.1", "fd12::1"])
    def test_private_targets_need_a_common_site_or_our_own_subnet(self, host: str) -> None:
        target = Endpoint(host, PORT)
        assert not PunchLimits().permits(target, same_site=False)
        assert PunchLimits().permits(target, same_site=True)
        subnet = ip_network(host + ("/64" if ":" in host else "/24"), strict=False)
        limits = PunchLimits([subnet])
        assert limits.permits(target, same_site=False)
        limits.update_subnets([])
        assert not limits.permits(target, same_site=False)

    @pytest.mark.parametrize("host", ["192.0.2.9", "2001:db8::9"])
    def test_public_targets_are_permitted(self, host: str) -> None:
        assert PunchLimits().permits(Endpoint(host, PORT), same_site=False)

    @pytest.mark.parametrize("host", ["127.0.0.1", "224.0.0.9", "fe80::1", "::1", "255.255.255.255"])
    def test_others_are_refused_even_at_a_common_site(self, host: str) -> None:
        assert not PunchLimits().permits(Endpoint(host, PORT), same_site=True)
        assert PunchLimits().refuses(Endpoint(host, PORT))


class TestMux:
    def test_sessions_share_a_socket_and_get_what_is_theirs(self) -> None:
        net = Net()
        a = Host(net, "192.0.2.1")
        others = [Host(net, f"198.51.100.{i}") for i in range(1, 9)]
        sessions = [pair_up(a, other, key=bytes([i])) for i, other in enumerate(others)]
        assert net.run_until(lambda: all(one.selected and two.selected for one, two in sessions), 3.0)
        for (one, two), other in zip(sessions, others, strict=True):
            assert one.selected.remote.host == other.addresses[0]
            assert two.selected.remote.host == "192.0.2.1"

    def test_a_username_fragment_names_one_session(self) -> None:
        a = Host(Net(), "192.0.2.1")
        peer = Peer(a, initiator=True)
        with pytest.raises(LocalError):
            Peer(a, initiator=True)
        a.mux.unregister(peer.agent)
        a.mux.unregister(peer.agent)
        assert len(a.mux) == 0
        Peer(a, initiator=True)

    def test_equal_tags_are_drawn_again(self) -> None:
        net = Net()
        a = Host(net, "192.0.2.1")
        tags = iter([b"sametg", b"sametg", b"other1"])
        net.entropy = lambda count: next(tags)  # type: ignore[method-assign]
        one, two = Peer(a, initiator=True, key=b"1"), Peer(a, initiator=True, key=b"2")
        assert (one.agent.tag, two.agent.tag) == (b"sametg", b"other1")

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\xff",
            bytes(40),
            b"\xc0" * 40,
            stun.build(stun.request(b"x" * 12)),
            stun.build(stun.request(b"x" * 12, username="some:body")),
            stun.build(stun.success(b"x" * 12, HERE)),
        ],
    )
    def test_what_is_for_no_agent_is_left_to_others(self, data: bytes) -> None:
        a = Host(Net(), "192.0.2.1")
        Peer(a, initiator=True)
        assert a.mux.route(Path(HERE, THERE), data, 1.0) is None


class TestReflector:
    path = Path(Endpoint("198.51.100.1", 3478), THERE)

    def test_a_plain_request_is_told_where_it_came_from(self) -> None:
        answer = stun.parse_untrusted(reflect(self.path, stun.build(stun.request(b"x" * 12))))
        assert stun.mapped_address(answer) == THERE
        assert answer.transaction_id == b"x" * 12
        assert "FINGERPRINT" in answer.attributes

    @pytest.mark.parametrize("source", [THERE, Endpoint("2001:db8::5", 5555)])
    def test_an_answer_is_less_than_one_and_a_half_times_the_packet_that_asked(self, source: Endpoint) -> None:
        headers = 48 if source.is_ipv6 else 28
        request = bytes(stun.request(b"x" * 12))
        assert len(request) == 20
        answer = reflect(Path(self.path.local, source), request)
        assert len(answer) + headers <= 1.5 * (len(request) + headers)

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            stun.build(stun.success(b"x" * 12, HERE)),
            stun.build(stun.indication(b"x" * 12)),
            stun.build(stun.error(b"x" * 12, 400, "no")),
            stun.build(stun.request(b"x" * 12, username="a:b")),
            stun.build(stun.request(b"x" * 12, change_request=6)),
            stun.build(stun.request(b"x" * 12), b"key"),
            stun.build(stun.request(b"x" * 12, software="x" * 600)),
        ],
    )
    def test_nothing_else_is_answered(self, data: bytes) -> None:
        assert reflect(self.path, data) is None

    @given(st.binary(max_size=80))
    def test_any_bytes_do_no_harm(self, data: bytes) -> None:
        assert reflect(self.path, data) is None or len(data) >= 20

    def test_a_source_has_a_rate(self) -> None:
        reflector = Reflector()
        request = stun.build(stun.request(b"x" * 12))
        answers = [reflector.handle(self.path, request, 1.0) for _ in range(200)]
        assert sum(answer is not None for answer in answers) == REQUESTS_BURST
        assert reflector.handle(Path(self.path.local, HERE), request, 1.0) is not None
        assert reflector.handle(self.path, request, 3.0) is not None
        assert reflector.handle(Path(self.path.local, Endpoint("203.0.113.9", 0)), request, 3.0) is None


class TestProofs:
    path = Path(Endpoint("198.51.100.1", 3478), THERE)

    def test_who_asks_for_a_proof_gets_one_and_is_told_no_more_than_it_asked_with(self) -> None:
        proofs = Proofs(b"k" * 32)
        request = stun.build(stun.request(b"x" * 12, nonce=NO_PROOF))
        answer = reflect(self.path, request, proofs, 5.0)
        proof = stun.parse_untrusted(answer).attributes["NONCE"]
        assert len(proof) == PROOF_BYTES
        proofs.check(proof, THERE, 5.0)
        assert len(answer) + 28 < 1.5 * (len(request) + 28)
        plain = stun.build(stun.request(b"x" * 12))
        assert "NONCE" not in stun.parse_untrusted(reflect(self.path, plain, proofs, 5.0)).attributes

    def test_a_proof_is_for_one_address_one_hub_and_a_while(self) -> None:
        proofs = Proofs(b"k" * 32)
        proof = proofs.make(THERE, 5.0)
        proofs.check(proof, THERE, 5.0 + SLOT_S)
        for other, endpoint, now in (
            (proofs, HERE, 5.0),
            (proofs, Endpoint(THERE.host, THERE.port + 1), 5.0),
            (proofs, THERE, 5.0 + 2 * SLOT_S),
            (Proofs(b"j" * 32), THERE, 5.0),
        ):
            with pytest.raises(TrustError):
                other.check(proof, endpoint, now)

    @given(st.binary(max_size=32))
    def test_made_up_proofs_do_not_hold(self, proof: bytes) -> None:
        with pytest.raises(TrustError):
            Proofs(b"k" * 32).check(proof, THERE, 5.0)
