"""The command line's side of the daemon: is it there, start it, end it, and hear why it did not come up.

A daemon that cannot start leaves its sentence in `failure.json` of the runtime directory. `up` waits for that or for
the control socket; when it finds the failure, it ends the supervisor, which would only try again, and says the same.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from p2pvpn.core.errors import Fault, LocalError, P2pvpnError

from . import planes, supervise
from .control import control_path
from .guard import Guard
from .netlink import Netlink
from .store import runtime_root, state_root, told
from .tun import DEVICE

START_S = 20.0
"""How long `up` waits for the daemon to answer; it takes about a second."""
POLL_S = 0.05
FAILURE_FILE = "failure.json"
_OURS = " supervisor: "


def log_path() -> Path:
    return state_root() / "daemon.log"


def is_running() -> bool:
    """Whether a daemon answers at the control socket. Raises LocalError when we may not ask."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(control_path()))
        except PermissionError:
            raise LocalError(
                "may not talk to the daemon", hint="try again with sudo", fault=Fault.NOT_ALLOWED
            ) from None
        except OSError:
            return False
        return True


def require_able() -> None:
    """What the daemon needs of the machine and its user. Raises LocalError."""
    if os.geteuid() != 0:
        raise LocalError(
            "p2pvpn up needs root for its TUN device and routes", hint="try again with sudo", fault=Fault.NOT_ALLOWED
        )
    try:
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as problem:
        raise LocalError(
            f"this machine has no usable {DEVICE}: {problem.strerror}",
            hint="load the module: modprobe tun; give the container the device",
            fault=Fault.MACHINE,
        ) from None


def start(*, port: int | None = None, plane: str | None = None) -> None:
    """Start the daemon under systemd or under our own supervisor, and wait until it answers. Raises LocalError."""
    require_able()
    planes.wanted(plane)
    command = [sys.executable, "-m", "p2pvpn.cli.main", "up", "--foreground"]
    if port is not None:
        command += ["--port", str(port)]
    if plane is not None:
        command += ["--plane", plane]
    with suppress(OSError):
        _failure_path().unlink(missing_ok=True)
    with told(f"cannot write {log_path()}"):
        log_path().parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(log_path(), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644))
    if supervise.has_systemd() or supervise.running(runtime_root()) is None:
        supervise.up(command, runtime_root(), log_path())
    deadline = time.monotonic() + START_S
    while not is_running():
        failure = _read_failure()
        if failure is not None:
            supervise.down(runtime_root())
            raise failure
        if time.monotonic() > deadline or (not supervise.has_systemd() and supervise.running(runtime_root()) is None):
            raise LocalError(f"the daemon does not come up: {_last_words()}", hint=f"its log is {log_path()}")
        time.sleep(POLL_S)


def stop() -> bool:
    """End the daemon, and remove what one that was killed left; False when none ran. Raises LocalError."""
    stopped = supervise.down(runtime_root())
    if os.geteuid() == 0 and not is_running():
        planes.clean_up()
        asyncio.run(_clear())
    return stopped


async def _clear() -> None:
    """Rules and routes that keep plaintext in, and outlive a daemon that is killed."""
    with suppress(LocalError):
        await Guard().clear()
    with suppress(LocalError):
        netlink = await Netlink.open()
        try:
            await netlink.clear_barriers()
        finally:
            netlink.close()


def leave_failure(problem: P2pvpnError) -> None:
    """For whoever waits in `start`. Best effort: the log says it too."""
    text = json.dumps({"message": str(problem), "hint": problem.hint, "fault": int(problem.fault)})
    temporary = _failure_path().with_suffix(".tmp")
    with suppress(OSError):
        temporary.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(_failure_path())


def _failure_path() -> Path:
    return runtime_root() / FAILURE_FILE


def _read_failure() -> LocalError | None:
    try:
        said = json.loads(_failure_path().read_text(encoding="utf-8"))
        return LocalError(said["message"], hint=said["hint"] or f"its log is {log_path()}", fault=Fault(said["fault"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return LocalError("the daemon does not come up", hint=f"its log is {log_path()}")


def _last_words() -> str:
    """The last line of the log that the daemon wrote."""
    try:
        lines = log_path().read_text(errors="replace").splitlines()
    except OSError:
        return "it wrote no log"
    return next((line for line in reversed(lines) if line.strip() and _OURS not in line), "it wrote no log")
