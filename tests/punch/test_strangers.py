"""Our agent against ICE agents that nobody here wrote: aioice's Connection and aiortc's RTCIceTransport."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Coroutine
from ipaddress import ip_network
from pathlib import Path as FilePath
from typing import Any

import aioice
import aioice.ice
import pytest
from aioice.candidate import Candidate as SdpCandidate

from p2pvpn.core.address import Endpoint
from p2pvpn.lab.namespace import is_inside
from p2pvpn.lab.nat import NatKind, ruleset
from p2pvpn.lab.net import Home, Lab, Node
from p2pvpn.punch.candidates import Candidate
from p2pvpn.punch.events import PathLost, PathNominated

from .driver import Driver, from_sdp, to_sdp

pytestmark = pytest.mark.stranger
MINE = ("ourufrag", "ourpassword0123456789abc")
LOOPBACK = [ip_network("127.0.0.0/8")]


def run(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 20))


@pytest.fixture(autouse=True)
def _gather_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """aioice leaves loopback out when it gathers; nothing else of it is touched."""
    if is_inside():  # Beside tests that need a laboratory this one runs in it, where loopback is down at first.
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    monkeypatch.setattr(aioice.ice, "get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])


async def our_side(*hosts: str) -> tuple[Driver, list[Candidate]]:
    driver = Driver()
    driver.limits.update_subnets(LOOPBACK)
    return driver, [Candidate.host(await driver.bind(host)) for host in hosts]


async def aioice_side(controlling: bool, candidates: list[Candidate]) -> aioice.Connection:
    connection = aioice.Connection(ice_controlling=controlling)
    await connection.gather_candidates()
    for candidate in candidates:
        await connection.add_remote_candidate(SdpCandidate.from_sdp(to_sdp(candidate)))
    await connection.add_remote_candidate(None)
    connection.remote_username, connection.remote_password = MINE
    return connection


def theirs(connection: aioice.Connection) -> list[Candidate]:
    found = [from_sdp(candidate.to_sdp()) for candidate in connection.local_candidates]
    return [candidate for candidate in found if candidate is not None]


async def exchange(driver: Driver, connection: aioice.Connection) -> None:
    """Data flows both ways over what both sides chose."""
    assert driver.agent is not None
    assert driver.agent.selected is not None
    driver.send(driver.agent.selected, b"ping")
    assert await asyncio.wait_for(connection.recv(), 5) == b"ping"
    await connection.send(b"pong")
    assert await asyncio.wait_for(driver.data.get(), 5) == b"pong"


@pytest.mark.parametrize("lite", [False, True], ids=["aggressive", "regular"])
@pytest.mark.parametrize("we_control", [True, False])
def test_aioice_completes_in_both_roles(we_control: bool, lite: bool) -> None:
    async def story() -> None:
        driver, ours = await our_side("127.0.0.1")
        connection = await aioice_side(not we_control, ours)
        connection.remote_is_lite = lite  # Makes a controlling aioice nominate as RFC 8445 does.
        agent = driver.make_agent(we_control, MINE, (connection.local_username, connection.local_password))
        loop = asyncio.get_running_loop()
        driver.take(agent.start(ours, theirs(connection), loop.time()))
        await connection.connect()
        await driver.until(lambda: agent.selected is not None)
        await exchange(driver, connection)
        assert agent.controlling is we_control
        await connection.close()
        await driver.close()

    run(story())


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("we_yield", [True, False])
def test_a_role_conflict_with_aioice_is_settled(both: bool, we_yield: bool) -> None:
    async def story() -> None:
        driver, ours = await our_side("127.0.0.1")
        connection = await aioice_side(both, ours)
        tie_breaker = (0 if we_yield else 2**64 - 1) if both else (2**64 - 1 if we_yield else 0)
        agent = driver.make_agent(both, MINE, (connection.local_username, connection.local_password), tie_breaker)
        driver.take(agent.start(ours, theirs(connection), asyncio.get_running_loop().time()))
        await connection.connect()
        await driver.until(lambda: agent.selected is not None)
        await exchange(driver, connection)
        assert agent.controlling is (both != we_yield)
        assert connection.ice_controlling is not agent.controlling
        await connection.close()
        await driver.close()

    run(story())


@pytest.mark.parametrize("we_control", [True, False])
def test_aioice_that_starts_first_finds_us_by_our_early_answers(we_control: bool) -> None:
    async def story() -> None:
        driver, ours = await our_side("127.0.0.1")
        connection = await aioice_side(not we_control, ours)
        agent = driver.make_agent(we_control, MINE, (connection.local_username, connection.local_password))
        connecting = asyncio.create_task(connection.connect())
        await asyncio.sleep(0.2)
        driver.take(agent.start(ours, [], asyncio.get_running_loop().time()))  # It is peer-reflexive for us.
        await connecting
        await driver.until(lambda: agent.selected is not None)
        await exchange(driver, connection)
        await connection.close()
        await driver.close()

    run(story())


def test_a_later_switch_of_path_is_harmless_for_aioice() -> None:
    async def story() -> None:
        driver, ours = await our_side("127.0.0.1")
        connection = await aioice_side(False, ours)
        agent = driver.make_agent(True, MINE, (connection.local_username, connection.local_password))
        driver.delay_s[ours[0].endpoint] = 0.03
        loop = asyncio.get_running_loop()
        driver.take(agent.start(ours, theirs(connection), loop.time()))
        await connection.connect()
        await driver.until(lambda: agent.selected is not None)
        await exchange(driver, connection)
        better = Candidate.host(await driver.bind("127.0.0.2"))
        driver.take(agent.update_local([*ours, better], loop.time()))
        await driver.until(lambda: agent.selected is not None and agent.selected.local == better.endpoint, 12)
        await exchange(driver, connection)
        assert not [event for event in driver.events if isinstance(event, PathLost)]
        assert len([event for event in driver.events if isinstance(event, PathNominated)]) == 2
        await connection.close()
        await driver.close()

    run(story())


@pytest.mark.slow
@pytest.mark.parametrize("we_control", [True, False])
def test_consent_is_kept_up_with_aioice_on_both_sides(we_control: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aioice.ice, "CONSENT_INTERVAL", 0.5)
    monkeypatch.setattr(aioice.ice, "CONSENT_FAILURES", 2)

    async def story() -> None:
        driver, ours = await our_side("127.0.0.1")
        connection = await aioice_side(not we_control, ours)
        agent = driver.make_agent(we_control, MINE, (connection.local_username, connection.local_password))
        driver.take(agent.start(ours, theirs(connection), asyncio.get_running_loop().time()))
        await connection.connect()
        await asyncio.sleep(8)
        await exchange(driver, connection)
        (row,) = [row for row in agent.report() if row.selected]
        assert row.answers >= 2
        await connection.close()
        await driver.until(lambda: any(isinstance(event, PathLost) for event in driver.events), 9)
        await driver.close()

    run(story())


@pytest.mark.parametrize("we_control", [True, False])
def test_aiortc_completes_in_both_roles(we_control: bool) -> None:
    from aiortc import RTCIceGatherer, RTCIceParameters, RTCIceTransport
    from aiortc.rtcicetransport import candidate_from_aioice, candidate_to_aioice

    async def story() -> None:
        driver, ours = await our_side("127.0.0.1")
        gatherer = RTCIceGatherer([])
        transport = RTCIceTransport(gatherer)
        transport._connection.ice_controlling = not we_control
        await gatherer.gather()
        mine = gatherer.getLocalParameters()
        assert len(mine.usernameFragment) == 4
        remote = [from_sdp(candidate_to_aioice(c).to_sdp()) for c in gatherer.getLocalCandidates()]
        agent = driver.make_agent(we_control, MINE, (mine.usernameFragment, mine.password))
        for candidate in ours:
            await transport.addRemoteCandidate(candidate_from_aioice(SdpCandidate.from_sdp(to_sdp(candidate))))
        await transport.addRemoteCandidate(None)
        driver.take(agent.start(ours, [c for c in remote if c], asyncio.get_running_loop().time()))
        await transport.start(RTCIceParameters(usernameFragment=MINE[0], password=MINE[1]))
        assert transport.state == "completed"
        await driver.until(lambda: agent.selected is not None)
        driver.send(agent.selected, b"ping")
        assert await asyncio.wait_for(transport._recv(), 5) == b"ping"
        await transport._send(b"pong")
        assert await asyncio.wait_for(driver.data.get(), 5) == b"pong"
        await transport.stop()
        await driver.close()

    run(story())


HUB = "192.0.2.1"
MASQUERADE = """
flush ruleset
table ip home {
    chain out { type nat hook postrouting priority 100; oifname "wan" masquerade; }
    chain in {
        type filter hook input priority 0;
        iifname "wan" ct state established,related accept
        iifname "wan" drop
    }
}
"""
"""A plain Linux router: endpoint-independent in practice, port kept, filtering by address and port."""


def side(node: Node, *arguments: str) -> subprocess.Popen[str]:
    """A side of the session as a process on a host."""
    tests = FilePath(__file__).parent.parent
    argv = ["env", "-C", str(tests), sys.executable, "-m", "punch.driver", *arguments]
    return node.popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def hear(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def meet(lab: Lab, homes: tuple[Home, Home], name: str, we_control: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Let our side at the first home meet another side at the second one; what each says in the end."""
    mirror = side(lab.public("hub", HUB), "reflector", "0.0.0.0", "3478")
    assert hear(mirror)["ready"]
    sides = (
        side(homes[0].peer, "ours", homes[0].inside, f"{HUB}:3478", str(we_control)),
        side(homes[1].peer, name, homes[1].inside, f"{HUB}:3478", str(not we_control)),
    )
    hellos = [hear(process) for process in sides]
    for process, hello in zip(sides, reversed(hellos), strict=True):
        assert process.stdin is not None
        process.stdin.write(json.dumps(hello) + "\n")
        process.stdin.flush()
    ours, other = (hear(process) for process in sides)
    for process in (*sides, mirror):
        process.communicate(timeout=20)
        assert process.returncode == 0
    return ours, other


def behind(lab: Lab, *rulesets: str) -> tuple[Home, Home]:
    one, two = lab.home("a", "198.51.100.1", number=1), lab.home("b", "203.0.113.1", number=2)
    for home, script in zip((one, two), rulesets, strict=True):
        home.router.nft(script)
    return one, two


@pytest.mark.netns
@pytest.mark.slow
@pytest.mark.parametrize("we_control", [True, False])
@pytest.mark.parametrize("name", ["aioice", "aiortc", "ours"])
def test_through_two_kernel_nats(lab: Lab, name: str, we_control: bool) -> None:
    ours, other = meet(lab, behind(lab, MASQUERADE, MASQUERADE), name, we_control)
    assert ours["data"] == f"hello from {name}"
    assert other["data"] == "hello from ours"
    assert Endpoint.parse(ours["selected"][1]).host == "203.0.113.1"
    assert ours["seconds"] < 3


@pytest.mark.netns
@pytest.mark.slow
@pytest.mark.parametrize("we_control", [True, False])
@pytest.mark.parametrize("kinds", [(NatKind.SYMMETRIC, NatKind.FULL_CONE), (NatKind.FULL_CONE, NatKind.SYMMETRIC)])
def test_a_symmetric_kernel_nat_and_a_full_cone(lab: Lab, kinds: tuple[NatKind, NatKind], we_control: bool) -> None:
    ours, other = meet(lab, behind(lab, *(ruleset(kind) for kind in kinds)), "aioice", we_control)
    assert ours["data"] == "hello from aioice"
    assert other["data"] == "hello from ours"


@pytest.mark.netns
def test_coturns_client_learns_its_address_from_our_reflector(lab: Lab) -> None:
    home, _ = behind(lab, MASQUERADE, MASQUERADE)
    mirror = side(lab.public("hub", HUB), "reflector", "0.0.0.0", "3478")
    assert hear(mirror)["ready"]
    done = home.peer.run(["turnutils_stunclient", "-p", "3478", HUB], check=False)
    assert "UDP reflexive addr: 198.51.100.1:" in done.stdout + done.stderr
    mirror.communicate(timeout=20)
