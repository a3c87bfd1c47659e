"""Learns how we look from outside: Binding requests from the shared socket to the STUN endpoints of several hubs.

What the hubs see gives our server-reflexive candidates, and, compared with each other, how our NAT maps (RFC 4787
section 4.1). Where hubs disagree, or there is but one, their other ports are asked once: whether those see the same
tells address-dependent from address- and port-dependent mapping, and more mappings tell how ports are allocated.

The requests also keep the mapping open and show that the hub is there: an idle tunnel needs nothing else. An exchange
in the tunnel to the same hub does the same and puts the request off (`heard`).

Answers are not authenticated: who can read the request can lie about the address, which costs checks that nobody
answers, never a path. An answer counts only from the hub that was asked and with the transaction ID of the request.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from p2pvpn.core import stun
from p2pvpn.core.address import Endpoint, Path, any_local
from p2pvpn.core.datagram import Kind, classify
from p2pvpn.core.errors import WireError
from p2pvpn.core.output import Event, Output, Transmit
from p2pvpn.core.ports import Entropy

from .allocation import Sample, judge
from .behaviour import Allocation, Filtering, Mapping, NatBehaviour
from .candidates import Candidate, CandidateKind, is_usable
from .mapping import Heard, judge_mapping
from .proof import MARK_BYTES, NO_PROOF, PROOF_BYTES, mark_of

MAX_HUBS = 16
"""STUN endpoints asked; a network has a handful of hubs."""
STUN_PORTS = (4500, 3478, 500)
"""Where hubs answer STUN."""
RTO_S = 0.5
"""First retransmission, doubled each time (RFC 8489 section 6.2.1)."""
RC = 5
"""Requests of a round; 7 in RFC 8489, but a round follows every refresh period anyway."""
RM = 4.0
"""RTOs from the last request to giving up; 16 in RFC 8489, for the same reason."""
DOUBT_TRIES = 3
"""The third request leaves when 1.5 s passed in silence: the hub may be gone."""
REFRESH_S = 25.0
"""Between rounds while it is not known how long the NAT keeps a binding (RFC 4787 asks for 2 min, 30 s is seen)."""
JITTER = 0.1
"""Rounds come earlier by up to this share, never later."""
MAX_SAMPLES = 32
"""Mappings that are remembered; the oldest is forgotten."""
SAMPLE_PAUSE_S = 60.0
"""Between two rounds to the hubs' other ports, however often our mappings change."""


@dataclass(frozen=True, slots=True)
class ReflexiveLearned(Event):
    """The hub at `hub` sees us at `endpoint`, which is new; its answer came to `local`.

    `silent_s` is how long the binding was silent before, when it saw us at another port of the same address then; None
    for the first answer and after any greater change.
    """

    local: Endpoint
    hub: Endpoint
    endpoint: Endpoint
    silent_s: float | None = None


@dataclass(frozen=True, slots=True)
class ReflexiveLost(Event):
    """A hub that told where it sees us does not answer any more."""

    hub: Endpoint
    endpoint: Endpoint


@dataclass(frozen=True, slots=True)
class HubDoubted(Event):
    """A hub that answered before is silent, or was started anew: the tunnel to it should be looked at."""

    hub: Endpoint
    reason: str


@dataclass(slots=True)
class _Hub:
    """What is known through one hub; `tries` requests of the current round were sent under `transaction`."""

    next_at: float
    transaction: bytes = b""
    tries: int = 0
    sent_at: float = -math.inf
    order: int = 0
    """Counts first requests, over all hubs: in this order a NAT made its mappings."""
    open_at: float = -math.inf
    """When a packet last went out and was answered: since then the binding is on its own."""
    endpoint: Endpoint | None = None
    local: Endpoint | None = None
    mark: bytes = b""
    doubted: bool = False
    """It was told of as silent, and has not answered since."""
    rtt_s: float | None = None


@dataclass(slots=True)
class _Family:
    """What was noted of one family's NAT by other means than comparing answers."""

    samples: dict[tuple[int, Endpoint], tuple[int, Sample]] = field(default_factory=dict)
    """By inner port and destination, with the order in which the mappings were made."""
    filtering: Filtering = Filtering.UNKNOWN
    lifetime_s: float | None = None
    hairpin: bool | None = None


class ReflexiveProbe:
    """`port` is the shared socket's. Give the STUN endpoints of all hubs that may be asked with `update`."""

    def __init__(self, port: int, entropy: Entropy) -> None:
        self.refresh_s = REFRESH_S
        """Between rounds, at most."""
        self._port = port
        self._entropy = entropy
        self._hubs: dict[Endpoint, _Hub] = {}
        self._seconds: dict[Endpoint, _Hub] = {}
        """Other ports of the hubs, asked once."""
        self._sampled_at = -math.inf
        self._count = 0
        self._families = {False: _Family(), True: _Family()}

    def update(self, hubs: Iterable[Endpoint], now: float) -> list[Output]:
        """Ask these hubs, at most 16; what others said is forgotten."""
        wanted = list(dict.fromkeys(hubs))[:MAX_HUBS]
        self._hubs = {hub: self._hubs.get(hub) or _Hub(now) for hub in wanted}
        hosts = {hub.host for hub in wanted}
        self._seconds = {at: hub for at, hub in self._seconds.items() if at.host in hosts and at not in self._hubs}
        return self.tick(now)

    def refresh(self, now: float) -> list[Output]:
        """Our network may have changed: ask all of them at once. Old answers stand until they are corrected or time
        out.
        """
        for hub in self._hubs.values():
            hub.next_at = now
            if not hub.doubted:  # or who asks every few seconds would never learn that it is gone
                hub.tries = 0
        return self.tick(now)

    def forget(self) -> None:
        """The machine is in another network: what its NAT was is over. What the hubs said stands until corrected."""
        self._seconds.clear()
        self._sampled_at = -math.inf
        self._families = {False: _Family(), True: _Family()}

    def hasten(self, now: float) -> list[Output]:
        """`refresh_s` is shorter than it was: rounds that are due later come at once."""
        for hub in self._hubs.values():
            if not hub.tries and hub.next_at > hub.open_at + self.refresh_s:
                hub.next_at = now
        return self.tick(now)

    def heard(self, at: Endpoint, now: float) -> None:
        """Something of ours went to the hub and an authenticated answer came through the same binding."""
        hub = self._hubs.get(at)
        if hub is not None and hub.endpoint is not None and not hub.tries and now > hub.open_at:
            self._rest(hub, now)

    def handle(self, path: Path, data: bytes, now: float) -> list[Output] | None:
        """An answer to one of our requests; None for every other datagram."""
        hub = self._hubs.get(path.remote) or self._seconds.get(path.remote)
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
        return self._learn(hub, path, endpoint, message.attributes.get("NONCE", b""), now)

    def _learn(self, hub: _Hub, path: Path, endpoint: Endpoint, proof: bytes, now: float) -> list[Output]:
        outputs: list[Output] = []
        before = hub.endpoint
        known = (hub.endpoint, hub.local) == (endpoint, path.local)
        same_nat = before is not None and hub.local == path.local and before.host == endpoint.host
        silent_s = hub.sent_at - hub.open_at if same_nat else None
        if hub.tries == 1:
            hub.rtt_s = now - hub.sent_at
        if not known:
            samples = self._families[endpoint.is_ipv6].samples
            samples[self._port, path.remote] = (hub.order, Sample(self._port, endpoint.port))
        hub.endpoint, hub.local = endpoint, path.local
        if path.remote in self._seconds:
            hub.tries, hub.next_at = 0, math.inf
            return []
        self._rest(hub, now)
        mark = mark_of(proof) if len(proof) == PROOF_BYTES else bytes(MARK_BYTES)
        if hub.mark not in (b"", mark):
            outputs.append(HubDoubted(path.remote, "it was started anew"))
        hub.mark = mark
        self._sample(endpoint.is_ipv6, now, news=not known)
        if not known:
            outputs.append(ReflexiveLearned(path.local, path.remote, endpoint, silent_s))
        return outputs

    def _sample(self, ipv6: bool, now: float, *, news: bool) -> None:
        """Ask the hubs' other ports: when hubs disagree, or when after a round there still is but one."""
        heard = [at for at, hub in self._hubs.items() if at.is_ipv6 == ipv6 and hub.endpoint is not None]
        hosts = list(dict.fromkeys(at.host for at in heard))
        dependent = len({self._hubs[at].endpoint for at in heard}) > 1
        first = not any(at.is_ipv6 == ipv6 for at in self._seconds)
        if dependent:
            wanted = first or (news and now >= self._sampled_at + SAMPLE_PAUSE_S)
        else:
            wanted = len(hosts) == 1 and not news and first
        if not wanted:
            return
        self._sampled_at = now
        for host in hosts[: MAX_HUBS // len(STUN_PORTS)]:
            for at in (Endpoint(host, port) for port in STUN_PORTS):
                if at not in self._hubs:
                    self._seconds[at] = _Hub(now)

    def next_deadline(self) -> float | None:
        both = (*self._hubs.values(), *self._seconds.values())
        return min((hub.next_at for hub in both if hub.next_at < math.inf), default=None)

    def tick(self, now: float) -> list[Output]:
        """Send what is due."""
        outputs: list[Output] = []
        for at, hub in (*self._hubs.items(), *self._seconds.items()):
            if hub.next_at > now:
                continue
            if hub.tries >= RC:
                if hub.endpoint is not None:
                    outputs.append(ReflexiveLost(at, hub.endpoint))
                hub.endpoint = hub.local = hub.rtt_s = None
                if at in self._seconds:
                    hub.tries, hub.next_at = 0, math.inf
                else:
                    self._rest(hub, now)
                    hub.next_at = min(hub.next_at, now + REFRESH_S)
                continue
            if not hub.tries:
                hub.transaction = self._entropy(stun.TRANSACTION_ID_BYTES)
                hub.sent_at = now
                self._count += 1
                hub.order = self._count
            hub.tries += 1
            if hub.tries == DOUBT_TRIES and hub.endpoint is not None and not hub.doubted:
                hub.doubted = True
                outputs.append(HubDoubted(at, "it is silent"))
            hub.next_at = now + RTO_S * (RM if hub.tries >= RC else 2 ** (hub.tries - 1))
            request = stun.request(hub.transaction, nonce=NO_PROOF)
            outputs.append(Transmit(any_local(at, self._port), stun.build(request)))
        return outputs

    def _rest(self, hub: _Hub, now: float) -> None:
        share = int.from_bytes(self._entropy(2), "big") / 0xFFFF
        hub.tries = 0
        hub.doubted = False
        hub.open_at = now
        hub.next_at = now + self.refresh_s * (1.0 - JITTER * share)

    def seen_by(self) -> dict[Endpoint, Endpoint]:
        """Where each hub that answered sees us."""
        return {at: hub.endpoint for at, hub in self._hubs.items() if hub.endpoint is not None}

    def rtts(self) -> dict[Endpoint, float]:
        """Round trips in seconds to the hubs that answered their last first request."""
        return {at: hub.rtt_s for at, hub in self._hubs.items() if hub.rtt_s is not None}

    def candidates(self) -> list[Candidate]:
        """Server-reflexive candidates, without those that are an address of ours anyway."""
        found = {
            hub.endpoint: Candidate(CandidateKind.REFLEXIVE, hub.endpoint, hub.local)
            for hub in self._hubs.values()
            if hub.endpoint is not None and hub.local is not None and hub.endpoint != hub.local
        }
        return list(found.values())

    # What the NAT is like.

    def note_lifetime(self, lifetime_s: float | None) -> None:
        """How long a silent binding lives, of either family: what is learned by one serves for both."""
        for family in self._families.values():
            family.lifetime_s = lifetime_s

    def note_sight(self, ipv6: bool, filtering: Filtering, hairpin: bool | None) -> None:
        """What sockets of their own found out."""
        family = self._families[ipv6]
        family.filtering, family.hairpin = filtering, hairpin

    def note_sample(self, inner: int, at: Endpoint, outer: Endpoint) -> None:
        """The hub at `at` sees another socket of ours, of port `inner`, at `outer`."""
        samples = self._families[outer.is_ipv6].samples
        self._count += 1
        samples[inner, at] = (self._count, Sample(inner, outer.port))
        while len(samples) > MAX_SAMPLES:
            del samples[min(samples, key=lambda key: samples[key][0])]

    def behaviour(self, ipv6: bool = False) -> NatBehaviour:
        """All that is known of one family's NAT."""
        family = self._families[ipv6]
        known = NatBehaviour(self.mapping(ipv6), family.filtering, Allocation.UNKNOWN, 0)
        known = replace(known, lifetime_s=family.lifetime_s, hairpin=family.hairpin)
        if known.mapping in (Mapping.UNKNOWN, Mapping.NONE):
            return known
        made = [sample for _, sample in sorted(family.samples.values(), key=lambda one: one[0])]
        distinct = list(dict.fromkeys(made))
        allocation, step = judge(distinct)
        return replace(known, allocation=allocation, step=step)

    def mapping(self, ipv6: bool = False) -> Mapping:
        """How our NAT maps, for one family."""
        both = (*self._hubs.items(), *self._seconds.items())
        return judge_mapping(
            [
                Heard(at, hub.local, hub.endpoint)
                for at, hub in both
                if at.is_ipv6 == ipv6 and hub.local is not None and hub.endpoint is not None
            ]
        )


def _is_plausible(endpoint: Endpoint, path: Path) -> bool:
    """An address that a peer could use, or our own one, whatever it is."""
    return is_usable(endpoint.ip) or endpoint == path.local
