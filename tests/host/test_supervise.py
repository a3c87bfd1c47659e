"""Keeping a command running: our own supervisor with toy commands, and the text of the systemd unit."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys

import pytest

from p2pvpn.core.errors import LocalError
from p2pvpn.host import supervise
from p2pvpn.host.supervisor import BoundedLog, Patience, start_time

QUICK = Patience(first_backoff_s=0.01, max_backoff_s=0.02, grace_s=0.2)


class Toy:
    """A shell command that tells its pid through a pipe each time it starts, under a supervisor."""

    def __init__(self, tmp_path):
        self.runtime = tmp_path / "run"
        self.log = tmp_path / "log" / "p2pvpn.log"
        self.fifo = tmp_path / "fifo"
        os.mkfifo(self.fifo)
        self.reader = os.open(self.fifo, os.O_RDWR)

    def start(self, then: str, *, first: str = ":") -> int:
        script = f"{first}; echo $$ >{self.fifo}; {then}"
        return supervise.supervise(["/bin/sh", "-c", script], self.runtime, self.log, QUICK)

    def pid(self) -> int:
        """Wait for the next start of the command."""
        return int(os.read(self.reader, 100).split()[0])


@pytest.fixture
def toy(tmp_path):
    toy = Toy(tmp_path)
    yield toy
    supervise.stop(toy.runtime)
    os.close(toy.reader)


def wait_for_end(pid: int) -> None:
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([handle], [], [], 20)[0]
    finally:
        os.close(handle)


FOREVER = "exec sleep 1000"


def test_a_command_runs_in_the_background_until_it_is_stopped(toy):
    supervisor = toy.start(FOREVER)
    command = toy.pid()
    assert supervise.running(toy.runtime) == supervisor
    assert os.getsid(supervisor) not in (os.getsid(0), supervisor)
    assert supervise.stop(toy.runtime)
    assert start_time(command) is None
    assert supervise.running(toy.runtime) is None
    assert not supervise.stop(toy.runtime)


def test_a_command_that_fails_is_started_again(toy):
    toy.start("exit 3")
    assert len({toy.pid() for _ in range(4)}) == 4
    supervise.stop(toy.runtime)
    assert "the command ended with code 3; starting again in 0.01 s" in toy.log.read_text()
    assert "starting again in 0.02 s" in toy.log.read_text()


def test_a_command_that_is_killed_is_started_again(toy):
    toy.start(FOREVER)
    first = toy.pid()
    os.kill(first, signal.SIGKILL)
    assert toy.pid() != first


def test_a_command_that_succeeds_ends_the_supervisor(toy):
    supervisor = toy.start("exit 0")
    toy.pid()
    wait_for_end(supervisor)
    assert supervise.running(toy.runtime) is None
    toy.start(FOREVER)
    toy.pid()


def test_a_command_that_ignores_the_request_is_killed(toy):
    toy.start("while :; do sleep 1000; done", first="trap '' TERM")
    command = toy.pid()
    assert supervise.stop(toy.runtime)
    assert start_time(command) is None
    assert "does not end, it is killed" in toy.log.read_text()


def test_a_supervisor_that_does_not_end_is_killed_and_its_command_ends(toy):
    supervisor = toy.start(FOREVER)
    command = toy.pid()
    os.kill(supervisor, signal.SIGSTOP)
    assert supervise.stop(toy.runtime, stop_s=0.1)
    wait_for_end(command)
    assert start_time(supervisor) is None


def test_output_goes_to_the_log(toy):
    supervisor = toy.start("echo to stdout; echo to stderr >&2; exit 0")
    wait_for_end(supervisor)
    assert "to stdout\nto stderr\n" in toy.log.read_text()


def test_there_is_one_supervisor(toy):
    toy.start(FOREVER)
    toy.pid()
    with pytest.raises(LocalError, match="runs already"):
        toy.start(FOREVER)


def test_a_command_that_does_not_exist_is_tried_again_and_logged(toy):
    supervise.supervise(["/nonexistent"], toy.runtime, toy.log, QUICK)
    while toy.log.read_text().count("No such file") < 2:
        os.sched_yield()
    assert supervise.stop(toy.runtime)


def test_a_supervisor_that_cannot_start_says_why(toy, tmp_path):
    (tmp_path / "log").write_text("a file where a directory should be")
    with pytest.raises(LocalError, match="File exists"):
        toy.start(FOREVER)


@pytest.mark.parametrize("content", ["", "garbage", "1 2 3", "{pid} 1", "999999999 5"])
def test_a_pid_file_that_names_nobody_of_ours_signals_nobody(tmp_path, content):
    (tmp_path / supervise.PID_FILE).write_text(content.format(pid=os.getpid()))
    assert supervise.running(tmp_path) is None
    assert not supervise.stop(tmp_path)


def test_the_log_is_bounded(tmp_path):
    log = BoundedLog(tmp_path / "log", max_bytes=1000)
    for number in range(100):
        log.write(b"%060d" % number)
    log.close()
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"log", "log.1"}
    assert max(sizes.values()) <= 1000
    assert (tmp_path / "log").read_bytes().endswith(b"99")


def test_up_in_the_foreground_becomes_the_command(tmp_path):
    code = "import sys; from p2pvpn.host.supervise import up; up(sys.argv[1:], None, None, foreground=True)"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "/bin/sh", "-c", "echo $$"], stdout=subprocess.PIPE, text=True
    )
    out, _ = process.communicate(timeout=30)
    assert int(out) == process.pid
    with pytest.raises(LocalError, match="cannot run"):
        supervise.up(["/nonexistent"], tmp_path, tmp_path / "log", foreground=True)


def test_systemd_hears_that_we_are_ready(tmp_path, monkeypatch):
    for address in (str(tmp_path / "notify"), f"@p2pvpn-test-{os.getpid()}"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
            systemd.settimeout(10)
            systemd.bind("\0" + address[1:] if address.startswith("@") else address)
            monkeypatch.setenv("NOTIFY_SOCKET", address)
            supervise.notify("READY=1")
            assert systemd.recv(100) == b"READY=1"
    supervise.notify("STOPPING=1")
    monkeypatch.delenv("NOTIFY_SOCKET")
    supervise.notify("READY=1")


def test_the_unit_quotes_what_systemd_would_read_otherwise():
    text = supervise.unit_text(["/opt/a b/p2pvpn", "100%", "$HOME", 'q"\\'], {"P2PVPN_STATE_DIR": "/srv/50% $x"})
    assert 'ExecStart="/opt/a b/p2pvpn" "100%%" "$$HOME" "q\\"\\\\"\n' in text
    assert 'Environment="P2PVPN_STATE_DIR=/srv/50%% $x"\n' in text
    with pytest.raises(LocalError):
        supervise.unit_text(["a\nExecStartPre=evil"], {})


@pytest.mark.stranger
def test_systemd_itself_accepts_the_unit(tmp_path):
    unit = tmp_path / supervise.UNIT
    unit.write_text(supervise.unit_text(["/bin/sh", "-c", 'echo "$HOME" 100%'], {"P2PVPN_STATE_DIR": "/srv/50%"}))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, timeout=50, check=False
    )
    ours = [line for line in done.stderr.splitlines() if re.search(r"p2pvpn", line)]
    assert ours == []


@pytest.fixture
def systemctl(tmp_path, monkeypatch):
    """A systemctl that writes down what it was told, since systemd is not PID 1 where tests run."""
    told = tmp_path / "told"
    told.touch()
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "systemctl"
    script.write_text(f'#!/bin/sh\necho "$*" >>{told}\n[ ! -e {tmp_path}/broken ] || {{ echo no bus >&2; exit 1; }}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")

    def since() -> list[str]:
        lines = told.read_text().splitlines()
        told.write_text("")
        return lines

    return since


def test_the_unit_is_written_started_restarted_when_it_changes_and_stopped(tmp_path, systemctl):
    command = ["/usr/bin/p2pvpn", "daemon"]
    assert not supervise.stop_unit(tmp_path)
    supervise.start_unit(command, {}, tmp_path)
    assert (tmp_path / supervise.UNIT).read_text() == supervise.unit_text(command, {})
    assert systemctl() == ["daemon-reload", "enable p2pvpn.service", "restart p2pvpn.service"]
    supervise.start_unit(command, {}, tmp_path)
    assert systemctl() == ["enable p2pvpn.service", "start p2pvpn.service"]
    assert supervise.stop_unit(tmp_path)
    assert systemctl() == ["disable --now p2pvpn.service"]
    (tmp_path / "broken").touch()
    with pytest.raises(LocalError, match="no bus"):
        supervise.start_unit(command, {}, tmp_path)
