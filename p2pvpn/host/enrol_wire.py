"""What an enrolment looks like on the wire: the prelude, and messages with their length in front inside of TLS.

TLS runs over memory buffers, so that bytes which arrive right behind the prelude are not lost between two layers.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from functools import partial

from p2pvpn.core.errors import WireError
from p2pvpn.core.ids import PEER_ID_BYTES, PeerId
from p2pvpn.identity.certificates import parse_untrusted

MAGIC = b"p2e1"
MAGIC_FORWARDED = b"p2f1"
PRELUDE_BYTES = len(MAGIC) + PEER_ID_BYTES
LENGTH_BYTES = 4
CHUNK_BYTES = 65536


class Messages:
    """Messages inside of TLS 1.3 over a pair of asyncio streams."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, context: ssl.SSLContext, *, server: bool
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._in = ssl.MemoryBIO()
        self._out = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=server)

    async def handshake(self) -> None:
        await self._run(self._tls.do_handshake)
        await self._flush()

    async def send(self, message: bytes) -> None:
        """One message with its length in front."""
        data = len(message).to_bytes(LENGTH_BYTES, "big") + message
        for start in range(0, len(data), CHUNK_BYTES):
            self._tls.write(data[start : start + CHUNK_BYTES])
            await self._flush()

    async def receive(self, limit: int) -> bytes:
        """One message. Raises WireError when it is longer than `limit`, or cut off."""
        length = int.from_bytes(await self._exactly(LENGTH_BYTES), "big")
        if length > limit:
            raise WireError(f"a message of {length} bytes where {limit} are allowed")
        return await self._exactly(length)

    def peer_id_untrusted(self) -> PeerId:
        """The peer ID of the key that the other side proved to have. Raises WireError."""
        der = self._tls.getpeercert(binary_form=True)
        if der is None:
            raise WireError("the server showed no certificate")
        return parse_untrusted(der).peer_id

    async def close(self) -> None:
        """Say goodbye, without waiting for the other side's."""
        with contextlib.suppress(ssl.SSLError):
            self._tls.unwrap()
        with contextlib.suppress(OSError):
            await self._flush()

    async def _exactly(self, count: int) -> bytes:
        out = bytearray()
        while len(out) < count:
            wanted = min(CHUNK_BYTES, count - len(out))
            out += await self._run(partial(self._tls.read, wanted))
        return bytes(out)

    async def _run(self, step: Callable[[], bytes | None]) -> bytes:
        """Repeat a step of TLS until it has got the bytes that it waits for."""
        while True:
            try:
                result = step()
            except ssl.SSLWantReadError:
                await self._flush()
                data = await self._reader.read(CHUNK_BYTES)
                if not data:
                    raise WireError("the connection ended early") from None
                self._in.write(data)
                continue
            except ssl.SSLError as problem:
                await self._flush()
                raise WireError(f"TLS failed: {problem.reason or problem}") from None
            if result == b"":
                raise WireError("the connection ended early")
            return result or b""

    async def _flush(self) -> None:
        data = self._out.read()
        if data:
            self._writer.write(data)
            await self._writer.drain()
