"""NATs of the home routers, by their behaviour in the words of RFC 4787, made of nftables.

    kind              mapping                      filtering
    none              no translation               none
    full-cone         endpoint-independent         endpoint-independent
    restricted        endpoint-independent         address-dependent
    port-restricted   endpoint-independent         address- and port-dependent
    symmetric         address- and port-dependent  address- and port-dependent
    udp-blocked       no UDP passes, either way

Mappings that do not depend on the endpoint live in two dynamic maps, inside to outside and back, with random outside
ports; a set remembers whom each outside port has written to. Symmetric is what `masquerade fully-random` does by
itself. TCP and ICMP are masqueraded in every kind.

A router drops what is addressed to itself from outside. Without this, a punching packet that comes before we sent
one of our own would make a connection-tracking entry of the router's, and the kernel would then give our packet to
that peer another port: punching would fail at random.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from enum import Enum

from . import nat_iptables
from .net import Home

MAPPING_TIMEOUT_S = 120
"""RFC 4787 REQ-5: not less than two minutes."""


class NatKind(Enum):
    """What a home router does to UDP."""

    NONE = "none"
    FULL_CONE = "full-cone"
    RESTRICTED = "restricted"
    PORT_RESTRICTED = "port-restricted"
    SYMMETRIC = "symmetric"
    UDP_BLOCKED = "udp-blocked"


_GUARD = """
  chain input {
    type filter hook input priority 0;
    iifname "wan" ct state established,related accept
    iifname "wan" drop
  }
  chain forward {
    type filter hook forward priority 0;
    iifname "wan" ct state established,related accept
    iifname "wan" ct status dnat accept
    iifname "wan" drop
  }
"""

_SYMMETRIC = f"""
table ip lab {{
  chain postrouting {{
    type nat hook postrouting priority 100;
    oifname "wan" masquerade fully-random
  }}
{_GUARD}}}
"""

_NO_UDP = """
table inet lab_udp {
  chain forward {
    type filter hook forward priority -10;
    meta l4proto udp drop
  }
}
"""

_CONE = """
table ip lab {
  map outside {
    type ipv4_addr . inet_service : ipv4_addr . inet_service
    flags dynamic,timeout
    timeout %(timeout)ds
    size 65535
  }
  map inside {
    type inet_service : ipv4_addr . inet_service
    flags dynamic,timeout
    timeout %(timeout)ds
    size 65535
  }
  set written {
    type inet_service . ipv4_addr
    flags dynamic,timeout
    timeout %(timeout)ds
    size 65535
  }
  chain postrouting {
    type nat hook postrouting priority 100;
    oifname "wan" meta l4proto udp snat ip to ip saddr . udp sport map @outside
    oifname "wan" masquerade fully-random
  }
  chain learn {
    type filter hook postrouting priority 150;
    oifname "wan" ct direction original meta l4proto udp ct status snat goto remember
  }
  chain remember {
    meta l4proto udp update @outside { ct original ip saddr . ct original proto-src : ip saddr . udp sport }
    meta l4proto udp update @inside { udp sport : ct original ip saddr . ct original proto-src }
    meta l4proto udp update @written { udp sport . ip daddr }
  }
  chain prerouting {
    type nat hook prerouting priority -100;
    %(admit)s
  }
%(guard)s}
"""

_ADMIT = {
    NatKind.FULL_CONE: 'iifname "wan" meta l4proto udp dnat ip to udp dport map @inside',
    NatKind.RESTRICTED: 'iifname "wan" meta l4proto udp udp dport . ip saddr @written dnat ip to udp dport map @inside',
    NatKind.PORT_RESTRICTED: "",
}


def ruleset(kind: NatKind) -> str:
    """The nft(8) script that makes a router with devices `lan` and `wan` behave so, whatever it did before."""
    if kind is NatKind.NONE:
        return "flush ruleset"
    if kind is NatKind.SYMMETRIC:
        return "flush ruleset" + _SYMMETRIC
    if kind is NatKind.UDP_BLOCKED:
        return "flush ruleset" + _SYMMETRIC + _NO_UDP
    return "flush ruleset" + _CONE % {"timeout": MAPPING_TIMEOUT_S, "admit": _ADMIT[kind], "guard": _GUARD}


def apply(home: Home, kind: NatKind) -> None:
    """Make the home's router behave like `kind` from now on; the flows that it knew are forgotten.

    `none` lets packets through as they are, which serves homes that are `routed`. Kernels without nf_tables get the
    same of iptables.
    """
    if _has_nftables():
        home.router.nft(ruleset(kind))
    else:
        script = nat_iptables.script(kind.value, home.inside, home.public, MAPPING_TIMEOUT_S)
        home.router.run([nat_iptables.PROGRAM], stdin=script)
    home.router.run(["conntrack", "-F"])


@functools.cache
def _has_nftables() -> bool:
    """Whether this kernel has nf_tables; asked in the laboratory's own namespace."""
    if shutil.which("nft") is None:
        return False
    probe = "table ip lab_probe {}\ndelete table ip lab_probe\n"
    return subprocess.run(["nft", "-f", "-"], input=probe.encode(), capture_output=True, check=False).returncode == 0


def turn_hostile(home: Home, kind: NatKind = NatKind.SYMMETRIC) -> None:
    """The router becomes symmetric under its users' feet, as one does that reboots with another firmware; one that
    blocks UDP stays so.
    """
    apply(home, kind if kind is NatKind.UDP_BLOCKED else NatKind.SYMMETRIC)


def direct_possible(one: NatKind, other: NatKind) -> bool | None:
    """Whether two homes must find a direct path by punching alone; None where luck or prediction decides.

    A symmetric router gives each destination another port. The other side then has to let it in from a port that it
    never wrote to, which a filter by ports does not.
    """
    kinds = {one, other}
    if NatKind.UDP_BLOCKED in kinds:
        return False
    if NatKind.SYMMETRIC not in kinds:
        return True
    if kinds == {NatKind.SYMMETRIC}:
        return False
    return None if NatKind.PORT_RESTRICTED in kinds else True
