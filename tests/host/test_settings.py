"""What the owner of a machine sets: kept, checked, and told in words when it is not good."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pvpn.core.address import Endpoint
from p2pvpn.core.errors import Fault, LocalError
from p2pvpn.host.settings import FILE, MAX_DECLARED, MachineSettings, declared


def test_settings_survive_and_have_defaults(tmp_path: Path) -> None:
    assert MachineSettings.load(tmp_path) == MachineSettings((), port_mapping=True)
    settings = MachineSettings((Endpoint("203.0.113.7", 4500), Endpoint("2001:db8::7", 4500)), port_mapping=False)
    settings.save(tmp_path)
    assert MachineSettings.load(tmp_path) == settings


@pytest.mark.parametrize(
    "text",
    [
        "",
        "router.example:4500",
        "203.0.113.7",
        "203.0.113.7:0",
        "203.0.113.7:70000",
        "127.0.0.1:4500",
        "0.0.0.0:4500",
        "224.0.0.1:4500",
        "[fe80::1]:4500",
        "[::]:4500",
        "2001:db8::7:4500",
    ],
)
def test_what_no_peer_could_use_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(LocalError) as refused:
        declared([text])
    assert refused.value.fault is Fault.REFUSED
    assert "203.0.113.7:4500" in refused.value.hint


def test_few_addresses_are_declared_and_each_once() -> None:
    assert declared(["203.0.113.7:4500", "203.0.113.7:4500"]) == (Endpoint("203.0.113.7", 4500),)
    with pytest.raises(LocalError, match="at most"):
        declared([f"203.0.113.{number}:4500" for number in range(1, MAX_DECLARED + 2)])


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"declared": ["nonsense"], "port_mapping": true}', '{"declared": []}', "null"]
)
def test_a_damaged_file_is_told_of(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(LocalError) as problem:
        MachineSettings.load(tmp_path)
    assert problem.value.fault is Fault.STATE
