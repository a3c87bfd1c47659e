"""Real sockets around a punching agent, and the sides of an ICE session as processes that talk JSON lines.

`python -m punch.driver SIDE` in the directory of the tests, where SIDE is

    reflector HOST PORT                 our STUN server
    ours HOST HUB CONTROLLING           our agent and probe
    aioice HOST HUB CONTROLLING         aioice's Connection
    aiortc HOST HUB CONTROLLING         aiortc's RTCIceTransport

A side prints its credentials and candidates (SDP), reads the peer's, connects, sends a datagram, prints what it got and
over which path, and ends when its input does. HUB is `host:port` of a STUN server or `-`.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from aioice.candidate import Candidate as SdpCandidate

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.output import Event, Output, Transmit
from p2pvpn.core.secret import Secret
from p2pvpn.punch.agent import PunchAgent
from p2pvpn.punch.candidates import Candidate, CandidateKind, priority
from p2pvpn.punch.credentials import IceCredentials
from p2pvpn.punch.events import PathNominated
from p2pvpn.punch.limits import PunchLimits
from p2pvpn.punch.mux import PunchMux
from p2pvpn.punch.reflector import Reflector
from p2pvpn.punch.reflexive import ReflexiveProbe
from p2pvpn.punch.settings import PunchSettings

SDP_KINDS = {
    "host": CandidateKind.HOST,
    "srflx": CandidateKind.REFLEXIVE,
    "prflx": CandidateKind.PEER_REFLEXIVE,
}


class Port(asyncio.DatagramProtocol):
    """One bound socket of a driver."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.local = Endpoint.of(*transport.get_extra_info("sockname")[:2])

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        self.driver.received_on(Path(self.local, Endpoint.of(*addr[:2])), data)


class Driver:
    """Runs one agent over sockets bound to local addresses: the thinnest thing that an engine could be."""

    def __init__(self) -> None:
        self.mux = PunchMux()
        self.limits = PunchLimits()
        self.agent: PunchAgent | None = None
        self.probe: ReflexiveProbe | None = None
        self.ports: dict[Endpoint, Port] = {}
        self.events: list[Event] = []
        self.happened = asyncio.Event()
        self.data: asyncio.Queue[bytes] = asyncio.Queue()
        self.delay_s: dict[Endpoint, float] = {}
        self._loop = asyncio.get_running_loop()
        self._alarm: asyncio.TimerHandle | None = None

    async def bind(self, host: str, port: int = 0) -> Endpoint:
        _, protocol = await self._loop.create_datagram_endpoint(lambda: Port(self), local_addr=(host, port))
        self.ports[protocol.local] = protocol
        return protocol.local

    def make_agent(
        self, controlling: bool, local: tuple[str, str], remote: tuple[str, str], tie_breaker: int | None = None
    ) -> PunchAgent:
        self.agent = PunchAgent(
            controlling=controlling,
            credentials=IceCredentials(local[0], Secret(local[1].encode()), remote[0], Secret(remote[1].encode())),
            tie_breaker=int.from_bytes(os.urandom(8), "big") if tie_breaker is None else tie_breaker,
            entropy=os.urandom,
            limits=self.limits,
            settings=PunchSettings(),
        )
        self.mux.register(self.agent)
        return self.agent

    def received_on(self, path: Path, data: bytes) -> None:
        now = self._loop.time()
        outputs = self.mux.route(path, data, now)
        if outputs is None and self.probe is not None:
            outputs = self.probe.handle(path, data, now)
        if outputs is None:
            self.data.put_nowait(data)
        else:
            self.take(outputs)

    def take(self, outputs: list[Output]) -> None:
        for output in outputs:
            if isinstance(output, Transmit):
                self.send(output.path, output.data)
            elif isinstance(output, Event):
                self.events.append(output)
                self.happened.set()
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        machines = [machine for machine in (self.agent, self.probe) if machine is not None]
        deadlines = [at for machine in machines if (at := machine.next_deadline()) is not None]
        if deadlines:
            self._alarm = self._loop.call_at(min(deadlines), self._tick)

    def _tick(self) -> None:
        now = self._loop.time()
        outputs: list[Output] = []
        for machine in (self.agent, self.probe):
            if machine is not None:
                outputs += machine.tick(now)
        self.take(outputs)

    def send(self, path: Path, data: bytes) -> None:
        port = self.ports.get(path.local)
        if path.local.is_unspecified:
            port = next((p for at, p in self.ports.items() if at.is_ipv6 == path.remote.is_ipv6), None)
        if port is None:
            return
        delay = self.delay_s.get(port.local, 0.0)
        if delay:
            self._loop.call_later(delay, port.transport.sendto, data, tuple(path.remote))
        else:
            port.transport.sendto(data, tuple(path.remote))

    async def until(self, done: Any, timeout_s: float = 10.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not done():
                self.happened.clear()
                await self.happened.wait()

    async def close(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        if self.agent is not None:
            self.agent.close()
        for port in self.ports.values():
            port.transport.close()
        await asyncio.sleep(0)


def from_sdp(text: str) -> Candidate | None:
    """A stranger's candidate as one of ours; None for kinds that we have not (relay, TCP)."""
    sdp = SdpCandidate.from_sdp(text)
    kind = SDP_KINDS.get(sdp.type)
    if kind is None or sdp.transport.lower() != "udp":
        return None
    return Candidate.remote(kind, Endpoint.of(sdp.host, sdp.port))


def to_sdp(candidate: Candidate) -> str:
    kind = {kind: name for name, kind in SDP_KINDS.items()}[candidate.kind]
    related = f" raddr {candidate.base.host} rport {candidate.base.port}" if kind != "host" else ""
    host, port = candidate.endpoint
    return f"{kind}{abs(hash(candidate.base)) % 1000} 1 udp {priority(candidate)} {host} {port} typ {kind}{related}"


async def read_line() -> dict[str, Any]:
    line = await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    if not line:
        raise EOFError
    return json.loads(line)  # type: ignore[no-any-return]


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


class Mirror(asyncio.DatagramProtocol):
    """Our reflector on a socket."""

    def __init__(self) -> None:
        self.reflector = Reflector()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.local = Endpoint.of(*transport.get_extra_info("sockname")[:2])

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        path = Path(self.local, Endpoint.of(*addr[:2]))
        answer = self.reflector.handle(path, data, asyncio.get_running_loop().time())
        if answer is not None:
            self.transport.sendto(answer, addr)


async def run_reflector(host: str, port: str) -> None:
    loop = asyncio.get_running_loop()
    await loop.create_datagram_endpoint(Mirror, local_addr=(host, int(port)))
    say(ready=True)
    await loop.run_in_executor(None, sys.stdin.read)


async def run_ours(host: str, hub: str, controlling: bool) -> None:
    driver = Driver()
    local = await driver.bind(host)
    candidates = [Candidate.host(local)]
    if hub != "-":
        driver.probe = ReflexiveProbe(local.port, os.urandom)
        driver.take(driver.probe.update([Endpoint.parse(hub)], asyncio.get_running_loop().time()))
        await driver.until(lambda: driver.probe is not None and driver.probe.seen_by())
        candidates += driver.probe.candidates()
    mine = ("ourufrag", "ourpassword0123456789abc")
    say(ufrag=mine[0], password=mine[1], candidates=[to_sdp(candidate) for candidate in candidates])
    peer = await read_line()
    agent = driver.make_agent(controlling, mine, (peer["ufrag"], peer["password"]))
    remote = [candidate for text in peer["candidates"] if (candidate := from_sdp(text))]
    loop = asyncio.get_running_loop()
    began = loop.time()
    driver.take(agent.start(candidates, remote, began))
    await driver.until(lambda: any(isinstance(event, PathNominated) for event in driver.events))
    took = loop.time() - began
    assert agent.selected is not None
    driver.send(agent.selected, b"hello from ours")
    data = await asyncio.wait_for(driver.data.get(), 10)
    say(seconds=took, selected=[str(agent.selected.local), str(agent.selected.remote)], data=data.decode())
    await loop.run_in_executor(None, sys.stdin.read)
    await driver.close()


async def run_aioice(host: str, hub: str, controlling: bool) -> None:
    import aioice

    at = Endpoint.parse(hub) if hub != "-" else None
    connection = aioice.Connection(ice_controlling=controlling, stun_server=tuple(at) if at else None, use_ipv6=False)
    await connection.gather_candidates()
    say(
        ufrag=connection.local_username,
        password=connection.local_password,
        candidates=[candidate.to_sdp() for candidate in connection.local_candidates],
    )
    peer = await read_line()
    for text in peer["candidates"]:
        await connection.add_remote_candidate(SdpCandidate.from_sdp(text))
    await connection.add_remote_candidate(None)
    connection.remote_username, connection.remote_password = peer["ufrag"], peer["password"]
    began = asyncio.get_running_loop().time()
    await asyncio.wait_for(connection.connect(), 20)
    took = asyncio.get_running_loop().time() - began
    await connection.send(b"hello from aioice")
    data = await asyncio.wait_for(connection.recv(), 10)
    say(seconds=took, data=data.decode())
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await connection.close()


async def run_aiortc(host: str, hub: str, controlling: bool) -> None:
    from aiortc import RTCIceGatherer, RTCIceParameters, RTCIceServer, RTCIceTransport
    from aiortc.rtcicetransport import candidate_from_aioice, candidate_to_aioice

    gatherer = RTCIceGatherer([RTCIceServer(f"stun:{hub}")] if hub != "-" else [])
    transport = RTCIceTransport(gatherer)
    transport._connection.ice_controlling = controlling
    await gatherer.gather()
    mine = gatherer.getLocalParameters()
    found = [candidate_to_aioice(candidate) for candidate in gatherer.getLocalCandidates()]
    for candidate in found:
        candidate.component, candidate.transport = 1, "udp"
    say(ufrag=mine.usernameFragment, password=mine.password, candidates=[candidate.to_sdp() for candidate in found])
    peer = await read_line()
    for text in peer["candidates"]:
        await transport.addRemoteCandidate(candidate_from_aioice(SdpCandidate.from_sdp(text)))
    await transport.addRemoteCandidate(None)
    began = asyncio.get_running_loop().time()
    parameters = RTCIceParameters(usernameFragment=peer["ufrag"], password=peer["password"])
    await asyncio.wait_for(transport.start(parameters), 20)
    assert transport.state == "completed"
    took = asyncio.get_running_loop().time() - began
    await transport._send(b"hello from aiortc")
    data = await asyncio.wait_for(transport._recv(), 10)
    say(seconds=took, data=data.decode())
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await transport.stop()


SIDES = {"ours": run_ours, "aioice": run_aioice, "aiortc": run_aiortc}

if __name__ == "__main__":
    name, *rest = sys.argv[1:]
    if name == "reflector":
        asyncio.run(run_reflector(*rest))
    else:
        asyncio.run(SIDES[name](rest[0], rest[1], rest[2] == "True"))
