"""The command line: commands are found by name and imported when used, so that completion and --help stay quick."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any, NoReturn

import click

from p2pvpn import __version__
from p2pvpn.core.errors import Fault, P2pvpnError

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
    "netcheck": "netcheck:netcheck",
    "why": "why:why",
    "forget": "show:forget",
    "events": "show:events",
    "demo": "demonstrate:demo",
}
"""Command name to `module:function` in this package."""
EXIT_USAGE = 2
"""What click says of a command line that it does not understand."""
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
"""As of a shell that saw SIGINT (2) or SIGPIPE (13) end a program: 128 more."""
TRACEBACK = "P2PVPN_TRACEBACK"


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

    def invoke(self, ctx: click.Context) -> Any:
        """As any group, but Ctrl-C is told by `main` alone; click would print an empty line first."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.Abort from None


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
        _end("interrupted; nothing was changed that the next attempt does not take up", "", EXIT_INTERRUPTED)
    except click.ClickException as problem:
        problem.show()
        sys.exit(problem.exit_code)
    except P2pvpnError as problem:
        _end(str(problem), problem.hint, problem.fault)
    except BrokenPipeError:  # whoever read our output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BROKEN_PIPE)
    except KeyboardInterrupt:
        _end("interrupted", "", EXIT_INTERRUPTED)
    except PermissionError as problem:
        hint = "try again with sudo; P2PVPN_STATE_DIR and P2PVPN_RUNTIME_DIR name other places for p2pvpn's files"
        _end(f"no permission for {problem.filename}", hint, Fault.NOT_ALLOWED)
    except OSError as problem:
        what = problem.strerror or str(problem)
        _end(f"{what}: {problem.filename}" if problem.filename else what, "", Fault.FAILED)
    except Exception as bug:
        if os.environ.get(TRACEBACK):
            raise
        _end(f"this is a mistake in p2pvpn: {type(bug).__name__}: {bug}", f"{TRACEBACK}=1 shows where", Fault.BUG)


def _end(what: str, hint: str, code: int) -> NoReturn:
    click.echo(f"error: {' '.join(what.split())}", err=True)
    if hint:
        click.echo(f"  {hint}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
