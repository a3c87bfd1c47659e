"""The network document: it spreads, it forbids, and nobody goes back."""

from __future__ import annotations

import asyncio

from p2pvpn.identity.document import Topology
from p2pvpn.mesh.events import DocumentReplaced

from .life import Life


def _publish_at_one_hub(life: Life) -> None:
    """As an admin does: one hub gets the new document."""
    life.network(life.hubs[0]).take_document(life.world.admin.document.encode(), "the admin")


def test_a_new_document_reaches_everybody_from_one_hub() -> None:
    life = Life(1)

    async def story() -> None:
        await life.ping(life.a, life.b)
        life.world.admin.set_topology(Topology.DYNAMIC, wall=life.world.wall())
        _publish_at_one_hub(life)
        await asyncio.sleep(5)
        version = life.world.admin.document.version
        for machine in life.world.machines.values():
            assert life.network(machine).standing.document.version == version
        assert life.heard(life.a, DocumentReplaced)

    life.run(story())


def test_a_revoked_peer_is_cut_off_and_stays_out() -> None:
    life = Life(2)

    async def story() -> None:
        await life.ping(life.a, life.b)
        life.world.admin.revoke(life.b.profile.member.peer_id, wall=life.world.wall())
        _publish_at_one_hub(life)
        await asyncio.sleep(10)
        assert life.path(life.a, life.b) is None
        assert (await life.ping(life.a, life.b)).answered == 0
        assert (await life.ping(life.b, life.a)).answered == 0
        for hub in life.hubs:
            assert life.path(hub, life.b) is None

    life.run(story())


def test_in_star_mode_peers_reach_hubs_and_not_each_other() -> None:
    life = Life(3)

    async def story() -> None:
        life.world.admin.set_topology(Topology.STAR, wall=life.world.wall())
        _publish_at_one_hub(life)
        await asyncio.sleep(5)
        assert (await life.ping(life.a, life.hubs[0])).answered > 0
        assert (await life.ping(life.a, life.b)).answered == 0

    life.run(story())


def test_an_older_document_changes_nothing() -> None:
    life = Life(4)

    async def story() -> None:
        old = life.world.admin.document.encode()
        life.world.admin.set_topology(Topology.DYNAMIC, wall=life.world.wall())
        _publish_at_one_hub(life)
        await asyncio.sleep(5)
        network = life.network(life.a)
        network.take_document(old, "a hub that withholds")
        assert network.standing.document.version == life.world.admin.document.version

    life.run(story())
