"""A campaign of mutated messages against everything in IKE that reads bytes: `make fuzz ARGS="--seconds 60"`.

Three targets: the parsers alone, an endpoint that knows nobody, and an endpoint behind authentication, where a peer
with valid keys sends mutated payloads in every exchange. Nothing but WireError may come out of a parser, nothing at all
out of an endpoint, and neither tables nor memory may grow. A failure prints the input that caused it, as a line of the
corpus: `tests/ike/corpus.txt` has an input for each different way to be refused or taken, and is replayed by the tests.
`--collect 20000` writes it anew from so many mutants.

    parsers KIND CHAIN DATAGRAM | strangers DATAGRAM | insiders EXCHANGE RESPONSE FIRST CHAIN       numbers and hex
"""

from __future__ import annotations

import argparse
import random
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path as FilePath

from p2pvpn.core.address import Path
from p2pvpn.core.errors import TrustError, WireError
from p2pvpn.ike.fragments import Reassembly
from p2pvpn.ike.lease import Lease
from p2pvpn.ike.message import parse_chain_untrusted, parse_clear_untrusted, walk_untrusted
from p2pvpn.ike.payloads import BY_TYPE, Configuration, parse_payload_untrusted
from p2pvpn.ike.proposals import parse_proposals_untrusted
from p2pvpn.ike.protect import Opened, Protection
from p2pvpn.ike.redirect import parse_redirect_untrusted
from p2pvpn.ike.rules import check_untrusted
from tests.ike.evil import Evil
from tests.ike.schedules import CREDENTIALS, HYBRID
from tests.ike.world import Host, World, selectors

CORPUS = FilePath(__file__).resolve().parent.parent / "tests" / "ike" / "corpus.txt"
INTERESTING = (0, 1, 2, 3, 4, 7, 8, 16, 28, 31, 32, 33, 40, 46, 47, 53, 63, 64, 127, 128, 254, 255)
MAX_GROWTH_KIB = 64 * 1024
"""Of the process between the first tenth of a campaign and its end."""


class Dice(random.Random):
    """Mutations: bits, bytes, lengths, cuts, doublings, splices."""

    def mutate(self, data: bytes, others: list[bytes]) -> bytes:
        out = bytearray(data)
        for _ in range(self.choice((1, 1, 1, 2, 3, 8))):
            at = self.randrange(len(out) + 1)
            what = self.randrange(8)
            if what == 0 and at < len(out):
                out[at] ^= 1 << self.randrange(8)
            elif what in (1, 2) and at < len(out):
                out[at] = self.choice(INTERESTING)
            elif what == 3:
                out[at : at + 2] = self.choice((0, 1, 4, 8, 255, 256, 65535)).to_bytes(2, "big")
            elif what == 4:
                del out[at : at + self.choice((1, 2, 4, 16, 1000))]
            elif what == 5:
                out[at:at] = out[at : at + self.choice((1, 4, 8, 40))]
            elif what == 6:
                out[at:at] = self.randbytes(self.choice((1, 4, 30)))
            else:
                other = self.choice(others)
                out[at:] = other[self.randrange(len(other) + 1) :]
        return bytes(out)


def pair(seed: int) -> tuple[World, Host, Host]:
    world = World(seed)
    settings = {"liveness_s": None, "half_open_max": 50, **HYBRID}
    alice = world.host("alice", "192.0.2.1", CREDENTIALS["alice"], **settings)
    bob = world.host("bob", "192.0.2.2", CREDENTIALS["bob"], **settings)
    return world, alice, bob


def corpus() -> tuple[list[bytes], list[tuple[int, bool, int, bytes]]]:
    """Datagrams of a dialogue with everything in it, and what is inside: exchange, response, first payload, chain."""
    inside: list[tuple[int, bool, int, bytes]] = []
    seal = Protection.seal

    def spy(self: Protection, header, first, chain):  # type: ignore[no-untyped-def]
        inside.append((header.exchange, header.response, first, chain))
        return seal(self, header, first, chain)

    Protection.seal = spy  # type: ignore[method-assign]
    try:
        world, alice, bob = pair(1)
        alice.initiate(bob, local=selectors("fd00::a/128"), remote=selectors("fd00::b/128"))
        world.run(1)
        more = ("add_child", *[selectors("fd00::/16")] * 2)
        for command, *args in (("rekey_child", 1), ("rekey",), ("probe",), more):
            alice.do(command, 1, *args, world.now)
            world.run(1)
        alice.do("move", 1, alice.ike.view(1).path, world.now)
        world.run(1)
        alice.do("close", 1, world.now, "enough")
        world.run(1)
    finally:
        Protection.seal = seal  # type: ignore[method-assign]
    return [data for _, data in world.wire], inside


class Campaign:
    """Counts executions; `run` stops at the first failure."""

    def __init__(self, seed: int) -> None:
        self.dice = Dice(seed)
        self.datagrams, self.inside = corpus()
        self.chains = [chain for _, _, _, chain in self.inside if chain] + [data[28:] for data in self.datagrams[:2]]
        self.world, self.alice, self.bob = pair(seed)
        self.renewed = 0
        self.calls = 0
        """Entry points called beyond the first of an execution."""
        self.said: list[str] = []
        """What came of the last execution, in words."""
        self.line = ""
        """Its input, as a line of the corpus."""
        world, friend, self.victim = pair(seed + 1)
        friend.initiate(self.victim, local=selectors("fd00::a/128"), remote=selectors("fd00::b/128"))
        world.run(1)
        self.template = self.victim.ike._by_id[1]
        (self.child,) = self.template.children.live.values()
        self.evil = Evil(friend, 1, self.victim)

    def parsers(self) -> None:
        dice = self.dice
        data = dice.mutate(dice.choice(self.chains), self.chains)
        kind = dice.choice([*BY_TYPE, dice.randrange(256)])
        self.parse(kind, data, dice.mutate(dice.choice(self.datagrams), self.datagrams))

    def parse(self, kind: int, data: bytes, whole: bytes) -> None:
        """Every parser, each with what it takes."""
        self.line = f"parsers {kind} {data.hex() or '-'} {whole.hex() or '-'}"
        reassembly = Reassembly(4096)
        opened = Opened(kind, data, len(data) % 70, len(whole) % 70)
        self.calls += 7
        self.said = []
        for attempt in (
            lambda: check_untrusted(parse_clear_untrusted(whole)),
            lambda: walk_untrusted(kind, data),
            lambda: parse_chain_untrusted(kind, data),
            lambda: parse_payload_untrusted(kind, data),
            lambda: parse_proposals_untrusted(data[4:]),
            lambda: reassembly.add_untrusted(1, opened),
            lambda: Lease.of_untrusted(Configuration(2, data)),
            lambda: parse_redirect_untrusted(data),
        ):
            try:
                attempt()
                self.said.append("taken")
            except (WireError, TrustError) as problem:
                self.said.append(str(problem))

    def strangers(self) -> None:
        """Before authentication: whole datagrams, with a length that is right more often than not."""
        dice = self.dice
        data = bytearray(dice.mutate(dice.choice(self.datagrams[:4]), self.datagrams))
        if len(data) >= 28 and dice.random() < 0.9:
            data[24:28] = len(data).to_bytes(4, "big")
            data[:8] = dice.randbytes(8)
        self.approach(bytes(data))

    def approach(self, data: bytes) -> None:
        """A datagram of somebody whom nobody knows."""
        world, bob = self.world, self.bob
        self.line = f"strangers {data.hex() or '-'}"
        world.now += 0.01
        bob.ike.screen(self.alice.address, data, world.now)
        outputs = bob.ike.handle(Path(bob.address, self.alice.address), data, world.now)
        assert len(outputs) <= 1
        bob.ike.tick(world.now)
        assert len(bob.ike._by_id) <= 64
        self.said = [f"{type(one).__name__} {getattr(one, 'data', b'')[28:36].hex()}" for one in outputs]

    def insiders(self) -> None:
        """Behind authentication: valid keys, mutated payloads, in turn and out of turn."""
        dice = self.dice
        exchange, response, first, chain = dice.choice(self.inside)
        chain = dice.mutate(chain, self.chains)
        exchange = dice.choice((exchange, exchange, exchange, 35, 36, 37, 43, 44))
        pieces = (dice.randrange(6), dice.randrange(6)) if dice.random() < 0.05 else None
        self.tell(exchange, response, first, chain, pieces)

    def tell(
        self, exchange: int, response: bool, first: int, chain: bytes, pieces: tuple[int, int] | None = None
    ) -> None:
        """A message of the peer's, or what says that it is a piece of one (number, total)."""
        self.line = f"insiders {exchange} {int(response)} {first} {chain.hex() or '-'}"
        view = self.victim.ike.view(1)
        if view is None or view.state != "ESTABLISHED" or len(self.victim.ike._by_id) > 2:
            self._renew()
        host = self.victim
        if pieces is not None:
            packet = self.evil.fragment(exchange, first, chain, *pieces)
        elif response:
            host.do("probe", 1, host.world.now)
            number = host.ike._by_id[1].requests.next_id if 1 in host.ike._by_id else 0
            packet = self.evil.packet(exchange, first, chain, message_id=number, response=True)
        else:
            packet = self.evil.packet(exchange, first, chain, message_id=self.expected())
        host.world.now += 0.01
        self.evil.give(packet)
        host.run(host.ike.tick(host.world.now))
        assert len(host.ike._by_id) <= 8, "successors are bounded"
        assert len(host.installed) <= 64
        self.said = [type(one).__name__ for one in host.log]
        host.log.clear()
        host.key_log.clear()
        host.paths.clear()
        host.world.wire.clear()
        host.world._flying.clear()

    def replay(self, line: str) -> None:
        """A line of the corpus."""
        target, *fields = line.split()
        data = bytes.fromhex(fields[-1].replace("-", ""))
        if target == "parsers":
            self.parse(int(fields[0]), bytes.fromhex(fields[1].replace("-", "")), data)
        elif target == "strangers":
            self.approach(data)
        else:
            self.tell(int(fields[0]), fields[1] == "1", int(fields[2]), data)

    def collect(self, count: int) -> list[str]:
        """Inputs, each for something that no other one brought about."""
        found: dict[tuple[object, ...], str] = {}
        for target in (self.parsers, self.strangers, self.insiders):
            for _ in range(count):
                target()
                words = [re.sub(r"[0-9]+", "N", one) for one in self.said]
                marks = enumerate(words) if target == self.parsers else [(0, " ".join(self.said))]
                for place, words_of_it in marks:
                    found.setdefault((target.__name__, place, words_of_it), self.line)
        return sorted(set(found.values()))

    def expected(self) -> int:
        known = self.victim.ike._by_id.get(1)
        return 0 if known is None else known.answers.expected_id

    def _renew(self) -> None:
        """The victim's SA as it was after the handshake, without another handshake."""
        self.renewed += 1
        host, old = self.victim, self.template
        sa = type(old)(old.local, 1, old.path, initiator=False, spi_i=old.spi_i, spi_r=old.spi_r)
        assert old.keys is not None
        assert old.suite is not None
        sa.come_of_age(old, old.keys, old.suite)
        sa.established_at = host.world.now
        sa.children.add(self.child)
        host.installed = {self.child.id: self.child}
        host.used = {self.child.id}
        ike = host.ike
        ike._by_id, ike._by_spi, ike._deadlines, ike._scheduled = {1: sa}, {sa.local_spi: sa}, [], {}


def run(target: Callable[[], None], seconds: float, limit: int | None) -> tuple[int, float, int]:
    """Executions, seconds, growth of the process in KiB after the first tenth."""
    began = time.monotonic()
    count, settled = 0, 0
    while (time.monotonic() - began < seconds) and (limit is None or count < limit):
        target()
        count += 1
        if not settled and time.monotonic() - began > seconds / 10:
            settled = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - (settled or 0) if settled else 0
    return count, time.monotonic() - began, growth


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target")
    parser.add_argument("--executions", type=int, help="for each target, at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--collect", type=int, metavar="MUTANTS", help="write the corpus anew")
    chosen = parser.parse_args(arguments)
    campaign = Campaign(chosen.seed)
    if chosen.collect:
        CORPUS.write_text("".join(f"{line}\n" for line in campaign.collect(chosen.collect)), encoding="ascii")
        return 0
    for name in ("parsers", "strangers", "insiders"):
        try:
            count, seconds, growth = run(getattr(campaign, name), chosen.seconds, chosen.executions)
        except Exception:
            print(f"seed {chosen.seed}: {campaign.line}", file=sys.stderr)
            raise
        count, campaign.calls = count + campaign.calls, 0
        print(f"{name}: {count} executions in {seconds:.1f} s, {count / seconds:.0f} a second, grew {growth} KiB")
        if growth > MAX_GROWTH_KIB:
            return 1
    print(f"{campaign.renewed} IKE SAs were used up")
    return 0


if __name__ == "__main__":
    sys.exit(main())
