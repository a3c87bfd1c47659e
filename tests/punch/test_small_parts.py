"""Credentials, limits, the mux, the reflector and the reflexive probe."""

from __future__ import annotations

import hashlib
from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pvpn.core import stun
from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.errors import LocalError
from p2pvpn.core.output import Transmit
from p2pvpn.core.secret import Secret
from p2pvpn.punch.behaviour import Mapping
from p2pvpn.punch.candidates import CandidateKind
from p2pvpn.punch.credentials import IceCredentials, derive
from p2pvpn.punch.limits import CHECKS_BURST, CHECKS_PER_S, SILENCE_S, SILENT_PACKETS, TA_S, PunchLimits
from p2pvpn.punch.reflector import REQUESTS_BURST, Reflector, reflect
from p2pvpn.punch.reflexive import RC, REFRESH_S, ReflexiveLearned, ReflexiveLost, ReflexiveProbe

from .fakenet import PORT, Host, Net, Peer, pair_up

HERE = Endpoint("192.0.2.1", PORT)
THERE = Endpoint("203.0.113.5", 5555)
HUBS = [Endpoint("198.51.100.1", 3478), Endpoint("198.51.100.2", 3478), Endpoint("198.51.100.3", 3478)]


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


class TestReflexiveProbe:
    def probe(self) -> ReflexiveProbe:
        numbers = iter(range(1, 10**6))
        return ReflexiveProbe(PORT, lambda count: next(numbers).to_bytes(count, "big"))

    def answer(self, probe: ReflexiveProbe, sent: Transmit, seen: Endpoint, now: float, local: Endpoint = HERE) -> list:
        data = stun.build(stun.success(sent.data[8:20], seen))
        return probe.handle(Path(local, sent.path.remote), data, now)

    def test_what_a_hub_sees_is_learned_and_said_once(self) -> None:
        probe = self.probe()
        first, second = probe.update(HUBS[:2], 1.0)
        assert first.path == Path(Endpoint("0.0.0.0", PORT), HUBS[0])
        assert self.answer(probe, first, THERE, 1.05) == [ReflexiveLearned(HERE, HUBS[0], THERE)]
        assert self.answer(probe, second, THERE, 1.06) == [ReflexiveLearned(HERE, HUBS[1], THERE)]
        (candidate,) = probe.candidates()
        assert (candidate.kind, candidate.endpoint, candidate.base) == (CandidateKind.REFLEXIVE, THERE, HERE)
        again = probe.refresh(5.0)
        assert self.answer(probe, again[0], THERE, 5.1) == []
        elsewhere = Endpoint("203.0.113.5", 6666)
        assert self.answer(probe, again[1], elsewhere, 5.1) == [ReflexiveLearned(HERE, HUBS[1], elsewhere)]
        assert probe.seen_by() == {HUBS[0]: THERE, HUBS[1]: elsewhere}

    def test_requests_are_repeated_and_a_silent_hub_is_given_up_and_asked_again(self) -> None:
        probe = self.probe()
        (sent,) = probe.update(HUBS[:1], 0.0)
        self.answer(probe, sent, THERE, 0.1)
        probe.refresh(10.0)
        times = [10.0]
        lost = None
        while lost is None:
            now = probe.next_deadline()
            for output in probe.tick(now):
                if isinstance(output, ReflexiveLost):
                    lost = (now, output)
                else:
                    times.append(now)
        assert times == pytest.approx([10.0, 10.5, 11.5, 13.5, 17.5])
        assert len(times) == RC
        assert lost == (pytest.approx(19.5), ReflexiveLost(HUBS[0], THERE))
        assert probe.candidates() == []
        assert 19.5 + 0.9 * REFRESH_S <= probe.next_deadline() <= 19.5 + 1.1 * REFRESH_S
        assert len(probe.tick(probe.next_deadline())) == 1

    def test_it_keeps_the_mapping_open(self) -> None:
        probe = self.probe()
        (sent,) = probe.update(HUBS[:1], 0.0)
        self.answer(probe, sent, THERE, 0.1)
        assert 0.9 * REFRESH_S <= probe.next_deadline() - 0.1 <= 1.1 * REFRESH_S
        (again,) = probe.tick(probe.next_deadline())
        assert again.data[8:20] != sent.data[8:20]

    def test_only_the_hub_that_was_asked_is_believed(self) -> None:
        probe = self.probe()
        (sent,) = probe.update(HUBS[:1], 0.0)
        good = stun.build(stun.success(sent.data[8:20], THERE))
        assert probe.handle(Path(HERE, HUBS[1]), good, 0.1) is None
        assert probe.handle(Path(HERE, HUBS[0]), stun.build(stun.success(b"x" * 12, THERE)), 0.1) is None
        assert probe.handle(Path(HERE, HUBS[0]), b"not STUN at all, is it?", 0.1) is None
        assert probe.handle(Path(HERE, HUBS[0]), sent.data, 0.1) is None
        assert probe.handle(Path(HERE, HUBS[0]), stun.build(stun.error(sent.data[8:20], 400, "no")), 0.1) == []
        for lie in (Endpoint("127.0.0.1", 1), Endpoint("224.0.0.1", 1), Endpoint("203.0.113.1", 0), Endpoint("::5", 5)):
            assert self.answer(probe, sent, lie, 0.1) == []
        assert probe.seen_by() == {}
        assert self.answer(probe, sent, THERE, 0.1) != []
        assert probe.handle(Path(HERE, HUBS[0]), good, 0.2) is None

    def test_hubs_that_left_are_forgotten(self) -> None:
        probe = self.probe()
        (sent,) = probe.update(HUBS[:1], 0.0)
        self.answer(probe, sent, THERE, 0.1)
        assert len(probe.update(HUBS, 1.0)) == 2
        assert probe.seen_by() == {HUBS[0]: THERE}
        assert probe.update(HUBS[1:], 1.0) == []
        assert probe.seen_by() == {}

    @pytest.mark.parametrize(
        ("seen", "mapping"),
        [
            ([], Mapping.UNKNOWN),
            ([THERE], Mapping.UNKNOWN),
            ([HERE, HERE], Mapping.NONE),
            ([THERE, THERE, THERE], Mapping.ENDPOINT_INDEPENDENT),
            ([THERE, THERE, Endpoint("203.0.113.5", 5556)], Mapping.ENDPOINT_DEPENDENT),
            ([THERE, Endpoint("203.0.113.6", 5555)], Mapping.ENDPOINT_DEPENDENT),
        ],
    )
    def test_two_hubs_tell_how_our_nat_maps(self, seen: list[Endpoint], mapping: Mapping) -> None:
        probe = self.probe()
        for sent, endpoint in zip(probe.update(HUBS, 0.0), seen, strict=False):
            self.answer(probe, sent, endpoint, 0.1)
        assert probe.mapping() is mapping
        assert probe.mapping(ipv6=True) is Mapping.UNKNOWN

    def test_two_ports_of_one_hub_prove_dependence_but_not_independence(self) -> None:
        probe = self.probe()
        first, second = probe.update([HUBS[0], Endpoint(HUBS[0].host, 4500)], 0.0)
        self.answer(probe, first, THERE, 0.1)
        self.answer(probe, second, THERE, 0.1)
        assert probe.mapping() is Mapping.UNKNOWN
        first, second = probe.refresh(1.0)
        self.answer(probe, second, Endpoint("203.0.113.5", 5556), 1.1)
        assert probe.mapping() is Mapping.ENDPOINT_DEPENDENT

    def test_two_local_addresses_are_two_mappings(self) -> None:
        probe = self.probe()
        first, second = probe.update(HUBS[:2], 0.0)
        self.answer(probe, first, THERE, 0.1)
        self.answer(probe, second, Endpoint("203.0.113.99", 5), 0.1, local=Endpoint("192.0.2.77", PORT))
        assert probe.mapping() is Mapping.UNKNOWN
        assert len(probe.candidates()) == 2
