"""Pages about IKE say what is true: tests that they name exist, diagrams are those of the tables."""

from __future__ import annotations

import re
from pathlib import Path

from tools import ike_states

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_states_page_is_that_of_the_tables():
    assert ike_states.PAGE.read_text() == ike_states.page(), "python -m tools.ike_states"


def test_every_line_of_the_conformance_page_has_a_status_and_tests_that_exist():
    known = set()
    for file in (ROOT / "tests").rglob("test_*.py"):
        known |= set(re.findall(r"^ *(?:async )?def (test_\w+)", file.read_text(), re.MULTILINE))
    lines = [one for one in (ROOT / "docs" / "conformance.md").read_text().splitlines() if one.startswith("| ")]
    rows = [[cell.strip() for cell in one.strip("|").split("|")] for one in lines if not one.startswith("| what")]
    assert len(rows) > 40
    for what, status, tests in rows:
        assert status.startswith(("done", "deviates", "not done")), what
        named = [one for one in tests.split(", ") if one]
        assert bool(named) != status.startswith("not done"), what
        assert set(named) <= known, (what, set(named) - known)
