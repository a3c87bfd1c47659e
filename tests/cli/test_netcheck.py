"""`p2pvpn netcheck` shows what the daemon answers, in words, and ends with a code that scripts can use."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

import p2pvpn
from p2pvpn.core.errors import Fault, LocalError
from p2pvpn.host.control import ControlServer
from p2pvpn.punch import explain
from p2pvpn.punch.behaviour import Allocation, Filtering, Mapping

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
    """Run the command beside a daemon that answers so; its code and what it printed."""

    async def handle(method: str, params: dict[str, Any]) -> object:
        if method == "version":
            return p2pvpn.__version__
        assert method == "netcheck"
        if isinstance(answer, LocalError):
            raise answer
        return answer

    async def run() -> tuple[int, str, str]:
        server = ControlServer(root / "control.sock", handle)
        await server.start()
        command = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "p2pvpn.cli.main", "netcheck", *arguments),
            env={**os.environ, "P2PVPN_RUNTIME_DIR": str(root), "COLUMNS": "120"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await command.communicate()
        await server.close()
        return command.returncode or 0, out.decode(), err.decode()

    return asyncio.run(run())


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
