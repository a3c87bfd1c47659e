"""Packets that wait for a tunnel: a bounded queue per destination."""

from __future__ import annotations

from collections import deque
from ipaddress import IPv4Address, IPv6Address

from p2pvpn.core.address import IpAddress

MAX_PACKETS = 128
"""A connection takes a few round trips; a stream with more packets in that time repeats them by itself."""
MAX_BYTES = 256 * 1024
MAX_AGE_S = 10.0
"""Older packets answer a question that nobody asks any more."""
IPV4, IPV6 = 4, 6
MIN_IPV4_HEADER, IPV6_HEADER = 20, 40


def destination(packet: bytes) -> IpAddress | None:
    """The inner destination address, or None for what is no IP packet."""
    if len(packet) >= MIN_IPV4_HEADER and packet[0] >> 4 == IPV4:
        return IPv4Address(packet[16:20])
    if len(packet) >= IPV6_HEADER and packet[0] >> 4 == IPV6:
        return IPv6Address(packet[24:40])
    return None


class TrapQueue:
    """Packets in the order they were caught; the newest is refused when the queue is full."""

    def __init__(self) -> None:
        self._packets: deque[tuple[float, bytes]] = deque()
        self._bytes = 0
        self.refused = 0

    def __len__(self) -> int:
        return len(self._packets)

    def put(self, packet: bytes, now: float) -> None:
        self._expire(now)
        if len(self._packets) >= MAX_PACKETS or self._bytes + len(packet) > MAX_BYTES:
            self.refused += 1
            return
        self._packets.append((now, packet))
        self._bytes += len(packet)

    def drain(self, now: float) -> list[bytes]:
        """All packets that are not too old, oldest first; the queue is empty then."""
        self._expire(now)
        packets = [packet for _, packet in self._packets]
        self._packets.clear()
        self._bytes = 0
        return packets

    def has_fresh(self, now: float) -> bool:
        """Whether a packet waits that is worth a connection."""
        self._expire(now)
        return bool(self._packets)

    def _expire(self, now: float) -> None:
        while self._packets and now - self._packets[0][0] > MAX_AGE_S:
            _, packet = self._packets.popleft()
            self._bytes -= len(packet)
