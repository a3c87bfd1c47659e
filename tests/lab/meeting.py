"""A network with its hubs up, made by the commands that an admin types."""

from __future__ import annotations

import os
from pathlib import Path

from p2pvpn.lab.net import Node
from p2pvpn.lab.stage import Stage


def found_network(stage: Stage, directory: Path) -> None:
    """The admin creates the network `home`, and every hub of the stage joins it and invites."""
    secret = directory / "passphrase"
    secret.touch(0o600)
    secret.write_text(os.urandom(16).hex())
    passphrase = ("--passphrase-file", str(secret))
    stage.cli(stage.admin, "network", "create", "home", *passphrase)
    for number, hub in enumerate(stage.hubs, start=1):
        granted = ("--name", str(hub), "--hub", f"192.0.2.{number}", "--issuer", *passphrase)
        stage.cli(hub, "join", stage.line(stage.admin, "grant", stage.line(hub, "request"), *granted))


def join(stage: Stage, peer: Node) -> str:
    """The peer joins by a token of the first hub; its overlay address."""
    token = str(stage.ask(stage.hubs[0], "invite", str(peer))["token"])
    return str(stage.ask(peer, "join", token)["overlay"])
