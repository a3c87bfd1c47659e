"""A NAT box in user space: the simulation's NAT machine between two TUN devices, for every behaviour of RFC 4787.

    LAN --iif lan--> unat-in  --+                    +--> routed on: to the Internet, or back into the LAN
                                +-- machine, rewrite-+
    WAN --to PUBLIC-> unat-out -+

Policy routing hands UDP over IPv4 to the TUN devices: what comes from a LAN to `unat-in`, what comes from elsewhere to
a public address to `unat-out`. So the side of a packet is known by its device, and the public address may be the box's
own. Rewritten packets are written back and routed on; checksums are adjusted as RFC 1624 says. Fragments are put
together first (RFC 4787 REQ-14); the kernel cuts again what is too long. Everything that is not UDP (enrolment is TCP)
is masqueraded by the kernel. ICMP errors about translated packets are lost.

    python -m p2pvpn.lab.usernat --lan DEV --public ADDR --kind symmetric
    python -m p2pvpn.lab.usernat --lan DEV --public ADDR --mapping ei --filtering apd --port random

It runs in the box's network namespace as root, prints `ready`, forgets all mappings on SIGUSR1, dies with its parent,
and takes its rules away on SIGTERM or SIGINT.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from p2pvpn.core.address import Endpoint
from p2pvpn.core.errors import LocalError, WireError
from p2pvpn.host.tun import Tun
from p2pvpn.sim.nat import KINDS, Nat, NatKind, Ports, Rule
from p2pvpn.sim.packet import UDP, Reassembler

from .namespace import die_with_parent

INSIDE_DEVICE = "unat-in"
OUTSIDE_DEVICE = "unat-out"
INSIDE_TABLE = 4787
OUTSIDE_TABLE = 4788
"""Routing tables with one default route each, into the devices."""
PUBLIC_PREFERENCE = 10
LOCAL_PREFERENCE = 20
LAN_PREFERENCE = 30
"""Order of the rules: public addresses, then the kernel's own local addresses, then all else from the LAN."""
DEVICE_MTU = 65535
"""So that whole datagrams of any size pass."""
NFT_TABLE = "p2pvpn_usernat"
BURST_PACKETS = 64
"""Packets taken from one side before the other gets its turn."""
DEFAULT_TIMEOUT_S = 300.0
"""RFC 4787 REQ-5."""
COMMAND_TIMEOUT_S = 20.0

_UDP_HEADER_BYTES = 8

_Translate = Callable[[Endpoint, Endpoint, float], tuple[Endpoint, Endpoint]]
"""(source, destination, now) -> both as they leave; raises _DroppedError."""


def adjusted(checksum: int, old: bytes, new: bytes) -> int:
    """The Internet checksum after `old` (an even number of bytes) became `new` (RFC 1624 section 3, equation 3)."""
    total = ~checksum & 0xFFFF
    for at in range(0, len(old), 2):
        total += (~(old[at] << 8 | old[at + 1]) & 0xFFFF) + (new[at] << 8 | new[at + 1])
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class _DroppedError(Exception):
    """The packet goes no further; the text says why."""


class UserNat:
    """Packets in from one side, rewritten packets out. `counts` says what was dropped and why."""

    def __init__(self, nat: Nat) -> None:
        self.nat = nat
        self.counts: Counter[str] = Counter()
        self._reassembler = Reassembler()

    def from_inside(self, packet: bytes, now: float) -> bytes | None:
        """A packet from a LAN: translated towards the Internet or, for one of our own addresses, back."""
        return self._pass(packet, now, self._outwards)

    def from_outside(self, packet: bytes, now: float) -> bytes | None:
        """A packet to one of our public addresses: for a host inside, or filtered."""
        return self._pass(packet, now, self._inwards)

    def _pass(self, packet: bytes, now: float, translate: _Translate) -> bytes | None:
        try:
            whole = self._reassembler.take_untrusted(packet)
            return None if whole is None else self._rewrite(whole, *translate(*self._ends(whole), now))
        except (_DroppedError, WireError) as reason:
            self.counts[str(reason)] += 1
            return None

    def _outwards(self, source: Endpoint, destination: Endpoint, now: float) -> tuple[Endpoint, Endpoint]:
        if destination.host in self.nat.public:
            turned = self.nat.translate_hairpin(source, destination, now)
            if turned is None:
                raise _DroppedError("filtered")
            return turned
        external = self.nat.translate_out(source, destination, now)
        if external is None:
            raise _DroppedError("no port is free")
        return external, destination

    def _inwards(self, source: Endpoint, destination: Endpoint, now: float) -> tuple[Endpoint, Endpoint]:
        inside = self.nat.translate_in(source, destination, now)
        if inside is None:
            raise _DroppedError("filtered")
        return source, inside

    @staticmethod
    def _ends(packet: bytes) -> tuple[Endpoint, Endpoint]:
        if packet[0] >> 4 != 4 or packet[9] != UDP:
            raise _DroppedError("not UDP over IPv4")
        at = (packet[0] & 15) * 4
        if len(packet) < at + _UDP_HEADER_BYTES:
            raise _DroppedError("no whole UDP header")
        hosts = [".".join(map(str, packet[start : start + 4])) for start in (12, 16)]
        return (
            Endpoint(hosts[0], packet[at] << 8 | packet[at + 1]),
            Endpoint(hosts[1], packet[at + 2] << 8 | packet[at + 3]),
        )

    @staticmethod
    def _rewrite(packet: bytes, source: Endpoint, destination: Endpoint) -> bytes:
        at = (packet[0] & 15) * 4
        out = bytearray(packet)
        old_hosts, old_ports = packet[12:20], packet[at : at + 4]
        hosts = bytes(int(part) for host in (source.host, destination.host) for part in host.split("."))
        ports = source.port.to_bytes(2, "big") + destination.port.to_bytes(2, "big")
        out[12:20], out[at : at + 4] = hosts, ports
        out[10:12] = adjusted(packet[10] << 8 | packet[11], old_hosts, hosts).to_bytes(2, "big")
        checksum = packet[at + 6] << 8 | packet[at + 7]
        if checksum:  # zero means that there is none (RFC 768), and stays so
            checksum = adjusted(checksum, old_hosts + old_ports, hosts + ports) or 0xFFFF
            out[at + 6 : at + 8] = checksum.to_bytes(2, "big")
        return bytes(out)


class Box:
    """The devices, rules and loop of one NAT box in the namespace of the calling process."""

    def __init__(self, machine: UserNat, lans: Sequence[str]) -> None:
        """Raises LocalError when devices, rules or nftables cannot be set up."""
        self._machine = machine
        self._lans = list(lans)
        self._wants_flush = False
        self._wants_end = False
        self._inside = Tun(INSIDE_DEVICE)
        self._outside = Tun(OUTSIDE_DEVICE)
        self._tear_down()
        _shell(self._set_up_script())

    def flush(self, *_: object) -> None:
        """Forget all mappings before the next packet; a signal handler."""
        self._wants_flush = True

    def end(self, *_: object) -> None:
        """Stop after the packet at hand; a signal handler."""
        self._wants_end = True

    def run(self) -> None:
        """Translate until `end`, then take the rules away."""
        wake_r, wake_w = os.pipe()
        os.set_blocking(wake_w, False)
        signal.set_wakeup_fd(wake_w)
        try:
            while not self._wants_end:
                readable, _, _ = select.select([self._inside.fd, self._outside.fd, wake_r], [], [])
                if wake_r in readable:
                    os.read(wake_r, 64)
                if self._wants_flush:
                    self._wants_flush = False
                    self._machine.nat.flush()
                now = time.monotonic()
                for tun, translate in (
                    (self._inside, self._machine.from_inside),
                    (self._outside, self._machine.from_outside),
                ):
                    if tun.fd in readable:
                        self._carry(tun, translate, now)
        finally:
            signal.set_wakeup_fd(-1)
            self._tear_down()

    @staticmethod
    def _carry(tun: Tun, translate: Callable[[bytes, float], bytes | None], now: float) -> None:
        for _ in range(BURST_PACKETS):
            packet = _read(tun)
            if packet is None:
                return
            out = translate(packet, now)
            if out is not None:
                tun.write(out)

    def _set_up_script(self) -> str:
        lines = []
        for device, table in ((INSIDE_DEVICE, INSIDE_TABLE), (OUTSIDE_DEVICE, OUTSIDE_TABLE)):
            lines += [
                f"ip link set {device} up mtu {DEVICE_MTU} txqueuelen 10000",
                f"ip route replace default dev {device} table {table}",
                # What comes back out of the machine carries addresses of ours as its source.
                f"sysctl -qw net.ipv4.conf.{device}.rp_filter=0 net.ipv4.conf.{device}.accept_local=1",
            ]
        lines += ["sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.ip_forward=1"]
        lines += [f"ip rule add preference {LOCAL_PREFERENCE} lookup local", "ip rule delete preference 0 || true"]
        for lan in self._lans:
            lines += [f"ip rule add preference {LAN_PREFERENCE} iif {lan} ipproto udp lookup {INSIDE_TABLE}"]
        for public in self._machine.nat.public:
            # Between two of our devices a packet is on its way out, not in.
            to = f"to {public} ipproto udp"
            lines += [
                f"ip rule add preference {PUBLIC_PREFERENCE} iif {lan} {to} lookup {INSIDE_TABLE}" for lan in self._lans
            ]
            lines += [f"ip rule add preference {PUBLIC_PREFERENCE + 1} {to} lookup {OUTSIDE_TABLE}"]
        inner = ", ".join(f'"{device}"' for device in (*self._lans, INSIDE_DEVICE, OUTSIDE_DEVICE))
        lines += [
            f"nft -f - <<'END'\ntable ip {NFT_TABLE} {{\n"
            "  chain before { type filter hook prerouting priority raw; meta l4proto udp notrack\n  }\n"
            "  chain after { type nat hook postrouting priority srcnat;\n"
            f"    oifname != {{ {inner} }} meta l4proto != udp masquerade\n  }}\n}}\nEND"
        ]
        return "\n".join(lines)

    def _tear_down(self) -> None:
        """Also takes away what a box left that was killed here."""
        preferences = (PUBLIC_PREFERENCE, PUBLIC_PREFERENCE + 1, LAN_PREFERENCE)
        _shell(
            "\n".join(
                [
                    "ip rule show | grep -q '^0:' || ip rule add preference 0 lookup local",
                    *(f"while ip rule delete preference {each} 2>/dev/null; do :; done" for each in preferences),
                    f"ip rule delete preference {LOCAL_PREFERENCE} 2>/dev/null || true",
                    f"nft delete table ip {NFT_TABLE} 2>/dev/null || true",
                ]
            )
        )


def _read(tun: Tun) -> bytes | None:
    with contextlib.suppress(BlockingIOError):
        return os.read(tun.fd, DEVICE_MTU)
    return None


def _shell(script: str) -> None:
    done = subprocess.run(["sh", "-ec", script], capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    if done.returncode:
        raise LocalError(f"cannot set the NAT box up: {done.stderr.strip() or done.stdout.strip()}", hint="run as root")


def kind_of(arguments: argparse.Namespace) -> NatKind:
    """The kind that the command line describes: a named one, changed by the options that are given."""
    kind = NatKind.of(arguments.kind)
    return replace(
        kind,
        mapping=Rule(arguments.mapping) if arguments.mapping else kind.mapping,
        filtering=Rule(arguments.filtering) if arguments.filtering else kind.filtering,
        ports=Ports(arguments.port) if arguments.port else kind.ports,
        hairpin=kind.hairpin and not arguments.no_hairpin,
        timeout_s=arguments.timeout,
    )


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m p2pvpn.lab.usernat", description="a NAT box in user space")
    made.add_argument("--lan", action="append", required=True, metavar="DEV", help="inside device; may be repeated")
    made.add_argument(
        "--public", action="append", required=True, metavar="ADDR", help="public address; may be repeated"
    )
    made.add_argument("--kind", default="port-restricted", help=f"{', '.join(KINDS)} or mapping/filtering/ports")
    made.add_argument("--mapping", choices=[rule.value for rule in Rule])
    made.add_argument("--filtering", choices=[rule.value for rule in Rule])
    made.add_argument("--port", choices=[ports.value for ports in Ports])
    made.add_argument("--no-hairpin", action="store_true")
    made.add_argument("--timeout", type=float, default=DEFAULT_TIMEOUT_S, metavar="SECONDS", help="life of a mapping")
    made.add_argument("--seed", type=int, help="make random ports repeat")
    return made


def main(argv: Sequence[str]) -> int:
    die_with_parent(os.getppid())
    arguments = parser().parse_args(argv)
    try:
        kind = kind_of(arguments)
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 2
    draw = random.Random(arguments.seed) if arguments.seed is not None else random.SystemRandom()
    try:
        box = Box(UserNat(Nat(arguments.public, kind, draw)), arguments.lan)
    except LocalError as problem:
        print(problem, file=sys.stderr)
        return 1
    signal.signal(signal.SIGUSR1, box.flush)
    signal.signal(signal.SIGTERM, box.end)
    signal.signal(signal.SIGINT, box.end)
    print("ready", flush=True)
    box.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
