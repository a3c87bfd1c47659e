"""Hosts, links and homes of the laboratory: each host a network namespace, all links meeting at one `internet` router.

      a ---- nat-a ----.                  .---- hub1  192.0.2.1
   192.168.1.2   198.51.100.1   internet -+---- hub2  192.0.2.2
      b ---- nat-b ----'                  '---- ...
   192.168.2.2   203.0.113.1

Public links are point to point (a /32 or /128 at each end), so any address can sit anywhere. A link with a delay is a
`delay` process between two TAP devices, any other a veth pair without offloads: every frame on a link is a packet as a
wire would carry it, which is what the capture counts. In User-Mode Linux, where system calls are slow and netem is at
hand, a delay is netem's. Use it inside `fork_into_lab` only.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from p2pvpn.core.errors import LocalError

from . import delay, devices, uml
from .namespace import (
    add_network_namespace,
    is_inside,
    network_namespace,
    pids_inside,
    remove_network_namespace,
)

ROUTER_V4 = "192.0.2.254"
ROUTER_V6 = "2001:db8::ffff"
COMMAND_TIMEOUT_S = 30.0
ARGUMENT_CHARACTERS = 80
"""Longer arguments (tokens, grants) are cut in error messages."""
SYSCTLS = {
    "net/ipv4/ip_forward": "1",
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/ipv6/conf/all/forwarding": "1",
    "net/ipv6/conf/all/accept_dad": "0",
    "net/ipv6/conf/default/accept_dad": "0",
}
"""Every host may forward (its routes say whether it does), and addresses are usable at once."""


class CommandError(LocalError):
    """A command in the laboratory failed; the message has its output."""


@dataclass(frozen=True, slots=True)
class Hop:
    """One link of the underlay, seen from its second end: that is a router's, never a host's whose kernel shows what it
    decrypted once more on the device that brought it."""

    node: Node
    interface: str
    label: str


@dataclass(eq=False)
class Node:
    """A host: a network namespace with a name. `environment` is added to that of every command run there."""

    name: str
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def namespace(self) -> Path:
        return Path("/run/netns") / self.name

    def command(self, argv: Sequence[str]) -> list[str]:
        """The command line that runs `argv` on this host; it is exec'ed, so the pid is the program's."""
        return ["ip", "netns", "exec", self.name, *argv]

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        stdin: str | None = None,
        timeout_s: float = COMMAND_TIMEOUT_S,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end; output is captured as text. Raises CommandError on failure, if `check`, and on time-out."""
        return _run(self.command(argv), {**self.environment, **(environment or {})}, check, stdin, timeout_s)

    def popen(
        self,
        argv: Sequence[str],
        *,
        stdin: int | IO[Any] | None = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        environment: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> subprocess.Popen[str]:
        """Start a program on this host; it ends with the laboratory at the latest."""
        return subprocess.Popen(
            self.command(argv),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=True,
            pass_fds=pass_fds,
            env={**os.environ, **self.environment, **(environment or {})},
        )

    def inside(self) -> contextlib.AbstractContextManager[None]:
        """The calling thread is on this host meanwhile."""
        return network_namespace(self.namespace)

    def socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_DGRAM, proto: int = 0) -> socket.socket:
        """A socket of this host, for use from anywhere."""
        with self.inside():
            return socket.socket(family, kind, proto)

    def ip(self, script: str) -> None:
        """Run the lines of an ip(8) batch on this host."""
        _run(["ip", "-n", self.name, "-batch", "-"], stdin=script)

    def nft(self, ruleset: str) -> None:
        """Load an nft(8) script, all of it or nothing."""
        self.run(["nft", "-f", "-"], stdin=ruleset)

    def sysctl(self, settings: Mapping[str, str]) -> None:
        """Write under /proc/sys, keys with slashes."""
        with self.inside():
            for key, value in settings.items():
                (Path("/proc/sys") / key).write_text(value)

    def pids(self) -> list[int]:
        """Processes whose network namespace is this host's."""
        return pids_inside(self.namespace)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> int:
        """Send every process of this host the signal; how many there were."""
        victims = self.pids()
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return len(victims)

    def ping(
        self, target: str, *, count: int = 1, interval_s: float = 0.2, wait_s: float = 2.0, pattern: bytes = b""
    ) -> list[float]:
        """Round trips in milliseconds of the answers that came, of `count` requests by ping(8)."""
        argv = ["ping", "-n", "-c", str(count), "-i", str(interval_s), "-W", str(wait_s)]
        if pattern:
            argv += ["-p", pattern.hex()]
        done = self.run([*argv, target], check=False, timeout_s=count * interval_s + wait_s + 10)
        return [
            float(word[5:]) for line in done.stdout.splitlines() for word in line.split() if word.startswith("time=")
        ]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Home:
    """A peer behind its router: `peer` is the host, `router` the NAT box, `public` the router's outside address."""

    peer: Node
    router: Node
    public: str
    inside: str
    """The peer's own address."""


class Lab:
    """The hosts and links of one laboratory. A context manager: the hosts go with it."""

    def __init__(self) -> None:
        if not is_inside():
            raise LocalError("a laboratory runs in namespaces of its own", hint="call fork_into_lab() first")
        self.hops: list[Hop] = []
        """Every link of the underlay, once."""
        self._nodes: dict[str, Node] = {}
        self._lines: list[subprocess.Popen[bytes]] = []
        self.internet = self.node("internet")
        self.internet.ip(f"addr add {ROUTER_V4}/32 dev lo\naddr add {ROUTER_V6}/128 dev lo")

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process on the hosts and remove them."""
        for node in self._nodes.values():
            node.kill()
        for line in self._lines:
            line.kill()
            line.wait()
        for node in self._nodes.values():
            remove_network_namespace(node.namespace)
        self._lines, self._nodes, self.hops = [], {}, []

    def node(self, name: str) -> Node:
        """A new host with nothing but loopback."""
        if name in self._nodes:
            raise LocalError(f"there is a host {name!r} already")
        node = Node(name)
        add_network_namespace(node.namespace)
        self._nodes[name] = node
        node.sysctl(SYSCTLS)
        with node.inside():
            devices.bring_up("lo")
        return node

    @property
    def nodes(self) -> tuple[Node, ...]:
        return tuple(self._nodes.values())

    def link(self, one: Node, one_device: str, other: Node, other_device: str, *, delay_s: float = 0.0) -> Hop:
        """A cable between two hosts, `delay_s` long in each direction; both ends are up, without addresses."""
        netem = delay_s > 0 and uml.is_inside()
        queue = f"txqueuelen {delay.QUEUE_FRAMES}"
        if delay_s > 0 and not netem:
            with one.inside():
                near = delay.open_tap(one_device)
            with other.inside():
                far = delay.open_tap(other_device)
            argv = [sys.executable, "-m", delay.__name__, str(near), str(far), str(delay_s)]
            self._lines.append(subprocess.Popen(argv, pass_fds=(near, far), stdin=subprocess.DEVNULL))
            os.close(near)
            os.close(far)
        else:
            one.ip(f"link add {one_device} {queue} type veth peer name {other_device} {queue} netns {other}")
        for node, device in ((one, one_device), (other, other_device)):
            if delay_s > 0 and not netem:
                node.ip(f"link set {device} {queue} up")
                continue
            with node.inside():
                devices.without_offloads(device)
                devices.bring_up(device)
            if netem:
                wait = f"{delay_s * 1e6:.0f}us"
                node.run(["tc", "qdisc", "add", "dev", device, "root", "netem", "delay", wait, "limit", "20000"])
        hop = Hop(other, other_device, f"{one}-{other}")
        self.hops.append(hop)
        return hop

    def public(self, name: str, *addresses: str, delay_s: float = 0.0) -> Node:
        """A host on the public Internet, with addresses of either family, all on one link to the router."""
        node = self.node(name)
        self._attach(node, addresses, delay_s)
        return node

    def home(self, name: str, public: str, *, number: int, routed: bool = False, delay_s: float = 0.0) -> Home:
        """A peer `name` and its router `nat-name` at the IPv4 address `public`; the router forwards, see `nat.apply`.

        The peer is at 192.168.`number`.2; with `routed` at .130 of the router's public /24, whose upper half is then
        routed to the home, as to one that needs no NAT.
        """
        router, peer = self.node(f"nat-{name}"), self.node(name)
        self._attach(router, (public,), delay_s)
        self.link(peer, "eth0", router, "lan")
        subnet = ipaddress.IPv4Network(f"192.168.{number}.0/24")
        if routed:
            subnet = list(ipaddress.IPv4Network(f"{public}/24", strict=False).subnets(1))[1]
            self.internet.ip(f"route add {subnet} via {public} dev {_device(router)} onlink")
        router.ip(f"addr add {subnet[1]}/{subnet.prefixlen} dev lan")
        peer.ip(f"addr add {subnet[2]}/{subnet.prefixlen} dev eth0\nroute add default via {subnet[1]}")
        return Home(peer, router, public, str(subnet[2]))

    def neighbour(self, home: Home, name: str) -> Node:
        """One more host on the home's LAN, the next address up; the router's end of it becomes a bridge."""
        inside = ipaddress.IPv4Interface(f"{home.inside}/24")
        router = home.router
        if "lans" not in router.run(["ip", "-brief", "link"]).stdout.split():
            gateway = f"{inside.network[1]}/24"
            router.ip(
                f"link add lans type bridge\nlink set lans up\nlink set lan master lans\n"
                f"addr del {gateway} dev lan\naddr add {gateway} dev lans"
            )
        node = self.node(name)
        number = sum(hop.node is router and hop.interface.startswith("lan") for hop in self.hops) + 1
        self.link(node, "eth0", router, f"lan{number}")
        router.ip(f"link set lan{number} master lans")
        node.ip(f"addr add {inside.ip + number - 1}/24 dev eth0\nroute add default via {inside.network[1]}")
        return node

    def _attach(self, node: Node, addresses: Sequence[str], delay_s: float) -> None:
        device = _device(node)
        self.link(node, "wan", self.internet, device, delay_s=delay_s)
        near, far = [], []
        for address in addresses:
            if ":" in address:
                near += [f"addr add {address}/128 dev wan nodad", f"route replace {ROUTER_V6} dev wan"]
                near += [f"route replace default via {ROUTER_V6} dev wan"]
                far.append(f"route add {address}/128 dev {device}")
            else:
                near += [f"addr add {address}/32 dev wan", f"route replace {ROUTER_V4} dev wan"]
                near += [f"route replace default via {ROUTER_V4} dev wan"]
                far.append(f"route add {address}/32 dev {device}")
        node.ip("\n".join(near))
        self.internet.ip("\n".join(far))


def _device(node: Node) -> str:
    """The router's end of the host's link; interface names have 15 characters at most."""
    return f"to-{node}"[:15]


def _run(
    argv: Sequence[str],
    environment: Mapping[str, str] | None = None,
    check: bool = True,
    stdin: str | None = None,
    timeout_s: float = COMMAND_TIMEOUT_S,
) -> subprocess.CompletedProcess[str]:
    """Run to the end of the program itself: a daemon that it leaves behind may keep its output open for ever."""
    with (
        tempfile.TemporaryFile("w+") as given,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
    ):
        given.write(stdin or "")
        given.seek(0)
        process = subprocess.Popen(argv, stdin=given, stdout=out, stderr=err, env={**os.environ, **(environment or {})})
        try:
            _wait(process, timeout_s)
            outcome = f"exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            outcome, check = f"no end after {timeout_s:g} s", True
        out.seek(0)
        err.seek(0)
        done = subprocess.CompletedProcess(list(argv), process.returncode, out.read(), err.read())
    if check and process.returncode != 0:
        line = " ".join(word if len(word) <= ARGUMENT_CHARACTERS else f"{word[:20]}..." for word in argv)
        raise CommandError(f"{line}: {outcome}\n{stdin or ''}\n{done.stdout}{done.stderr}".rstrip())
    return done


def _wait(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """As `Popen.wait`, which looks again and again. Raises TimeoutExpired."""
    pidfd = os.pidfd_open(process.pid)
    try:
        if not select.select([pidfd], [], [], timeout_s)[0]:
            raise subprocess.TimeoutExpired(process.args, timeout_s)
    finally:
        os.close(pidfd)
    process.wait()


@contextlib.contextmanager
def running(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """The process meanwhile; killed and reaped at the end."""
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
