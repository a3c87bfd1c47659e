"""How this machine is reached from outside: what it tells peers, and what it publishes.

    host        addresses of its own                       told to peers; published where the hubs see just that
    reflexive   where the hubs see it                      told to peers
    mapped      what a router says that it forwards        told to peers; published where the hubs see that address
    declared    what its owner says that is forwarded      told to peers and published

Peers dial what is published without a call, so only what strangers can reach belongs there. A router behind another
NAT (double NAT) maps to an address that is not the one the hubs see: it is told to peers, who check it, and no more;
one that is private is not told at all.
"""

from __future__ import annotations

from collections.abc import Callable

from p2pvpn.core.address import Endpoint, any_local
from p2pvpn.punch.candidates import MAX_CANDIDATES, Candidate, CandidateKind, priority
from p2pvpn.punch.portmap.mapping import PortMapping
from p2pvpn.punch.reflexive import ReflexiveProbe

from .ports import PortMapper, Underlay

MAX_PUBLISHED = 4
"""Each one that is silent costs who dials a second."""


class Outside:
    """`refuses` says which endpoints are nobody's (addresses of the overlay, say)."""

    def __init__(
        self,
        underlay: Underlay,
        reflexive: ReflexiveProbe,
        mapper: PortMapper | None,
        refuses: Callable[[Endpoint], bool],
    ) -> None:
        self.declared: tuple[Endpoint, ...] = ()
        self._underlay = underlay
        self._reflexive = reflexive
        self._mapper = mapper
        self._refuses = refuses

    def candidates(self) -> list[Candidate]:
        """Ours, as of now; the best sixteen."""
        port = self._underlay.port
        every = [
            *self._reflexive.candidates(),
            *(Candidate(CandidateKind.MAPPED, mapping.external, mapping.internal) for mapping in self._mapped()),
            *(Candidate(CandidateKind.DECLARED, at, any_local(at, port).local) for at in self._declared()),
            *(Candidate.host(endpoint) for endpoint in self._underlay.local_endpoints()),
        ]
        found = {candidate.endpoint: candidate for candidate in every}
        return sorted(found.values(), key=priority, reverse=True)[:MAX_CANDIDATES]

    def published(self) -> tuple[Endpoint, ...]:
        """Endpoints at which strangers can dial us, unless a firewall objects."""
        seen = set(self._reflexive.seen_by().values())
        hosts = {endpoint.host for endpoint in seen}
        every = [
            *(endpoint for endpoint in self._underlay.local_endpoints() if endpoint in seen),
            *self._declared(),
            *(mapping.external for mapping in self._mapped() if mapping.external.host in hosts),
        ]
        return tuple(dict.fromkeys(every))[:MAX_PUBLISHED]

    def status(self) -> dict[str, object]:
        """For the control socket."""
        routers = self._mapper.status() if self._mapper is not None else ()
        return {
            "enabled": self._mapper is not None and self._mapper.is_on,
            "declared": [str(endpoint) for endpoint in self.declared],
            "routers": [
                {
                    "gateway": router.gateway,
                    "protocol": router.mapping.protocol.value if router.mapping is not None else None,
                    "external": str(router.mapping.external) if router.mapping is not None else None,
                    "told": router.mapping is not None and self._is_told(router.mapping),
                    "published": router.mapping is not None and router.mapping.external in self.published(),
                    "reason": router.reason,
                }
                for router in routers
            ],
        }

    def _mapped(self) -> list[PortMapping]:
        mappings = self._mapper.mappings() if self._mapper is not None else ()
        return [mapping for mapping in mappings if self._is_told(mapping)]

    def _is_told(self, mapping: PortMapping) -> bool:
        return mapping.is_public and not self._refuses(mapping.external)

    def _declared(self) -> list[Endpoint]:
        return [endpoint for endpoint in self.declared if not self._refuses(endpoint)]
