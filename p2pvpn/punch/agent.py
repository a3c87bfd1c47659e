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
from dataclasses import dataclass
from enum import Enum

from p2pvpn.core import stun
from p2pvpn.core.address import Path
from p2pvpn.core.errors import TrustError, WireError
from p2pvpn.core.limits import BoundedTable
from p2pvpn.core.output import Output, Transmit
from p2pvpn.core.ports import Entropy
from p2pvpn.core.timers import TimerTable

from .candidates import Candidate, CandidateKind, priority_of
from .checklist import CheckList
from .credentials import IceCredentials
from .events import PathLost, PathNominated, PunchFailed
from .limits import TA_S, PunchLimits
from .pair import Pair, PairInput, PairReport, PairState
from .settings import PunchSettings

TAG_BYTES = 6
"""First bytes of every transaction ID of an agent, drawn at random; the rest is random each time. Answers are routed by
it. 48 bits are left to guess, and integrity after that."""
MAX_OUTSTANDING = 256
"""Checks whose answers are awaited; the oldest is forgotten first."""
MAX_SEEN = 128
"""Requests remembered against replay, at one in 5 s about ten minutes. A replay older than that is worth one packet."""
MAX_EARLY = 16
"""Paths on which checks arrived before `start`."""
MAX_ROLE_SWITCHES = 4
"""One is enough between honest sides (RFC 8445 section 7.3.1.1)."""
MAX_LEARNED_FAILURES = 7
"""Rounds after which a path that no candidate names is forgotten: two minutes of backoff."""
ALTERNATIVES = 2
"""Working paths besides the chosen one that are kept warm."""
CROSSING_S = 0.005
"""Checks of both sides that cross within this time need no second one."""
ROLE_CONFLICT = 487


class PunchTimer(Enum):
    SETTLE = "the first success had its time to be beaten"
    HOLD = "the chosen path may be replaced by a better one"
    GIVE_UP = "every pair had a full round since the candidates changed"


@dataclass(frozen=True, slots=True)
class _Check:
    """A check whose answer is awaited."""

    pair: Pair
    sent_at: float
    controlling: bool
    nominates: bool


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
        self.controlling = controlling
        self.credentials = credentials
        self.tag = entropy(TAG_BYTES)
        self._settings = settings or PunchSettings()
        self._tie_breaker = tie_breaker
        self._entropy = entropy
        self._limits = limits
        self._key_in = credentials.local_password.reveal()
        self._key_out = credentials.remote_password.reveal()
        self._checks = CheckList(limits)
        self._timers: TimerTable[PunchTimer] = TimerTable()
        self._awaited: BoundedTable[bytes, _Check] = BoundedTable(MAX_OUTSTANDING)
        self._seen: BoundedTable[bytes, None] = BoundedTable(MAX_SEEN)
        self._early: BoundedTable[Path, bool] = BoundedTable(MAX_EARLY)
        self._selected: Pair | None = None
        self._settled = False
        self._held = False
        self._overdue = False
        self._nominations = 0
        self._role_switches = 0
        self._started = False
        self._closed = False
        self._out: list[Output] = []

    # The session

    @property
    def selected(self) -> Path | None:
        """The chosen direct path, if there is one."""
        return self._selected.path if self._selected else None

    def draw_tag(self) -> None:
        """Take another transaction tag; before `start` only."""
        self.tag = self._entropy(TAG_BYTES)

    def start(self, local: Sequence[Candidate], remote: Sequence[Candidate], now: float) -> list[Output]:
        """Begin checking; candidates may be incomplete, or none yet. Checks that came before are taken up."""
        if self._closed or self._started:
            return []
        self._started = True
        self._change(local, remote, now)
        for path, nominated in self._early.items():
            self._take_check(path, nominated, now)
        self._early = BoundedTable(1)
        self._start_next(now)
        return self._finish(now)

    def update_local(self, local: Sequence[Candidate], now: float) -> list[Output]:
        """Our addresses changed: these are all of them. The chosen path is verified, other working ones prove
        themselves again, paths from an address that is gone are lost at once."""
        if self._closed or not self._started:
            return []
        self._change(local, self._checks.remote, now)
        for pair in self._checks.within(PairState.VALID):
            if pair is self._selected:
                self._verify(pair, now)
            else:
                pair.apply(PairInput.DOUBT)
                pair.begin_round(now, self._settings.check_offsets_s)
        self._start_next(now)
        return self._finish(now)

    def update_remote(self, remote: Sequence[Candidate], now: float) -> list[Output]:
        """The peer's candidates changed: these are all of them. Failed pairs are tried again at once, and the chosen
        path is verified when the peer does not name its end any more."""
        if self._closed or not self._started:
            return []
        self._change(self._checks.local, remote, now)
        if self._selected is not None and not self._selected.signalled:
            self._verify(self._selected, now)
        self._start_next(now)
        return self._finish(now)

    def verify(self, now: float) -> list[Output]:
        """The chosen path is in doubt: check it now. PathLost follows within about a second, or nothing."""
        if self._selected is not None:
            self._verify(self._selected, now)
        return self._finish(now)

    def close(self) -> list[Output]:
        """The session is over: nothing is sent or answered any more."""
        self._closed = True
        self._selected = None
        self._timers.clear_all()
        self._out.clear()
        return []

    def report(self) -> list[PairReport]:
        """Every pair, best priority first."""
        rows = [
            pair.report(pair is self._selected, self._checks.pair_priority(pair, self.controlling))
            for pair in self._checks.pairs
        ]
        return sorted(rows, key=lambda row: (-row.priority, row.path))

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
        times = [self._timers.next_deadline()]
        for pair in self._checks.pairs:
            if pair.state is PairState.WAITING:
                times.append(self._limits.next_start_at)
            else:
                times.append(pair.next_at)
        return min((at for at in times if at is not None), default=None)

    def tick(self, now: float) -> list[Output]:
        """Do what is due."""
        if self._closed:
            return []
        for timer in self._timers.pop_due(now):
            if timer is PunchTimer.SETTLE:
                self._settled = True
            elif timer is PunchTimer.HOLD:
                self._held = False
            else:
                self._overdue = True
        for pair in self._checks.pairs:
            if pair.next_at is None or pair.next_at > now:
                continue
            if pair.state is PairState.CHECKING:
                self._continue_round(pair, now)
            elif pair.state is PairState.VALID:
                self._continue_probe(pair, now)
            elif pair.state is PairState.FAILED:
                self._retry(pair)
        self._start_next(now)
        return self._finish(now)

    def _finish(self, now: float) -> list[Output]:
        self._decide(now)
        hopeful = self._selected or self._checks.within(PairState.WAITING, PairState.CHECKING, PairState.VALID)
        if self._overdue and not hopeful:
            self._overdue = False
            count = len(self._checks)
            self._out.append(PunchFailed(f"none of {count} pairs answered" if count else "no pair to check"))
        outputs, self._out = self._out, []
        return outputs

    # Requests of the peer

    def _handle_request(self, path: Path, message: stun.Message, now: float) -> None:
        stun.verify(message, self._key_in)
        attributes = message.attributes
        if attributes.get("USERNAME") != self.credentials.username_in or not path.remote.port:
            return
        if "PRIORITY" not in attributes or not self._settle_roles(path, message):
            return
        answer = stun.success(message.transaction_id, path.remote)
        self._out.append(Transmit(path, stun.build(answer, self._key_in)))
        if message.transaction_id in self._seen:
            return
        self._seen.put(message.transaction_id, None)
        nominated = "USE-CANDIDATE" in attributes
        if not self._started:
            self._early.put(path, nominated or bool(self._early.peek(path)))
            return
        self._take_check(path, nominated, now)

    def _settle_roles(self, path: Path, message: stun.Message) -> bool:
        """RFC 8445 section 7.3.1.1: whether the request may be answered with success."""
        theirs = message.attributes.get("ICE-CONTROLLING" if self.controlling else "ICE-CONTROLLED")
        if theirs is None:
            return True
        if (self._tie_breaker >= theirs) == self.controlling:
            conflict = stun.error(message.transaction_id, ROLE_CONFLICT, "Role Conflict")
            self._out.append(Transmit(path, stun.build(conflict, self._key_in)))
            return False
        return self._switch_role()

    def _switch_role(self) -> bool:
        if self._role_switches >= MAX_ROLE_SWITCHES:
            return False
        self._role_switches += 1
        self.controlling = not self.controlling
        return True

    def _take_check(self, path: Path, nominated: bool, now: float) -> None:
        """An authenticated check: the peer can send here (RFC 8445 sections 7.3.1.3 to 7.3.1.5)."""
        pair = self._checks.find(path)
        if pair is None:
            pair = self._checks.learn(path)
            if pair is None:
                return
            if self._selected is not None:
                self._verify(self._selected, now)  # The peer's address changed, perhaps.
        self._limits.earn(path.remote, now)
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
            if self._take_silent(pair, now):
                self._send(pair, now)
            if pair.round_is_over:
                pair.next_at = now + self._settings.answer_wait_s
            return
        pair.begin_round(now, self._settings.check_offsets_s if pair.permitted else (0.0,))
        if self._take_silent(pair, now):
            self._send(pair, now)
            pair.schedule_after_check(now, self._settings)

    # Answers of the peer

    def _handle_answer(self, path: Path, message: stun.Message, now: float) -> None:
        check = self._awaited.peek(message.transaction_id)
        if check is None:
            return
        stun.verify(message, self._key_out)
        self._awaited.pop(message.transaction_id)
        pair = check.pair
        if now - check.sent_at > self._settings.answer_lifetime_s or self._checks.find(pair.path) is not pair:
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
        self._limits.answered(path.remote)
        self._take_answer(check, now)
        pair.mapped = mapped
        pair.local_kind = self._checks.local_kind(mapped, path.local)
        if not self.controlling and pair.nominated > (self._selected.nominated if self._selected else 0):
            self._select(pair, now)

    def _repair_role(self, check: _Check, now: float) -> bool:
        """RFC 8445 section 7.2.5.1: the peer keeps the role that the check claimed."""
        if check.controlling == self.controlling and not self._switch_role():
            return False
        checking = check.pair.state is PairState.CHECKING
        if checking and self._limits.take_rate(now) and self._take_silent(check.pair, now):
            self._send(check.pair, now)
        return True

    def _take_answer(self, check: _Check, now: float) -> None:
        pair = check.pair
        pair.apply(PairInput.ANSWER)
        pair.measure(now, now - check.sent_at)
        if self.controlling and pair is self._selected and not check.nominates:
            return  # It says nothing about the nomination, which is on its way.
        pair.trust()
        pair.next_at = now + self._period(pair)
        if self.controlling and pair.samples < 2 and self._beats_selected(pair):
            pair.next_at = now + self._settings.second_look_s

    def _period(self, pair: Pair) -> float:
        """Until the next check of a working path."""
        if pair is self._selected:
            return self._jittered(self._settings.consent_s)
        near = pair in self._spares()[:ALTERNATIVES]
        return self._jittered(self._settings.alternative_s if near else self._settings.spare_s)

    def _spares(self) -> list[Pair]:
        """Working paths that are not chosen, best first."""
        others = (pair for pair in self._checks.within(PairState.VALID) if pair is not self._selected)
        return sorted(others, key=lambda pair: pair.score)

    def _jittered(self, period_s: float) -> float:
        share = int.from_bytes(self._entropy(2), "big") / 0xFFFF
        return period_s * (1.0 + self._settings.jitter * (2.0 * share - 1.0))

    def _reject(self, pair: Pair, reason: str, now: float) -> None:
        was = pair.state
        pair.apply(PairInput.REJECT)
        if was is PairState.CHECKING:
            self._note_failure(pair, reason, now)

    # Checks of ours

    def _change(self, local: Sequence[Candidate], remote: Sequence[Candidate], now: float) -> None:
        for pair in self._checks.update(local, remote):
            if pair is self._selected:
                self._lose(pair, f"our address {pair.local.host} is gone", now)
        for pair in self._checks.within(PairState.FAILED):
            pair.failures = 0
            self._retry(pair)
        if self._selected is None:
            self._attempt(now)

    def _attempt(self, now: float) -> None:
        """From now on success is expected within one round."""
        self._overdue = False
        self._timers.set(PunchTimer.GIVE_UP, now + self._settings.check_offsets_s[-1] + self._settings.answer_wait_s)

    def _retry(self, pair: Pair) -> None:
        pair.apply(PairInput.RETRY)
        pair.next_at = None

    def _start_next(self, now: float) -> None:
        """Give the best waiting pair the slot, if there is one."""
        waiting = self._checks.within(PairState.WAITING)
        if not waiting or not self._limits.take_start(now):
            return
        waiting.sort(key=lambda pair: (-self._checks.pair_priority(pair, self.controlling), pair.path))
        for pair in waiting:
            if not self._limits.take_rate(now):
                return
            pair.apply(PairInput.START)
            retry = pair.failures > 0
            pair.begin_round(now, self._settings.retry_offsets_s if retry else self._settings.check_offsets_s)
            if self._take_silent(pair, now):
                self._send(pair, now)
                pair.schedule_after_check(now, self._settings)
                return
            self._fail(pair, "its address got enough packets without an answer", now)

    def _continue_round(self, pair: Pair, now: float) -> None:
        if pair.round_is_over:
            self._fail(pair, "no answer", now)
        elif not self._limits.take_rate(now):
            pair.next_at = now + TA_S
        elif self._take_silent(pair, now):
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
                self._rouse_others(now)
        self._probe(pair, now)

    def _rouse_others(self, now: float) -> None:
        """The chosen path missed an answer: do the next best ones still work?"""
        for other in self._spares()[:ALTERNATIVES]:
            if not other.quick_s:
                other.begin_probe(now, self._settings.miss_s, self._settings.quick_tries)
                self._probe(other, now)

    def _probe(self, pair: Pair, now: float) -> None:
        """Check a working path; its packets are counted, not held back."""
        self._take_silent(pair, now)
        self._send(pair, now)
        pair.schedule_after_probe(now)

    def _verify(self, pair: Pair, now: float) -> None:
        if pair.quick_s and (pair.misses or pair.quick_s <= self._settings.verify_s):
            return
        pair.begin_probe(now, self._settings.verify_s, self._settings.verify_tries)
        self._probe(pair, now)

    def _take_silent(self, pair: Pair, now: float) -> bool:
        return self._limits.take_silent(pair.path.remote, now, permitted=pair.permitted)

    def _send(self, pair: Pair, now: float) -> None:
        """One check (RFC 8445 section 7.2.2)."""
        transaction = self.tag + self._entropy(stun.TRANSACTION_ID_BYTES - TAG_BYTES)
        role = "ice_controlling" if self.controlling else "ice_controlled"
        nominates = self.controlling and pair is self._selected
        message = stun.request(
            transaction,
            username=self.credentials.username_out,
            priority=priority_of(CandidateKind.PEER_REFLEXIVE, pair.local),
            **{role: self._tie_breaker},
            **({"use_candidate": None} if nominates else {}),
        )
        self._awaited.put(transaction, _Check(pair, now, self.controlling, nominates))
        pair.checks_sent += 1
        pair.last_sent_at = now
        self._out.append(Transmit(pair.path, stun.build(message, self._key_out)))

    # Failure and choice

    def _fail(self, pair: Pair, reason: str, now: float) -> None:
        pair.apply(PairInput.SILENCE)
        self._note_failure(pair, reason, now)

    def _note_failure(self, pair: Pair, reason: str, now: float) -> None:
        backoff = self._settings.backoff_s
        if pair.failures < len(backoff):
            wait_s = backoff[pair.failures]
        else:
            wait_s = backoff[-1] if self._selected in (None, pair) else self._settings.idle_backoff_s
        pair.fail(reason, now + self._jittered(wait_s))
        if pair is self._selected:
            self._lose(pair, reason, now)
        if not pair.signalled and pair.failures >= MAX_LEARNED_FAILURES:
            self._checks.discard(pair)

    def _lose(self, pair: Pair, reason: str, now: float) -> None:
        """The chosen path is gone: the others prove that they work, then one of them is chosen."""
        self._selected = None
        self._settled = self._held = False
        self._timers.clear(PunchTimer.SETTLE)
        self._timers.clear(PunchTimer.HOLD)
        self._out.append(PathLost(pair.path, reason))
        for other in self._checks.within(PairState.VALID):
            other.apply(PairInput.DOUBT)
            other.begin_round(now, self._settings.check_offsets_s)
        for other in self._checks.within(PairState.FAILED):
            if other is not pair:
                self._retry(other)
        self._attempt(now)

    def _decide(self, now: float) -> None:
        """The controlling side chooses (RFC 8445 section 8.1.1): the best path once it settled, a better one later."""
        valid = self._checks.within(PairState.VALID)
        if not self.controlling or not valid:
            return
        best = min(valid, key=lambda pair: (pair.score, -self._checks.pair_priority(pair, True)))
        if self._selected is None:
            if not self._settled and self._checks.within(PairState.WAITING, PairState.CHECKING):
                if self._timers.at(PunchTimer.SETTLE) is None:
                    self._timers.set(PunchTimer.SETTLE, now + min(best.rtt_s or 0.0, self._settings.settle_s))
                return
            self._nominate(best, now)
        elif not self._held and best.samples >= 2 and self._beats_selected(best):
            self._nominate(best, now)
        elif self._selected.misses >= self._settings.move_misses:
            doubt_at = self._selected.doubt_at
            answering = [pair for pair in self._spares() if (pair.last_answer_at or 0.0) > doubt_at]
            if answering:
                self._nominate(answering[0], now)

    def _beats_selected(self, pair: Pair) -> bool:
        """Whether it is better than the chosen path by enough to move."""
        if self._selected is None or pair is self._selected:
            return False
        score = self._selected.score
        return pair.score < score - max(self._settings.gain_s, self._settings.gain * score)

    def _nominate(self, pair: Pair, now: float) -> None:
        self._select(pair, now)
        pair.begin_probe(now, self._settings.miss_s, self._settings.quick_tries)
        self._probe(pair, now)

    def _select(self, pair: Pair, now: float) -> None:
        if pair is self._selected:
            return
        self._selected = pair
        self._overdue = self._settled = False
        self._held = True
        self._timers.clear_all()
        self._timers.set(PunchTimer.HOLD, now + self._settings.hold_s)
        if not pair.quick_s:
            pair.next_at = now + self._jittered(self._settings.consent_s)
        priority = self._checks.pair_priority(pair, self.controlling)
        self._out.append(PathNominated(pair.path, pair.kind, pair.rtt_s or 0.0, priority))


def _is_symmetric(sent: Path, answered: Path) -> bool:
    """Whether an answer came back the way the check went (RFC 8445 section 7.2.5.2.1)."""
    if sent.remote != answered.remote or sent.local.port != answered.local.port:
        return False
    return sent.local.is_unspecified or answered.local.is_unspecified or sent.local.host == answered.local.host
