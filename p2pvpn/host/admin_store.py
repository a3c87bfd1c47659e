"""The admin's files: one directory per network under `admin/` of the state directory, for the admin's eyes only."""

from __future__ import annotations

import os
from pathlib import Path

from p2pvpn.core.errors import Fault, LocalError, P2pvpnError
from p2pvpn.core.secret import Secret
from p2pvpn.identity.admin import NETWORK_FILE, RECOVERY_FILE, ROOT_FILE, AdminNetwork
from p2pvpn.identity.names import require_name

from .store import DirectoryStore, new_store, state_root

FILES = (ROOT_FILE, RECOVERY_FILE, NETWORK_FILE)


def admin_root() -> Path:
    """`admin/` of $P2PVPN_STATE_DIR if that is set, else of the user's own data directory."""
    if "P2PVPN_STATE_DIR" in os.environ:
        return state_root() / "admin"
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "p2pvpn" / "admin"


class AdminStore:
    """One network's admin files."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = admin_root() / name

    @classmethod
    def new(cls, name: str) -> AdminStore:
        """For a network that is not there yet. Raises LocalError."""
        store = cls(require_name(name))
        if (store.path / NETWORK_FILE).exists():
            raise LocalError(f"network {name} exists in {store.path}", hint="choose another name", fault=Fault.REFUSED)
        if store.path.exists():
            raise LocalError(
                f"{store.path} is in the way: no network is whole in it",
                hint="look at what is in it and move it away",
                fault=Fault.STATE,
            )
        return store

    @classmethod
    def all(cls) -> list[AdminStore]:
        """Every network administered here, by name."""
        root = admin_root()
        names = sorted(path.parent.name for path in root.glob(f"*/{NETWORK_FILE}")) if root.is_dir() else []
        return [cls(name) for name in names]

    @classmethod
    def find(cls, name: str | None) -> AdminStore:
        """The network of this name, or the only one. Raises LocalError."""
        stores = cls.all()
        found = [store for store in stores if name in (None, store.name)]
        if len(found) == 1:
            return found[0]
        if not stores:
            raise LocalError("no network is administered here", hint="p2pvpn network create NAME makes one")
        names = ", ".join(store.name for store in stores)
        if name is not None:
            raise LocalError(
                f"no network {name!r} is administered here", hint=f"there are: {names}", fault=Fault.REFUSED
            )
        raise LocalError("which network?", hint=f"say it with --network: {names}", fault=Fault.REFUSED)

    def load(self, passphrase: Secret) -> AdminNetwork:
        """Raises LocalError for a wrong passphrase or damaged files."""
        store = DirectoryStore(self.path)
        files = {name: data for name in FILES if (data := store.read(name)) is not None}
        try:
            return AdminNetwork.from_files(files, passphrase, os.urandom)
        except P2pvpnError as problem:
            hint = problem.hint or f"type it once more, or put back a copy of {self.path}"
            raise LocalError(str(problem), hint=hint, fault=problem.fault) from None

    def save(self, admin: AdminNetwork, passphrase: Secret) -> None:
        """Write a new network whole, of a known one what changed. Raises LocalError; nothing is changed then."""
        files = admin.to_files(passphrase)
        if self.path.exists():
            DirectoryStore(self.path).write(NETWORK_FILE, files[NETWORK_FILE], secret=True)
            return
        with new_store(self.path) as store:
            for name, data in files.items():
                store.write(name, data, secret=True)
