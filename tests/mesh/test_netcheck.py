"""The engine's side of `p2pvpn netcheck`, on the simulated Internet."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from p2pvpn.punch import explain
from p2pvpn.sim.nat import NatKind
from p2pvpn.sim.start import start_node
from p2pvpn.sim.world import World

from .life import Life

EI, AD, APD = "endpoint-independent", "address-dependent", "address-and-port-dependent"


async def check(life: Life) -> dict[str, Any]:
    found: dict[str, Any] = await life.nodes["a"].net_check.run()
    return found


@pytest.mark.parametrize(
    ("kind", "truth", "words"),
    [
        ("none", ("none", EI, "unknown", None), "any NAT reach you"),
        ("full-cone", (EI, EI, "preserving", True), "any NAT reach you"),
        ("restricted/no-hairpin", (EI, AD, "preserving", False), "direct with everybody, once"),
        ("port-restricted", (EI, APD, "preserving", True), "but peers behind hard NATs"),
        ("ad/apd/sequential", (AD, APD, "sequential", None), "guessing the next port"),
        ("symmetric", (APD, APD, "random", None), "with luck"),
    ],
)
def test_every_kind_of_nat_is_told(kind: str, truth: tuple[str, str, str, bool | None], words: str) -> None:
    life = Life(31, kind, "none")

    async def story() -> None:
        started = life.world.loop.time()
        found = await check(life)
        assert life.world.loop.time() - started < 5.0
        ipv4, ipv6 = found["families"]
        assert (ipv4["mapping"], ipv4["filtering"], ipv4["allocation"], ipv4["hairpin"]) == truth
        assert ipv4["udp"] == "open"
        assert words in ipv4["summary"]
        assert len(ipv4["seen"]) == 3
        assert "summary" in ipv6
        assert "mapping" not in ipv6
        assert [hub["attached"] for hub in found["hubs"]].count(True) >= 2
        assert all(10.0 < hub["rtt_ms"] < 200.0 for hub in found["hubs"])

    life.run(story())


def test_a_nat_that_became_another_is_told_as_it_is_now() -> None:
    life = Life(32, "full-cone", "none")

    async def story() -> None:
        assert (await check(life))["families"][0]["filtering"] == EI
        nat = life.homes["a"].router.nat
        assert nat is not None
        nat.kind = NatKind.of("symmetric")
        nat.flush()
        await check(life)
        await asyncio.sleep(10.0)
        ipv4 = (await check(life))["families"][0]
        assert (ipv4["mapping"], ipv4["filtering"]) == (APD, APD)

    life.run(story())


def test_where_udp_is_blocked_it_says_so() -> None:
    life = Life(33, "full-cone", "none")

    async def story() -> None:
        life.homes["a"].router.blocks_udp = True
        found = await check(life)
        assert found["families"][0]["udp"] == "blocked"
        assert found["families"][0]["summary"] in (explain.BLOCKED, explain.NO_ANSWER)
        assert all(hub["rtt_ms"] is None for hub in found["hubs"])

    life.run(story())


def test_each_family_is_told_for_itself() -> None:
    with World(34) as world:
        hubs = [world.hub(ipv6=True) for _ in range(2)]
        machine = world.peer("a", behind=world.home("symmetric", ipv6=True))
        world.publish()

        async def story() -> None:
            for hub in hubs:
                await start_node(world, hub)
            node = await start_node(world, machine)
            await asyncio.sleep(10.0)
            ipv4, ipv6 = (await node.net_check.run())["families"]  # type: ignore[misc]
            assert ipv4["mapping"] == APD
            assert ipv6["mapping"] == "none"
            assert [seen["hub"] for seen in ipv6["seen"]] == ["hub1", "hub2"]
            await node.close()

        world.run(story())
