"""`p2pvpn why PEER` shows what the daemon answers on one screen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from p2pvpn.core.errors import Fault, LocalError

from .beside import beside

NAT = {"mapping": "endpoint-dependent", "filtering": "unknown", "allocation": "random", "lifetime_s": None}
PAIR = {
    "local": "192.168.1.2:4500",
    "remote": "203.0.113.5:4500",
    "kinds": ["host", "reflexive"],
    "state": "failed",
    "selected": False,
    "rtt_ms": None,
    "checks": 12,
    "answers": 0,
    "last_answer_s": None,
    "last_check_in_s": None,
    "seen_as": None,
    "reason": "no answer",
}
ANSWER: dict[str, Any] = {
    "name": "desktop",
    "overlay": "fd00::1",
    "network": "home",
    "state": "connected",
    "path": "relayed",
    "over": "udp",
    "remote": "192.0.2.1:20001",
    "rtt_ms": 62.5,
    "up_s": 12.0,
    "because": "none of 1 direct pairs answers",
    "relay": {"at": "192.0.2.1:20001", "hub": "hub1", "rtt_ms": 31.0, "in_use": True},
    "nat": {"mine": NAT, "theirs": NAT},
    "candidates": {"mine": [], "theirs": [{"kind": "reflexive", "at": "203.0.113.5:4500"}]},
    "pairs": [PAIR],
    "history": [{"at": 1.7e9, "ago_s": 300.0, "what": "connected, relayed at 192.0.2.1:20001: we began"}],
    "advice": ["enable UPnP or PCP on either router"],
}


def told(root: Path, answer: dict[str, Any] | LocalError | None, *arguments: str) -> tuple[int, str, str]:
    """Beside a daemon that answers so, or beside none; the code and what was printed."""
    return beside(root, ("why", {"peer": "desktop"}), answer, "why", "desktop", *arguments)


def test_one_screen_says_path_reason_pairs_and_remedy(tmp_path: Path) -> None:
    code, out, err = told(tmp_path, ANSWER)
    assert (code, err) == (0, "")
    for words in (
        "relayed at 192.0.2.1:20001, 62.5 ms there and back, because none of 1 direct pairs answers",
        "of hub1, in use",
        "maps endpoint-dependent",
        "to do: enable UPnP",
        "203.0.113.5:4500",
        "0/12",
        "never",
        "5 min",
    ):
        assert words in out, words


def test_a_peer_that_is_not_connected_has_a_screen_too(tmp_path: Path) -> None:
    idle = {**ANSWER, "state": "idle", "path": None, "because": "nobody sent anything", "relay": None, "pairs": []}
    code, out, _ = told(tmp_path, {**idle, "history": [], "advice": [], "candidates": {"mine": [], "theirs": []}})
    assert code == 0
    assert "idle: nobody sent anything" in out


def test_scripts_get_json(tmp_path: Path) -> None:
    code, out, _ = told(tmp_path, ANSWER, "--json")
    assert code == 0
    assert json.loads(out) == ANSWER


def test_an_unknown_peer_and_a_daemon_that_is_down_are_said_plainly(tmp_path: Path) -> None:
    code, _, err = told(tmp_path, LocalError("desktop is not known", hint="look", fault=Fault.UNREACHABLE))
    assert (code, err) == (Fault.UNREACHABLE, "error: desktop is not known\n  look\n")
    code, _, err = told(tmp_path, None)
    assert code == Fault.NOT_RUNNING
    assert "p2pvpn up" in err
