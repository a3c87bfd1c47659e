"""Two machines on one LAN, behind a router that turns no packet around: they use the LAN."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pvpn.lab.nat import NatKind
from p2pvpn.lab.net import Lab
from p2pvpn.lab.stage import Stage

from .meeting import found_network, join


@pytest.mark.netns
@pytest.mark.timeout(120)
def test_neighbours_behind_a_symmetric_nat_meet_on_their_lan(lab: Lab, tmp_path: Path) -> None:
    nats = dict.fromkeys(("a", "b"), NatKind.SYMMETRIC)
    stage = Stage(lab, tmp_path, hubs=1, nats=nats, rtt_ms=10, plane="user")
    neighbour = stage.neighbour(stage.homes["a"], "c")
    found_network(stage, tmp_path)
    join(stage, stage.a)
    overlay = join(stage, neighbour)
    assert stage.a.ping(overlay, wait_s=5.0)

    def direct() -> bool:
        return stage.path(stage.a, "c") == stage.path(neighbour, "a") == "direct"

    stage.wait("a direct path", direct, 15.0, lambda: str(stage.path(stage.a, "c")), stage.a, neighbour)
    (row,) = [peer for peer in stage.ask(stage.a, "peers") if peer["name"] == "c"]
    assert row["remote"] == "192.168.1.3:4500"
    assert len(stage.a.ping(overlay, count=5)) == 5
