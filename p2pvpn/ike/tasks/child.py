"""Negotiating a Child SA (RFC 7296 sections 1.3, 2.9 and 2.17).

IKE_AUTH carries the first one. More are not made here: CREATE_CHILD_SA is answered NO_ADDITIONAL_SAS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from p2pvpn.core.child import ChildSa
from p2pvpn.core.errors import WireError
from p2pvpn.core.selector import Selector, narrow
from p2pvpn.ike.codes import Protocol
from p2pvpn.ike.message import Message
from p2pvpn.ike.notifies import NotifyType
from p2pvpn.ike.payloads import Payload, SecurityAssociation, SelectorsInitiator, SelectorsResponder
from p2pvpn.ike.proposals import ChildSuite, Proposal, choose_child, chosen_child_untrusted, offer_child
from p2pvpn.ike.states import State

from .task import Received, Refusal, Reply

if TYPE_CHECKING:
    from p2pvpn.ike.sa import IkeSa

ESP_SPI_BYTES = 4
MIN_ESP_SPI = 256
"""0 to 255 are reserved (RFC 4303 section 2.1)."""
MAX_SELECTORS = 64
"""Of each side after narrowing: what the ESP planes look up per packet."""


@dataclass(frozen=True, slots=True)
class ChildOffer:
    """What we offered: our inbound SPI, the proposal, and the selectors of both sides."""

    spi: int
    proposal: Proposal
    local: tuple[Selector, ...]
    remote: tuple[Selector, ...]

    @classmethod
    def make(cls, sa: IkeSa, local: tuple[Selector, ...], remote: tuple[Selector, ...]) -> ChildOffer:
        settings = sa.local.settings
        spi = sa.local.allocate_spi()
        proposal = offer_child(settings.esp_suites, settings.esn, spi.to_bytes(ESP_SPI_BYTES, "big"))
        return cls(spi, proposal, local, remote)

    @property
    def payloads(self) -> list[Payload]:
        return [
            SecurityAssociation((self.proposal,)),
            SelectorsInitiator(self.local),
            SelectorsResponder(self.remote),
        ]

    def accepted_untrusted(self, sa: IkeSa, message: Message, blocks: Sequence[Selector]) -> ChildSa:
        """The Child SA that the answer makes.

        Raises WireError when the answer is not within the offer, Refusal when it gives the peer addresses that its
        identity does not hold.
        """
        proposal, suite = chosen_child_untrusted(
            message.one(SecurityAssociation).proposals, self.proposal, sa.local.settings.esp_suites
        )
        local = message.one(SelectorsInitiator).selectors
        remote = message.one(SelectorsResponder).selectors
        if not _within(local, self.local) or not _within(remote, self.remote):
            raise WireError("the responder's selectors are wider than ours")
        allowed = narrow(remote, blocks)[:MAX_SELECTORS]
        if not allowed:
            raise Refusal("the peer's identity does not hold its addresses", NotifyType.TS_UNACCEPTABLE)
        return _make(sa, suite, (self.spi, _spi_untrusted(proposal)), local, allowed)


def answer_offer(sa: IkeSa, message: Message, blocks: Sequence[Selector]) -> tuple[ChildSa, list[Payload]]:
    """The Child SA that we make of the initiator's offer, and the payloads that say so. Raises Refusal, WireError."""
    settings = sa.local.settings
    credential = sa.credential
    assert credential is not None
    remote = narrow(message.one(SelectorsInitiator).selectors, blocks)[:MAX_SELECTORS]
    local = narrow(message.one(SelectorsResponder).selectors, credential.local_blocks)[:MAX_SELECTORS]
    found = choose_child(message.one(SecurityAssociation).proposals, settings.esp_suites, settings.esn, b"")
    if found is None:
        raise Refusal("no ESP proposal that we can accept", NotifyType.NO_PROPOSAL_CHOSEN)
    if not remote or not local:
        raise Refusal("no common traffic selectors", NotifyType.TS_UNACCEPTABLE)
    theirs, ours, suite = found
    spi_out = _spi_untrusted(theirs)
    spi = sa.local.allocate_spi()
    child = _make(sa, suite, (spi, spi_out), local, remote)
    chosen = Proposal(ours.number, Protocol.ESP, spi.to_bytes(ESP_SPI_BYTES, "big"), ours.transforms)
    return child, [SecurityAssociation((chosen,)), SelectorsInitiator(remote), SelectorsResponder(local)]


def _spi_untrusted(proposal: Proposal) -> int:
    spi = int.from_bytes(proposal.spi, "big")
    if len(proposal.spi) != ESP_SPI_BYTES or spi < MIN_ESP_SPI:
        raise WireError("an ESP SPI that cannot be")
    return spi


def _within(answered: Sequence[Selector], offered: Sequence[Selector]) -> bool:
    return bool(answered) and all(any(one.holds(part) for one in offered) for part in answered)


def _make(
    sa: IkeSa,
    suite: ChildSuite,
    spis: tuple[int, int],
    local: tuple[Selector, ...],
    remote: tuple[Selector, ...],
) -> ChildSa:
    """The Child SA with these SPIs, inbound first."""
    handshake, credential = sa.handshake, sa.credential
    assert handshake is not None
    assert credential is not None
    forth, back = handshake.keys.child(suite.cipher, handshake.nonce_i, handshake.nonce_r)
    key_out, key_in = (forth, back) if sa.initiator else (back, forth)
    return ChildSa(
        id=sa.local.next_child_id(),
        network=credential.network,
        suite=suite.cipher,
        spi_in=spis[0],
        spi_out=spis[1],
        key_in=key_in,
        key_out=key_out,
        local=local,
        remote=remote,
        path=sa.path,
        esn=suite.esn,
    )


def answer(sa: IkeSa, received: Received, now: float) -> Reply:
    """CREATE_CHILD_SA: there is no second child, and nothing new while we delete the SA (RFC 7296 section 2.25.2)."""
    if sa.state is State.DELETING:
        raise Refusal("the SA is being deleted", NotifyType.TEMPORARY_FAILURE)
    raise Refusal("one Child SA is all there is", NotifyType.NO_ADDITIONAL_SAS)
