"""CREATE_CHILD_SA for Child SAs (RFC 7296 sections 1.3.1, 1.3.3, 2.8 and 2.25): new ones, and replacements.

A replacement loses no packet. The responder installs it and goes on sending over the old one; the initiator installs
it, sends over it, and deletes the old one; the responder turns to the new one when it is told of that. Both go on
receiving over the old one for a while.

When both replace the same one at once, both replacements are made, and the one whose exchange has the lowest of the
four nonces is deleted by its creator, unused. Whoever created the other deletes the old one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from p2pvpn.core.child import ChildSa
from p2pvpn.core.errors import WireError
from p2pvpn.core.secret import Secret
from p2pvpn.core.selector import Selector
from p2pvpn.crypto.kex import KexMethod
from p2pvpn.ike.codes import Exchange, Protocol
from p2pvpn.ike.message import Message, notifications
from p2pvpn.ike.notifies import Notify, NotifyType
from p2pvpn.ike.outputs import ChildAdded, ChildClosed, ChildFailed, ChildRekeyed, InstallChild, RemoveChild, UseChild
from p2pvpn.ike.payloads import Delete, KeyExchangeData, Nonce, Payload, SelectorsInitiator
from p2pvpn.ike.states import State

from . import rekey
from .child import ESP_SPI_BYTES, ChildOffer, ChildTerms, answer_offer, make_child
from .followup import NONCE_BYTES, Creation, Rival, answer_share_untrusted, begin_half
from .task import Received, Refusal, Reply, Task, Verdict

if TYPE_CHECKING:
    from p2pvpn.ike.sa import IkeSa


class CreateChild(Creation):
    """A Child SA of ours; `replaces` names the one that it takes the place of."""

    holds_back_rekeying = True

    def __init__(self, local: tuple[Selector, ...], remote: tuple[Selector, ...], replaces: int | None = None) -> None:
        super().__init__()
        self.replaces = replaces
        self._local = local
        self._remote = remote
        self._offer: ChildOffer | None = None
        self._terms: ChildTerms | None = None

    def wanted(self, sa: IkeSa) -> bool:
        """Nothing is left to replace when the peer was faster."""
        if self.replaces is None:
            return True
        children = sa.children
        return self.replaces in children.live and self.replaces not in children.closing | set(children.successor)

    def ready(self, sa: IkeSa, now: float) -> bool:
        """The peer has to know what is replaced."""
        known = self.replaces is None or not sa.children.may_be_unknown(self.replaces, now)
        return known and super().ready(sa, now)

    def groups(self, sa: IkeSa) -> tuple[KexMethod, ...]:
        return sa.local.settings.child_kexes

    def offer(self, sa: IkeSa) -> list[Payload]:
        old = None if self.replaces is None else sa.children.get(self.replaces)
        offer = self._offer = ChildOffer.make(sa, self._local, self._remote, first=False, replaces=old)
        if old is None:
            return offer.payloads
        spi = old.spi_in.to_bytes(ESP_SPI_BYTES, "big")
        return [*notifications([Notify(NotifyType.REKEY_SA, b"", Protocol.ESP, spi)]), *offer.payloads]

    def chosen_untrusted(self, sa: IkeSa, message: Message) -> tuple[KexMethod | None, tuple[KexMethod, ...]]:
        assert self._offer is not None
        assert sa.remote is not None
        try:
            terms = self._terms = self._offer.accepted_untrusted(message, sa.remote.blocks)
        except Refusal:
            # The peer believes that it stands.
            spi = self._offer.spi.to_bytes(ESP_SPI_BYTES, "big")
            sa.requests.add_first(DeleteChildren((spi,)))
            raise
        return terms.suite.kex, terms.suite.additional

    def complete(self, sa: IkeSa, now: float) -> None:
        assert self._terms is not None
        child = make_child(sa, self._terms, self._nonces, began=True, secrets=self._secrets)
        sa.children.add(child)
        sa.emit(InstallChild(sa.id, child))
        if self.loses:
            close_child(sa, child.id)
            return
        sa.emit(UseChild(sa.id, child.id))
        if self.replaces is None:
            sa.emit(ChildAdded(sa.id, child.id))
            return
        sa.emit(ChildRekeyed(sa.id, self.replaces, child.id))
        if self.replaces in sa.children.live:
            sa.children.successor.pop(self.replaces, None)
            close_child(sa, self.replaces)

    def failed(self, sa: IkeSa, error: Notify | str, now: float) -> None:
        if isinstance(error, Notify) and error.type == NotifyType.CHILD_SA_NOT_FOUND and self.replaces is not None:
            # The peer has deleted it: so do we, silently (RFC 7296 section 2.25.1).
            if self.wanted(sa):
                sa.children.forget(self.replaces)
                sa.emit(RemoveChild(sa.id, self.replaces))
                sa.emit(ChildClosed(sa.id, self.replaces))
            return
        sa.emit(ChildFailed(sa.id, f"the peer says {error}"))


class DeleteChildren(Task):
    """DELETE of Child SAs by our inbound SPIs."""

    exchange = Exchange.INFORMATIONAL
    holds_back_rekeying = True

    def __init__(self, spis: tuple[bytes, ...], ids: tuple[int, ...] = ()) -> None:
        self._spis = spis
        self.ids = ids

    def ready(self, sa: IkeSa, now: float) -> bool:
        """The peer has to know what is deleted."""
        return not any(sa.children.may_be_unknown(child_id, now) for child_id in self.ids)

    def request(self, sa: IkeSa) -> list[Payload]:
        return [Delete(Protocol.ESP, self._spis)]

    def answered(self, sa: IkeSa, received: Received, now: float) -> Verdict:
        for child_id in self.ids:
            if child_id in sa.children.live:
                sa.retire_child(child_id, now)
        return Verdict.DONE


def close_child(sa: IkeSa, child_id: int) -> None:
    """Our DELETE of one of them; it receives until the peer knows, and a little longer."""
    child = sa.children.get(child_id)
    if child is None or child_id in sa.children.closing:
        return
    sa.children.closing.add(child_id)
    sa.requests.add_first(DeleteChildren((child.spi_in.to_bytes(ESP_SPI_BYTES, "big"),), (child_id,)))


def answer(sa: IkeSa, received: Received, now: float) -> Reply:
    """CREATE_CHILD_SA of the peer. Raises Refusal, WireError."""
    message = received.message
    sa.half = None
    if sa.state is State.DELETING or sa.silent:
        raise Refusal("the SA is being deleted", NotifyType.TEMPORARY_FAILURE)
    if message.first(SelectorsInitiator) is None:
        return rekey.answer(sa, received, now)
    if isinstance(sa.creating, rekey.RekeyIke):
        raise Refusal("the IKE SA is being rekeyed", NotifyType.TEMPORARY_FAILURE)
    old = _replaced(sa, message)
    limit = sa.local.settings.children_max
    if len(sa.children) >= (limit if old is None else 2 * limit):
        raise Refusal("too many Child SAs", NotifyType.NO_ADDITIONAL_SAS)
    assert sa.remote is not None
    terms, described = answer_offer(sa, message, sa.remote.blocks)
    nonces = (message.one(Nonce).data, sa.local.entropy(NONCE_BYTES))
    payloads = [*described, Nonce(nonces[1])]
    secrets = []
    if terms.suite.kex is not None:
        public, secret = answer_share_untrusted(terms.suite.kex, message)
        payloads.append(KeyExchangeData(terms.suite.kex.transform, public))
        secrets.append(secret)
    if old is not None and isinstance(sa.creating, CreateChild) and sa.creating.replaces == old.id:
        sa.creating.rival = Rival(min(nonces))

    def finish(shared: list[Secret]) -> Reply:
        if old is not None:
            _check_replaceable(sa, old)
        return _made(sa, make_child(sa, terms, nonces, began=False, secrets=shared), old)

    return begin_half(sa, payloads, terms.suite.additional, secrets=secrets, finish=finish, now=now)


def _replaced(sa: IkeSa, message: Message) -> ChildSa | None:
    """The Child SA that REKEY_SA names, None without one."""
    named = message.notify(NotifyType.REKEY_SA)
    if named is None:
        return None
    if named.protocol != Protocol.ESP or len(named.spi) != ESP_SPI_BYTES:
        raise WireError("REKEY_SA names no Child SA")
    child = sa.children.by_outbound(named.spi)
    if child is None:
        raise Refusal("no such Child SA", NotifyType.CHILD_SA_NOT_FOUND, protocol=Protocol.ESP, spi=named.spi)
    _check_replaceable(sa, child)
    return child


def _check_replaceable(sa: IkeSa, child: ChildSa) -> None:
    """Asked before each key exchange of its replacement, as it may go away in between. Raises Refusal."""
    if child.id in sa.children.closing:
        raise Refusal("the Child SA is being deleted", NotifyType.TEMPORARY_FAILURE)
    if child.id not in sa.children.live:
        spi = child.spi_out.to_bytes(ESP_SPI_BYTES, "big")
        raise Refusal("the Child SA is gone", NotifyType.CHILD_SA_NOT_FOUND, protocol=Protocol.ESP, spi=spi)


def _made(sa: IkeSa, child: ChildSa, old: ChildSa | None) -> Reply:
    """The responder's new Child SA. A replacement is used when the old one is deleted."""
    sa.children.add(child)
    sa.children.unconfirmed.add(child.id)
    sa.emit(InstallChild(sa.id, child))
    if old is None:
        return Reply((), (UseChild(sa.id, child.id), ChildAdded(sa.id, child.id)))
    sa.children.successor[old.id] = child.id
    return Reply()
