"""The relay of a hub: who may have an allocation, who is bound to it, and when it ends.

The machine sees only the packets that its forwarder does not pass by itself (`mesh.ports.Forwarder.on_unbound`):

    1. a Binding request whose username or MESSAGE-INTEGRITY is not the port's ticket: dropped, no answer
    2. one whose counter is not above the last that was granted: dropped, so a captured request never moves a binding
    3. one from the source that is bound already: refreshed, answered
    4. one from the IP address at which the owner's IPsec tunnel lives: bound (the tunnel showed that the owner receives
       there; the port may differ, as endpoint-dependent NATs make it)
    5. one that echoes a fresh nonce: bound
    6. else: challenged with a nonce, a keyed hash over time, allocation and source, of which nothing is kept
    7. other bytes from a bound source: queued until the twin binds, then sent first and in order
    8. other bytes: dropped

So bytes go only to sources that proved themselves, except the challenge, which is rate-limited, goes to the sender of
an authentic request, and is never longer than it.
"""

from __future__ import annotations

import hmac
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from heapq import heappop, heappush

from p2pvpn.core import stun
from p2pvpn.core.address import Endpoint, IpAddress
from p2pvpn.core.errors import RemoteError, TrustError, WireError
from p2pvpn.core.ids import PeerId
from p2pvpn.core.limits import BoundedTable, SourceLimiter, TokenBucket
from p2pvpn.core.output import Effect, Event, Output
from p2pvpn.core.ports import Entropy
from p2pvpn.core.secret import Secret

from .binding import NONCE_BYTES, BindRequest, build_challenge, build_success, parse_request_untrusted
from .limits import RelayLimits
from .wire import KEY_BYTES, RelayTicket, is_bind

ALLOCATION_ID_BYTES = 8
_NEVER = -1


class Refusal(Enum):
    """Why an allocation is refused."""

    FULL = "the relay has no room for more pairs"
    PEER_FULL = "the peer has as many relayed pairs as it may have"
    RATE = "the peer asks for relays too fast"
    BYTES = "the peer has relayed more than its share"


class RelayRefused(RemoteError):
    """The peer may not have an allocation now; `reason` says why."""

    def __init__(self, reason: Refusal) -> None:
        super().__init__(reason.value)
        self.reason = reason


class Expiry(Enum):
    """Why an allocation ended."""

    UNBOUND = "a side never bound"
    IDLE = "no packets and no binds"
    ABANDONED = "a side did not bind again within its lifetime"
    BYTES = "its owner has relayed more than its share"
    RELEASED = "it was released"


@dataclass(frozen=True, slots=True)
class Allocation:
    """A pair of ports and the tickets of its sides; both must have bound by `expires_at`, in monotonic seconds."""

    id: bytes
    side_a: RelayTicket
    side_b: RelayTicket
    expires_at: float


@dataclass(frozen=True, slots=True)
class Bind(Effect):
    """From now on `source`, and no other, passes at `port`. Said again at each refresh: the source may have turned to
    another address of ours.
    """

    port: int
    source: Endpoint


@dataclass(frozen=True, slots=True)
class Answer(Effect):
    """Send the relay's own bytes from `port`."""

    port: int
    to: Endpoint
    data: bytes


@dataclass(frozen=True, slots=True)
class Forward(Effect):
    """Send a peer's bytes, which were queued or came while the binding was made, from `port` to its bound source."""

    port: int
    to: Endpoint
    data: bytes


@dataclass(frozen=True, slots=True)
class ClosePair(Effect):
    """Close the pair of ports that `port` belongs to."""

    port: int


@dataclass(frozen=True, slots=True)
class RelayBound(Event):
    """`owner` is bound at `port` from `source`; said again when the source changes."""

    allocation_id: bytes
    port: int
    owner: PeerId
    source: Endpoint


@dataclass(frozen=True, slots=True)
class RelayExpired(Event):
    """The allocation is over."""

    allocation_id: bytes
    owner_a: PeerId
    owner_b: PeerId
    reason: Expiry


@dataclass(slots=True)
class _Side:
    owner: PeerId
    ticket: RelayTicket
    known: IpAddress | None
    source: Endpoint | None = None
    counter: int = _NEVER
    bound_at: float = 0.0
    queue: deque[bytes] = field(default_factory=deque)
    """Datagrams from the other side that wait for this one."""
    queued_bytes: int = 0


@dataclass(slots=True)
class _Pair:
    id: bytes
    sides: tuple[_Side, _Side]
    made_at: float
    active_at: float
    bytes_seen: int = 0

    def of_port(self, port: int) -> tuple[_Side, _Side]:
        """The side at `port`, and its twin."""
        a, b = self.sides
        return (a, b) if a.ticket.port == port else (b, a)


class RelayServer:
    """All allocations of one hub in one network."""

    def __init__(self, limits: RelayLimits, entropy: Entropy) -> None:
        self.limits = limits
        self._entropy = entropy
        self._nonce_key = entropy(KEY_BYTES)
        self._pairs: dict[bytes, _Pair] = {}
        self._by_port: dict[int, _Pair] = {}
        self._held: dict[PeerId, int] = {}
        self._rates: BoundedTable[PeerId, TokenBucket] = BoundedTable(limits.peers)
        self._volumes: BoundedTable[PeerId, TokenBucket] = BoundedTable(limits.peers)
        self._challenges: SourceLimiter[str] = SourceLimiter(
            limits.challenges_per_second, limits.challenge_burst, limits.challenge_sources
        )
        self._deadlines: list[tuple[float, bytes]] = []

    def __len__(self) -> int:
        """Allocations that live."""
        return len(self._pairs)

    # --- allocations

    def may_allocate(self, owner: PeerId, now: float) -> bool:
        """Whether `allocate` would grant `owner` a pair; to be asked before ports are opened."""
        return self._refusal(owner, now) is None

    def allocate(  # noqa: PLR0917 (two sides, three values each)
        self,
        port_a: int,
        port_b: int,
        owner_a: PeerId,
        owner_b: PeerId,
        known_a: IpAddress | None,
        known_b: IpAddress | None,
        now: float,
    ) -> Allocation:
        """A pair for `owner_a`, who asked and is charged, and `owner_b`. `known_*` is the outer IP address of the
        owner's authenticated tunnel to this hub, if it has one. Raises RelayRefused; the ports are still the caller's
        then.
        """
        refusal = self._refusal(owner_a, now)
        if refusal is not None:
            raise RelayRefused(refusal)
        if port_a == port_b or port_a in self._by_port or port_b in self._by_port:
            raise ValueError(f"relay ports {port_a} and {port_b} are not both free")
        self._rate(owner_a).take(now)
        pair_id = self._entropy(ALLOCATION_ID_BYTES)
        sides = (
            _Side(owner_a, self._ticket(port_a, pair_id, "a"), known_a),
            _Side(owner_b, self._ticket(port_b, pair_id, "b"), known_b),
        )
        pair = _Pair(pair_id, sides, made_at=now, active_at=now)
        self._pairs[pair_id] = self._by_port[port_a] = self._by_port[port_b] = pair
        self._held[owner_a] = self._held.get(owner_a, 0) + 1
        expires_at = now + self.limits.bind_s
        heappush(self._deadlines, (expires_at, pair_id))
        return Allocation(pair_id, sides[0].ticket, sides[1].ticket, expires_at)

    def owner_at(self, owner: PeerId, known: IpAddress | None) -> None:
        """The owner's tunnel to this hub lives at another IP address now, or (None) no longer."""
        for side in (side for pair in self._pairs.values() for side in pair.sides):
            if side.owner == owner:
                side.known = known

    def release(self, allocation_id: bytes, now: float) -> list[Output]:
        """End one allocation; an unknown one is over already."""
        pair = self._pairs.get(allocation_id)
        return self._end(pair, Expiry.RELEASED) if pair else []

    def release_owner(self, owner: PeerId, now: float) -> list[Output]:
        """End every allocation that the peer takes part in: it was revoked, say."""
        pairs = [pair for pair in self._pairs.values() if owner in (pair.sides[0].owner, pair.sides[1].owner)]
        return [output for pair in pairs for output in self._end(pair, Expiry.RELEASED)]

    def ports(self) -> Iterator[int]:
        """The first port of every pair: what to ask the forwarder about for `forwarded`."""
        return iter([pair.sides[0].ticket.port for pair in self._pairs.values()])

    def forwarded(self, port: int, at: float, total_bytes: int) -> list[Output]:
        """The forwarder's word on the pair of `port`: last packet at `at`, `total_bytes` so far in both directions."""
        pair = self._by_port.get(port)
        if pair is None:
            return []
        new_bytes = max(0, total_bytes - pair.bytes_seen)
        pair.bytes_seen = max(pair.bytes_seen, total_bytes)
        pair.active_at = max(pair.active_at, at)
        owner = pair.sides[0].owner
        if new_bytes and not self._volume(owner).take(at, new_bytes):
            return self._end(pair, Expiry.BYTES)
        return []

    # --- packets

    def handle(self, port: int, source: Endpoint, data: bytes, now: float) -> list[Output]:
        """A packet that the forwarder handed up."""
        pair = self._by_port.get(port)
        if pair is None:
            return []
        side, twin = pair.of_port(port)
        if not is_bind(data):
            return self._pass_on(side, twin, source, data)
        try:
            request = parse_request_untrusted(data)
            if request.username != side.ticket.username:
                return []
            stun.verify(request.message, side.ticket.key.reveal())
        except (WireError, TrustError):
            return []
        return self._bind(pair, side, request, source, now)

    def _bind(self, pair: _Pair, side: _Side, request: BindRequest, source: Endpoint, now: float) -> list[Output]:
        key = side.ticket.key.reveal()
        success = Answer(side.ticket.port, source, build_success(request, key, source))
        if request.counter <= side.counter:
            return []
        if source == side.source:
            side.counter = request.counter
            side.bound_at = pair.active_at = max(pair.active_at, now)
            return [Bind(side.ticket.port, source), *self._no_longer(request, success)]
        if source.ip != side.known and not self._nonce_holds(request.nonce, side, source, now):
            if not self._challenges.take(source.host, now):
                return []
            challenge = build_challenge(request, key, self._nonce(side, source, self._slot(now)))
            return self._no_longer(request, Answer(side.ticket.port, source, challenge))
        side.source, side.counter = source, request.counter
        side.bound_at = pair.active_at = max(pair.active_at, now)
        outputs: list[Output] = [Forward(side.ticket.port, source, data) for data in side.queue]
        side.queue.clear()
        side.queued_bytes = 0
        outputs.append(Bind(side.ticket.port, source))
        outputs += self._no_longer(request, success)
        outputs.append(RelayBound(pair.id, side.ticket.port, side.owner, source))
        return outputs

    @staticmethod
    def _no_longer(request: BindRequest, answer: Answer) -> list[Output]:
        """The answer, unless it is longer than the request: the relay never amplifies."""
        return [answer] if len(answer.data) <= request.size else []

    def _pass_on(self, side: _Side, twin: _Side, source: Endpoint, data: bytes) -> list[Output]:
        if side.source != source:
            return []
        if twin.source is not None:
            return [Forward(twin.ticket.port, twin.source, data)]
        if len(twin.queue) < self.limits.queued_datagrams and twin.queued_bytes + len(data) <= self.limits.queued_bytes:
            twin.queue.append(data)
            twin.queued_bytes += len(data)
        return []

    # --- time

    def next_deadline(self) -> float | None:
        """When `tick` wants to run; it may find nothing due."""
        return self._deadlines[0][0] if self._deadlines else None

    def tick(self, now: float) -> list[Output]:
        """End what is over."""
        outputs: list[Output] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, pair_id = heappop(self._deadlines)
            pair = self._pairs.get(pair_id)
            if pair is None:
                continue
            ends_at, reason = self._end_of(pair)
            if ends_at <= now:
                outputs += self._end(pair, reason)
            else:
                heappush(self._deadlines, (ends_at, pair_id))
        return outputs

    def _end_of(self, pair: _Pair) -> tuple[float, Expiry]:
        """When the pair ends if nothing more happens, and why; it only ever moves later."""
        if any(side.source is None for side in pair.sides):
            return pair.made_at + self.limits.bind_s, Expiry.UNBOUND
        abandoned_at = min(side.bound_at for side in pair.sides) + self.limits.lifetime_s
        idle_at = pair.active_at + self.limits.idle_s
        return min((abandoned_at, Expiry.ABANDONED), (idle_at, Expiry.IDLE), key=lambda end: end[0])

    def _end(self, pair: _Pair, reason: Expiry) -> list[Output]:
        a, b = pair.sides
        del self._pairs[pair.id], self._by_port[a.ticket.port], self._by_port[b.ticket.port]
        self._held[a.owner] -= 1
        if not self._held[a.owner]:
            del self._held[a.owner]
        return [ClosePair(a.ticket.port), RelayExpired(pair.id, a.owner, b.owner, reason)]

    # --- tickets, nonces, quotas

    def _ticket(self, port: int, pair_id: bytes, side: str) -> RelayTicket:
        return RelayTicket(port, f"{pair_id.hex()}.{side}", Secret(self._entropy(KEY_BYTES)), self.limits.lifetime_s)

    def _slot(self, now: float) -> int:
        return int(now // self.limits.nonce_s)

    def _nonce(self, side: _Side, source: Endpoint, slot: int) -> bytes:
        text = f"{slot} {side.ticket.username} {source}".encode()
        return hmac.digest(self._nonce_key, text, "sha256").hex()[:NONCE_BYTES].encode()

    def _nonce_holds(self, nonce: bytes, side: _Side, source: Endpoint, now: float) -> bool:
        slot = self._slot(now)
        return any(hmac.compare_digest(nonce, self._nonce(side, source, made)) for made in (slot, slot - 1))

    def _rate(self, owner: PeerId) -> TokenBucket:
        return _bucket(self._rates, owner, self.limits.allocations_per_minute / 60.0, self.limits.allocation_burst)

    def _volume(self, owner: PeerId) -> TokenBucket:
        return _bucket(self._volumes, owner, self.limits.bytes_per_second, self.limits.byte_burst)

    def _refusal(self, owner: PeerId, now: float) -> Refusal | None:
        if len(self._pairs) >= self.limits.allocations:
            return Refusal.FULL
        if self._held.get(owner, 0) >= self.limits.allocations_per_peer:
            return Refusal.PEER_FULL
        if not self._rate(owner).has(now):
            return Refusal.RATE
        if not self._volume(owner).has(now, self.limits.bytes_per_second):
            return Refusal.BYTES
        return None


def _bucket(table: BoundedTable[PeerId, TokenBucket], owner: PeerId, rate: float, burst: float) -> TokenBucket:
    bucket = table.get(owner)
    if bucket is None:
        bucket = TokenBucket(rate, burst)
        table.put(owner, bucket)
    return bucket
