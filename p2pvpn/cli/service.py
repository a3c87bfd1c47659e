"""`up`, `down`, `restart`: the daemon's life."""

from __future__ import annotations

import click

from p2pvpn.core.errors import LocalError

from .output import run

PLANES = ("auto", "kernel", "user")


@click.command()
@click.option("--foreground", is_flag=True, help="Stay in the foreground, for containers and supervisors.")
@click.option(
    "--port", type=click.IntRange(1, 65535), help="UDP port (default: 4500, or what the network says of a hub)."
)
@click.option("--plane", type=click.Choice(PLANES), help="What encrypts packets (default: the kernel where it can).")
@click.option("--verbose", "-v", is_flag=True, help="Log every event to standard error (with --foreground).")
def up(foreground: bool, port: int | None, plane: str | None, verbose: bool) -> None:
    """Bring this machine's networks up."""
    from p2pvpn.host import daemon

    if foreground:
        daemon.run_foreground(port=port, plane=plane, verbose=verbose)
    else:
        click.echo(start_daemon(port, plane))


def start_daemon(port: int | None = None, plane: str | None = None) -> str:
    """Start in the background and wait until the control socket answers; says what was done."""
    from p2pvpn.host import daemon

    if daemon.is_running():
        return "p2pvpn is already up"
    daemon.start_background(port=port, plane=plane)
    return "p2pvpn is up"


@click.command()
def down() -> None:
    """Take this machine's networks down; the memberships stay."""
    from p2pvpn.host import daemon

    click.echo("p2pvpn is down" if daemon.stop_background() else "p2pvpn was not up")


@click.command()
@click.option("--port", type=click.IntRange(1, 65535), help="UDP port from now on.")
@click.option("--plane", type=click.Choice(PLANES), help="What encrypts packets from now on.")
def restart(port: int | None, plane: str | None) -> None:
    """Take the networks down and up again."""
    from p2pvpn.host import daemon

    daemon.stop_background()
    click.echo(start_daemon(port, plane))


def reload_or_start() -> str:
    """After a membership changed: tell the daemon, or start it."""
    from p2pvpn.host import daemon

    from .output import ask_daemon

    if not daemon.is_running():
        return start_daemon()
    run(ask_daemon("reload"))
    return "the running daemon has taken it up"


def require_daemon() -> None:
    """Raises LocalError with what to do when no daemon runs."""
    from p2pvpn.host import daemon

    if not daemon.is_running():
        raise LocalError("p2pvpn is not up on this machine", hint="start it with: p2pvpn up")
