"""What a daemon that is killed leaves behind: no way in or out in the clear, and nothing that its successor keeps."""

from __future__ import annotations

import os
import signal
import socket

import pytest

from p2pvpn.lab import uml
from p2pvpn.lab.net import Lab
from tests.host.peers import INNER, PUBLIC, ROUTES, Peer, children, connect, link
from tests.host.test_user_plane import bound, spoof

from .pings import ping
from .test_planes import outgoing, smuggle

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(120)]
PLANE = "kernel" if uml.is_inside() else "user"
FOREIGN_STATE = (
    "xfrm state add src 203.0.113.1 dst 203.0.113.2 proto esp spi 0xc0000101 reqid 1000000001 mode tunnel "
    "aead rfc4106(gcm(aes)) 0x0102030405060708090a0b0c0d0e0f1011121314 128"
)
FOREIGN_POLICY = (
    "xfrm policy add src 10.77.0.0/16 dst 10.9.0.0/16 dir fwd priority 4000 "
    "tmpl src 203.0.113.1 dst 203.0.113.2 proto esp reqid 1000000001 mode tunnel"
)


@pytest.fixture
def start():
    """Starts a process with a plane on a host; it ends with the test."""
    peers = []

    def begin(node):
        peers.append(Peer(node, plane=PLANE))
        return peers[-1]

    yield begin
    for peer in peers:
        peer.close()


def xfrm_of(node):
    return node.run(["ip", "xfrm", "state"]).stdout, node.run(["ip", "xfrm", "policy"]).stdout


def test_a_killed_daemon_leaves_no_way_in_the_clear_and_its_successor_cleans_up(start):
    with Lab() as lab:
        hosts = link(lab)
        a_host, b_host = hosts
        if PLANE == "kernel":
            a_host.ip(FOREIGN_STATE)
            a_host.ip(FOREIGN_POLICY)
        before = xfrm_of(a_host)
        a, b = map(start, hosts)
        a.open()
        b.open()
        connect(a, b, children(7))
        connect(a, b, children(8))
        assert ping(a_host, INNER["b"][0])
        os.kill(a.process.pid, signal.SIGKILL)
        a.process.wait()
        for near, far in zip(PUBLIC["a"], PUBLIC["b"], strict=True):
            a_host.ip(f"route add default via {far}")
            a_host.ip(f"addr add {INNER['a'][':' in near]} dev lo")
        nothing_leaves(a_host)
        nothing_comes_in(a_host, b_host)

        again = start(a_host)
        again.ask("start")
        assert xfrm_of(a_host) == before
        assert "proto 112" not in a_host.run(["ip", "route"]).stdout + a_host.run(["ip", "-6", "route"]).stdout
        for inner in INNER["a"]:
            a_host.ip(f"addr del {inner} dev lo")
        again.ask("open", INNER["a"], ROUTES, 1400)
        b.ask("remove", 7)
        b.ask("remove", 8)
        connect(again, b, children(9))
        assert ping(a_host, INNER["b"][0])
        assert ping(a_host, INNER["b"][1])
        again.ask("stop")
        assert xfrm_of(a_host) == before
        assert "proto 112" not in a_host.run(["ip", "route"]).stdout + a_host.run(["ip", "-6", "route"]).stdout


def nothing_leaves(node):
    """Packets to overlay addresses do not leave, one to elsewhere does."""
    with node.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as capture:
        capture.bind(("wire", 3))
        capture.setblocking(False)
        for inner in (0, 1):
            for target in (INNER["b"][inner], INNER["c"][inner]):
                ping(node, target, pattern=b"plain", wait_s=0.3)
        ping(node, "203.0.113.99", pattern=b"other", wait_s=0.3)
        frames = outgoing(capture)
    assert any(b"other" in frame for frame in frames)
    assert not any(b"plain" in frame for frame in frames)


def nothing_comes_in(victim, sender):
    for inner in (0, 1):
        with bound(victim, "::" if inner else "0.0.0.0") as receiver:
            near = PUBLIC["a"][inner]
            for claimed in (INNER["b"][inner], INNER["c"][inner]):
                smuggle(sender, victim, claimed, INNER["a"][inner], b"spoofed")
            spoof(sender, PUBLIC["b"][inner], near, b"marker")
            assert receiver.recv(100) == b"marker"


def test_a_device_that_somebody_removes_is_told(start):
    with Lab() as lab:
        node = lab.node("a")
        peer = start(node)
        peer.open()
        node.ip(f"link del {peer.device}")
        peer.wait_for("died")
        peer.open()


if uml.is_inside():

    @pytest.mark.parametrize("what", ["state flush", "policy flush"])
    def test_whoever_flushes_the_kernel_makes_us_start_over(start, what):
        with Lab() as lab:
            a, b = map(start, link(lab))
            a.open()
            b.open()
            connect(a, b, children(1))
            assert ping(a.node, INNER["b"][0])
            a.node.ip(f"xfrm {what}")
            if what == "state flush":
                a.ask("usage", [1])
            else:
                ping(a.node, INNER["b"][0], wait_s=0.1)
            a.wait_for("died")
            a.open()
            b.ask("remove", 1)
            connect(a, b, children(2))
            assert ping(a.node, INNER["b"][0])
