"""INFORMATIONAL (RFC 7296 section 1.4): liveness, notifications, deletion; and how such requests are answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from p2pvpn.core.output import Output
from p2pvpn.ike.codes import Exchange, Protocol
from p2pvpn.ike.config import IkeSettings
from p2pvpn.ike.message import Message, notifications
from p2pvpn.ike.notifies import Notify, NotifyType
from p2pvpn.ike.outputs import ChildClosed, ChildRekeyed, Informed, Liveness, Redirected, RemoveChild, UseChild
from p2pvpn.ike.payloads import Delete, Payload
from p2pvpn.ike.redirect import parse_redirect_untrusted
from p2pvpn.ike.states import Step

from .mobike import answer_update
from .task import Received, Reply, Task, Verdict

if TYPE_CHECKING:
    from p2pvpn.ike.sa import IkeSa

FATAL = frozenset({NotifyType.AUTHENTICATION_FAILED, NotifyType.INVALID_SYNTAX})
"""Errors in a request that end the SA (RFC 7296 sections 2.21.2 and 2.21.3)."""


class Inform(Task):
    """Payloads for the peer. With `ends`, the SA is over once the peer has them."""

    exchange = Exchange.INFORMATIONAL

    def __init__(self, payloads: Sequence[Payload], *, ends: bool = False) -> None:
        self._payloads = list(payloads)
        self._ends = ends

    @property
    def ends(self) -> bool:
        return self._ends

    def tries(self, settings: IkeSettings) -> int:
        return settings.delete_tries if self._ends else settings.tries

    def request(self, sa: IkeSa) -> list[Payload]:
        return self._payloads

    def answered(self, sa: IkeSa, received: Received, now: float) -> Verdict:
        if self._ends:
            sa.end(Step.ANSWERED, "", now)
        return Verdict.DONE


class Probe(Task):
    """An empty request: is the peer alive (RFC 7296 section 2.4)?"""

    exchange = Exchange.INFORMATIONAL

    def request(self, sa: IkeSa) -> list[Payload]:
        return []

    def answered(self, sa: IkeSa, received: Received, now: float) -> Verdict:
        sa.emit(Liveness(sa.id, now))
        return Verdict.DONE


def delete_request() -> Inform:
    """The end of the SA and of all its children."""
    return Inform([Delete(Protocol.IKE)], ends=True)


def answer(sa: IkeSa, received: Received, now: float) -> Reply:
    """The peer's request."""
    message = received.message
    if any(one.protocol == Protocol.IKE for one in message.all(Delete)):
        sa.yield_to_successor(now)
        return Reply(step=Step.PEER_CLOSED, reason="the peer closed it")
    fatal = next((one for one in message.notifies if one.type in FATAL), None)
    if fatal is not None:
        return Reply(step=Step.PEER_CLOSED, reason=f"the peer says {fatal}")
    payloads, then = _answer_delete(sa, message, now)
    payloads += notifications(_echo(message))
    payloads += notifications(answer_update(sa, received, then, now))
    gateway = message.notify(NotifyType.REDIRECT)
    if gateway is not None:
        then.append(Redirected(sa.id, parse_redirect_untrusted(gateway.data)[0], False))
    told = tuple(one for one in message.notifies if one.is_for_the_engine)
    if told:
        then.append(Informed(sa.id, told, received.path))
    return Reply(tuple(payloads), tuple(then))


def _answer_delete(sa: IkeSa, message: Message, now: float) -> tuple[list[Payload], list[Output]]:
    """Child SAs that the peer deletes by its inbound SPIs; the answer names ours (RFC 7296 section 1.4.1).

    One that we delete too is not named. The deletion of one that the peer has replaced is the sign to turn to the
    replacement, which is ready at the other end (section 2.8).
    """
    named = {spi for one in message.all(Delete) if one.protocol == Protocol.ESP for spi in one.spis}
    gone = [child for child in sa.children.live.values() if child.spi_out.to_bytes(4, "big") in named]
    told = tuple(child.spi_in.to_bytes(4, "big") for child in gone if child.id not in sa.children.closing)
    then: list[Output] = []
    for child in gone:
        successor = sa.children.successor.get(child.id)
        if successor is not None:
            sa.emit(UseChild(sa.id, successor))
            then.append(ChildRekeyed(sa.id, child.id, successor))
        if successor is not None or child.id in sa.children.closing:
            sa.retire_child(child.id, now)
        else:
            sa.children.forget(child.id)
            then += [RemoveChild(sa.id, child.id), ChildClosed(sa.id, child.id)]
    return [Delete(Protocol.ESP, told)] if told else [], then


def _echo(message: Message) -> list[Notify]:
    """COOKIE2 comes back as it was (RFC 4555 section 3.7)."""
    return [one for one in message.notifies if one.type == NotifyType.COOKIE2][:1]
