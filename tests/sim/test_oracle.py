"""The oracle against brute force: two hosts behind every pair of NATs send, learn and answer until nothing changes."""

import asyncio
import itertools
import random

import pytest

from p2pvpn.core.address import Endpoint
from p2pvpn.sim import nat
from p2pvpn.sim.host import SimHost
from p2pvpn.sim.internet import ACCESS, Internet
from p2pvpn.sim.loop import VirtualLoop
from p2pvpn.sim.nat import NatKind, Ports, Rule
from p2pvpn.sim.oracle import Box, Side, Verdict, verdict
from p2pvpn.sim.router import Router

KINDS = [NatKind(mapping, filtering, Ports.RANDOM) for mapping in Rule for filtering in Rule]
PORT = 7000
HUB = Endpoint("192.0.2.1", PORT)
ROUNDS = 8
"""More than any pair needs to find its endpoints, if it ever does."""


class Puncher(asyncio.DatagramProtocol):
    """Sends to all that it knows of the other, learns where packets come from, answers each."""

    def __init__(self):
        self.known, self.reflexive, self.has_path = set(), None, False

    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, addr):
        source = Endpoint(*addr)
        kind, _, text = data.decode().partition(" ")
        if kind == "seen":
            self.reflexive = Endpoint.parse(text)
        elif kind == "check":
            self.known.add(source)
            self.transport.sendto(f"answer {text}".encode(), source)
        elif text == str(source):  # RFC 8445 section 7.2.5.2.1: answered from where it was sent to
            self.has_path = True

    def check(self):
        for remote in sorted(self.known):
            self.transport.sendto(f"check {remote}".encode(), remote)


class Reflector(asyncio.DatagramProtocol):
    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, addr):
        self.transport.sendto(f"seen {Endpoint(*addr)}".encode(), addr)


def build(loop, chains, common):
    """Two hosts behind their chains of NATs (from the host outwards), all behind `common`."""
    net = Internet(loop, 1)
    hub = SimHost(net, "hub")
    hub.attach(net.public, HUB.host, quality=ACCESS)
    top = net.public
    for depth, kind in enumerate(reversed(common)):
        top = lan_below(top, f"common{depth}", f"100.{64 + depth}.0", kind)
    hosts = []
    for side, chain in enumerate(chains):
        segment = top
        for depth, kind in enumerate(reversed(chain)):
            segment = lan_below(segment, f"nat{side}{depth}", f"10.{side}.{depth}", kind)
        host = SimHost(net, f"host{side}")
        host.attach(segment, next_address(segment))
        hosts.append(host)
    return hub, hosts


def next_address(segment):
    number = len(segment.interfaces) + 10
    prefix = str(segment.prefixes[0]).rsplit(".", 1)[0] if segment.prefixes else "203.0.113"
    return f"{prefix}.{number}"


def lan_below(above, name, prefix, kind):
    lan = above.internet.segment(name, f"{prefix}.0/24")
    Router(name, lan, above, inside=[f"{prefix}.1"], outside=[next_address(above)], nat=kind)
    return lan


def punch(chains, common=(), *, guess=False):
    """Whether the two hosts find a path by sending alone; with `guess`, also to every other port of the far side."""
    loop = VirtualLoop()
    try:
        hub, hosts = build(loop, chains, common)

        async def story():
            bind(hub, Reflector())
            ends = [bind(host, Puncher()) for host in hosts]
            for end in ends:
                end.transport.sendto(b"who", HUB)
            await asyncio.sleep(1)
            ends[0].known.add(ends[1].reflexive)
            ends[1].known.add(ends[0].reflexive)
            if guess:
                for end, far in (ends, ends[::-1]):
                    end.known |= {
                        Endpoint(far.reflexive.host, port) for port in range(nat.FIRST_PORT, nat.LAST_PORT + 1)
                    }
            for _ in range(ROUNDS):
                for end in ends:
                    end.check()
                await asyncio.sleep(1)
            return all(end.has_path for end in ends)

        return loop.run(story())
    finally:
        loop.close()


def bind(host, protocol):
    protocol.connection_made(host.open_udp(protocol, ("0.0.0.0", PORT), None))
    return protocol


def predict(chains, common=()):
    outer = [Box.of(("common", depth), kind) for depth, kind in enumerate(common)]
    sides = [
        Side(f"lan{side}", tuple(Box.of((side, depth), kind) for depth, kind in enumerate(chain)) + tuple(outer))
        for side, chain in enumerate(chains)
    ]
    assert verdict(*sides) is verdict(*reversed(sides))
    return verdict(*sides) is Verdict.DIRECT


def story_of(chains, common=()):
    return " / ".join(" ".join(map(str, chain)) or "none" for chain in (*chains, common))


@pytest.mark.parametrize("one", [None, *KINDS], ids=str)
def test_the_oracle_agrees_with_brute_force_for_every_pair_of_nats(one):
    for other in [None, *KINDS]:
        chains = [[kind] if kind else [] for kind in (one, other)]
        assert punch(chains) is predict(chains), story_of(chains)


def test_the_oracle_agrees_with_brute_force_for_chains_of_nats():
    draw = random.Random(1)
    for _ in range(150):
        chains = [draw.choices(KINDS, k=draw.choice((0, 1, 2, 2, 3))) for _ in range(2)]
        assert punch(chains) is predict(chains), story_of(chains)


def test_the_oracle_agrees_with_brute_force_behind_a_common_nat():
    draw = random.Random(2)
    outcomes = set()
    for _ in range(150):
        common = [
            NatKind(kind.mapping, kind.filtering, kind.ports, hairpin=draw.random() < 0.7)
            for kind in draw.choices(KINDS, k=draw.choice((1, 1, 2)))
        ]
        chains = [draw.choices(KINDS[:3] + KINDS, k=draw.choice((1, 1, 2))) for _ in range(2)]
        outcome = punch(chains, common)
        assert outcome is predict(chains, common), story_of(chains, common)
        outcomes.add(outcome)
    assert outcomes == {True, False}


def test_what_the_oracle_calls_a_guess_is_found_by_whoever_tries_every_port(monkeypatch):
    monkeypatch.setattr(nat, "FIRST_PORT", 7000)
    monkeypatch.setattr(nat, "LAST_PORT", 7063)
    draw = random.Random(3)
    hard = 0
    for _ in range(60):
        chains = [draw.choices(kinds, k=draw.choice((1, 1, 2))) for kinds in (KINDS[:3], KINDS[3:])]
        sides = [side(*map(str, chain)) for chain in chains]
        if verdict(*sides) in (Verdict.PREDICTED, Verdict.BIRTHDAY):
            hard += 1
            assert punch(chains, guess=True), story_of(chains)
    assert hard > 10


def side(*kinds, lan=None, **more):
    return Side(lan or object(), tuple(Box.of(object(), NatKind.of(kind)) for kind in kinds), **more)


def test_endpoint_independent_mapping_on_both_sides_is_direct_for_every_filter():
    for one, other in itertools.product(("full-cone", "restricted", "port-restricted"), repeat=2):
        assert verdict(side(one), side(other)) is Verdict.DIRECT


def test_symmetric_needs_a_far_side_that_overlooks_ports():
    assert verdict(side("symmetric"), side("full-cone")) is Verdict.DIRECT
    assert verdict(side("symmetric"), side("restricted")) is Verdict.DIRECT
    assert verdict(side("symmetric"), side("port-restricted")) is Verdict.BIRTHDAY
    assert verdict(side("symmetric"), side("symmetric")) is Verdict.RELAYED
    assert verdict(side("symmetric"), side()) is Verdict.DIRECT


def test_one_lan_is_direct_whatever_its_nat():
    box = Box.of("nat", NatKind.of("symmetric/no-hairpin"))
    assert verdict(Side("lan", (box,), udp_blocked=True), Side("lan", (box,))) is Verdict.DIRECT


def test_blocked_udp_leaves_streams_to_a_relay():
    assert verdict(side("full-cone", udp_blocked=True), side()) is Verdict.STREAM


@pytest.mark.parametrize(
    ("chain", "want"),
    [
        (["symmetric/sequential"], Verdict.PREDICTED),
        (["symmetric/random"], Verdict.BIRTHDAY),
        (["symmetric/preserve"], Verdict.BIRTHDAY),
        (["port-restricted", "symmetric/sequential"], Verdict.PREDICTED),
        (["symmetric/sequential", "port-restricted/preserve"], Verdict.PREDICTED),
        (["symmetric/sequential", "port-restricted/random"], Verdict.BIRTHDAY),
        (["port-restricted/sequential", "symmetric/preserve"], Verdict.BIRTHDAY),
        (["symmetric/random", "symmetric/sequential"], Verdict.PREDICTED),
    ],
)
def test_the_outermost_nat_that_makes_a_new_mapping_says_whether_its_port_can_be_told(chain, want):
    assert verdict(side(*chain), side("port-restricted")) is want
    assert verdict(side(*chain), side("symmetric")) is Verdict.RELAYED


def test_the_better_family_decides():
    one, other = (
        Side(name, side(nat).ipv4, (Box.firewall(name, Rule.APD),) if six else None)
        for name, nat, six in (("lan one", "symmetric", True), ("lan two", "port-restricted", False))
    )
    assert verdict(one, other) is Verdict.BIRTHDAY
    assert verdict(one, Side("lan three", None, ())) is Verdict.DIRECT
    assert verdict(other, Side("lan three", None, ())) is Verdict.RELAYED


def test_ipv6_behind_firewalls_makes_symmetric_nats_irrelevant():
    one, other = (
        Side(name, side("symmetric").ipv4, (Box.firewall(name, Rule.APD),)) for name in ("lan one", "lan two")
    )
    assert verdict(one, other) is Verdict.DIRECT
    assert verdict(one, side("symmetric")) is Verdict.RELAYED
