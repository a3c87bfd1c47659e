"""Rekeying an IKE SA (RFC 7296 sections 1.3.2, 2.8, 2.18 and 2.25.2): a successor that inherits everything.

The initiator of the exchange hands over when it has the answer, and deletes the old IKE SA. The responder hands over
when it answers; if it was rekeying too, it waits until it knows which of the two successors stays: the one whose
exchange does not have the lowest of the four nonces. The creator of the other deletes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from p2pvpn.core.errors import WireError
from p2pvpn.core.secret import Secret
from p2pvpn.crypto.kex import KexMethod
from p2pvpn.ike.family import beget, dismiss, hand_over
from p2pvpn.ike.keys import expand
from p2pvpn.ike.message import NO_SPI, Message
from p2pvpn.ike.notifies import Notify, NotifyType
from p2pvpn.ike.outputs import RekeyFailed
from p2pvpn.ike.payloads import KeyExchangeData, Nonce, Payload, SecurityAssociation
from p2pvpn.ike.proposals import Allowed, IkeSuite, Proposal, choose_ike, chosen_ike_untrusted, offers_ike

from .followup import NONCE_BYTES, Creation, Rival, answer_share_untrusted, begin_half
from .mobike import is_moving
from .task import Received, Refusal, Reply

if TYPE_CHECKING:
    from p2pvpn.ike.sa import IkeSa


class RekeyIke(Creation):
    """Our request for a successor."""

    passes_on = False

    def __init__(self) -> None:
        super().__init__()
        self._spi = b""
        self._peer_spi = b""
        self._offers: tuple[Proposal, ...] = ()
        self._suite: IkeSuite | None = None

    def wanted(self, sa: IkeSa) -> bool:
        return not sa.silent

    def groups(self, sa: IkeSa) -> tuple[KexMethod, ...]:
        return sa.local.settings.kexes

    def offer(self, sa: IkeSa) -> list[Payload]:
        settings = sa.local.settings
        self._spi = sa.local.fresh_spi()
        # The peer may know nothing but what is in use.
        ciphers = tuple(dict.fromkeys((*settings.ciphers, *([sa.suite.cipher] if sa.suite else []))))
        self._offers = offers_ike(ciphers, settings.prfs, settings.kexes, settings.additional_kexes, self._spi)
        return [SecurityAssociation(self._offers)]

    def chosen_untrusted(self, sa: IkeSa, message: Message) -> tuple[KexMethod | None, tuple[KexMethod, ...]]:
        answer = message.one(SecurityAssociation).proposals
        proposal, suite = chosen_ike_untrusted(answer, self._offers, self._spi)
        if proposal.spi == NO_SPI:
            raise WireError("the responder's SPI is zero")
        self._peer_spi, self._suite = proposal.spi, suite
        return suite.kex, suite.additional

    def complete(self, sa: IkeSa, now: float) -> None:
        assert self._suite is not None
        successor = _successor(sa, self._suite, self._nonces, self._secrets, (self._spi, self._peer_spi), began=True)
        rival = None if self.rival is None else self.rival.made
        if self.loses and isinstance(rival, type(sa)) and rival.is_established:
            hand_over(sa, rival, now)
            dismiss(successor, now, creator=True)
            return
        hand_over(sa, successor, now)
        sa.close("rekeyed", now)
        if isinstance(rival, type(sa)):
            dismiss(rival, now, creator=False)

    def failed(self, sa: IkeSa, error: Notify | str, now: float) -> None:
        sa.emit(RekeyFailed(sa.id, f"the peer says {error}"))

    def dropped(self, sa: IkeSa, now: float) -> None:
        made = None if self.rival is None else self.rival.made
        if isinstance(made, type(sa)) and made.is_established:
            hand_over(sa, made, now)


def answer(sa: IkeSa, received: Received, now: float) -> Reply:
    """The peer wants a successor. Raises Refusal, WireError."""
    message = received.message
    _check_free(sa)
    settings = sa.local.settings
    share = message.one(KeyExchangeData)
    spi = sa.local.fresh_spi()
    allowed = Allowed(
        settings.all_ciphers,
        settings.prfs,
        settings.kexes,
        settings.known_additional,
        sent_group=share.group,
    )
    found = choose_ike(message.one(SecurityAssociation).proposals, allowed, spi)
    if found is None:
        raise Refusal("no proposal that we can accept", NotifyType.NO_PROPOSAL_CHOSEN)
    theirs, chosen, suite = found
    if theirs.spi == NO_SPI:
        raise WireError("the initiator's SPI is zero")
    if suite.kex.transform != share.group:
        group = suite.kex.transform.to_bytes(2, "big")
        raise Refusal("a key share of another group", NotifyType.INVALID_KE_PAYLOAD, group)
    nonces = (message.one(Nonce).data, sa.local.entropy(NONCE_BYTES))
    public, secret = answer_share_untrusted(suite.kex, message)
    payloads: list[Payload] = [
        SecurityAssociation((chosen,)),
        Nonce(nonces[1]),
        KeyExchangeData(suite.kex.transform, public),
    ]
    rival = None
    if isinstance(sa.creating, RekeyIke):
        rival = sa.creating.rival = Rival(min(nonces))

    def finish(secrets: list[Secret]) -> Reply:
        _check_free(sa)
        successor = _successor(sa, suite, nonces, secrets, (theirs.spi, spi), began=False)
        if isinstance(sa.creating, RekeyIke) and sa.creating.rival is rival and rival is not None:
            rival.made = successor
        else:
            sa.after_answer = successor
        return Reply()

    return begin_half(sa, payloads, suite.additional, secrets=[secret], finish=finish, now=now)


def _check_free(sa: IkeSa) -> None:
    """Asked before each of its key exchanges. Raises Refusal while we make, replace or delete a Child SA, or move."""
    waiting = sa.requests.outstanding
    tasks = (sa.creating, None if waiting is None else waiting.task)
    if is_moving(sa) or any(task is not None and task.holds_back_rekeying for task in tasks):
        raise Refusal("something else is going on", NotifyType.TEMPORARY_FAILURE)


def _successor(
    sa: IkeSa,
    suite: IkeSuite,
    nonces: tuple[bytes, bytes],
    secrets: list[Secret],
    spis: tuple[bytes, bytes],
    *,
    began: bool,
) -> IkeSa:
    """The new IKE SA: SKEYSEED by the old PRF, the keys by the new one; `began` says whether the exchange was ours."""
    assert sa.keys is not None
    seed = sa.keys.next_seed(*nonces, secrets)
    keys = expand(suite.prf, suite.cipher, seed, nonces, spis)
    return beget(sa, keys, suite, spis, initiator=began)
