"""The pairs of one session: how they are formed from both sides' candidates, found again, and changed while they work.

There is one component and few pairs, so nothing is frozen (RFC 8445 section 6.1.2.6 saves checks where many pairs share
a fate); the order is that of the pair priorities.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from p2pvpn.core.address import Endpoint, Path

from .candidates import MAX_CANDIDATES, Candidate, CandidateKind, pair_priority, priority, priority_of
from .limits import PunchLimits
from .pair import Pair, PairReport, PairState

MAX_PAIRS = 64
"""Formed pairs of a session, best first: four local addresses with sixteen candidates (RFC 8445 section 6.1.2.5)."""
MAX_LEARNED = 16
"""Pairs learned from checks that came from elsewhere than any candidate."""
SEEN_FROM_OUTSIDE = (CandidateKind.REFLEXIVE, CandidateKind.MAPPED, CandidateKind.DECLARED)


def wildcard(endpoint: Endpoint) -> Endpoint:
    """The same port on whichever address routing picks."""
    return Endpoint("::" if endpoint.is_ipv6 else "0.0.0.0", endpoint.port)  # noqa: S104 (compared, not bound)


class CheckList:
    """Pairs by path. `limits` says which remote candidates may be checked at all."""

    def __init__(self, limits: PunchLimits) -> None:
        self._limits = limits
        self._local: tuple[Candidate, ...] = ()
        self._remote: tuple[Candidate, ...] = ()
        self._bases: tuple[Endpoint, ...] = ()
        self._pairs: dict[Path, Pair] = {}
        self.extra_ports: set[int] = set()
        """Ports of further sockets of ours, on which pairs may be learned (`birthday`)."""

    def __len__(self) -> int:
        return len(self._pairs)

    @property
    def pairs(self) -> list[Pair]:
        return list(self._pairs.values())

    def within(self, *states: PairState) -> list[Pair]:
        return [pair for pair in self._pairs.values() if pair.state in states]

    @property
    def remote(self) -> tuple[Candidate, ...]:
        return self._remote

    @property
    def local(self) -> tuple[Candidate, ...]:
        return self._local

    def update(self, local: Sequence[Candidate], remote: Sequence[Candidate]) -> list[Pair]:
        """Take the candidates that are true now. Returns the pairs that left because our address is gone.

        A working pair stays when the peer stops naming it; a pair that never worked does not.
        """
        self._local = tuple(local)
        self._remote = tuple(remote)[:MAX_CANDIDATES]
        self._bases = self._sending_bases()
        wanted = self._wanted()
        gone: list[Pair] = []
        orphans: list[Pair] = []
        for path, pair in list(self._pairs.items()):
            if not self._is_base(pair.local):
                del self._pairs[path]
                gone.append(pair)
                if not pair.signalled:
                    orphans.append(pair)
            elif path in wanted:
                pair.remote = wanted.pop(path)
                pair.signalled = pair.permitted = True
            elif pair.signalled and pair.state is not PairState.VALID:
                del self._pairs[path]
            else:
                pair.signalled = False
        for path, candidate in wanted.items():
            if len(self._pairs) >= MAX_PAIRS:
                break
            self._pairs[path] = Pair(path.local, candidate)
        for pair in orphans:
            for base in self._bases:
                if base.is_ipv6 == pair.local.is_ipv6:
                    self._learned(Path(base, pair.remote.endpoint), pair.permitted)
        return gone

    def _sending_bases(self) -> tuple[Endpoint, ...]:
        """Local endpoints to send from; a wildcard adds nothing to known addresses of its family."""
        bases = dict.fromkeys(candidate.base for candidate in self._local)
        known = {base.is_ipv6 for base in bases if not base.is_unspecified}
        return tuple(base for base in bases if not base.is_unspecified or base.is_ipv6 not in known)

    def _is_base(self, local: Endpoint) -> bool:
        """Whether packets can leave from there: a base, or an extra socket on the address of one."""
        if local in self._bases:
            return True
        return local.port in self.extra_ports and any(base.host == local.host for base in self._bases)

    def drop_ports(self, ports: Iterable[int]) -> None:
        """These extra sockets are closed, and their pairs gone with them."""
        closed = set(ports)
        self.extra_ports -= closed
        for path in [path for path in self._pairs if path.local.port in closed]:
            del self._pairs[path]

    def _wanted(self) -> dict[Path, Candidate]:
        """The pairs that the candidates form (RFC 8445 section 6.1.2.2), best first, without those the limits forbid.

        Reflexive local candidates are replaced by their bases (section 6.1.2.4), so bases are all there is.
        """
        own = {candidate.endpoint for candidate in self._local}
        same_site = self._same_site()
        best: dict[Endpoint, Candidate] = {}
        for candidate in self._remote:
            known = best.get(candidate.endpoint)
            if known is None or priority(candidate) > priority(known):
                best[candidate.endpoint] = candidate
        formed = [
            (Path(base, candidate.endpoint), candidate)
            for base in self._bases
            for candidate in best.values()
            if base.is_ipv6 == candidate.endpoint.is_ipv6
            and candidate.endpoint not in own
            and self._limits.permits(candidate.endpoint, same_site=same_site)
        ]
        formed.sort(key=lambda item: (-pair_priority(self.local_priority(item[0].local), priority(item[1])), item[0]))
        return dict(formed[:MAX_PAIRS])

    def _same_site(self) -> bool:
        """Whether both sides are seen under one public address."""
        ours = {candidate.endpoint.host for candidate in self._local if candidate.kind in SEEN_FROM_OUTSIDE}
        theirs = {candidate.endpoint.host for candidate in self._remote if candidate.kind in SEEN_FROM_OUTSIDE}
        return not ours.isdisjoint(theirs)

    def find(self, path: Path) -> Pair | None:
        """The pair that a packet on this path belongs to."""
        return self._pairs.get(path) or self._pairs.get(Path(wildcard(path.local), path.remote))

    def learn(self, path: Path) -> Pair | None:
        """A pair for an authenticated check from an unknown endpoint (RFC 8445 section 7.3.1.3).

        None when nothing may be sent there, or too many were learned already.
        """
        if self._limits.refuses(path.remote):
            return None
        local = path.local
        if local not in self._bases and wildcard(local) in self._bases:
            local = wildcard(local)
        permitted = self._limits.permits(path.remote, same_site=self._same_site())
        return self._learned(Path(local, path.remote), permitted)

    def suggest(self, path: Path) -> None:
        """The peer is reached over this path, as others know; make it a pair if it is none."""
        local = path.local
        if local.is_unspecified:
            bases = [base for base in self._bases if base.is_ipv6 == local.is_ipv6]
            local = next((base for base in bases if base.port == local.port), local)
        if self.find(Path(local, path.remote)) is None:
            self.learn(Path(local, path.remote))

    def _learned(self, path: Path, permitted: bool) -> Pair | None:
        if path in self._pairs:
            return None
        learned = [pair for pair in self._pairs.values() if not pair.signalled]
        if len(learned) >= MAX_LEARNED:
            spent = next((pair for pair in learned if pair.state is PairState.FAILED), None)
            if spent is None:
                return None
            del self._pairs[spent.path]
        candidate = Candidate.remote(CandidateKind.PEER_REFLEXIVE, path.remote)
        pair = Pair(path.local, candidate, permitted=permitted, signalled=False)
        self._pairs[path] = pair
        return pair

    def discard(self, pair: Pair) -> None:
        self._pairs.pop(pair.path, None)

    def local_priority(self, base: Endpoint) -> int:
        """The best priority among our candidates with this base."""
        known = [priority(candidate) for candidate in self._local if candidate.base == base]
        return max(known, default=priority_of(CandidateKind.HOST, base))

    def local_kind(self, mapped: Endpoint, arrived_at: Endpoint) -> CandidateKind:
        """What we are to a peer that sees us at `mapped`, when the answer came to `arrived_at` (section 7.2.5.3.1)."""
        if mapped == arrived_at:
            return CandidateKind.HOST
        kinds = [candidate.kind for candidate in self._local if candidate.endpoint == mapped]
        return max(kinds, key=lambda kind: kind.preference, default=CandidateKind.PEER_REFLEXIVE)

    def pair_priority(self, pair: Pair, controlling: bool) -> int:
        ours, theirs = self.local_priority(pair.local), priority(pair.remote)
        return pair_priority(ours, theirs) if controlling else pair_priority(theirs, ours)

    def by_priority(self, pairs: list[Pair], controlling: bool) -> list[Pair]:
        """These pairs, the best first."""
        return sorted(pairs, key=lambda pair: (-self.pair_priority(pair, controlling), pair.path))

    def report(self, selected: Pair | None, controlling: bool) -> list[PairReport]:
        """Every pair, best priority first."""
        return [
            pair.report(pair is selected, self.pair_priority(pair, controlling))
            for pair in self.by_priority(self.pairs, controlling)
        ]
