"""Addresses, changes and devices over netlink."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import subprocess

import pytest

from p2pvpn.core.errors import LocalError
from p2pvpn.host.netlink import LocalAddress, Netlink
from p2pvpn.host.tun import Tun

pytestmark = pytest.mark.netns


@pytest.fixture
def node(lab):
    """A host with one wire that is up, on which the test itself runs."""
    node = lab.node("h")
    node.ip("link add wire type veth peer name far\nlink set wire up\nlink set far up")
    with node.inside():
        yield node


def on_netlink(story):
    async def run():
        netlink = await Netlink.open()
        try:
            await story(netlink)
        finally:
            netlink.close()

    asyncio.run(run())


def test_only_addresses_that_others_may_reach_are_listed(node):
    node.ip(
        "addr add 192.0.2.7/24 dev wire\n"
        "addr add 2001:db8::7/64 dev wire nodad\n"
        "addr add 2001:db8::8/64 dev wire nodad preferred_lft 0\n"
        "addr add 169.254.1.1/16 dev wire\n"
        "addr add 198.51.100.1/32 dev lo\n"
        "link add idle type veth peer name idle2\n"
        "addr add 203.0.113.1/24 dev idle"
    )
    tun = Tun()
    node.ip(f"link set {tun.name} up\naddr add 10.9.0.1/32 dev {tun.name}")

    async def story(netlink):
        assert await netlink.addresses() == (
            LocalAddress("wire", "192.0.2.7", 24),
            LocalAddress("wire", "2001:db8::7", 64),
        )

    on_netlink(story)
    tun.close()


@pytest.mark.parametrize(
    "change",
    [
        "addr add 192.0.2.7/24 dev wire\naddr add 192.0.2.8/24 dev wire\naddr add 2001:db8::7/64 dev wire nodad",
        "link set wire down",
        "link set wire mtu 1400",
        "route add default dev wire",
        "-6 route add default dev wire",
    ],
)
def test_a_burst_of_changes_is_told_once(node, change):
    async def story(netlink):
        told = asyncio.Event()
        count = 0

        def watcher():
            nonlocal count
            count += 1
            told.set()

        netlink.watch(watcher)
        apply(node, change)
        await asyncio.wait_for(told.wait(), 5)
        assert count == 1
        netlink.unwatch(watcher)

    on_netlink(story)


def apply(node, script):
    """Each line by itself: options such as -6 are not part of a batch's language."""
    for line in script.splitlines():
        subprocess.run(["ip", *line.split()], check=True)


def test_our_own_devices_and_other_routes_are_no_change(node):
    node.ip("addr add 192.0.2.7/24 dev wire")

    async def story(netlink):
        told = asyncio.Event()
        netlink.watch(told.set)
        tun = Tun()
        await netlink.set_up_device(
            tun.name, [ipaddress.ip_address("10.9.0.1")], [ipaddress.ip_network("10.9.0.0/16")], 1400
        )
        apply(node, "route add 198.51.100.0/24 dev wire")
        tun.close()
        netlink._on_events()  # everything so far was seen, and nothing is about to be told
        assert netlink._pending is None
        apply(node, "link set far mtu 1400")
        await asyncio.wait_for(told.wait(), 5)

    on_netlink(story)


def test_a_device_gets_its_addresses_routes_and_mtu(node):
    async def story(netlink):
        tun = Tun()
        addresses = [ipaddress.ip_address("10.9.0.1"), ipaddress.ip_address("fd00:9::1")]
        routes = [ipaddress.ip_network("10.9.0.0/16"), ipaddress.ip_network("fd00:9::/48")]
        await netlink.set_up_device(tun.name, addresses, routes, 1380)
        link = json.loads(node.run(["ip", "-j", "addr", "show", tun.name]).stdout)[0]
        assert (link["mtu"], "UP" in link["flags"]) == (1380, True)
        assert {(entry["local"], entry["prefixlen"]) for entry in link["addr_info"]} == {
            ("10.9.0.1", 32),
            ("fd00:9::1", 128),
        }
        for probe, source in (("10.9.4.5", "10.9.0.1"), ("fd00:9::abc", "fd00:9::1")):
            route = json.loads(node.run(["ip", "-j", "route", "get", probe]).stdout)[0]
            assert (route["dev"], route["prefsrc"]) == (tun.name, source)
        await netlink.add_route(tun.name, ipaddress.ip_network("172.20.0.0/16"))
        await netlink.remove_route(tun.name, ipaddress.ip_network("172.20.0.0/16"))
        with pytest.raises(LocalError):
            await netlink.remove_route(tun.name, ipaddress.ip_network("172.20.0.0/16"))
        with pytest.raises(LocalError):
            await netlink.set_up_device("nothing", addresses, routes, 1380)
        with pytest.raises(LocalError):
            await netlink.set_up_device(tun.name, addresses, [], 1)
        tun.close()

    on_netlink(story)
