"""The DHT with real certificates, and over the kernel's sockets."""

from __future__ import annotations

import asyncio
import ipaddress
import subprocess
import time
from collections.abc import Iterator
from ipaddress import IPv6Address

import pytest

from p2pvpn.core.ids import overlay_address
from p2pvpn.dht import messages, records
from p2pvpn.dht.client import DhtClient
from p2pvpn.dht.hub import HubNode
from p2pvpn.dht.messages import Request
from p2pvpn.dht.policy import AcceptancePolicy, Reason, RecordRefused
from p2pvpn.dht.records import LocatorBody, NameBody, RouteBody
from p2pvpn.dht.rpc import DHT_PORT, RpcNode
from p2pvpn.dht.storage import RecordStore
from p2pvpn.identity.admin import AdminNetwork
from p2pvpn.identity.grants import Request as GrantRequest
from p2pvpn.identity.keys import PeerKey
from p2pvpn.identity.trust import Trust
from p2pvpn.sim.loop import SeededEntropy

from .world import WALL, World


def admin() -> AdminNetwork:
    return AdminNetwork.create("home", WALL, SeededEntropy(1, "admin"))


def test_records_under_real_certificates_are_believed_until_these_are_revoked() -> None:
    network = admin()
    key = PeerKey.generate()
    grant = network.grant(GrantRequest.create(key, "office"), wall=WALL, prefixes=["192.168.7.0/24"])
    trust = Trust(network.genesis, network.document)
    policy = AcceptancePolicy(trust.network, trust.verify_leaf)
    member = trust.verify_leaf(grant.chain[0], WALL)
    assert member.ipv4 is not None
    for body in (
        LocatorBody((key.peer_id, key.peer_id), ()),
        NameBody("office", member.overlay),
        NameBody(str(member.ipv4), member.overlay),
        RouteBody(ipaddress.ip_network("192.168.7.0/24")),
    ):
        raw = records.build(
            trust.network,
            key.peer_id,
            body,
            sequence=int(WALL * 1000),
            expires=int(WALL) + records.LIFETIME_S[body.kind],
            sign=key.sign,
            certificate=grant.chain[0],
        )
        record = records.parse_untrusted(raw)
        assert policy.check(raw, records.key_of(record), WALL, member.overlay) == record
        store = messages.build(Request(bytes(12), 0, "dht.store", [records.key_of(record), raw, 1]))
        assert len(store) < messages.GOOD_MESSAGE_BYTES, "a record travels in one packet"
    network.revoke("office", wall=WALL)
    assert trust.replace_document(network.document)
    with pytest.raises(RecordRefused) as refused:
        policy.check(raw, records.key_of(record), WALL)
    assert refused.value.reason is Reason.CERTIFICATE


@pytest.fixture
def loopback() -> Iterator[None]:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    yield
    subprocess.run(["ip", "-6", "address", "flush", "dev", "lo", "scope", "global"], check=True)


def _add_address(address: IPv6Address) -> None:
    subprocess.run(["ip", "-6", "address", "add", f"{address}/128", "dev", "lo", "nodad"], check=True)


@pytest.mark.netns
def test_hubs_and_peers_meet_over_the_kernels_sockets(loopback: None) -> None:
    world = World()
    hubs = [world.registry.join(f"hub{number}") for number in range(3)]
    who = world.registry.join("laptop")
    for member in (*hubs, who):
        _add_address(overlay_address(world.policy.network, member.peer_id))
    entropy = SeededEntropy(2, "real")
    started = time.time()
    wall = lambda: WALL + time.time() - started  # noqa: E731

    async def story() -> None:
        nodes = []
        for hub in hubs:
            rpc = RpcNode(hub.overlay, DHT_PORT, entropy)
            await rpc.open()
            node = HubNode(rpc, hub.peer_id, world.policy, RecordStore(), wall)
            node.set_hubs([other.peer_id for other in hubs])
            nodes.append((rpc, node))
        await asyncio.gather(*(node.start() for _, node in nodes))
        rpc = RpcNode(who.overlay, DHT_PORT, entropy)
        await rpc.open()
        client = DhtClient(rpc, world.policy, wall)
        client.set_hubs([(hub.peer_id, hub.overlay) for hub in hubs[:2]])
        assert await client.publish(who.record(wall()), need=2) == 2
        found = await client.lookup(who.key)
        assert found is not None
        assert found.subject == who.peer_id
        await asyncio.gather(*(rpc.request(hubs[0].overlay, "dht.ping") for _ in range(250)))
        await client.close()
        await rpc.close()
        for rpc, node in nodes:
            await node.stop()
            await rpc.close()

    asyncio.run(story())
    world.loop.close()
