"""Echo requests from a host of the laboratory by a socket, since starting ping(8) takes long in User-Mode Linux."""

from __future__ import annotations

import os
import socket
import struct
import time

from p2pvpn.lab.net import Node
from tests.esp.packets import ones_complement

WAIT_S = 3.0
_ECHO = struct.Struct("!BBHHH")


def ping(node: Node, target: str, *, count: int = 1, size: int = 56, pattern: bytes = b"p", wait_s: float = WAIT_S):
    """How many of `count` requests with `size` bytes were answered, each asked once the former was or `wait_s` went."""
    is_ipv6 = ":" in target
    request, reply = (128, 129) if is_ipv6 else (8, 0)
    family = socket.AF_INET6 if is_ipv6 else socket.AF_INET
    number = int.from_bytes(os.urandom(2))
    answered = 0
    with node.socket(family, socket.SOCK_RAW, socket.IPPROTO_ICMPV6 if is_ipv6 else socket.IPPROTO_ICMP) as sock:
        for sequence in range(count):
            body = (pattern * (size // len(pattern) + 1))[:size]
            checksum = 0
            if not is_ipv6:
                checksum = 0xFFFF - ones_complement(_ECHO.pack(request, 0, 0, number, sequence) + body)
            try:
                sock.sendto(_ECHO.pack(request, 0, checksum, number, sequence) + body, (target, 0))
            except OSError:
                continue
            until = time.monotonic() + wait_s
            while (left := until - time.monotonic()) > 0:
                sock.settimeout(left)
                try:
                    data = sock.recv(65535)[0 if is_ipv6 else 20 :]
                except TimeoutError:
                    break
                kind, _, _, its, of = _ECHO.unpack_from(data)
                if (kind, its, of) == (reply, number, sequence):
                    answered += data[_ECHO.size :] == body
                    break
    return answered
