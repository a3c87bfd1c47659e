"""State on disk: whole or not at all, readable by its owner, owned by one daemon."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pvpn.core.errors import LocalError
from p2pvpn.core.ids import NetworkId
from p2pvpn.host.store import (
    DirectoryStore,
    StateLock,
    find_network,
    list_networks,
    network_directory,
    runtime_root,
    state_root,
)

ONE, TWO = NetworkId(bytes([0xAB] * 32)), NetworkId(bytes([0xAC] * 32))


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_what_was_written_is_read_by_a_later_store(tmp_path):
    DirectoryStore(tmp_path / "net").write("member", b"one")
    store = DirectoryStore(tmp_path / "net")
    assert store.read("member") == b"one"
    store.write("member", b"two")
    assert store.read("member") == b"two"
    assert store.names() == ["member"]
    store.delete("member")
    store.delete("member")
    assert store.read("member") is None


def test_secrets_and_the_directory_are_for_the_owner_alone(tmp_path):
    store = DirectoryStore(tmp_path / "net")
    store.write("key", b"k", secret=True)
    store.write("document", b"d")
    assert mode_of(tmp_path / "net") == 0o700
    assert mode_of(tmp_path / "net" / "key") == 0o600
    assert mode_of(tmp_path / "net" / "document") == 0o644
    store.write("document", b"now a secret", secret=True)
    assert mode_of(tmp_path / "net" / "document") == 0o600


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "../key", "a\0b", "x" * 129, "a b", "a\n"])
def test_a_name_cannot_leave_the_directory(tmp_path, name):
    store = DirectoryStore(tmp_path)
    for use in (store.read, store.delete, lambda name: store.write(name, b"")):
        with pytest.raises(LocalError):
            use(name)


@settings(deadline=None)
@given(data=st.binary(max_size=5000))
def test_any_content_survives(tmp_path_factory, data):
    store = DirectoryStore(tmp_path_factory.getbasetemp() / "any")
    store.write("file", data)
    assert store.read("file") == data


def test_leftovers_of_a_crash_are_removed_and_files_under_way_are_not(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / f".key.{gone.pid}.tmp").write_bytes(b"half")
    (tmp_path / f".key.{os.getppid()}.tmp").write_bytes(b"under way")
    (tmp_path / "key").write_bytes(b"whole")
    store = DirectoryStore(tmp_path)
    assert store.read("key") == b"whole"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [f".key.{os.getppid()}.tmp", "key"]
    assert store.names() == ["key"]


def test_a_directory_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(LocalError, match="cannot use"):
        DirectoryStore(tmp_path / "file" / "net")


FULL_DISK = """
import os, sys
from pathlib import Path
from p2pvpn.core.errors import LocalError
from p2pvpn.host.store import DirectoryStore
root = Path(sys.argv[1])
store = DirectoryStore(root / "net")
store.write("document", b"old" * 1000)
for size in (70_000, 1_000_000):
    try:
        store.write("document", bytes(size))
    except LocalError as refusal:
        print(refusal, "|", refusal.hint)
    assert store.read("document") == b"old" * 1000
    assert os.listdir(root / "net") == ["document"], os.listdir(root / "net")
store.write("document", b"new")
assert store.read("document") == b"new"
"""


@pytest.mark.netns
def test_on_a_full_disk_the_old_content_stands(tmp_path):
    script = 'mount -t tmpfs -o size=64k tmpfs "$0" && exec "$1" -c "$2" "$0"'
    done = subprocess.run(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", script, tmp_path, sys.executable, FULL_DISK],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    said = "cannot write document: No space left on device | free some space and try again; nothing was changed"
    assert done.stdout.splitlines() == [said] * 2


def test_one_daemon_owns_the_state(tmp_path):
    with StateLock(tmp_path), pytest.raises(LocalError, match="another p2pvpn daemon"):
        StateLock(tmp_path)
    StateLock(tmp_path).close()


def test_the_lock_ends_with_its_process(tmp_path):
    code = "import sys; from pathlib import Path; from p2pvpn.host.store import StateLock; StateLock(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, timeout=30)
    StateLock(tmp_path).close()


def test_networks_are_listed_and_found_by_name_or_id(tmp_path):
    assert list_networks(tmp_path) == []
    with pytest.raises(LocalError, match="in no network"):
        find_network(tmp_path)
    home = network_directory(tmp_path, ONE, "home")
    home.open().write("member", b"")
    assert home.path == tmp_path / "networks" / "abababababababab-home"
    assert find_network(tmp_path) == home
    work = network_directory(tmp_path, TWO, "work")
    work.open()
    (tmp_path / "networks" / "something else").mkdir()
    assert list_networks(tmp_path) == [home, work]
    assert find_network(tmp_path, "work") == work
    assert find_network(tmp_path, "ABAB") == home
    assert network_directory(tmp_path, ONE, "another-name") == home
    for wanted in (None, "acme", "ab"):
        with pytest.raises(LocalError):
            find_network(tmp_path, wanted)


@pytest.mark.parametrize("name", ["", "Home", "a/b", "..", "-x", "x" * 64])
def test_a_network_name_is_a_label(tmp_path, name):
    with pytest.raises(LocalError, match="not a network name"):
        network_directory(tmp_path, ONE, name)


def test_the_roots_can_be_moved(monkeypatch):
    monkeypatch.delenv("P2PVPN_STATE_DIR", raising=False)
    monkeypatch.setenv("P2PVPN_RUNTIME_DIR", "/elsewhere")
    assert (str(state_root()), str(runtime_root())) == ("/var/lib/p2pvpn", "/elsewhere")
