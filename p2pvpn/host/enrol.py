"""Enrolment over TCP: TLS pinned to the issuer, through whichever hub answers.

    client > hub   magic (4 bytes), peer ID of the issuer (20 bytes)        in the clear
    client > hub   TLS 1.3 to the issuer; its key must have that peer ID
    inside         length (4 bytes), request;   back: length (4 bytes), answer;   then close

A hub that is the issuer answers. Any other hub connects to the issuer's hub, says the same with the magic that
forbids forwarding once more, and copies bytes both ways, so that a token works while some of its hubs are out of
reach. It sees nothing, and pretending to be the issuer fails at the pin before a request is sent. This is the client;
`enrol_server` is the hub's side.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from p2pvpn.core.address import Endpoint
from p2pvpn.core.errors import Fault, LocalError, P2pvpnError, RemoteError, TrustError
from p2pvpn.core.ids import PeerId
from p2pvpn.identity.document import ENROL_PORT, split_address
from p2pvpn.identity.enrolment import MAX_ANSWER_BYTES, issuer_of_untrusted

from .enrol_wire import CHUNK_BYTES, MAGIC, Messages
from .tls import client_context

TIMEOUT_S = 10.0
"""A whole enrolment takes four round trips and some milliseconds of signatures."""
STAGGER_S = 0.3
"""Between attempts at the hubs: longer than a round trip anywhere, short for a person who waits (RFC 8305 section 5
suggests 250 ms)."""
MAX_ATTEMPTS = 8
"""Addresses that one call tries."""


async def enrol(
    addresses: Sequence[str],
    issuer_id: PeerId,
    request: bytes,
    *,
    timeout: float = TIMEOUT_S,
    stagger: float = STAGGER_S,
) -> bytes:
    """The answer of issuer `issuer_id`, asked through the hubs at `addresses` (`host` or `host:port`).

    The hubs are tried `stagger` seconds apart, the first whose TLS key has the issuer's peer ID gets the request.
    Raises P2pvpnError, with what went wrong at each hub, when none answers within `timeout` seconds.
    """
    attempts = [_Attempt(text, *split_address(text)) for text in addresses[:MAX_ATTEMPTS]]
    if not attempts:
        raise LocalError("there is no hub to enrol at", hint="ask for a new token")
    turn = asyncio.Lock()
    answer: list[bytes] = []

    async def run(index: int, attempt: _Attempt) -> None:
        await asyncio.sleep(index * stagger)
        try:
            async with _pinned(attempt, issuer_id) as tls, turn:
                if not answer:
                    # Half of the time, so that a hub which takes the request and goes silent leaves some to others.
                    async with asyncio.timeout(timeout / 2):
                        await tls.send(request)
                        answer.append(await tls.receive(MAX_ANSWER_BYTES))
        except (OSError, P2pvpnError) as problem:
            attempt.failure = problem

    tasks = [asyncio.create_task(run(index, attempt)) for index, attempt in enumerate(attempts)]
    try:
        async with asyncio.timeout(timeout):
            for done in asyncio.as_completed(tasks):
                await done
                if answer:
                    return answer[0]
    except TimeoutError:
        pass
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    raise _failure(attempts)


async def renew(endpoint: Endpoint, request: bytes) -> bytes:
    """As `mesh.ports.Renew`: the issuer is the one that the request names. Raises P2pvpnError."""
    return await enrol([str(endpoint)], issuer_of_untrusted(request), request)


@dataclass(slots=True)
class _Attempt:
    text: str
    host: str
    port: int | None
    failure: Exception | None = None


@contextlib.asynccontextmanager
async def _pinned(attempt: _Attempt, issuer_id: PeerId) -> AsyncIterator[Messages]:
    """A TLS connection to the issuer. Raises TrustError when the other end has another key."""
    reader, writer = await asyncio.open_connection(attempt.host, attempt.port or ENROL_PORT, limit=CHUNK_BYTES)
    try:
        writer.write(MAGIC + issuer_id)
        tls = Messages(reader, writer, client_context(), server=False)
        await tls.handshake()
        if tls.peer_id_untrusted() != issuer_id:
            raise TrustError("somebody else answers in place of the issuer")
        yield tls
        await tls.close()
    finally:
        writer.close()


def _failure(attempts: Sequence[_Attempt]) -> P2pvpnError:
    reasons = "; ".join(f"{a.text}: {_reason(a.failure)}" for a in attempts)
    if any(isinstance(a.failure, TrustError) for a in attempts):
        return TrustError(
            f"the issuer was not reached, and nothing was sent: {reasons}",
            hint="something on the way intercepts the connection; try from another network",
            fault=Fault.UNREACHABLE,
        )
    return RemoteError(
        f"the issuer was not reached: {reasons}",
        hint="check that this machine reaches the hub on that TCP port; the token is still good",
        fault=Fault.UNREACHABLE,
    )


def _reason(failure: Exception | None) -> str:
    if failure is None:
        return "no answer in time"
    if isinstance(failure, OSError):
        return failure.strerror or str(failure) or type(failure).__name__
    return str(failure)
