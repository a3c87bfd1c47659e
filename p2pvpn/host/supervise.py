"""`p2pvpn up` and `p2pvpn down`: who keeps the daemon running.

Where systemd is PID 1, a unit that we write. Elsewhere a supervisor process of ours (`host.supervisor`), found again by
a file with its pid and start time, so that a pid that was given to somebody else is never signalled.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import p2pvpn
from p2pvpn.core.errors import LocalError

from .supervisor import Patience, start_time

STOP_S = 10.0
"""From SIGTERM to SIGKILL: leaving a network takes a few round trips to hubs."""
PID_FILE = "supervisor.pid"
_ALREADY_RUNS = 3


def has_systemd() -> bool:
    """Whether systemd is this system's PID 1 (what sd_booted(3) looks at)."""
    return Path("/run/systemd/system").is_dir()


def notify(state: str) -> None:
    """Tell systemd: `READY=1`, `STOPPING=1`, `STATUS=...` (sd_notify(3)); nothing where nobody listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, suppress(OSError):
        sock.connect(address)
        sock.send(state.encode())


# --- our own supervisor


def supervise(command: Sequence[str], runtime_dir: Path, log_path: Path, patience: Patience | None = None) -> int:
    """Run the command in the background and keep it running; returns the supervisor's pid.

    Raises LocalError when one runs already, or cannot be started.
    """
    patience = patience or Patience()
    pid_file = runtime_dir / PID_FILE
    arguments = [f"--first-backoff={patience.first_backoff_s}", f"--max-backoff={patience.max_backoff_s}"]
    arguments += [f"--grace={patience.grace_s}", str(pid_file), str(log_path), *command]
    try:
        runtime_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-m", "p2pvpn.host.supervisor", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            start_new_session=True,
            env=_with_our_path(os.environ),
            check=False,
        )
    except OSError as problem:
        raise LocalError(f"cannot start the supervisor: {problem}") from problem
    if done.returncode == _ALREADY_RUNS:
        raise LocalError("the p2pvpn daemon runs already", hint="p2pvpn status, or p2pvpn down")
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2]
        raise LocalError(f"the supervisor did not start: {said or f'code {done.returncode}'}")
    return int(done.stdout)


def running(runtime_dir: Path) -> int | None:
    """The pid of the supervisor, if it lives."""
    found = _find(runtime_dir / PID_FILE)
    return found.pid if found else None


def stop(runtime_dir: Path, stop_s: float = STOP_S) -> bool:
    """End the supervisor and its command; False if none runs. It is killed when it does not end within `stop_s`."""
    found = _find(runtime_dir / PID_FILE)
    if found is None:
        return False
    try:
        handle = os.pidfd_open(found.pid)
    except ProcessLookupError:
        return True
    try:
        if start_time(found.pid) != found.started:  # looked at with the handle open: it cannot be another one now
            return True
        ended = select.poll()
        ended.register(handle, select.POLLIN)
        for number, wait_s in ((signal.SIGTERM, stop_s), (signal.SIGKILL, stop_s)):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, number)
            if ended.poll(wait_s * 1000):
                return True
        raise LocalError(f"process {found.pid} does not end")
    except PermissionError:
        raise LocalError("may not end the p2pvpn daemon", hint="try again with sudo") from None
    finally:
        os.close(handle)


@dataclass(frozen=True, slots=True)
class _Process:
    pid: int
    started: int


def _find(pid_file: Path) -> _Process | None:
    try:
        pid, started = (int(word) for word in pid_file.read_text(encoding="ascii").split())
    except (OSError, ValueError):
        return None
    return _Process(pid, started) if start_time(pid) == started else None


def _with_our_path(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment, with the directory that our package was imported from: the child must find it too."""
    ours = str(Path(p2pvpn.__file__).parent.parent)
    former = environment.get("PYTHONPATH", "")
    return {**environment, "PYTHONPATH": ours + (os.pathsep + former if former else "")}


# --- systemd

UNIT = "p2pvpn.service"
UNIT_DIRECTORY = Path("/etc/systemd/system")

_UNIT_TEXT = """\
[Unit]
Description=p2pvpn, direct IPsec tunnels between peers
After=network.target

[Service]
Type=notify
ExecStart={command}
{environment}\
Restart=on-failure
RestartSec=2
TimeoutStopSec={stop_s:g}
LimitNOFILE=65536
NoNewPrivileges=yes
ProtectHome=read-only

[Install]
WantedBy=multi-user.target
"""


def unit_text(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """The unit; the daemon itself says when it is ready. LimitNOFILE: a relay has four descriptors per pair."""
    lines = "".join(f"Environment={_quoted(f'{name}={value}')}\n" for name, value in sorted(environment.items()))
    words = " ".join(_quoted(word.replace("$", "$$")) for word in command)
    return _UNIT_TEXT.format(command=words, environment=lines, stop_s=STOP_S)


def start_unit(command: Sequence[str], environment: Mapping[str, str], directory: Path = UNIT_DIRECTORY) -> None:
    """Write the unit, start it now and at every boot; restart one that had another text. Raises LocalError."""
    path, text = directory / UNIT, unit_text(command, environment)
    try:
        changed = not path.exists() or path.read_text(encoding="utf-8") != text
        if changed:
            temporary = path.with_suffix(".tmp")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
    except OSError as problem:
        raise LocalError(f"cannot write {path}: {problem.strerror}", hint="try again with sudo") from problem
    if changed:
        _systemctl("daemon-reload")
    _systemctl("enable", UNIT)
    _systemctl("restart" if changed else "start", UNIT)


def stop_unit(directory: Path = UNIT_DIRECTORY) -> bool:
    """Stop the unit, now and at boot; False if there is none."""
    if not (directory / UNIT).exists():
        return False
    _systemctl("disable", "--now", UNIT)
    return True


def _systemctl(*words: str) -> None:
    try:
        done = subprocess.run(["systemctl", *words], capture_output=True, text=True, check=False)
    except OSError as problem:
        raise LocalError(f"cannot run systemctl: {problem}") from problem
    if done.returncode:
        raise LocalError(f"systemctl {words[0]}: {done.stderr.strip()}", hint=f"journalctl -u {UNIT}")


def _quoted(word: str) -> str:
    """A word as systemd.syntax(7) and systemd.unit(5) want it; `%` would be a specifier."""
    if "\n" in word or "\0" in word:
        raise LocalError(f"{word!r} cannot stand in a unit file")
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


# --- what the command line calls


def up(command: Sequence[str], runtime_dir: Path, log_path: Path, *, foreground: bool = False) -> str:
    """Have the command run: under systemd, else under our supervisor; returns a sentence on where it runs.

    In the foreground it takes the place of this process and the call does not return. Raises LocalError.
    """
    if foreground:
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            os.execvp(command[0], list(command))  # noqa: S606 (the command is ours)
        except OSError as problem:
            raise LocalError(f"cannot run {command[0]}: {problem.strerror}") from problem
    if has_systemd():
        ours = {name: value for name, value in os.environ.items() if name.startswith("P2PVPN_")}
        start_unit(command, ours)
        return f"runs as {UNIT}, now and at boot"
    pid = supervise(command, runtime_dir, log_path)
    return f"runs in the background (supervisor {pid}), log in {log_path}"


def down(runtime_dir: Path) -> bool:
    """End what `up` started, in whichever way; False if nothing ran. Raises LocalError."""
    stopped = stop(runtime_dir)
    if has_systemd():
        stopped = stop_unit() or stopped
    return stopped
