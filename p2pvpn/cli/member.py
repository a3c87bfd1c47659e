"""`request`, `join`, `invite`, `leave`: memberships of this machine."""

from __future__ import annotations

import sys

import click

from .output import ask_daemon, json_option, run, show_json


@click.command()
def request() -> None:
    """Make this machine's key and print a REQUEST for the admin to grant.

    The key stays here. Asking again prints a request for the same key.
    """
    from p2pvpn.host import membership

    click.echo(membership.make_request())
    click.echo("give this line to the admin, who answers with: p2pvpn grant REQUEST --name NAME ...", err=True)


@click.command()
@click.argument("ticket", metavar="TOKEN|GRANT")
@click.option("--no-up", is_flag=True, help="Only become a member; bring the network up later with p2pvpn up.")
@json_option
def join(ticket: str, no_up: bool, as_json: bool) -> None:
    """Become a member of a network, by an invitation's TOKEN or an admin's GRANT, and bring it up."""
    from p2pvpn.host import background, membership

    from .service import reload_or_start

    if not no_up and not background.is_running():
        background.require_able()  # before the token is spent
    if not as_json:
        click.echo("making a key and asking for a certificate ..." if membership.is_token(ticket) else "checking ...")
    profile = run(membership.join(ticket.strip()))
    member = profile.member
    if not as_json:
        click.echo(f"joined {profile.genesis.name} as {member.name}: {member.overlay} {member.ipv4 or ''}")
    state = "" if no_up else reload_or_start()
    if as_json:
        show_json(
            {
                "network": profile.genesis.name,
                "name": member.name,
                "overlay": str(member.overlay),
                "ipv4": str(member.ipv4) if member.ipv4 else None,
                "up": not no_up,
            }
        )
        return
    click.echo(state or "bring it up with: p2pvpn up")


@click.command()
@click.argument("name")
@click.option("--network", help="Which network, when this machine is an issuer in several.")
@click.option("--valid", type=click.IntRange(60, 30 * 86400), default=86400, help="Seconds the invitation holds.")
@click.option("--no-qr", is_flag=True, help="Print the token only.")
@json_option
def invite(name: str, network: str | None, valid: int, no_qr: bool, as_json: bool) -> None:
    """Print a one-time TOKEN with which a machine joins as NAME. Runs on a hub that is an issuer."""
    answer = run(ask_daemon("invite", name=name, network=network, valid_s=valid))
    if as_json:
        show_json(answer)
        return
    click.echo(answer["token"])
    if not no_qr and sys.stdout.isatty():
        import segno

        segno.make_qr(answer["token"]).terminal(compact=True)
    click.echo(
        f"on the other machine: p2pvpn join TOKEN   (once, within {valid // 3600} h {valid % 3600 // 60} min)", err=True
    )


@click.command()
@click.option("--network", help="Which network, when this machine is in several.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def leave(network: str | None, yes: bool) -> None:
    """Leave a network: its tunnels end, its key and certificate on this machine are deleted."""
    from p2pvpn.host import background, membership

    from .service import reload_or_start

    chosen = membership.choose(network)
    if not yes:
        click.confirm(f"leave {chosen.name} and delete this machine's key in it?", abort=True)
    membership.leave(chosen)
    if background.is_running():
        reload_or_start()
    click.echo(f"left {chosen.name}")
