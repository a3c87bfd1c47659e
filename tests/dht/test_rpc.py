"""The RPC engine on virtual time: loss, repetition, bounds and rubbish."""

from __future__ import annotations

import asyncio
from ipaddress import IPv6Address

import pytest

from p2pvpn.core.errors import LocalError, WireError
from p2pvpn.dht import answers, messages, rpc
from p2pvpn.dht.background import Background
from p2pvpn.dht.messages import Request, Result
from p2pvpn.dht.packing import pack
from p2pvpn.dht.rpc import Code, RpcClosedError, RpcNode, RpcRefusedError, RpcTimeoutError

from .world import World


async def pair(world: World) -> tuple[RpcNode, RpcNode]:
    return await world.rpc(world.registry.join("alice")), await world.rpc(world.registry.join("bob"))


def test_a_request_brings_its_result_and_knows_who_asked() -> None:
    world = World()

    async def story() -> None:
        alice, bob = await pair(world)
        bob.register("echo", lambda sender, args: [sender.packed, args])
        assert await alice.request(bob.local, "echo", [1, b"two", "three", None, [True]]) == [
            alice.local.packed,
            [1, b"two", "three", None, [True]],
        ]

    world.run(story())


@pytest.mark.parametrize("loss", [0.01, 0.1, 0.3])
def test_lost_datagrams_are_repeated_until_answered(loss: float) -> None:
    world = World(loss=loss)

    async def story() -> int:
        alice, bob = await pair(world)
        bob.register("add", lambda sender, args: sum(args), repeatable=True)
        results = await asyncio.gather(
            *(alice.request(bob.local, "add", [number, 1], timeout=10) for number in range(200))
        )
        assert results == [number + 1 for number in range(200)]
        return alice.counters.retransmitted

    retransmitted = world.run(story())
    assert retransmitted < 200 * (0.1 + 4 * loss)


def test_a_repeated_request_runs_once_and_gets_the_first_answer_again() -> None:
    world = World(loss=0.3, seed=4)
    world.tunnels.duplication = 0.5

    async def story() -> None:
        alice, bob = await pair(world)
        runs: list[int] = []

        def count(sender: IPv6Address, args: list[int]) -> int:
            runs.append(args[0])
            return len(runs)

        async def slow(sender: IPv6Address, args: list[int]) -> int:
            await asyncio.sleep(0.4)
            return count(sender, args)

        bob.register("count", count)
        bob.register("slow", slow)
        await asyncio.gather(
            *(alice.request(bob.local, "count" if n % 2 else "slow", [n], timeout=20) for n in range(60))
        )
        assert sorted(runs) == list(range(60))
        assert bob.counters.duplicates > 20

    world.run(story())


def test_the_wait_before_repeating_follows_the_path_also_when_handlers_are_slow() -> None:
    world = World(delay_s=0.2)

    async def story() -> None:
        alice, bob = await pair(world)

        async def slow(sender: IPv6Address, args: list[object]) -> None:
            await asyncio.sleep(0.1)

        bob.register("slow", slow, repeatable=True)
        for _ in range(20):
            await alice.request(bob.local, "slow")
        before = alice.counters.retransmitted
        for _ in range(10):
            await alice.request(bob.local, "slow")
        assert alice.counters.retransmitted - before <= 10, "the round trip is learned from repeated requests too"
        world.tunnels.delay_s = 0.005
        for _ in range(60):
            await alice.request(bob.local, "slow")
        assert alice._trip(bob.local).rto_s < 0.15, "time in the handler is not time on the path"

    world.run(story())


def test_silence_is_a_time_out_and_is_remembered_until_something_comes() -> None:
    world = World()

    async def story() -> None:
        alice, bob = await pair(world)
        bob.register("ping", lambda sender, args: None)
        alice.register("ping", lambda sender, args: None)
        world.tunnels.down.add(str(bob.local))
        began = world.now
        with pytest.raises(RpcTimeoutError):
            await alice.request(bob.local, "ping")
        assert world.now - began == pytest.approx(rpc.REQUEST_S)
        assert alice.is_silent(bob.local)
        world.tunnels.down.clear()
        await bob.request(alice.local, "ping")
        assert not alice.is_silent(bob.local)

    world.run(story())


def test_refusals_carry_code_and_text_and_broken_handlers_say_no_more_than_internal(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World()

    async def story() -> None:
        alice, bob = await pair(world)

        def refuse(sender: IPv6Address, args: list[object]) -> object:
            raise RpcRefusedError(77, "not today")

        def choke(sender: IPv6Address, args: list[object]) -> object:
            raise WireError("what is this")

        async def crash(sender: IPv6Address, args: list[object]) -> object:
            return {}[args[0]]

        for name, handler in (("refuse", refuse), ("choke", choke), ("crash", crash)):
            bob.register(name, handler)
        bob.register("huge", lambda sender, args: bytes(9000))
        bob.register("odd", lambda sender, args: object())
        for method, code in (
            ("refuse", 77),
            ("choke", Code.BAD_ARGUMENTS),
            ("crash", Code.INTERNAL),
            ("huge", Code.TOO_LARGE),
            ("odd", Code.INTERNAL),
            ("__init__", Code.UNKNOWN_METHOD),
        ):
            with pytest.raises(RpcRefusedError) as refused:
                await alice.request(bob.local, method, ["secret"])
            assert refused.value.code == code
            assert "secret" not in refused.value.text
        with pytest.raises(LocalError):
            await alice.request(bob.local, "refuse", [bytes(9000)])

    world.run(story())


def test_a_node_asks_itself_without_the_network() -> None:
    world = World(loss=1.0)

    async def story() -> None:
        alice, _ = await pair(world)
        alice.register("echo", lambda sender, args: (sender.packed, args))
        assert await alice.request(alice.local, "echo", [b"x"]) == [alice.local.packed, [b"x"]]

    world.run(story())


def test_a_cancelled_request_leaves_nothing_behind_and_its_late_answer_is_a_stray() -> None:
    world = World()

    async def story() -> None:
        alice, bob = await pair(world)
        bob.register("ping", lambda sender, args: None)
        asking = asyncio.ensure_future(alice.request(bob.local, "ping"))
        await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.sleep(1)
        assert alice.counters.strays == 1
        assert (alice._pending, alice._lanes, alice._waiting) == ({}, {}, 0)

    world.run(story())


def test_closing_ends_requests_and_handlers() -> None:
    world = World()

    async def story() -> None:
        alice, bob = await pair(world)
        ended = asyncio.Event()

        async def forever(sender: IPv6Address, args: list[object]) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        bob.register("forever", forever)
        asking = asyncio.ensure_future(alice.request(bob.local, "forever", timeout=100))
        await asyncio.sleep(1)
        await bob.close()
        assert ended.is_set()
        await alice.close()
        with pytest.raises(RpcClosedError):
            await asking
        with pytest.raises(RpcClosedError):
            await alice.request(bob.local, "forever")

    world.run(story())


def test_rubbish_is_counted_and_harms_nobody() -> None:
    world = World()

    async def story() -> None:
        alice, bob = await pair(world)
        bob.register("echo", lambda sender, args: args)
        good = messages.build(Request(b"12345678", 0, "echo", []))
        for data in (b"", b"\x00", good[:-1], good + b"\x00", pack([2, 0, b"12345678", 0, "echo", []]), bytes(9000)):
            bob._receive_untrusted(data, str(alice.local), rpc.DHT_PORT)
        bob._receive_untrusted(good, str(alice.local), 40000)
        bob._receive_untrusted(good, "192.0.2.1", rpc.DHT_PORT)
        assert bob.counters.malformed == 8
        assert bob.counters.answered == 0
        assert await alice.request(bob.local, "echo", [1]) == [1]

    world.run(story())


def test_an_answer_from_somebody_else_is_not_believed() -> None:
    world = World()

    async def story() -> None:
        alice, bob = await pair(world)
        asking = asyncio.ensure_future(alice.request(bob.local, "ping", timeout=1))
        await asyncio.sleep(0.001)
        (message_id,) = alice._pending
        forged = messages.build(messages.Result(message_id, 0, 0, "forged"))
        alice._receive_untrusted(forged, "fd00::666", rpc.DHT_PORT)
        assert alice.counters.strays == 1
        with pytest.raises(RpcRefusedError):
            await asking

    world.run(story())


def test_a_flood_from_one_peer_is_dropped_and_others_are_served() -> None:
    world = World()

    async def story() -> None:
        alice, bob = await pair(world)
        carol = await world.rpc(world.registry.join("carol"))
        runs = 0

        def work(sender: IPv6Address, args: list[object]) -> None:
            nonlocal runs
            runs += sender == alice.local

        bob.register("work", work)
        for number in range(5000):
            alice._send(bob.local, Request(number.to_bytes(8, "big"), 0, "work", []))
        await carol.request(bob.local, "work")
        assert runs <= rpc.PEER_BURST + rpc.PEER_RATE
        assert bob.counters.limited > 4000
        assert len(bob._answers) <= 300

    world.run(story())


def test_answers_are_remembered_for_a_while_and_only_so_many() -> None:
    memory = answers.AnswerMemory()
    source = IPv6Address("fd00::1")
    for number in range(answers.MAX_ANSWERS + 10):
        memory.remember((source, number.to_bytes(8, "big")), Result(bytes(8), 0, 0, number), float(number >= 20))
    assert len(memory) == memory.count(source) == answers.MAX_ANSWERS
    assert memory.recall((source, (5).to_bytes(8, "big")), 1.0) is None
    assert memory.recall((source, (15).to_bytes(8, "big")), 1.0) == Result(bytes(8), 0, 0, 15)
    assert memory.recall((source, (15).to_bytes(8, "big")), answers.ANSWER_KEPT_S) is None
    assert memory.recall((source, (25).to_bytes(8, "big")), answers.ANSWER_KEPT_S) == Result(bytes(8), 0, 0, 25)
    assert memory.recall((source, (25).to_bytes(8, "big")), answers.ANSWER_KEPT_S + 1) is None
    assert (len(memory), memory.count(source)) == (0, 0)


def test_a_background_task_that_fails_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        background = Background()

        async def fail() -> None:
            raise ValueError("broken")

        background.spawn(fail(), "the one that fails")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(background) == 0
        await background.close()
        late = background.spawn(asyncio.sleep(100), "too late")
        await asyncio.wait((late,))
        assert late.cancelled()

    asyncio.run(story())
    assert "the one that fails" in caplog.text


def test_requests_beyond_the_lane_wait_and_all_are_served() -> None:
    world = World()

    async def story() -> None:
        alice, bob = await pair(world)
        bob.is_hub = lambda address: True
        busy = most = 0

        async def work(sender: IPv6Address, args: list[object]) -> None:
            nonlocal busy, most
            busy += 1
            most = max(most, busy)
            await asyncio.sleep(0.05)
            busy -= 1

        bob.register("work", work)
        await asyncio.gather(*(alice.request(bob.local, "work", timeout=30) for _ in range(400)))
        assert most <= rpc.MAX_IN_FLIGHT

    world.run(story())
