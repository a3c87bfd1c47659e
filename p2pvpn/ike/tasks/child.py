"""What a Child SA is made of (RFC 7296 sections 1.3, 2.9 and 2.17): proposals, selectors, SPIs, keys.

IKE_AUTH carries the first one, CREATE_CHILD_SA (module `create`) all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from p2pvpn.core.child import ChildSa
from p2pvpn.core.errors import WireError
from p2pvpn.core.secret import Secret
from p2pvpn.core.selector import Selector, narrow
from p2pvpn.ike.codes import Protocol
from p2pvpn.ike.config import IkeSettings
from p2pvpn.ike.message import Message
from p2pvpn.ike.notifies import NotifyType
from p2pvpn.ike.payloads import KeyExchangeData, Payload, SecurityAssociation, SelectorsInitiator, SelectorsResponder
from p2pvpn.ike.proposals import (
    Allowed,
    ChildSuite,
    Proposal,
    choose_child,
    chosen_child_untrusted,
    offer_child,
    offers_child,
)

from .task import Refusal

if TYPE_CHECKING:
    from p2pvpn.ike.sa import IkeSa

ESP_SPI_BYTES = 4
MIN_ESP_SPI = 256
"""0 to 255 are reserved (RFC 4303 section 2.1)."""
MAX_SELECTORS = 64
"""Of each side after narrowing: what the ESP planes look up per packet."""


@dataclass(frozen=True, slots=True)
class ChildTerms:
    """What two sides agreed on: algorithms, SPIs with our inbound one first, selectors from our side."""

    suite: ChildSuite
    spis: tuple[int, int]
    local: tuple[Selector, ...]
    remote: tuple[Selector, ...]


@dataclass(frozen=True, slots=True)
class ChildOffer:
    """What we offered: our inbound SPI, the proposals, and the selectors of both sides.

    `first` is the one of IKE_AUTH, which has no key exchange of its own.
    """

    spi: int
    proposals: tuple[Proposal, ...]
    local: tuple[Selector, ...]
    remote: tuple[Selector, ...]
    first: bool

    @classmethod
    def make(cls, sa: IkeSa, local: tuple[Selector, ...], remote: tuple[Selector, ...], *, first: bool) -> ChildOffer:
        settings = sa.local.settings
        spi = sa.local.allocate_spi()
        packed = spi.to_bytes(ESP_SPI_BYTES, "big")
        if first:
            proposals: tuple[Proposal, ...] = (offer_child(settings.esp_suites, settings.esn, packed),)
        else:
            kexes, more = settings.child_kexes, settings.child_additional_kexes
            proposals = offers_child(settings.esp_suites, settings.esn, packed, kexes, more)
        return cls(spi, proposals, local, remote, first)

    @property
    def payloads(self) -> list[Payload]:
        return [
            SecurityAssociation(self.proposals),
            SelectorsInitiator(self.local),
            SelectorsResponder(self.remote),
        ]

    def accepted_untrusted(self, message: Message, blocks: Sequence[Selector]) -> ChildTerms:
        """What the answer makes of it.

        Raises WireError when the answer is not within the offer, Refusal when it gives the peer addresses that its
        identity does not hold.
        """
        answer = message.one(SecurityAssociation).proposals
        proposal, suite = chosen_child_untrusted(answer, self.proposals, first=self.first)
        local = message.one(SelectorsInitiator).selectors
        remote = message.one(SelectorsResponder).selectors
        if not _within(local, self.local) or not _within(remote, self.remote):
            raise WireError("the responder's selectors are wider than ours")
        allowed = narrow(remote, blocks)[:MAX_SELECTORS]
        if not allowed:
            raise Refusal("the peer's identity does not hold its addresses", NotifyType.TS_UNACCEPTABLE)
        return ChildTerms(suite, (self.spi, _spi_untrusted(proposal)), local, allowed)


def answer_offer(
    sa: IkeSa, message: Message, blocks: Sequence[Selector], *, first: bool = False
) -> tuple[ChildTerms, list[Payload]]:
    """What we make of the initiator's offer, and the payloads that say so. Raises Refusal, WireError."""
    settings = sa.local.settings
    credential = sa.credential
    assert credential is not None
    remote = narrow(message.one(SelectorsInitiator).selectors, blocks)[:MAX_SELECTORS]
    local = narrow(message.one(SelectorsResponder).selectors, credential.local_blocks)[:MAX_SELECTORS]
    share = message.first(KeyExchangeData)
    allowed = child_allowed(settings, 0 if share is None else share.group)
    found = choose_child(message.one(SecurityAssociation).proposals, allowed, b"", first=first)
    if found is None:
        raise Refusal("no ESP proposal that we can accept", NotifyType.NO_PROPOSAL_CHOSEN)
    if not remote or not local:
        raise Refusal("no common traffic selectors", NotifyType.TS_UNACCEPTABLE)
    theirs, ours, suite = found
    spi_out = _spi_untrusted(theirs)
    if suite.kex is not None and (share is None or share.group != suite.kex.transform):
        group = suite.kex.transform.to_bytes(2, "big")
        raise Refusal("a key share of another group", NotifyType.INVALID_KE_PAYLOAD, group)
    spi = sa.local.allocate_spi()
    chosen = Proposal(ours.number, Protocol.ESP, spi.to_bytes(ESP_SPI_BYTES, "big"), ours.transforms)
    described: list[Payload] = [SecurityAssociation((chosen,)), SelectorsInitiator(remote), SelectorsResponder(local)]
    return ChildTerms(suite, (spi, spi_out), local, remote), described


def child_allowed(settings: IkeSettings, sent_group: int) -> Allowed:
    """What a Child SA of the peer's may be like: any key exchange that an IKE SA may have."""
    return Allowed(
        settings.esp_suites,
        kexes=settings.kexes,
        additional=settings.known_additional,
        esn=settings.esn,
        sent_group=sent_group,
    )


def make_child(
    sa: IkeSa,
    terms: ChildTerms,
    nonces: tuple[bytes, bytes],
    *,
    began: bool,
    secrets: Sequence[Secret] = (),
) -> ChildSa:
    """The Child SA; nonces are those of its exchange, which `began` says whether we began."""
    keys, credential = sa.keys, sa.credential
    assert keys is not None
    assert credential is not None
    forth, back = keys.child(terms.suite.cipher, *nonces, secrets)
    key_out, key_in = (forth, back) if began else (back, forth)
    return ChildSa(
        id=sa.local.next_child_id(),
        network=credential.network,
        suite=terms.suite.cipher,
        spi_in=terms.spis[0],
        spi_out=terms.spis[1],
        key_in=key_in,
        key_out=key_out,
        local=terms.local,
        remote=terms.remote,
        path=sa.path,
        esn=terms.suite.esn,
    )


def _spi_untrusted(proposal: Proposal) -> int:
    spi = int.from_bytes(proposal.spi, "big")
    if len(proposal.spi) != ESP_SPI_BYTES or spi < MIN_ESP_SPI:
        raise WireError("an ESP SPI that cannot be")
    return spi


def _within(answered: Sequence[Selector], offered: Sequence[Selector]) -> bool:
    return bool(answered) and all(any(one.holds(part) for one in offered) for part in answered)
