"""One machine in two networks at once: one daemon, its ports, and nothing of one seen by the other."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from p2pvpn.lab.nat import NatKind
from p2pvpn.lab.net import Lab, Node
from p2pvpn.lab.stage import Stage


@pytest.mark.netns
@pytest.mark.timeout(180)
def test_a_machine_is_in_two_networks_at_once(lab: Lab, tmp_path: Path) -> None:
    nats = dict.fromkeys(("a", "b"), NatKind.PORT_RESTRICTED)
    stage = Stage(lab, tmp_path, hubs=2, nats=nats, rtt_ms=10, plane="auto")
    secret = tmp_path / "passphrase"
    secret.write_text(os.urandom(16).hex())
    passphrase = ("--passphrase-file", str(secret))
    overlays: dict[str, dict[str, str]] = {}
    for name in ("home", "work"):  # the hubs enrol for both at one port
        stage.cli(stage.admin, "network", "create", name, *passphrase)
        for number, hub in enumerate(stage.hubs, start=1):
            request = stage.line(hub, "request")
            options = ("--network", name, "--name", str(hub), "--hub", f"192.0.2.{number}", "--issuer")
            grant = stage.line(stage.admin, "grant", request, *options, *passphrase)
            stage.cli(hub, "join", grant)
        overlays[name] = {}
        for peer in (stage.a, stage.b):
            invitation = stage.ask(stage.hubs[0], "invite", str(peer), "--network", name)
            overlays[name][str(peer)] = str(stage.ask(peer, "join", invitation["token"])["overlay"])

    def reaches(peer: Node, address: str) -> bool:
        return bool(peer.ping(address, wait_s=3.0))

    for name in ("home", "work"):
        stage.wait(f"an answer in {name}", lambda n=name: reaches(stage.a, overlays[n]["b"]), 20.0, lambda: "none")  # type: ignore[misc]
    networks = stage.ask(stage.a, "status")["networks"]
    assert sorted(network["name"] for network in networks) == ["home", "work"]
    assert all(peer["state"] == "connected" for network in networks for peer in network["peers"])

    stage.cli(stage.a, "leave", "--network", "work", "--yes")
    assert reaches(stage.a, overlays["home"]["b"])
    assert not reaches(stage.a, overlays["work"]["b"])
