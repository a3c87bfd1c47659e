"""The command line: commands are found by name and imported when used, so that completion and --help stay quick."""

from __future__ import annotations

import importlib
import sys

import click

from p2pvpn import __version__
from p2pvpn.core.errors import P2pvpnError

COMMANDS = {
    "network": "admin:network",
    "grant": "admin:grant",
    "regrant": "admin:regrant",
    "revoke": "admin:revoke",
    "request": "member:request",
    "join": "member:join",
    "invite": "member:invite",
    "leave": "member:leave",
    "up": "service:up",
    "down": "service:down",
    "restart": "service:restart",
    "status": "show:status",
    "peers": "show:peers",
    "ping": "show:ping",
    "forget": "show:forget",
    "events": "show:events",
    "demo": "demonstrate:demo",
}
"""Command name to `module:function` in this package."""
EXIT_ERROR = 1


class LazyGroup(click.Group):
    """A group whose commands live in modules of their own."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        where = COMMANDS.get(cmd_name)
        if where is None:
            return None
        module, _, attribute = where.partition(":")
        command = getattr(importlib.import_module(f"p2pvpn.cli.{module}"), attribute)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="p2pvpn")
def cli() -> None:
    """An auto-discovery VPN: peers find each other and talk directly over IPsec.

    \b
    Join a network:      p2pvpn join TOKEN
    See what is up:      p2pvpn status
    Reach a peer:        p2pvpn ping NAME
    Start a network:     p2pvpn network create NAME
    """


def main() -> None:
    """Entry point: errors of ours become one sentence and a hint, never a traceback."""
    try:
        code = cli.main(standalone_mode=False)  # what a command gave to ctx.exit, or its own result
        sys.exit(code if isinstance(code, int) else 0)
    except click.Abort:
        click.echo("aborted", err=True)
        sys.exit(130)
    except click.ClickException as problem:
        problem.show()
        sys.exit(problem.exit_code)
    except P2pvpnError as problem:
        click.echo(f"error: {problem}", err=True)
        if problem.hint:
            click.echo(f"  {problem.hint}", err=True)
        sys.exit(EXIT_ERROR)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(EXIT_ERROR)
    except PermissionError as problem:
        click.echo(f"error: no permission for {problem.filename}", err=True)
        click.echo(
            "  run the command as root, or point P2PVPN_STATE_DIR and P2PVPN_RUNTIME_DIR at places of yours", err=True
        )
        sys.exit(EXIT_ERROR)
    except OSError as problem:
        click.echo(
            f"error: {problem.strerror or problem}" + (f": {problem.filename}" if problem.filename else ""), err=True
        )
        sys.exit(EXIT_ERROR)


if __name__ == "__main__":
    main()
