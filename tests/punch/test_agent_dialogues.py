"""Two agents, a fake Internet between them, virtual time: how direct paths are found."""

from __future__ import annotations

import itertools

import pytest

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.punch.candidates import Candidate, CandidateKind
from p2pvpn.punch.events import PathNominated, PunchFailed
from p2pvpn.punch.limits import SILENT_PACKETS
from p2pvpn.punch.pair import PairState

from .fakenet import PORT, Host, Nat, Net, Peer, Scope, connected, pair_up, remote_view

RTT = 0.05


def behind_nats(net: Net, **nats: Scope) -> tuple[Host, Host]:
    a = Host(Nat(net, "192.0.2.1", **nats), "10.0.0.5")
    b = Host(Nat(net, "198.51.100.1", **nats), "10.0.1.7")
    return a, b


def is_valid(peer: Peer) -> bool:
    return any(row.state is PairState.VALID for row in peer.agent.report())


def test_two_public_hosts_connect_directly() -> None:
    net = Net()
    one, two = pair_up(Host(net, "192.0.2.1"), Host(net, "198.51.100.1"))
    assert net.run_until(lambda: connected(one, two), 1.0)
    assert one.selected == Path(Endpoint("192.0.2.1", PORT), Endpoint("198.51.100.1", PORT))
    assert two.selected == Path(one.selected.remote, one.selected.local)
    (_, event) = one.events[0]
    assert isinstance(event, PathNominated)
    assert event.kind is CandidateKind.HOST
    assert event.rtt_s == pytest.approx(RTT)


@pytest.mark.parametrize("filtering", list(Scope))
def test_endpoint_independent_nats_connect_whatever_they_filter(filtering: Scope) -> None:
    net = Net()
    one, two = pair_up(*behind_nats(net, filtering=filtering))
    assert net.run_until(lambda: connected(one, two), 1.0)
    assert one.said(PathNominated)[0][1].kind is CandidateKind.REFLEXIVE


def test_two_port_restricted_nats_work_in_both_directions_one_and_a_half_round_trips_after_the_later_start() -> None:
    net = Net()
    a, b = behind_nats(net)
    of_a, of_b = a.candidates(), b.candidates()
    one, two = pair_up(a, b, start=False)
    one.start(remote_view(of_b), of_a)
    net.run(RTT)
    began = net.now
    two.start(remote_view(of_a), of_b)
    assert net.run_until(lambda: is_valid(one) and is_valid(two), 1.0)
    assert net.now - began <= 1.5 * RTT + 0.005
    assert net.run_until(lambda: connected(one, two), 1.0)
    assert net.now - began <= 2 * RTT + 0.005


@pytest.mark.parametrize("late_s", [0.0, 0.01, 0.3, 1.7, 4.0])
def test_the_controlled_side_may_start_first_or_late(late_s: float) -> None:
    net = Net()
    a, b = behind_nats(net)
    of_a, of_b = a.candidates(), b.candidates()
    one, two = pair_up(a, b, start=False)
    two.start(remote_view(of_a), of_b)
    net.run(late_s)
    began = net.now
    one.start(remote_view(of_b), of_a)
    assert net.run_until(lambda: connected(one, two), 1.0)
    assert net.now - began <= 2 * RTT + 0.005


def test_a_symmetric_nat_and_a_full_cone_connect_by_a_peer_reflexive_candidate() -> None:
    net = Net()
    a = Host(Nat(net, "192.0.2.1", mapping=Scope.APD), "10.0.0.5")
    b = Host(Nat(net, "198.51.100.1", filtering=Scope.EI), "10.0.1.7")
    one, two = pair_up(a, b)
    assert net.run_until(lambda: connected(one, two), 1.0)
    assert two.said(PathNominated)[0][1].kind is CandidateKind.PEER_REFLEXIVE
    (row,) = [row for row in one.agent.report() if row.selected]
    assert row.local_kind is CandidateKind.PEER_REFLEXIVE
    assert row.mapped == two.selected.remote


def test_a_full_cone_that_controls_reaches_a_symmetric_nat() -> None:
    net = Net()
    a = Host(Nat(net, "192.0.2.1", filtering=Scope.EI), "10.0.0.5")
    b = Host(Nat(net, "198.51.100.1", mapping=Scope.APD), "10.0.1.7")
    one, two = pair_up(a, b)
    assert net.run_until(lambda: connected(one, two), 1.0)
    assert one.said(PathNominated)[0][1].kind is CandidateKind.PEER_REFLEXIVE


def test_symmetric_against_port_restricted_fails_says_so_once_and_goes_on_sparingly() -> None:
    net = Net()
    a = Host(Nat(net, "192.0.2.1", mapping=Scope.APD), "10.0.0.5")
    b = Host(Nat(net, "198.51.100.1"), "10.0.1.7")
    one, two = pair_up(a, b)
    began = net.now
    assert net.run_until(lambda: one.said(PunchFailed) and two.said(PunchFailed), 4.0)
    net.run(began + 590 - net.now)
    assert not connected(one)
    assert not connected(two)
    assert len(one.said(PunchFailed)) == len(two.said(PunchFailed)) == 1
    for address in ("192.0.2.1", "198.51.100.1"):
        checks = net.packets_to(address)
        assert 10 <= len(checks) <= SILENT_PACKETS
    assert one.agent.next_deadline() is not None


def test_hosts_on_one_lan_talk_there_although_the_router_does_not_hairpin() -> None:
    net = Net()
    nat = Nat(net, "192.0.2.1")
    a, b = Host(nat, "192.168.1.5"), Host(nat, "192.168.1.6")
    one, two = pair_up(a, b)
    assert net.run_until(lambda: connected(one, two), 1.0)
    assert one.selected.remote.host == "192.168.1.6"
    assert one.said(PathNominated)[0][1].kind is CandidateKind.HOST
    net.run(3.0)
    assert len(one.said(PathNominated)) == 1


def test_double_nat_connects() -> None:
    net = Net()
    carrier = Nat(net, "192.0.2.1")
    a = Host(Nat(carrier, "100.64.0.2"), "192.168.1.5")
    b = Host(Nat(net, "198.51.100.1"), "192.168.1.6")
    one, two = pair_up(a, b)
    assert net.run_until(lambda: connected(one, two), 1.0)


def test_ipv6_without_translation_is_preferred_at_equal_round_trip() -> None:
    net = Net()
    a, b = behind_nats(net)
    a.addresses.append("2001:db8:1::5")
    b.addresses.append("2001:db8:2::7")
    for host in (a, b):
        net.public[host.addresses[1]] = host
    one, two = pair_up(a, b, start=False)
    of_a, of_b = a.candidates(), b.candidates()
    carry = a.home.carry

    def by_family(src: Endpoint, dst: Endpoint, data: bytes) -> None:
        (net.carry if dst.is_ipv6 else carry)(src, dst, data)

    a.home.carry = by_family  # type: ignore[method-assign]
    b_carry = b.home.carry
    b.home.carry = lambda src, dst, data: (net.carry if dst.is_ipv6 else b_carry)(src, dst, data)  # type: ignore[method-assign]
    one.start(remote_view(of_b), of_a)
    two.start(remote_view(of_a), of_b)
    assert net.run_until(lambda: connected(one, two), 1.0)
    net.run(10.0)
    assert one.selected.remote.is_ipv6
    assert two.selected == Path(one.selected.remote, one.selected.local)


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("higher", [True, False])
def test_a_role_conflict_is_settled_by_the_tie_breaker(both: bool, higher: bool) -> None:
    net = Net()
    a, b = behind_nats(net)
    of_a, of_b = a.candidates(), b.candidates()
    one = Peer(a, initiator=True, controlling=both, tie=7 if higher else 5)
    two = Peer(b, initiator=False, controlling=both, tie=6)
    one.start(remote_view(of_b), of_a)
    two.start(remote_view(of_a), of_b)
    assert net.run_until(lambda: connected(one, two), 1.5)
    assert one.agent.controlling is higher
    assert two.agent.controlling is not higher
    net.run(20.0)
    assert two.selected is not None


def test_checks_before_start_are_answered_and_taken_up_at_start() -> None:
    net = Net()
    a, b = Host(net, "192.0.2.1"), Host(net, "198.51.100.1")
    one, two = pair_up(a, b, start=False)
    one.start(remote_view(b.hosts()), a.hosts())
    net.run(1.0)
    assert is_valid(one)
    began = net.now
    two.start([], b.hosts())  # Its peer's candidates are still on their way.
    assert net.run_until(lambda: connected(one, two), 1.0)
    assert net.now - began <= RTT + 0.005


def test_candidates_may_trickle_in_on_both_sides() -> None:
    net = Net()
    a, b = behind_nats(net)
    of_a, of_b = a.candidates(), b.candidates()
    one, two = pair_up(a, b, start=False)
    one.start([], a.hosts())
    two.start([], b.hosts())
    net.run(0.2)
    a.take(one.agent.update_remote(remote_view(of_b), net.now))
    net.run(0.2)
    b.take(two.agent.update_local(of_b, net.now))
    b.take(two.agent.update_remote(remote_view(of_a), net.now))
    assert net.run_until(lambda: connected(one, two), 1.0)


def test_no_candidates_is_a_failure_and_no_end() -> None:
    net = Net()
    a, b = behind_nats(net)
    of_a, of_b = a.candidates(), b.candidates()
    one, two = pair_up(a, b, start=False)
    one.start([], of_a)
    two.start([], of_b)
    net.run(5.0)
    assert len(one.said(PunchFailed)) == 1
    a.take(one.agent.update_remote(remote_view(of_b), net.now))
    b.take(two.agent.update_remote(remote_view(of_a), net.now))
    assert net.run_until(lambda: connected(one, two), 1.0)


def test_a_wildcard_base_serves_as_well_as_an_address() -> None:
    net = Net()
    a, b = behind_nats(net)
    anywhere = Endpoint("0.0.0.0", PORT)
    of_a = [Candidate(candidate.kind, candidate.endpoint, anywhere) for candidate in a.candidates()]
    of_b = b.candidates()
    one, two = pair_up(a, b, start=False)
    one.start(remote_view(of_b), of_a)
    two.start(remote_view(of_a), of_b)
    assert net.run_until(lambda: connected(one, two), 1.0)
    assert one.selected.local == anywhere
    assert len(one.agent.report()) == 1


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("loss", [0.01, 0.1, 0.3])
def test_lossy_networks_connect_too(seed: int, loss: float) -> None:
    net = Net(seed, loss=loss)
    a, b = behind_nats(net)
    one, two = pair_up(a, b)
    assert net.run_until(lambda: connected(one, two), 3.0)


def test_of_two_paths_the_faster_one_is_nominated_although_the_slower_one_has_priority() -> None:
    net = Net()
    a = Host(net, "192.0.2.1")
    b = Host(net, "198.51.100.1", "2001:db8::7")
    a.addresses.append("2001:db8::5")
    net.public["2001:db8::5"] = a
    net.delays["2001:db8::5", "2001:db8::7"] = net.delays["2001:db8::7", "2001:db8::5"] = 0.06
    one, two = pair_up(a, b)
    assert net.run_until(lambda: connected(one, two), 1.0)
    net.run(10.0)
    assert not one.selected.remote.is_ipv6
    assert two.selected == Path(one.selected.remote, one.selected.local)


def test_an_idle_session_sends_little() -> None:
    net = Net()
    one, two = pair_up(*behind_nats(net))
    net.run(5.0)
    before = len(net.sent)
    net.run(100.0)
    assert len(net.sent) - before <= 2 * 2 * 100 / (5.0 * 0.8)
    assert connected(one, two)


def test_jitter_moves_nobody() -> None:
    net = Net()
    a = Host(net, "192.0.2.1", "192.0.2.2")
    b = Host(net, "198.51.100.1", "198.51.100.2")
    one, two = pair_up(a, b)
    for x in a.addresses:
        for y in b.addresses:
            net.delays[x, y] = net.delays[y, x] = 0.025

    def shake() -> None:
        for key in net.delays:
            net.delays[key] = 0.025 + net.rng.uniform(0, 0.0015)
        net.at(net.now + 0.5, shake)

    shake()
    net.run(600.0)
    assert 1 <= len(one.said(PathNominated)) <= 2
    assert connected(one, two)


def test_new_checks_of_all_sessions_keep_their_distance() -> None:
    net = Net()
    a = Host(net, "192.0.2.1")
    targets = [Candidate.remote(CandidateKind.HOST, Endpoint(f"198.51.100.{i}", PORT)) for i in range(1, 9)]
    for session in range(4):
        Peer(a, initiator=True, key=bytes([session])).start(targets, a.hosts())
    net.run(1.0)
    first_to: dict[tuple[str, bytes], float] = {}
    for at, _, dst, data in net.sent:
        first_to.setdefault((dst.host, data[8:14]), at)
    times = sorted(first_to.values())
    assert len(times) == 32
    assert min(later - sooner for sooner, later in itertools.pairwise(times)) >= 0.0199
    assert len(net.sent) <= 100 * 1.0 + 10
