"""The demo's small Internet and the very commands a user types, run on its hosts.

      a -- nat-a --.             .-- hub1
                    \\           /
                     internet --+-- hub2      admin (on no network at all)
                    /           \\
      b -- nat-b --'             '-- hub3

Links to the hubs are long and those to the homes short, so that the way through a hub takes longer than the direct one:
with a round trip of R to a hub, R/12 to the homes' routers gives 2R relayed against R/3 direct, and less if R is large.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from p2pvpn.core.errors import LocalError
from p2pvpn.host.control import ControlClient, control_path
from p2pvpn.host.settings import MachineSettings

from . import nat
from .nat import NatKind
from .net import CommandError, Home, Lab, Node

PROGRAMS = {
    "ip": "iproute2",
    "ss": "iproute2",
    "nft": "nftables",
    "conntrack": "conntrack",
    "ping": "iputils-ping",
}
"""What the laboratory runs, and the Debian packages that have it."""
GUEST_PROGRAMS = {
    "linux.uml": "user-mode-linux",
    "modprobe": "kmod",
    "iptables-legacy": "iptables",
}
"""What it needs besides to run in User-Mode Linux."""
HOME_LINK_S = 0.0025
"""One way between a home and the router of the Internet, at most."""
HOME_LINK_PART = 24
"""... and at most this part of the round trip to a hub, so that relayed is 6 times direct when that is short."""
HUB_ADDRESS = "192.0.2.{}"
HOMES = {"a": "198.51.100.1", "b": "203.0.113.1"}
JOIN_TIMEOUT_S = 40.0
LOG_LINES = 40
POLL_S = 0.02
"""Between looks at what is waited for."""


class Seen(Exception):
    """A step did not end as it should; `hosts` may know why."""

    def __init__(self, expected: str, seen: str, hosts: tuple[Node, ...] = ()) -> None:
        super().__init__(f"expected {expected}; seen {seen}")
        self.expected = expected
        self.seen = seen
        self.hosts = hosts


def require_programs(*, in_guest: bool = False) -> None:
    """Raises LocalError that says what to install."""
    wanted = PROGRAMS | GUEST_PROGRAMS if in_guest else PROGRAMS
    missing = sorted({package for program, package in wanted.items() if shutil.which(program) is None})
    if missing:
        raise LocalError("the laboratory lacks programs", hint=f"apt install {' '.join(missing)}")


class Stage:
    """Hosts, homes and hubs, and what is asked of them."""

    def __init__(
        self,
        lab: Lab,
        root: Path,
        *,
        hubs: int,
        nats: dict[str, NatKind],
        rtt_ms: float,
        plane: str,
        publics: Mapping[str, str] = HOMES,
        port_mapping: bool = False,
    ) -> None:
        """`publics` are the routers' addresses; with `port_mapping` the peers ask their routers for ports, which is in
        vain unless the caller makes the routers do it."""
        self.lab = lab
        self._port_mapping = port_mapping
        self.root = root
        self.keys = root / "keys"
        self.keys.mkdir(parents=True, mode=0o700)
        self._plane = plane
        self.nats = nats
        home_s = min(HOME_LINK_S, rtt_ms / 1000 / HOME_LINK_PART)
        hub_s = rtt_ms / 2000 - home_s
        self.admin = self._equip(lab.node("admin"))
        self.hubs = [
            self._equip(lab.public(f"hub{n}", HUB_ADDRESS.format(n), delay_s=hub_s)) for n in range(1, hubs + 1)
        ]
        self.homes: dict[str, Home] = {}
        for number, (name, public) in enumerate(publics.items(), start=1):
            routed = nats[name] is NatKind.NONE
            home = lab.home(name, public, number=number, routed=routed, delay_s=home_s)
            nat.apply(home, nats[name])
            self._equip(home.peer)
            self.homes[name] = home
        self.a, self.b = self.homes["a"].peer, self.homes["b"].peer
        self._names = {HUB_ADDRESS.format(n): f"hub{n}" for n in range(1, hubs + 1)}
        for name, home in self.homes.items():
            self._names |= {home.public: name, home.inside: name}

    def neighbour(self, home: Home, name: str) -> Node:
        """One more machine on that home's LAN."""
        return self._equip(self.lab.neighbour(home, name))

    def _equip(self, node: Node) -> Node:
        home = self.root / node.name
        node.environment |= {
            "P2PVPN_STATE_DIR": str(home / "state"),
            "P2PVPN_RUNTIME_DIR": str(home / "run"),
            "P2PVPN_KEYLOG": str(self.keys),
            "HOME": str(home),
        }
        if self._plane != "auto":
            node.environment["P2PVPN_PLANE"] = self._plane
        for directory in ("state", "run"):
            (home / directory).mkdir(parents=True, mode=0o700)
        MachineSettings(port_mapping=self._port_mapping).save(home / "state")
        return node

    # The commands.

    def cli(self, node: Node, *arguments: str, timeout_s: float = JOIN_TIMEOUT_S) -> str:
        """Run `p2pvpn` there; its output. Raises Seen, with what it said, when it fails."""
        try:
            return node.run([sys.executable, "-m", "p2pvpn.cli.main", *arguments], timeout_s=timeout_s).stdout
        except CommandError as error:
            raise Seen(f"`p2pvpn {arguments[0]}` on {node} to succeed", str(error), (node,)) from error

    def ask(self, node: Node, *arguments: str) -> Any:
        """The JSON answer of a `p2pvpn` command."""
        return json.loads(self.cli(node, *arguments, "--json"))

    def line(self, node: Node, *arguments: str) -> str:
        """The last word that a command prints: its REQUEST, GRANT or TOKEN."""
        return self.cli(node, *arguments).split()[-1]

    # What the daemons say.

    def status(self, node: Node) -> dict[str, Any]:
        """What `p2pvpn status` shows, asked without that command: in User-Mode Linux starting a program takes seconds
        of the one CPU that everybody shares. Raises Seen."""

        async def asked() -> dict[str, Any]:
            path = Path(node.environment["P2PVPN_RUNTIME_DIR"]) / control_path().name
            async with asyncio.timeout(JOIN_TIMEOUT_S), await ControlClient.connect(path) as daemon:
                answer: dict[str, Any] = await daemon.call("status")
                return answer

        try:
            return asyncio.run(asked())
        except (LocalError, TimeoutError) as error:
            raise Seen(f"the daemon on {node} to say its status", str(error) or "silence", (node,)) from error

    def attached_hubs(self, node: Node) -> set[str]:
        """Names of the hubs that the daemon has a tunnel to."""
        networks = self.status(node)["networks"]
        return {hub["name"] for network in networks for hub in network["hubs"] if hub["state"] == "connected"}

    def peer(self, node: Node, name: str) -> dict[str, Any]:
        """What the node's daemon says of a peer; empty when it is not in contact."""
        peers = [peer for network in self.status(node)["networks"] for peer in network["peers"]]
        return next((peer for peer in peers if peer["name"] == name), {})

    def path(self, node: Node, name: str) -> str:
        """`direct`, `mapped`, `relayed`, or `none`."""
        peer = self.peer(node, name)
        return str(peer["path"] or "none") if peer.get("state") == "connected" else "none"

    def over(self, node: Node, name: str) -> str | None:
        """`udp` or `tcp`, for a peer in contact."""
        said = self.peer(node, name).get("over")
        return None if said is None else str(said)

    def wait(
        self, expected: str, true: Callable[[], bool], timeout_s: float, seen: Callable[[], str], *hosts: Node
    ) -> None:
        """Until it is true. Raises Seen."""
        deadline = time.monotonic() + timeout_s
        while not true():
            if time.monotonic() > deadline:
                raise Seen(f"{expected} within {timeout_s:g} s", seen(), hosts)
            time.sleep(POLL_S)

    # Who is who.

    def name_of(self, address: str) -> str:
        """The host (or home) that an address of the underlay belongs to."""
        return self._names.get(address, address)

    def party(self, name: str) -> set[str]:
        """Every address of the underlay at which a home's packets are seen."""
        return {self.homes[name].public, self.homes[name].inside}

    def log_tail(self, node: Node) -> str:
        """The end of the newest log on a host."""
        logs = sorted((self.root / node.name).rglob("*.log"), key=lambda file: file.stat().st_mtime)
        return "\n".join(logs[-1].read_text(errors="replace").splitlines()[-LOG_LINES:]) if logs else ""
