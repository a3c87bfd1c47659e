"""Endpoint-dependent NATs against others, many seeds: `make hard-nat`, or `python -m tools.hard_nat --seeds 1-500`.

Each seed is a simulated Internet of its own with three hubs and two peers, the real engine on each. One peer is behind
the hard NAT, the other behind a port-restricted one, and they take turns in beginning. A run is direct when both ends
use a direct path; its time is counted from the start of punching, which is when the SA over the relay is up. Packets
are counted where they leave the machine. By theory, 256 sockets and 1,024 probes meet in 98.2 % of all runs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from p2pvpn.core.address import Path as Way
from p2pvpn.core.datagram import Kind, classify
from p2pvpn.mesh.events import Guessed, MeshEvent, PathChanged, PeerConnected
from p2pvpn.sim.application import Pinger
from p2pvpn.sim.start import start_node
from p2pvpn.sim.world import Machine, World

HARD, EASY = "apd/apd/random", "port-restricted"
ATTACH_S = 5.0
PATIENCE_S = 20.0
"""A run is over after this; the next one on this pair would follow a minute later."""
LEAST_SHARE = 0.96
MOST_S = 12.0
MOST_RATE = 100
MOST_PROBES = 1024


@dataclass(frozen=True, slots=True)
class Outcome:
    """One seed. `direct_s` counts from the start of punching, None if the path stayed relayed; `rate` is the greatest
    number of packets that one machine sent to the other's NAT within a second, `sent` all of them from the prober."""

    seed: int
    direct_s: float | None
    methods: tuple[str, ...]
    probes: int
    rate: int


class _Meter:
    """Times at which STUN requests to an address leave a machine."""

    def __init__(self, machine: Machine, far_host: str) -> None:
        self.times: list[float] = []
        send, loop = machine.host.underlay.send, machine.host.loop

        def counted(path: Way, data: bytes) -> None:
            if path.remote.host == far_host and classify(data) is Kind.STUN and data[0] == 0:
                self.times.append(loop.time())
            send(path, data)

        machine.host.underlay.send = counted  # type: ignore[method-assign]  # a meter between engine and socket

    def rate(self) -> int:
        """The most in any second."""
        most = first = 0
        for number, at in enumerate(self.times):
            while at - self.times[first] >= 1.0:
                first += 1
            most = max(most, number - first + 1)
        return most


def run(seed: int, hard: str = HARD, easy: str = EASY) -> Outcome:
    """One pair; who calls depends on the seed."""
    with World(seed) as world:
        for _ in range(3):
            world.hub()
        homes = [world.home(kind) for kind in (hard, easy)]
        peers = [world.peer(name, behind=home) for name, home in zip(("hard", "easy"), homes, strict=True)]
        world.publish()
        outside = [home.router.outside.host(ipv6=False) or "" for home in homes]
        meters = [_Meter(peers[0], outside[1]), _Meter(peers[1], outside[0])]
        caller, callee = peers if seed % 2 else peers[::-1]
        began: list[float] = []
        direct: dict[str, float] = {}
        runs: list[Guessed] = []

        async def story() -> None:
            loop, arrived = asyncio.get_running_loop(), asyncio.Event()

            def listener(name: str) -> None:
                def hear(event: MeshEvent) -> None:
                    match event:
                        case PeerConnected(peer="hard" | "easy") if name in ("hard", "easy"):
                            began.append(loop.time())
                        case PathChanged(peer="hard" | "easy", path=path) if name in ("hard", "easy"):
                            direct.pop(name, None)
                            if path == "direct":
                                direct[name] = loop.time()
                                arrived.set()
                        case Guessed():
                            runs.append(event)

                hears[name] = hear

            hears: dict[str, object] = {}
            for machine in world.machines.values():
                listener(machine.name)
                await start_node(world, machine, emit=hears[machine.name])  # type: ignore[arg-type]
            await asyncio.sleep(ATTACH_S)
            await Pinger(caller.host, callee.overlay, count=1).done()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE_S):
                    while len(direct) < 2:
                        arrived.clear()
                        await arrived.wait()

        world.run(story(), 600.0)
        took = max(direct.values()) - min(began) if len(direct) == 2 else None
        probes = max((one.packets for one in runs), default=0)
        return Outcome(seed, took, tuple(one.method for one in runs), probes, max(meter.rate() for meter in meters))


def seeds(text: str) -> Iterator[int]:
    """`1-3,7` -> 1 2 3 7. Raises ValueError."""
    for part in text.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


@dataclass(frozen=True, slots=True)
class Summary:
    """Of all seeds; times in seconds, over all runs, where a run that stayed relayed counts as endless."""

    runs: int
    direct: int
    median_s: float
    p95_s: float
    most_probes: int
    most_rate: int

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> Summary:
        times = sorted(one.direct_s if one.direct_s is not None else float("inf") for one in outcomes)
        return cls(
            len(outcomes),
            sum(one.direct_s is not None for one in outcomes),
            times[len(times) // 2],
            times[min(len(times) - 1, int(0.95 * len(times)))],
            max(one.probes for one in outcomes),
            max(one.rate for one in outcomes),
        )

    @property
    def is_fine(self) -> bool:
        return (
            self.direct >= LEAST_SHARE * self.runs
            and self.p95_s <= MOST_S
            and self.most_probes <= MOST_PROBES
            and self.most_rate <= MOST_RATE
        )


def main() -> int:
    """Run all seeds; 0 when the bounds hold."""
    parser = argparse.ArgumentParser(prog="tools.hard_nat", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="1-500", help="1-500, or 3,7-9")
    parser.add_argument("--hard", default=HARD, help="the hard side's NAT, as p2pvpn.sim.nat names it")
    parser.add_argument("--easy", default=EASY)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="seeds at a time")
    parser.add_argument("--json", metavar="FILE", help="write every outcome here")
    options = parser.parse_args()
    wanted = list(seeds(options.seeds))
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        kinds = ([kind] * len(wanted) for kind in (options.hard, options.easy))
        outcomes = list(pool.map(run, wanted, *kinds, chunksize=5))
    summary = Summary.of(outcomes)
    print(f"{options.hard} against {options.easy}, {summary.runs} seeds")
    print("direct          median s   p95 s   most probes   most packets in a second")
    share = f"{summary.direct} ({summary.direct / summary.runs:.1%})"
    print(
        f"{share:14} {summary.median_s:9.2f} {summary.p95_s:7.2f} {summary.most_probes:13} {summary.most_rate:26}\n"
        f"wanted: >= {LEAST_SHARE:.0%}, p95 <= {MOST_S:g} s, <= {MOST_PROBES} probes, <= {MOST_RATE} a second"
    )
    relayed = [one.seed for one in outcomes if one.direct_s is None]
    if relayed:
        print("stayed relayed:", *relayed)
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(one) for one in outcomes], indent=1))
    return int(not summary.is_fine)


if __name__ == "__main__":
    sys.exit(main())
