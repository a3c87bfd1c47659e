"""Waiting with a limit, where running out of time is an answer and no error."""

from __future__ import annotations

import asyncio


async def set_within(event: asyncio.Event, limit_s: float) -> bool:
    """Wait for an event; whether it came in time."""
    try:
        async with asyncio.timeout(limit_s):
            await event.wait()
    except TimeoutError:
        return False
    return True
