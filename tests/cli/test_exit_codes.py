"""docs/errors.md says the exit codes that the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from p2pvpn.cli import main
from p2pvpn.core.errors import Fault, LocalError, P2pvpnError, RemoteError, TrustError, WireError

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"
ROW = re.compile(r"\| (\d+) \| ([A-Z_]+) \|")


def test_the_table_is_the_code() -> None:
    table = {name: int(code) for code, name in ROW.findall(PAGE.read_text(encoding="utf-8"))}
    code = {fault.name: int(fault) for fault in Fault}
    code |= {"OK": 0, "USAGE": main.EXIT_USAGE}
    code |= {"INTERRUPTED": main.EXIT_INTERRUPTED, "BROKEN_PIPE": main.EXIT_BROKEN_PIPE}
    assert table == code


def test_an_error_has_the_fault_of_its_kind_unless_it_says_another() -> None:
    assert P2pvpnError("x").fault is LocalError("x").fault is RemoteError("x").fault is Fault.FAILED
    assert WireError("x").fault is TrustError("x").fault is Fault.REFUSED
    assert TrustError("x", fault=Fault.UNREACHABLE).fault is Fault.UNREACHABLE


def test_ctrl_c_while_a_command_is_still_loading_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main.LazyGroup, "get_command", interrupted)
    monkeypatch.setattr("sys.argv", ["p2pvpn", "status"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == main.EXIT_INTERRUPTED
    assert capsys.readouterr().err.startswith("error: interrupted")
