"""An extra socket to measure the NAT with: asks hubs where they see it, and hears their knocks.

The shared socket is left alone: what is tried here can lose a binding, and must start from one that nobody wrote to.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import TracebackType

from p2pvpn.core import stun
from p2pvpn.core.address import Endpoint, Path, any_local
from p2pvpn.core.datagram import Kind, classify
from p2pvpn.core.errors import RemoteError, WireError
from p2pvpn.core.ports import Entropy
from p2pvpn.punch.filtering import knock_untrusted
from p2pvpn.punch.proof import NO_PROOF

from .ports import Underlay

TRY_S = (0.5, 1.0, 1.5)
"""How long each transmission of a request may take to be answered."""
MAX_WAITING = 64


class Unanswered(RemoteError):
    """The hub does not answer STUN."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A hub's answer: it sees the socket at `endpoint`; `proof` shows that we receive there."""

    hub: Endpoint
    local: Endpoint
    endpoint: Endpoint
    proof: bytes
    rtt_s: float


class ProbeSocket:
    """Open while it is used as a context manager. Raises LocalError when there is no socket to be had."""

    def __init__(self, underlay: Underlay, entropy: Entropy, *, ipv6: bool) -> None:
        self._underlay = underlay
        self._entropy = entropy
        self._loop = asyncio.get_running_loop()
        self._asked: dict[bytes, tuple[Endpoint, asyncio.Future[tuple[Path, stun.Message]]]] = {}
        self._expected: dict[bytes, asyncio.Future[Endpoint]] = {}
        self.port = underlay.open_probe(ipv6)

    def __enter__(self) -> ProbeSocket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._underlay.close_probe(self.port)

    def path(self, remote: Endpoint) -> Path:
        return any_local(remote, self.port)

    async def ask(self, hub: Endpoint) -> Seen:
        """Where the hub sees this socket. Raises Unanswered."""
        for wait_s in TRY_S:
            transaction = self._entropy(stun.TRANSACTION_ID_BYTES)
            answer: asyncio.Future[tuple[Path, stun.Message]] = self._loop.create_future()
            self._asked[transaction] = (hub, answer)
            sent_at = self._loop.time()
            self._underlay.send(self.path(hub), stun.build(stun.request(transaction, nonce=NO_PROOF)))
            try:
                async with asyncio.timeout(wait_s):
                    path, message = await answer
                endpoint = stun.mapped_address(message)
            except (TimeoutError, WireError):
                continue
            finally:
                del self._asked[transaction]
            proof = message.attributes.get("NONCE", b"")
            return Seen(hub, path.local, endpoint, proof, self._loop.time() - sent_at)
        raise Unanswered(f"{hub} does not answer")

    def expect(self) -> tuple[bytes, asyncio.Future[Endpoint]]:
        """A fresh transaction, and the source of the first knock or request with it that comes to this socket."""
        while len(self._expected) >= MAX_WAITING:
            self._expected.pop(next(iter(self._expected)))
        transaction = self._entropy(stun.TRANSACTION_ID_BYTES)
        came: asyncio.Future[Endpoint] = self._loop.create_future()
        self._expected[transaction] = came
        return transaction, came

    def handle(self, path: Path, data: bytes) -> None:
        """A datagram that came to this socket; what was not asked for is nobody's."""
        asked = self._asked.get(data[8:20])
        if asked is not None:
            hub, answer = asked
            if path.remote == hub and classify(data) is Kind.STUN and not answer.done():
                try:
                    message = stun.parse_untrusted(data)
                except WireError:
                    return
                if message.message_class is stun.Class.RESPONSE:
                    answer.set_result((path, message))
            return
        transaction = knock_untrusted(data)
        came = self._expected.get(transaction) if transaction is not None else None
        if came is not None and not came.done():
            came.set_result(path.remote)
