"""The filter against plaintext with overlay sources: with nftables, with iptables, and with neither."""

from __future__ import annotations

import asyncio
import ipaddress
import shutil
import socket

import pytest

from p2pvpn.core.errors import LocalError
from p2pvpn.host.guard import Guard
from tests.esp.packets import ipv4

pytestmark = pytest.mark.netns
PREFIXES = [ipaddress.ip_network("10.9.0.0/16"), ipaddress.ip_network("fd00:9::/48")]
OTHERS = [ipaddress.ip_network("10.8.0.0/16")]


@pytest.fixture(params=["nft", "iptables"])
def filter_tool(request, monkeypatch):
    """Only this filter is installed."""
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: which(name) if name.startswith((request.param, "ip6")) else None)
    return request.param


@pytest.fixture
def hosts(lab):
    """Host a, on which the test itself runs, and host b on the same wire with a second one."""
    a, b = lab.node("a"), lab.node("b")
    for wire in ("one", "two"):
        a.ip(f"link add {wire} type veth peer name {wire} netns b\nlink set {wire} up")
        b.ip(f"link set {wire} up")
    a.ip("addr add 192.0.2.1/24 dev one\naddr add 198.51.100.1/24 dev two\naddr add 10.9.0.1/32 dev lo")
    b.ip("addr add 192.0.2.2/24 dev one\naddr add 198.51.100.2/24 dev two")
    with a.inside():
        yield a, b


def arrives(b, source, gateway) -> bool:
    """Whether a datagram from `source` gets to a by the wire of `gateway`; one that always does comes after it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("", 7000))
        receiver.settimeout(5)
        b.ip(f"route replace 10.9.0.1/32 via {gateway}")
        for address, payload in ((source, b"spoofed"), (gateway[:-1] + "2", b"marker")):
            header = b"\x1b\x59\x1b\x58" + (8 + len(payload)).to_bytes(2, "big") + b"\0\0"
            with b.socket(socket.AF_INET, socket.SOCK_RAW, 255) as raw:
                raw.sendto(ipv4(address, "10.9.0.1", header + payload), ("10.9.0.1", 0))
        return receiver.recv(100) == b"spoofed"


def test_only_the_device_of_a_network_brings_its_sources(hosts, filter_tool):
    _, b = hosts

    async def story():
        guard = Guard()
        assert arrives(b, "10.9.0.2", "192.0.2.1")
        await guard.protect("one", PREFIXES)
        await guard.protect("two", OTHERS)
        await guard.protect("two", OTHERS)
        assert arrives(b, "10.9.0.2", "192.0.2.1")
        assert not arrives(b, "10.9.0.2", "198.51.100.1")
        assert arrives(b, "10.8.0.2", "198.51.100.1")
        assert not arrives(b, "10.8.0.2", "192.0.2.1")
        await guard.release("one")
        await guard.release("one")
        assert arrives(b, "10.9.0.2", "198.51.100.1")
        assert not arrives(b, "10.8.0.2", "192.0.2.1")
        await guard.close()
        assert arrives(b, "10.8.0.2", "192.0.2.1")
        await guard.close()

    asyncio.run(story())


def test_closing_leaves_no_rule(hosts, filter_tool):
    a, _ = hosts

    async def story():
        guard = Guard()
        await guard.protect("one", PREFIXES)
        await guard.close()

    asyncio.run(story())
    rules = (
        a.run(["nft", "list", "ruleset"]).stdout + a.run(["iptables-save"]).stdout + a.run(["ip6tables-save"]).stdout
    )
    assert "p2pvpn" not in rules.lower()


def test_the_rules_of_a_daemon_that_was_killed_are_replaced(hosts, filter_tool):
    _, b = hosts

    async def story():
        await Guard().protect("one", PREFIXES)  # and then it was gone
        guard = Guard()
        await guard.protect("two", PREFIXES)
        assert arrives(b, "10.9.0.2", "198.51.100.1")
        assert not arrives(b, "10.9.0.2", "192.0.2.1")
        await guard.close()

    asyncio.run(story())


def test_without_any_filter_the_guard_refuses(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)

    async def story():
        with pytest.raises(LocalError, match="nft"):
            await Guard().protect("one", PREFIXES)

    asyncio.run(story())
