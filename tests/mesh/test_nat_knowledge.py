"""What a peer learns of its NAT, what it costs when nothing happens, and that no lie about it does harm."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator

import pytest

from p2pvpn.core import stun
from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.errors import P2pvpnError
from p2pvpn.core.stun import TRANSACTION_ID_BYTES
from p2pvpn.mesh.events import HubDetached
from p2pvpn.mesh.knocks import KNOCK, KNOCK_FOR, ask
from p2pvpn.mesh.natwatch import FILE
from p2pvpn.mesh.session import Session
from p2pvpn.punch.behaviour import Allocation, Filtering, Mapping
from p2pvpn.punch.filtering import knock, knock_untrusted
from p2pvpn.punch.proof import PROOF_BYTES
from p2pvpn.sim.nat import Nat
from p2pvpn.sim.world import Machine

from .life import Life

HOUR_S = 3600.0
KEEPALIVE_PER_HOUR = 144
"""Packets to one hub at one every 25 s; as many come back."""
HUBS_WANTED = 2
VICTIM = Endpoint("203.0.113.99", 9)


class Meter:
    """Counts the datagrams that leave and reach a machine."""

    def __init__(self, machine: Machine) -> None:
        self.count: Counter[str] = Counter()
        host = machine.host
        send, receive = host.send, host.receive

        def sent(local: Endpoint, remote: Endpoint, data: bytes) -> None:
            self.count["sent"] += 1
            send(local, remote, data)

        def received(interface, datagram) -> None:  # type: ignore[no-untyped-def]
            self.count["received"] += 1
            receive(interface, datagram)

        host.send, host.receive = sent, received  # type: ignore[method-assign]

    def take(self) -> tuple[int, int]:
        both = self.count["sent"], self.count["received"]
        self.count.clear()
        return both


def bindings(life: Life) -> Iterator[bool]:
    """For each hub that a has a tunnel to, whether a's NAT lets its packets in now."""
    nat = life.homes["a"].router.nat
    assert isinstance(nat, Nat)
    inside = life.a.host.underlay.local_endpoints()[0]
    now = life.world.loop.time()
    for hub in life.network(life.a).hub_endpoints():
        external = nat.external_of(inside, hub, now)
        yield external is not None and nat.translate_in(hub, external, now) == inside


async def watch_bindings(life: Life, duration_s: float) -> int:
    """Seconds in which a hub could not have reached a."""
    lost = 0
    for _ in range(int(duration_s)):
        await asyncio.sleep(1.0)
        lost += not all(bindings(life))
    return lost


@pytest.mark.parametrize("lifetime_s", [120, 60])
def test_a_lifetime_is_learned_without_losing_a_binding_and_halves_what_an_idle_peer_sends(lifetime_s: int) -> None:
    life = Life(3, f"port-restricted/random/{lifetime_s}s", "none")

    async def story() -> None:
        assert await watch_bindings(life, 900.0) == 0
        search = life.nodes["a"].nat_watch.search
        assert search.is_found
        assert lifetime_s / 1.1 <= (search.lifetime_s or 0) < lifetime_s
        meter, detached = Meter(life.a), len(life.heard(life.a, HubDetached))
        assert await watch_bindings(life, HOUR_S if lifetime_s >= 120 else HOUR_S / 4) == 0
        sent, received = meter.take()
        if lifetime_s >= 120:
            assert sent <= HUBS_WANTED * KEEPALIVE_PER_HOUR / 2
            assert received <= HUBS_WANTED * KEEPALIVE_PER_HOUR / 2
        assert len(life.heard(life.a, HubDetached)) == detached
        assert len(life.network(life.a).hub_endpoints()) == HUBS_WANTED

    life.run(story())


def test_what_was_learned_is_there_after_a_restart_and_not_in_another_network() -> None:
    life = Life(4, "port-restricted/120s", "none")

    async def story() -> None:
        await asyncio.sleep(900.0)
        learned = life.nodes["a"].nat_watch.search
        assert learned.is_found
        assert len(json.loads(life.a.host.store.files[FILE])) == 1
        await life.nodes["a"].close()
        life.a.host.crash()
        life.a.host.restart()
        node = await life.start(life.a)
        await asyncio.sleep(20.0)
        assert node.nat_watch.search.refresh_s == learned.refresh_s
        life.world.move(life.a, life.world.home("full-cone/60s", name="elsewhere"))
        await asyncio.sleep(1.0)
        assert node.nat_watch.search.refresh_s < 30.0
        await asyncio.sleep(900.0)
        assert node.nat_watch.search.refresh_s < 60.0
        life.world.move(life.a, life.homes["a"])
        await asyncio.sleep(30.0)
        assert node.nat_watch.search.refresh_s == learned.refresh_s

    life.run(story())


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"x": 3}', b"\xff" * 100, b"[" * 20_000])
def test_a_damaged_memory_is_as_good_as_none(damage: bytes) -> None:
    life = Life(5, "port-restricted", "none")
    life.a.host.store.files[FILE] = damage

    async def story() -> None:
        await asyncio.sleep(60.0)
        assert (life.nodes["a"].nat_watch.search.lifetime_s or 0) >= 30.0

    life.run(story())


@pytest.mark.parametrize(
    ("kind", "mapping", "filtering", "hairpin"),
    [
        ("none", Mapping.NONE, Filtering.ENDPOINT_INDEPENDENT, None),
        ("full-cone", Mapping.ENDPOINT_INDEPENDENT, Filtering.ENDPOINT_INDEPENDENT, True),
        ("restricted", Mapping.ENDPOINT_INDEPENDENT, Filtering.ADDRESS_DEPENDENT, True),
        ("port-restricted/no-hairpin", Mapping.ENDPOINT_INDEPENDENT, Filtering.ADDRESS_AND_PORT_DEPENDENT, False),
        ("ad/ad", Mapping.ADDRESS_DEPENDENT, Filtering.ADDRESS_DEPENDENT, None),
        ("symmetric", Mapping.ADDRESS_AND_PORT_DEPENDENT, Filtering.ADDRESS_AND_PORT_DEPENDENT, None),
        ("apd/ei/random", Mapping.ADDRESS_AND_PORT_DEPENDENT, Filtering.ENDPOINT_INDEPENDENT, None),
    ],
)
def test_every_kind_of_nat_is_told_apart(
    kind: str, mapping: Mapping, filtering: Filtering, hairpin: bool | None
) -> None:
    life = Life(6, kind, "none")

    async def story() -> None:
        await asyncio.sleep(20.0)
        found = life.nodes["a"].nat_watch.behaviour()
        assert (found.mapping, found.filtering, found.hairpin) == (mapping, filtering, hairpin)
        if kind == "symmetric":
            assert found.allocation is Allocation.RANDOM

    life.run(story())


def test_a_nat_that_forgot_is_noticed_as_soon_as_traffic_flows_however_rare_the_keepalives() -> None:
    """The same time with 25 s and with 100 s between them."""
    took: list[float] = []

    def wait_for(settled_s: float) -> None:
        life = Life(7, "port-restricted/random/120s", "none")

        async def story() -> None:
            await asyncio.sleep(settled_s)
            nat = life.homes["a"].router.nat
            assert isinstance(nat, Nat)
            network = life.network(life.a)
            hub = network.attachments.connected()[0].overlay
            pinged = asyncio.ensure_future(_until_answers(life, hub, nat))
            took.append(await pinged)

        life.run(story())

    wait_for(1.0)
    wait_for(900.0)
    assert max(took) < 5.0
    assert took[1] < took[0] + 1.0


async def _until_answers(life: Life, hub, nat: Nat) -> float:  # type: ignore[no-untyped-def]
    rpc = life.network(life.a).rpc
    await rpc.request(hub, "dht.ping")
    nat.flush()
    started = life.world.loop.time()
    while True:
        try:
            await rpc.request(hub, "dht.ping", timeout=0.5)
            return life.world.loop.time() - started
        except P2pvpnError:
            continue


def test_a_hub_that_was_started_anew_is_found_out_by_the_next_keepalive() -> None:
    life = Life(8, "port-restricted/120s", "none")

    async def story() -> None:
        await asyncio.sleep(900.0)
        end = life.network(life.a).hub_ends()[0]
        hub = next(hub for hub in life.hubs if hub.overlay == end.overlay)
        hub.host.crash()
        hub.host.restart()
        await life.start(hub)
        await asyncio.sleep(150.0)
        session: Session | None = life.network(life.a).sessions.get(hub.overlay)
        assert session is None or session.current is None or session.current.established_at > 900.0
        assert len(life.network(life.a).hub_ends()) >= HUBS_WANTED

    life.run(story())


# Forged, reflected and replayed packets.


async def refused(life: Life, sender: Machine, hub: Machine, method: str, args: list[object]) -> None:
    with pytest.raises(P2pvpnError):
        await life.network(sender).rpc.request(hub.overlay, method, args)


def test_a_hub_knocks_nowhere_but_where_the_asker_is_and_showed_that_it_receives() -> None:
    life = Life(9, "full-cone", "full-cone")

    async def story() -> None:
        await asyncio.sleep(60.0)
        end = life.network(life.a).hub_ends()[0]
        hub = next(hub for hub in life.hubs if hub.overlay == end.overlay)
        meter: list[Endpoint] = []
        send = hub.host.underlay.send

        def note(path: Path, data: bytes) -> None:
            if knock_untrusted(data) is not None:
                meter.append(path.remote)
            send(path, data)

        hub.host.underlay.send = note  # type: ignore[method-assign]
        proofs = life.nodes[hub.name].services.proofs
        now = life.world.loop.time()
        mine = next(iter(life.nodes["a"]._reflexive.seen_by().values()))
        good = proofs.make(mine, now)
        b_at = next(iter(life.nodes["b"]._reflexive.seen_by().values()))
        tid = bytes(TRANSACTION_ID_BYTES)
        for args in (
            ask(VICTIM, proofs.make(VICTIM, now), tid, 0, b""),  # a stranger, even with a proof
            ask(b_at, proofs.make(b_at, now), tid, 0, b""),  # another peer
            ask(mine, bytes(PROOF_BYTES), tid, 0, b""),  # no proof
            ask(mine, proofs.make(Endpoint(mine.host, mine.port + 1), now), tid, 0, b""),  # another port's
            ask(mine, proofs.make(mine, now - 5000.0), tid, 0, b""),  # an old one
            ask(mine, good, tid, 53, b""),  # from a port that is not the hub's
            ask(mine, good, tid, 0, bytes(life.b.profile.member.peer_id)),  # by a peer
            ask(mine, good, tid, 0, bytes(20)),
            ask(mine, good, b"short", 0, b""),
            [],
            [mine.packed(), good, tid],
            ["text"] * 5,
            [Endpoint(mine.host, 0).packed(), good, tid, 0, b""],
        ):
            await refused(life, life.a, hub, KNOCK, args)
        await refused(life, life.a, hub, KNOCK_FOR, [VICTIM.packed(), tid])
        assert meter == []
        for _ in range(100):
            try:
                await life.network(life.a).rpc.request(hub.overlay, KNOCK, ask(mine, good, tid, 0, b""))
            except P2pvpnError:
                continue
        assert 1 <= len(meter) <= 50
        assert set(meter) == {mine}

    life.run(story())


def test_a_hub_that_lies_to_other_hubs_gets_a_stranger_a_few_small_packets_at_most() -> None:
    life = Life(10, "full-cone", "none")

    async def story() -> None:
        liar, hub = life.hubs[0], life.hubs[1]
        tid = bytes(TRANSACTION_ID_BYTES)
        for target in (Endpoint("127.0.0.1", 9), Endpoint("224.0.0.1", 9), Endpoint("0.0.0.0", 9)):
            await refused(life, liar, hub, KNOCK_FOR, [target.packed(), tid])
        granted = 0
        for _ in range(200):
            try:
                await life.network(liar).rpc.request(hub.overlay, KNOCK_FOR, [VICTIM.packed(), tid])
                granted += 1
            except P2pvpnError:
                pass
        assert granted <= 60

    life.run(story())


def test_forged_and_replayed_stun_changes_nothing_and_is_not_answered() -> None:
    """Everything that a stranger can copy from the wire, sent once more to the peer, from the hub's address too."""
    life = Life(11, "full-cone", "none")

    async def story() -> None:
        heard: list[tuple[Path, bytes]] = []
        node, underlay = life.nodes["a"], life.a.host.underlay
        receive = underlay.on_datagram

        def record(path: Path, data: bytes) -> None:
            heard.append((path, data))
            receive(path, data)

        underlay.on_datagram = record
        await asyncio.sleep(400.0)
        before = (node.nat_watch.behaviour(), node._reflexive.seen_by(), node.nat_watch.search.as_dict())
        meter = Meter(life.a)
        assert {data[:2] for _, data in heard} >= {b"\x01\x01", b"\x00\x11"}
        for path, data in heard:
            if data[:2] in (b"\x01\x01", b"\x00\x11"):  # answers and knocks
                for remote in (path.remote, VICTIM):
                    receive(Path(path.local, remote), data)
                    receive(Path(path.local._replace(port=4500), remote), data)
        for hub in node._reflexive.seen_by():
            local = underlay.local_endpoints()[0]
            for number in range(50):
                forged = bytes([number]) * TRANSACTION_ID_BYTES
                receive(Path(local, hub), stun.build(stun.success(forged, VICTIM)))
                receive(Path(local, hub), knock(forged))
                receive(Path(local, hub), stun.build(stun.request(forged)))
                receive(Path(local, hub), stun.build(stun.error(forged, 300, "elsewhere")))
        assert (node.nat_watch.behaviour(), node._reflexive.seen_by(), node.nat_watch.search.as_dict()) == before
        assert meter.take()[0] == 0

    life.run(story())


def test_a_hub_reflects_to_the_asker_alone_and_never_more_than_it_got() -> None:
    life = Life(12, "none", "none")

    async def story() -> None:
        hub = life.hubs[0]
        sent: list[tuple[Path, bytes]] = []
        hub.host.underlay.send = lambda path, data: sent.append((path, data))  # type: ignore[method-assign]
        local = Endpoint(hub.host.underlay.local_endpoints()[0].host, 3478)
        tid = bytes(TRANSACTION_ID_BYTES)
        for message in (
            stun.request(tid, change_request=6),
            stun.request(tid, username="a:b"),
            stun.success(tid, VICTIM),
            stun.indication(tid),
        ):
            hub.host.underlay.on_datagram(Path(local, VICTIM), stun.build(message))
        assert [one for one in sent if one[0].remote.host == VICTIM.host] == []
        request = stun.build(stun.request(tid, nonce=bytes(PROOF_BYTES)))
        hub.host.underlay.on_datagram(Path(local, VICTIM), request)
        ((path, data),) = [one for one in sent if one[0].remote.host == VICTIM.host]
        assert path == Path(local, VICTIM)
        assert len(data) + 28 < 1.5 * (len(request) + 28)

    life.run(story())
