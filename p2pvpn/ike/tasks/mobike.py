"""MOBIKE (RFC 4555): moving a live SA to another path, without losing a packet.

ESP is accepted from any outer address, so a move only switches where each side sends. The original initiator sends
UPDATE_SA_ADDRESSES over the new path. The responder answers, makes sure that the new address is the peer's (COOKIE2,
unless something else proved it), and switches; the initiator switches on the answer. While a move is under way every
request goes over the new path (section 3.5); when that stays silent, the SA goes back to the old one, and a last update
over it makes sure that both sides agree.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import TYPE_CHECKING

from p2pvpn.core.address import Path
from p2pvpn.core.errors import WireError
from p2pvpn.core.output import Output
from p2pvpn.ike.codes import Exchange
from p2pvpn.ike.config import IkeSettings
from p2pvpn.ike.message import notifications
from p2pvpn.ike.nat import HASH_BYTES, detection_notifies, local_nat
from p2pvpn.ike.notifies import Notify, NotifyType
from p2pvpn.ike.outputs import MoveChild, MoveFailed, SaMoved
from p2pvpn.ike.payloads import Payload

from .task import Received, Task, Verdict

if TYPE_CHECKING:
    from p2pvpn.ike.sa import IkeSa

COOKIE2_BYTES = 16
"""8 to 64 (RFC 4555 section 4.2.5)."""


@dataclass(frozen=True, slots=True)
class Move:
    """A move under way. `back` is the return to the path that never was left: nothing is said about it. Child SAs are
    on the new path already when it is `eager`.
    """

    target: Path
    back: bool = False
    eager: bool = False


def is_moving(sa: IkeSa) -> bool:
    """Whether the path is being settled."""
    waiting = sa.requests.outstanding
    return sa.moving is not None or (waiting is not None and isinstance(waiting.task, _PathTask))


def begin_move(sa: IkeSa, path: Path, now: float, *, eager: bool = False) -> None:
    """The original initiator wants this path. With `eager`, as the old one is dead and the new one is known to reach
    the peer, Child SAs do not wait for the answer (section 3.5).
    """
    if sa.moving is not None and not sa.moving.back and path == sa.moving.target:
        return
    _start(sa, Move(path, eager=eager), now)
    if not sa.requests.has(UpdateAddresses):
        sa.requests.add_first(UpdateAddresses())


def fail_move(sa: IkeSa, reason: str, now: float) -> None:
    """Back to the path that was never left."""
    move = sa.moving
    if move is None or move.back:
        sa.moving = None
        return
    if sa.dialled:
        sa.emit(MoveFailed(sa.id, move.target, reason))
    if move.eager:
        _send_children(sa, sa.path)
    _start(sa, Move(sa.path, back=True), now)
    if sa.dialled and not sa.requests.has(UpdateAddresses) and sa.requests.outstanding is None:
        sa.requests.add_first(UpdateAddresses())


def _start(sa: IkeSa, move: Move, now: float) -> None:
    """Requests go to the move's target from now on, the one under way included (section 3.5)."""
    sa.moving = move
    if move.eager:
        _send_children(sa, move.target)
    settings = sa.local.settings
    sa.redirect(move.target, settings.tries if move.back else settings.move_tries, now)


def _send_children(sa: IkeSa, path: Path) -> None:
    for child_id in sa.children:
        sa.emit(MoveChild(sa.id, child_id, path))


class _PathTask(Task):
    """A request that settles the move under way when it is answered over the move's target."""

    exchange = Exchange.INFORMATIONAL

    def __init__(self) -> None:
        self._built_for: Path | None = None

    def tries(self, settings: IkeSettings) -> int:
        return settings.move_tries

    def _settle(self, sa: IkeSa, again: Task, now: float) -> None:
        move = sa.moving
        if move is None:
            return
        if move.target == self._built_for:
            sa.moving = None
            if not move.back and sa.switch(move.target, now):
                sa.emit(SaMoved(sa.id, move.target))
        elif not sa.requests.has(type(again)):
            sa.requests.add_first(again)


class UpdateAddresses(_PathTask):
    """The original initiator's UPDATE_SA_ADDRESSES (section 3.5)."""

    def request(self, sa: IkeSa) -> list[Payload]:
        self._built_for = sa.move_path
        update = Notify(NotifyType.UPDATE_SA_ADDRESSES)
        return notifications([update, *_detection(sa, sa.move_path)])

    def answered(self, sa: IkeSa, received: Received, now: float) -> Verdict:
        error = received.message.error
        if error is not None:
            fail_move(sa, f"the peer says {error}", now)
            return Verdict.DONE
        behind = local_nat(received.message, sa.spi_i, sa.spi_r, received.path)
        if behind is not None:
            sa.peer.local_nat = behind
        self._settle(sa, UpdateAddresses(), now)
        return Verdict.DONE


def begin_appeal(sa: IkeSa, path: Path, notifies: tuple[Notify, ...], now: float) -> None:
    """The responder is cut off on the SA's path: it tells the one who may move the SA, over this path. The answer
    proves that the path works, so our side turns to it without waiting for the move; Child SAs do so at once.
    """
    _start(sa, Move(path, eager=True), now)
    if not sa.requests.has(Appeal):
        sa.requests.add_first(Appeal(notifies))


class Appeal(_PathTask):
    """A request of the responder over a path that the SA is not on (yet)."""

    def __init__(self, notifies: tuple[Notify, ...]) -> None:
        super().__init__()
        self._notifies = notifies

    def request(self, sa: IkeSa) -> list[Payload]:
        self._built_for = sa.move_path
        return notifications(self._notifies)

    def answered(self, sa: IkeSa, received: Received, now: float) -> Verdict:
        self._settle(sa, Appeal(self._notifies), now)
        return Verdict.DONE


class ProveRoute(_PathTask):
    """The responder's COOKIE2: does the peer receive what goes to its new address (section 3.7)?"""

    def __init__(self, cookie: bytes) -> None:
        super().__init__()
        self._cookie = cookie

    def request(self, sa: IkeSa) -> list[Payload]:
        self._built_for = sa.move_path
        return notifications([Notify(NotifyType.COOKIE2, self._cookie)])

    def answered(self, sa: IkeSa, received: Received, now: float) -> Verdict:
        echoed = received.message.notify(NotifyType.COOKIE2)
        if echoed is None or not hmac.compare_digest(echoed.data, self._cookie):
            raise WireError("COOKIE2 came back as another")
        self._settle(sa, ProveRoute(sa.local.entropy(COOKIE2_BYTES)), now)
        return Verdict.DONE


def answer_update(sa: IkeSa, received: Received, then: list[Output], now: float) -> list[Notify]:
    """What an INFORMATIONAL request says of addresses, and what to answer. Adds to `then` what follows the answer."""
    message = received.message
    asked = message.notify(NotifyType.NAT_DETECTION_DESTINATION_IP) is not None
    answer = _detection(sa, received.path) if asked else []
    if message.notify(NotifyType.UPDATE_SA_ADDRESSES) is None or sa.dialled or not sa.peer.mobike:
        return answer
    behind = local_nat(message, sa.spi_i, sa.spi_r, received.path)
    if behind is not None:
        sa.peer.local_nat = behind
    if received.path == sa.path or sa.local.settings.routable(received.path.remote):
        if sa.switch(received.path, now):
            then.append(SaMoved(sa.id, received.path))
        return answer
    if received.path == sa.move_path:
        return answer
    _start(sa, Move(received.path), now)
    if not sa.requests.has(ProveRoute):
        sa.requests.add_first(ProveRoute(sa.local.entropy(COOKIE2_BYTES)))
    return answer


def _detection(sa: IkeSa, path: Path) -> list[Notify]:
    fake = sa.local.entropy(HASH_BYTES) if sa.local.settings.fake_nat else None
    return detection_notifies(sa.spi_i, sa.spi_r, path, fake)
