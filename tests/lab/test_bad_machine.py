"""What can be wrong with the machine: rights, devices, ports, routes, disks, files, clocks, daemons.

Each time the real command has to end with one sentence, a hint and its exit code, the state has to stand, and nothing
may stay in the kernel.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pvpn.core.errors import Fault
from p2pvpn.lab.net import Lab, Node
from tests.cli.machines import CLI, Machine, new_admin, refused, short_directory, snapshot

pytestmark = [pytest.mark.netns, pytest.mark.timeout(120)]

ADDRESS = "192.0.2.1"
STRANGER = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
YEAR_S = 366 * 86400


@pytest.fixture(scope="module")
def template() -> Iterator[Path]:
    """The state of a hub that issues, made once; and its request and grant."""
    with short_directory() as root:
        admin, secret = new_admin(root / "admin")
        hub = Machine(root / "hub")
        request = hub.ok("request").word
        shutil.copytree(hub.state, root / "requested")
        grant = admin.ok("grant", request, "--name", "hub1", "--hub", ADDRESS, "--issuer", *secret).word
        hub.ok("join", "--no-up", grant)
        (root / "grant").write_text(grant)
        yield root


@pytest.fixture
def machine(lab: Lab, template: Path) -> Iterator[Machine]:
    """The hub, not up, alone on a host of its own."""
    node = lab.node("m")
    node.ip(f"addr add {ADDRESS}/32 dev lo")
    with short_directory() as root:
        shutil.copytree(template / "hub" / "state", root / "state")
        machine = Machine(root, node)
        yield machine
        machine.kill()
        node.kill()


def kernel(node: Node) -> str:
    """Devices, rules, routes, SAs and policies of a host."""
    looks = [["ip", "-o", "link"], ["nft", "list", "ruleset"], ["ip", "xfrm", "state"], ["ip", "xfrm", "policy"]]
    looks += [["ip", "route"], ["ip", "-6", "route"]]
    return "\n".join(node.run(look, check=False).stdout for look in looks)


def assert_clean(machine: Machine, before: str) -> None:
    """No process, device, rule, route, SA or policy of ours is left."""
    deadline = time.monotonic() + 5.0
    while machine.pids() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert machine.pids() == []
    assert machine.node is not None
    assert kernel(machine.node) == before


def identity(machine: Machine) -> dict[str, bytes]:
    """The files that must never be lost."""
    return {name: data for name, data in snapshot(machine.network).items() if not name.startswith("records")}


# --- rights and devices


def test_without_root_nothing_is_begun(machine: Machine, template: Path) -> None:
    grant = (template / "grant").read_text()
    machine.root.chmod(0o755)
    elsewhere = machine.root / "elsewhere"
    elsewhere.mkdir()
    os.chown(elsewhere, 65534, 65534)
    mine = {"P2PVPN_STATE_DIR": str(elsewhere), "P2PVPN_RUNTIME_DIR": str(elsewhere / "run")}
    refused(machine.run("up", prefix=STRANGER, environment=mine), Fault.NOT_ALLOWED, "needs root", "sudo")
    refused(machine.run("join", grant, prefix=STRANGER, environment=mine), Fault.NOT_ALLOWED, "needs root")
    assert snapshot(elsewhere) == {}


def test_without_a_tun_device_nothing_is_begun(machine: Machine, template: Path) -> None:
    assert machine.node is not None
    before = kernel(machine.node)
    without = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs none /dev/net && exec "$@"', "sh")
    refused(machine.run("up", prefix=without), Fault.MACHINE, "/dev/net/tun", "modprobe")
    refused(machine.run("join", (template / "grant").read_text(), prefix=without), Fault.MACHINE, "/dev/net/tun")
    odd = ("unshare", "-m", "sh", "-c", 'mount --bind /dev/null /dev/net/tun && exec "$@"', "sh")
    refused(machine.run("up", prefix=odd), Fault.MACHINE, "TUN device")
    assert_clean(machine, before)


# --- ports and routes


def test_a_second_daemon_shares_neither_port_nor_state(machine: Machine) -> None:
    machine.ok("up")
    assert machine.ok("up").out == "p2pvpn is already up\n"
    with short_directory() as root:
        shutil.copytree(machine.state, root / "state")
        second = Machine(root, machine.node)
        refused(second.run("up"), Fault.MACHINE, "another p2pvpn daemon has UDP port 4500")
        assert second.pids() == []
        same_state = {"P2PVPN_STATE_DIR": str(machine.state)}
        outcome = second.run("up", "--port", "4501", environment=same_state)
        refused(outcome, Fault.MACHINE, "another p2pvpn daemon uses")
    assert machine.ok("status", "--json").json["port"] == 4500


@pytest.mark.parametrize(
    ("kind", "family", "port", "said"),
    [
        (socket.SOCK_DGRAM, socket.AF_INET, 4500, "UDP port 4500 is in use"),
        (socket.SOCK_DGRAM, socket.AF_INET6, 4500, "UDP port 4500 is in use"),
        (socket.SOCK_STREAM, socket.AF_INET, 443, "TCP port 443"),
        (socket.SOCK_DGRAM, socket.AF_INET6, 4510, "UDP port 4510"),
    ],
)
def test_a_port_that_another_program_has_is_named(machine: Machine, kind, family, port: int, said: str) -> None:
    assert machine.node is not None
    before, state = kernel(machine.node), identity(machine)
    with machine.node.socket(family, kind) as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("", port))
        if kind == socket.SOCK_STREAM:
            taken.listen()
        refused(machine.run("up"), Fault.MACHINE, said)
        assert_clean(machine, before)
    machine.ok("up")
    assert machine.ok("status", "--json").json["problems"] == []
    assert identity(machine).keys() >= state.keys()


def test_another_vpns_route_stays_and_is_named(machine: Machine) -> None:
    assert machine.node is not None
    overlay = machine.ok("up") and machine.ok("status", "--json").json["networks"][0]
    machine.ok("down")
    machine.node.ip("link add other type veth peer name wire\nlink set wire up\nlink set other up")
    pool = overlay["ipv4"].split(".")[:2]
    v6 = overlay["overlay"].split(":")[:3]
    for route in (f"{':'.join(v6)}::/48", f"{pool[0]}.{pool[1]}.0.0/16", f"{pool[0]}.{pool[1]}.200.0/24"):
        machine.node.ip(f"route add {route} dev other metric 7")
        before = kernel(machine.node)
        refused(machine.run("up"), Fault.MACHINE, f"{route} is routed to other already", "p2pvpn restart")
        assert_clean(machine, before)
        machine.node.ip(f"route del {route} dev other metric 7")
    machine.node.ip("route add fd00::/8 dev other\nroute add 10.0.0.0/8 dev other")  # wider: ours is inside of it
    machine.ok("up")


# --- disks and files


def test_on_a_full_disk_nothing_is_lost_and_a_join_is_taken_up_later(machine: Machine, template: Path) -> None:
    grant = (template / "grant").read_text()
    script = textwrap.dedent(
        """
        set -e
        mount -t tmpfs -o size=128k none "$P2PVPN_STATE_DIR"
        cp -a "$1"/. "$P2PVPN_STATE_DIR"
        cat /dev/zero > "$P2PVPN_STATE_DIR/fill" 2>/dev/null || true
        shift
        set +e
        "$@" join --no-up "$GRANT"; echo "code $?"
        ls -A "$P2PVPN_STATE_DIR/networks" 2>/dev/null | wc -l
        : > "$P2PVPN_STATE_DIR/fill"
        "$@" join --no-up "$GRANT"; echo "code $?"
        """
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", str(template / "requested"), *CLI],
        env={**os.environ, **machine.environment, "GRANT": grant},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "code 8\n0\n" in done.stdout, done
    assert done.stdout.endswith("code 0\n"), done
    assert "No space left" in done.stderr
    assert "free some space" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_disk_that_fills_up_under_a_daemon_costs_no_state(machine: Machine) -> None:
    """The tmpfs is mounted in a mount namespace of its own, which daemon and commands share."""
    script = textwrap.dedent(
        """
        set -e
        cp -a "$P2PVPN_STATE_DIR" "$HOME/kept"
        mount -t tmpfs -o size=512k none "$P2PVPN_STATE_DIR"
        cp -a "$HOME/kept"/. "$P2PVPN_STATE_DIR"
        set +e
        "$@" up; "$@" invite before --no-qr; echo "code $?"
        cat /dev/zero > "$P2PVPN_STATE_DIR/fill" 2>/dev/null
        "$@" invite during --no-qr; echo "code $?"
        "$@" status > /dev/null; echo "code $?"
        : > "$P2PVPN_STATE_DIR/fill"
        "$@" invite after --no-qr; echo "code $?"
        "$@" restart; echo "code $?"
        cp -a "$P2PVPN_STATE_DIR"/. "$HOME/kept"
        "$@" down
        """
    )
    assert machine.node is not None
    done = machine.node.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *CLI], environment=machine.environment, check=False, timeout_s=60
    )
    codes = [line for line in done.stdout.splitlines() if line.startswith("code")]
    assert codes == ["code 0", "code 8", "code 0", "code 0", "code 0"], done
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr + (machine.root / "kept" / "daemon.log").read_text()


def test_a_read_only_disk_is_said(machine: Machine) -> None:
    read_only = ("unshare", "-m", "sh", "-c", 'mount --bind -o ro "$P2PVPN_STATE_DIR" "$P2PVPN_STATE_DIR" && exec "$@"')
    for arguments in (["up"], ["request"], ["leave", "--yes"]):
        refused(machine.run(*arguments, prefix=(*read_only, "sh")), Fault.STATE, "Read-only", "P2PVPN_STATE_DIR")


def test_a_runtime_directory_with_too_long_a_name_is_said(machine: Machine) -> None:
    far = {"P2PVPN_RUNTIME_DIR": str(machine.root / ("long" * 30))}
    refused(machine.run("up", environment=far), Fault.MACHINE, "P2PVPN_RUNTIME_DIR")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("key.pem", b""),
        ("genesis", b"\x93" * 100),
        ("document", None),
        ("chain", os.urandom(500)),
        ("issuer-state", b"\xc1garbage"),
        ("issuer-certificate", b"0\x82garbage"),
    ],
)
def test_damaged_files_are_named_and_left_for_repair(machine: Machine, file: str, content: bytes | None) -> None:
    assert machine.node is not None
    before = kernel(machine.node)
    machine.ok("up")
    machine.ok("down")
    path = machine.network / file
    whole = path.read_bytes() if path.exists() else b""
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    ruined = identity(machine)
    refused(machine.run("up"), Fault.STATE, "put back a copy" if "issuer-c" not in file else "")
    assert identity(machine) == ruined
    assert_clean(machine, before)
    path.write_bytes(whole)
    if not whole:
        path.unlink()
    machine.ok("up")


def test_another_networks_files_do_not_pass_for_ours(machine: Machine, template: Path) -> None:
    other, secret = new_admin(machine.root / "other")
    stranger = Machine(machine.root / "stranger")
    request = stranger.ok("request").word
    stranger.ok("join", "--no-up", other.ok("grant", request, "--name", "x", "--hub", ADDRESS, *secret).word)
    for file in ("genesis", "document", "chain", "key.pem"):
        whole = (machine.network / file).read_bytes()
        shutil.copy(stranger.network / file, machine.network / file)
        refused(machine.run("up"), Fault.STATE, "cannot be used", "put back a copy")
        (machine.network / file).write_bytes(whole)
    machine.ok("up")


def test_damaged_records_are_moved_aside_and_the_hub_serves(machine: Machine) -> None:
    machine.ok("up")
    machine.ok("down")
    (machine.network / "records.sqlite").write_bytes(os.urandom(5000))
    machine.ok("up")
    assert machine.ok("status", "--json").json["problems"] == []


def test_one_damaged_network_does_not_keep_the_others_down(machine: Machine) -> None:
    other, secret = new_admin(machine.root / "other")
    whole = machine.network
    grant = other.ok("grant", machine.ok("request").word, "--name", "x", *secret).word
    machine.ok("join", "--no-up", grant)
    (whole / "chain").write_bytes(b"")
    refused(machine.run("up"), Fault.STATE, "is not up", "put back a copy")
    status = machine.ok("status", "--json").json
    assert [len(status["networks"]), len(status["problems"])] == [1, 1]
    shown = machine.ok("status")
    assert "put back a copy" in shown.err
    assert machine.log().count("Traceback") == 0


# --- clocks


def clock(machine: Machine, offset_s: float) -> dict[str, str]:
    """An environment in which Python's wall clock is off by so much."""
    directory = machine.root / "clock"
    directory.mkdir(exist_ok=True)
    (directory / "sitecustomize.py").write_text(
        f"import time\n_true = time.time\ntime.time = lambda: _true() + {offset_s}\n"
    )
    path = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{directory}:{path}" if path else str(directory)}


@pytest.mark.parametrize(("offset_s", "said"), [(YEAR_S, "has expired"), (-YEAR_S, "not valid yet")])
def test_a_clock_that_is_wrong_by_a_year_is_suspected(
    machine: Machine, template: Path, offset_s: float, said: str
) -> None:
    before = identity(machine)
    grant = (template / "grant").read_text()
    wrong = clock(machine, offset_s)
    refused(machine.run("join", "--no-up", grant, environment=wrong), Fault.REFUSED, said)
    refused(machine.run("up", environment=wrong), Fault.REFUSED, said, "set the clock")  # up, but of no use
    told = machine.ok("status")
    assert said in told.err
    assert "set the clock" in told.err
    machine.ok("restart")
    assert machine.ok("status").err == ""
    assert before.items() <= identity(machine).items()


# --- daemons


OTHER_DAEMON = """
import json, os, socket, sys
path, answer = sys.argv[1:]
os.makedirs(os.path.dirname(path), exist_ok=True)
server = socket.socket(socket.AF_UNIX)
server.bind(path)
server.listen()
print("ready", flush=True)
while True:
    client, _ = server.accept()
    for line in client.makefile():
        request = json.loads(line)
        client.sendall(answer.replace("ID", str(request["id"])).encode() + b"\\n")
"""


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ('{"id": ID, "result": "0.0.7"}', "the daemon is p2pvpn 0.0.7"),
        ('{"id": ID, "error": {"message": "the daemon has no method", "hint": "h"}}', "no method"),
        ("not ours at all", "does not understand"),
        ("[1, 2]", "does not understand"),
        ('{"id": ID}', "does not understand"),
    ],
)
def test_a_daemon_of_another_version_is_said(machine: Machine, answer: str, said: str) -> None:
    path = machine.root / "run" / "control.sock"
    argv = [sys.executable, "-c", OTHER_DAEMON, str(path), answer]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        for command in (["status"], ["ping", "x"]):
            outcome = machine.run(*command)
            refused(outcome, Fault.FAILED if "no method" in said else Fault.NOT_RUNNING, said)
        other.kill()


def test_a_killed_daemon_comes_back_and_a_killed_supervisor_leaves_nothing(machine: Machine) -> None:
    assert machine.node is not None
    before, state = kernel(machine.node), identity(machine)
    machine.ok("up")
    machine.kill()
    assert_gone = machine.ok("down")  # nothing runs, but what was left is removed
    assert assert_gone.out == "p2pvpn was not up\n"
    assert_clean(machine, before)
    machine.ok("up")
    worker = next(pid for pid in machine.pids() if b"host.worker" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(worker, signal.SIGKILL)
    deadline = time.monotonic() + 10.0
    while "p2pvpn0" not in kernel(machine.node) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert machine.ok("status", "--json").json["networks"]
    machine.ok("down")
    assert_clean(machine, before)
    assert state.items() <= identity(machine).items()
    assert "Traceback" not in machine.log(), machine.log()
