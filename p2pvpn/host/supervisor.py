"""The process that keeps the daemon running where there is no systemd: `python -m p2pvpn.host.supervisor`.

It detaches from its terminal, writes its pid and start time into a file that it keeps locked, starts the command, and
starts it again when it fails, after 1, 2, 4, up to 30 seconds; a run of a minute counts as recovered. Exit code 0 and
SIGTERM end it. The command's output goes to a log of bounded size. If the supervisor is killed, the kernel tells the
command to end (PR_SET_PDEATHSIG). It imports nothing but the standard library, since it stays in memory for long.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

MAX_LOG_BYTES = 4 * 1024 * 1024
"""The log and one older one: weeks of a daemon that logs events, an hour of one that is in trouble."""
_PR_SET_PDEATHSIG = 1
_READ_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class Patience:
    """How long the supervisor waits for what, in seconds."""

    first_backoff_s: float = 1.0
    max_backoff_s: float = 30.0
    recovered_s: float = 60.0
    """A command that ran so long starts again after `first_backoff_s`."""
    grace_s: float = 8.0
    """From SIGTERM to SIGKILL; below the ten seconds after which `down` kills the supervisor itself."""


def start_time(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None if there is none. With the pid it names one process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])


class BoundedLog:
    """A file that becomes `<name>.1` when it is full, replacing the former one."""

    def __init__(self, path: Path, max_bytes: int = MAX_LOG_BYTES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        path.parent.mkdir(parents=True, exist_ok=True)
        self._open()

    def _open(self) -> None:
        self._file: IO[bytes] = self._path.open("ab", buffering=0)
        self._size = self._file.tell()

    def write(self, data: bytes) -> None:
        """Best effort: a full disk loses lines, it does not stop the daemon."""
        try:
            if self._size and self._size + len(data) > self._max_bytes:
                self._file.close()
                self._path.replace(self._path.with_name(self._path.name + ".1"))
                self._open()
            self._size += self._file.write(data) or 0
        except (OSError, ValueError):
            pass

    def close(self) -> None:
        self._file.close()

    def say(self, text: str) -> None:
        """A line of the supervisor's own."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self.write(f"{stamp} supervisor: {text}\n".encode())


class Supervisor:
    """Runs the command until it succeeds or SIGTERM comes. One per process: it owns the signal handlers."""

    def __init__(self, command: Sequence[str], log: BoundedLog, patience: Patience) -> None:
        self._command = list(command)
        self._log = log
        self._patience = patience
        self._libc = ctypes.CDLL(None)
        self._stopping = False
        self._wake_read, wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def run(self) -> None:
        backoff_s = self._patience.first_backoff_s
        while not self._stopping:
            started_at = time.monotonic()
            try:
                outcome = self._run_once()
            except OSError as problem:
                outcome = str(problem)
            if outcome is None or self._stopping:
                self._log.say("the command ended")
                return
            if time.monotonic() - started_at >= self._patience.recovered_s:
                backoff_s = self._patience.first_backoff_s
            self._log.say(f"{outcome}; starting again in {backoff_s:g} s")
            self._sleep(backoff_s)
            backoff_s = min(backoff_s * 2, self._patience.max_backoff_s)

    def _run_once(self) -> str | None:
        """Run the command to its end; what went wrong, or None."""
        self._log.say("starting " + " ".join(self._command))
        child = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=self._die_with_us,  # noqa: PLW1509 (this process has one thread)
        )
        assert child.stdout is not None
        with child.stdout, selectors.DefaultSelector() as selector:
            os.set_blocking(child.stdout.fileno(), False)
            child_fd = os.pidfd_open(child.pid)
            try:
                for fd in (child.stdout.fileno(), child_fd, self._wake_read):
                    selector.register(fd, selectors.EVENT_READ)
                self._watch(child, child_fd, child.stdout, selector)
            finally:
                os.close(child_fd)
        code = child.wait()
        if code == 0:
            return None
        return f"the command was killed by signal {-code}" if code < 0 else f"the command ended with code {code}"

    def _watch(
        self, child: subprocess.Popen[bytes], child_fd: int, output: IO[bytes], selector: selectors.BaseSelector
    ) -> None:
        kill_at: float | None = None
        while True:
            if self._stopping and kill_at is None:
                kill_at = time.monotonic() + self._patience.grace_s
                child.terminate()
            timeout_s = None if kill_at is None else max(0.0, kill_at - time.monotonic())
            ready = {key.fd for key, _ in selector.select(timeout_s)}
            if not ready:
                self._log.say("the command does not end, it is killed")
                child.kill()
                kill_at = float("inf")
            if self._wake_read in ready:
                os.read(self._wake_read, 1024)
            if output.fileno() in ready and not self._copy(output):
                selector.unregister(output.fileno())
            if child_fd in ready:
                while self._copy(output):
                    pass
                return

    def _copy(self, output: IO[bytes]) -> bool:
        """Output of the command into the log; False when there is none now."""
        data = output.read(_READ_BYTES)
        if data:
            self._log.write(data)
        return bool(data)

    def _sleep(self, seconds: float) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_read, selectors.EVENT_READ)
            until = time.monotonic() + seconds
            while not self._stopping and (left := until - time.monotonic()) > 0:
                if selector.select(left):
                    os.read(self._wake_read, 1024)

    def _stop(self, number: int, frame: object) -> None:
        self._stopping = True

    def _die_with_us(self) -> None:
        self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _detach(pid_file: int) -> None:
    """Leave the terminal and our parent, which tells our pid when the pid file is written."""
    ready_read, ready_write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(ready_write)
        if not os.read(ready_read, 1):
            os._exit(1)
        os.write(1, str(pid).encode())
        os._exit(0)
    os.chdir("/")
    os.umask(0o022)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.ftruncate(pid_file, 0)
    os.pwrite(pid_file, f"{os.getpid()} {start_time(os.getpid())}\n".encode(), 0)
    os.write(ready_write, b"+")
    for fd in (null, ready_read, ready_write):
        os.close(fd)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 in the parent means that the supervisor was started; 3 that another one does."""
    default = Patience()
    parser = argparse.ArgumentParser(prog="p2pvpn.host.supervisor")
    parser.add_argument("--first-backoff", type=float, default=default.first_backoff_s)
    parser.add_argument("--max-backoff", type=float, default=default.max_backoff_s)
    parser.add_argument("--grace", type=float, default=default.grace_s)
    parser.add_argument("pid_file", type=Path)
    parser.add_argument("log", type=Path)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    patience = Patience(options.first_backoff, options.max_backoff, default.recovered_s, options.grace)
    pid_file = os.open(options.pid_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(pid_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return 3
    log = BoundedLog(options.log)
    supervisor = Supervisor(options.command, log, patience)  # takes signals from here on
    _detach(pid_file)
    supervisor.run()
    log.close()
    os.ftruncate(pid_file, 0)  # not unlinked: the next supervisor may have opened it already
    return 0


if __name__ == "__main__":
    sys.exit(main())
