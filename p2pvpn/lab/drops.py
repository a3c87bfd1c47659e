"""Where packets were dropped: what the kernels of all hosts counted between two looks.

    before = counted(lab.nodes)
    ...
    print(told(since(before, counted(lab.nodes))))      a: XfrmInStateSeqError 3; hub1: udp 7018 full 12

Read are the counters of IPsec (xfrm_stat), of IP and UDP (snmp, snmp6), of every device and UDP socket, and of the
backlog between devices, which all hosts of one kernel share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from .net import Node

Drops = Counter[tuple[str, str]]
"""Packets by host and reason."""

SHARED = "this kernel"
_HERE = Path("/proc/thread-self/net")
"""Of the network namespace that the thread is in."""
_SNMP = {
    "Ip": ("InHdrErrors", "InAddrErrors", "InDiscards", "OutDiscards", "OutNoRoutes", "ReasmFails", "FragFails"),
    "Udp": ("NoPorts", "InErrors", "RcvbufErrors", "SndbufErrors", "InCsumErrors", "MemErrors"),
}
_RECEIVED_AT, _SENT_AT = 3, 11
"""Columns of dropped packets in a line of /proc/net/dev."""


def counted(nodes: Iterable[Node]) -> Drops:
    """All counters of these hosts, as they are now."""
    drops: Drops = Counter()
    for node in nodes:
        with node.inside():
            for reason, count in (*_ipsec(), *_protocols(), *_devices(), *_sockets()):
                drops[str(node), reason] += count
    for line in Path("/proc/net/softnet_stat").read_text(encoding="ascii").splitlines():
        drops[SHARED, "backlog full"] += int(line.split()[1], 16)
    return drops


def since(before: Drops, after: Drops) -> Drops:
    """What was counted in between. A socket that was closed takes its count with it."""
    return Counter({key: count - before[key] for key, count in after.items() if count > before[key]})


def told(drops: Drops) -> str:
    """In one line, host by host."""
    hosts: dict[str, list[str]] = {}
    for (host, reason), count in sorted(drops.items()):
        hosts.setdefault(host, []).append(f"{reason} {count}")
    return "; ".join(f"{host}: {', '.join(reasons)}" for host, reasons in hosts.items()) or "nothing"


def _read(name: str) -> list[str]:
    try:
        return (_HERE / name).read_text(encoding="ascii").splitlines()
    except OSError:
        return []  # a kernel without it


def _ipsec() -> Iterator[tuple[str, int]]:
    for line in _read("xfrm_stat"):
        name, count = line.split()
        yield name, int(count)


def _protocols() -> Iterator[tuple[str, int]]:
    lines = _read("snmp")
    for names, counts in zip(lines[::2], lines[1::2], strict=True):
        kind, *reasons = names.split()
        values = dict(zip(reasons, counts.split()[1:], strict=True))
        for reason in _SNMP.get(kind[:-1], ()):
            if reason in values:
                yield f"{kind[:-1]} {reason}", int(values[reason])
    for line in _read("snmp6"):
        name, count = line.split()
        for kind, wanted in _SNMP.items():
            if name.startswith(f"{kind}6") and name[len(kind) + 1 :] in wanted:
                yield name, int(count)


def _devices() -> Iterator[tuple[str, int]]:
    for line in _read("dev")[2:]:
        name, _, numbers = line.partition(":")
        columns = numbers.split()
        yield f"{name.strip()} in", int(columns[_RECEIVED_AT])
        yield f"{name.strip()} out", int(columns[_SENT_AT])


def _sockets() -> Iterator[tuple[str, int]]:
    for name in ("udp", "udp6"):
        for line in _read(name)[1:]:
            columns = line.split()
            port = int(columns[1].rpartition(":")[2], 16)
            yield f"{name} socket {port} full", int(columns[-1])
