"""ICMPv6 echo through the tunnels, for `p2pvpn ping` (RFC 4443 section 4)."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from ipaddress import IPv6Address

from p2pvpn.core.errors import LocalError

ECHO_REQUEST, ECHO_REPLY = 128, 129
PAYLOAD_BYTES = 48


class Echo:
    """Sends one echo at a time per call, and waits for its own answer."""

    async def ping(self, target: IPv6Address, source: IPv6Address, number: int, timeout_s: float) -> float | None:
        """Round trip in seconds, None when nothing came within `timeout_s`. Raises LocalError."""
        loop = asyncio.get_running_loop()
        try:
            sock = socket.socket(socket.AF_INET6, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_ICMPV6)
        except OSError as problem:
            raise LocalError(f"cannot open an ICMPv6 socket: {problem.strerror}") from problem
        with sock:
            identifier = int.from_bytes(os.urandom(2), "big")
            payload = os.urandom(PAYLOAD_BYTES)
            header = struct.pack("!BBHHH", ECHO_REQUEST, 0, 0, identifier, number & 0xFFFF)
            answer = struct.pack("!HH", identifier, number & 0xFFFF) + payload
            try:
                sock.bind((str(source), 0))
                started = loop.time()
                await loop.sock_sendto(sock, header + payload, (str(target), 0))
                async with asyncio.timeout(timeout_s):
                    while True:
                        data = await loop.sock_recv(sock, 2048)
                        if data[:1] == bytes([ECHO_REPLY]) and data[4:] == answer:
                            return loop.time() - started
            except TimeoutError:
                return None
            except OSError as problem:
                raise LocalError(f"cannot send to {target}: {problem.strerror}") from problem
