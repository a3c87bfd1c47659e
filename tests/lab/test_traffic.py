"""Numbered traffic: what arrives is timed, what does not is missed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from p2pvpn.lab.net import Lab
from p2pvpn.lab.traffic import Flow, Traffic

pytestmark = pytest.mark.netns


def test_1000_packets_a_second_each_way_all_arrive_and_are_timed(lab: Lab, tmp_path: Path) -> None:
    near, far = lab.public("near", "192.0.2.1", delay_s=0.005), lab.public("far", "192.0.2.2", delay_s=0.01)
    traffic = Traffic(((near, "192.0.2.1"), (far, "192.0.2.2")), tmp_path, rate=1000)
    traffic.go()
    time.sleep(2)
    for flow in traffic.stop(0.5):
        assert len(flow.sent_at) == pytest.approx(2000, rel=0.1)
        assert flow.lost() == []
        assert flow.duplicates == 0
        latency = flow.latency_ms()
        assert latency is not None
        assert 15 <= latency < 18


def test_a_cut_is_counted_packet_by_packet(lab: Lab, tmp_path: Path) -> None:
    near, far = lab.public("near", "192.0.2.1"), lab.public("far", "192.0.2.2")
    traffic = Traffic(((near, "192.0.2.1"), (far, "192.0.2.2")), tmp_path, rate=200, answer=True)
    traffic.go()
    time.sleep(0.5)
    cut_at = time.time()
    lab.internet.ip("rule add blackhole priority 1")
    time.sleep(0.5)
    lab.internet.ip("rule del priority 1")
    back_at = time.time()
    time.sleep(0.5)
    there, back = traffic.stop(0.2)
    for flow in (there, back):
        lost = flow.lost()
        assert 50 < len(lost) < 150
        assert all(cut_at - 0.1 <= flow.sent_at[number] <= back_at + 0.1 for number in lost)
        assert flow.longest_gap_s() >= 0.4
    assert back.sent_at[0] >= there.arrived_at[0]


def test_losses_are_counted_from_an_instant_on() -> None:
    flow = Flow(b"", [1.0, 2.0, 3.0, 4.0], {1: 2.5, 3: 4.1}, 0)
    assert flow.lost() == [0, 2]
    assert flow.lost(since=1.5) == [2]
    assert flow.latency_ms({1}) == pytest.approx(500)
    assert flow.latency_ms(set()) is None
