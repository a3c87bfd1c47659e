"""How the demo tells what happens: chapters, facts as they come true, tables of what was on the wire."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Passage:
    """Some packets of one kind in a row on one wire, for a timeline: when the first passed, and between whom."""

    at_ms: float
    kind: str
    source: str
    destination: str
    count: int


class Story:
    """Tells to a terminal, with spinners, or to a pipe, line by line."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._began = time.monotonic()
        self._chapter = 0

    def chapter(self, title: str) -> None:
        self._chapter += 1
        self._console.print(f"\n[bold]{self._chapter}. {escape(title)}[/bold]")

    @contextlib.contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Something that takes a while."""
        if self._console.is_terminal:
            with self._console.status(escape(what)):
                yield
        else:
            yield

    def command(self, host: str, line: str) -> None:
        """A command that is being run on a host."""
        self._console.print(f"   [cyan]{escape(host)}$[/cyan] {escape(line)}")

    def fact(self, text: str) -> None:
        elapsed = time.monotonic() - self._began
        self._console.print(f"   [green]✓[/green] {escape(text)} [dim]({elapsed:.1f} s)[/dim]")

    def note(self, text: str) -> None:
        self._console.print(f"     [dim]{escape(text)}[/dim]")

    def picture(self, text: str) -> None:
        self._console.print(escape(text.rstrip("\n")), style="dim")

    def timeline(self, title: str, passages: Sequence[Passage]) -> None:
        """What passed on the wire, in order."""
        table = Table(title=title, title_justify="left", box=None, padding=(0, 1), pad_edge=False)
        table.add_column("ms", justify="right")
        for heading in ("what", "from", "to"):
            table.add_column(heading)
        table.add_column("packets", justify="right")
        for one in passages:
            table.add_row(f"{one.at_ms:.0f}", one.kind, one.source, one.destination, str(one.count))
        self._console.print(table)

    def totals(self, by_hop: Mapping[str, Mapping[str, int]], total: Mapping[str, int]) -> None:
        """Packets of each class at each hop, and their sum."""
        table = Table(title="packets on the wire, at every hop", title_justify="left", box=None, padding=(0, 1))
        table.add_column("hop")
        total = {kind: count for kind, count in total.items() if count or kind != "stream_tcp"}
        for kind in total:
            table.add_column(kind, justify="right")
        for hop, counts in sorted(by_hop.items()):
            table.add_row(hop, *(str(counts[kind]) for kind in total))
        table.add_row("all", *(str(count) for count in total.values()), style="bold")
        self._console.print(table)

    def failed(self, expected: str, seen: str, logs: Mapping[str, str]) -> None:
        """What went wrong, with the end of the log of each host that may know why."""
        self._console.print(f"   [red]✗ expected[/red] {escape(expected)}")
        self._console.print(f"   [red]       seen[/red] {escape(seen)}")
        for host, text in logs.items():
            self._console.print(f"\n[bold]the end of {escape(host)}'s log[/bold]")
            self._console.print(escape(text) or "(it is empty)")

    def ended(self, ok: bool) -> None:
        elapsed = time.monotonic() - self._began
        word = "[green]all as it should be[/green]" if ok else "[red]not as it should be[/red]"
        self._console.print(f"\n{word}, after {elapsed:.0f} s; nothing of it stays on this machine")
