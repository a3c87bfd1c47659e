"""What the command line may ask of the daemon, by name."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from ipaddress import IPv6Address
from typing import TYPE_CHECKING, Any

import p2pvpn
from p2pvpn.core.errors import Fault, LocalError
from p2pvpn.mesh.connect import ConnectError
from p2pvpn.mesh.network import Network
from p2pvpn.mesh.status import network_status, peer_status
from p2pvpn.mesh.why import why

from .echo import Echo
from .service import NetworkService, Problem

if TYPE_CHECKING:
    from .daemon import Daemon

MAX_PING_S = 60.0


class Requests:
    """The methods of the control socket."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._echo = Echo()
        self._methods: dict[str, Callable[..., Awaitable[object]]] = {
            "version": self.version,
            "status": self.status,
            "resolve": self.resolve,
            "ping": self.ping,
            "netcheck": self.netcheck,
            "why": self.why,
            "forget": self.forget,
            "invite": self.invite,
            "reload": self.reload,
        }

    async def handle(self, method: str, params: dict[str, Any]) -> object:
        """Run a method. Raises LocalError for a name or parameters that do not fit."""
        handler = self._methods.get(method)
        if handler is None:
            raise LocalError(
                f"the daemon has no method {method!r}", hint="is it older than this command? p2pvpn restart"
            )
        try:
            work = handler(**params)
        except TypeError as problem:
            raise LocalError(f"bad parameters for {method}: {problem}", hint="p2pvpn restart") from None
        return await work

    async def version(self) -> str:
        """Asked first by every command, so it stays as it is in all versions."""
        return p2pvpn.__version__

    async def status(self) -> dict[str, object]:
        daemon = self._daemon
        return {
            "version": p2pvpn.__version__,
            "port": daemon.underlay.port,
            "plane": daemon.plane_choice.plane,
            "plane_reason": daemon.plane_choice.reason,
            "up_s": round(daemon.up_s, 1),
            "port_mapping": daemon.node.outside.status(),
            "key_log": str(daemon.key_log.directory) if daemon.key_log is not None else None,
            "ike": daemon.node.ike_counters(),
            "networks": [network_status(network) for network in self._networks()],
            "problems": [*(problem.as_dict() for problem in daemon.problems), *self._clock_problems()],
        }

    async def resolve(self, peer: str) -> dict[str, object]:
        """The overlay address of a name, or of any address of a peer."""
        network, overlay = await self._find(peer)
        return {"name": network.name_of(overlay), "overlay": str(overlay), "network": network.standing.name}

    async def ping(self, overlay: str, number: int = 1, timeout_s: float = 10.0) -> dict[str, object]:
        """One echo through the tunnel; the path is the one in use when the answer came."""
        address = self._address(overlay)
        network = self._network_of(address)
        rtt_s = await self._echo.ping(address, network.me.overlay, number, min(float(timeout_s), MAX_PING_S))
        session = network.sessions.get(address)
        status = peer_status(session) if session is not None else {}
        return {
            "number": number,
            "rtt_ms": round(rtt_s * 1000, 3) if rtt_s is not None else None,
            "path": status.get("path"),
            "remote": status.get("remote"),
            "note": session.last_failure if session is not None and rtt_s is None else "",
        }

    async def netcheck(self) -> dict[str, object]:
        """What the network here does to us; takes seconds."""
        if not self._networks():
            raise LocalError(
                "this machine is in no network", hint="join one with: p2pvpn join TOKEN", fault=Fault.REFUSED
            )
        return await self._daemon.node.net_check.run()

    async def why(self, peer: str) -> dict[str, object]:
        """How a peer is reached, why so, what was tried."""
        network, overlay = await self._find(peer)
        return why(network, overlay)

    async def forget(self, peer: str) -> dict[str, object]:
        network, overlay = await self._find(peer)
        name = network.name_of(overlay)
        network.forget(overlay)
        return {"name": name, "overlay": str(overlay)}

    async def invite(self, name: str, network: str | None = None, valid_s: float = 86400) -> dict[str, object]:
        service = self._service(network)
        token = service.invite(name, float(valid_s))
        return {"token": token.encode(), "name": name, "network": service.profile.name, "expires": token.expires}

    async def reload(self) -> dict[str, object]:
        """Look at the memberships on disk again; what is in the way of any of them."""
        await self._daemon.reload()
        return {"problems": [problem.as_dict() for problem in self._daemon.problems]}

    def _clock_problems(self) -> list[dict[str, object]]:
        """Networks in which our own certificate does not hold by this machine's clock."""
        found = []
        for network in self._networks():
            me, now = network.me, time.time()
            if not me.not_before <= now <= me.not_after:
                told = "has expired" if now > me.not_after else "is not valid yet"
                clock = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
                problem = LocalError(
                    f"this machine's certificate {told}; its clock says {clock}",
                    hint="set the clock if it is wrong; else join again with a new token, or a new grant",
                    fault=Fault.REFUSED,
                )
                found.append(Problem(network.standing.name, problem).as_dict())
        return found

    def _networks(self) -> list[Network]:
        return [service.network for service in self._daemon.services if service.network is not None]

    def _service(self, name: str | None) -> NetworkService:
        services = self._daemon.services
        found = [s for s in services if name in (None, s.profile.name)]
        if name is None and len(found) > 1:
            found = [s for s in found if s.issuer is not None]
        if len(found) == 1:
            return found[0]
        if not services:
            raise LocalError(
                "this machine is in no network", hint="join one with: p2pvpn join TOKEN", fault=Fault.REFUSED
            )
        names = ", ".join(s.profile.name for s in services)
        if name is not None and not found:
            raise LocalError(f"no network {name!r} is up", hint=f"there are: {names}", fault=Fault.REFUSED)
        raise LocalError("which network?", hint=f"say it with --network: {names}", fault=Fault.REFUSED)

    @staticmethod
    def _address(text: str) -> IPv6Address:
        try:
            return IPv6Address(text)
        except ValueError:
            raise LocalError(f"{text!r} is not an overlay address", fault=Fault.REFUSED) from None

    def _network_of(self, overlay: IPv6Address) -> Network:
        for network in self._networks():
            if overlay in network.standing.overlay_network:
                return network
        raise LocalError(f"{overlay} is in none of this machine's networks", hint="p2pvpn status shows them")

    async def _find(self, peer: str) -> tuple[Network, IPv6Address]:
        networks = self._networks()
        if not networks:
            raise LocalError(
                "this machine is in no network", hint="join one with: p2pvpn join TOKEN", fault=Fault.REFUSED
            )
        answers = await asyncio.gather(*(n.directory.resolve(peer) for n in networks), return_exceptions=True)
        problems = []
        for network, answer in zip(networks, answers, strict=True):
            if isinstance(answer, IPv6Address) and answer in network.standing.overlay_network:
                return network, answer
            if isinstance(answer, ConnectError):
                problems.append(str(answer))
            elif isinstance(answer, BaseException):
                raise answer
        raise LocalError(
            f"{peer} is not known: {'; '.join(problems) or 'not in these networks'}",
            hint="p2pvpn status shows which hubs are attached",
            fault=Fault.UNREACHABLE,
        )
