"""The tests beside this one, on a kernel that has ESP."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from p2pvpn.lab import uml

ROOT = Path(__file__).parents[2]
SECONDS = 1500


@pytest.mark.campaign
@pytest.mark.netns
@pytest.mark.timeout(SECONDS + 90)
@pytest.mark.skipif(uml.is_inside(), reason="this is the guest")
def test_the_kernel_plane_passes_in_user_mode_linux():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/planes", "--ignore", __file__]
    runner = [sys.executable, str(ROOT / "tools" / "uml-run"), "-t", str(SECONDS), "-C", str(ROOT), "--", *command]
    done = subprocess.run(runner, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
