"""What can be wrong between machines: tokens, hubs out of reach, interrupted joins, clocks, dead workers.

Two hubs and two peers on a small Internet; every command is the real one, and what failed is tried again.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pvpn.core.errors import Fault
from p2pvpn.lab.nat import NatKind
from p2pvpn.lab.net import Lab
from p2pvpn.lab.stage import Stage
from tests.cli.machines import Machine, Outcome, new_admin, refused, short_directory, snapshot

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(180)]

ONE_JOIN_S = 1.5
"""About as long as a join takes on a busy machine; interrupts fall somewhere in it."""


class World:
    """Hubs that are up, and fresh machines for the homes a and b as often as a test wants one."""

    def __init__(self, lab: Lab, root: Path) -> None:
        nats = {"a": NatKind.NONE, "b": NatKind.NONE}
        self.stage = Stage(lab, root, hubs=2, nats=nats, rtt_ms=10, plane="user")
        self.admin, self.secret = new_admin(root / "admin")
        self.hubs = []
        for number, node in enumerate(self.stage.hubs, start=1):
            hub = Machine(root / node.name, node)
            request = hub.ok("request").word
            address = f"192.0.2.{number}"
            options = ("--name", node.name, "--hub", address, "--issuer")
            grant = self.admin.ok("grant", request, *options, *self.secret).word
            hub.ok("join", grant)
            self.hubs.append(hub)
        self._machines: list[Machine] = []
        self._names = 0

    def machine(self, home: str = "a") -> Machine:
        self._names += 1
        root = self.stage.root / f"{home}{self._names}"
        machine = Machine(root, self.stage.homes[home].peer)
        self._machines.append(machine)
        return machine

    def name(self) -> str:
        self._names += 1
        return f"m{self._names}"

    def token(self, name: str = "", *options: str) -> str:
        return str(self.hubs[0].ok("invite", name or self.name(), "--no-qr", *options).word)

    def clear(self) -> None:
        for machine in self._machines:
            machine.kill()
        self._machines = []


@pytest.fixture(scope="module")
def built() -> Iterator[World]:
    with Lab() as lab, short_directory() as root:
        yield World(lab, root)


@pytest.fixture
def world(built: World) -> Iterator[World]:
    yield built
    built.clear()


def test_a_token_works_for_one_machine_and_says_so_to_others(world: World) -> None:
    token, first, second = world.token(), world.machine(), world.machine("b")
    first.ok("join", "--no-up", token)
    before = snapshot(first.state)
    refused(first.run("join", "--no-up", token), Fault.REFUSED, "in home already")
    assert snapshot(first.state) == before
    refused(second.run("join", "--no-up", token), Fault.REFUSED, "has been used", "new token")
    assert not (second.state / "networks").exists()
    first.ok("leave", "--yes")
    refused(first.run("join", "--no-up", token), Fault.REFUSED, "has been used")


def test_an_expired_token_is_refused_before_anybody_is_asked(world: World) -> None:
    token = world.token("", "--valid", "60")
    machine = world.machine()
    early = {"PYTHONPATH": _clock(machine, 3600)}
    refused(machine.run("join", "--no-up", token, environment=early), Fault.REFUSED, "has expired", "clock")
    assert snapshot(machine.state) == {}
    machine.ok("join", "--no-up", token)


def test_a_clock_that_is_a_year_late_spends_no_token(world: World) -> None:
    token, machine = world.token(), world.machine()
    late = {"PYTHONPATH": _clock(machine, -366 * 86400)}
    refused(machine.run("join", "--no-up", token, environment=late), Fault.REFUSED, "not valid yet", "clocks")
    machine.ok("join", "--no-up", token)


def test_a_foreign_token_finds_nobody(world: World) -> None:
    foreign_admin, secret = new_admin(world.machine().root / "foreign")
    hub = world.machine("b")
    request = hub.ok("request").word
    options = ("--name", "h", "--hub", "192.0.2.1", "--issuer")  # the address of a hub that is not its own
    hub.ok("join", foreign_admin.ok("grant", request, *options, *secret).word)
    token = hub.ok("invite", "x", "--no-qr").word
    machine = world.machine()
    refused(machine.run("join", "--no-up", token), Fault.UNREACHABLE, "192.0.2.1", "the token is still good")
    assert not (machine.state / "networks").exists()


@pytest.mark.parametrize("name", ["", "-x", "a b", "UP", "x" * 64, "ä", "../x", "x\x1b[0m", "hub1"])
def test_odd_names_are_not_invited(world: World, name: str) -> None:
    refused(world.hubs[0].run("invite", "--no-qr", "--", name), Fault.REFUSED, "name")


def test_a_peer_cannot_invite_and_an_unknown_one_cannot_be_reached(world: World) -> None:
    machine = world.machine()
    machine.ok("join", world.token())
    refused(machine.run("invite", "x"), Fault.REFUSED, "no issuer", "--issuer")
    for peer in ("nobody", "", "a b", "fd00::1", "1.2.3.4", "x\x00y".replace("\x00", "\x1b"), "n" * 300):
        outcome = machine.run("ping", "-c", "1", "-W", "1", "--", peer)
        assert outcome.code in (Fault.REFUSED, Fault.UNREACHABLE), (peer, outcome)
        assert outcome.err.startswith("error: ")
        assert "Traceback" not in outcome.err


def _clock(machine: Machine, offset_s: float) -> str:
    directory = machine.root / "clock"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "sitecustomize.py").write_text(
        f"import time\n_true = time.time\ntime.time = lambda: _true() + {offset_s}\n"
    )
    return f"{directory}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")


def _interrupted(process: subprocess.Popen[str], number: signal.Signals, after_s: float) -> Outcome:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(after_s)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return Outcome(process.returncode, out, err)


def test_ctrl_c_while_a_hub_is_silent_is_quiet_and_the_token_stays_good(world: World) -> None:
    token, machine = world.token(), world.machine()
    daemons = [pid for hub in world.hubs for pid in hub.pids()]
    for pid in daemons:
        os.kill(pid, signal.SIGSTOP)
    try:
        outcome = _interrupted(machine.popen("join", "--no-up", token), signal.SIGINT, 3.0)
    finally:
        for pid in daemons:
            os.kill(pid, signal.SIGCONT)
    assert outcome.code == 130, outcome
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith("error: interrupted")
    assert not (machine.state / "networks").exists()
    machine.ok("join", "--no-up", token)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_join_that_is_ended_at_any_moment_is_taken_up_by_the_next(world: World, number: signal.Signals) -> None:
    draw = random.Random(int(number))
    for _ in range(3):
        token, machine = world.token(), world.machine()
        outcome = _interrupted(machine.popen("join", "--no-up", token), number, draw.uniform(0.1, ONE_JOIN_S))
        if number == signal.SIGINT and outcome.code == 130:
            assert "Traceback" not in outcome.err
        again = machine.run("join", "--no-up", token)
        assert again.code == 0 or "in home already" in again.err, again
        assert len(snapshot(machine.network)) >= 4


def test_a_worker_that_dies_costs_a_moment_and_no_tunnel(world: World) -> None:
    a, b = world.machine("a"), world.machine("b")
    name = world.name()
    a.ok("join", world.token())
    b.ok("join", world.token(name))
    _await_ping(a, name)
    worker = next(pid for pid in a.pids() if b"host.worker" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(worker, signal.SIGKILL)
    _await_ping(a, name)
    assert "Traceback" not in a.log() + b.log(), a.log()


def test_hubs_out_of_reach_are_said_and_the_token_stays_good(world: World) -> None:
    token, machine = world.token(), world.machine()
    node = machine.node
    assert node is not None
    node.nft("table inet dark {\nchain out {\ntype filter hook output priority 0;\nip daddr 192.0.2.0/24 drop\n}\n}\n")
    began = time.monotonic()
    refused(machine.run("join", token), Fault.UNREACHABLE, "not reached", "192.0.2.1", "192.0.2.2", "still good")
    assert time.monotonic() - began < 25
    node.nft("delete table inet dark")
    machine.ok("join", token)
    node.nft("table inet dark {\nchain out {\ntype filter hook output priority 0;\nip daddr 192.0.2.0/24 drop\n}\n}\n")
    try:
        machine.ok("restart")  # hubs come back in their own time
        refused(machine.run("ping", "-c", "1", "-W", "1", "hub2x"), Fault.UNREACHABLE, "status")
    finally:
        node.nft("delete table inet dark")
    deadline = time.monotonic() + 40
    while not [hub for hub in _hubs(machine) if hub["state"] == "connected"]:
        assert time.monotonic() < deadline, machine.log()
        time.sleep(0.5)


def _hubs(machine: Machine) -> list[dict[str, str]]:
    return list(machine.ok("status", "--json").json["networks"][0]["hubs"])


def _await_ping(machine: Machine, name: str) -> None:
    deadline = time.monotonic() + 40
    while machine.run("ping", "-c", "1", "-W", "2", name).code != 0:
        assert time.monotonic() < deadline, machine.log()
