"""What strangers, liars and members with bad intentions can make an agent do."""

from __future__ import annotations

import itertools
from ipaddress import ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pvpn.core import stun
from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.errors import LocalError
from p2pvpn.core.output import Transmit
from p2pvpn.punch.agent import PunchAgent
from p2pvpn.punch.candidates import Candidate, CandidateKind
from p2pvpn.punch.events import PathLost
from p2pvpn.punch.limits import SILENT_PACKETS
from p2pvpn.punch.pair import TRANSITIONS, Pair, PairInput, PairState

from .fakenet import PORT, Host, Net, Peer, connected, pair_up

ATTACKER = Endpoint("203.0.113.66", 6666)
HERE = Endpoint("192.0.2.1", PORT)


def established() -> tuple[Net, Peer, Peer]:
    net = Net()
    one, two = pair_up(Host(net, "192.0.2.1"), Host(net, "198.51.100.1"))
    assert net.run_until(lambda: connected(one, two), 1.0)
    net.run(3.0)
    return net, one, two


def state(agent: PunchAgent) -> object:
    rows = [
        (row.path, row.state, row.selected, row.rtt_s, row.answers, row.mapped, row.last_check_in_at)
        for row in agent.report()
    ]
    return agent.controlling, agent.selected, rows


def of_class(net: Net, kind: stun.Class, dst: str) -> list[tuple[Endpoint, bytes]]:
    return [
        (src, data)
        for _, src, to, data in net.sent
        if to.host == dst and stun.parse_untrusted(data).message_class is kind
    ]


def test_fifty_sessions_together_send_twenty_packets_to_a_silent_address() -> None:
    net = Net()
    a = Host(net, "192.0.2.1")
    victim = [
        Candidate.remote(CandidateKind.HOST, Endpoint("203.0.113.9", 1000 + port)) for port in range(5)
    ]  # Other ports are no other address.
    for session in range(50):
        Peer(a, initiator=session % 2 == 0, key=bytes([session])).start(victim, a.hosts())
    net.run(599.0)
    assert 0 < len(net.packets_to("203.0.113.9")) <= SILENT_PACKETS


def test_a_changing_list_of_candidates_does_not_raise_the_budget_of_a_silent_address() -> None:
    net = Net()
    a = Host(net, "192.0.2.1")
    peer = Peer(a, initiator=True)
    peer.start([], a.hosts())
    for round_ in range(100):
        victim = Candidate.remote(CandidateKind.REFLEXIVE, Endpoint("203.0.113.9", 1000 + round_))
        a.take(peer.agent.update_remote([victim], net.now))
        net.run(1.0)
    assert len(net.packets_to("203.0.113.9")) <= SILENT_PACKETS


def test_private_candidates_elsewhere_are_not_checked() -> None:
    net = Net()
    a = Host(net, "192.0.2.1", subnets=["192.168.7.0/24"])
    net.public["192.168.7.9"] = net.public["10.1.1.1"] = net.public["192.168.1.1"] = Host(net)
    peer = Peer(a, initiator=True)
    named = ["192.168.1.1", "10.1.1.1", "100.64.0.9", "169.254.9.9", "172.20.0.1", "192.168.7.9"]
    peer.start([Candidate.remote(CandidateKind.HOST, Endpoint(host, PORT)) for host in named], a.hosts())
    net.run(10.0)
    assert {dst.host for _, _, dst, _ in net.sent} == {"192.168.7.9"}


@pytest.mark.parametrize("host", ["fd00::9", "fe80::9", "fdaa:bbbb::1"])
def test_private_ipv6_candidates_elsewhere_are_not_checked(host: str) -> None:
    net = Net()
    a = Host(net, "2001:db8::1")
    peer = Peer(a, initiator=True)
    peer.start([Candidate.remote(CandidateKind.HOST, Endpoint(host, PORT))], a.hosts())
    net.run(5.0)
    assert net.sent == []


def test_a_check_from_a_private_address_elsewhere_gets_as_much_as_it_sent() -> None:
    net = Net()
    a, b = Host(net, "192.0.2.1", subnets=["192.0.2.0/24"]), Host(net, "198.51.100.1")
    one, two = pair_up(a, b, start=False)
    b.take(two.agent.start(b.hosts(), [Candidate.remote(CandidateKind.HOST, HERE)], net.now))
    check = of_class(net, stun.Class.REQUEST, "192.0.2.1")[0][1]
    net.sent.clear()
    one.start([], a.hosts())
    a.arrive(Endpoint("10.9.9.9", PORT), HERE, check)
    net.run(30.0)
    assert len(net.packets_to("10.9.9.9")) == 2  # The answer and one check.


def test_requests_without_the_password_get_no_answer_and_change_nothing() -> None:
    net, one, _two = established()
    before = state(one.agent)
    credentials = one.agent.credentials
    plain = stun.request(b"x" * 12, username=credentials.username_in, priority=1, ice_controlled=1)
    forged = stun.request(b"x" * 12, username=credentials.username_in, priority=1, ice_controlling=2**64 - 1)
    wrong_user = stun.request(b"x" * 12, username=credentials.local_ufrag + ":else", priority=1)
    no_priority = stun.request(b"x" * 12, username=credentials.username_in)
    for message, key in (
        (plain, None),
        (forged, b"guess"),
        (wrong_user, credentials.local_password.reveal()),
        (no_priority, credentials.local_password.reveal()),
    ):
        data = stun.build(message, key)
        assert one.host.mux.route(Path(HERE, ATTACKER), data, net.now) == []
    assert state(one.agent) == before


def test_forged_answers_change_nothing() -> None:
    net, one, two = established()
    sent_before = len(net.sent)
    one.host.take(one.agent.verify(net.now))
    (check,) = [data for _, _, _, data in net.sent[sent_before:]]
    transaction = check[8:20]
    before = state(one.agent)
    path = one.selected
    for message, key in (
        (stun.success(transaction, ATTACKER), None),
        (stun.success(transaction, ATTACKER), b"guess"),
        (stun.error(transaction, 487, "Role Conflict"), None),
        (stun.error(transaction, 401, "Unauthenticated"), None),
        (stun.error(transaction, 400, "Bad Request"), b"guess"),
        (stun.success(one.agent.tag + b"unknow", ATTACKER), two.agent.credentials.local_password.reveal()),
    ):
        assert one.host.mux.route(path, stun.build(message, key), net.now) == []
    assert state(one.agent) == before
    net.run(3.0)
    assert not one.said(PathLost)


def test_own_packets_reflected_are_nobodys() -> None:
    net, one, _two = established()
    for _, src, _, data in list(net.sent):
        if src.host == "192.0.2.1":
            assert one.host.mux.route(one.selected, data, net.now) is None


def test_replayed_requests_are_answered_and_change_nothing() -> None:
    net, one, two = established()
    before = state(two.agent), state(one.agent)
    for peer, host in ((one, "192.0.2.1"), (two, "198.51.100.1")):
        for _, data in of_class(net, stun.Class.REQUEST, host):
            outputs = peer.host.mux.route(Path(Endpoint(host, PORT), ATTACKER), data, net.now)
            assert len(outputs) == 1
            assert isinstance(outputs[0], Transmit)
            assert outputs[0].path.remote == ATTACKER
    assert (state(two.agent), state(one.agent)) == before


def test_replayed_answers_change_nothing() -> None:
    net, one, _two = established()
    before = state(one.agent)
    for src, data in of_class(net, stun.Class.RESPONSE, "192.0.2.1"):
        assert one.host.mux.route(Path(HERE, src), data, net.now) == []
        assert one.host.mux.route(Path(HERE, ATTACKER), data, net.now) == []
    assert state(one.agent) == before


def test_an_answer_from_elsewhere_fails_a_check_and_kills_no_working_path() -> None:
    net = Net()
    a, b = Host(net, "192.0.2.1"), Host(net, "198.51.100.1")
    one, two = pair_up(a, b, start=False)
    one.start([Candidate.remote(CandidateKind.HOST, Endpoint("198.51.100.1", PORT))], a.hosts())
    check = net.sent[-1][3]
    answer = stun.build(stun.success(check[8:20], HERE), two.agent.credentials.local_password.reveal())
    a.arrive(ATTACKER, HERE, answer)
    (row,) = one.agent.report()
    assert row.state is PairState.FAILED
    assert "203.0.113.66" in row.reason
    net, one, two = established()
    sent_before = len(net.sent)
    one.host.take(one.agent.verify(net.now))
    check = net.sent[sent_before][3]
    answer = stun.build(stun.success(check[8:20], HERE), two.agent.credentials.local_password.reveal())
    one.host.arrive(ATTACKER, HERE, answer)
    net.run(5.0)
    assert connected(one, two)


def test_endless_role_conflicts_end() -> None:
    net = Net()
    a = Host(net, "192.0.2.1")
    b = Host(net, "198.51.100.1")
    one, two = pair_up(a, b, start=False)
    key = two.agent.credentials.local_password.reveal()

    class Liar(Host):
        def arrive(self, src: Endpoint, dst: Endpoint, data: bytes) -> None:
            self.send(Path(dst, src), stun.build(stun.error(data[8:20], 487, "Role Conflict"), key))

    Liar(net, "198.51.100.1")
    one.start([Candidate.remote(CandidateKind.HOST, Endpoint("198.51.100.1", PORT))], a.hosts())
    net.run(60.0)
    assert len(net.packets_to("198.51.100.1")) <= SILENT_PACKETS
    assert one.selected is None


def test_a_peer_that_checks_from_everywhere_fills_no_table() -> None:
    net = Net()
    a, b = Host(net, "192.0.2.1"), Host(net, "198.51.100.1")
    one, _two = pair_up(a, b, start=False)
    one.start([], a.hosts())
    key, user = one.agent.credentials.local_password.reveal(), one.agent.credentials.username_in
    for number in range(300):
        check = stun.request(number.to_bytes(12, "big"), username=user, priority=1, ice_controlled=1)
        a.arrive(Endpoint(f"203.0.113.{number % 250}", 1000 + number), HERE, stun.build(check, key))
    assert len(one.agent.report()) <= 16
    net.run(5.0)
    assert len(net.sent) <= 300 + 16 * SILENT_PACKETS


def test_early_checks_from_everywhere_fill_no_table() -> None:
    net = Net()
    a, b = Host(net, "192.0.2.1"), Host(net, "198.51.100.1")
    one, _two = pair_up(a, b, start=False)
    key, user = one.agent.credentials.local_password.reveal(), one.agent.credentials.username_in
    for number in range(300):
        check = stun.request(number.to_bytes(12, "big"), username=user, priority=1, ice_controlled=1)
        a.arrive(Endpoint("203.0.113.1", 1000 + number), HERE, stun.build(check, key))
    one.start([], a.hosts())
    assert len(one.agent.report()) <= 16


def test_the_overlay_is_no_target() -> None:
    net = Net()
    a = Host(net, "2001:db8::1")
    a.limits = type(a.limits)([ip_network("fd00::/8")], never=[ip_network("fd11:2233:4455::/48")])
    peer = Peer(a, initiator=True)
    named = [Candidate.remote(CandidateKind.HOST, Endpoint(h, PORT)) for h in ("fd11:2233:4455::9", "fd99::9")]
    peer.start(named, a.hosts())
    net.run(5.0)
    assert {dst.host for _, _, dst, _ in net.sent} == {"fd99::9"}


REQUEST_FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "priority": st.integers(0, 2**32 - 1),
        "ice_controlled": st.integers(0, 2**64 - 1),
        "ice_controlling": st.integers(0, 2**64 - 1),
        "use_candidate": st.none(),
        "xor_mapped_address": st.tuples(st.sampled_from(["192.0.2.9", "2001:db8::9"]), st.integers(0, 65535)),
    },
)
ENDPOINTS = st.sampled_from(
    [
        Endpoint("198.51.100.1", PORT),
        ATTACKER,
        Endpoint("10.0.0.1", 1),
        Endpoint("127.0.0.1", 9),
        Endpoint("203.0.113.1", 0),
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("rie"), REQUEST_FIELDS, ENDPOINTS, st.floats(0, 3)), max_size=12))
def test_whatever_an_authenticated_peer_says_the_agent_stands(steps: list) -> None:
    net = Net()
    a, b = Host(net, "192.0.2.1"), Host(net, "198.51.100.1")
    one, two = pair_up(a, b, start=False)
    one.start([Candidate.remote(CandidateKind.HOST, Endpoint("198.51.100.1", PORT))], a.hosts())
    credentials, peers_key = one.agent.credentials, two.agent.credentials.local_password.reveal()
    numbers = itertools.count()
    for kind, fields, source, wait_s in steps:
        if kind == "r":
            number = next(numbers).to_bytes(12, "big")
            message = stun.request(number, username=credentials.username_in, **fields)
            data = stun.build(message, credentials.local_password.reveal())
        else:
            checks = [data for _, src, _, data in net.sent if src.host == "192.0.2.1" and data[1] == 1]
            message = stun.request(checks[-1][8:20], **fields)
            message.message_class = stun.Class.RESPONSE if kind == "i" else stun.Class.ERROR
            data = stun.build(message, peers_key)
        a.arrive(source, HERE, data)
        net.run(wait_s)
    assert (one.selected is not None) == any(row.selected for row in one.agent.report())


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"", b"\x00\x01", b"\x01\x01", b"\x01\x11"]))
def test_any_bytes_leave_the_mux_standing(tail: bytes, head: bytes) -> None:
    net = Net()
    a = Host(net, "192.0.2.1")
    peer = Peer(a, initiator=True)
    ufrag = peer.agent.credentials.local_ufrag.encode()
    for data in (
        head + tail,
        head + len(tail).to_bytes(2, "big") + b"\x21\x12\xa4\x42" + peer.agent.tag + bytes(6) + tail,
        head
        + (len(tail) + 12).to_bytes(2, "big")
        + b"\x21\x12\xa4\x42"
        + bytes(12)
        + b"\x00\x06\x00\x08"
        + ufrag
        + tail,
    ):
        assert a.mux.route(Path(HERE, ATTACKER), data, net.now) in (None, [])


@pytest.mark.parametrize("state", list(PairState))
@pytest.mark.parametrize("step", list(PairInput))
def test_every_pair_input_is_in_the_table_or_an_error(state: PairState, step: PairInput) -> None:
    pair = Pair(HERE, Candidate.remote(CandidateKind.HOST, ATTACKER), state=state)
    if (state, step) in TRANSITIONS:
        pair.apply(step)
        assert pair.state is TRANSITIONS[state, step]
    else:
        with pytest.raises(LocalError):
            pair.apply(step)
        assert pair.state is state


def test_only_answers_make_a_pair_valid() -> None:
    into = {step for (state, step), after in TRANSITIONS.items() if after is PairState.VALID is not state}
    assert into == {PairInput.ANSWER}
