"""`p2pvpn netcheck`: asks every hub from fresh sockets, of each address family, what the network here lets through.

Fresh sockets, because the one in use has bindings from before: they would speak for a NAT that is another one now. How
long bindings live takes minutes to find out; that is what `natwatch` has learned so far.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from p2pvpn.core.address import Endpoint
from p2pvpn.core.errors import P2pvpnError
from p2pvpn.punch import explain
from p2pvpn.punch.allocation import Sample, judge
from p2pvpn.punch.behaviour import Allocation, Mapping, NatBehaviour
from p2pvpn.punch.mapping import Heard, judge_mapping
from p2pvpn.punch.reflexive import STUN_PORTS

from .natwatch import NatWatch
from .network import Network
from .outside import Outside
from .probing import ProbeSocket, Seen
from .services import Services

MAX_ASKED = 16
"""Hubs asked per family."""
SAMPLED_HUBS = 2
"""Hubs whose other ports are asked where that tells more."""


@dataclass(frozen=True, slots=True)
class _Target:
    """A hub of a network document and where it may answer."""

    network: str
    name: str
    attached: bool
    via: str | None
    endpoints: tuple[Endpoint, ...]

    def at(self, ipv6: bool) -> Endpoint | None:
        return next((endpoint for endpoint in self.endpoints if endpoint.is_ipv6 == ipv6), None)


class NetCheck:
    """One machine's check."""

    def __init__(
        self,
        services: Services,
        watch: NatWatch,
        outside: Outside,
        networks: Callable[[], Iterable[Network]],
        refresh: Callable[[], None],
    ) -> None:
        """`refresh` asks the hubs, from the shared socket, where they see us now."""
        self._services = services
        self._watch = watch
        self._outside = outside
        self._networks = networks
        self._refresh = refresh

    async def run(self) -> dict[str, object]:
        """Plain values; takes two to five seconds."""
        self._refresh()
        targets = await self._targets()
        families = await asyncio.gather(*(self._family(ipv6, targets) for ipv6 in (False, True)))
        rtts: dict[tuple[str, str], float] = {}
        for _, seen in families:
            for target, answer in seen:
                known = rtts.get((target.network, target.name), answer.rtt_s)
                rtts[target.network, target.name] = min(known, answer.rtt_s)
        return {
            "port": self._services.underlay.port,
            "families": [family for family, _ in families],
            "hubs": [
                {
                    "network": target.network,
                    "name": target.name,
                    "attached": target.attached,
                    "via": target.via,
                    "rtt_ms": _ms(rtts.get((target.network, target.name))),
                }
                for target in targets
            ],
            "port_mapping": self._outside.status(),
        }

    async def _targets(self) -> list[_Target]:
        found = []
        for network in self._networks():
            for hub in network.attachments.hubs:
                try:
                    endpoints = (await network.locate(hub.overlay)).endpoints
                except P2pvpnError:
                    endpoints = ()
                session = network.sessions.get(hub.overlay)
                path = session.current.path if session is not None and session.current is not None else None
                by_tcp = path is not None and self._services.lines.at(path.remote) is not None
                via = None if path is None else "TCP" if by_tcp else "UDP"
                found.append(_Target(network.standing.name, hub.name, path is not None, via, endpoints))
        return found

    async def _family(self, ipv6: bool, targets: list[_Target]) -> tuple[dict[str, object], list[tuple[_Target, Seen]]]:
        name = "IPv6" if ipv6 else "IPv4"
        addresses = [one.host for one in self._services.underlay.local_endpoints() if one.is_ipv6 == ipv6]
        asked = [(target, at) for target in targets if (at := target.at(ipv6)) is not None][:MAX_ASKED]
        report: dict[str, object] = {"family": name, "addresses": addresses, "udp": None, "seen": []}
        if not addresses:
            return {**report, "summary": f"this machine has no {name} address"}, []
        if not asked:
            return {**report, "summary": f"no hub has an {name} address to ask"}, []
        try:
            with self._watch.socket(ipv6=ipv6) as socket:
                answers = await self._ask_all(socket, [at for _, at in asked])
                heard = [Heard(one.hub, one.local, one.endpoint) for one in answers]
                mapping, allocation, step = await self._mapping(socket, heard)
        except P2pvpnError as problem:
            return {**report, "summary": str(problem)}, []
        if not answers:
            tcp = any(target.via == "TCP" for target in targets)
            return {**report, "udp": "blocked", "summary": explain.BLOCKED if tcp else explain.NO_ANSWER}, []
        behaviour = await self._behaviour(ipv6, mapping, allocation, step)
        by_endpoint = {answer.hub: answer for answer in answers}
        seen = [(target, by_endpoint[at]) for target, at in asked if at in by_endpoint]
        return {
            **report,
            "udp": "open",
            "seen": [
                {"hub": target.name, "at": str(answer.hub), "as": str(answer.endpoint), "rtt_ms": _ms(answer.rtt_s)}
                for target, answer in seen
            ],
            "mapping": behaviour.mapping.value,
            "filtering": behaviour.filtering.value,
            "allocation": behaviour.allocation.value,
            "step": behaviour.step,
            "hairpin": behaviour.hairpin,
            "lifetime_s": behaviour.lifetime_s,
            "refresh_s": round(self._watch.search.refresh_s, 1),
            "means": {
                "mapping": explain.MAPPING[behaviour.mapping],
                "filtering": explain.FILTERING[behaviour.filtering],
                "allocation": explain.ALLOCATION[behaviour.allocation],
                "hairpin": explain.HAIRPIN[behaviour.hairpin],
                "lifetime": explain.lifetime(behaviour.lifetime_s, self._watch.search.refresh_s),
            },
            "summary": explain.summary(behaviour),
        }, seen

    async def _ask_all(self, socket: ProbeSocket, hubs: Iterable[Endpoint]) -> list[Seen]:
        """The answers of those that gave one, in the order in which they were asked."""
        answers = await asyncio.gather(*(socket.ask(hub) for hub in dict.fromkeys(hubs)), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, P2pvpnError):
                raise answer
        return [answer for answer in answers if isinstance(answer, Seen)]

    async def _mapping(self, socket: ProbeSocket, heard: list[Heard]) -> tuple[Mapping, Allocation, int]:
        """Where hubs disagree, or there is but one, their other ports are asked as well."""
        mapping = judge_mapping(heard)
        if heard and (mapping.is_dependent or mapping is Mapping.UNKNOWN):
            hosts = list(dict.fromkeys(one.at.host for one in heard))[:SAMPLED_HUBS]
            known = {one.at for one in heard}
            others = [Endpoint(host, port) for host in hosts for port in STUN_PORTS]
            more = await self._ask_all(socket, [at for at in others if at not in known])
            heard += [Heard(one.hub, one.local, one.endpoint) for one in more]
            mapping = judge_mapping(heard)
        samples = list(dict.fromkeys(Sample(socket.port, one.seen.port) for one in heard))
        return (mapping, *judge(samples))

    async def _behaviour(self, ipv6: bool, mapping: Mapping, allocation: Allocation, step: int) -> NatBehaviour:
        """With filtering and hairpin, which take a tunnel of this family, and what was learned over time."""
        hub = self._watch.hub_of(ipv6)
        if hub is not None and await self._watch.look(hub):
            known = self._watch.behaviour(ipv6)
        else:
            known = NatBehaviour(lifetime_s=self._watch.behaviour(ipv6).lifetime_s)
        if mapping is Mapping.NONE:
            return replace(known, mapping=mapping, allocation=Allocation.UNKNOWN, step=0, hairpin=None)
        if mapping is Mapping.UNKNOWN:
            mapping = known.mapping
        if allocation is Allocation.UNKNOWN:
            allocation, step = known.allocation, known.step
        return replace(known, mapping=mapping, allocation=allocation, step=step)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)
