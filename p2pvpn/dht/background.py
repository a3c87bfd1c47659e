"""Tasks that outlive the call that started them, with an owner who ends them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Background:
    """The tasks of one owner. A task that fails is logged: nobody else will hear of it."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self.closed = False

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, story: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Run `story` as a task of this owner."""
        task = asyncio.get_running_loop().create_task(story, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        if self.closed:
            task.cancel()
        return task

    async def close(self) -> None:
        """Cancel every task and wait for its end."""
        self.closed = True
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        problem = None if task.cancelled() else task.exception()
        if problem is not None:
            _log.error("background task %s failed", task.get_name(), exc_info=problem)
