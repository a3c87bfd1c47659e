"""Paths that die, come back, move and improve, in virtual time."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.punch.candidates import CandidateKind
from p2pvpn.punch.events import PathLost, PathNominated, PunchFailed

from .fakenet import PORT, Host, Nat, Net, Peer, Scope, connected, pair_up, remote_view

LONGEST_CONSENT_S = 5.0 * 1.2
VERDICT_S = 0.3 + 1.5


def connect(net: Net, a: Host, b: Host) -> tuple[Peer, Peer]:
    one, two = pair_up(a, b)
    assert net.run_until(lambda: connected(one, two), 2.0)
    net.run(3.0)
    return one, two


def homes(net: Net) -> tuple[Host, Host]:
    return Host(Nat(net, "192.0.2.1"), "10.0.0.5"), Host(Nat(net, "198.51.100.1"), "10.0.1.7")


@pytest.mark.parametrize("seed", range(6))
def test_a_dead_path_is_noticed_by_consent_and_used_again_when_it_comes_back(seed: int) -> None:
    net = Net(seed)
    one, two = connect(net, *homes(net))
    net.blocked = lambda src, dst: True
    died = net.now
    assert net.run_until(lambda: one.said(PathLost) and two.said(PathLost), LONGEST_CONSENT_S + VERDICT_S + 0.05)
    assert one.selected is None
    assert one.said(PathLost)[0][1].path == one.said(PathNominated)[0][1].path
    net.run(died + 20.0 - net.now)
    assert len(one.said(PunchFailed)) == 1
    net.blocked = lambda src, dst: False
    assert net.run_until(lambda: connected(one, two), 1.2 * 32.0)


def test_the_verdict_comes_within_a_second_and_a_half_of_the_first_miss() -> None:
    net = Net()
    one, _two = connect(net, *homes(net))
    net.blocked = lambda src, dst: True
    sent_before = len(net.sent)
    assert net.run_until(lambda: bool(one.said(PathLost)), 10.0)
    first_check = next(at for at, src, _, _ in net.sent[sent_before:] if src.host == "192.0.2.1")
    assert one.said(PathLost)[0][0] - (first_check + 0.3) <= 1.5 + 0.01


def test_verify_finds_a_dead_path_within_a_second() -> None:
    net = Net()
    one, _two = connect(net, *homes(net))
    net.blocked = lambda src, dst: True
    one.host.take(one.agent.verify(net.now))
    assert net.run_until(lambda: bool(one.said(PathLost)), 1.05)


def test_verify_of_a_living_path_says_nothing() -> None:
    net = Net()
    one, two = connect(net, *homes(net))
    events = list(one.events)
    one.host.take(one.agent.verify(net.now))
    net.run(3.0)
    assert one.events == events
    assert connected(one, two)


def test_verify_without_a_path_does_nothing() -> None:
    net = Net()
    one, _ = pair_up(*homes(net), start=False)
    assert one.agent.verify(net.now) == []


@pytest.mark.parametrize("seed", range(10))
def test_a_path_that_loses_a_tenth_of_its_packets_is_kept(seed: int) -> None:
    net = Net(seed, loss=0.1)
    one, two = connect(net, *homes(net))
    net.run(300.0)
    assert not one.said(PathLost)
    assert not two.said(PathLost)


def test_the_peers_checks_alone_are_no_consent() -> None:
    net = Net()
    one, _two = connect(net, Host(net, "192.0.2.1"), Host(net, "198.51.100.1"))
    # Nothing that the second host sends in answer passes; its own checks do.
    net.blocked = lambda src, dst: src.host == "198.51.100.1" and net.sent[-1][3][0] == 1
    assert net.run_until(lambda: bool(one.said(PathLost)), LONGEST_CONSENT_S + VERDICT_S + 0.1)


def test_another_path_takes_over_when_the_chosen_one_dies() -> None:
    net = Net()
    a, b = Host(net, "192.0.2.1", "192.0.2.2"), Host(net, "198.51.100.1")
    one, two = connect(net, a, b)
    dead = one.selected.local.host
    net.blocked = lambda src, dst: dead in (src.host, dst.host)
    assert net.run_until(lambda: one.selected.local.host != dead, LONGEST_CONSENT_S + 0.7)
    assert not one.said(PathLost)  # It answers already, so nothing goes over the relay.
    assert net.run_until(lambda: two.selected == Path(one.selected.remote, one.selected.local), 0.1)
    net.run(30.0)
    assert connected(one, two)


def test_when_all_paths_die_the_others_are_not_mistaken_for_a_way_out() -> None:
    net = Net()
    one, _ = connect(net, Host(net, "192.0.2.1", "192.0.2.2"), Host(net, "198.51.100.1"))
    net.blocked = lambda src, dst: True
    assert net.run_until(lambda: bool(one.said(PathLost)), LONGEST_CONSENT_S + VERDICT_S + 0.05)
    assert len(one.said(PathNominated)) == 1


def test_a_better_path_that_appears_later_is_moved_to() -> None:
    net = Net()
    nat = Nat(net, "192.0.2.1")
    a, b = Host(nat, "192.168.1.5"), Host(net, "198.51.100.1")
    one, two = connect(net, a, b)
    b.addresses.append("192.168.1.9")  # A cable to the first one's network.
    nat.public["192.168.1.9"] = b
    home = b.home

    class Both:
        """The second host is on the Internet and on the LAN."""

        def carry(self, src: Endpoint, dst: Endpoint, data: bytes) -> None:
            (nat if dst.host.startswith("192.168.") else home).carry(src, dst, data)

    b.home = Both()  # type: ignore[assignment]
    a.limits.update_subnets([ip_network("192.168.1.0/24")])
    b.limits.update_subnets([ip_network("192.168.1.0/24")])
    of_a, of_b = a.hosts(), b.hosts()
    b.take(two.agent.update_local(of_b, net.now))
    b.take(two.agent.update_remote(remote_view(of_a), net.now))
    a.take(one.agent.update_remote(remote_view(of_b), net.now))
    assert net.run_until(lambda: one.selected is not None and one.selected.remote.host == "192.168.1.9", 6.0)
    assert not one.said(PathLost)
    net.run(0.1)
    assert two.selected == Path(one.selected.remote, one.selected.local)
    assert one.said(PathNominated)[-1][1].rtt_s < one.said(PathNominated)[0][1].rtt_s


@pytest.mark.parametrize("mover", [0, 1])
def test_a_side_that_roams_is_lost_at_once_and_found_again(mover: int) -> None:
    net = Net()
    peers = connect(net, *homes(net))
    roaming, staying = peers[mover], peers[1 - mover]
    roaming.host.move(Nat(net, "203.0.113.9"), "172.16.0.3")
    of_roaming = roaming.host.candidates()
    lost = net.now
    roaming.host.take(roaming.agent.update_local(of_roaming, net.now))
    assert roaming.said(PathLost)[-1][0] == lost
    net.run(0.06)  # The relay carries the news.
    staying.host.take(staying.agent.update_remote(remote_view(of_roaming), net.now))
    new = "203.0.113.9"

    def moved() -> bool:
        return roaming.selected is not None and staying.selected is not None and staying.selected.remote.host == new

    # When the staying side controls, it notices by a check from elsewhere that its path is in doubt.
    assert net.run_until(moved, 2.0)


def test_both_sides_roam_at_once() -> None:
    net = Net()
    one, two = connect(net, *homes(net))
    one.host.move(Nat(net, "203.0.113.9"), "172.16.0.3")
    two.host.move(Nat(net, "203.0.113.77"), "172.16.9.3")
    of_one, of_two = one.host.candidates(), two.host.candidates()
    one.host.take(one.agent.update_local(of_one, net.now))
    two.host.take(two.agent.update_local(of_two, net.now))
    net.run(0.06)
    one.host.take(one.agent.update_remote(remote_view(of_two), net.now))
    two.host.take(two.agent.update_remote(remote_view(of_one), net.now))
    assert net.run_until(lambda: connected(one, two), 0.2)


def test_an_address_that_is_added_does_not_disturb_the_path() -> None:
    net = Net()
    a, b = Host(net, "192.0.2.1"), Host(net, "198.51.100.1")
    one, _two = connect(net, a, b)
    a.addresses.append("192.0.2.2")
    net.public["192.0.2.2"] = a
    chosen = one.selected
    a.take(one.agent.update_local(a.hosts(), net.now))
    assert one.selected == chosen
    net.run(10.0)
    assert not one.said(PathLost)
    assert len(one.agent.report()) == 2


def test_a_working_path_survives_that_the_peer_stops_naming_it() -> None:
    net = Net()
    one, two = connect(net, *homes(net))
    one.host.take(one.agent.update_remote([], net.now))
    net.run(60.0)
    assert connected(one, two)
    assert not one.said(PathLost)


@pytest.mark.parametrize("rebound", [0, 1])
def test_a_nat_that_forgets_its_mappings_costs_little(rebound: int) -> None:
    net = Net()
    a = Host(Nat(net, "192.0.2.1"), "10.0.0.5")
    b = Host(Nat(net, "198.51.100.1", filtering=Scope.EI), "10.0.1.7")
    if rebound:
        a, b = b, a
    peers = connect(net, a, b)
    behind = next(peer for peer in peers if peer.host.addresses == ["10.0.0.5"])
    other = next(peer for peer in peers if peer is not behind)
    nat = behind.host.home
    nat.rebind()
    nat._inside[PORT] = Endpoint("10.0.0.99", PORT)  # Somebody else got the port meanwhile.
    nat._contacts[PORT] = set()
    moved = net.run_until(
        lambda: other.selected is not None and other.selected.remote.port != PORT and behind.selected is not None, 10.0
    )
    assert moved
    net.run(30.0)
    assert connected(*peers)


def test_events_of_an_established_session_say_where_it_goes() -> None:
    net = Net()
    one, _ = connect(net, *homes(net))
    event = one.said(PathNominated)[0][1]
    assert event.kind is CandidateKind.REFLEXIVE
    assert event.path == one.selected
    rows = one.agent.report()
    assert [row.path for row in rows if row.selected] == [one.selected]
    assert rows[0].priority == event.priority
    assert rows[0].answers <= rows[0].checks_sent


def test_a_closed_agent_is_silent() -> None:
    net = Net()
    one, two = connect(net, Host(net, "192.0.2.1"), Host(net, "198.51.100.1"))
    one.agent.close()
    assert one.agent.next_deadline() is None
    assert one.agent.tick(net.now + 100) == []
    before = len(net.packets_to("198.51.100.1"))
    net.run(10.0)
    assert len(net.packets_to("198.51.100.1")) == before
    assert two.selected is None
