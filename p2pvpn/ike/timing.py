"""What time does to an IKE SA: retransmissions, probes, keepalives, what was put off, the end."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from p2pvpn.core.errors import LocalError

from .outputs import RemoveChild, SendKeepalive
from .states import State, Step
from .tasks.mobike import fail_move
from .timers import Timer

if TYPE_CHECKING:
    from .sa import IkeSa

MAX_GRACES = 3
"""How often a request begins its tries anew when the peer, heard since the last one, is alive: it slept, or its NAT
forgot it, through all the others. A minute then, after which something is wrong with it."""


def tick(sa: IkeSa, now: float) -> None:
    """All timers that are due."""
    for timer in sa._timers.pop_due(now):
        if sa.state is State.CLOSED:
            return
        if timer is Timer.RETRANSMIT:
            _retransmit(sa, now)
        elif timer is Timer.DOUBT:
            sa.end(Step.REFUSED, sa._doubt, now)
        elif timer is Timer.END:
            _time_is_up(sa, now)
        elif timer is Timer.CHILDREN:
            for child_id in sa.children.pop_due(now):
                sa.emit(RemoveChild(sa.id, child_id))
            sa._watch_children()
        elif timer is Timer.LATER:
            _ask_again(sa)
        elif timer is Timer.LIVENESS:
            sa.put_off_probe(now)
            if sa.requests.is_idle:
                sa.probe(now)
        else:
            sa.emit(SendKeepalive(sa.path))
            sa._set_keepalive(now)
    sa._pump(now)


def _retransmit(sa: IkeSa, now: float) -> None:
    waiting = sa.requests.outstanding
    if waiting is None:
        return
    early_s = sa.requests.is_early(sa.local.settings)
    if early_s is not None:
        sa._transmit(waiting.path, waiting.packets)
        sa._timers.set(Timer.RETRANSMIT, now + early_s)
    elif waiting.sent < waiting.limit:
        sa._send_outstanding(now)
    elif sa.moving is not None and not sa.moving.back:
        fail_move(sa, "no answer over the new path", now)
    elif sa.heard_at > waiting.sent_at and waiting.graces < MAX_GRACES:
        waiting.graces += 1
        sa.redirect(waiting.path, waiting.limit, now)
    else:
        sa.requests.outstanding = None
        waiting.task.gave_up(sa, now)


def _ask_again(sa: IkeSa) -> None:
    waiting, sa._later = sa._later, []
    for task in waiting:
        with contextlib.suppress(LocalError):
            sa.requests.add(task)


def _time_is_up(sa: IkeSa, now: float) -> None:
    if sa.state is State.LINGERING:
        sa.advance(Step.TIMED_OUT)
        sa._timers.clear_all()
    else:
        sa.end(Step.TIMED_OUT, "time is up", now)
