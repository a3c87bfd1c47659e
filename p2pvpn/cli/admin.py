"""`network`, `grant`, `revoke`: the admin's commands. They need the root key and no daemon, and run on no hub."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import click

from p2pvpn.core.errors import Fault, LocalError
from p2pvpn.core.secret import Secret

from .output import json_option, show_json, show_table

passphrase_option = click.option(
    "--passphrase-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Read the passphrase here."
)
network_option = click.option("--network", help="Which network, when this admin has several.")


def _passphrase(file: Path | None, *, new: bool = False) -> Secret:
    """From the first line of a file, or of standard input when it is no terminal, else by prompt; a new one twice."""
    if file is not None:
        value = file.read_bytes().partition(b"\n")[0].removesuffix(b"\r")
    elif not sys.stdin.isatty():
        value = sys.stdin.buffer.readline().rstrip(b"\r\n")
    else:
        typed = click.prompt("passphrase of the root key", hide_input=True, confirmation_prompt=new, err=True)
        value = str(typed).encode(errors="surrogateescape")
    if not value:
        raise LocalError(
            "the passphrase is empty",
            hint="type one, or give --passphrase-file: a root key without one belongs to whoever finds it",
            fault=Fault.REFUSED,
        )
    return Secret(value)


@click.group()
def network() -> None:
    """Networks that this machine administers."""


@network.command("create")
@click.argument("name")
@passphrase_option
@json_option
def create(name: str, passphrase_file: Path | None, as_json: bool) -> None:
    """Create a network; its root key stays on this machine, under a passphrase."""
    from p2pvpn.host.admin_store import AdminStore
    from p2pvpn.identity.admin import AdminNetwork

    store = AdminStore.new(name)
    admin = AdminNetwork.create(name, time.time(), os.urandom)
    store.save(admin, _passphrase(passphrase_file, new=True))
    identifier = admin.genesis.network_id.hex()
    if as_json:
        show_json({"name": name, "id": identifier, "directory": str(store.path)})
        return
    click.echo(f"network {name} is made: {identifier}")
    click.echo(f"its keys are in {store.path}; move recovery.pem from there to a safe place")
    click.echo("next, on each hub: p2pvpn request; here: p2pvpn grant REQUEST --name NAME --hub ADDRESS --issuer")


@network.command("list")
@json_option
def show(as_json: bool) -> None:
    """List the networks administered here."""
    from p2pvpn.host.admin_store import AdminStore

    rows = [{"name": store.name, "directory": str(store.path)} for store in AdminStore.all()]
    if as_json:
        show_json(rows)
    elif not rows:
        click.echo("no network is administered here; p2pvpn network create NAME makes one")
    else:
        show_table("networks", ("name", "directory"), [(row["name"], row["directory"]) for row in rows])


@network.command("topology")
@click.argument("kind", type=click.Choice(["full", "star", "dynamic", "partial"]))
@click.option("--pair", "pairs", multiple=True, metavar="GROUP:GROUP", help="Groups that may talk, in a partial mesh.")
@network_option
@passphrase_option
def topology(kind: str, pairs: tuple[str, ...], network: str | None, passphrase_file: Path | None) -> None:
    """Say who may talk to whom."""
    from p2pvpn.host.admin_store import AdminStore
    from p2pvpn.identity.document import Topology

    split = [pair.partition(":")[::2] for pair in pairs]
    store = AdminStore.find(network)
    secret = _passphrase(passphrase_file)
    admin = store.load(secret)
    admin.set_topology(Topology(kind), [(str(a), str(b)) for a, b in split], wall=time.time())
    store.save(admin, secret)
    _say_how_to_spread()


@click.command()
@click.argument("request")
@click.option("--name", help="What the machine is called in the network (default: what the request says).")
@click.option("--hub", metavar="ADDRESS", help="Make it a hub, reachable at HOST[:PORT] (several with commas).")
@click.option("--issuer", is_flag=True, help="Let the hub invite and certify ordinary members.")
@click.option("--prefix", "prefixes", multiple=True, metavar="NET", help="Make it a gateway that serves this prefix.")
@click.option("--group", "groups", multiple=True, help="Put it into this group.")
@click.option("--enrol-port", type=click.IntRange(1, 65535), default=443, help="TCP port at which a hub takes joins.")
@network_option
@passphrase_option
@json_option
def grant(
    request: str,
    name: str | None,
    hub: str | None,
    issuer: bool,
    prefixes: tuple[str, ...],
    groups: tuple[str, ...],
    enrol_port: int,
    network: str | None,
    passphrase_file: Path | None,
    as_json: bool,
) -> None:
    """Answer a machine's REQUEST with a GRANT, which makes it a member for a year."""
    from p2pvpn.host.admin_store import AdminStore
    from p2pvpn.identity.grants import Request
    from p2pvpn.identity.names import require_name

    if hub is not None and not hub.strip():
        raise LocalError("the hub's address is empty", hint="write --hub HOST or --hub HOST:PORT", fault=Fault.REFUSED)
    if name is not None:
        require_name(name)
    parsed = Request.decode_untrusted(request.strip())
    store = AdminStore.find(network)
    secret = _passphrase(passphrase_file)
    admin = store.load(secret)
    answer = admin.grant(
        parsed,
        wall=time.time(),
        name=name,
        hub=hub,
        issuer=issuer,
        prefixes=prefixes,
        groups=groups,
        enrol_port=enrol_port,
    )
    store.save(admin, secret)
    if as_json:
        show_json({"grant": answer.encode(), "peer_id": parsed.peer_id.hex(), "document": admin.document.version})
        return
    click.echo(answer.encode())
    click.echo("on that machine: p2pvpn join GRANT", err=True)


@click.command()
@click.argument("member")
@click.option(
    "--since",
    type=click.IntRange(0, 10**10),
    help="For an issuer: what it certified after this time (Unix seconds) is refused.",
)
@network_option
@passphrase_option
def revoke(member: str, since: int | None, network: str | None, passphrase_file: Path | None) -> None:
    """Revoke MEMBER: a granted machine by name, any member by peer ID."""
    from p2pvpn.host.admin_store import AdminStore

    store = AdminStore.find(network)
    secret = _passphrase(passphrase_file)
    admin = store.load(secret)
    peer = admin.revoke(member, wall=time.time(), cut_off=since)
    store.save(admin, secret)
    click.echo(f"{peer.hex()} is revoked in document {admin.document.version}")
    _say_how_to_spread()


@click.command()
@click.argument("member")
@network_option
@passphrase_option
def regrant(member: str, network: str | None, passphrase_file: Path | None) -> None:
    """Print the GRANT of MEMBER once more, with today's network document in it.

    Joined on one hub, it puts the document in force everywhere: members hand it on by themselves.
    """
    from p2pvpn.host.admin_store import AdminStore

    admin = AdminStore.find(network).load(_passphrase(passphrase_file))
    click.echo(admin.regrant(member).encode())


def _say_how_to_spread() -> None:
    click.echo("to put it in force: p2pvpn regrant HUB here, and p2pvpn join GRANT on that hub")
