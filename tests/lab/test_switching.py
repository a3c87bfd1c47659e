"""Relay to direct and back at 1,000 packets a second each way; `make upgrades` does it twenty times."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pvpn.lab.nat import NatKind
from p2pvpn.lab.net import Lab
from p2pvpn.lab.stage import Stage
from p2pvpn.lab.switching import connect, switch


@pytest.mark.netns
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_upgrades_in_a_row_lose_nothing(lab: Lab, tmp_path: Path) -> None:
    nats = dict.fromkeys(("a", "b"), NatKind.PORT_RESTRICTED)
    stage = Stage(lab, tmp_path, hubs=2, nats=nats, rtt_ms=30, plane="auto")
    rounds = switch(lab, stage, connect(lab, stage), tmp_path, rounds=3, rate=1000)
    assert [one.lost_at_upgrade for one in rounds] == [0, 0, 0]
