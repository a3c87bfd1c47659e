"""A peer's side of the relay: binds with a ticket, keeps the binding and the NAT's mapping alive, says when it is lost.

The path `(our endpoint, relay endpoint)` stands for the other peer once both sides are bound: raw ESP and IKE go over
it. STUN answers of the relay come over it too; they are known by their transaction ID, everything else is the peer's.

    BINDING     requests leave after 0, 50, 150, 350 ms and so on; each is a new transaction with a higher counter, so
                that it is worth something to the relay even if a NAT changed its mapping in between
    READY       quiet until the next refresh is due
    REFRESHING  as BINDING, while the path stays usable
    LOST        nothing is sent; `bind` starts again, from a new address or the old one
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from p2pvpn.core import stun
from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.datagram import Kind, classify
from p2pvpn.core.errors import TrustError, WireError
from p2pvpn.core.output import Event, Output, Transmit
from p2pvpn.core.ports import Entropy
from p2pvpn.core.timers import TimerTable

from .binding import NONCE_BYTES, UNAUTHENTICATED, build_request
from .wire import MARK, RelayTicket, transaction_id

RTO_S = 0.05
"""First retransmission: the call already cost round trips to this hub, and a lost bind delays the first packet."""
MAX_RTO_S = 1.6
"""Longest pause between two requests, so that a path that comes back is noticed within two seconds."""
MAX_SENDS = 8
"""Requests of one attempt; the last wait ends 6.35 s after the first request."""
MAX_CHALLENGES = 3
"""Nonces accepted in one attempt: one is the rule, a second when it expired on the way; more is a broken relay."""
REFRESH_S = 20.0
"""Between binds: below the 30 s after which the impatient kind of NAT forgets a UDP mapping."""
MOST_REFRESH_S = 60.0
"""However patient the NAT: the relay ends an allocation that three of these left idle."""


class Loss(Enum):
    """Why a relayed path is gone."""

    SILENT = "the relay does not answer"
    REFUSED = "the relay refuses the ticket"


@dataclass(frozen=True, slots=True)
class RelayReady(Event):
    """The path is bound. `mapped` is our address as the relay sees it, `rtt_s` the round trip to the relay."""

    path: Path
    mapped: Endpoint
    rtt_s: float


@dataclass(frozen=True, slots=True)
class RelayLost(Event):
    """The path is not bound any more, or never was."""

    path: Path
    reason: Loss


class _State(Enum):
    LOST = "lost"
    BINDING = "binding"
    READY = "ready"
    REFRESHING = "refreshing"


class _Timer(Enum):
    RETRANSMIT = "the last request was not answered"
    REFRESH = "the binding and the NAT's mapping want to be used"


class RelayClient:
    """One side's binding at one relay, under one ticket."""

    def __init__(self, ticket: RelayTicket, path: Path, entropy: Entropy, *, refresh_s: float = REFRESH_S) -> None:
        """`path.remote` is the relay's endpoint; its port is the ticket's."""
        self.ticket = ticket
        self.path = path
        self._entropy = entropy
        self.refresh_s = refresh_s
        self._state = _State.LOST
        self._timers: TimerTable[_Timer] = TimerTable()
        self._counter = 0
        self._nonce = b""
        self._sends = 0
        self._rto_s = RTO_S
        self._challenges = 0
        self._pending: dict[bytes, float] = {}
        self._ready: RelayReady | None = None

    @property
    def is_ready(self) -> bool:
        return self._state in (_State.READY, _State.REFRESHING)

    @property
    def mapped(self) -> Endpoint | None:
        """Our address as the relay last saw it."""
        return self._ready.mapped if self._ready else None

    def bind(self, now: float) -> list[Output]:
        """Start over on the present path."""
        self._state = _State.BINDING
        self._ready = None
        self._rto_s = RTO_S
        return self._attempt(now)

    def rebind(self, now: float, local: Endpoint | None = None) -> list[Output]:
        """The network changed: prove ourselves again at once, from `local` if it is given. What is bound stays in use
        until the relay answers.
        """
        if local is not None:
            self.path = Path(local, self.path.remote)
        self._state = _State.REFRESHING if self.is_ready else _State.BINDING
        self._ready = None
        return self._attempt(now)

    def handle(self, path: Path, data: bytes, now: float) -> list[Output] | None:
        """A datagram; None if it is not an answer of the relay to us, and so somebody else's to look at."""
        if path.remote != self.path.remote or classify(data) is not Kind.STUN or data[8:12] != MARK:
            return None
        if data[8:20] not in self._pending:
            return []  # late, after another answer of the same attempt
        try:
            message = stun.parse_untrusted(data)
            stun.verify(message, self.ticket.key.reveal())
            if message.message_class is stun.Class.RESPONSE:
                return self._succeeded(message, now)
            if message.message_class is stun.Class.ERROR:
                return self._refused(message, now)
        except (WireError, TrustError):
            pass
        return []

    def next_deadline(self) -> float | None:
        return self._timers.next_deadline()

    def tick(self, now: float) -> list[Output]:
        outputs: list[Output] = []
        for timer in self._timers.pop_due(now):
            if timer is _Timer.REFRESH:
                self._state = _State.REFRESHING
                outputs += self._attempt(now)
            elif self._sends < MAX_SENDS:
                outputs += self._send(now)
            else:
                outputs += self._lose(Loss.SILENT)
        return outputs

    def _attempt(self, now: float) -> list[Output]:
        self._sends = self._challenges = 0
        self._pending.clear()
        self._timers.clear_all()
        return self._send(now)

    def _send(self, now: float) -> list[Output]:
        self._counter += 1
        transaction = transaction_id(self._counter, self._entropy(4))
        self._pending[transaction] = now
        self._timers.set(_Timer.RETRANSMIT, now + min(self._rto_s * 2**self._sends, MAX_RTO_S))
        self._sends += 1
        return [Transmit(self.path, build_request(self.ticket, transaction, self._nonce))]

    def _succeeded(self, message: stun.Message, now: float) -> list[Output]:
        mapped = stun.mapped_address(message)
        ready = RelayReady(self.path, mapped, max(0.0, now - self._pending[message.transaction_id]))
        news = self._ready is None or (self._ready.path, self._ready.mapped) != (ready.path, ready.mapped)
        self._state, self._ready = _State.READY, ready
        self._rto_s = max(RTO_S, 1.5 * ready.rtt_s)
        self._pending.clear()
        self._timers.clear_all()
        self._timers.set(_Timer.REFRESH, now + min(self.refresh_s, MOST_REFRESH_S, self.ticket.lifetime_s / 4))
        return [ready] if news else []

    def _refused(self, message: stun.Message, now: float) -> list[Output]:
        nonce = message.attributes.get("NONCE", b"")
        if message.error_code != UNAUTHENTICATED or len(nonce) != NONCE_BYTES:
            return self._lose(Loss.REFUSED)
        del self._pending[message.transaction_id]
        if nonce == self._nonce:
            return []
        if self._challenges == MAX_CHALLENGES:
            return self._lose(Loss.REFUSED)
        self._challenges += 1
        self._nonce = nonce
        self._sends = 0
        return self._send(now)

    def _lose(self, reason: Loss) -> list[Output]:
        self._state, self._ready = _State.LOST, None
        self._pending.clear()
        self._timers.clear_all()
        return [RelayLost(self.path, reason)]


class RelayClients:
    """All bindings of one peer, by the relay's endpoint: routes inbound STUN, folds timers and outputs."""

    def __init__(self, entropy: Entropy) -> None:
        self.refresh_s = REFRESH_S
        """Of bindings that are opened from now on."""
        self._entropy = entropy
        self._clients: dict[Endpoint, RelayClient] = {}

    def __len__(self) -> int:
        return len(self._clients)

    def at(self, relay: Endpoint) -> RelayClient | None:
        """The binding at this relay endpoint."""
        return self._clients.get(relay)

    def open(self, ticket: RelayTicket, path: Path, now: float) -> list[Output]:
        """Bind with a ticket over `path`, which leads to the ticket's port; a former binding there is gone."""
        client = self._clients[path.remote] = RelayClient(ticket, path, self._entropy, refresh_s=self.refresh_s)
        return client.bind(now)

    def close(self, relay: Endpoint) -> None:
        """Forget the binding; the relay ends it for want of refreshes, or when it is told to."""
        self._clients.pop(relay, None)

    def refresh_every(self, refresh_s: float) -> None:
        """Bindings are refreshed so often from their next refresh on; a shorter pause wants `network_changed` too."""
        self.refresh_s = refresh_s
        for client in self._clients.values():
            client.refresh_s = refresh_s

    def network_changed(self, now: float) -> list[Output]:
        """Bind all again at once: our addresses or our NAT may be others now."""
        return [output for client in self._clients.values() for output in client.rebind(now)]

    def route(self, path: Path, data: bytes, now: float) -> list[Output] | None:
        """An inbound STUN datagram; None if it is no answer to a bind of ours."""
        client = self._clients.get(path.remote)
        return client.handle(path, data, now) if client else None

    def next_deadline(self) -> float | None:
        return min((at for c in self._clients.values() if (at := c.next_deadline()) is not None), default=None)

    def tick(self, now: float) -> list[Output]:
        return [output for client in list(self._clients.values()) for output in client.tick(now)]
