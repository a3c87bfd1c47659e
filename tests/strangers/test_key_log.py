"""The key log of a daemon: tshark reads its IKE and its ESP with it, and nobody overlooks that it is on."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from p2pvpn.lab.capture import Capture
from p2pvpn.lab.nat import NatKind
from p2pvpn.lab.net import Lab
from p2pvpn.lab.stage import Stage
from tests.cli.machines import Machine, new_admin, short_directory

from .test_tshark import dissected, flat

pytestmark = [pytest.mark.stranger, pytest.mark.netns, pytest.mark.timeout(120)]

HUB = "192.0.2.1"
NATS = dict.fromkeys("ab", NatKind.PORT_RESTRICTED)


def test_tshark_decrypts_what_a_daemon_said_with_its_key_log(lab: Lab, tmp_path: Path) -> None:
    with short_directory() as root:
        stage = Stage(lab, root, hubs=1, nats=NATS, rtt_ms=0, plane="user")
        admin, secret = new_admin(root / "admin")
        hub = Machine(root / "hub1", stage.hubs[0], {"P2PVPN_KEYLOG": ""})
        keys = tmp_path / "wireshark"
        keys.mkdir()
        a = Machine(root / "a", stage.a, {"P2PVPN_KEYLOG": str(keys)})
        hub.ok(
            "join", admin.ok("grant", hub.ok("request").word, "--name", "hub1", "--hub", HUB, "--issuer", *secret).word
        )
        token = hub.ok("invite", "a", "--no-qr").word
        (hop,) = [one for one in lab.hops if "hub1" in one.label]
        capture = Capture([hop], tmp_path)
        try:
            a.ok("join", token)
            overlay = hub.ok("status", "--json").json["networks"][0]["overlay"]
            deadline = time.monotonic() + 30
            while not stage.a.ping(overlay, wait_s=1.0):
                assert time.monotonic() < deadline, a.log()
            assert a.ok("status", "--json").json["key_log"] == str(keys)
            assert f"KEYS ARE LOGGED to {keys}" in a.ok("status").out
            assert f"KEYS ARE LOGGED to {keys}" in a.log()
            assert hub.ok("status", "--json").json["key_log"] is None
            assert "KEYS" not in hub.ok("status").out + hub.log()
        finally:
            capture.stop()
            hub.kill()
            a.kill()
    assert all(file.stat().st_mode & 0o077 == 0 for file in keys.iterdir())
    (file,) = capture.files.values()
    exchanges, inner = set(), 0
    for frame in dissected(file, tmp_path):
        fields = flat(frame["_source"])
        names = {name for name, _ in fields}
        exchange = dict(fields).get("isakmp.exchangetype")
        # Wireshark has one set of keys for an SA: those of IKE_INTERMEDIATE are comments in the log.
        assert "_ws.malformed" not in names or exchange == "43", [exchange, *sorted(names)]
        if "isakmp.enc.decrypted" in names:
            exchanges.add(exchange)
        inner += "esp" in names and "icmpv6" in names
    assert "35" in exchanges, "IKE_AUTH is readable"
    assert inner >= 2, "the pings are readable"
