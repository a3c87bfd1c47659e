"""What a relayed connection carries over UDP, and over TCP where UDP is blocked: `make tcp-speed`.

Two peers, one hub, the very daemons of the product in namespaces without delay; iperf3 sends TCP through the tunnel.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from p2pvpn.lab.namespace import fork_into_lab
from p2pvpn.lab.nat import NatKind
from p2pvpn.lab.net import Lab, running
from p2pvpn.lab.stage import Stage, require_programs
from p2pvpn.lab.switching import connect

ROOT = Path("/run/tcp-speed")
CASES = {
    "UDP at both ends": (NatKind.SYMMETRIC, NatKind.SYMMETRIC),
    "TCP at the sender": (NatKind.UDP_BLOCKED, NatKind.SYMMETRIC),
    "TCP at both ends": (NatKind.UDP_BLOCKED, NatKind.UDP_BLOCKED),
}


def main() -> int:
    """Measure each case in a laboratory of its own."""
    parser = argparse.ArgumentParser(description="relayed throughput over UDP and TCP")
    parser.add_argument("--seconds", type=int, default=5)
    options = parser.parse_args()
    require_programs()
    status = fork_into_lab()
    if status is not None:
        return status
    try:
        for number, (name, (a, b)) in enumerate(CASES.items()):
            rate, ping_ms = _measure(ROOT / str(number), {"a": a, "b": b}, options.seconds)
            print(f"{name:20} {rate:6.0f} Mbit/s   ping {ping_ms:.2f} ms idle", flush=True)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)


def _measure(root: Path, nats: dict[str, NatKind], seconds: int) -> tuple[float, float]:
    with Lab() as lab:
        stage = Stage(lab, root, hubs=1, nats=nats, rtt_ms=0, plane="user")
        overlay = connect(lab, stage, "relayed")
        ping_ms = sorted(stage.a.ping(overlay["b"], count=20, interval_s=0.05))[10]
        server = stage.b.popen(["iperf3", "-s", "-1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with running(server):
            time.sleep(0.5)
            client = ["iperf3", "-J", "-c", overlay["b"], "-t", str(seconds), "-O", "1"]
            done = stage.a.run(client, timeout_s=seconds + 30)
        return json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"] / 1e6, ping_ms


if __name__ == "__main__":
    sys.exit(main())
