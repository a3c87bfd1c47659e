"""What every part of the engine shares on one machine; one object instead of ten parameters."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from p2pvpn.core.address import Endpoint
from p2pvpn.core.errors import P2pvpnError
from p2pvpn.core.ports import Entropy, WallClock
from p2pvpn.punch.agent import PunchAgent
from p2pvpn.punch.limits import PunchLimits
from p2pvpn.punch.mux import PunchMux
from p2pvpn.punch.proof import Proofs

from .events import EventSink
from .ike_driver import IkeDriver
from .lines import Lines
from .ports import Forwarder, Plane, Underlay
from .pump import Pump
from .relaying import RelayClientPump
from .sampling import Sampler
from .tuning import Tuning

log = logging.getLogger(__name__)


class TaskSet:
    """Owns tasks that are started from callbacks: none is lost, all end with the engine, a failure is not hidden.

    One of ours is a line in the log; any other is a mistake, and the loop's exception handler tells it in full.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (problem := task.exception()) is not None:
            if isinstance(problem, P2pvpnError):  # said in one line: it is no mistake of ours, and the engine goes on
                log.error("%s failed: %s", task.get_name(), problem)
                return
            loop = asyncio.get_running_loop()
            loop.call_exception_handler(
                {"message": f"task {task.get_name()} failed", "exception": problem, "task": task}
            )

    async def close(self) -> None:
        """Cancel all and wait for their end."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(slots=True)
class Services:
    """Ports, drivers and tables of one machine. `forwarder` is None where no hub role is wanted."""

    underlay: Underlay
    plane: Plane
    forwarder: Forwarder | None
    entropy: Entropy
    wall: WallClock
    emit: EventSink
    ike: IkeDriver
    punch: PunchMux
    punch_limits: PunchLimits
    relays: RelayClientPump
    lines: Lines
    tuning: Tuning
    sampler: Sampler
    proofs: Proofs
    hub_used: Callable[[Endpoint], None] = lambda at: None
    """Traffic with the hub there went both ways a moment ago."""
    suspect: Callable[[], None] = lambda: None
    """Asks the hubs at once where they see us: our NAT may have changed."""
    agents: dict[PunchAgent, Pump] = field(default_factory=dict)
    """Who drives a punching agent."""
    guessing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the one run of guesses that is under way (`hardnat`)."""
    tasks: TaskSet = field(default_factory=TaskSet)

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()
