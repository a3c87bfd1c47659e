"""What `p2pvpn netcheck` says of a network is true: one machine, whose router becomes another one under its feet."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from p2pvpn.core.errors import Fault
from p2pvpn.lab import nat
from p2pvpn.lab.nat import NatKind
from p2pvpn.lab.net import Lab
from p2pvpn.lab.stage import Stage

EI, AD, APD = "endpoint-independent", "address-dependent", "address-and-port-dependent"
TRUTH = {
    NatKind.NONE: ("none", EI),
    NatKind.FULL_CONE: (EI, EI),
    NatKind.RESTRICTED: (EI, AD),
    NatKind.PORT_RESTRICTED: (EI, APD),
    NatKind.SYMMETRIC: (APD, APD),
}
"""Mapping and filtering, as coturn's client finds them (test_nat)."""
SUMMARY = {
    NatKind.NONE: "peers behind any NAT reach you directly",
    NatKind.FULL_CONE: "peers behind any NAT reach you directly",
    NatKind.RESTRICTED: "direct with everybody",
    NatKind.PORT_RESTRICTED: "direct with everybody but peers behind hard NATs",
    NatKind.SYMMETRIC: "others with luck",
}
TRUE_WITHIN_S = 25.0
"""The tunnels move to the new mapping first."""


def join(stage: Stage, root: Path) -> None:
    """One network, two hubs and the machine a."""
    secret = root / "passphrase"
    secret.write_text(os.urandom(16).hex())
    passphrase = ("--passphrase-file", str(secret))
    stage.cli(stage.admin, "network", "create", "home", *passphrase)
    for number, hub in enumerate(stage.hubs, start=1):
        options = ("--name", str(hub), "--hub", f"192.0.2.{number}", "--issuer")
        grant = stage.line(stage.admin, "grant", stage.line(hub, "request"), *options, *passphrase)
        stage.cli(hub, "join", grant)
    stage.cli(stage.a, "join", stage.ask(stage.hubs[0], "invite", "a")["token"])


@pytest.mark.netns
@pytest.mark.timeout(240)
def test_the_verdict_is_true_behind_every_kind_of_nat(lab: Lab, tmp_path: Path) -> None:
    nats = {"a": NatKind.NONE, "b": NatKind.NONE}
    stage = Stage(lab, tmp_path, hubs=2, nats=nats, rtt_ms=10, plane="user")
    join(stage, tmp_path)
    stage.wait("two hubs", lambda: len(stage.attached_hubs(stage.a)) == 2, 20.0, lambda: "fewer")
    said: dict[NatKind, dict[str, object]] = {}

    def verdict(kind: NatKind) -> tuple[str, str]:
        ipv4, ipv6 = stage.ask(stage.a, "netcheck")["families"]
        said[kind] = ipv4
        assert ipv6["summary"] == "this machine has no IPv6 address"
        return str(ipv4.get("mapping")), str(ipv4.get("filtering"))

    for kind, truth in TRUTH.items():
        nat.apply(stage.homes["a"], kind)
        stage.wait(
            f"{kind}: {truth}",
            lambda kind=kind, truth=truth: verdict(kind) == truth,  # type: ignore[misc]
            TRUE_WITHIN_S,
            lambda kind=kind: json.dumps(said[kind]),  # type: ignore[misc]
            stage.a,
        )
        assert SUMMARY[kind] in str(said[kind]["summary"])
        assert said[kind]["udp"] == "open"
    assert said[NatKind.SYMMETRIC]["allocation"] == "random"
    assert said[NatKind.FULL_CONE]["hairpin"] is False  # these routers turn nothing around
    text = stage.cli(stage.a, "netcheck")
    for word in ("IPv4: direct with peers", "mapping", "bindings", "hub1", "hub2", "rtt ms", "port mapping"):
        assert word in text
    stage.homes["a"].router.ip("link set wan down")
    checked = stage.a.run([sys.executable, "-m", "p2pvpn.cli.main", "netcheck", "--json"], check=False)
    assert json.loads(checked.stdout)["families"][0]["udp"] == "blocked"
    assert checked.returncode in (0, Fault.UNREACHABLE)  # the tunnels are not known to be dead yet
