"""Upgrades and fall-backs in a row, under numbered traffic: what each change of path costs.

A wall at the Internet's router drops packets between the two homes while leaving both their ways to the hubs: the
peers fall back to the relay. Without the wall they find the direct path again. Packets in flight when the wall goes up
are lost, and as many as it takes to notice; an upgrade must lose none.
"""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import dataclass
from pathlib import Path

from . import drops
from .net import Lab
from .stage import Stage
from .traffic import Flow, Traffic

FALL_BACK_S = 45.0
UPGRADE_S = 60.0
"""A path that was lost is tried again with growing pauses."""
SETTLE_S = 1.0


AROUND_S = 1.0
"""Packets sent from this long before one end goes direct to this long after both are were lost at the upgrade."""


@dataclass(frozen=True, slots=True)
class Round:
    """One fall-back and the upgrade after it: packets lost by each, of both directions, and how long each took."""

    fall_back_s: float
    lost_at_fall_back: int
    upgrade_s: float
    lost_at_upgrade: int
    lost_before_upgrade: int
    """On the relayed path, after the wall was taken down and before the upgrade began."""
    gap_s: float
    """The longest time without an arrival in either direction: what the fall-back cost."""
    drops: str
    """What the kernels of all hosts dropped since the wall was taken down."""
    lost_spans: tuple[str, ...]
    """Of packets lost since then: which, and when they were sent, in seconds after both ends were direct."""


def connect(lab: Lab, stage: Stage, path: str = "direct") -> dict[str, str]:
    """Make the network, let both peers join and meet on this path; their overlay addresses."""
    secret = stage.root / "passphrase"
    secret.write_text(os.urandom(16).hex())
    passphrase = ("--passphrase-file", str(secret))
    stage.cli(stage.admin, "network", "create", "home", *passphrase)
    for number, hub in enumerate(stage.hubs, start=1):
        options = ("--name", str(hub), "--hub", f"192.0.2.{number}", "--issuer")
        stage.cli(hub, "join", stage.line(stage.admin, "grant", stage.line(hub, "request"), *options, *passphrase))
    overlay = {}
    for name, home in stage.homes.items():
        overlay[name] = str(
            stage.ask(home.peer, "join", str(stage.ask(stage.hubs[0], "invite", name)["token"]))["overlay"]
        )
    stage.wait("an answer", lambda: bool(stage.a.ping(overlay["b"])), 30.0, lambda: "none", stage.a, stage.b)
    _await_path(stage, path, UPGRADE_S)
    return overlay


def switch(
    lab: Lab, stage: Stage, overlay: dict[str, str], directory: Path, *, rounds: int, rate: float, port: int = 8000
) -> list[Round]:
    """Put the wall up and take it down `rounds` times. Raises Seen when a path does not come."""
    one, other = (home.public for home in stage.homes.values())
    results = []
    for number in range(rounds):
        ends = ((stage.a, overlay["a"]), (stage.b, overlay["b"]))
        traffic = Traffic(ends, directory, rate=rate, port=port + number)
        traffic.go()
        time.sleep(SETTLE_S)
        walled = time.time()
        lab.internet.ip(_wall("add", one, other))
        _await_path(stage, "relayed", FALL_BACK_S)
        relayed = time.time()
        time.sleep(SETTLE_S)
        before = drops.counted(lab.nodes)
        opened = time.time()
        lab.internet.ip(_wall("del", one, other))
        began = _await_path(stage, "direct", UPGRADE_S)
        direct = time.time()
        time.sleep(SETTLE_S)
        flows = traffic.stop()
        results.append(
            Round(
                relayed - walled,
                _lost(flows, 0.0, opened),
                direct - opened,
                _lost(flows, began - AROUND_S, direct + 60),
                _lost(flows, opened, began - AROUND_S),
                max(flow.longest_gap_s() for flow in flows),
                drops.told(drops.since(before, drops.counted(lab.nodes))),
                (*_spans(flows[0], "a to b", opened, direct), *_spans(flows[1], "b to a", opened, direct)),
            )
        )
    return results


def _spans(flow: Flow, way: str, opened: float, direct: float) -> list[str]:
    """Runs of lost numbers."""
    lost = flow.lost(opened)
    spans = []
    for _, run in itertools.groupby(enumerate(lost), lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in run]
        first, last = (flow.sent_at[number] - direct for number in (numbers[0], numbers[-1]))
        spans.append(f"{way}: {len(numbers)} from {first:+.3f} s to {last:+.3f} s")
    return spans


def _wall(command: str, one: str, other: str) -> str:
    """Routing rules that drop what goes from one home to the other; they need no packet filter."""
    return f"rule {command} from {one} to {other} blackhole\nrule {command} from {other} to {one} blackhole"


def _lost(flows: tuple[Flow, Flow], since: float, until: float) -> int:
    return sum(1 for flow in flows for number in flow.lost() if since <= flow.sent_at[number] < until)


def _await_path(stage: Stage, path: str, timeout_s: float) -> float:
    """Until both ends say so; when the first of them did, in seconds since the epoch."""
    began: float | None = None

    def there() -> bool:
        nonlocal began
        paths = stage.path(stage.a, "b"), stage.path(stage.b, "a")
        if began is None and path in paths:
            began = time.time()
        return paths == (path, path)

    def seen() -> str:
        return f"a says {stage.path(stage.a, 'b')}, b says {stage.path(stage.b, 'a')}"

    stage.wait(f"the {path} path", there, timeout_s, seen, stage.a, stage.b)
    return began or time.time()
