"""What a member may send to a service of this machine, and that nobody else pays for who sends more."""

from __future__ import annotations

import ipaddress

import pytest

from p2pvpn.esp.engine import Delivered, EspEngine, Reason, Refused
from p2pvpn.esp.ration import BURST, PER_S, Service

from .packets import ALICE, ALICE6, ALICE_AT, BOB, BOB6, NETWORK, ipv4, ipv6, pair, ports

PORT = 4510
SERVICE = Service(frozenset([ipaddress.ip_address(BOB6).packed]), PORT)
CALL = ipv6(ALICE6, BOB6, ports(4510, PORT))
HOP_BY_HOP = bytes([17, 0, 1, 4, 0, 0, 0, 0])


def tunnel():
    """Alice's sender and Bob's engine, which has a service."""
    alice, bob = EspEngine(), EspEngine()
    bob.serve(NETWORK, SERVICE)
    left, right = pair()
    alice.install(left)
    bob.install(right)
    alice.use(left.id)
    return alice, bob


def send(alice, bob, packet, now):
    return bob.inbound(ALICE_AT, alice.outbound(NETWORK, packet, now).datagram, now)


def flood(alice, bob, packet, now, count):
    """How many of so many at once get through."""
    return sum(isinstance(send(alice, bob, packet, now), Delivered) for _ in range(count))


@pytest.mark.parametrize(
    "packet",
    [CALL, ipv6(ALICE6, BOB6, HOP_BY_HOP + ports(4510, PORT), protocol=0)],
    ids=["plain", "behind an extension header"],
)
def test_a_member_gets_its_ration_and_no_more(packet):
    alice, bob = tunnel()
    assert flood(alice, bob, packet, 1.0, int(BURST) + 500) == BURST
    assert bob.drops[Reason.RATIONED] == 500
    assert flood(alice, bob, packet, 1.5, int(PER_S)) == PER_S / 2


def test_everything_else_of_that_member_passes_meanwhile():
    alice, bob = tunnel()
    flood(alice, bob, CALL, 1.0, int(BURST) + 1)
    for packet in (
        ipv6(ALICE6, BOB6, ports(4510, PORT + 1)),
        ipv6(ALICE6, BOB6, ports(4510, PORT) + bytes(12), protocol=6),
        ipv6(ALICE6, BOB6, b"\x80\0\0\0\0\0\0\0", protocol=58),
        ipv4(ALICE, BOB, ports(4510, PORT)),
    ):
        assert isinstance(send(alice, bob, packet, 1.0), Delivered)
    assert isinstance(send(alice, bob, CALL, 1.0), Refused)


def test_a_run_of_packets_counts_as_many_as_it_has():
    _, bob = tunnel()
    sa = bob.inbound_sa(pair()[1].spi_in.to_bytes(4, "big"))
    sa.last_at = 1.0
    runs = [bob.admit_run(sa, CALL, 60, len(CALL), 0) for _ in range(100)]
    assert len([head for head in runs if head]) == BURST // 60
    assert bob.drops[Reason.RATIONED] == 60 * (100 - BURST // 60)


def test_without_a_service_nothing_is_rationed():
    alice, bob = tunnel()
    bob.remove(pair()[1].id)
    bob.remove_network(NETWORK)
    bob.install(pair()[1])
    assert flood(alice, bob, CALL, 1.0, int(BURST) + 100) == BURST + 100
