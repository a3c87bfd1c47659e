"""Dropped packets are found where the kernel counted them."""

from __future__ import annotations

import pytest

from p2pvpn.lab import drops
from p2pvpn.lab.net import Lab
from tests.host.peers import link

pytestmark = pytest.mark.netns


def test_what_a_full_socket_and_a_closed_port_dropped_is_told_by_host(lab: Lab) -> None:
    a, b = link(lab)
    with a.socket() as sender, b.socket() as receiver:
        receiver.bind(("192.0.2.20", 7018))
        receiver.setsockopt(1, 8, 0)  # the smallest buffer
        a.ping("192.0.2.20")
        before = drops.counted(lab.nodes)
        assert drops.told(drops.since(before, drops.counted((a, b)))) == "nothing"
        for _ in range(50):
            sender.sendto(bytes(1000), ("192.0.2.20", 7018))
        sender.sendto(b"nobody", ("192.0.2.20", 7019))
        found = drops.since(before, drops.counted(lab.nodes))
        taken = 0
        receiver.setblocking(False)
        while taken < 50:
            try:
                receiver.recv(1000)
            except BlockingIOError:
                break
            taken += 1
    assert found["b", "udp socket 7018 full"] == found["b", "Udp RcvbufErrors"] == 50 - taken > 0
    assert found["b", "Udp NoPorts"] == 1
    assert not [host for host, _ in found if host not in ("b", drops.SHARED)]
    assert f"udp socket 7018 full {50 - taken}" in drops.told(found)
