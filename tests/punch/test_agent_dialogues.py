"""Two agents, a fake Internet between them, virtual time."""

from __future__ import annotations

import pytest

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.punch.candidates import CandidateKind
from p2pvpn.punch.events import PathLost, PathNominated, PunchFailed
from p2pvpn.punch.pair import PairState

from .fakenet import PORT, Host, Nat, Net, Peer, Scope, connected, pair_up, remote_view

RTT = 0.05


def behind_nats(net: Net, **nats: Scope) -> tuple[Host, Host]:
    a = Host(Nat(net, "192.0.2.1", **nats), "10.0.0.5")
    b = Host(Nat(net, "198.51.100.1", **nats), "10.0.1.7")
    return a, b


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
def test_port_preserving_nats_connect_whatever_they_filter(filtering: Scope) -> None:
    net = Net()
    one, two = pair_up(*behind_nats(net, filtering=filtering))
    assert net.run_until(lambda: connected(one, two), 1.0)


def test_two_port_restricted_nats_work_in_both_directions_one_and_a_half_round_trips_after_the_later_start() -> None:
    net = Net()
    a, b = behind_nats(net)
    of_a, of_b = a.candidates(), b.candidates()
    one, two = pair_up(a, b, start=False)
    one.start(remote_view(of_b), of_a)
    net.run(RTT)
    began = net.now
    two.start(remote_view(of_a), of_b)

    def valid() -> bool:
        return all(any(row.state is PairState.VALID for row in peer.agent.report()) for peer in (one, two))

    assert net.run_until(valid, 1.0)
    assert net.now - began <= 1.5 * RTT + 0.001
    assert net.run_until(lambda: connected(one, two), 1.0)
    assert net.now - began <= 2 * RTT + 0.002
