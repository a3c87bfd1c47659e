"""Nobody stays on an old network document: who has a newer one says so in IKE_AUTH, and the other side fetches it."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv6Address

from p2pvpn.core.errors import P2pvpnError, WireError
from p2pvpn.dht.rpc import RpcNode

from .calls import DOCUMENT, DOCUMENT_CHUNK_BYTES

MAX_DOCUMENT_BYTES = 1024 * 1024
"""Some thousands of revocations and hundreds of hubs; a larger one is refused before it is fetched."""


class DocumentGossip:
    """Serves the document in chunks and fetches newer ones. `accept` verifies and adopts; it raises TrustError."""

    def __init__(self, rpc: RpcNode, current: Callable[[], bytes], accept: Callable[[bytes, str], None]) -> None:
        self._rpc = rpc
        self._current = current
        self._accept = accept
        self._fetching: set[IPv6Address] = set()
        rpc.register(DOCUMENT, self._serve)

    def _serve(self, sender: IPv6Address, args: object) -> list[object]:
        if not isinstance(args, list | tuple) or len(args) != 1 or not isinstance(args[0], int) or args[0] < 0:
            raise WireError("document takes one offset")
        raw = self._current()
        return [len(raw), raw[args[0] : args[0] + DOCUMENT_CHUNK_BYTES]]

    async def fetch(self, holder: IPv6Address) -> None:
        """Get the document of `holder` and adopt it. A failure changes nothing; the next contact tries again."""
        if holder in self._fetching:
            return
        self._fetching.add(holder)
        try:
            self._accept(await self._download(holder), str(holder))
        except P2pvpnError:
            return
        finally:
            self._fetching.discard(holder)

    async def _download(self, holder: IPv6Address) -> bytes:
        raw = b""
        total = 1
        while len(raw) < total:
            answer = await self._rpc.request(holder, DOCUMENT, [len(raw)])
            if not isinstance(answer, list | tuple) or len(answer) != 2:
                raise WireError("a document answer has two fields")
            total, chunk = answer
            if not isinstance(total, int) or not isinstance(chunk, bytes) or not 0 < total <= MAX_DOCUMENT_BYTES:
                raise WireError("a document answer that makes no sense")
            if len(chunk) != min(DOCUMENT_CHUNK_BYTES, total - len(raw)):  # or it could take as long as it likes
                raise WireError("a document in pieces of another size")
            raw += chunk
        return raw
