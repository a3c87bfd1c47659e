"""Private namespaces for a laboratory that leaves nothing behind.

    caller                waits, and hands on the exit status
      +- guard            owns the new namespaces' birth; dies with the caller (PR_SET_PDEATHSIG)
           +- init        PID 1 of the new PID namespace; dies with the guard, and everything in the namespace with it
                +- worker returns from `fork_into_lab` and does the work

However the caller ends, `kill -9` included, the kernel ends init, and so every process, network namespace, interface
and tmpfs of the laboratory. As root the namespaces are mount, PID, network and IPC; without CAP_SYS_ADMIN a user
namespace is put around them, in which the worker is root.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from p2pvpn.core.errors import LocalError

from .devices import bring_up

CLONE_NEWNS = 0x0002_0000
CLONE_NEWIPC = 0x0800_0000
CLONE_NEWUSER = 0x1000_0000
CLONE_NEWPID = 0x2000_0000
CLONE_NEWNET = 0x4000_0000
MS_NOSUID_NODEV_NOEXEC = 0x2 | 0x4 | 0x8
MS_BIND = 0x1000
MS_REC_PRIVATE = 0x4000 | 0x40000
MS_SHARED = 0x100000
MNT_DETACH = 2
PR_SET_PDEATHSIG = 1
CAP_SYS_ADMIN = 21

INSIDE = "P2PVPN_INSIDE_LAB"
"""Environment variable that is set in a laboratory."""

_libc = ctypes.CDLL(None, use_errno=True)


def is_inside() -> bool:
    """Whether this process runs in namespaces made by `fork_into_lab`."""
    return os.environ.get(INSIDE) == "1"


def has_capability(capability: int) -> bool:
    """Whether this process has the capability (in whichever user namespace it is)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> capability & 1)
    return False


def die_with_parent(parent: int) -> None:
    """Be killed when the parent thread ends; `parent` is its pid, 0 when it is in an outer PID namespace."""
    _check("prctl", _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


@contextlib.contextmanager
def network_namespace(path: str | Path) -> Iterator[None]:
    """The calling thread is in that network namespace meanwhile; sockets and TUN devices made there stay there."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        target = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _check("setns", _libc.setns(target, CLONE_NEWNET))
        finally:
            os.close(target)
        try:
            yield
        finally:
            _check("setns", _libc.setns(home, CLONE_NEWNET))
    finally:
        os.close(home)


def add_network_namespace(path: Path) -> None:
    """Make a network namespace that `path` keeps alive, as ip-netns(8) does under /run/netns. Raises OSError."""
    directory = path.parent
    if not directory.exists():
        directory.mkdir(parents=True)
        where = os.fsencode(directory)
        _mount(where, where, None, MS_BIND)
        _mount(b"none", where, None, MS_SHARED)  # so that an end is seen by those who copied the mounts
    path.touch(exist_ok=False)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check("unshare", _libc.unshare(CLONE_NEWNET))
        try:
            _mount(b"/proc/thread-self/ns/net", os.fsencode(path), None, MS_BIND)
        finally:
            _check("setns", _libc.setns(home, CLONE_NEWNET))
    finally:
        os.close(home)


def remove_network_namespace(path: Path) -> None:
    """Undo that; the namespace ends with the last process in it. Raises OSError."""
    _check(f"umount {path}", _libc.umount2(os.fsencode(path), MNT_DETACH))
    path.unlink()


def pids_inside(path: Path) -> list[int]:
    """Processes whose network namespace is this one."""
    wanted = path.stat()
    pids = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            with contextlib.suppress(OSError):  # ended meanwhile
                found = (directory / "ns" / "net").stat()
                if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                    pids.append(int(directory.name))
    return pids


def fork_into_lab() -> int | None:
    """Fork a worker into namespaces of its own.

    Returns None in the worker. In the caller returns the worker's exit status once it and everything it started have
    ended (128 + n for signal n). Raises LocalError in the caller when the machine refuses namespaces. Call it from the
    main thread, before other threads exist.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    caller = os.getpid()
    report_r, report_w = os.pipe()
    guard = os.fork()
    if guard == 0:
        os.close(report_r)
        _guard(caller, report_w)
        return None
    os.close(report_w)
    with os.fdopen(report_r) as pipe:
        refusal = pipe.read()
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal tells the worker too; its answer counts
    try:
        status = _exit_status(os.waitpid(guard, 0)[1])
    finally:
        signal.signal(signal.SIGINT, previous)
    if refusal:
        raise LocalError(f"cannot make the laboratory's namespaces: {refusal}", hint=_refusal_hint())
    return status


def _guard(caller: int, report: int) -> None:
    try:
        die_with_parent(caller)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _unshare()
        init = os.fork()
        if init == 0:
            return _init(report)
        os.close(report)
        os._exit(_exit_status(os.waitpid(init, 0)[1]))
    except OSError as error:
        _refuse(report, error)


def _init(report: int) -> None:
    try:
        die_with_parent(0)
        _mount_private()
        bring_up("lo")  # a new network namespace has it down
        os.environ[INSIDE] = "1"
        worker = os.fork()
        if worker == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.close(report)
            return
        os.close(report)
        while True:
            pid, status = os.waitpid(-1, 0)
            if pid == worker:
                os._exit(_exit_status(status))
    except OSError as error:
        _refuse(report, error)


def _unshare() -> None:
    wanted = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC
    if has_capability(CAP_SYS_ADMIN):
        _check("unshare", _libc.unshare(wanted))
        return
    uid, gid = os.getuid(), os.getgid()
    _check("unshare", _libc.unshare(wanted | CLONE_NEWUSER))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def _mount_private() -> None:
    """Nothing propagates out, /proc and /sys show the new namespaces, and an empty /run keeps system services out."""
    _mount(b"none", b"/", None, MS_REC_PRIVATE)
    _mount(b"proc", b"/proc", b"proc", MS_NOSUID_NODEV_NOEXEC)
    with contextlib.suppress(OSError):  # refused in some containers; ip(8) mounts its own per namespace
        _mount(b"sysfs", b"/sys", b"sysfs", MS_NOSUID_NODEV_NOEXEC)
    _mount(b"tmpfs", b"/run", b"tmpfs", 0x2 | 0x4, b"mode=755")


def _mount(source: bytes, target: bytes, kind: bytes | None, flags: int, data: bytes | None = None) -> None:
    _check(f"mount {target.decode()}", _libc.mount(source, target, kind, ctypes.c_ulong(flags), data))


def _check(what: str, result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _exit_status(wait_status: int) -> int:
    code = os.waitstatus_to_exitcode(wait_status)
    return code if code >= 0 else 128 - code


def _refuse(report: int, error: OSError) -> None:
    os.write(report, str(error).encode())
    os._exit(1)


def _refusal_hint() -> str:
    for knob in ("kernel/unprivileged_userns_clone", "kernel/apparmor_restrict_unprivileged_userns"):
        path = Path("/proc/sys") / knob
        restricted = "1" if "apparmor" in knob else "0"
        if path.exists() and path.read_text().strip() == restricted:
            return f"run it as root; sysctl {knob.replace('/', '.')} keeps user namespaces from ordinary users"
    return "run it as root, outside of containers that forbid namespaces"
