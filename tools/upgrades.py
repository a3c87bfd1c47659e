"""Twenty fall-backs and as many upgrades under load, counted: `make upgrades`.

Two peers behind port-restricted NATs, three hubs, the very daemons of the product in namespaces; numbered packets run
both ways all the time. Exits 0 only if no upgrade lost a packet.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
from pathlib import Path

from p2pvpn.lab import uml
from p2pvpn.lab.acts import ROOT
from p2pvpn.lab.demo import kernel_has_esp
from p2pvpn.lab.namespace import fork_into_lab
from p2pvpn.lab.nat import NatKind
from p2pvpn.lab.net import Lab
from p2pvpn.lab.stage import Stage, require_programs
from p2pvpn.lab.switching import Round, connect, switch

SPANS = 12
"""Runs of lost packets that are told of a round."""


LINES = 6
"""Of each end's log, with a round that lost something."""


def main() -> int:
    """Run the campaign inside a laboratory of its own."""
    parser = argparse.ArgumentParser(description="fall-backs and upgrades under load")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rate", type=float, default=1000.0, help="packets a second, each way")
    parser.add_argument("--json", help="write the figures here")
    parser.add_argument("--plane", choices=("auto", "kernel", "user"), default="auto")
    options = parser.parse_args()
    if options.plane == "kernel" and not kernel_has_esp():
        return _perform_in_guest(options)
    require_programs()
    status = fork_into_lab()
    if status is not None:
        return status
    code = 1
    try:
        code = _perform(options)
    finally:
        sys.stdout.flush()
        os._exit(code)


def _perform_in_guest(options: argparse.Namespace) -> int:
    """On User-Mode Linux, whose kernel has ESP."""
    require_programs(in_guest=True)
    command = [sys.executable, "-m", "tools.upgrades", *sys.argv[1:]]
    writable = (str(Path(options.json).resolve().parent),) if options.json else ()
    return uml.run(command, uml.Guest("2048M", timeout_s=120 + 90 * options.rounds, writable=writable))


def _perform(options: argparse.Namespace) -> int:
    rounds: list[Round] = []
    with Lab() as lab:
        nats = dict.fromkeys(("a", "b"), NatKind.PORT_RESTRICTED)
        stage = Stage(lab, ROOT, hubs=3, nats=nats, rtt_ms=30, plane=options.plane)
        overlay = connect(lab, stage)
        for number in range(1, options.rounds + 1):
            (one,) = switch(lab, stage, overlay, ROOT, rounds=1, rate=options.rate, port=8000 + number)
            rounds.append(one)
            print(
                f"{number:3}  fall-back {one.fall_back_s:5.2f} s, {one.lost_at_fall_back:5} lost, "
                f"longest gap {one.gap_s:.2f} s   upgrade {one.upgrade_s:5.2f} s, {one.lost_at_upgrade} lost",
                flush=True,
            )
            if one.lost_at_upgrade or one.lost_before_upgrade:
                before = f"{one.lost_before_upgrade} lost on the relayed path before the upgrade"
                print("    ", before, *one.lost_spans[:SPANS], f"dropped by {one.drops}", sep="\n     ", flush=True)
                for node in (stage.a, stage.b):
                    print("    ", *stage.log_tail(node).splitlines()[-LINES:], sep=f"\n     {node} ", flush=True)
    lost = sum(one.lost_at_upgrade for one in rounds)
    gap = statistics.median(one.gap_s for one in rounds)
    before = sum(one.lost_before_upgrade for one in rounds)
    print(f"lost at {len(rounds)} upgrades: {lost}, before them: {before}; median gap at a fall-back: {gap:.2f} s")
    if options.json:
        Path(options.json).write_text(json.dumps([dataclasses.asdict(one) for one in rounds], indent=1))
    return 0 if lost == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
