"""The virtual-time loop: asyncio as it is, on a clock that jumps."""

import asyncio
import time

import pytest

from p2pvpn.sim.loop import (
    EPOCH_S,
    SeededEntropy,
    SimulationError,
    SimulationStuckError,
    SimulationTimeoutError,
    SimWallClock,
    VirtualLoop,
)


@pytest.fixture
def loop():
    loop = VirtualLoop()
    yield loop
    loop.close()


def test_an_hour_of_sleep_costs_no_time(loop):
    before = time.perf_counter()
    loop.run(asyncio.sleep(3599.5))
    assert loop.elapsed == pytest.approx(3599.5)
    assert time.perf_counter() - before < 1


def test_timers_fire_in_order_of_their_deadlines(loop):
    fired = []

    async def story():
        for delay in (3.0, 1.0, 2.0):
            loop.call_later(delay, lambda delay=delay: fired.append((delay, loop.elapsed)))
        await asyncio.sleep(4)

    loop.run(story())
    assert [delay for delay, _ in fired] == [1.0, 2.0, 3.0]
    assert all(at == pytest.approx(delay) for delay, at in fired)


def test_ten_thousand_timers_are_cheap(loop):
    async def story():
        async with asyncio.TaskGroup() as group:
            for number in range(10_000):
                group.create_task(asyncio.sleep(number % 100))

    before = time.perf_counter()
    loop.run(story())
    assert loop.elapsed == pytest.approx(99)
    assert time.perf_counter() - before < 5


def test_time_outs_and_task_groups_work(loop):
    async def story():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.Event().wait()
        with pytest.raises(ExceptionGroup):
            await _group_that_fails()
        return loop.elapsed

    assert loop.run(story()) == pytest.approx(6)


async def _group_that_fails():
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.sleep(1000))
        group.create_task(_fail_after(1))


async def _fail_after(seconds):
    await asyncio.sleep(seconds)
    raise ValueError("planned")


def test_waiting_for_nothing_is_an_error_that_names_who_waits(loop):
    async def waits_in_vain():
        await asyncio.Event().wait()

    async def story():
        await asyncio.create_task(waits_in_vain(), name="poor soul")

    with pytest.raises(SimulationStuckError, match=r"everybody waits for nothing(.|\n)*poor soul.*waits_in_vain"):
        loop.run(story())


def test_a_story_that_takes_too_long_is_stopped_at_the_limit(loop):
    async def story():
        while True:  # noqa: ASYNC110
            await asyncio.sleep(7)

    with pytest.raises(SimulationTimeoutError, match=r"after 100\.000 virtual seconds"):
        loop.run(story(), limit_s=100)
    assert loop.elapsed == pytest.approx(100)


def test_spinning_without_time_is_an_error(loop, monkeypatch):
    monkeypatch.setattr("p2pvpn.sim.loop.SPIN_LIMIT", 1000)

    async def story():
        while True:  # noqa: ASYNC110
            await asyncio.sleep(0)

    with pytest.raises(SimulationStuckError, match="time stands still"):
        loop.run(story())


def test_background_tasks_live_on_between_runs(loop):
    ticks = []

    async def ticker():
        while True:
            await asyncio.sleep(1)
            ticks.append(loop.elapsed)

    async def start():
        return asyncio.create_task(ticker())

    task = loop.run(start())
    loop.run(asyncio.sleep(10.5))
    assert len(ticks) == 10
    loop.close()
    assert task.cancelled()


def test_an_exception_in_a_callback_fails_the_run(loop):
    async def story():
        loop.call_later(1, lambda: 1 / 0)
        await asyncio.sleep(2)

    with pytest.raises(SimulationError, match="ZeroDivisionError"):
        loop.run(story())
    loop.run(asyncio.sleep(1))


def test_executor_work_runs_at_once_and_in_order(loop):
    async def story():
        first = await loop.run_in_executor(None, lambda: 7)
        with pytest.raises(KeyError):
            await loop.run_in_executor(None, {}.__getitem__, "absent")
        return first + await asyncio.to_thread(lambda: 1)

    assert loop.run(story()) == 8


def test_the_real_network_is_out_of_reach(loop):
    async def story():
        with pytest.raises(SimulationError, match="TCP connection"):
            await asyncio.open_connection("192.0.2.1", 80)
        with pytest.raises(SimulationError, match="look-up"):
            await loop.getaddrinfo("example.net", 80)

    loop.run(story())


def test_the_wall_clock_follows_virtual_time_with_its_skew(loop):
    right, wrong = SimWallClock(loop), SimWallClock(loop, skew_s=-90)
    loop.run(asyncio.sleep(10))
    assert right() == pytest.approx(EPOCH_S + 10)
    assert wrong() == pytest.approx(EPOCH_S - 80)


def test_entropy_repeats_by_seed_and_name_and_only_so():
    draws = [SeededEntropy(seed, name)(16) for seed, name in ((1, "a"), (1, "a"), (1, "b"), (2, "a"))]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3
