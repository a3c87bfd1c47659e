"""Two peers with real planes, kept up for all tests of one combination: starting four processes takes a while."""

from __future__ import annotations

import itertools

import pytest

from p2pvpn.lab import uml
from p2pvpn.lab.net import Lab
from tests.host.peers import Peer, encode_child, link

PLANES = [("kernel", "kernel"), ("kernel", "user"), ("user", "kernel")] if uml.is_inside() else [("user", "user")]
"""In User-Mode Linux every combination with the kernel's IPsec; elsewhere what runs everywhere."""


class Wire:
    """Peers a and b on one wire, and by a NAT; SAs that a test installs go away with it."""

    def __init__(self, lab: Lab, planes: tuple[str, str]) -> None:
        self.lab = lab
        self.planes = planes
        self.hosts = link(lab)
        self.nat = lab.node("n")
        a, b = self.hosts
        lab.link(a, "home", self.nat, "lan")
        lab.link(self.nat, "wan", b, "street")
        a.ip("addr add 10.1.0.2/24 dev home\nroute add 198.51.100.0/24 via 10.1.0.1")
        self.nat.ip("addr add 10.1.0.1/24 dev lan\naddr add 198.51.100.1/24 dev wan\naddr add 198.51.100.9/24 dev wan")
        b.ip("addr add 198.51.100.2/24 dev street")
        self.guest = lab.node("c")
        lab.link(a, "lan", self.guest, "eth0")
        a.ip("addr add 10.30.0.1/24 dev lan\naddr add fd00:30::1/64 dev lan nodad")
        self.guest.ip(
            "addr add 10.30.0.2/24 dev eth0\naddr add fd00:30::2/64 dev eth0 nodad\n"
            "route add default via 10.30.0.1\nroute add default via fd00:30::1"
        )
        self.peers = [Peer(node, plane=plane) for node, plane in zip(self.hosts, planes, strict=True)]
        for peer in self.peers:
            peer.open()
        self.ids = itertools.count(1)
        self.installed: list[tuple[Peer, int]] = []

    @property
    def a(self) -> Peer:
        return self.peers[0]

    @property
    def b(self) -> Peer:
        return self.peers[1]

    def install(self, pair) -> None:
        for peer, child in zip(self.peers, pair, strict=True):
            peer.ask("install", encode_child(child))
            self.installed.append((peer, child.id))

    def connect(self, pair) -> int:
        """Install both ends and use them; the SA's id."""
        self.install(pair)
        for peer in self.peers:
            peer.ask("use", pair[0].id)
        return pair[0].id

    def clear(self) -> None:
        for peer, child_id in self.installed:
            peer.ask("remove", child_id)
        self.installed.clear()
        for peer in self.peers:
            peer.ask("counters")  # whatever was told on the way is read
            peer.events.clear()

    def close(self) -> None:
        for peer in self.peers:
            peer.close()


def one_machine(test):
    """Of a test that looks at one machine only: not run again for other planes on the other end."""
    test.one_machine = True
    return test


def pytest_generate_tests(metafunc):
    if "whole_wire" in metafunc.fixturenames:
        combinations = PLANES[:1] if hasattr(metafunc.function, "one_machine") else PLANES
        ids = ["-".join(planes) for planes in combinations]
        metafunc.parametrize("whole_wire", combinations, ids=ids, indirect=True, scope="module")


@pytest.fixture(scope="module")
def whole_wire(request):
    with Lab() as lab:
        wire = Wire(lab, request.param)
        yield wire
        wire.close()


@pytest.fixture
def wire(whole_wire):
    yield whole_wire
    whole_wire.clear()
