"""A flood of garbage at a declared rate: what a stranger with a fast line can do to an open port.

    python -m p2pvpn.lab.flood TARGET FIRST_PORT LAST_PORT KIND RATE SECONDS

KIND is a row of KINDS, or `any` for all of them in turn. Datagrams of one length leave by one system call
(UDP_SEGMENT), so that a flood costs its sender little; lengths and bytes are drawn anew for every call. At the end it
prints how many datagrams were sent, and in how many seconds.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import sys
import time
from collections.abc import Callable

_SOL_UDP, _UDP_SEGMENT = 17, 103
SEGMENTS = 60
"""Datagrams per system call; the kernel takes 64 at most."""
MAX_CALL_BYTES = 60_000
MAX_BYTES = 1400
SOCKETS = 8
"""Source ports."""
STUN_COOKIE = bytes.fromhex("2112a442")
_IKE_HEADER = struct.Struct("!4s8s8sBBBBII")


def _random(size: int, draw: random.Random) -> bytes:
    return draw.randbytes(size)


def _esp(size: int, draw: random.Random) -> bytes:
    """An SPI with the two top bits set, and a sequence number."""
    return (struct.pack("!II", draw.getrandbits(30) | 0xC000_0000, draw.getrandbits(32)) + draw.randbytes(size))[:size]


def _ike(size: int, draw: random.Random) -> bytes:
    """Behind the non-ESP marker, a header of version 2 that is right about everything but what follows."""
    exchange = draw.choice([34, 34, 35, 36, 37, draw.getrandbits(8)])
    responder = bytes(8) if exchange == 34 else draw.randbytes(8)
    first = draw.choice([33, 35, 46, 53, draw.getrandbits(8)])
    length = max(28, size - 4) if draw.random() < 0.8 else draw.getrandbits(32)
    header = _IKE_HEADER.pack(bytes(4), draw.randbytes(8), responder, first, 0x20, exchange, 0x08, 0, length)
    return (header + draw.randbytes(size))[:size]


def _stun(size: int, draw: random.Random) -> bytes:
    """A Binding request, answer or indication whose attributes are garbage."""
    kind = draw.choice([0x0001, 0x0101, 0x0111, 0x0011, draw.getrandbits(14)])
    body = max(0, size - 20) // 4 * 4
    return (struct.pack("!HH4s", kind, body, STUN_COOKIE) + draw.randbytes(12 + size))[:size]


KINDS: dict[str, Callable[[int, random.Random], bytes]] = {"random": _random, "esp": _esp, "ike": _ike, "stun": _stun}


def flood(target: str, ports: range, kind: str, *, rate: float, seconds: float, seed: int = 1) -> tuple[int, float]:
    """Datagrams sent, and the seconds it took. Errors of single calls (ICMP that came back) are passed over."""
    draw = random.Random(seed)
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    sockets = [socket.socket(family, socket.SOCK_DGRAM) for _ in range(SOCKETS)]
    makers = list(KINDS.values()) if kind == "any" else [KINDS[kind]]
    sent = 0
    began = time.monotonic()
    while (elapsed := time.monotonic() - began) < seconds:
        if sent > elapsed * rate:
            time.sleep(min(0.002, sent / rate - elapsed))
            continue
        size = draw.randint(1, 64) if draw.random() < 0.5 else draw.randint(1, MAX_BYTES)
        count = max(1, min(SEGMENTS, MAX_CALL_BYTES // size))
        maker = makers[sent % len(makers)]
        one = [maker(size, draw) for _ in range(2)]
        data = b"".join(one[n & 1] for n in range(count))
        option = [(_SOL_UDP, _UDP_SEGMENT, struct.pack("=H", size))]
        try:
            sockets[sent % SOCKETS].sendmsg([data], option, 0, (target, draw.choice(ports)))
        except OSError:
            continue
        sent += count
    for sock in sockets:
        sock.close()
    return sent, time.monotonic() - began


def main(arguments: list[str]) -> None:
    target, first, last, kind, rate, seconds = arguments
    ports = range(int(first), int(last) + 1)
    sent, took = flood(target, ports, kind, rate=float(rate), seconds=float(seconds), seed=os.getpid())
    print(f"{sent} {took:.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
