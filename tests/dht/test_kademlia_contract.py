"""What we rely on in kademlia 2.2.3 and rpcudp 5.0.1: a new version that changes it fails here, not in the field."""

from __future__ import annotations

import asyncio
import inspect
from importlib.metadata import version

from kademlia.crawling import SpiderCrawl
from kademlia.network import Server
from kademlia.node import Node, NodeHeap
from kademlia.protocol import KademliaProtocol
from kademlia.routing import RoutingTable
from kademlia.storage import IStorage

from p2pvpn.dht.overlay import HubProtocol, Overlay, RecordCrawl


def parameters(thing: object) -> list[str]:
    return [name for name in inspect.signature(thing).parameters if name != "self"]  # type: ignore[arg-type]


def test_the_versions_are_the_ones_that_were_read() -> None:
    assert (version("kademlia"), version("rpcudp")) == ("2.2.3", "5.0.1")


def test_the_names_that_are_overridden_exist_with_these_parameters() -> None:
    for ours, theirs, names in (
        (HubProtocol, KademliaProtocol, ["welcome_if_new", "handle_call_response", "datagram_received"]),
        (HubProtocol, KademliaProtocol, ["call_ping", "call_store", "call_find_value"]),
        (Overlay, Server, ["_create_protocol", "_refresh_table", "get", "set"]),
    ):
        for name in names:
            assert parameters(getattr(ours, name)) == parameters(getattr(theirs, name)), name
    assert parameters(Server.listen) == ["port", "interface"]
    assert parameters(Server.__init__) == ["ksize", "alpha", "node_id", "storage"]
    assert parameters(KademliaProtocol.__init__) == ["source_node", "storage", "ksize"]
    assert parameters(SpiderCrawl.__init__) == ["protocol", "node", "peers", "ksize", "alpha"]
    assert set(IStorage.__abstractmethods__) == {"__setitem__", "__getitem__", "get", "iter_older_than", "__iter__"}
    assert issubclass(RecordCrawl, SpiderCrawl)
    assert Server.protocol_class is KademliaProtocol


def test_a_server_holds_node_storage_and_table_size_and_draws_nothing_when_it_has_an_id() -> None:
    server = Server(ksize=7, alpha=5, node_id=b"\x07" * 20, storage="anything")
    assert (server.ksize, server.alpha, server.node.id, server.storage) == (7, 5, b"\x07" * 20, "anything")
    assert server.transport is None
    server.stop()


def test_nodes_measure_by_xor_and_know_their_home() -> None:
    one, two = Node(b"\x01" * 20, "fd00::1", 4510), Node(b"\x03" * 20, "fd00::2", 4510)
    assert one.distance_to(two) == int.from_bytes(b"\x02" * 20, "big")
    assert one.same_home_as(Node(b"\x09" * 20, "fd00::1", 4510))
    assert not one.same_home_as(two)
    assert (one.id, one.ip, one.port) == tuple(one)


def test_the_table_takes_gives_back_and_forgets_contacts() -> None:
    async def story() -> None:
        table = RoutingTable(None, 20, Node(b"\x00" * 20))
        nodes = [Node(bytes([n]) * 20, f"fd00::{n}", 4510) for n in range(1, 6)]
        for node in nodes:
            assert table.is_new_node(node)
            table.add_contact(node)
            assert not table.is_new_node(node)
        assert [node.id[0] for node in table.find_neighbors(Node(b"\x00" * 20))] == [1, 2, 3, 4, 5]
        table.remove_contact(nodes[1])
        assert [node.id[0] for node in table.find_neighbors(Node(b"\x05" * 20))] == [4, 1, 3]

    asyncio.run(story())


def test_the_heap_orders_by_distance_and_remembers_who_was_asked() -> None:
    heap = NodeHeap(Node(b"\x00" * 20), 3)
    nodes = [Node(bytes([n]) * 20, f"fd00::{n}", 4510) for n in (5, 2, 9, 1)]
    heap.push(nodes)
    heap.push([])
    assert [node.id[0] for node in heap.get_uncontacted()] == [1, 2, 5]
    heap.mark_contacted(nodes[1])
    assert [node.id[0] for node in heap.get_uncontacted()] == [1, 5]


def test_a_crawl_begins_with_its_peers_in_the_heap() -> None:
    peers = [Node(b"\x02" * 20, "fd00::2", 4510)]
    crawl = SpiderCrawl("protocol", Node(b"\x00" * 20), peers, 20, 3)
    assert crawl.nearest.get_uncontacted() == peers
    assert (crawl.protocol, crawl.node.id) == ("protocol", b"\x00" * 20)
