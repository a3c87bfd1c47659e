"""A flood of IKE_SA_INIT requests from addresses that nobody has: each of them well-formed and acceptable.

    python -m p2pvpn.lab.init_flood TARGET PORT RATE SECONDS

Every request has an SPI, a source address (of 198.18.0.0/15, RFC 2544) and a source port of its own. IPv4 only, by a
raw socket. At the end it prints how many were sent, and in how many seconds.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import sys
import time

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.datagram import NON_ESP_MARKER
from p2pvpn.core.errors import TrustError
from p2pvpn.core.output import Transmit
from p2pvpn.ike.config import Credential, IkeId, IkeSettings, Initiate, RemoteIdentity
from p2pvpn.ike.endpoint import IkeEndpoint

PREPARED = 5000
"""Different requests; each source comes again after as many."""
SOURCES = 1 << 17
FIRST_SOURCE = 0xC6120000
_IPV4 = struct.Struct("!BBHHHBBHI4s")
_UDP = struct.Struct("!HHHH")
STEP = 20
"""Requests between two looks at the clock."""


def request() -> bytes:
    """An IKE_SA_INIT request of ours, as it comes without asking who we are."""
    nobody = Credential("", IkeId.fqdn("flood.invalid"), (), (), _sign, (), _verify, ())
    here, there = Endpoint("198.18.0.1", 4500), Endpoint("192.0.2.1", 4500)
    endpoint = IkeEndpoint(IkeSettings(), os.urandom, lambda: 1, lambda: 0xC0000001)
    _, outputs = endpoint.initiate(Initiate(nobody, Path(here, there), None, childless=True), 0.0)
    (sent,) = (one for one in outputs if isinstance(one, Transmit))
    return sent.data


def _sign(scheme: object, data: bytes) -> bytes:
    raise TrustError("nobody signs")


def _verify(named: IkeId, certificates: tuple[bytes, ...]) -> RemoteIdentity:
    raise TrustError("nobody is trusted")


def packets(target: str, port: int, seed: int) -> list[bytes]:
    """Whole IPv4 packets; the kernel fills in the checksum of their headers."""
    draw, template = random.Random(seed), request()
    out = []
    for _ in range(PREPARED):
        data = NON_ESP_MARKER + draw.randbytes(8) + template[8:]
        udp = _UDP.pack(draw.randint(1024, 65535), port, _UDP.size + len(data), 0) + data
        source = FIRST_SOURCE + draw.randrange(1, SOURCES - 1)
        size = _IPV4.size + len(udp)
        out.append(_IPV4.pack(0x45, 0, size, 0, 0, 64, 17, 0, source, socket.inet_aton(target)) + udp)
    return out


def flood(target: str, port: int, *, rate: float, seconds: float, seed: int = 1) -> tuple[int, float]:
    """Requests sent, and the seconds it took."""
    prepared = packets(target, port, seed)
    sent, began = 0, time.monotonic()
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        while (elapsed := time.monotonic() - began) < seconds:
            if sent > elapsed * rate:
                time.sleep(min(0.002, sent / rate - elapsed))
                continue
            for packet in prepared[sent % PREPARED : sent % PREPARED + STEP]:
                sock.sendto(packet, (target, 0))
            sent += STEP
    return sent, time.monotonic() - began


def main(arguments: list[str]) -> None:
    target, port, rate, seconds = arguments
    sent, took = flood(target, int(port), rate=float(rate), seconds=float(seconds), seed=os.getpid())
    print(f"{sent} {took:.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
