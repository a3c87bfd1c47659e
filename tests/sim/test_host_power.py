"""Hosts that crash, sleep, wake, and whose disk is full."""

import asyncio

import pytest

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.errors import LocalError
from p2pvpn.sim.application import ping
from p2pvpn.sim.host import SimHost, current_host

from .tunnels import Echo, overlay, pair_network

A, B = overlay(0xA), overlay(0xB)


def test_a_crash_takes_everything_away_in_silence_and_the_store_survives(net, pair):
    b = pair[1]
    b.store.write("identity", b"key", secret=True)
    last_words = []

    async def lives():
        assert current_host.get() is b
        try:
            await asyncio.sleep(1000)
        finally:
            b_underlay.send(Path(Endpoint("0.0.0.0", 4500), Endpoint("192.0.2.10", 4500)), b"\0\0\0\0goodbye")
            last_words.append(net.loop.elapsed)

    b_underlay = b.underlay
    heard = []
    pair[0].underlay.on_datagram = lambda path, data: heard.append(data)
    net.loop.network = pair_network(pair)

    async def story():
        task = b.spawn(lives())
        _, socket = await net.loop.create_datagram_endpoint(Echo, local_addr=(str(B), 5555))
        await asyncio.sleep(1)
        b.crash()
        b.crash()
        assert (await ping(pair[0], B, wait_s=0.5)).answered == 0
        assert task.cancelled()
        assert last_words
        b.restart()
        socket.transport.sendto(b"from the grave", (str(A), 5555))
        b_underlay.send(Path(Endpoint("0.0.0.0", 4500), Endpoint("192.0.2.10", 4500)), b"\0\0\0\0grave")
        await asyncio.sleep(1)
        assert heard == []
        assert b.underlay is not b_underlay
        assert b.plane.stacks == {}
        assert b.store.read("identity") == b"key"
        b.underlay.send(Path(Endpoint("0.0.0.0", 4500), Endpoint("192.0.2.10", 4500)), b"\0\0\0\0alive")
        await asyncio.sleep(1)
        assert heard == [b"\0\0\0\0alive"]
        b.crash(lose_disk=True)
        b.restart()
        assert b.store.read("identity") is None

    net.loop.run(story())


def test_a_crash_ends_all_that_came_of_the_hosts_tasks_and_nothing_else(net, pair):
    ticks = []

    def tick(name):
        ticks.append((name, net.loop.elapsed))
        net.loop.call_later(0.1, tick, name)

    async def child(name):
        while True:
            await asyncio.sleep(0.1)
            ticks.append((f"{name} child", net.loop.elapsed))

    async def start(name):
        tick(name)
        tasks.append(asyncio.create_task(child(name)))

    tasks = []

    async def story():
        for host in pair:
            await host.spawn(start(host.name))
        await asyncio.sleep(1)
        pair[1].crash()
        crashed_at = net.loop.elapsed
        pair[1].restart()
        await asyncio.sleep(1)
        assert {name for name, at in ticks if at > crashed_at} == {"a", "a child"}
        assert [task.done() for task in tasks] == [False, True]

    net.loop.run(story())


def test_a_full_disk_refuses_and_keeps_the_old_content(net):
    store = SimHost(net, "host").store
    store.write("file", b"old")
    store.is_full = True
    with pytest.raises(LocalError):
        store.write("file", b"new")
    assert store.read("file") == b"old"
    store.delete("file")
    assert store.read("file") is None


@pytest.mark.parametrize("clock_ran", [False, True])
def test_a_suspended_host_is_silent_and_goes_on_where_it_stopped(net, pair, clock_ran):
    host, ticks = pair[0], []

    async def tick():
        loop = asyncio.get_running_loop()
        for _ in range(100):
            await asyncio.sleep(1.0)
            ticks.append((net.loop.instant, loop.time()))

    async def story():
        began = net.loop.instant
        host.spawn(tick())
        await asyncio.sleep(3.5)
        host.suspend()
        assert (await ping(pair[1], A)).lost == [0]
        await asyncio.sleep(3600.0 - (net.loop.instant - began - 3.5))
        assert len(ticks) == 3
        host.resume(clock_ran=clock_ran)
        await asyncio.sleep(2.2)
        world, own = zip(*[(world - began, own - began) for world, own in ticks], strict=True)
        if clock_ran:
            assert own == world == pytest.approx((1, 2, 3, 3603.5, 3604.5, 3605.5))
        else:
            assert world == pytest.approx((1, 2, 3, 3604, 3605))
            assert own == pytest.approx((1, 2, 3, 4, 5))
        assert (await ping(pair[1], A)).lost == []
        assert (await ping(host, B)).lost == []

    net.loop.run(story(), 7200)


def test_a_suspended_host_hears_of_a_new_network_when_it_wakes_and_can_crash_asleep(net, pair):
    host, changes = pair[0], []
    host.underlay.on_change = lambda: changes.append(net.loop.elapsed)

    async def story():
        host.suspend()
        host.move(net.public, "192.0.2.99")
        await asyncio.sleep(10)
        assert changes == []
        host.resume()
        await asyncio.sleep(1)
        assert changes == [pytest.approx(10, abs=0.1)]
        host.suspend()
        with pytest.raises(LocalError):
            host.suspend()
        host.crash()
        with pytest.raises(LocalError):
            host.resume()
        host.restart()
        assert not host.is_suspended

    net.loop.run(story())
