"""A User-Mode Linux guest for one command: another kernel, with ESP, on the host's own files.

Debian's package `user-mode-linux` is a Linux kernel that runs as an ordinary process; it needs neither root nor virtual
machine support. The guest boots in two or three seconds:

    host's /            hostfs, read-only: lower layer  --.
    tmpfs in the guest                    upper layer  --+--> overlayfs = the guest's /
    directories that may be written       hostfs, read-write, mounted over it

So the command finds every program and file where it is on the host, and whatever it writes elsewhere goes away with the
guest. Console 1 is its standard output (a terminal only if ours is one), console 2 its standard error; its exit status
comes back in a file.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from p2pvpn.core.errors import LocalError

INSIDE = "P2PVPN_INSIDE_UML"
"""Environment variable that is set in a guest."""
TIMED_OUT = 124
GUEST_DIED = 125
BOOT_S = 60.0
"""Room for boot and halt beside the command's own time."""
KILL_AFTER_S = 5
"""From SIGTERM to SIGKILL for a command whose time is up."""
MODULES = (
    "ipv6",
    "af_packet",
    "xfrm_user",
    "esp4",
    "esp6",
    "gcm",
    "chacha20poly1305",
    "seqiv",
    "tun",
    "veth",
    "sch_netem",
    "xt_policy",
)
"""Loaded before the command: the first use of some takes a second, and `ipv6` must be there before namespaces are."""

_PROGRAM = "linux.uml"
_PIECE = 65536

_BOOT = """\
#!/bin/sh
# The first process, on the host's read-only root: builds the guest's root and moves there.
PATH=/usr/sbin:/usr/bin:/sbin:/bin
export PATH
mount -t proc proc /proc
mount -t tmpfs -o size=90% tmpfs /run
modules=/usr/lib/uml/modules/$(uname -r)
insmod $modules/kernel/fs/overlayfs/overlay.ko
mkdir /run/upper /run/work /run/root
mount -t overlay -o lowerdir=/,upperdir=/run/upper,workdir=/run/work overlay /run/root
cd /run/root
mkdir -p lib/modules
ln -sfn $modules lib/modules/
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t tmpfs tmpfs run
mount -t devtmpfs devtmpfs dev
mkdir -p dev/pts dev/shm dev/net run/netns run/lock run/host
mount -t devpts -o ptmxmode=666 devpts dev/pts
mount -t tmpfs tmpfs dev/shm
[ -e dev/net/tun ] || mknod dev/net/tun c 10 200
for directory in {writable}; do
    mkdir -p ".$directory"
    mount -t hostfs -o "$directory" hostfs ".$directory"
done
pivot_root . run/host
cd /
exec chroot / /bin/sh {job}/command
"""

_COMMAND = """\
stty -F /dev/tty1 raw -echo
stty -F /dev/tty2 raw -echo
. {job}/environment
for module in {modules}; do modprobe -q $module; done
ip link set lo up
hostname uml
perform() {{ cd {cwd} && timeout -k {kill_after} {timeout} {command}; echo $? >{job}/status; }}
perform </dev/null 2>/dev/tty2 {output}
sync
stty -F /dev/tty1 sane   # returns when everything was read
stty -F /dev/tty2 sane
echo o >/proc/sysrq-trigger
sleep 10
"""


@dataclass(frozen=True, slots=True)
class Guest:
    """What the guest is given: memory, seconds for the command, and host directories that it may write to."""

    memory: str = "1024M"
    timeout_s: int = 600
    writable: tuple[str, ...] = ()
    cwd: str = ""
    verbose: bool = False
    """Show the guest kernel's own messages on standard error."""


def is_inside() -> bool:
    """Whether this process runs in a guest."""
    return os.environ.get(INSIDE) == "1"


def find_uml() -> str:
    """The kernel's program. Raises LocalError that says what to install."""
    found = shutil.which(_PROGRAM) or shutil.which(_PROGRAM, path="/usr/bin")
    if found is None or shutil.which("modprobe", path=os.defpath + ":/usr/sbin:/sbin") is None:
        raise LocalError("there is no User-Mode Linux here", hint="apt install user-mode-linux kmod")
    return found


def run(command: Sequence[str], guest: Guest | None = None, environment: Mapping[str, str] | None = None) -> int:
    """Run the command in a guest, its output on ours; returns its exit status.

    124 means that its time was up, 125 that the guest itself died. SIGTERM and SIGINT end the guest. Call it from the
    main thread. Raises LocalError when User-Mode Linux is not installed.
    """
    guest = guest or Guest()
    program = find_uml()
    job = Path(tempfile.mkdtemp(prefix="p2pvpn-uml-"))
    former = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        _write_job(job, command, guest, {**os.environ, **(environment or {})})
        return _boot(program, job, guest)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        shutil.rmtree(job, ignore_errors=True)


def _leave(number: int, _: object) -> None:
    sys.exit(128 + number)


def _write_job(job: Path, command: Sequence[str], guest: Guest, environment: Mapping[str, str]) -> None:
    writable = [str(job), *(str(Path(directory).resolve()) for directory in guest.writable)]
    boot = job / "boot"
    boot.write_text(_BOOT.format(writable=shlex.join(writable), job=job))
    boot.chmod(0o755)
    (job / "command").write_text(
        _COMMAND.format(
            job=job,
            modules=shlex.join(MODULES),
            cwd=shlex.quote(guest.cwd or str(Path.cwd())),
            kill_after=KILL_AFTER_S,
            timeout=guest.timeout_s,
            command=shlex.join(command),
            output=">/dev/tty1" if sys.stdout.isatty() else "| cat >/dev/tty1",
        )
    )
    kept = {name: value for name, value in environment.items() if name.isidentifier() and name not in _NOT_KEPT}
    kept |= {INSIDE: "1", "PATH": f"{environment.get('PATH', os.defpath)}:/usr/sbin:/sbin"}
    (job / "environment").write_text("".join(f"export {name}={shlex.quote(value)}\n" for name, value in kept.items()))


_NOT_KEPT = ("PWD", "OLDPWD", "SHLVL", "_", "P2PVPN_INSIDE_LAB")


def _boot(program: str, job: Path, guest: Guest) -> int:
    errors_r, errors_w = os.pipe()
    argv = [program, f"mem={guest.memory}", "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro"]
    argv += [f"init={job}/boot", "con=null", "con0=null,fd:2" if guest.verbose else "con0=null"]
    argv += ["con1=null,fd:1", f"con2=null,fd:{errors_w}", "ssl=null", "panic=-1", "quiet"]
    kernel = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, pass_fds=[errors_w], start_new_session=True
    )
    os.close(errors_w)
    assert kernel.stdout is not None
    ends = ((kernel.stdout.fileno(), sys.stdout), (errors_r, sys.stderr))
    pumps = [threading.Thread(target=_pump, args=(end, sink.fileno(), kernel), daemon=True) for end, sink in ends]
    sys.stdout.flush()
    sys.stderr.flush()
    for pump in pumps:
        pump.start()
    try:
        kernel.wait(guest.timeout_s + BOOT_S)
        return int((job / "status").read_text())
    except subprocess.TimeoutExpired:
        return TIMED_OUT
    except (OSError, ValueError):
        return GUEST_DIED
    finally:
        if kernel.poll() is None:
            os.killpg(kernel.pid, signal.SIGKILL)
            kernel.wait()
        for pump in pumps:
            pump.join(2.0)
        kernel.stdout.close()
        os.close(errors_r)


def _pump(source: int, sink: int, kernel: subprocess.Popen[bytes]) -> None:
    """Hand on what the guest writes; when nobody wants it any more, end the guest."""
    try:
        while data := os.read(source, _PIECE):
            while data:
                data = data[os.write(sink, data) :]
    except OSError:
        if kernel.poll() is None:
            os.killpg(kernel.pid, signal.SIGKILL)
