"""A laboratory leaves nothing behind, however it ends, and needs no root."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest

from p2pvpn.lab import nat
from p2pvpn.lab.namespace import CAP_SYS_ADMIN, fork_into_lab, has_capability
from p2pvpn.lab.net import Lab

pytestmark = pytest.mark.netns

LEADER = """
import os, sys, time
from p2pvpn.lab import nat
from p2pvpn.lab.namespace import fork_into_lab
status = fork_into_lab()
if status is not None:
    sys.exit(status)
from p2pvpn.lab.net import Lab
lab = Lab()
hub = lab.public("hub1", "192.0.2.1", delay_s=0.001)
home = lab.home("a", "198.51.100.1", number=1)
sleeper = hub.popen(["setsid", "sleep", "1000"])
print("up", flush=True)
time.sleep(1000)
"""


def _descendants(root: int) -> set[int]:
    children: dict[int, set[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, set()).add(int(stat.parent.name))
    found: set[int] = set()
    todo = [root]
    while todo:
        fresh = children.get(todo.pop(), set()) - found
        found |= fresh
        todo += fresh
    return found


def _network_namespaces() -> set[str]:
    found = set()
    for link in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            found.add(str(link.readlink()))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_survives_the_leader(number: signal.Signals) -> None:
    namespaces = _network_namespaces()
    interfaces = set(Path("/sys/class/net").iterdir())
    leader = subprocess.Popen([sys.executable, "-c", LEADER], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert leader.stdout is not None
    with leader.stdout:
        assert leader.stdout.readline() == "up\n"
    processes = _descendants(leader.pid)
    assert len(processes) >= 5  # guard, init, worker, the delay line, the sleeper in a session of its own
    assert len(_network_namespaces()) > len(namespaces)
    if number is signal.SIGINT:
        os.killpg(leader.pid, number)  # as a terminal does
    else:
        leader.send_signal(number)
    leader.wait(10)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in processes) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [pid for pid in processes if Path(f"/proc/{pid}").exists()]
    assert _network_namespaces() <= namespaces
    assert set(Path("/sys/class/net").iterdir()) == interfaces
    assert not Path("/run/netns/hub1").exists()


def _in_child(work: object) -> int:
    """The exit status of a forked process that does the work."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 70
    try:
        status = work()  # type: ignore[operator]
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(status)


def test_the_exit_status_of_the_worker_comes_back() -> None:
    def work() -> int:
        status = fork_into_lab()
        if status is None:
            os._exit(7)
        return status

    assert _in_child(work) == 7


def test_a_killed_worker_gives_128_plus_the_signal() -> None:
    def work() -> int:
        status = fork_into_lab()
        if status is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return status or 0

    assert _in_child(work) == 128 + signal.SIGKILL


def test_the_laboratory_works_without_root() -> None:
    def work() -> int:
        if os.getuid() == 0 and _all_users_exist():
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: /proc/self is ours again
            assert not has_capability(CAP_SYS_ADMIN)
        status = fork_into_lab()
        if status is not None:
            return status
        with Lab() as lab:
            lab.public("s", "192.0.2.10")
            home = lab.home("a", "198.51.100.1", number=1)
            nat.apply(home, nat.NatKind.PORT_RESTRICTED)
            os._exit(0 if len(home.peer.ping("192.0.2.10", count=2)) == 2 else 1)

    assert _in_child(work) == 0


def _all_users_exist() -> bool:
    """Whether this user namespace has a `nobody` to become; if not, we are unprivileged already."""
    return any(int(line.split()[2]) > 65534 for line in Path("/proc/self/uid_map").read_text().splitlines())
