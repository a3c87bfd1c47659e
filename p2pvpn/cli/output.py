"""How commands print: JSON for scripts, tables for people."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from p2pvpn import __version__
from p2pvpn.core.errors import Fault, LocalError

if TYPE_CHECKING:
    from p2pvpn.host.control import ControlClient

T = TypeVar("T")

SENTENCES = ("note", "which means")
"""Columns that may take several lines."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


def show_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2, sort_keys=False))


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table as wide as the terminal; the title stands alone when there is nothing to show."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column not in SENTENCES)
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    Console().print(table)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end; Ctrl-C aborts quietly."""
    try:
        return asyncio.run(work)
    except KeyboardInterrupt:
        raise click.Abort from None


async def ask_daemon(method: str, **params: object) -> Any:
    """One call to the running daemon. Raises LocalError when there is none, or one of another version."""
    async with daemon() as client:
        return await client.call(method, **params)


@asynccontextmanager
async def daemon() -> AsyncIterator[ControlClient]:
    """A connection to the running daemon. Raises LocalError when there is none, or one of another version."""
    from p2pvpn.host.control import ControlClient, control_path

    async with await ControlClient.connect(control_path()) as client:
        theirs = await client.call("version")
        if theirs != __version__:
            raise LocalError(
                f"the daemon is p2pvpn {theirs}, this command is {__version__}",
                hint="restart it: p2pvpn restart",
                fault=Fault.NOT_RUNNING,
            )
        yield client
