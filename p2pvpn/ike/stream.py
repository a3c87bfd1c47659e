"""IKE and ESP in a TCP stream (RFC 9329 sections 3 and 4), sans-IO.

    stream      "IKETCP", frame, frame, ...             to IKE and ESP of the other end
                "P2PRLY", port (2 bytes), frame, ...    to one of its relay ports: ours, not the RFC's
    frame       length (2 bytes, itself included), datagram
    datagram    as over UDP: IKE behind the non-ESP marker, ESP, a NAT keepalive; on relays STUN too

Only who connects sends the head. A frame that is empty or longer than any datagram of ours ends the stream: there is no
way to find the next one behind it.
"""

from __future__ import annotations

from p2pvpn.core.errors import WireError

PREFIX = b"IKETCP"
RELAY_PREFIX = b"P2PRLY"
PORT_BYTES = 2
LENGTH_BYTES = 2
MAX_DATAGRAM_BYTES = 16_384
"""IKE messages of ours are cut into fragments, ESP carries 1,280 bytes; a stranger's IKE with long certificate chains
fits too. It bounds what a stream that never ends its frame keeps in memory."""


def build_head(port: int) -> bytes:
    """What begins a stream to a relay port, or (0) to IKE and ESP."""
    return RELAY_PREFIX + port.to_bytes(PORT_BYTES, "big") if port else PREFIX


def build_frame(datagram: bytes | memoryview) -> bytes:
    return (len(datagram) + LENGTH_BYTES).to_bytes(LENGTH_BYTES, "big") + datagram


class FrameReader:
    """Cuts a stream into datagrams. With `wants_head` the stream begins with one: `port` is None until it came."""

    def __init__(self, *, wants_head: bool) -> None:
        self.port: int | None = None if wants_head else 0
        self._buffer = bytearray()

    def feed_untrusted(self, data: bytes) -> list[bytes]:
        """The datagrams that these bytes complete. Raises WireError when the stream cannot go on."""
        buffer = self._buffer
        buffer += data
        at = 0
        if self.port is None:
            at = self._take_head_untrusted()
            if self.port is None:
                return []
        datagrams = []
        left = len(buffer)
        while left - at >= LENGTH_BYTES:
            length = buffer[at] << 8 | buffer[at + 1]
            if not LENGTH_BYTES < length <= MAX_DATAGRAM_BYTES + LENGTH_BYTES:
                raise WireError(f"a frame of {length} bytes in a stream")
            if left - at < length:
                break
            datagrams.append(bytes(buffer[at + LENGTH_BYTES : at + length]))
            at += length
        del buffer[:at]
        return datagrams

    def _take_head_untrusted(self) -> int:
        """Bytes of the head, 0 as long as it is not whole."""
        start = bytes(self._buffer[: len(PREFIX)])
        if not PREFIX.startswith(start) and not RELAY_PREFIX.startswith(start):
            raise WireError("a stream that does not begin as one")
        if start == PREFIX:
            self.port = 0
            return len(PREFIX)
        size = len(RELAY_PREFIX) + PORT_BYTES
        if len(self._buffer) < size:
            return 0
        self.port = int.from_bytes(self._buffer[len(RELAY_PREFIX) : size], "big")
        if self.port == 0:
            raise WireError("a stream to a relay port 0")
        return size
