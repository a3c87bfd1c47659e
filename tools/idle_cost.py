"""What a peer costs when nothing happens: packets in a virtual hour, CPU seconds of real processes: `make idle-cost`.

Packets are counted at the peer's own interface in the simulated Internet, which runs the product's engine: everything
that leaves (sent) and everything that arrives (received), IKE, ESP and STUN alike, tunnels to two hubs, no traffic of
the user's. The first hour is that of a peer that knows nothing of its NAT, the second one that of a peer that does. The
yardstick is a packet every 25 s to each of two hubs and its answer: 288 sent and 288 received an hour.

CPU seconds are those of the daemon and its worker on a host of the namespace laboratory, read from /proc before and
after some minutes of idling, and stated for an hour.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from p2pvpn.core.address import Endpoint
from p2pvpn.lab.namespace import fork_into_lab
from p2pvpn.lab.nat import NatKind
from p2pvpn.lab.net import Lab, Node
from p2pvpn.lab.stage import Stage, require_programs
from p2pvpn.sim.host import SimHost
from p2pvpn.sim.internet import Datagram, Interface
from p2pvpn.sim.start import start_node
from p2pvpn.sim.world import World

HOUR_S = 3600.0
HUBS = 2
YARDSTICK = HUBS * 144
LIFETIMES_S = (30, 60, 120, 300)
SETTLE_S = 30.0
"""Before CPU time is counted: the first hubs are joined, and the NAT is looked at."""


class Meter:
    """Counts the datagrams that leave and reach a simulated host."""

    def __init__(self, host: SimHost) -> None:
        self.sent = self.received = 0
        self._send, self._receive = host.send, host.receive
        host.send, host.receive = self._sending, self._receiving  # type: ignore[method-assign]

    def _sending(self, local: Endpoint, remote: Endpoint, data: bytes) -> None:
        self.sent += 1
        self._send(local, remote, data)

    def _receiving(self, interface: Interface, datagram: Datagram) -> None:
        self.received += 1
        self._receive(interface, datagram)

    def take(self) -> tuple[int, int]:
        """What was counted since the last time."""
        both = self.sent, self.received
        self.sent = self.received = 0
        return both


def packets(lifetime_s: int, seed: int = 1) -> list[tuple[int, int]]:
    """Sent and received in the first and in the second virtual hour behind a NAT whose bindings live so long."""
    with World(seed) as world:
        hubs = [world.hub() for _ in range(HUBS)]
        peer = world.peer("peer", behind=world.home(f"port-restricted/random/{lifetime_s}s"))
        world.publish()

        async def story() -> list[tuple[int, int]]:
            for hub in hubs:
                await start_node(world, hub)
            meter = Meter(peer.host)
            node = await start_node(world, peer)
            hours = []
            for _ in range(2):
                await asyncio.sleep(HOUR_S)
                hours.append(meter.take())
            await node.close()
            return hours

        return world.run(story(), 3 * HOUR_S)


def cpu_s(node: Node) -> float:
    """CPU seconds used so far by the processes of a host."""
    ticks = 0
    for pid in node.pids():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except FileNotFoundError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def processes(minutes: float) -> dict[str, float]:
    """CPU seconds an hour of an idle peer and of a hub with one peer, with real processes."""
    with Lab() as lab, tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        nats = dict.fromkeys(("a", "b"), NatKind.PORT_RESTRICTED)
        stage = Stage(lab, root, hubs=HUBS, nats=nats, rtt_ms=30, plane="user")
        secret = root / "passphrase"
        secret.write_text(os.urandom(16).hex())
        passphrase = ("--passphrase-file", str(secret))
        stage.cli(stage.admin, "network", "create", "home", *passphrase)
        for number, hub in enumerate(stage.hubs, start=1):
            request = stage.line(hub, "request")
            options = ("--name", str(hub), "--hub", f"192.0.2.{number}", "--issuer")
            stage.cli(hub, "join", stage.line(stage.admin, "grant", request, *options, *passphrase))
        stage.cli(stage.a, "join", stage.ask(stage.hubs[0], "invite", "a")["token"])
        stage.wait("two hubs", lambda: len(stage.attached_hubs(stage.a)) == HUBS, 30.0, lambda: "fewer")
        time.sleep(SETTLE_S)
        hosts = {"peer": stage.a, "hub": stage.hubs[0]}
        before = {name: cpu_s(node) for name, node in hosts.items()}
        began = time.monotonic()
        time.sleep(60.0 * minutes)
        part = HOUR_S / (time.monotonic() - began)
        return {name: round((cpu_s(node) - before[name]) * part, 1) for name, node in hosts.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description="packets and CPU time of a peer that is idle")
    parser.add_argument("--minutes", type=float, default=3.0, help="of real idling; 0 leaves the processes out")
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args()
    if options.minutes:
        require_programs()
        status = fork_into_lab()
        if status is not None:
            return status
    code = 1
    try:
        code = _report(options)
    finally:
        sys.stdout.flush()
        if options.minutes:
            os._exit(code)
    return code


def _report(options: argparse.Namespace) -> int:
    figures: dict[str, object] = {"yardstick": YARDSTICK}
    print(f"packets an hour, two hubs, no traffic; at one every 25 s: {YARDSTICK} sent, {YARDSTICK} received")
    print("bindings live   first hour sent, received   second hour sent, received   second of the yardstick")
    good = True
    for lifetime_s in LIFETIMES_S:
        first, second = packets(lifetime_s)
        share = sum(second) / (2 * YARDSTICK)
        good = good and (lifetime_s < 120 or share <= 0.5)
        figures[f"{lifetime_s} s"] = {"first": first, "second": second, "share": round(share, 3)}
        print(f"{lifetime_s:10} s {first[0]:14} {first[1]:9} {second[0]:19} {second[1]:9} {share:21.2f}", flush=True)
    if options.minutes:
        figures["cpu_s_per_hour"] = used = processes(options.minutes)
        print(f"CPU seconds an hour, of {options.minutes:g} minutes: idle peer {used['peer']}, its hub {used['hub']}")
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
