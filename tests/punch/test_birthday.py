"""Runs of guesses: what they may send, where to, how fast, and how a hit becomes a path."""

from __future__ import annotations

import random

import pytest

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.errors import LocalError
from p2pvpn.core.output import Transmit
from p2pvpn.punch.birthday import (
    BACKOFF_S,
    BUSY_S,
    INTERVAL_S,
    PROBES,
    RunBackoff,
    Volley,
    VolleyEnded,
    VolleyReached,
    draw_ports,
    guesses,
    meetings,
    openings,
)
from p2pvpn.punch.limits import CHECKS_BURST, RUNS, SILENCE_S
from p2pvpn.punch.prediction import FIRST_PORT, LAST_PORT

from .fakenet import PORT, Host, Nat, Net, Peer, Scope, connected, pair_up

HARD, EASY = "192.0.2.1", "198.51.100.1"
HERE = Endpoint("10.0.1.7", PORT)


class Runs:
    """A hard and an easy side whose ordinary checks failed, with two hubs' word for both addresses."""

    def __init__(self) -> None:
        self.net = Net()
        self.hard = Host(Nat(self.net, HARD, mapping=Scope.APD), "10.0.0.5")
        self.easy = Host(Nat(self.net, EASY), HERE.host)
        self.one, self.two = pair_up(self.hard, self.easy)
        self.net.run(6.0)
        assert not connected(self.one)
        for peer, host in ((self.one, EASY), (self.two, HARD)):
            for hub in (b"hub 1", b"hub 2"):
                peer.agent.attest(host, hub)

    def volley(self, peer: Peer, paths: list[Path], tell_at: int = 0) -> Volley:
        return Volley(peer.agent, paths, peer.host.limits, self.net.now, tell_at=tell_at)

    def send(self, host: Host, volley: Volley, seconds: float) -> list[tuple[float, object]]:
        """Drive a volley; what it said besides packets, and when."""
        said: list[tuple[float, object]] = []

        def step() -> None:
            outputs = volley.tick(self.net.now)
            said.extend((self.net.now, output) for output in outputs if not isinstance(output, Transmit))
            host.take([output for output in outputs if isinstance(output, Transmit)])
            due = volley.next_deadline()
            if due is not None:
                self.net.at(due, step)

        step()
        self.net.run(seconds)
        return said


def test_one_hub_is_not_enough_for_a_guess() -> None:
    runs = Runs()
    runs.two.agent.attest("203.0.113.9", b"hub 1")
    runs.two.agent.attest("203.0.113.9", b"hub 1")
    runs.two.agent.attest("203.0.113.9")
    with pytest.raises(LocalError, match="2 hubs"):
        runs.volley(runs.two, guesses(HERE, "203.0.113.9", (), runs.net.entropy))


def test_a_run_has_one_address_and_at_most_1024_packets() -> None:
    runs = Runs()
    elsewhere = Path(HERE, Endpoint("203.0.113.9", 5))
    runs.two.agent.attest("203.0.113.9", b"hub 1")
    runs.two.agent.attest("203.0.113.9", b"hub 2")
    with pytest.raises(LocalError, match="one address"):
        runs.volley(runs.two, [Path(HERE, Endpoint(HARD, 5)), elsewhere])
    with pytest.raises(LocalError, match="bounded"):
        runs.volley(runs.two, [Path(HERE, Endpoint(HARD, 1024 + port)) for port in range(PROBES + 1)])


def test_an_address_gets_three_runs_in_ten_minutes_whoever_asks() -> None:
    runs = Runs()
    paths = guesses(HERE, HARD, (), runs.net.entropy)
    for _ in range(RUNS):
        runs.volley(runs.two, paths)
    with pytest.raises(LocalError, match="had its runs"):
        runs.volley(runs.two, paths)
    runs.net.run(SILENCE_S)
    runs.volley(runs.two, paths)


def test_a_run_is_paced_and_tells_its_end() -> None:
    runs = Runs()
    before = len(runs.net.sent)
    began = runs.net.now
    said = runs.send(
        runs.easy,
        runs.volley(runs.two, guesses(HERE, HARD, (), runs.net.entropy), tell_at=100),
        1.1 * PROBES * 0.011 + 2,
    )
    times = [at for at, src, dst, _ in runs.net.sent[before:] if dst.host == HARD and src.host == EASY]
    assert PROBES <= len(times) <= PROBES + 3  # retries of ordinary checks are among them
    windows = [sum(1 for other in times if at <= other < at + 1.0) for at in times[::10]]
    assert max(windows) <= 100
    assert [type(event) for _, event in said] == [VolleyReached, VolleyEnded]
    assert said[0][0] - began == pytest.approx(99 * INTERVAL_S, abs=0.1)
    assert said[1][1] == VolleyEnded(met=False)


def test_ordinary_checks_find_room_during_a_run() -> None:
    runs = Runs()
    limits = runs.easy.limits
    now = runs.net.now
    for _ in range(int(CHECKS_BURST)):
        limits.take_spare(now)
    assert limits.take_rate(now)


def test_a_guess_that_hits_becomes_a_path_by_the_ordinary_rules() -> None:
    runs = Runs()
    path = Path(
        Endpoint("10.0.0.5", 40001), next(c.endpoint for c in runs.two.agent.checks.local if c.endpoint.host == EASY)
    )
    runs.one.agent.checks.extra_ports.add(40001)
    runs.send(runs.hard, runs.volley(runs.one, [path]), 0.2)
    seen = [src for _, src, dst, _ in runs.net.sent if dst == path.remote and src.host == HARD]
    said = runs.send(runs.easy, runs.volley(runs.two, guesses(HERE, HARD, [seen[-1].port], runs.net.entropy)), 2.0)
    assert connected(runs.one, runs.two)
    assert runs.one.selected == path
    assert runs.two.selected is not None
    assert runs.two.selected.remote == seen[-1]
    assert said[-1][1] == VolleyEnded(met=True)
    runs.one.host.take(runs.one.agent.update_remote(list(runs.one.agent.checks.remote), runs.net.now))
    assert runs.one.selected == path  # an extra socket on an address of ours stays ours


def test_a_closed_socket_takes_its_pairs_along() -> None:
    runs = Runs()
    checks = runs.one.agent.checks
    checks.extra_ports.add(40001)
    assert checks.learn(Path(Endpoint("10.0.0.5", 40001), Endpoint(EASY, 5))) is not None
    before = len(checks)
    checks.drop_ports((40001,))
    assert len(checks) == before - 1


def test_ports_are_drawn_without_repeats() -> None:
    ports = draw_ports(PROBES, random.Random(1).randbytes)
    assert len(set(ports)) == PROBES
    assert min(ports) >= FIRST_PORT
    assert max(ports) <= LAST_PORT
    assert ports != draw_ports(PROBES, random.Random(2).randbytes)


def test_paths_of_both_sides() -> None:
    target = Endpoint(EASY, 4500)
    assert openings("10.0.0.5", [7, 8], target) == [Path(Endpoint("10.0.0.5", port), target) for port in (7, 8)]
    met = meetings("10.0.0.5", [7, 8], EASY, [70, 80], 2)
    assert [(path.local.port, path.remote.port) for path in met] == [(7, 70), (8, 80), (7, 70), (8, 80)]
    assert [path.remote.port for path in guesses(HERE, HARD, (5, 6), random.Random(1).randbytes)] == [5, 6]


def test_runs_that_fail_are_rarer_and_rarer_until_a_network_changes() -> None:
    backoff = RunBackoff()
    assert backoff.allows(0.0)
    now = 0.0
    for pause in (*BACKOFF_S, BACKOFF_S[-1]):
        backoff.failed(now)
        assert not backoff.allows(now + pause - 0.1)
        now += pause
        assert backoff.allows(now)
    backoff.busy(now)
    assert not backoff.allows(now + BUSY_S - 0.1)
    assert backoff.allows(now + BUSY_S)
    backoff.failed(now)
    backoff.reset()
    assert backoff.allows(now)
    backoff.failed(now)
    assert backoff.allows(now + BACKOFF_S[0])
