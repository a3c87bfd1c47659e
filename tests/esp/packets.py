"""Inner packets and Child SAs for the tests of this package."""

from __future__ import annotations

import ipaddress
import random

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.child import ChildSa, EspSuite
from p2pvpn.core.secret import Secret
from p2pvpn.core.selector import Selector

NETWORK = "lab"
ALICE, BOB, CAROL = "10.9.0.1", "10.9.0.2", "10.9.0.3"
ALICE6, BOB6 = "fd00:9::1", "fd00:9::2"
ALICE_AT, BOB_AT = Endpoint("192.0.2.1", 4500), Endpoint("192.0.2.2", 4500)


def ones_complement(data: bytes) -> int:
    """The sum of RFC 1071, word by word: 0xffff over a header whose checksum is right."""
    data += b"\0" * (len(data) & 1)
    total = sum(data[i] << 8 | data[i + 1] for i in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def ipv4(
    source: str,
    destination: str,
    payload: bytes = b"",
    protocol: int = 17,
    *,
    tos: int = 0,
    flags: int = 0x4000,
    options: bytes = b"",
) -> bytes:
    size = 20 + len(options)
    header = bytearray(
        bytes([0x40 | size // 4, tos])
        + (size + len(payload)).to_bytes(2, "big")
        + b"\x12\x34"
        + flags.to_bytes(2, "big")
        + bytes([64, protocol, 0, 0])
        + ipaddress.IPv4Address(source).packed
        + ipaddress.IPv4Address(destination).packed
        + options
    )
    header[10:12] = (0xFFFF - ones_complement(bytes(header))).to_bytes(2, "big")
    return bytes(header) + payload


def ipv6(source: str, destination: str, payload: bytes = b"", protocol: int = 17, *, tclass: int = 0) -> bytes:
    return (
        (6 << 28 | tclass << 20).to_bytes(4, "big")
        + len(payload).to_bytes(2, "big")
        + bytes([protocol, 64])
        + ipaddress.IPv6Address(source).packed
        + ipaddress.IPv6Address(destination).packed
        + payload
    )


def ports(source: int, destination: int, rest: bytes = bytes(4)) -> bytes:
    return source.to_bytes(2, "big") + destination.to_bytes(2, "big") + rest


def selectors(*networks: str) -> tuple[Selector, ...]:
    return tuple(Selector.of_network(network) for network in networks)


def pair(
    child_id: int = 1,
    suite: EspSuite = EspSuite.AES_GCM_16_256,
    *,
    left: tuple[Selector, ...] = (),
    right: tuple[Selector, ...] = (),
    esn: bool = False,
    mtu: int = 1400,
    seed: int = 0,
) -> tuple[ChildSa, ChildSa]:
    """Both ends of one Child SA: Alice's and Bob's."""
    draw = random.Random(seed * 1000 + child_id)
    key_ab, key_ba = Secret(draw.randbytes(suite.keymat_bytes)), Secret(draw.randbytes(suite.keymat_bytes))
    spi_a, spi_b = 0xC0000000 | 2 * child_id, 0xC0000001 | 2 * child_id
    left = left or selectors(ALICE, ALICE6)
    right = right or selectors(BOB, BOB6)
    ours, theirs = Path(ALICE_AT, BOB_AT), Path(BOB_AT, ALICE_AT)
    alice = ChildSa(child_id, NETWORK, suite, spi_a, spi_b, key_ba, key_ab, left, right, ours, esn=esn, mtu=mtu)
    bob = ChildSa(child_id, NETWORK, suite, spi_b, spi_a, key_ab, key_ba, right, left, theirs, esn=esn, mtu=mtu)
    return alice, bob
