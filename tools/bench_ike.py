"""CPU time of a responder per IKE SA, ours and strongSwan's with the same algorithms in the same run: `make bench-ike`.

Ours: an endpoint in this process; only the time inside its own calls counts. strongSwan's: `charon-systemd` in a host
of the laboratory (so: root), its process times before and after as many handshakes with our initiator. ECDSA P-256
certificates on both sides, childless SAs, AES-256-GCM, SHA-384. `--profile` shows where our time goes.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import sys
import tempfile
import time
from pathlib import Path

from p2pvpn.core.address import Endpoint
from p2pvpn.core.address import Path as NetPath
from p2pvpn.core.output import Transmit
from p2pvpn.crypto.kex import KexMethod
from p2pvpn.ike.config import Initiate
from p2pvpn.ike.outputs import SaEstablished
from p2pvpn.lab.namespace import fork_into_lab
from p2pvpn.lab.net import Lab
from tests.ike import test_stranger as stranger
from tests.ike.people import ike_id
from tests.ike.world import World

HYBRID = ((KexMethod.ML_KEM_768,),)
CASES = {"x25519": (), "x25519 + ML-KEM-768": HYBRID}
TICKS = os.sysconf("SC_CLK_TCK")


class Ours:
    """An initiator and the responder whose time is taken."""

    def __init__(self, additional: tuple[tuple[KexMethod, ...], ...]) -> None:
        world = World(1)
        names = (("us.test", "192.0.2.1"), ("charon.test", "192.0.2.2"))
        self.credential = stranger.ours()
        theirs = stranger.credential(stranger.ROOT, "charon.test", blocks=stranger.BLOCKS, local=(stranger.THEIR_NET,))
        settings = {"additional_kexes": additional, "cookie_total": 10**6, "half_open_per_source": 10**6}
        self.client = world.host(*names[0], self.credential, **settings)
        self.server = world.host(*names[1], theirs, **settings)
        self.now = 0.0
        self.seconds = 0.0

    def handshake(self) -> None:
        self.now += 1.0
        path = NetPath(Endpoint.of("192.0.2.1", 4500), Endpoint.of("192.0.2.2", 4500))
        back = NetPath(path.remote, path.local)
        wanted = Initiate(self.credential, path, ike_id("charon.test"), childless=True)
        sa, out = self.client.ike.initiate(wanted, self.now)
        while out:
            replies = []
            for one in out:
                if isinstance(one, Transmit):
                    began = time.process_time()
                    replies += self.server.ike.handle(back, one.data, self.now)
                    self.seconds += time.process_time() - began
            out = []
            for one in replies:
                if isinstance(one, Transmit):
                    out += self.client.ike.handle(path, one.data, self.now)
        assert self.client.ike.view(sa).state == "ESTABLISHED"


def ours(count: int, additional: tuple[tuple[KexMethod, ...], ...]) -> float:
    """Milliseconds of a responder of ours for each SA."""
    bench = Ours(additional)
    for _ in range(20):
        bench.handshake()
    bench.seconds = 0.0
    for _ in range(count):
        bench.handshake()
    return bench.seconds / count * 1000


def charon(count: int) -> float:
    """Milliseconds of charon as the responder for each SA, x25519; our initiator's time is not in it."""
    with Lab() as lab, tempfile.TemporaryDirectory() as folder:
        lab.public("us", stranger.OURS, stranger.OURS_TOO)
        node = lab.public("charon", stranger.THEIRS)
        node.ip("addr add 10.202.0.1/32 dev lo")
        daemon = stranger.Charon(node, Path(folder))
        config = daemon.work / "strongswan.conf"
        quiet = config.read_text().replace("default = 1", "default = -1").replace("ike = 2", "ike = -1")
        config.write_text(quiet)
        stranger.give_certificate(daemon)
        conf = stranger.connection(proposals="aes256gcm16-prfsha384-x25519", childless="allow", unique="never")
        scene = stranger.Scene(lab, daemon, Path(folder))
        mine = stranger.ours()
        with daemon.running(conf), scene.driver(mine, additional_kexes=()) as us:

            def handshake() -> None:
                before = len(us.log)
                sa = us.initiate(stranger.request(us, mine, childless=True))
                us.run(lambda: any(isinstance(one, SaEstablished) for one in us.log[before:]))
                us.ike.drop(sa)
                us.log.clear()

            for _ in range(20):
                handshake()
            began = _cpu(daemon)
            for _ in range(count):
                handshake()
            return (_cpu(daemon) - began) / count * 1000


def _cpu(daemon: stranger.Charon) -> float:
    """Seconds of CPU time of the daemon so far."""
    assert daemon._process is not None
    fields = Path(f"/proc/{daemon._process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="handshakes of each kind")
    parser.add_argument("--profile", action="store_true")
    chosen = parser.parse_args()
    if chosen.profile:
        bench = Ours(())
        profile = cProfile.Profile()
        profile.runcall(lambda: [bench.handshake() for _ in range(chosen.count)])
        pstats.Stats(profile).sort_stats("tottime").print_stats(35)
        return 0
    for name, additional in CASES.items():
        print(f"ours, {name}: {ours(chosen.count, additional):.3f} ms of CPU for each IKE SA", flush=True)
    status = fork_into_lab()
    if status is not None:
        return status
    theirs, mine = charon(chosen.count), ours(chosen.count, ())
    print(f"charon, x25519: {theirs:.3f} ms; ours again: {mine:.3f} ms; ratio {mine / theirs:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
