"""All IKE SAs behind one UDP port: routing by SPI, floods of half-open SAs, deadlines.

The caller hands in datagrams without their non-ESP marker and executes the outputs of each call, in order, before the
next. Unknown SPIs get no answer. An IKE_SA_INIT request costs no memory until it is well-formed, carries a cookie when
one is due, offers something acceptable, and its sender has not too many half-open SAs already.
"""

from __future__ import annotations

import contextlib
import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from p2pvpn.core.address import Path
from p2pvpn.core.errors import LocalError, TrustError, WireError
from p2pvpn.core.limits import SourceLimiter, TokenBucket
from p2pvpn.core.output import Output, Transmit
from p2pvpn.core.ports import Entropy
from p2pvpn.core.secret import Secret
from p2pvpn.core.selector import Selector

from .codes import Exchange
from .config import Credential, IkeSettings, Initiate, Local, RemoteIdentity
from .doorstep import Doorstep, InitCounts, cookie_answer, network_of
from .keylog import KeySink
from .message import (
    NO_SPI,
    SPI_BYTES,
    CriticalPayloadError,
    Header,
    VersionError,
    build_clear,
    notifications,
    parse_clear_untrusted,
    parse_header_untrusted,
)
from .notifies import Notify, NotifyType
from .outputs import Refused
from .receiving import receive
from .rules import check_untrusted
from .sa import IkeSa
from .states import State, Step
from .tasks import init
from .tasks.task import Received, Refusal
from .timing import tick

LIMITED_SOURCES = 4096
"""Sources whose error answers are counted."""
REFUSALS_PER_S = 1.0
"""Events about refused strangers."""


@dataclass(frozen=True, slots=True)
class SaView:
    """What can be told about an SA."""

    id: int
    spi_i: bytes
    spi_r: bytes
    initiator: bool
    """Whether we began; for an SA that was rekeyed, whether we began the first one."""
    path: Path
    state: str
    network: str | None
    suite: str
    established_at: float | None
    remote: RemoteIdentity | None
    child_ids: tuple[int, ...]
    mobike: bool
    local_nat: bool
    remote_nat: bool


class IkeEndpoint:
    """Every IKE SA of a machine, in either role.

    `next_child_id` numbers Child SAs and `allocate_spi` gives inbound ESP SPIs; neither ever repeats itself. `key_sink`
    gets the keys of everything (module `keylog`), and whoever gives one says so loudly.
    """

    def __init__(
        self,
        settings: IkeSettings,
        entropy: Entropy,
        next_child_id: Callable[[], int],
        allocate_spi: Callable[[], int],
        key_sink: KeySink | None = None,
    ) -> None:
        self._local = Local(
            settings,
            entropy,
            next_child_id,
            allocate_spi,
            fresh_spi=self._fresh_spi,
            next_sa_id=self._next_id,
            key_sink=key_sink,
        )
        self._last_id = 0
        self._by_id: dict[int, IkeSa] = {}
        self._by_spi: dict[bytes, IkeSa] = {}
        self._doorstep = Doorstep(settings, entropy)
        self._deadlines: list[tuple[float, int]] = []
        self._scheduled: dict[int, float] = {}
        self._errors: SourceLimiter[str] = SourceLimiter(
            settings.error_answers_per_s, 2 * settings.error_answers_per_s, LIMITED_SOURCES
        )
        self._refusals = TokenBucket(REFUSALS_PER_S, 10 * REFUSALS_PER_S)

    def set_credentials(self, credentials: Sequence[Credential]) -> None:
        """Replaces those that answer from now on; SAs that stand keep theirs."""
        self._local.credentials = tuple(credentials)

    # Wishes of the engine; those about an SA that is gone do nothing

    def initiate(self, request: Initiate, now: float) -> tuple[int, list[Output]]:
        """Begins an SA; returns its local id. Raises LocalError when there are too many."""
        if len(self._by_id) >= self._local.settings.sa_max:
            raise LocalError("too many IKE SAs")
        sa = IkeSa(
            self._local,
            self._next_id(),
            request.path,
            initiator=True,
            spi_i=self._fresh_spi(),
            spi_r=NO_SPI,
            tag=request.tag,
        )
        self._add(sa)
        sa.begin(init.InitRequest(self._local, request), now)
        return sa.id, self._collect(sa, now)

    def go_on(self, sa_id: int, path: Path, answer: bytes, now: float) -> list[Output]:
        """The IKE_SA_INIT request of this SA was carried to the peer by other means, and this is the answer, or
        nothing: everything else goes over `path`, the request itself too while it is not answered.
        """
        return self._with(sa_id, now, lambda sa: _go_on(sa, path, answer, now))

    def move(self, sa_id: int, path: Path, now: float, *, eager: bool = False) -> list[Output]:
        """MOBIKE to another path, for the original initiator alone. Ends in SaMoved or MoveFailed.

        To the path in use: the peer learns where a NAT makes us appear now; only a failure is told. With `eager`, Child
        SAs go over the new path from now on: the old one is dead.
        """
        return self._with(sa_id, now, lambda sa: sa.move(path, now, eager=eager))

    def appeal(self, sa_id: int, path: Path, notifies: Sequence[Notify], now: float) -> list[Output]:
        """The responder's way out of a dead path: these go to the peer over another one, which our side then uses
        (SaMoved), and the peer, hearing of it by Informed, moves the SA there. A failure is not told.
        """
        return self._with(sa_id, now, lambda sa: sa.appeal(path, tuple(notifies), now))

    def adopt(self, sa_id: int, path: Path, now: float) -> list[Output]:
        """Use this path from now on without asking: for a NAT's new port in front of a peer without MOBIKE."""
        return self._with(sa_id, now, lambda sa: sa.adopt(path, now))

    def rekey(self, sa_id: int, now: float) -> list[Output]:
        """Fresh keys for the IKE SA: SaRekeyed or RekeyFailed. Its local id and Child SAs stay; `export` changes."""
        return self._with(sa_id, now, lambda sa: sa.rekey(now))

    def rekey_child(self, sa_id: int, child_id: int, now: float) -> list[Output]:
        """A replacement for a Child SA: ChildRekeyed, ChildFailed, or ChildClosed when the peer does not know it."""
        return self._with(sa_id, now, lambda sa: sa.rekey_child(child_id, now))

    def add_child(
        self, sa_id: int, local: tuple[Selector, ...], remote: tuple[Selector, ...], now: float
    ) -> list[Output]:
        """One more Child SA: ChildAdded or ChildFailed. Raises LocalError like `inform`."""
        return self._with(sa_id, now, lambda sa: sa.add_child(local, remote, now))

    def close_child(self, sa_id: int, child_id: int, now: float) -> list[Output]:
        """DELETE of one Child SA: RemoveChild some time after the peer has answered."""
        return self._with(sa_id, now, lambda sa: sa.close_child(child_id, now))

    def inform(self, sa_id: int, notifies: Sequence[Notify], now: float) -> list[Output]:
        """An INFORMATIONAL with these. Raises LocalError when too many wait, or the SA is not established."""
        return self._with(sa_id, now, lambda sa: sa.inform(tuple(notifies), now))

    def probe(self, sa_id: int, now: float) -> list[Output]:
        """A liveness check now: Liveness, or in the end SaClosed."""
        return self._with(sa_id, now, lambda sa: sa.probe(now))

    def resend(self, sa_id: int, now: float) -> list[Output]:
        """The way to the peer is open from now on: send the request under way once more."""
        return self._with(sa_id, now, lambda sa: sa.resend(now))

    def trust_silence(self, sa_id: int, liveness_s: float, now: float) -> list[Output]:
        """Probe the peer of this SA only after so long a silence: others than IKE look after it."""

        def change(sa: IkeSa) -> None:
            sa.liveness_s = liveness_s
            sa.heard(now)

        return self._with(sa_id, now, change)

    def heard(self, sa_id: int, now: float) -> list[Output]:
        """ESP of this SA arrived: puts the next liveness check off."""
        return self._with(sa_id, now, lambda sa: sa.heard(now))

    def close(self, sa_id: int, now: float, reason: str) -> list[Output]:
        """DELETE. Child SAs go when it is answered (or nobody answers), then SaClosed."""
        return self._with(sa_id, now, lambda sa: sa.close(reason, now))

    def drop(self, sa_id: int) -> list[Output]:
        """Forget the SA without a message: RemoveChild effects, no event."""
        return self._with(sa_id, 0.0, lambda sa: sa.drop())

    def export(self, sa_id: int, label: bytes, length: int) -> Secret:
        """A secret that both ends of the SA derive alike. Raises LocalError when the SA is not established."""
        sa = self._by_id.get(sa_id)
        if sa is None:
            raise LocalError("there is no such SA")
        return sa.export(label, length)

    def view(self, sa_id: int) -> SaView | None:
        sa = self._by_id.get(sa_id)
        if sa is None:
            return None
        return SaView(
            id=sa.id,
            spi_i=sa.spi_i,
            spi_r=sa.spi_r,
            initiator=sa.dialled,
            path=sa.path,
            state=sa.state.name,
            network=sa.credential.network if sa.credential is not None else None,
            suite="" if sa.suite is None else str(sa.suite),
            established_at=sa.established_at,
            remote=sa.remote if sa.established_at is not None else None,
            child_ids=tuple(sa.children),
            mobike=sa.peer.mobike,
            local_nat=sa.peer.local_nat,
            remote_nat=sa.peer.remote_nat,
        )

    def sa_ids(self) -> list[int]:
        """Those that mean something to the engine; an SA that was rekeyed lives on for a moment without."""
        return [sa.id for sa in self._by_id.values() if not sa.silent]

    # Datagrams and time

    def handle(self, path: Path, data: bytes, now: float) -> list[Output]:
        """A datagram that came over `path` (its local endpoint is the one it came to)."""
        try:
            header, _ = parse_header_untrusted(data)
        except VersionError:
            return self._refuse_version(path, data, now)
        except WireError:
            return []
        sa = self._by_spi.get(header.spi_r if header.initiator else header.spi_i)
        if sa is not None:
            receive(sa, path, header, data, now)
            return self._collect(sa, now)
        return self._handle_init(path, header, data, now) if self._is_new(header) else []

    def handle_carried(self, path: Path, data: bytes, now: float) -> list[Output]:
        """An IKE_SA_INIT request that an authenticated party carried here: its `path` is no way over the network but
        stands for who sent it, who needs no cookie to prove it. Anything else is dropped.
        """
        try:
            header, _ = parse_header_untrusted(data)
        except (VersionError, WireError):
            return []
        return self._handle_init(path, header, data, now, is_carried=True) if self._is_new(header) else []

    def _is_new(self, header: Header) -> bool:
        is_request = header.exchange == Exchange.IKE_SA_INIT and header.initiator and not header.response
        is_reflected = header.spi_i in self._by_spi
        return is_request and header.spi_r == NO_SPI and header.message_id == 0 and not is_reflected

    def next_deadline(self) -> float | None:
        """When `tick` has something to do, or None."""
        while self._deadlines:
            at, sa_id = self._deadlines[0]
            sa = self._by_id.get(sa_id)
            is_live = sa is not None and self._scheduled.get(sa_id) == at
            if sa is not None and is_live and sa.next_deadline() == at:
                return at
            heapq.heappop(self._deadlines)
            if sa is not None and is_live:
                del self._scheduled[sa_id]
                self._schedule(sa)
        return None

    def tick(self, now: float) -> list[Output]:
        """All that is due."""
        out: list[Output] = []
        while (at := self.next_deadline()) is not None and at <= now:
            sa = self._by_id[heapq.heappop(self._deadlines)[1]]
            self._scheduled.pop(sa.id, None)
            tick(sa, now)
            out += self._collect(sa, now)
        return out

    def _schedule(self, sa: IkeSa) -> None:
        """An SA has one live entry in the heap: never later than its deadline, put right when it comes to the top."""
        at = sa.next_deadline()
        if at is not None and at < self._scheduled.get(sa.id, math.inf):
            self._scheduled[sa.id] = at
            heapq.heappush(self._deadlines, (at, sa.id))

    # IKE_SA_INIT of strangers

    def screen(self, source: tuple[str, int], data: bytes, now: float) -> bytes | None:
        """What to send back at once, while strangers crowd in and this is one of them; None: hand it to `handle`.

        Empty bytes say that it gets no answer at all. `source` has its host in normal form, as `Endpoint` does.
        """
        return self._doorstep.screen(source, data, now)

    @property
    def init_counts(self) -> InitCounts:
        """What strangers asked for so far."""
        return self._doorstep.counts

    @property
    def half_open(self) -> int:
        """SAs whose initiator has not proved who it is."""
        return self._doorstep.half_open

    def _handle_init(
        self, path: Path, header: Header, data: bytes, now: float, *, is_carried: bool = False
    ) -> list[Output]:
        doorstep, host = self._doorstep, path.remote.host
        doorstep.counts.requests += 1
        known = doorstep.known(path.remote, data)
        if known is not None:
            known.repeat_init(path, now)
            return self._collect(known, now)
        if not self._local.credentials or len(self._by_id) >= self._local.settings.sa_max:
            return []
        try:
            if not is_carried and doorstep.is_crowded(host):
                wanted = doorstep.cookie_untrusted(host, data, now)
                if wanted is not None:
                    return [Transmit(path, cookie_answer(data, wanted))]
            if doorstep.is_full(host):
                return []
            return self._answer_init(path, data, now)
        except Refusal as refusal:
            return self._error(path, header, refusal.notify, now)
        except CriticalPayloadError as problem:
            kind = Notify(NotifyType.UNSUPPORTED_CRITICAL_PAYLOAD, bytes([problem.kind]))
            return self._error(path, header, kind, now)
        except (WireError, TrustError):
            return self._error(path, header, Notify(NotifyType.INVALID_SYNTAX), now)

    def _answer_init(self, path: Path, data: bytes, now: float) -> list[Output]:
        """A new half-open SA.

        An initiator that begins anew (with a cookie, say) gets one more: somebody else may have made it do so, and the
        answer to its first request may be the one that it goes by.
        """
        message = parse_clear_untrusted(data)
        check_untrusted(message)
        choice = init.choose_untrusted(self._local.settings, message, path)
        header = message.header
        sa = IkeSa(self._local, self._next_id(), path, initiator=False, spi_i=header.spi_i, spi_r=self._fresh_spi())
        sa.answer_init(init.answer(sa, Received(message, path, data), choice), path, now)
        self._doorstep.enter(sa, path.remote, data)
        self._add(sa)
        return self._collect(sa, now)

    def _refuse_version(self, path: Path, data: bytes, now: float) -> list[Output]:
        """INVALID_MAJOR_VERSION in answer to a request of a later IKE (RFC 7296 section 2.5)."""
        header = Header(data[:SPI_BYTES], data[SPI_BYTES : 2 * SPI_BYTES], data[18], True, False, 0)
        is_request = not data[19] & 0x20
        if not is_request or header.spi_r != NO_SPI:
            return []
        return self._error(path, header, Notify(NotifyType.INVALID_MAJOR_VERSION), now)

    def _error(self, path: Path, header: Header, notify: Notify, now: float) -> list[Output]:
        if not self._errors.take(network_of(path.remote.host), now):
            return []
        return [self._say(path, header, notify)]

    def _say(self, path: Path, header: Header, notify: Notify) -> Transmit:
        """One unprotected notification in answer to IKE_SA_INIT."""
        answer = Header(header.spi_i, NO_SPI, header.exchange, False, True, header.message_id)
        return Transmit(path, build_clear(answer, notifications([notify])))

    # Tables

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _fresh_spi(self) -> bytes:
        while True:
            spi = self._local.entropy(SPI_BYTES)
            if spi != NO_SPI and spi not in self._by_spi:
                return spi

    def _add(self, sa: IkeSa) -> None:
        self._by_id[sa.id] = sa
        self._by_spi[sa.local_spi] = sa

    def _with(self, sa_id: int, now: float, act: Callable[[IkeSa], None]) -> list[Output]:
        sa = self._by_id.get(sa_id)
        if sa is None:
            return []
        act(sa)
        return self._collect(sa, now)

    def _collect(self, sa: IkeSa, now: float) -> list[Output]:
        """The outputs of the SA and of its kin; the tables follow what became of them."""
        if not sa.is_half_open or sa.state is State.CLOSED:
            self._doorstep.leave(sa)
        out: list[Output] = []
        family = [sa, *sa.kin]
        for one in family:
            out += one.drain()
            self._add(one)
        if sa.contact_is_initial and sa.state is State.ESTABLISHED:
            sa.contact_is_initial = False
            out += self._forget_others(sa, now)
        for one in family:
            if one.state is State.CLOSED:
                self._forget(one)
            else:
                self._schedule(one)
        return [one for one in out if not isinstance(one, Refused) or self._refusals.take(now)]

    def _forget_others(self, sa: IkeSa, now: float) -> list[Output]:
        """INITIAL_CONTACT: SAs of the same two authenticated identities are gone at the other end."""
        out: list[Output] = []
        for other in list(self._by_id.values()):
            if other is sa or other.silent or other.state is not State.ESTABLISHED:
                continue
            if other.remote is None or sa.remote is None or other.remote.id != sa.remote.id:
                continue
            if other.credential is not None and other.credential is sa.credential:
                other.end(Step.DROPPED, "the peer began anew", now)
                out += self._collect(other, now)
        return out

    def _forget(self, sa: IkeSa) -> None:
        self._by_id.pop(sa.id, None)
        self._by_spi.pop(sa.local_spi, None)
        self._scheduled.pop(sa.id, None)
        self._doorstep.forget(sa)
        for one in sa.kin:
            one.kin.remove(sa)
        sa.kin = []


def _go_on(sa: IkeSa, path: Path, answer: bytes, now: float) -> None:
    """Takes an IKE SA whose first request waits from where it was carried to a path."""
    if sa.state is not State.INIT_SENT:
        return
    sa.path = path
    with contextlib.suppress(VersionError, WireError):
        header, _ = parse_header_untrusted(answer)
        receive(sa, path, header, answer, now)
    waiting = sa.requests.outstanding
    if waiting is not None and waiting.path != path:
        sa.redirect(path, waiting.limit, now)
