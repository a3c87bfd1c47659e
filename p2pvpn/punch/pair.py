"""One candidate pair: a path that may work, the story of its checks, and how good it is.

    WAITING --START--> CHECKING --ANSWER--> VALID --SILENCE--> FAILED --RETRY--> WAITING

Every transmission is a check of its own with its own transaction ID, so that a round-trip time belongs to one packet
(a retransmission that shares the ID, as in RFC 8489 section 6.2.1, leaves open which packet was answered).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.errors import LocalError

from .candidates import Candidate, CandidateKind
from .settings import PunchSettings


class PairState(Enum):
    WAITING = "waiting"
    """Its turn to be checked has not come."""
    CHECKING = "checking"
    """Checks are on their way."""
    VALID = "valid"
    """It answered."""
    FAILED = "failed"
    """It did not, or not any more; it is tried again later."""


class PairInput(Enum):
    START = "its turn came"
    TRIGGER = "an authenticated check arrived on it"
    ANSWER = "a check was answered"
    SILENCE = "no check was answered in time"
    REJECT = "the answer came from elsewhere or says no"
    RETRY = "the backoff ended or a network changed"
    DOUBT = "the selected path died or a network changed"


TRANSITIONS: dict[tuple[PairState, PairInput], PairState] = {
    (PairState.WAITING, PairInput.START): PairState.CHECKING,  # the pacer gave it a slot
    (PairState.WAITING, PairInput.TRIGGER): PairState.CHECKING,  # the peer was first (RFC 8445 section 7.3.1.4)
    (PairState.WAITING, PairInput.ANSWER): PairState.VALID,  # to a check from before the retry
    (PairState.WAITING, PairInput.REJECT): PairState.WAITING,  # the same; the retry is to come
    (PairState.CHECKING, PairInput.TRIGGER): PairState.CHECKING,  # the way may be open now: one more check at once
    (PairState.CHECKING, PairInput.ANSWER): PairState.VALID,  # both directions work
    (PairState.CHECKING, PairInput.SILENCE): PairState.FAILED,  # the round is over
    (PairState.CHECKING, PairInput.REJECT): PairState.FAILED,  # not symmetric (RFC 8445 section 7.2.5.2.1)
    (PairState.VALID, PairInput.TRIGGER): PairState.VALID,  # the peer's check of a path that works
    (PairState.VALID, PairInput.ANSWER): PairState.VALID,  # consent goes on
    (PairState.VALID, PairInput.SILENCE): PairState.FAILED,  # consent is gone
    (PairState.VALID, PairInput.REJECT): PairState.VALID,  # counts as no answer: one odd packet kills no path
    (PairState.VALID, PairInput.DOUBT): PairState.CHECKING,  # it has to prove itself before it is chosen
    (PairState.FAILED, PairInput.TRIGGER): PairState.CHECKING,  # the peer reached us: a full round
    (PairState.FAILED, PairInput.ANSWER): PairState.VALID,  # late, but both directions work
    (PairState.FAILED, PairInput.REJECT): PairState.FAILED,  # late, and nothing new
    (PairState.FAILED, PairInput.RETRY): PairState.WAITING,  # queued for its turn
}

PENALTY_S = {
    CandidateKind.HOST: 0.0,
    CandidateKind.DECLARED: 0.002,
    CandidateKind.MAPPED: 0.004,
    CandidateKind.PEER_REFLEXIVE: 0.006,
    CandidateKind.REFLEXIVE: 0.005,
}
"""What a path's worse end adds to its round-trip time: bindings of NATs have to be kept open and can vanish."""
RTT_GAIN = 0.25
"""Weight of a new round-trip sample in the smoothed one."""


@dataclass(frozen=True, slots=True)
class PairReport:
    """One row of `status` and `why`. Instants are monotonic seconds, None for never."""

    path: Path
    local_kind: CandidateKind
    remote_kind: CandidateKind
    state: PairState
    selected: bool
    priority: int
    rtt_s: float | None
    checks_sent: int
    answers: int
    last_answer_at: float | None
    last_check_in_at: float | None
    mapped: Endpoint | None
    """Where the peer saw our checks come from."""
    reason: str
    """Why it failed, or nothing."""


@dataclass(slots=True, eq=False)
class Pair:
    """`local` is the base that packets leave from; `remote` where they go. `next_at` is when something is due."""

    local: Endpoint
    remote: Candidate
    permitted: bool = True
    """Whether it may be checked on the peer's word, or only in return for checks that come in."""
    signalled: bool = True
    """Whether the peer still names the remote candidate; it was learned from a check otherwise."""
    state: PairState = PairState.WAITING
    offsets: tuple[float, ...] = ()
    """When the packets of the current round are due, after its start."""
    started_at: float = 0.0
    step: int = 0
    """Packets of the current round sent."""
    next_at: float | None = None
    failures: int = 0
    """Rounds failed since the last answer or change of network."""
    misses: int = 0
    """Checks of a working path since its last answer, without the one that is due."""
    quick_s: float = 0.0
    """Spacing of the checks while an answer is missing, 0.0 when none is."""
    quick_tries: int = 0
    doubt_at: float = 0.0
    """When the first check went out whose answer is missing."""
    rtt_s: float | None = None
    samples: int = 0
    """Answers since the pair became valid."""
    nominated: int = 0
    """On the controlled side: the number of the peer's nomination of this pair, 0 for none."""
    mapped: Endpoint | None = None
    local_kind: CandidateKind = CandidateKind.HOST
    checks_sent: int = 0
    answers: int = 0
    last_sent_at: float | None = None
    last_answer_at: float | None = None
    last_check_in_at: float | None = None
    reason: str = ""
    path: Path = field(init=False)

    def __post_init__(self) -> None:
        self.path = Path(self.local, self.remote.endpoint)

    def __str__(self) -> str:
        return f"{self.path} {self.state.value}"

    def apply(self, step: PairInput) -> None:
        """Take the transition; raises LocalError when the table has none."""
        after = TRANSITIONS.get((self.state, step))
        if after is None:
            raise LocalError(f"a {self.state.value} pair cannot take {step.name}")
        self.state = after

    @property
    def kind(self) -> CandidateKind:
        """The worse of both ends."""
        return max(self.local_kind, self.remote.kind, key=PENALTY_S.__getitem__)

    @property
    def score(self) -> float:
        """Seconds; less is better."""
        return (self.rtt_s if self.rtt_s is not None else 10.0) + PENALTY_S[self.kind]

    def begin_round(self, now: float, offsets: tuple[float, ...]) -> None:
        """Checks at these offsets from now on."""
        self.offsets = offsets
        self.started_at = now
        self.step = 0
        self.next_at = now
        self.reason = ""

    def schedule_after_check(self, now: float, settings: PunchSettings) -> None:
        """A packet of the round left: when is the next one due, or the verdict?"""
        self.step += 1
        if self.step < len(self.offsets):
            self.next_at = max(now, self.started_at + self.offsets[self.step])
        else:
            self.next_at = now + settings.answer_wait_s

    @property
    def round_is_over(self) -> bool:
        return self.step >= len(self.offsets)

    def begin_probe(self, now: float, spacing_s: float, tries: int) -> None:
        """A working path is checked, and `tries` times more at this spacing unless it answers."""
        self.misses = 0
        self.doubt_at = now
        self.quick_s = spacing_s
        self.quick_tries = tries

    def schedule_after_probe(self, now: float) -> None:
        """A check of a working path left: when does its answer count as missing?"""
        last = self.misses >= self.quick_tries
        late_s = max(self.quick_s, 1.25 * (self.rtt_s or 0.0) + 0.05)
        self.next_at = now + (late_s if last or not self.misses else self.quick_s)

    def measure(self, now: float, rtt_s: float) -> None:
        """A check was answered after so long."""
        self.answers += 1
        self.samples += 1
        self.last_answer_at = now
        self.rtt_s = rtt_s if self.rtt_s is None else self.rtt_s + RTT_GAIN * (rtt_s - self.rtt_s)
        self.failures = 0
        self.reason = ""

    def trust(self) -> None:
        """No answer is missing any more."""
        self.misses = 0
        self.quick_s = 0.0

    def fail(self, reason: str, retry_at: float) -> None:
        """Bookkeeping of a failure; the state is the table's."""
        self.reason = reason
        self.failures += 1
        self.samples = 0
        self.rtt_s = None
        self.trust()
        self.next_at = retry_at

    def report(self, selected: bool, priority: int) -> PairReport:
        return PairReport(
            self.path,
            self.local_kind,
            self.remote.kind,
            self.state,
            selected,
            priority,
            self.rtt_s,
            self.checks_sent,
            self.answers,
            self.last_answer_at,
            self.last_check_in_at,
            self.mapped,
            self.reason,
        )
