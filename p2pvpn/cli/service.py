"""`up`, `down`, `restart`: the daemon's life."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from p2pvpn.core.errors import Fault, LocalError

from .output import ask_daemon, run

PLANES = ("auto", "kernel", "user")


@click.command()
@click.option("--foreground", is_flag=True, help="Stay in the foreground, for containers and supervisors.")
@click.option(
    "--port", type=click.IntRange(1, 65535), help="UDP port (default: 4500, or what the network says of a hub)."
)
@click.option("--plane", type=click.Choice(PLANES), help="What encrypts packets (default: the kernel where it can).")
@click.option(
    "--declare",
    "declared",
    multiple=True,
    metavar="ADDR:PORT",
    help="A public address that is forwarded to this machine, from now on; may be given again; 'none' for none.",
)
@click.option(
    "--port-mapping/--no-port-mapping",
    default=None,
    help="Whether routers are asked to forward a port (PCP, NAT-PMP, UPnP), from now on.",
)
@click.option("--verbose", "-v", is_flag=True, help="Log every event to standard error (with --foreground).")
def up(
    foreground: bool,
    port: int | None,
    plane: str | None,
    declared: tuple[str, ...],
    port_mapping: bool | None,
    verbose: bool,
) -> None:
    """Bring this machine's networks up."""
    changed = _save_settings(declared, port_mapping)
    if foreground:
        from p2pvpn.host import daemon

        daemon.run_foreground(port=port, plane=plane, verbose=verbose)
    else:
        click.echo(start_daemon(port, plane))
        if changed:
            run(ask_daemon("reload"))


def _save_settings(texts: tuple[str, ...], port_mapping: bool | None) -> bool:
    """Keep what is given; whether anything was. Raises LocalError."""
    if not texts and port_mapping is None:
        return False
    from p2pvpn.host.settings import MachineSettings, declared
    from p2pvpn.host.store import state_root

    settings = MachineSettings.load(state_root())
    if texts:
        settings = replace(settings, declared=() if texts == ("none",) else declared(texts))
    if port_mapping is not None:
        settings = replace(settings, port_mapping=port_mapping)
    settings.save(state_root())
    return True


def start_daemon(port: int | None = None, plane: str | None = None) -> str:
    """Start in the background and wait until the control socket answers; says what was done.

    Raises LocalError when it does not come up, or comes up without one of the networks.
    """
    from p2pvpn.host import background

    already = background.is_running()
    if not already:
        background.start(port=port, plane=plane)
    _complain(run(ask_daemon("status"))["problems"])
    return "p2pvpn is already up" if already else "p2pvpn is up"


@click.command()
def down() -> None:
    """Take this machine's networks down; the memberships stay."""
    from p2pvpn.host import background

    click.echo("p2pvpn is down" if background.stop() else "p2pvpn was not up")


@click.command()
@click.option("--port", type=click.IntRange(1, 65535), help="UDP port from now on.")
@click.option("--plane", type=click.Choice(PLANES), help="What encrypts packets from now on.")
def restart(port: int | None, plane: str | None) -> None:
    """Take the networks down and up again."""
    from p2pvpn.host import background

    background.stop()
    click.echo(start_daemon(port, plane))


def reload_or_start() -> str:
    """After a membership changed: tell the daemon, or start it. Raises LocalError as `start_daemon` does."""
    from p2pvpn.host import background

    if not background.is_running():
        return start_daemon()
    _complain(run(ask_daemon("reload"))["problems"])
    return "the running daemon has taken it up"


def _complain(problems: list[dict[str, Any]]) -> None:
    """Raise the last problem, after the others are told."""
    for number, problem in enumerate(problems, start=1):
        what = f"network {problem['network']} is not up: {problem['message']}"
        if number == len(problems):
            raise LocalError(what, hint=problem["hint"], fault=Fault(problem["fault"]))
        click.echo(f"error: {what}", err=True)
