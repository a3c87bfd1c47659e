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
from p2pvpn.ike.message import Message, notifications
from p2pvpn.ike.notifies import Notify, NotifyType
from p2pvpn.ike.payloads import KeyExchangeData, Payload, SecurityAssociation, SelectorsInitiator, SelectorsResponder
from p2pvpn.ike.proposals import (
    Allowed,
    ChildSuite,
    Proposal,
    choose_child,
    chosen_child_untrusted,
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
    transport: bool = False


@dataclass(frozen=True, slots=True)
class ChildOffer:
    """What we offered: our inbound SPI, the proposals, the selectors of both sides, and transport mode or not.

    `first` is the one of IKE_AUTH, which has no key exchange of its own.
    """

    spi: int
    proposals: tuple[Proposal, ...]
    local: tuple[Selector, ...]
    remote: tuple[Selector, ...]
    first: bool
    transport: bool = False

    @classmethod
    def make(
        cls,
        sa: IkeSa,
        local: tuple[Selector, ...],
        remote: tuple[Selector, ...],
        *,
        first: bool,
        replaces: ChildSa | None = None,
        transport: bool = False,
    ) -> ChildOffer:
        """A new one, or one like the Child SA that it `replaces`: the peer may know nothing but what is in use."""
        settings = sa.local.settings
        suites = settings.esp_suites
        if replaces is not None:
            suites = tuple(dict.fromkeys((*suites, replaces.suite)))
            transport = replaces.transport_mode
        spi = sa.local.allocate_spi()
        packed = spi.to_bytes(ESP_SPI_BYTES, "big")
        kexes, more = ((), ()) if first else (settings.child_kexes, settings.child_additional_kexes)
        proposals = offers_child(suites, settings.esn, packed, kexes, more)
        return cls(spi, proposals, local, remote, first, transport)

    @property
    def payloads(self) -> list[Payload]:
        return [
            *_transport_notify(self.transport),
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
        transport = self.transport and message.notify(NotifyType.USE_TRANSPORT_MODE) is not None
        return ChildTerms(suite, (self.spi, _spi_untrusted(proposal)), local, allowed, transport)


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
    transport = _takes_transport(sa, message, local, remote)
    described: list[Payload] = [
        *_transport_notify(transport),
        SecurityAssociation((chosen,)),
        SelectorsInitiator(remote),
        SelectorsResponder(local),
    ]
    return ChildTerms(suite, (spi, spi_out), local, remote, transport), described


def _transport_notify(transport: bool) -> list[Payload]:
    return [*notifications([Notify(NotifyType.USE_TRANSPORT_MODE)])] if transport else []


def _takes_transport(sa: IkeSa, message: Message, local: tuple[Selector, ...], remote: tuple[Selector, ...]) -> bool:
    """Transport mode is for what the two ends of the path say to each other, with no NAT that changes who they are.

    Everything else that asks for it gets tunnel mode (RFC 7296 section 1.3.1).
    """
    if not sa.local.settings.transport_mode or message.notify(NotifyType.USE_TRANSPORT_MODE) is None:
        return False
    ends = ((local, sa.path.local), (remote, sa.path.remote))
    return all(selector.start == selector.end == end.ip for selectors, end in ends for selector in selectors)


def child_allowed(settings: IkeSettings, sent_group: int) -> Allowed:
    """What a Child SA of the peer's may be like: any key exchange that an IKE SA may have."""
    return Allowed(
        settings.all_esp_suites,
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
        transport_mode=terms.transport,
    )


def _spi_untrusted(proposal: Proposal) -> int:
    spi = int.from_bytes(proposal.spi, "big")
    if len(proposal.spi) != ESP_SPI_BYTES or spi < MIN_ESP_SPI:
        raise WireError("an ESP SPI that cannot be")
    return spi


def _within(answered: Sequence[Selector], offered: Sequence[Selector]) -> bool:
    return bool(answered) and all(any(one.holds(part) for one in offered) for part in answered)
