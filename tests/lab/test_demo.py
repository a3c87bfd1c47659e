"""`p2pvpn demo`, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from p2pvpn.lab.nat import NatKind, direct_possible

FIELDS = [
    "hubs",
    "nat",
    "plane",
    "join_s",
    "first_ping_ms",
    "path_at_first_ping",
    "direct_ms",
    "path",
    "rtt_ms",
    "lost_during_upgrade",
    "on_the_wire",
    "hub_killed",
    "stream_tcp",
    "over",
]


def demo(result: Path, *options: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    argv = [sys.executable, "-m", "p2pvpn.cli.main", "demo", "--json", str(result), *options]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    return done, json.loads(result.read_text()) if result.exists() else {}


@pytest.mark.netns
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_demo_ends_direct_and_loses_nothing(tmp_path: Path) -> None:
    done, figures = demo(tmp_path / "result.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(figures) == FIELDS
    assert figures["nat"] == ["port-restricted", "port-restricted"]
    assert (figures["path_at_first_ping"], figures["path"]) == ("relayed", "direct")
    assert figures["lost_during_upgrade"] == 0
    assert figures["rtt_ms"]["relayed"] >= 3 * figures["rtt_ms"]["direct"]
    assert figures["hub_killed"] == {"lost": 0, "new_connection_ok": True}
    assert list(figures["on_the_wire"]) == ["esp", "ike", "stun", "other_udp", "enrol_tcp", "arp_nd_icmp"]
    assert figures["on_the_wire"]["other_udp"] == 0
    assert figures["on_the_wire"]["esp"] > 1000


@pytest.mark.netns
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_two_symmetric_nats_stay_relayed_and_working(tmp_path: Path) -> None:
    done, figures = demo(tmp_path / "result.json", "--nat-a", "symmetric", "--nat-b", "symmetric", "--hubs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (figures["path_at_first_ping"], figures["path"]) == ("relayed", "relayed")
    assert (figures["direct_ms"], figures["lost_during_upgrade"], figures["rtt_ms"]["direct"]) == (None, None, None)
    assert figures["hub_killed"]["new_connection_ok"] is True
    assert figures["on_the_wire"]["other_udp"] == 0


@pytest.mark.netns
@pytest.mark.timeout(120)
def test_a_step_that_fails_is_told_and_is_the_exit_status(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "ping").write_text("#!/bin/sh\nexit 1\n")
    (programs / "ping").chmod(0o755)
    done, figures = demo(tmp_path / "result.json", PATH=f"{programs}:{os.environ['PATH']}")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "expected the first ping to be answered" in done.stdout
    assert "the end of a's log" in done.stdout
    assert figures["first_ping_ms"] is None


def test_missing_programs_are_named_with_their_packages(tmp_path: Path) -> None:
    done, figures = demo(tmp_path / "result.json", PATH=str(tmp_path))
    assert done.returncode == 1
    assert "apt install" in done.stderr
    assert "nftables" in done.stderr
    assert figures == {}


def test_only_where_ports_do_not_matter_must_a_symmetric_nat_be_passed() -> None:
    assert direct_possible(NatKind.PORT_RESTRICTED, NatKind.PORT_RESTRICTED) is True
    assert direct_possible(NatKind.SYMMETRIC, NatKind.RESTRICTED) is True
    assert direct_possible(NatKind.SYMMETRIC, NatKind.PORT_RESTRICTED) is None
    assert direct_possible(NatKind.SYMMETRIC, NatKind.SYMMETRIC) is False


@pytest.mark.netns
@pytest.mark.campaign
@pytest.mark.timeout(360)
def test_a_random_nat_is_passed_by_the_birthday_method_and_loses_nothing(tmp_path: Path) -> None:
    """On a real kernel's fully random masquerade. One run in fifty does not meet, so there are two."""
    for _ in range(2):
        options = ("--nat-a", "symmetric", "--nat-b", "port-restricted", "--hubs", "2", "--plane", "user")
        done, figures = demo(tmp_path / "result.json", *options)
        assert done.returncode == 0, done.stdout + done.stderr
        if figures["path"] == "direct":
            break
    assert (figures["path_at_first_ping"], figures["path"]) == ("relayed", "direct")
    assert figures["lost_during_upgrade"] == 0
    assert figures["direct_ms"] < 20_000
    assert figures["on_the_wire"]["other_udp"] == 0
