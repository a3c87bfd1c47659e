"""What happened in a world, in order: events of the hosts and datagrams between them, and a sequence diagram of both.

A trace holds kinds, never bytes or sizes: signatures and key shares differ from run to run, and events do not. So the
same seed gives the same trace.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from p2pvpn.core.datagram import NON_ESP_MARKER, Kind, classify

from .internet import Crossing, Fate, Internet
from .loop import VirtualLoop

IKE_EXCHANGES = {
    34: "IKE_SA_INIT",
    35: "IKE_AUTH",
    36: "CREATE_CHILD_SA",
    37: "INFORMATIONAL",
    43: "IKE_INTERMEDIATE",
}
"""RFC 7296 section 3.1 and RFC 9242."""
STUN_CLASSES = ("request", "indication", "response", "error")
"""By the two class bits of RFC 8489 section 5."""
COLUMN = 32
"""Characters between two columns of a diagram."""


class TraceEvent(NamedTuple):
    """At `at` virtual seconds after the start, on one host; `to` names the receiver of a datagram."""

    at: float
    host: str
    kind: str
    text: str
    to: str = ""

    def __str__(self) -> str:
        who = f"{self.host} -> {self.to}" if self.to else self.host
        return f"{self.at:11.6f}  {who}: {self.kind} {self.text}".rstrip()


class Trace:
    """Collects events. `watch` adds the datagrams of an Internet, as far as `wanted` says."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.events: list[TraceEvent] = []
        self.is_kept = True
        """Whether events are collected now."""
        self._loop = loop

    def note(self, host: str, kind: str, text: str = "") -> None:
        """Something happened on a host now."""
        if self.is_kept:
            self.events.append(TraceEvent(self._loop.elapsed, host, kind, text))

    def watch(self, internet: Internet, wanted: Callable[[Crossing], bool] | None = None) -> Callable[[], None]:
        """Record datagrams from now on; the answer ends it."""

        def tap(crossing: Crossing) -> None:
            if wanted is None or wanted(crossing):
                fate = "" if crossing.fate is Fate.DELIVERED else f"({crossing.fate.value})"
                label = describe(crossing.datagram.data)
                self.events.append(TraceEvent(self._loop.elapsed, crossing.sender, label, fate, crossing.receiver))

        internet.taps.append(tap)
        return lambda: internet.taps.remove(tap)

    def lines(self) -> list[str]:
        return [str(event) for event in self.events]

    def digest(self) -> str:
        """A hash of all events: two runs of one seed agree on it."""
        return hashlib.sha256("\n".join(self.lines()).encode()).hexdigest()

    def diagram(self, hosts: Sequence[str], *, skip: Iterable[str] = ()) -> str:
        """A text sequence diagram with these hosts (and routers) as columns, without the kinds in `skip`."""
        return diagram(self.events, hosts, skip=skip)


def describe(data: bytes) -> str:
    """What a datagram is, from what anybody on the way can see."""
    kind = classify(data)
    if kind is Kind.IKE and len(data) >= len(NON_ESP_MARKER) + 28:
        header = data[len(NON_ESP_MARKER) :]
        exchange = IKE_EXCHANGES.get(header[18], f"exchange {header[18]}")
        message = int.from_bytes(header[20:24], "big")
        return f"{exchange} {'response' if header[19] & 0x20 else 'request'} {message}"
    if kind is Kind.STUN:
        return f"STUN {STUN_CLASSES[(data[0] & 1) << 1 | (data[1] >> 4 & 1)]}"
    label: str = kind.value
    return label.upper() if kind is Kind.ESP else label


def diagram(events: Iterable[TraceEvent], hosts: Sequence[str], *, skip: Iterable[str] = ()) -> str:
    """Time runs down, one column per host; runs of equal arrows are drawn once, with their number."""
    columns = {host: number * COLUMN for number, host in enumerate(hosts)}
    skipped = set(skip)
    rows: list[list[str]] = []
    last: tuple[str, str, str, str] | None = None
    repeats = 1
    for event in events:
        if event.host not in columns or (event.to and event.to not in columns) or event.kind in skipped:
            continue
        now = (event.host, event.to, event.kind, event.text if event.to else "")
        if event.to and now == last:
            repeats += 1
            rows[-1][1] = _arrow(event, columns, f" x{repeats}")
            continue
        last, repeats = now, 1
        picture = _arrow(event, columns, "") if event.to else _remark(event, columns)
        rows.append([f"{event.at:10.6f} ", picture])
    width = (len(hosts) - 1) * COLUMN + 1
    head = [" "] * (width + max(map(len, hosts), default=0))
    for host, at in columns.items():
        head[at : at + len(host)] = host
    return "\n".join([" " * 11 + "".join(head).rstrip(), *("".join(row).rstrip() for row in rows)])


def _rails(columns: dict[str, int]) -> list[str]:
    line = [" "] * (max(columns.values()) + 1)
    for at in columns.values():
        line[at] = "|"
    return line


def _arrow(event: TraceEvent, columns: dict[str, int], suffix: str) -> str:
    line = _rails(columns)
    left, right = sorted((columns[event.host], columns[event.to]))
    label = f"{event.kind}{suffix} {event.text}".rstrip()
    if left == right:
        return "".join(line) + f"  * {event.host}: {label}"
    span = right - left - 2
    fits = len(label) <= span
    shaft = (f" {label} " if len(label) + 2 <= span else label if fits else "").center(span, "-")
    backward = columns[event.to] < columns[event.host]
    tip = "x" if event.text else "<" if backward else ">"
    line[left + 1 : right] = tip + shaft if backward else shaft + tip
    return "".join(line) + ("" if fits else f"  {label}")


def _remark(event: TraceEvent, columns: dict[str, int]) -> str:
    return "".join(_rails(columns)) + f"  {event.host}: {event.kind} {event.text}"
