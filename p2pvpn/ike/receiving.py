"""What the peer's messages do to an IKE SA: who may speak now, is it authentic, whole, legal, and what is the answer.

The order of the checks is the order of the functions. `sa.py` has the SA itself; this is its ear, and reaches into it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from p2pvpn.core.address import Path
from p2pvpn.core.errors import WireError

from .codes import Exchange, Protocol
from .family import hand_over
from .message import CriticalPayloadError, Header, notifications
from .notifies import Notify, NotifyType
from .outputs import PeerPathHint
from .payloads import Delete
from .protect import Opened
from .rules import rule_for
from .states import REQUESTS, State, Step
from .tasks.responders import RESPONDERS
from .tasks.task import Received, Refusal, Reply, Verdict
from .timers import Timer

if TYPE_CHECKING:
    from .sa import IkeSa


def receive(sa: IkeSa, path: Path, header: Header, data: bytes, now: float) -> None:
    """A datagram with our SPI."""
    if header.initiator == sa.initiator or header.spi_i != sa.spi_i:
        return
    if sa.state in (State.LINGERING, State.CLOSED) and header.response:
        return
    if header.response:
        _receive_answer(sa, path, header, data, now)
    elif header.spi_r == sa.spi_r:
        _receive_request(sa, path, header, data, now)
    sa._pump(now)


def _receive_answer(sa: IkeSa, path: Path, header: Header, data: bytes, now: float) -> None:
    waiting = sa.requests.outstanding
    if waiting is None or (header.exchange, header.message_id) != (waiting.task.exchange, waiting.message_id):
        return
    try:
        received = _read_answer(sa, path, header, data)
    except WireError as problem:
        if sa._channel.is_protected:
            _break(sa, f"an answer that breaks the protocol: {problem}", now)
        return
    if received is None:
        return
    _note(sa, received, now)
    sa.requests.answered(now)
    sa.requests.outstanding = None
    sa.requests.next_id = waiting.message_id + 1
    try:
        verdict = waiting.task.answered(sa, received, now)
    except WireError as problem:
        _break(sa, f"an answer that breaks the protocol: {problem}", now)
        return
    if verdict is Verdict.DONE:
        if sa.requests.outstanding is None:
            sa._timers.clear(Timer.RETRANSMIT)
        return
    sa.requests.next_id = waiting.message_id
    if verdict is Verdict.IGNORED:
        sa.requests.outstanding = waiting
    else:
        sa._ask(waiting.task, now)


def _read_answer(sa: IkeSa, path: Path, header: Header, data: bytes) -> Received | None:
    """None when it is not authentic or not whole yet. Raises WireError when it is, and breaks the protocol."""
    if not sa._channel.is_protected:
        return sa._channel.read_clear_untrusted(path, data)
    opened = sa._channel.open(header, data) if header.spi_r == sa.spi_r else None
    return None if opened is None else sa._channel.read_untrusted(path, header, opened)


def _break(sa: IkeSa, reason: str, now: float) -> None:
    """An authenticated message that breaks the protocol ends the SA (RFC 7296 section 2.21)."""
    sa.requests.outstanding = None
    fatal = Step.REFUSED if sa.state in (State.MIXING_SENT, State.AUTH_SENT) else Step.BROKEN
    sa.end(fatal, reason, now)


def _receive_request(sa: IkeSa, path: Path, header: Header, data: bytes, now: float) -> None:
    if sa.answers.is_last(header.exchange, header.message_id):
        if header.exchange != Exchange.IKE_SA_INIT:
            again = sa.answers.again(now, lambda: sa._channel.is_repeated(data))
            sa._transmit(path, again)
            sa.children.answered_at = now if again else sa.children.answered_at
        return
    rule = rule_for(header.exchange, False)
    if header.message_id != sa.answers.expected_id or rule is None:
        return
    if header.exchange not in REQUESTS[sa.state]:
        return
    opened = sa._channel.open(header, data)
    if opened is not None:
        _answer(sa, path, header, opened, now)


def _answer(sa: IkeSa, path: Path, header: Header, opened: Opened, now: float) -> None:
    """An authentic request in its turn: the answer goes where it came from (RFC 7296 section 2.11)."""
    reply, before = Reply(), len(sa._out)
    try:
        received = sa._channel.read_untrusted(path, header, opened)
        _be_believed(sa, received, now)
        sa.children.unconfirmed.clear()
        reply = RESPONDERS[Exchange(header.exchange)](sa, received, now)
        _note(sa, received, now)
    except Refusal as refusal:
        reply = _refuse(refusal)
    except CriticalPayloadError as problem:
        kind = NotifyType.UNSUPPORTED_CRITICAL_PAYLOAD
        fatal = sa.established_at is None
        reply = _refuse(Refusal(str(problem), kind, bytes([problem.kind]), fatal=fatal))
    except WireError as problem:
        del sa._out[before:]
        reply = Reply(
            tuple(notifications([Notify(NotifyType.INVALID_SYNTAX)])),
            (),
            Step.BROKEN,
            f"it sent nonsense: {problem}",
        )
    own = sa._header(header.exchange, header.message_id, response=True)
    packets = sa._channel.pack(own, reply.payloads)
    sa.answers.store(header.exchange, packets)
    sa.children.answered_at = now
    sa._transmit(path, packets)
    for output in reply.then:
        sa.emit(output)
    if reply.keys is not None:
        sa.mix(reply.keys)
    successor = sa.after_answer
    if successor is not None:
        sa.after_answer = None
        hand_over(sa, successor, now)
    if reply.step is Step.AUTHENTICATED:
        sa.establish(now)
    elif reply.step is not None:
        sa.end(reply.step, reply.reason, now)


def _be_believed(sa: IkeSa, received: Received, now: float) -> None:
    """The peer uses a successor that it made while we were making one too: so that is the one that stays."""
    old = sa.predecessor
    ends = any(one.protocol == Protocol.IKE for one in received.message.all(Delete))
    if old is not None and not ends:
        old.creating = None
        hand_over(old, sa, now)


def _refuse(refusal: Refusal) -> Reply:
    step = Step.REFUSED if refusal.fatal else None
    return Reply(tuple(notifications([refusal.notify])), (), step, str(refusal))


def _note(sa: IkeSa, received: Received, now: float) -> None:
    """An authentic, new message: the peer is alive, and this is where it is."""
    if sa.state is not State.ESTABLISHED:
        return
    sa.heard(now)
    remote = received.path.remote
    known = (sa.path.remote, sa.move_path.remote)
    if remote not in known and (sa._hinted is None or sa._hinted.remote != remote):
        sa._hinted = received.path
        sa.emit(PeerPathHint(sa.id, received.path))
