"""A network without UDP, and a captive portal in it, with the very daemons: what users see, and how it ends."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from p2pvpn.lab import nat
from p2pvpn.lab.nat import NatKind
from p2pvpn.lab.net import Home, Lab, Node, running
from p2pvpn.lab.stage import Stage
from p2pvpn.lab.switching import connect

PORTAL = "http://portal.example/login"
PORTAL_SERVER = f"""
import http.server, threading
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(302)
        self.send_header("Location", "{PORTAL}")
        self.end_headers()
    def log_message(self, *words):
        pass
servers = [http.server.ThreadingHTTPServer(("", port), Page) for port in (8080, 8443)]
print("up", flush=True)
for server in servers[1:]:
    threading.Thread(target=server.serve_forever, daemon=True).start()
servers[0].serve_forever()
"""
"""Answers HTTP on the router, even where a client expects TLS."""
INTERCEPT = """
table ip portal {
  chain prerouting {
    type nat hook prerouting priority -110;
    iifname "lan" tcp dport 80 redirect to :8080
    iifname "lan" tcp dport 443 redirect to :8443
  }
}
"""


def over(stage: Stage, node: Node) -> set[str]:
    [network] = stage.ask(node, "status")["networks"]
    return {str(hub["over"]) for hub in network["hubs"] if hub["state"] == "connected"}


def warnings(stage: Stage, node: Node) -> list[dict[str, str]]:
    [network] = stage.ask(node, "status")["networks"]
    return list(network["warnings"])


def put_behind_portal(home: Home) -> None:
    nat.apply(home, NatKind.UDP_BLOCKED)
    home.router.nft(INTERCEPT)
    home.router.run(["conntrack", "-F"])


@pytest.mark.netns
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_udp_is_blocked_then_a_portal_asks_then_all_is_well(lab: Lab, tmp_path: Path) -> None:
    nats = {"a": NatKind.UDP_BLOCKED, "b": NatKind.PORT_RESTRICTED}
    stage = Stage(lab, tmp_path, hubs=1, nats=nats, rtt_ms=10, plane="user")
    overlay = connect(lab, stage, "relayed")
    assert over(stage, stage.a) == {"tcp"}
    assert (stage.over(stage.a, "b"), stage.over(stage.b, "a")) == ("tcp", "udp")
    assert len(stage.a.ping(overlay["b"], count=20, interval_s=0.05)) == 20
    stage.a.environment["COLUMNS"] = "160"
    assert "relayed over TCP" in stage.cli(stage.a, "peers")

    home = stage.homes["a"]
    with running(home.router.popen([sys.executable, "-c", PORTAL_SERVER], stdout=-1)) as portal:
        assert portal.stdout is not None
        assert portal.stdout.readline() == "up\n"
        stage.cli(stage.a, "down")
        put_behind_portal(home)
        stage.cli(stage.a, "up")
        stage.wait("a warning", lambda: bool(warnings(stage, stage.a)), 20.0, lambda: "none", stage.a)
        [warning] = warnings(stage, stage.a)
        assert PORTAL in warning["message"]
        assert "log in" in warning["hint"]
        assert PORTAL in stage.cli(stage.a, "status")

    nat.apply(home, NatKind.PORT_RESTRICTED)  # somebody logged in
    stage.wait("the hub over UDP", lambda: over(stage, stage.a) == {"udp"}, 60.0, lambda: "not", stage.a)
    assert warnings(stage, stage.a) == []
    stage.wait("an answer", lambda: bool(stage.a.ping(overlay["b"])), 20.0, lambda: "none", stage.a, stage.b)
