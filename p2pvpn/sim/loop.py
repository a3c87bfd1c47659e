"""Virtual time: an asyncio event loop whose clock jumps to the next deadline, with its wall clock and entropy.

The loop's selector never blocks. When asyncio asks it to wait `timeout` seconds, the virtual clock moves on by that
much instead, so an hour of an idle network costs as much as its timers do. Nothing else of asyncio changes: tasks,
task groups, time-outs and `call_later` run as they are. `create_datagram_endpoint` opens sockets on the simulated
network that was given to the loop, so library code that opens sockets needs no change either; every other way out to
the real world fails loudly, because its timing would not repeat.

When no timer is left and no task can run, everybody waits for nothing: `run` says so, and names who waits where.

A context may have a `HostClock` of its own, which stands still while the machine sleeps, as CLOCK_MONOTONIC does. The
code of that machine sees its own time; `instant` and `call_at_instant` are the world's.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import math
import random
import selectors
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from typing import Any, NoReturn, Protocol, TypeVar

from p2pvpn.core.errors import LocalError

T = TypeVar("T")

START_S = 1_000.0
"""Virtual monotonic seconds at the start: not 0.0, which means `never` in counters."""
EPOCH_S = 1_800_000_000.0
"""Wall clock at the start, seconds since the Unix epoch (January 2027): any fixed instant will do."""
DEFAULT_LIMIT_S = 3_600.0
"""Virtual seconds that `run` allows unless told otherwise."""
SPIN_LIMIT = 1_000_000
"""Turns of the loop at one instant before somebody is said to spin; a busy instant of 1,000 hosts needs 1 %."""
ROUNDING_S = 1e-9
"""A timer of a machine with a clock of its own never goes off before its time by that clock, for want of digits."""
UNWIND_S = 60.0
"""Virtual seconds that cancelled tasks get for their last words."""


ROUNDING_S = 1e-9
"""A timer of a machine that slept must not go off before its time by that machine's own clock: floats are rounded."""


class SimulationError(LocalError):
    """The simulation cannot go on, or something in it failed that nobody caught."""


class SimulationStuckError(SimulationError):
    """Everybody waits for nothing, or somebody spins and time stands still."""


class SimulationTimeoutError(SimulationError):
    """The virtual time limit of `run` came before the end of the story."""


class UdpNetwork(Protocol):
    """Where `create_datagram_endpoint` of the loop opens its sockets."""

    def open_udp(
        self, protocol: asyncio.DatagramProtocol, local: tuple[str, int] | None, remote: tuple[str, int] | None
    ) -> asyncio.DatagramTransport:
        """Bind a socket and return its transport. Raises OSError as a real bind does."""
        ...


class HostClock:
    """A machine's monotonic clock: the world's time without the `slept_s` seconds in which it stood still."""

    __slots__ = ("slept_s",)

    def __init__(self) -> None:
        self.slept_s = 0.0


host_clock: contextvars.ContextVar[HostClock | None] = contextvars.ContextVar("host_clock", default=None)


class _JumpingSelector(selectors.BaseSelector):
    """Waits by moving the loop's clock."""

    def __init__(self, advance: Callable[[float | None], None]) -> None:
        self._real = selectors.DefaultSelector()
        self._advance = advance

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._real.get_map()

    def close(self) -> None:
        self._real.close()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout != 0:
            ready = self._real.select(0)  # only the loop's own wake-up pipe can be in there
            if ready:
                return ready
        self._advance(timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """The event loop of one simulated world.

    `problems` collects what nobody caught: exceptions in callbacks and in tasks that no one awaited. `run` raises
    SimulationError for them, so that a failure in the background cannot pass unseen.
    """

    def __init__(self) -> None:
        self._now = START_S
        self._limit_at = math.inf
        self._turns = 0
        self._has_sleepers = False
        self.network: UdpNetwork | None = None
        self.problems: list[str] = []
        super().__init__(_JumpingSelector(self._advance))
        self.set_exception_handler(self._note_problem)

    def time(self) -> float:
        """Virtual monotonic seconds, as the machine sees them whose code is running."""
        return self._now - self._slept_s(None) if self._has_sleepers else self._now

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        """`when` is in the time of the machine whose context it is."""
        if self._has_sleepers:
            slept_s = self._slept_s(context)
            when += slept_s + (ROUNDING_S if slept_s else 0.0)
        return super().call_at(when, callback, *args, context=context)

    @property
    def instant(self) -> float:
        """The world's time, whoever asks."""
        return self._now

    def call_at_instant(
        self, when: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        """`when` is in the world's time."""
        return super().call_at(when, callback, *args, context=context)

    def _slept_s(self, context: contextvars.Context | None) -> float:
        clock = host_clock.get() if context is None else context.get(host_clock)
        return 0.0 if clock is None else clock.slept_s

    @property
    def elapsed(self) -> float:
        """Virtual seconds since the start."""
        return self._now - START_S

    def run(self, story: Coroutine[Any, Any, T], limit_s: float = DEFAULT_LIMIT_S) -> T:
        """Run the story to its end; background tasks stay for the next `run`.

        Raises SimulationStuckError when nothing can happen any more, SimulationTimeoutError when `limit_s` virtual
        seconds were not enough, and SimulationError for failures in the background.
        """
        task = self.create_task(story, name="story")
        self._limit_at = self._now + limit_s
        self._turns = 0
        try:
            result = self.run_until_complete(task)
        except (SimulationStuckError, SimulationTimeoutError):
            self._unwind([task])
            raise
        finally:
            self._limit_at = math.inf
        self._raise_problems()
        return result

    def cancel_timers(self, belongs: Callable[[contextvars.Context], bool]) -> None:
        """Cancel the timers that were set in a context for which `belongs` is true."""
        for handle in list(self._scheduled):  # type: ignore[attr-defined]
            if belongs(handle._context):
                handle.cancel()

    def freeze(self, belongs: Callable[[contextvars.Context], bool]) -> list[asyncio.Handle]:
        """Take away everything that is due, now or later, in a context for which `belongs` is true; for `thaw`."""
        ready, scheduled = self._ready, self._scheduled  # type: ignore[attr-defined]
        frozen = [handle for handle in (*ready, *scheduled) if belongs(handle._context)]
        gone = set(map(id, frozen))
        kept = [handle for handle in ready if id(handle) not in gone]
        ready.clear()
        ready.extend(kept)
        scheduled[:] = [handle for handle in scheduled if id(handle) not in gone]
        heapq.heapify(scheduled)
        for handle in frozen:
            if isinstance(handle, asyncio.TimerHandle):
                handle._scheduled = False  # type: ignore[attr-defined]
        return frozen

    def thaw(self, frozen: Iterable[asyncio.Handle], clock: HostClock, slept_s: float) -> None:
        """Go on. The clock stood still for `slept_s`; what is due by it runs at once, the earliest first."""
        clock.slept_s += slept_s
        self._has_sleepers = self._has_sleepers or clock.slept_s > 0.0
        for handle in frozen:
            if not isinstance(handle, asyncio.TimerHandle):
                self._ready.append(handle)  # type: ignore[attr-defined]
            elif not handle.cancelled():
                handle._when += slept_s  # type: ignore[attr-defined]
                handle._scheduled = True  # type: ignore[attr-defined]
                heapq.heappush(self._scheduled, handle)  # type: ignore[attr-defined]

    def close(self) -> None:
        """Cancel every task, let each say its last words, and close the loop."""
        if self.is_closed():
            return
        self._unwind(list(asyncio.all_tasks(self)))
        self.run_until_complete(self.shutdown_asyncgens())
        super().close()

    def _unwind(self, tasks: list[asyncio.Task[Any]]) -> None:
        for task in tasks:
            task.cancel()
        self._limit_at = self._now + UNWIND_S
        self._turns = 0
        with suppress(SimulationError):
            self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True)) if tasks else None
        self._limit_at = math.inf

    def _advance(self, timeout: float | None) -> None:
        if timeout == 0:
            self._turns += 1
            if self._turns > SPIN_LIMIT:
                raise SimulationStuckError(
                    f"time stands still at {self.elapsed:.6f} s: somebody spins\n{self._waiting()}"
                )
            return
        self._turns = 0
        if timeout is None:
            raise SimulationStuckError(f"everybody waits for nothing at {self.elapsed:.6f} s\n{self._waiting()}")
        if self._now + timeout > self._limit_at:
            self._now = max(self._now, self._limit_at)
            raise SimulationTimeoutError(f"not done after {self.elapsed:.3f} virtual seconds\n{self._waiting()}")
        self._now += timeout

    def _waiting(self) -> str:
        lines = []
        for task in asyncio.all_tasks(self):
            stack = task.get_stack(limit=1)
            where = f"{stack[-1].f_code.co_filename}:{stack[-1].f_lineno}" if stack else "nowhere"
            lines.append(f"  {task.get_name()} ({task.get_coro().__qualname__}) at {where}")  # type: ignore[union-attr]
        return "\n".join(sorted(lines))

    def _note_problem(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        problem = context.get("exception")
        text = f"{self.elapsed:.6f} s: {context.get('message', '')}"
        if problem is not None:
            text += f": {type(problem).__name__}: {problem}"
            trace = problem.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            if trace is not None:
                text += f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})"
        self.problems.append(text)

    def _raise_problems(self) -> None:
        if self.problems:
            problems, self.problems = self.problems, []
            raise SimulationError("failed in the background:\n  " + "\n  ".join(problems))

    # What leads out of the process, or into threads

    async def create_datagram_endpoint(  # type: ignore[override]
        self,
        protocol_factory: Callable[[], asyncio.DatagramProtocol],
        local_addr: tuple[str, int] | None = None,
        remote_addr: tuple[str, int] | None = None,
        **options: Any,
    ) -> tuple[asyncio.DatagramTransport, asyncio.DatagramProtocol]:
        """A UDP socket on the simulated network, on the host that has the local address (underlay or overlay)."""
        if self.network is None:
            self._refuse("a datagram endpoint without a simulated network")
        protocol = protocol_factory()
        transport = self.network.open_udp(protocol, local_addr, remote_addr)
        protocol.connection_made(transport)
        return transport, protocol

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Runs the function at once: threads would make runs differ."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as problem:  # noqa: BLE001 (handed to whoever awaits, as an executor does)
            future.set_exception(problem)
        return future

    async def create_connection(self, *args: Any, **options: Any) -> NoReturn:
        self._refuse("a TCP connection")

    async def create_server(self, *args: Any, **options: Any) -> NoReturn:
        self._refuse("a TCP server")

    async def getaddrinfo(self, *args: Any, **options: Any) -> NoReturn:
        self._refuse("a name look-up")

    def _refuse(self, what: str) -> NoReturn:
        raise SimulationError(f"{what} is outside of the simulation")


class SimWallClock:
    """Seconds since the Unix epoch on virtual time; `skew_s` is how wrong this host's clock is."""

    def __init__(self, loop: VirtualLoop, skew_s: float = 0.0) -> None:
        self._loop = loop
        self.skew_s = skew_s

    def __call__(self) -> float:
        return EPOCH_S + self._loop.elapsed + self.skew_s


class SeededEntropy:
    """Bytes that depend on the seed and the name alone. Fit for simulations, and for nothing else."""

    def __init__(self, seed: int, name: str) -> None:
        self._draw = seeded(seed, f"entropy/{name}")

    def __call__(self, count: int, /) -> bytes:
        return self._draw.randbytes(count)


def seeded(seed: int, purpose: str) -> random.Random:
    """A generator of its own for each purpose, so that one more host does not change what the others draw."""
    return random.Random(f"{seed}/{purpose}")
