"""Machines that sleep and wake, and hubs that do not know a peer any more."""

from __future__ import annotations

import asyncio

import pytest

from p2pvpn.mesh.tuning import Tuning
from p2pvpn.sim.application import Pinger

from .life import Life

BACK_S = 5.0
"""After which a pair that talks has an answer again."""


@pytest.mark.parametrize("clock_ran", [False, True], ids=["laptop", "stopped process"])
@pytest.mark.parametrize(("slept_s", "nat"), [(60.0, "symmetric/30s"), (900.0, "port-restricted/30s")])
def test_a_peer_that_slept_is_reached_again_soon(slept_s: float, nat: str, clock_ran: bool) -> None:
    life = Life(21, nat, nat)

    async def story() -> None:
        await life.ping(life.a, life.b)
        life.b.host.suspend()
        await asyncio.sleep(slept_s)
        life.b.host.resume(clock_ran=clock_ran)
        report = await Pinger(life.a.host, life.b.overlay, count=40, interval_s=0.25).done()
        assert report.first_answer_s is not None
        assert report.first_answer_s < BACK_S
        assert (await life.ping(life.b, life.a)).lost == []

    life.run(story())


def test_a_peer_whose_hubs_gave_it_up_while_it_slept_attaches_anew_when_it_wakes() -> None:
    life = Life(22, tuning=Tuning(hub_liveness_s=10.0))

    async def story() -> None:
        life.a.host.suspend()
        await asyncio.sleep(120.0)
        assert all(not life.network(hub).is_connected(life.a.overlay) for hub in life.hubs)
        life.a.host.resume()
        await asyncio.sleep(BACK_S)
        known = [hub for hub in life.hubs if life.network(hub).is_connected(life.a.overlay)]
        assert len(known) >= 2
        assert len(life.network(life.a).attachments.connected()) >= 2
        assert (await life.ping(life.b, life.a)).lost == []

    life.run(story())


def test_a_hub_that_forgot_its_sas_is_attached_to_again() -> None:
    """It restarts within a moment: nothing but its own silence tells."""
    life = Life(23, "symmetric", "symmetric")

    async def story() -> None:
        await life.ping(life.a, life.b)
        for hub in life.hubs:
            hub.host.crash()
            hub.host.restart()
            await life.start(hub)
        report = await Pinger(life.a.host, life.b.overlay, count=120, interval_s=0.1).done()
        assert report.longest_gap_s < BACK_S
        assert max(report.arrived_at) > 110

    life.run(story())


def test_tunnels_to_more_hubs_than_wanted_are_closed_again() -> None:
    life = Life(24)

    async def story() -> None:
        first, second = life.network(life.a).attachments.connected()
        for hub in life.hubs:
            if hub.overlay == first.overlay:
                life.world.cut([life.a], [hub])
        life.network(life.a).session(first.overlay).suspect()
        await asyncio.sleep(3.0)
        life.world.internet.heal()
        assert len(life.network(life.a).attachments.connected()) == 3
        await asyncio.sleep(120.0)
        connected = life.network(life.a).attachments.connected()
        assert len(connected) == 2
        assert second.overlay in [hub.overlay for hub in connected]

    life.run(story())
