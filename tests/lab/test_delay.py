"""The delay line: accurate, complete, in order, and fast enough."""

from __future__ import annotations

import socket
import statistics
import struct
import time

import pytest

from p2pvpn.lab.net import Lab

pytestmark = pytest.mark.netns


@pytest.mark.parametrize("delay_ms", [2.5, 12.5, 40.0])
def test_a_link_is_as_long_as_it_says(lab: Lab, delay_ms: float) -> None:
    hub = lab.public("hub", "192.0.2.1", delay_s=delay_ms / 1000)
    hub.ping("192.0.2.254")  # ARP
    times = hub.ping("192.0.2.254", count=20, interval_s=0.02)
    assert len(times) == 20
    assert 2 * delay_ms <= min(times)
    assert statistics.median(times) < 2 * delay_ms + 1.5


def test_20_000_packets_a_second_pass_complete_and_in_order(lab: Lab) -> None:
    rate, seconds = 20_000, 2
    node = lab.public("s", "192.0.2.10", delay_s=0.01)
    with node.socket() as sender, lab.internet.socket() as receiver:
        receiver.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
        receiver.bind(("192.0.2.254", 9000))
        receiver.settimeout(1.0)
        sender.connect(("192.0.2.254", 9000))
        sender.setsockopt(socket.SOL_SOCKET, 32, 16 << 20)  # SO_SNDBUFFORCE
        sender.send(b"warm")
        assert receiver.recv(100) == b"warm"
        began = time.monotonic()
        for number in range(rate * seconds):
            sender.send(struct.pack("!I200x", number))
            if number % 20 == 0:
                time.sleep(max(0.0, began + number / rate - time.monotonic()))
        took = time.monotonic() - began
        received = [struct.unpack_from("!I", receiver.recv(300))[0] for _ in range(rate * seconds)]
    assert received == list(range(rate * seconds))
    assert took < seconds * 1.5, "the machine is too busy to send that fast"
