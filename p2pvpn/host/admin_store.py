"""The admin's files: one directory per network under `admin/` of the state directory, for the admin's eyes only."""

from __future__ import annotations

import os
from pathlib import Path

from p2pvpn.core.errors import LocalError
from p2pvpn.core.secret import Secret
from p2pvpn.identity.admin import NETWORK_FILE, RECOVERY_FILE, ROOT_FILE, AdminNetwork
from p2pvpn.identity.names import require_name

from .store import DirectoryStore, state_root

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
            raise LocalError(f"network {name} exists in {store.path}", hint="choose another name")
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
        raise LocalError(f"which network? this machine administers {names}", hint="say it with --network NAME")

    def load(self, passphrase: Secret) -> AdminNetwork:
        """Raises LocalError for a wrong passphrase or damaged files."""
        store = DirectoryStore(self.path)
        files = {name: data for name in FILES if (data := store.read(name)) is not None}
        return AdminNetwork.from_files(files, passphrase, os.urandom)

    def save(self, admin: AdminNetwork, passphrase: Secret) -> None:
        """Write what changed; a recovery key that was moved away stays away. Raises LocalError."""
        store = DirectoryStore(self.path)
        for name, data in admin.to_files(passphrase).items():
            if name == NETWORK_FILE or store.read(name) is None:
                store.write(name, data, secret=True)
