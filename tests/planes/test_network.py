"""Whole networks on the kernel plane, by the commands that a user types."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from p2pvpn.lab import uml
from p2pvpn.lab.nat import NatKind
from p2pvpn.lab.net import Lab
from p2pvpn.lab.stage import Stage

pytestmark = [pytest.mark.netns, pytest.mark.campaign, pytest.mark.timeout(400)]

if uml.is_inside():

    def test_a_hub_in_the_kernel_has_peers_in_either_plane(tmp_path):
        """a in the kernel, b in the user plane, hub in the kernel: by relay, then direct, and each with the hub."""
        with Lab() as lab:
            nats = dict.fromkeys(("a", "b"), NatKind.PORT_RESTRICTED)
            stage = Stage(lab, tmp_path, hubs=1, nats=nats, rtt_ms=30, plane="kernel")
            stage.b.environment["P2PVPN_PLANE"] = "user"
            (tmp_path / "passphrase").write_text("correct horse")
            secret = ("--passphrase-file", str(tmp_path / "passphrase"))
            (hub,) = stage.hubs
            stage.cli(stage.admin, "network", "create", "home", *secret)
            request = stage.line(hub, "request")
            options = ("--name", "hub1", "--hub", "192.0.2.1", "--issuer")
            stage.cli(hub, "join", stage.line(stage.admin, "grant", request, *options, *secret))
            overlay = {}
            for name, home in stage.homes.items():
                token = str(stage.ask(hub, "invite", name)["token"])
                overlay[name] = str(stage.ask(home.peer, "join", token)["overlay"])
            planes = [stage.ask(node, "status")["plane"] for node in (hub, stage.a, stage.b)]
            assert planes == ["kernel", "kernel", "user"]
            for node, target in ((stage.a, "b"), (stage.b, "a")):
                pings = [bool(node.ping(overlay[target], wait_s=10)) for _ in range(3)]
                assert any(pings)
            stage.wait(
                "a direct path",
                lambda: stage.path(stage.a, "b") == "direct",
                60.0,
                lambda: stage.path(stage.a, "b"),
                stage.a,
                stage.b,
            )
            assert len(stage.a.ping(overlay["b"], count=5)) == 5
            assert len(stage.b.ping(overlay["a"], count=5)) == 5

else:

    @pytest.mark.timeout(700)
    def test_the_demo_on_the_kernel_plane_loses_nothing(tmp_path: Path) -> None:
        result = tmp_path / "result.json"
        argv = [sys.executable, "-m", "p2pvpn.cli.main", "demo", "--plane", "kernel", "--json", str(result)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, env=dict(os.environ))
        assert done.returncode == 0, done.stdout + done.stderr
        figures = json.loads(result.read_text())
        assert figures["plane"] == "kernel"
        assert (figures["path_at_first_ping"], figures["path"]) == ("relayed", "direct")
        assert figures["lost_during_upgrade"] == 0
        assert figures["hub_killed"] == {"lost": 0, "new_connection_ok": True}
        assert figures["on_the_wire"]["other_udp"] == 0
        assert "kernel counted" in done.stdout
