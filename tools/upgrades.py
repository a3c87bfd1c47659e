"""Twenty upgrades to the direct path and as many fall-backs under load, counted: `make upgrades`.

Two peers behind port-restricted NATs, three hubs, the very daemons of the product in namespaces. The direct way is
closed by a rule on the router of the Internet, and opened again; numbered packets run both ways all the time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from p2pvpn.host.control import ControlClient
from p2pvpn.lab.demo import ROOT, Demo, Figures
from p2pvpn.lab.namespace import fork_into_lab
from p2pvpn.lab.nat import NatKind
from p2pvpn.lab.net import Lab, Node
from p2pvpn.lab.stage import Stage, require_programs
from p2pvpn.lab.story import Story
from p2pvpn.lab.traffic import Flow, Traffic

WAIT_S = 60.0
SETTLED_S = 1.5
"""Traffic goes on for so long after a change, so that a loss behind it is seen too."""
CLOSED = """
table inet between {{
  chain forward {{
    type filter hook forward priority 0;
    ip saddr {a} ip daddr {b} drop
    ip saddr {b} ip daddr {a} drop
  }}
}}
"""


class Campaign:
    """The rounds and what they lost."""

    def __init__(self, stage: Stage, overlay: dict[str, str], rate: float) -> None:
        self.stage = stage
        self.overlay = overlay
        self.rate = rate
        self.port = 8000

    def path(self, node: Node, name: str) -> str:
        """How a daemon says it reaches a peer."""

        async def ask() -> Any:
            socket = Path(node.environment["P2PVPN_RUNTIME_DIR"]) / "control.sock"
            client = await ControlClient.connect(socket)
            try:
                return await client.call("status")
            finally:
                await client.close()

        peers = asyncio.run(ask())["networks"][0]["peers"]
        return next((str(peer["path"]) for peer in peers if peer["name"] == name), "none")

    def await_path(self, wanted: str) -> float:
        """Seconds until both ends say so."""
        began = time.monotonic()
        while not (self.path(self.stage.a, "b") == self.path(self.stage.b, "a") == wanted):
            if time.monotonic() - began > WAIT_S:
                raise SystemExit(f"no {wanted} path within {WAIT_S:g} s")
            time.sleep(0.1)
        return time.monotonic() - began

    def change(self, ruleset: str, wanted: str) -> dict[str, Any]:
        """One change of path under traffic in both directions."""
        self.port += 1
        ends = ((self.stage.a, self.overlay["a"]), (self.stage.b, self.overlay["b"]))
        traffic = Traffic(ends, ROOT, rate=self.rate, port=self.port)
        traffic.go()
        time.sleep(0.5)
        self.stage.lab.internet.nft(ruleset)
        took = self.await_path(wanted)
        time.sleep(SETTLED_S)
        flows = traffic.stop()
        return {
            "took_s": round(took, 2),
            "sent": sum(len(flow.sent_at) for flow in flows),
            "lost": sum(len(flow.lost()) for flow in flows),
            "gap_s": round(max(_gap(flow) for flow in flows), 2),
        }


def _gap(flow: Flow) -> float:
    return flow.longest_gap_s()


def main() -> int:
    """Run the campaign inside a laboratory of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rate", type=float, default=1000.0, help="packets a second, each way")
    parser.add_argument("--json", help="write the figures here")
    options = parser.parse_args()
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


def _perform(options: argparse.Namespace) -> int:
    with Lab() as lab:
        nats = {"a": NatKind.PORT_RESTRICTED, "b": NatKind.PORT_RESTRICTED}
        stage = Stage(lab, ROOT, hubs=3, nats=nats, rtt_ms=30, plane="auto")
        demo = Demo(stage, Story(), Figures(3, ["port-restricted"] * 2))
        demo.capture.close()
        demo.set_up()
        demo.join()
        campaign = Campaign(stage, demo.overlay, options.rate)
        stage.a.ping(demo.overlay["b"], wait_s=10.0)
        campaign.await_path("direct")
        closed = CLOSED.format(a=stage.homes["a"].public, b=stage.homes["b"].public)
        rounds = []
        for number in range(1, options.rounds + 1):
            down = campaign.change(closed, "relayed")
            up = campaign.change("delete table inet between", "direct")
            rounds.append({"fall_back": down, "upgrade": up})
            print(
                f"{number:3}  fall-back: {down['took_s']:5.2f} s, {down['lost']:5} of {down['sent']} lost, "
                f"gap {down['gap_s']:.2f} s   upgrade: {up['took_s']:5.2f} s, {up['lost']:3} of {up['sent']} lost",
                flush=True,
            )
    lost = sum(one["upgrade"]["lost"] for one in rounds)
    gaps = sorted(one["fall_back"]["gap_s"] for one in rounds)
    median = gaps[len(gaps) // 2]
    print(f"lost at {len(rounds)} upgrades: {lost}; fall-back gap: median {median:.2f} s, most {gaps[-1]:.2f} s")
    if options.json:
        Path(options.json).write_text(json.dumps({"rounds": rounds, "lost_at_upgrades": lost}, indent=1))
    return 0 if lost == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
