"""What passes from an IKE SA to its successor (RFC 7296 section 2.8), and how both are seen from outside.

The local id stays with what it means to the engine: the live SA with this peer. So the successor takes the id of the
old one, which becomes silent under a number that nobody knows: it ends without an event.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .keys import IkeKeys
from .outputs import SaRekeyed
from .proposals import IkeSuite

if TYPE_CHECKING:
    from .sa import IkeSa


def beget(sa: IkeSa, keys: IkeKeys, suite: IkeSuite, spis: tuple[bytes, bytes], *, initiator: bool) -> IkeSa:
    """A successor with keys and without anything else yet. `initiator` says who began its exchange."""
    new = type(sa)(
        sa.local, sa.local.next_sa_id(), sa.path, initiator=initiator, spi_i=spis[0], spi_r=spis[1], tag=sa.tag
    )
    new.silent = True
    new.predecessor = sa
    new.come_of_age(sa, keys, suite)
    new.kin, sa.kin = [*new.kin, sa], [*sa.kin, new]
    return new


def hand_over(old: IkeSa, new: IkeSa, now: float) -> None:
    """Everything of `old` is `new`'s: the id, the Child SAs, waiting requests, a move under way."""
    new.predecessor = None
    if old.silent:
        return
    new.id, old.id = old.id, new.id
    new.silent, old.silent = False, True
    new.path, new.moving, old.moving = old.path, old.moving, None
    new.children, old.children = old.children, new.children
    new.requests.inherit(old.requests)
    new.inherit_later(old, now)
    new.established_at = now
    new.emit(SaRekeyed(new.id, (old.spi_i, old.spi_r), (new.spi_i, new.spi_r), now))
    old.heir = new
    old.expire(now)
    new.live_on(now)


def dismiss(sa: IkeSa, now: float, *, creator: bool) -> None:
    """One of two successors is not needed. Its creator deletes it, the other side waits for that."""
    sa.predecessor = None
    if creator:
        sa.close("redundant", now)
    else:
        sa.expire(now)
