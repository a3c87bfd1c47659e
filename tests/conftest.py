"""Rules for every test: what needs namespaces runs in private ones, and a skipped test is a failed one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest

from p2pvpn.lab.namespace import fork_into_lab, is_inside
from p2pvpn.lab.net import Lab

hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")
"""A busy machine is no fault of an example: pytest's own timeout holds."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Move into a laboratory before the first test, if any of the collected ones is marked `netns`."""
    wanted = any(item.get_closest_marker("netns") for item in session.items)
    if not wanted or is_inside() or session.config.option.collectonly:
        return
    status = fork_into_lab()
    if status is not None:
        os._exit(status)  # the worker has run the tests and told of them


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Nothing is skipped: what cannot run is a failure of the machine, and has to be seen."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and reporter.stats.get("skipped") and session.exitstatus == pytest.ExitCode.OK:
        reporter.write_line("skipped tests count as failures here", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def lab() -> Iterator[Lab]:
    """An empty laboratory: hosts and links as the test adds them."""
    with Lab() as lab:
        yield lab
