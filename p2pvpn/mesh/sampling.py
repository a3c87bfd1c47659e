"""Plain STUN to hubs, now and then: where they see fresh sockets of ours, which tells how our NAT allocates ports, and
how far away they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from p2pvpn.core import stun
from p2pvpn.core.address import Endpoint, Path, any_local
from p2pvpn.core.errors import WireError
from p2pvpn.core.ports import Entropy
from p2pvpn.punch.allocation import Sample

from .ports import Underlay

SAMPLE_S = 0.5
"""Answers that take longer are not waited for: the next port is wanted soon."""

ROUND_TRIP_TRIES = 3
"""Of a measurement of distances: one packet may wait in a queue, three rarely do."""


class Sampler:
    """Plain Binding requests from extra ports of the underlay; answers count from the hub that was asked."""

    def __init__(self, underlay: Underlay, entropy: Entropy) -> None:
        self._underlay = underlay
        self._entropy = entropy
        self._asked: dict[bytes, tuple[Path, asyncio.Future[Endpoint]]] = {}

    async def sample(self, host: str, ports: Sequence[int], hub: Endpoint) -> list[Sample]:
        """Ask from each of these ports of our address `host`, in order. What was not answered is left out."""
        loop = asyncio.get_running_loop()
        asked = []
        for port in ports:
            transaction = self._entropy(stun.TRANSACTION_ID_BYTES)
            path, seen = Path(Endpoint(host, port), hub), loop.create_future()
            self._asked[transaction] = (path, seen)
            asked.append((transaction, port, seen))
            self._underlay.send(path, stun.build(stun.request(transaction)))
        try:
            await asyncio.wait([seen for _, _, seen in asked], timeout=SAMPLE_S)
        finally:
            for transaction, _, _ in asked:
                del self._asked[transaction]
        return [Sample(port, seen.result().port) for _, port, seen in asked if seen.done()]

    async def round_trips(self, hubs: Sequence[Endpoint]) -> dict[Endpoint, float]:
        """Seconds to each of these hubs and back, the least of some tries; without those that did not answer."""
        best: dict[Endpoint, float] = {}
        loop = asyncio.get_running_loop()
        for _ in range(ROUND_TRIP_TRIES):
            asked: dict[bytes, asyncio.Future[Endpoint]] = {}
            began = loop.time()
            for hub in hubs:
                transaction = self._entropy(stun.TRANSACTION_ID_BYTES)
                path, seen = any_local(hub, self._underlay.port), loop.create_future()
                self._asked[transaction] = (path, seen)
                asked[transaction] = seen
                seen.add_done_callback(lambda _, hub=hub, began=began: _note(best, hub, loop.time() - began))  # type: ignore[misc]
                self._underlay.send(path, stun.build(stun.request(transaction)))
            try:
                if asked:
                    await asyncio.wait(asked.values(), timeout=SAMPLE_S)
            finally:
                for transaction in asked:
                    del self._asked[transaction]
        return best

    def route(self, path: Path, data: bytes) -> bool:
        """Offer an inbound STUN datagram; whether it was an answer to us."""
        asked, seen = self._asked.get(data[8:20], (None, None))
        if asked is None or seen is None or (asked.remote, asked.local.port) != (path.remote, path.local.port):
            return False
        try:
            message = stun.parse_untrusted(data)
            if message.message_class is stun.Class.RESPONSE and not seen.done():
                seen.set_result(stun.mapped_address(message))
        except WireError:
            pass
        return True


def _note(best: dict[Endpoint, float], hub: Endpoint, rtt_s: float) -> None:
    best[hub] = min(rtt_s, best.get(hub, rtt_s))
