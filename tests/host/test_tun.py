"""TUN devices by themselves."""

from __future__ import annotations

import select

import pytest

from p2pvpn.core.errors import LocalError
from p2pvpn.host.tun import Tun
from tests.esp.packets import ipv4, ones_complement

pytestmark = pytest.mark.netns


@pytest.fixture
def node(lab):
    node = lab.node("h")
    with node.inside():
        yield node


def test_devices_are_numbered_and_vanish_when_closed(node):
    one, other = Tun(), Tun()
    assert (one.name, other.name) == ("p2pvpn0", "p2pvpn1")
    one.close()
    assert "p2pvpn0" not in node.run(["ip", "link"]).stdout
    with pytest.raises(LocalError):
        Tun("p2pvpn1")
    other.close()


def test_the_kernel_answers_a_ping_that_comes_out_of_the_device(node):
    tun = Tun()
    node.ip(f"link set {tun.name} up\naddr add 10.9.0.1/32 dev {tun.name}\nroute add 10.9.0.0/16 dev {tun.name}")
    echo = bytes([8, 0, 0, 0, 0, 1, 0, 1]) + b"payload."
    echo = echo[:2] + (0xFFFF - ones_complement(echo)).to_bytes(2, "big") + echo[4:]
    assert tun.write(ipv4("10.9.0.2", "10.9.0.1", echo, protocol=1))
    while True:
        assert select.select([tun.fd], [], [], 5)[0], "no answer"
        packet = tun.read()
        if packet[0] >> 4 == 4 and packet[9] == 1:
            break
    assert packet[20] == 0
    assert packet[28:] == b"payload."
    tun.close()


def test_nothing_to_read_is_none_and_what_the_kernel_refuses_is_told(node):
    tun = Tun()
    assert tun.read() is None
    assert not tun.write(ipv4("10.9.0.2", "10.9.0.1"))  # the device is down
    node.ip(f"link set {tun.name} up")
    assert not tun.write(b"\x00 not an IP packet")
    tun.close()
