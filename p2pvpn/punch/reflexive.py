"""Learns how we look from outside: Binding requests from the shared socket to the STUN endpoints of several hubs.

What the hubs see gives our server-reflexive candidates, and, compared with each other, how our NAT maps (RFC 4787
section 4.1). The requests also keep the mapping open. Answers are not authenticated: who can read the request can lie
about the address, which costs checks that nobody answers, never a path. An answer counts only from the hub that was
asked and with the transaction ID of the request.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from p2pvpn.core import stun
from p2pvpn.core.address import Endpoint, Path, any_local
from p2pvpn.core.datagram import Kind, classify
from p2pvpn.core.errors import WireError
from p2pvpn.core.output import Event, Output, Transmit
from p2pvpn.core.ports import Entropy

from .behaviour import Mapping
from .candidates import Candidate, CandidateKind, is_usable

MAX_HUBS = 16
"""STUN endpoints asked; a network has a handful of hubs."""
RTO_S = 0.5
"""First retransmission, doubled each time (RFC 8489 section 6.2.1)."""
RC = 5
"""Requests of a round; 7 in RFC 8489, but a round follows every refresh period anyway."""
RM = 4.0
"""RTOs from the last request to giving up; 16 in RFC 8489, for the same reason."""
REFRESH_S = 25.0
"""Between rounds: keeps the mapping open (RFC 4787 asks for 2 min, 30 s is seen)."""
JITTER = 0.1


@dataclass(frozen=True, slots=True)
class ReflexiveLearned(Event):
    """The hub at `hub` sees us at `endpoint`, which is new; its answer came to `local`."""

    local: Endpoint
    hub: Endpoint
    endpoint: Endpoint


@dataclass(frozen=True, slots=True)
class ReflexiveLost(Event):
    """A hub that told where it sees us does not answer any more."""

    hub: Endpoint
    endpoint: Endpoint


@dataclass(slots=True)
class _Hub:
    """What is known through one hub; `tries` requests of the current round were sent under `transaction`."""

    next_at: float
    transaction: bytes = b""
    tries: int = 0
    endpoint: Endpoint | None = None
    local: Endpoint | None = None


class ReflexiveProbe:
    """`port` is the shared socket's. Give the STUN endpoints of all hubs that may be asked with `update`."""

    def __init__(self, port: int, entropy: Entropy) -> None:
        self._port = port
        self._entropy = entropy
        self._hubs: dict[Endpoint, _Hub] = {}

    def update(self, hubs: Iterable[Endpoint], now: float) -> list[Output]:
        """Ask these hubs, at most 16; what others said is forgotten."""
        wanted = list(dict.fromkeys(hubs))[:MAX_HUBS]
        self._hubs = {hub: self._hubs.get(hub) or _Hub(now) for hub in wanted}
        return self.tick(now)

    def refresh(self, now: float) -> list[Output]:
        """Our network changed: ask all of them at once. Old answers stand until they are corrected or time out."""
        for hub in self._hubs.values():
            hub.tries, hub.next_at = 0, now
        return self.tick(now)

    def handle(self, path: Path, data: bytes, now: float) -> list[Output] | None:
        """An answer to one of our requests; None for every other datagram."""
        hub = self._hubs.get(path.remote)
        if hub is None or not hub.tries or classify(data) is not Kind.STUN or data[8:20] != hub.transaction:
            return None
        try:
            message = stun.parse_untrusted(data)
            if message.message_class is stun.Class.REQUEST:
                return None
            if message.message_class is not stun.Class.RESPONSE:
                return []
            endpoint = stun.mapped_address(message)
        except WireError:
            return []
        if endpoint.is_ipv6 != path.remote.is_ipv6 or not endpoint.port or not _is_plausible(endpoint, path):
            return []
        known = (hub.endpoint, hub.local)
        hub.endpoint, hub.local = endpoint, path.local
        self._rest(hub, now)
        return [] if known == (endpoint, path.local) else [ReflexiveLearned(path.local, path.remote, endpoint)]

    def next_deadline(self) -> float | None:
        return min((hub.next_at for hub in self._hubs.values()), default=None)

    def tick(self, now: float) -> list[Output]:
        """Send what is due."""
        outputs: list[Output] = []
        for at, hub in self._hubs.items():
            if hub.next_at > now:
                continue
            if hub.tries >= RC:
                if hub.endpoint is not None:
                    outputs.append(ReflexiveLost(at, hub.endpoint))
                hub.endpoint = hub.local = None
                self._rest(hub, now)
                continue
            if not hub.tries:
                hub.transaction = self._entropy(stun.TRANSACTION_ID_BYTES)
            hub.tries += 1
            hub.next_at = now + RTO_S * (RM if hub.tries >= RC else 2 ** (hub.tries - 1))
            outputs.append(Transmit(any_local(at, self._port), stun.build(stun.request(hub.transaction))))
        return outputs

    def _rest(self, hub: _Hub, now: float) -> None:
        share = int.from_bytes(self._entropy(2), "big") / 0xFFFF
        hub.tries = 0
        hub.next_at = now + REFRESH_S * (1.0 + JITTER * (2.0 * share - 1.0))

    def seen_by(self) -> dict[Endpoint, Endpoint]:
        """Where each hub that answered sees us."""
        return {at: hub.endpoint for at, hub in self._hubs.items() if hub.endpoint is not None}

    def candidates(self) -> list[Candidate]:
        """Server-reflexive candidates, without those that are an address of ours anyway."""
        found = {
            hub.endpoint: Candidate(CandidateKind.REFLEXIVE, hub.endpoint, hub.local)
            for hub in self._hubs.values()
            if hub.endpoint is not None and hub.local is not None and hub.endpoint != hub.local
        }
        return list(found.values())

    def mapping(self, ipv6: bool = False) -> Mapping:
        """How our NAT maps, for one family."""
        heard = [(at, hub) for at, hub in self._hubs.items() if at.is_ipv6 == ipv6 and hub.endpoint is not None]
        if len({hub.endpoint for _, hub in heard}) > 1:
            # Another address of ours is another mapping: only answers to one local address can disagree.
            for local in {hub.local for _, hub in heard}:
                if len({hub.endpoint for _, hub in heard if hub.local == local}) > 1:
                    return Mapping.ENDPOINT_DEPENDENT
            return Mapping.UNKNOWN
        if len({at.host for at, _ in heard}) < 2:
            return Mapping.UNKNOWN
        return Mapping.NONE if all(hub.endpoint == hub.local for _, hub in heard) else Mapping.ENDPOINT_INDEPENDENT


def _is_plausible(endpoint: Endpoint, path: Path) -> bool:
    """An address that a peer could use, or our own one, whatever it is."""
    return is_usable(endpoint.ip) or endpoint == path.local
