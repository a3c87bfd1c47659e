"""The punching agent of one peer session: finds direct paths, nominates the best, watches it, and finds the next.

An ICE agent after RFC 8445 for one component on a shared socket, with these changes, none of which a strict RFC agent
on the other side notices:

- The relayed path is not a candidate: the engine keeps it below, so checks can be dense and verdicts quick.
- Nothing ever ends. Pairs that failed are tried again with backoff, pairs that work are measured now and then, and the
  controlling side nominates again when another path is clearly better. Every check on the chosen path carries
  USE-CANDIDATE, so a nomination that got lost or was overtaken on the way is repaired by the next one.
- The controlling side says PathNominated when it decides. The pair has answered, so both directions work.
- A check that arrives is answered and returned at once, not queued for Ta: it costs one packet for one packet.
- Requests that do not authenticate get no answer (RFC 8489 section 9.1.3 would send 400 or 401): the socket is shared,
  and strangers need not learn who is on it.

Requests prove themselves by our password, answers by the peer's and by a transaction of ours; nothing else changes
anything. A request seen before is answered again and otherwise ignored.
"""

from __future__ import annotations

from collections.abc import Sequence

from p2pvpn.core import stun
from p2pvpn.core.address import Path
from p2pvpn.core.errors import TrustError, WireError
from p2pvpn.core.limits import BoundedTable, TokenBucket
from p2pvpn.core.output import Output
from p2pvpn.core.ports import Entropy

from .candidates import Candidate
from .checklist import CheckList
from .choice import Choice
from .credentials import IceCredentials
from .events import PathLost, PathNominated, PathSilent, PunchFailed
from .limits import TA_S, PunchLimits
from .messages import ROLE_CONFLICT, Messages
from .outbox import Outbox, SentCheck
from .pair import Pair, PairInput, PairReport, PairState
from .settings import PunchSettings

MAX_SEEN = 128
"""Requests remembered against replay, at one in 5 s about ten minutes. A replay older than that is worth one packet."""
MAX_EARLY = 16
"""Paths on which checks arrived before `start`."""
MAX_LEARNED_FAILURES = 7
"""Rounds after which a path that no candidate names is forgotten: two minutes of backoff."""
ALTERNATIVES = 2
"""Working paths besides the chosen one that are kept warm."""
LEARNED_PER_S, LEARNED_BURST = 0.2, 8.0
"""Paths learned from checks that come from elsewhere. Between two NATs that map by port and let everybody in, every
check in return opens one more port, to which the other side's check in return opens one more, for ever."""
CROSSING_S = 0.005
"""Checks of both sides that cross within this time need no second one."""


class PunchAgent:
    """`controlling` is the RFC 8445 role (the original initiator of the IKE SA); `tie_breaker` has 64 random bits.

    `limits` is the machine's one `PunchLimits`. All times are monotonic seconds.
    """

    def __init__(
        self,
        *,
        controlling: bool,
        credentials: IceCredentials,
        tie_breaker: int,
        entropy: Entropy,
        limits: PunchLimits,
        settings: PunchSettings | None = None,
    ) -> None:
        self.credentials = credentials
        self._settings = settings or PunchSettings()
        self._messages = Messages(credentials, tie_breaker, entropy, controlling=controlling)
        self._entropy = entropy
        self._limits = limits
        self.checks = CheckList(limits)
        self._choice = Choice(self._settings)
        self.outbox = Outbox(self._messages, limits)
        self._seen: BoundedTable[bytes, None] = BoundedTable(MAX_SEEN)
        self._early: BoundedTable[Path, bool] = BoundedTable(MAX_EARLY)
        self._learning = TokenBucket(LEARNED_PER_S, LEARNED_BURST)
        self._give_up_at: float | None = None
        self._overdue = False
        self._nominations = 0
        self._started = False
        self._closed = False
        self._slot_at: float | None = None

    # The session

    def attest(self, host: str, hub: bytes = b"") -> None:
        """A hub says that the peer's tunnel comes from this address: what others leave unanswered there is not the
        peer's fault (`PunchLimits`)."""
        self.outbox.attest(host, hub)

    @property
    def selected(self) -> Path | None:
        """The chosen direct path, if there is one."""
        return self._selected.path if self._selected else None

    @property
    def is_silent(self) -> bool:
        """Whether the chosen path owes us an answer."""
        return self._selected is not None and self._selected.misses > 0

    @property
    def _selected(self) -> Pair | None:
        return self._choice.selected

    @property
    def controlling(self) -> bool:
        """The role now; a conflict of roles may switch it."""
        return self._messages.controlling

    @property
    def tag(self) -> bytes:
        """How the transaction IDs of all our checks begin."""
        return self._messages.tag

    def draw_tag(self) -> None:
        """Take another tag; before `start` only."""
        self._messages.draw_tag()

    def start(self, local: Sequence[Candidate], remote: Sequence[Candidate], now: float) -> list[Output]:
        """Begin checking; candidates may be incomplete, or none yet. Checks that came before are taken up."""
        if self._closed or self._started:
            return []
        self._started = True
        self._change(local, remote, now)
        for path, nominated in self._early.items():
            self._take_check(path, nominated, now)
        self._early = BoundedTable(1)
        return self._finish(now)

    def update_local(self, local: Sequence[Candidate], now: float) -> list[Output]:
        """Our addresses changed: these are all of them. The chosen path is verified, other working ones prove
        themselves again, paths from an address that is gone are lost at once."""
        if self._closed or not self._started:
            return []
        self._change(local, self.checks.remote, now)
        for pair in self.checks.within(PairState.VALID):
            if pair is self._selected:
                self._verify(pair, now)
            else:
                pair.apply(PairInput.DOUBT)
                pair.begin_round(now, self._settings.check_offsets_s)
        return self._finish(now)

    def update_remote(self, remote: Sequence[Candidate], now: float) -> list[Output]:
        """The peer's candidates changed: these are all of them. Failed pairs are tried again at once, and the chosen
        path is verified when the peer does not name its end any more."""
        if self._closed or not self._started:
            return []
        self._change(self.checks.local, remote, now)
        if self._selected is not None and not self._selected.signalled:
            self._verify(self._selected, now)
        return self._finish(now)

    def suggest(self, path: Path, now: float) -> list[Output]:
        """The peer is reached over this path now, as others know: it is worth a check."""
        self.checks.suggest(path)
        return [] if self._closed else self._finish(now)

    def verify(self, now: float) -> list[Output]:
        """The chosen path is in doubt: check it now. PathSilent, then PathLost within about a second, or nothing."""
        if self._selected is not None and not self._closed:
            self._verify(self._selected, now)
        return [] if self._closed else self._finish(now)

    def close(self) -> list[Output]:
        """The session is over: nothing is sent or answered any more."""
        self._closed = True
        self._choice.drop()
        self.outbox.take()
        return []

    def report(self) -> list[PairReport]:
        """Every pair, best priority first."""
        return self.checks.report(self._selected, self.controlling)

    # Input: packets and time

    def handle(self, path: Path, message: stun.Message, now: float) -> list[Output]:
        """A STUN message that the mux found to be for this agent."""
        if self._closed:
            return []
        try:
            if message.message_class is stun.Class.REQUEST:
                self._handle_request(path, message, now)
            elif message.message_class in (stun.Class.RESPONSE, stun.Class.ERROR):
                self._handle_answer(path, message, now)
        except (TrustError, WireError):
            pass  # Nobody we know said it.
        return self._finish(now)

    def next_deadline(self) -> float | None:
        """When `tick` wants to be called, in monotonic seconds."""
        if self._closed:
            return None
        times = [self._choice.next_deadline(), self._give_up_at, *(pair.next_at for pair in self.checks.pairs)]
        if self.checks.within(PairState.WAITING):
            times.append(self._slot_at)
        return min((at for at in times if at is not None), default=None)

    def tick(self, now: float) -> list[Output]:
        """Do what is due."""
        if self._closed:
            return []
        self._choice.tick(now)
        if self._give_up_at is not None and self._give_up_at <= now:
            self._give_up_at = None
            self._overdue = True
        for pair in self.checks.pairs:
            if pair.next_at is None or pair.next_at > now:
                continue
            if pair.state is PairState.CHECKING:
                self._continue_round(pair, now)
            elif pair.state is PairState.VALID:
                self._continue_probe(pair, now)
            elif pair.state is PairState.FAILED:
                self._retry(pair)
        return self._finish(now)

    def _finish(self, now: float) -> list[Output]:
        """Every input ends here, with the choices that follow from it."""
        self._start_next(now)
        if self.controlling:
            self._decide(now)
        hopeful = self._selected or self.checks.within(PairState.WAITING, PairState.CHECKING, PairState.VALID)
        if self._overdue and not hopeful:
            self._overdue = False
            count = len(self.checks)
            self.outbox.say(PunchFailed(f"none of {count} pairs answered" if count else "no pair to check"))
        return self.outbox.take()

    # Requests of the peer

    def _handle_request(self, path: Path, message: stun.Message, now: float) -> None:
        nominates = self._messages.open_request(message)
        if not path.remote.port:
            return
        seen = message.transaction_id in self._seen
        if not seen and not self._messages.yields_to(message):
            self.outbox.send(path, self._messages.conflict(message))
            return
        self.outbox.send(path, self._messages.answer(message, path.remote))
        if seen:
            return
        self._seen.put(message.transaction_id, None)
        if self._started:
            self._take_check(path, nominates, now)
        else:
            self._early.put(path, nominates or bool(self._early.peek(path)))

    def _take_check(self, path: Path, nominated: bool, now: float) -> None:
        """An authenticated check: the peer can send here (RFC 8445 sections 7.3.1.3 to 7.3.1.5)."""
        pair = self.checks.find(path)
        if pair is None:
            pair = self.checks.learn(path) if self._learning.take(now) else None
            if pair is None:
                return
            if self._selected is not None:
                self._verify(self._selected, now)  # The peer's address changed, perhaps.
        self.outbox.earn(path.remote, now)
        pair.last_check_in_at = now
        if nominated and not self.controlling:
            self._nominations += 1
            pair.nominated = self._nominations
        before = pair.state
        pair.apply(PairInput.TRIGGER)
        if pair.state is PairState.CHECKING:
            self._return_check(pair, before, now)
        elif pair.nominated == self._nominations and not self.controlling:
            self._select(pair, now)

    def _return_check(self, pair: Pair, before: PairState, now: float) -> None:
        """The triggered check."""
        if before is PairState.CHECKING:
            if pair.last_sent_at is not None and now - pair.last_sent_at < CROSSING_S:
                return
            if self.outbox.take_silent(pair, now):
                self._send(pair, now)
            if pair.round_is_over:
                pair.next_at = now + self._settings.answer_wait_s
            return
        pair.begin_round(now, self._settings.check_offsets_s if pair.permitted else (0.0,))
        if self.outbox.take_silent(pair, now):
            self._send(pair, now)
            pair.schedule_after_check(now, self._settings)

    # Answers of the peer

    def _handle_answer(self, path: Path, message: stun.Message, now: float) -> None:
        check = self.outbox.awaited(message.transaction_id)
        if check is None:
            return
        self._messages.open_answer(message)
        pair = check.pair
        if pair.state is not PairState.VALID or _is_symmetric(pair.path, path):
            self.outbox.settle(message.transaction_id)
        if now - check.sent_at > self._settings.answer_lifetime_s or self.checks.find(pair.path) is not pair:
            return
        if message.message_class is stun.Class.ERROR:
            if message.error_code == ROLE_CONFLICT and self._repair_role(check, now):
                return
            self._reject(pair, f"the peer answered error {message.error_code}", now)
            return
        mapped = stun.mapped_address(message)
        if not _is_symmetric(pair.path, path):
            self._reject(pair, f"the answer came over {path}", now)
            return
        self.outbox.answered(path.remote)
        self._take_answer(check, now)
        pair.mapped = mapped
        pair.local_kind = self.checks.local_kind(mapped, path.local)
        if not self.controlling and pair.nominated > (self._selected.nominated if self._selected else 0):
            self._select(pair, now)

    def _repair_role(self, check: SentCheck, now: float) -> bool:
        """RFC 8445 section 7.2.5.1: the peer keeps the role that the check claimed."""
        if check.controlling == self.controlling and not self._messages.switch_role():
            return False
        checking = check.pair.state is PairState.CHECKING
        if checking and self._limits.take_rate(now) and self.outbox.take_silent(check.pair, now):
            self._send(check.pair, now)
        return True

    def _take_answer(self, check: SentCheck, now: float) -> None:
        pair = check.pair
        pair.apply(PairInput.ANSWER)
        pair.measure(now, now - check.sent_at)
        if self.controlling and pair is self._selected and not check.nominates:
            return  # It says nothing about the nomination, which is on its way.
        pair.trust()
        pair.next_at = now + self._period(pair)
        if self.controlling and pair.samples < 2 and self._choice.is_beaten_by(pair):
            pair.next_at = now + self._settings.second_look_s

    def _period(self, pair: Pair) -> float:
        """Until the next check of a working path."""
        if pair is self._selected:
            return self._settings.jittered(self._settings.consent_s, self._entropy)
        near = pair in self._spares()[:ALTERNATIVES]
        return self._settings.jittered(self._settings.alternative_s if near else self._settings.spare_s, self._entropy)

    def _spares(self) -> list[Pair]:
        return self._choice.spares(self.checks.within(PairState.VALID))

    def _reject(self, pair: Pair, reason: str, now: float) -> None:
        was = pair.state
        pair.apply(PairInput.REJECT)
        if was is PairState.CHECKING:
            self._note_failure(pair, reason, now)

    # Checks of ours

    def _change(self, local: Sequence[Candidate], remote: Sequence[Candidate], now: float) -> None:
        for pair in self.checks.update(local, remote):
            if pair is self._selected:
                self._lose(pair, f"our address {pair.local.host} is gone", now)
        for pair in self.checks.within(PairState.FAILED):
            pair.failures = 0
            self._retry(pair)
        if self._selected is None:
            self._attempt(now)

    def _attempt(self, now: float) -> None:
        """From now on success is expected within one round."""
        self._overdue = False
        self._give_up_at = now + self._settings.check_offsets_s[-1] + self._settings.answer_wait_s

    def _retry(self, pair: Pair) -> None:
        pair.apply(PairInput.RETRY)
        pair.next_at = None

    def _start_next(self, now: float) -> None:
        """Give the best waiting pair the slot, if there is one."""
        waiting = self.checks.within(PairState.WAITING)
        if self._slot_at is None and waiting:
            self._slot_at = self._limits.reserve_start(now)
        if self._slot_at is None or now < self._slot_at:
            return
        self._slot_at = None
        for pair in self.checks.by_priority(waiting, self.controlling):
            if not self._limits.take_rate(now):
                break
            pair.apply(PairInput.START)
            retry = pair.failures > 0
            pair.begin_round(now, self._settings.retry_offsets_s if retry else self._settings.check_offsets_s)
            if self.outbox.take_silent(pair, now):
                self._send(pair, now)
                pair.schedule_after_check(now, self._settings)
                break
            self._fail(pair, "its address got enough packets without an answer", now)
        if self.checks.within(PairState.WAITING):
            self._slot_at = self._limits.reserve_start(now)

    def _continue_round(self, pair: Pair, now: float) -> None:
        if pair.round_is_over:
            self._fail(pair, "no answer", now)
        elif not self._limits.take_rate(now):
            pair.next_at = now + TA_S
        elif self.outbox.take_silent(pair, now):
            self._send(pair, now)
            pair.schedule_after_check(now, self._settings)
        else:
            self._fail(pair, "its address got enough packets without an answer", now)

    def _continue_probe(self, pair: Pair, now: float) -> None:
        if not pair.quick_s:
            pair.begin_probe(now, self._settings.miss_s, self._settings.quick_tries)
        elif pair.misses >= pair.quick_tries:
            self._fail(pair, f"no answer to {pair.misses + 1} checks", now)
            return
        else:
            pair.misses += 1
            if pair is self._selected and pair.misses == 1:
                self._rouse_others(pair, now)
        self._probe(pair, now)

    def _rouse_others(self, late: Pair, now: float) -> None:
        """The chosen path missed an answer, which is told if it was in doubt: do the next best ones still work?"""
        if late.quick_s <= self._settings.verify_s:
            self.outbox.say(PathSilent(late.path))
        for other in self._spares()[:ALTERNATIVES]:
            if not other.quick_s:
                other.begin_probe(now, self._settings.miss_s, self._settings.quick_tries)
                self._probe(other, now)

    def _probe(self, pair: Pair, now: float) -> None:
        """Check a working path; its packets are counted, not held back."""
        self.outbox.take_silent(pair, now)
        self._send(pair, now)
        pair.schedule_after_probe(now)

    def _verify(self, pair: Pair, now: float) -> None:
        if pair.quick_s and (pair.misses or pair.quick_s <= self._settings.verify_s):
            return
        pair.begin_probe(now, self._settings.verify_s, self._settings.verify_tries)
        self._probe(pair, now)

    def _send(self, pair: Pair, now: float) -> None:
        """One check."""
        self.outbox.check(pair, now, nominates=self.controlling and pair is self._selected)

    # Failure and choice

    def _fail(self, pair: Pair, reason: str, now: float) -> None:
        pair.apply(PairInput.SILENCE)
        self._note_failure(pair, reason, now)

    def _note_failure(self, pair: Pair, reason: str, now: float) -> None:
        wait_s = self._settings.pause_s(pair.failures, idle=self._selected not in (None, pair))
        pair.fail(reason, now + self._settings.jittered(wait_s, self._entropy))
        if pair is self._selected:
            self._lose(pair, reason, now)
        if not pair.signalled and pair.failures >= MAX_LEARNED_FAILURES:
            self.checks.discard(pair)

    def _lose(self, pair: Pair, reason: str, now: float) -> None:
        """The chosen path is gone: the others prove that they work, then one of them is chosen."""
        self._choice.drop()
        self.outbox.say(PathLost(pair.path, reason))
        for other in self.checks.within(PairState.VALID):
            other.apply(PairInput.DOUBT)
            other.begin_round(now, self._settings.check_offsets_s)
        for other in self.checks.within(PairState.FAILED):
            if other is not pair:
                self._retry(other)
        self._attempt(now)

    def _decide(self, now: float) -> None:
        """The controlling side nominates; the quick checks of a path in doubt carry the news until one is answered."""
        valid = self.checks.by_priority(self.checks.within(PairState.VALID), self.controlling)
        pair = self._choice.next(
            valid, pending=bool(self.checks.within(PairState.WAITING, PairState.CHECKING)), now=now
        )
        if pair is not None:
            self._select(pair, now)
            pair.begin_probe(now, self._settings.miss_s, self._settings.quick_tries)
            self._probe(pair, now)

    def _select(self, pair: Pair, now: float) -> None:
        if pair is self._selected:
            return
        self._choice.take(pair, now)
        self._give_up_at = None
        self._overdue = False
        if not pair.quick_s:
            pair.next_at = now + self._settings.jittered(self._settings.consent_s, self._entropy)
        priority = self.checks.pair_priority(pair, self.controlling)
        self.outbox.say(PathNominated(pair.path, pair.kind, pair.rtt_s or 0.0, priority))


def _is_symmetric(sent: Path, answered: Path) -> bool:
    """Whether an answer came back the way the check went (RFC 8445 section 7.2.5.2.1)."""
    if sent.remote != answered.remote or sent.local.port != answered.local.port:
        return False
    return sent.local.is_unspecified or answered.local.is_unspecified or sent.local.host == answered.local.host
