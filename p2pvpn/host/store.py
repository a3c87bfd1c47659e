"""Where state lives on disk: one directory per network, files that are replaced whole or not at all.

    /var/lib/p2pvpn/                            state_root(), or $P2PVPN_STATE_DIR
        lock                                    held by the daemon
        networks/<16 hex of network id>-<name>/ one DirectoryStore
            <file>                              0644, secrets 0600, all under a directory of 0700

A write goes to a temporary file beside its target, which is synced, renamed over the target, and the directory synced:
after a crash or on a full disk the old content or the new one is there, never a part.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from p2pvpn.core.errors import Fault, LocalError
from p2pvpn.core.ids import NetworkId

ID_DIGITS = 16
"""Hex digits of the network ID in a directory's name: 64 bits, so that no second network has them by chance."""

_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_NETWORK_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_NETWORK_DIRECTORY = re.compile(rf"([0-9a-f]{{{ID_DIGITS}}})-({_NETWORK_NAME.pattern})")
_TEMPORARY = re.compile(r"\..*\.(\d+)\.tmp")
_ELSEWHERE = "P2PVPN_STATE_DIR names another place for p2pvpn's files"
_HINTS = {
    errno.ENOSPC: "free some space and try again; nothing was changed",
    errno.EDQUOT: "free some space and try again; nothing was changed",
    errno.EACCES: f"try again with sudo; {_ELSEWHERE}",
    errno.EPERM: f"try again with sudo; {_ELSEWHERE}",
    errno.EROFS: f"the disk is mounted read-only; {_ELSEWHERE}",
    errno.ENOTDIR: _ELSEWHERE,
    errno.EEXIST: _ELSEWHERE,
}


def state_root() -> Path:
    """Where state lives: $P2PVPN_STATE_DIR, or /var/lib/p2pvpn."""
    return Path(os.environ.get("P2PVPN_STATE_DIR") or "/var/lib/p2pvpn")


def runtime_root() -> Path:
    """Where sockets and pid files live: $P2PVPN_RUNTIME_DIR, or /run/p2pvpn."""
    return Path(os.environ.get("P2PVPN_RUNTIME_DIR") or "/run/p2pvpn")


class DirectoryStore:
    """`mesh.ports.StateStore` on a directory, which is made if it is missing. One thread uses it."""

    def __init__(self, path: Path) -> None:
        """Raises LocalError when the directory cannot be made or read."""
        self.path = path
        with told(f"cannot use {path}"):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.chmod(0o700)
            self._remove_leftovers()

    def read(self, name: str) -> bytes | None:
        with told(f"cannot read {name}"):
            try:
                return self._file(name).read_bytes()
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes, *, secret: bool = False) -> None:
        target = self._file(name)
        temporary = self.path / f".{name}.{os.getpid()}.tmp"
        with told(f"cannot write {name}"):
            try:
                _write_synced(temporary, data, 0o600 if secret else 0o644)
                temporary.replace(target)
            except OSError:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise
            _sync_directory(self.path)

    def delete(self, name: str) -> None:
        target = self._file(name)
        with told(f"cannot delete {name}"):
            target.unlink(missing_ok=True)
            _sync_directory(self.path)

    def names(self) -> list[str]:
        """The files that are there, sorted."""
        with told(f"cannot list {self.path}"):
            return sorted(entry.name for entry in self.path.iterdir() if _FILE_NAME.fullmatch(entry.name))

    def _file(self, name: str) -> Path:
        if not _FILE_NAME.fullmatch(name):
            raise LocalError(f"{name!r} is not a name for a state file")
        return self.path / name

    def _remove_leftovers(self) -> None:
        """Temporary files of processes that are gone; those of living ones are being written."""
        for entry in _leftovers(self.path):
            entry.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class NetworkDirectory:
    """A network that this machine has state of. `id_prefix` is the first 16 hex digits of its ID."""

    id_prefix: str
    name: str
    path: Path

    def open(self) -> DirectoryStore:
        return DirectoryStore(self.path)


def network_directory(root: Path, network: NetworkId, name: str) -> NetworkDirectory:
    """Where the network's state lives or will live; the name on disk wins if it is there already. Raises LocalError."""
    prefix = network.hex()[:ID_DIGITS]
    for known in list_networks(root):
        if known.id_prefix == prefix:
            return known
    if not _NETWORK_NAME.fullmatch(name):
        raise LocalError(
            f"{name!r} is not a network name",
            hint="use small letters, digits and hyphens, 63 characters at most",
            fault=Fault.REFUSED,
        )
    return NetworkDirectory(prefix, name, root / "networks" / f"{prefix}-{name}")


@contextmanager
def new_store(target: Path) -> Iterator[DirectoryStore]:
    """A store for all the files of a directory that is not there yet; it is there, whole, when the block ends.

    When the block raises, or the process dies in it, the directory is not there at all. Raises LocalError.
    """
    if target.exists():
        raise LocalError(f"{target} exists", fault=Fault.STATE)
    _remove_dead(target.parent)
    making = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    store = DirectoryStore(making)
    try:
        yield store
        with told(f"cannot make {target}"):
            making.rename(target)
            _sync_directory(target.parent)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise


def delete_network(network: NetworkDirectory) -> None:
    """All of it is gone at once, even if the process dies before the last file is. Raises LocalError."""
    _remove_dead(network.path.parent)
    leaving = network.path.with_name(f".{network.path.name}.{os.getpid()}.tmp")
    with told(f"cannot delete {network.path}"):
        network.path.rename(leaving)
        _sync_directory(leaving.parent)
        shutil.rmtree(leaving)


def _remove_dead(parent: Path) -> None:
    """Directories that dead processes were about to make or delete."""
    with told(f"cannot list {parent}"), suppress(FileNotFoundError):
        for entry in _leftovers(parent):
            shutil.rmtree(entry, ignore_errors=True)


def list_networks(root: Path) -> list[NetworkDirectory]:
    """The networks that have state under `root`, by name."""
    with told(f"cannot list {root}"):
        try:
            entries = list((root / "networks").iterdir())
        except FileNotFoundError:
            return []
    matches = ((_NETWORK_DIRECTORY.fullmatch(entry.name), entry) for entry in entries)
    found = [NetworkDirectory(match[1], match[2], entry) for match, entry in matches if match and entry.is_dir()]
    return sorted(found, key=lambda network: (network.name, network.id_prefix))


def find_network(root: Path, wanted: str | None = None) -> NetworkDirectory:
    """The network of this name or ID prefix (4 digits at least); without `wanted`, the only one. Raises LocalError."""
    known = list_networks(root)
    if wanted is None:
        found = known
    else:
        found = [n for n in known if wanted == n.name or (len(wanted) >= 4 and n.id_prefix.startswith(wanted.lower()))]
    if len(found) == 1:
        return found[0]
    names = ", ".join(f"{network.name} ({network.id_prefix})" for network in known)
    if not known:
        raise LocalError(
            "this machine is in no network",
            hint="p2pvpn join TOKEN, or p2pvpn network create NAME",
            fault=Fault.REFUSED,
        )
    if not found:
        raise LocalError(f"no network {wanted!r} here", hint=f"there are: {names}", fault=Fault.REFUSED)
    raise LocalError("more than one network fits", hint=f"name one of: {names}", fault=Fault.REFUSED)


class StateLock:
    """Held as long as one daemon owns the state directory; the kernel drops it when the process ends."""

    def __init__(self, root: Path) -> None:
        """Raises LocalError when another process holds it."""
        with told(f"cannot use {root}"):
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise LocalError(
                f"another p2pvpn daemon uses {root}", hint="p2pvpn down ends it", fault=Fault.MACHINE
            ) from None

    def close(self) -> None:
        """Let another daemon have the directory."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> StateLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def told(what: str) -> Iterator[None]:
    """Operating system errors of the block as LocalError, with what can be done about them."""
    try:
        yield
    except OSError as problem:
        raise LocalError(
            f"{what}: {problem.strerror or problem}",
            hint=_HINTS.get(problem.errno or 0, ""),
            fault=Fault.NOT_ALLOWED if isinstance(problem, PermissionError) else Fault.STATE,
        ) from problem


def _write_synced(path: Path, data: bytes, mode: int) -> None:
    with suppress(FileNotFoundError):
        path.unlink()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        os.fchmod(fd, mode)
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _leftovers(directory: Path) -> list[Path]:
    matches = ((_TEMPORARY.fullmatch(entry.name), entry) for entry in directory.iterdir())
    return [entry for match, entry in matches if match and _is_left(int(match[1]))]


def _is_left(pid: int) -> bool:
    return pid == os.getpid() or not _is_alive(pid)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
