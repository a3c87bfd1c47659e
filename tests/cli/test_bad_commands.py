"""Every command, typed wrong: one sentence, a hint, an exit code, and nothing is lost. No daemon is needed here."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pvpn.core.errors import Fault

from .machines import Machine, new_admin, refused, short_directory, snapshot


@pytest.fixture(scope="module")
def world() -> Iterator[tuple[Machine, tuple[str, str], Machine, str, str]]:
    """An admin, the passphrase's option, a machine with a request, its request and the grant."""
    with short_directory() as root:
        admin, secret = new_admin(root / "admin")
        member = Machine(root / "member")
        request = member.ok("request").word
        grant = admin.ok("grant", request, "--name", "hub1", "--hub", "192.0.2.1", "--issuer", *secret).word
        yield admin, secret, member, request, grant


@pytest.fixture
def machine() -> Iterator[Machine]:
    with short_directory() as root:
        yield Machine(root)


@pytest.fixture
def copies(world, machine) -> tuple[Machine, Machine]:
    """The admin and the member of `world`, to be ruined."""
    admin = Machine(machine.root / "admin")
    member = Machine(machine.root / "member")
    shutil.copytree(world[0].state, admin.state)
    shutil.copytree(world[2].state, member.state)
    return admin, member


TICKETS = {
    "nonsense": ("garbage", "neither a token nor a grant"),
    "nothing": ("", "neither a token nor a grant"),
    "a token cut short": ("p2pvpn:abcd", "cut off"),
    "a grant cut short": ("p2pvpn-grant:AAAA", "cut off"),
    "a request in place of a grant": ("p2pvpn-request:AAAA", "neither a token nor a grant"),
    "control characters": ("p2pvpn:\x1b[31m\x07", "character"),
    "another alphabet": ("p2pvpn-grant:äöü", "character"),
}


@pytest.mark.parametrize("case", TICKETS)
def test_a_ticket_that_is_none_is_refused_and_leaves_nothing(machine, case):
    text, said = TICKETS[case]
    refused(machine.run("join", "--no-up", text), Fault.REFUSED, said)
    assert snapshot(machine.state) == {}


def test_a_damaged_or_cut_grant_is_refused_at_every_place(world, copies):
    _, _, _, _, grant = world
    _, member = copies
    before = snapshot(member.state)
    for text in (grant[:-1], grant[:200], grant[:300] + "A" + grant[301:] if grant[300] != "A" else grant[:-2]):
        refused(member.run("join", "--no-up", text), Fault.REFUSED)
    assert snapshot(member.state) == before


def test_a_grant_for_another_machine_is_refused(world, machine):
    refused(machine.run("join", "--no-up", world[4]), Fault.REFUSED, "no request of this machine waits")
    machine.ok("request")
    before = snapshot(machine.state)
    refused(machine.run("join", "--no-up", world[4]), Fault.REFUSED, "does not answer this machine's request")
    assert snapshot(machine.state) == before


def test_a_grant_is_joined_once_more_without_harm_and_never_for_an_older_one(world, copies):
    _, secret, _, request, grant = world
    admin, member = copies
    member.ok("join", "--no-up", grant)
    once = snapshot(member.state)
    member.ok("join", "--no-up", grant)
    assert snapshot(member.state) == once
    time.sleep(1.1)  # certificates count in seconds
    newer = admin.ok("grant", request, "--name", "hub1", "--hub", "192.0.2.1,192.0.2.9", "--issuer", *secret).word
    member.ok("join", "--no-up", newer)
    twice = snapshot(member.state)
    refused(member.run("join", "--no-up", grant), Fault.REFUSED, "older")
    assert snapshot(member.state) == twice


def test_a_grant_of_another_network_makes_a_second_membership_only_for_its_own_request(world, copies, machine):
    _, _, _, request, grant = world
    _, member = copies
    other, secret = new_admin(machine.root / "other")
    foreign = other.ok("grant", request, "--name", "x", *secret).word
    member.ok("join", "--no-up", grant)
    before = snapshot(member.state)
    refused(member.run("join", "--no-up", foreign), Fault.REFUSED, "no request of this machine waits")
    assert snapshot(member.state) == before


BAD_GRANTS = {
    "no request": (["nonsense", "--name", "x"], "not a request"),
    "a request cut short": (["p2pvpn-request:AAA", "--name", "x"], "cut off"),
    "no name": (["NEW"], "--name"),
    "a path for a name": (["REQUEST", "--name", "../x"], "cannot be a name"),
    "an empty name": (["REQUEST", "--name", ""], "cannot be a name"),
    "a name with an escape": (["REQUEST", "--name", "x\x1b[2J"], "cannot be a name"),
    "a name too long": (["REQUEST", "--name", "n" * 64], "cannot be a name"),
    "capitals": (["REQUEST", "--name", "Hub"], "cannot be a name"),
    "an empty hub": (["REQUEST", "--name", "h", "--hub", ""], "empty"),
    "a hub with a space": (["REQUEST", "--name", "h", "--hub", "a b"], "not an address"),
    "a hub with an odd port": (["REQUEST", "--name", "h", "--hub", "h:99999"], "not a port"),
    "half a bracket": (["REQUEST", "--name", "h", "--hub", "[::1"], "not an address"),
    "a hub without end": (["REQUEST", "--name", "h", "--hub", "h" * 400], "not an address"),
    "an issuer that is no hub": (["REQUEST", "--name", "h", "--issuer"], "has to be a hub"),
    "no prefix": (["REQUEST", "--name", "g", "--prefix", "abc"], "not a prefix"),
    "a prefix with host bits": (["REQUEST", "--name", "g", "--prefix", "10.0.0.1/8"], "not a prefix"),
    "everything for a prefix": (["REQUEST", "--name", "g", "--prefix", "0.0.0.0/0"], "overlaps"),
    "a group of two words": (["REQUEST", "--name", "g", "--group", "a b"], "cannot be a group"),
    "another network": (["REQUEST", "--name", "g", "--network", "elsewhere"], "no network 'elsewhere'"),
}


@pytest.mark.parametrize("case", BAD_GRANTS)
def test_a_grant_that_cannot_be_is_refused_and_the_ledger_stands(world, machine, case):
    admin, secret, _, request, _ = world
    words = {"REQUEST": request}
    if case == "no name":  # of a machine that was granted before the name is known
        words["NEW"] = machine.ok("request").word
    arguments, said = BAD_GRANTS[case]
    before = snapshot(admin.state)
    refused(admin.run("grant", *(words.get(word, word) for word in arguments), *secret), Fault.REFUSED, said)
    assert snapshot(admin.state) == before


@pytest.mark.parametrize("member", ["nobody", "../../etc", "", "f" * 40])
def test_an_unknown_member_is_neither_revoked_nor_granted_again(world, member):
    admin, secret, *_ = world
    before = snapshot(admin.state)
    if member != "f" * 40:  # any peer ID may be revoked: issuers certify members that the admin never saw
        refused(admin.run("revoke", member, *secret), Fault.REFUSED, "not granted here")
    refused(admin.run("regrant", member, *secret), Fault.REFUSED, "not granted here")
    assert snapshot(admin.state) == before


def test_a_wrong_passphrase_is_refused_wherever_it_comes_from(world, tmp_path):
    admin, _, _, request, _ = world
    before = snapshot(admin.state)
    for content, said in ((b"wrong\n", "wrong passphrase"), (b"", "empty"), (b"\xff\xfe\x00", "wrong passphrase")):
        file = tmp_path / "passphrase"
        file.write_bytes(content)
        refused(admin.run("grant", request, "--name", "x", "--passphrase-file", str(file)), Fault.REFUSED, said)
    refused(admin.run("revoke", "hub1", stdin="wrong\n"), Fault.REFUSED, "wrong passphrase")
    refused(admin.run("network", "create", "new"), Fault.REFUSED, "empty")
    assert snapshot(admin.state) == before


@pytest.mark.parametrize("name", ["../x", "", "a/b", "A", "-a", "x" * 64, "ü", "a\nb", "."])
def test_a_network_has_an_ordinary_name(machine, name):
    refused(machine.run("network", "create", "--", name, stdin="secret\n"), Fault.REFUSED, "name")
    assert snapshot(machine.root) == {}


def test_a_network_is_made_once(world):
    admin, secret, *_ = world
    before = snapshot(admin.state)
    refused(admin.run("network", "create", "home", *secret), Fault.REFUSED, "exists")
    assert snapshot(admin.state) == before


@pytest.mark.parametrize(
    ("file", "damage"), [("root.pem", "cut"), ("recovery.pem", "empty"), ("network", "garbage"), ("network", "cut")]
)
def test_damaged_admin_files_are_said_and_left_as_they_are(world, copies, file, damage):
    _, secret, _, request, _ = world
    admin, _ = copies
    ruin(admin.state / "admin" / "home" / file, damage)
    before = snapshot(admin.state)
    outcome = admin.run("grant", request, "--name", "x", *secret)
    refused(outcome, Fault.STATE if file != "root.pem" else Fault.REFUSED, "copy of")
    assert snapshot(admin.state) == before


@pytest.mark.parametrize("damage", ["empty", "cut"])
def test_a_damaged_waiting_key_is_said(world, copies, damage):
    _, member = copies
    ruin(member.state / "pending" / "key.pem", damage)
    before = snapshot(member.state)
    refused(member.run("request"), Fault.STATE, "damaged", "delete it")
    refused(member.run("join", "--no-up", world[4]), Fault.STATE, "damaged", "delete it")
    assert snapshot(member.state) == before


@pytest.mark.parametrize(
    ("file", "damage"),
    [("key.pem", "cut"), ("genesis", "garbage"), ("document", "empty"), ("chain", "gone"), ("chain", "cut")],
)
def test_damaged_membership_is_said_with_a_way_out(world, copies, file, damage):
    _, _, _, _, grant = world
    _, member = copies
    member.ok("join", "--no-up", grant)
    ruin(member.network / file, damage)
    before = snapshot(member.state)
    refused(member.run("join", "--no-up", grant), Fault.STATE, "p2pvpn leave --network")
    assert snapshot(member.state) == before
    member.ok("leave", "--yes")
    assert not list((member.state / "networks").iterdir())


def ruin(path: Path, damage: str) -> None:
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "garbage": os.urandom(300)}[damage])


def test_without_a_daemon_commands_that_ask_it_say_how_to_start_it(machine):
    for arguments in (["status"], ["peers"], ["ping", "x"], ["forget", "x"], ["events"], ["netcheck"], ["invite", "x"]):
        refused(machine.run(*arguments), Fault.NOT_RUNNING, "p2pvpn up")
    outcome = machine.ok("down")
    assert outcome.out == "p2pvpn was not up\n"
    refused(machine.run("leave", "--yes"), Fault.REFUSED, "in no network")


def test_a_state_directory_that_is_a_file_or_cannot_be_written_is_said(machine):
    machine.state.write_text("a file")
    refused(machine.run("request"), Fault.STATE, "P2PVPN_STATE_DIR")
    refused(machine.run("network", "create", "x", stdin="secret\n"), Fault.STATE, "P2PVPN_STATE_DIR")
    refused(machine.run("leave", "--yes"), Fault.STATE, "P2PVPN_STATE_DIR")
    if os.geteuid() == 0:
        stranger = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
        machine.root.chmod(0o755)
        machine.state.unlink()
        machine.state.mkdir(mode=0o700)
        refused(machine.run("request", prefix=stranger), Fault.NOT_ALLOWED, "try again with sudo")


@pytest.mark.parametrize("arguments", [["nonsense"], ["join"], ["ping", "x", "--count", "0"], ["up", "--port", "0"]])
def test_a_command_line_that_is_none_ends_with_2(machine, arguments):
    outcome = machine.run(*arguments)
    assert outcome.code == 2
    assert "Usage:" in outcome.err
    assert "Traceback" not in outcome.err


def test_keys_are_for_their_owner_only(world, copies):
    admin, member = copies
    member.ok("join", "--no-up", world[4])
    secrets = [*admin.state.rglob("*.pem"), *member.state.rglob("key.pem")]
    assert len(secrets) == 3
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in secrets)


def test_a_reader_that_goes_away_is_no_error(machine):
    done = subprocess.run(
        ["sh", "-c", '"$0" -m p2pvpn.cli.main --help | true', sys.executable],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **machine.environment},
    )
    assert done.stderr == ""
