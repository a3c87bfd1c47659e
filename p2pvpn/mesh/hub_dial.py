"""How a hub is dialled: over UDP, and when that stays silent for a second over TCP besides."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from p2pvpn.core.address import Endpoint, any_local

from .connect import Attempt, ConnectError, Finder
from .services import Services

STREAM_TRIES = 2
"""Attempts at a stream while a hub is dialled."""
NO_ANSWER = bytes(8)
"""The responder's SPI as long as it has not answered."""


async def dial_hub(finder: Finder, services: Services, attempt: Attempt, endpoints: Sequence[Endpoint]) -> None:
    """Bring an SA up by whichever way is open first; the other one is dropped. Raises ConnectError when neither is."""
    besides = Attempt(attempt.overlay)
    by_udp = asyncio.create_task(_dial_udp(finder, services, attempt, endpoints), name="dial over UDP")
    by_tcp = asyncio.create_task(_dial_stream(finder, services, attempt, besides), name="dial over TCP")
    waiting, problems = {by_udp, by_tcp}, dict[str, None]()
    try:
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in (one for one in (by_udp, by_tcp) if one in done):
                try:
                    await task
                except ConnectError as problem:
                    problems[str(problem)] = None
                else:
                    return
        raise ConnectError("IKE", "; ".join(problems))
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        attempt.begin_again(services)
        besides.begin_again(services)
        finder.tidy_lines(attempt.overlay)


async def _dial_udp(finder: Finder, services: Services, attempt: Attempt, endpoints: Sequence[Endpoint]) -> None:
    problem = ConnectError("locate", "the hub has no address")
    for endpoint in endpoints:
        attempt.path = any_local(endpoint, services.underlay.port)
        try:
            await finder.dial(attempt, services.tuning.hub_dial_timeout_s)
            return
        except ConnectError as failure:
            problem = failure
            attempt.begin_again(services)
    raise problem


async def _dial_stream(finder: Finder, services: Services, by_udp: Attempt, attempt: Attempt) -> None:
    """When UDP has stayed silent: the same over a stream."""
    tuning = services.tuning
    await asyncio.sleep(tuning.stream_after_s)
    view = services.ike.endpoint.view(by_udp.sa_id) if by_udp.sa_id is not None else None
    if view is not None and view.spi_r != NO_ANSWER:
        raise ConnectError("TCP", "it answers over UDP")
    for left in reversed(range(STREAM_TRIES)):
        try:
            attempt.path = await finder.line_to(attempt.overlay)
            break
        except ConnectError:
            if not left:
                raise
            await asyncio.sleep(tuning.stream_retry_s)
    await finder.dial(attempt, tuning.hub_dial_timeout_s)
