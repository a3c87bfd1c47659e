"""Asks a hub where it sees fresh sockets of ours, to find out how our NAT allocates ports."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from p2pvpn.core import stun
from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.errors import WireError
from p2pvpn.core.ports import Entropy
from p2pvpn.punch.allocation import Sample

from .ports import Underlay

SAMPLE_S = 0.5
"""Answers that take longer are not waited for: the next port is wanted soon."""


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
