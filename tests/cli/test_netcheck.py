"""`p2pvpn netcheck` shows what the daemon answers, in words, and ends with a code that scripts can use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from p2pvpn.core.errors import Fault, LocalError
from p2pvpn.punch import explain
from p2pvpn.punch.behaviour import Allocation, Filtering, Mapping

from .beside import beside

BEHIND_A_NAT: dict[str, Any] = {
    "family": "IPv4",
    "addresses": ["192.168.1.2"],
    "udp": "open",
    "seen": [{"hub": "hub1", "at": "192.0.2.1:4500", "as": "203.0.113.5:31007", "rtt_ms": 12.5}],
    "mapping": Mapping.ADDRESS_AND_PORT_DEPENDENT.value,
    "filtering": Filtering.ADDRESS_AND_PORT_DEPENDENT.value,
    "allocation": Allocation.SEQUENTIAL.value,
    "step": 1,
    "hairpin": None,
    "lifetime_s": 112.5,
    "refresh_s": 101.2,
    "means": {
        "mapping": explain.MAPPING[Mapping.ADDRESS_AND_PORT_DEPENDENT],
        "filtering": explain.FILTERING[Filtering.ADDRESS_AND_PORT_DEPENDENT],
        "allocation": explain.ALLOCATION[Allocation.SEQUENTIAL],
        "hairpin": explain.HAIRPIN[None],
        "lifetime": explain.lifetime(112.5, 101.2),
    },
    "summary": "direct with some",
}
NO_IPV6: dict[str, Any] = {
    "family": "IPv6",
    "addresses": [],
    "udp": None,
    "seen": [],
    "summary": "this machine has no IPv6 address",
}
ANSWER: dict[str, Any] = {
    "port": 4500,
    "families": [BEHIND_A_NAT, NO_IPV6],
    "hubs": [
        {"network": "home", "name": "hub1", "attached": True, "via": "UDP", "rtt_ms": 12.5},
        {"network": "home", "name": "hub2", "attached": False, "via": None, "rtt_ms": None},
    ],
    "port_mapping": {
        "enabled": True,
        "declared": [],
        "routers": [
            {
                "gateway": "192.168.1.1",
                "protocol": "PCP",
                "external": "203.0.113.5:4500",
                "told": True,
                "published": True,
                "reason": "",
            }
        ],
    },
}


def netcheck(root: Path, answer: dict[str, Any] | LocalError, *arguments: str) -> tuple[int, str, str]:
    """Beside a daemon that answers so; the code and what was printed."""
    return beside(root, ("netcheck", {}), answer, "netcheck", *arguments)


def test_it_says_what_was_found_and_what_that_means(tmp_path: Path) -> None:
    code, out, err = netcheck(tmp_path, ANSWER)
    assert (code, err) == (0, "")
    for words in (
        "IPv4: direct with some",
        "a hard NAT",
        "they can be guessed",
        "112 s",
        "a packet every 101 s",
        "203.0.113.5:31007",
        "12.5",
        "IPv6: this machine has no IPv6 address",
        "router 192.168.1.1 maps 203.0.113.5:4500 by PCP",
        "not attached",
        "no answer by UDP",
    ):
        assert words in out, words


def test_scripts_get_json(tmp_path: Path) -> None:
    code, out, _ = netcheck(tmp_path, ANSWER, "--json")
    assert code == 0
    assert json.loads(out) == ANSWER


def test_no_hub_by_any_way_is_unreachable_and_a_refusal_is_said(tmp_path: Path) -> None:
    blocked = {**NO_IPV6, "family": "IPv4", "udp": "blocked", "summary": explain.NO_ANSWER}
    alone = {**ANSWER, "families": [blocked, NO_IPV6], "hubs": [{**ANSWER["hubs"][1]}]}
    code, out, _ = netcheck(tmp_path, alone)
    assert code == Fault.UNREACHABLE
    assert explain.NO_ANSWER in out
    code, _, err = netcheck(tmp_path, LocalError("in no network", hint="join one", fault=Fault.REFUSED))
    assert code == Fault.REFUSED
    assert err == "error: in no network\n  join one\n"


@pytest.mark.parametrize(
    "routers",
    [[], [{"gateway": "192.168.1.1", "protocol": None, "external": None, "told": False, "reason": "says no"}]],
)
def test_without_a_mapped_port_it_says_why(tmp_path: Path, routers: list[dict[str, Any]]) -> None:
    mapping = {"enabled": True, "declared": [], "routers": routers}
    _, out, _ = netcheck(tmp_path, {**ANSWER, "port_mapping": mapping})
    assert ("says no" if routers else "no router answered") in out
