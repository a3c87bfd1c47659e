"""The tests beside this one, on a kernel that has ESP: in two guests at once, since a guest has one CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from p2pvpn.lab import uml

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
GUESTS = (("test_planes.py",), ("test_death.py", "test_kernel.py", "test_charon.py"))
SECONDS = 600

pytestmark = [
    pytest.mark.netns,
    pytest.mark.slow,
    pytest.mark.timeout(SECONDS + 90),
    pytest.mark.skipif(uml.is_inside(), reason="this is the guest"),
]


def begin(*arguments: str) -> subprocess.Popen[str]:
    """pytest in a guest."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    runner = [sys.executable, str(ROOT / "tools" / "uml-run"), "-t", str(SECONDS), "-C", str(ROOT), "--", *command]
    return subprocess.Popen(runner, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_the_kernel_plane_passes_in_user_mode_linux() -> None:
    guests = [begin(*(str(HERE / file) for file in files)) for files in GUESTS]
    outputs = [guest.communicate()[0] for guest in guests]
    assert [guest.returncode for guest in guests] == [0, 0], "\n".join(outputs)
    assert all(" passed" in output for output in outputs), outputs


@pytest.mark.campaign
def test_a_network_on_the_kernel_plane_passes_in_user_mode_linux() -> None:
    guest = begin(str(HERE / "test_network.py"))
    output, _ = guest.communicate()
    assert guest.returncode == 0, output
