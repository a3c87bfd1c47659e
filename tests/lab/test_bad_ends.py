"""SIGTERM and SIGKILL at random moments: the state stands, and nothing stays in the kernel after the next start or end.

Six moments in `make test`; `make bad-input` takes two hundred (P2PVPN_MOMENTS). While the daemon lives, its state is
written to as fast as commands can: invitations change the issuer's file, a grant that is joined again changes all.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pvpn.host.membership import load
from p2pvpn.host.store import list_networks
from p2pvpn.lab.net import Lab
from tests.cli.machines import Machine, new_admin, short_directory

from .test_bad_machine import ADDRESS, assert_clean, kernel

MOMENTS = int(os.environ.get("P2PVPN_MOMENTS", "6"))
LONGEST_S = 2.5
"""From the start of `up`; the daemon is up after about one second."""


@pytest.fixture
def hub() -> Iterator[tuple[Machine, str]]:
    with Lab() as lab, short_directory() as root:
        node = lab.node("m")
        node.ip(f"addr add {ADDRESS}/32 dev lo")
        admin, secret = new_admin(root / "admin")
        machine = Machine(root / "hub", node)
        request = machine.ok("request").word
        grant = admin.ok("grant", request, "--name", "hub1", "--hub", ADDRESS, "--issuer", *secret).word
        machine.ok("join", "--no-up", grant)
        yield machine, grant
        machine.kill()


def victims(machine: Machine, kind: str) -> list[int]:
    """Processes of a kind: `all`, the supervisor, the daemon, a worker."""
    found = []
    for pid in machine.pids():
        with contextlib.suppress(OSError):
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
            if b"p2pvpn" in line and (
                kind == "all"
                or (kind == "supervisor" and b"host.supervisor" in line)
                or (kind == "daemon" and b"--foreground" in line and b"host.supervisor" not in line)
                or (kind == "worker" and b"worker" in line)
            ):
                found.append(pid)
    return found


@pytest.mark.netns
@pytest.mark.campaign
@pytest.mark.timeout(60 + 15 * MOMENTS)
def test_the_state_stands_whenever_and_however_it_ends(hub: tuple[Machine, str], capsys) -> None:
    machine, grant = hub
    assert machine.node is not None
    clean = kernel(machine.node)
    key = (machine.network / "key.pem").read_bytes()
    draw = random.Random(7018)
    ends: Counter[str] = Counter()
    for moment in range(MOMENTS):
        number = draw.choice([signal.SIGTERM, signal.SIGKILL])
        kind = draw.choice(["all", "all", "supervisor", "daemon", "worker"])
        up = machine.popen("up")
        until = time.monotonic() + draw.uniform(0.0, LONGEST_S)
        others = []
        while time.monotonic() < until:
            others.append(machine.popen(*draw.choice([("invite", f"m{moment}", "--no-qr"), ("join", grant)])))
            time.sleep(min(0.4, max(0.0, until - time.monotonic())))
        for pid in victims(machine, kind):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        for process in [up, *others]:
            _, err = process.communicate(timeout=60)
            assert "Traceback" not in err or process.returncode < 0, err
        ends[f"{number.name} {kind}"] += 1
        (directory,) = list_networks(machine.state)
        assert load(directory).name == "home"
        assert (machine.network / "key.pem").read_bytes() == key
        if draw.random() < 0.3:
            machine.ok("down")
            assert_clean(machine, clean)
    machine.ok("up")
    machine.ok("invite", "last", "--no-qr")
    assert machine.ok("status", "--json").json["problems"] == []
    machine.ok("down")
    assert_clean(machine, clean)
    with capsys.disabled():
        told = ", ".join(f"{end}: {count}" for end, count in sorted(ends.items()))
        print(f"\n{MOMENTS} moments; {told}; state intact, kernel clean")
