"""Proposals of the SA payload (RFC 7296 section 3.3): offering, choosing, checking a choice.

    proposal:   | more 2/0 u8 | zero | length u16 | number u8 | protocol u8 | spi size u8 | transforms u8 | spi |
                | transform ... |
    transform:  | more 3/0 u8 | zero | length u16 | type u8 | zero | id u16 | attribute ... |
    attribute:  | 1 bit set, type 15 bits | value u16 |   or   | 0 bit, type 15 bits | length u16 | value ... |

All our ciphers are authenticated ones, so one proposal holds every combination of them and no integrity transform.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from p2pvpn.core.child import EspSuite
from p2pvpn.core.errors import WireError
from p2pvpn.core.wire import Reader
from p2pvpn.crypto.kex import KexMethod
from p2pvpn.crypto.prf import Prf

from .codes import KEY_LENGTH_ATTRIBUTE, NO_TRANSFORM, Protocol, TransformType

MAX_PROPOSALS = 32
"""Android sends two, strongSwan's default sends two; nobody needs more than a handful."""
MAX_TRANSFORMS = 128
"""In one proposal; IANA's registries together hold fewer that make sense."""
MORE_PROPOSALS = 2
MORE_TRANSFORMS = 3
NUMBERS_OF_NO_USE = frozenset({TransformType.INTEG, TransformType.KE})
"""Transform types that a proposal with authenticated ciphers may carry as NONE."""


@dataclass(frozen=True, slots=True)
class Transform:
    """One algorithm; `key_bits` 0 when it has no key length, -1 when it has an attribute that nobody knows."""

    type: int
    id: int
    key_bits: int = 0


@dataclass(frozen=True, slots=True)
class Proposal:
    number: int
    protocol: int
    spi: bytes
    transforms: tuple[Transform, ...]

    def of_type(self, kind: int) -> list[Transform]:
        return [transform for transform in self.transforms if transform.type == kind]


@dataclass(frozen=True, slots=True)
class IkeSuite:
    """The algorithms of an IKE SA."""

    cipher: EspSuite
    prf: Prf
    kex: KexMethod

    def __str__(self) -> str:
        return f"{self.cipher.name}/{self.prf.name}/{self.kex.name}"


@dataclass(frozen=True, slots=True)
class ChildSuite:
    """The algorithms of a Child SA."""

    cipher: EspSuite
    esn: bool

    def __str__(self) -> str:
        return self.cipher.name + ("/ESN" if self.esn else "")


def parse_proposals_untrusted(data: bytes) -> tuple[Proposal, ...]:
    """The body of an SA payload. Raises WireError."""
    reader = Reader(data)
    proposals: list[Proposal] = []
    more = MORE_PROPOSALS
    while more == MORE_PROPOSALS:
        if len(proposals) == MAX_PROPOSALS:
            raise WireError("too many proposals")
        more, body = _framed(reader)
        number, protocol = body.u8(), body.u8()
        spi_bytes, count = body.u8(), body.u8()
        spi = body.take(spi_bytes)
        proposals.append(Proposal(number, protocol, spi, _parse_transforms(body, count)))
    reader.end()
    if more:
        raise WireError("a proposal is followed by something else")
    return tuple(proposals)


def _framed(reader: Reader) -> tuple[int, Reader]:
    """The `more` octet of a substructure and a reader over the rest of it."""
    more = reader.u8()
    reader.u8()
    length = reader.u16()
    return more, reader.sub(length - 4)


def _parse_transforms(reader: Reader, count: int) -> tuple[Transform, ...]:
    if count > MAX_TRANSFORMS:
        raise WireError("too many transforms")
    transforms = []
    for index in range(count):
        more, body = _framed(reader)
        if more != (MORE_TRANSFORMS if index + 1 < count else 0):
            raise WireError("the transforms are not as many as they say")
        kind = body.u8()
        body.u8()
        transforms.append(Transform(kind, body.u16(), _parse_attributes(body)))
    reader.end()
    return tuple(transforms)


def _parse_attributes(reader: Reader) -> int:
    key_bits = 0
    while reader.left:
        head = reader.u16()
        if head >> 15:
            value = reader.u16()
            known = head & 0x7FFF == KEY_LENGTH_ATTRIBUTE
            key_bits = value if known and key_bits == 0 else -1
        else:
            reader.take(reader.u16())
            key_bits = -1
    return key_bits


def build_proposals(proposals: Sequence[Proposal]) -> bytes:
    """The inverse of `parse_proposals_untrusted`."""
    out = b""
    for index, proposal in enumerate(proposals):
        body = bytes([proposal.number, proposal.protocol, len(proposal.spi), len(proposal.transforms)]) + proposal.spi
        for place, transform in enumerate(proposal.transforms):
            last = place + 1 == len(proposal.transforms)
            body += _frame(0 if last else MORE_TRANSFORMS, _build_transform(transform))
        out += _frame(0 if index + 1 == len(proposals) else MORE_PROPOSALS, body)
    return out


def _frame(more: int, body: bytes) -> bytes:
    return bytes([more, 0]) + (len(body) + 4).to_bytes(2, "big") + body


def _build_transform(transform: Transform) -> bytes:
    body = bytes([transform.type, 0]) + transform.id.to_bytes(2, "big")
    if transform.key_bits > 0:
        body += (0x8000 | KEY_LENGTH_ATTRIBUTE).to_bytes(2, "big") + transform.key_bits.to_bytes(2, "big")
    return body


def _ciphers(suites: Iterable[EspSuite]) -> list[Transform]:
    return [Transform(TransformType.ENCR, suite.transform, suite.key_bits) for suite in suites]


def offer_ike(ciphers: Iterable[EspSuite], prfs: Iterable[Prf], kexes: Iterable[KexMethod]) -> Proposal:
    """One proposal with all combinations, each list in order of preference."""
    transforms = _ciphers(ciphers)
    transforms += [Transform(TransformType.PRF, prf.transform) for prf in prfs]
    transforms += [Transform(TransformType.KE, kex.transform) for kex in kexes]
    return Proposal(1, Protocol.IKE, b"", tuple(transforms))


def offer_child(ciphers: Iterable[EspSuite], esn: bool, spi: bytes) -> Proposal:
    """One proposal; with `esn`, extended sequence numbers are offered first and plain ones second."""
    transforms = _ciphers(ciphers)
    transforms += [Transform(TransformType.ESN, value) for value in ((1, 0) if esn else (0,))]
    return Proposal(1, Protocol.ESP, spi, tuple(transforms))


def choose_ike(
    proposals: Iterable[Proposal],
    ciphers: Sequence[EspSuite],
    prfs: Sequence[Prf],
    kexes: Sequence[KexMethod],
    sent_group: int,
) -> tuple[Proposal, IkeSuite] | None:
    """The first proposal that we can satisfy: the answer to it and what it means. None when there is none.

    `sent_group` is the group of the peer's KE payload: it is taken when it is allowed, for that saves a round trip.
    """
    ordered = sorted(kexes, key=lambda kex: kex.transform != sent_group)
    for proposal in proposals:
        if proposal.protocol != Protocol.IKE or proposal.spi:
            continue
        if not _types_within(proposal, {TransformType.ENCR, TransformType.PRF, TransformType.INTEG, TransformType.KE}):
            continue
        cipher = _first_cipher(proposal, ciphers)
        prf = next((one for one in prfs if Transform(TransformType.PRF, one.transform) in proposal.transforms), None)
        kex = next((one for one in ordered if Transform(TransformType.KE, one.transform) in proposal.transforms), None)
        if cipher is None or prf is None or kex is None or not _absent_or_none(proposal, TransformType.INTEG):
            continue
        answer = offer_ike([cipher], [prf], [kex])
        return Proposal(proposal.number, Protocol.IKE, b"", answer.transforms), IkeSuite(cipher, prf, kex)
    return None


def choose_child(
    proposals: Iterable[Proposal], ciphers: Sequence[EspSuite], esn: bool, spi: bytes
) -> tuple[Proposal, Proposal, ChildSuite] | None:
    """The first ESP proposal that we can satisfy: it, the answer with our `spi`, and what it means.

    ESN is chosen when it is offered and `esn` allows it. Key exchange transforms are passed over: IKE_AUTH has no KE
    payload, and not every peer leaves them out (RFC 7296 section 1.2).
    """
    known = {TransformType.ENCR, TransformType.INTEG, TransformType.KE, TransformType.ESN}
    for proposal in proposals:
        if proposal.protocol != Protocol.ESP or not _types_within(proposal, known):
            continue
        cipher = _first_cipher(proposal, ciphers)
        numbers = {transform.id for transform in proposal.of_type(TransformType.ESN)} or {0}
        number = 1 if esn and 1 in numbers else 0
        if cipher is None or number not in numbers or not _absent_or_none(proposal, TransformType.INTEG):
            continue
        transforms = (*_ciphers([cipher]), Transform(TransformType.ESN, number))
        return proposal, Proposal(proposal.number, Protocol.ESP, spi, transforms), ChildSuite(cipher, bool(number))
    return None


def chosen_ike_untrusted(
    answer: Sequence[Proposal], offered: Proposal, ciphers: Sequence[EspSuite], prfs: Sequence[Prf], kex: KexMethod
) -> IkeSuite:
    """What the responder's answer means. Raises WireError unless it is one of the things we offered."""
    proposal = _single_choice(answer, offered)
    found = choose_ike([proposal], ciphers, prfs, [kex], kex.transform)
    if found is None:
        raise WireError("the responder chose what was not offered")
    return found[1]


def chosen_child_untrusted(
    answer: Sequence[Proposal], offered: Proposal, ciphers: Sequence[EspSuite]
) -> tuple[Proposal, ChildSuite]:
    """The responder's proposal and its meaning. Raises WireError unless it is one of the things we offered."""
    proposal = _single_choice(answer, offered)
    found = choose_child([proposal], ciphers, True, b"")
    if found is None:
        raise WireError("the responder chose what was not offered")
    return proposal, found[2]


def _single_choice(answer: Sequence[Proposal], offered: Proposal) -> Proposal:
    """One proposal with our number, one transform of each type, all of them offered (RFC 7296 section 2.7)."""
    if len(answer) != 1:
        raise WireError("an answer has one proposal")
    proposal = answer[0]
    if proposal.number != offered.number or proposal.protocol != offered.protocol:
        raise WireError("the answer is to another proposal")
    real = [one for one in proposal.transforms if not (one.type in NUMBERS_OF_NO_USE and one.id == NO_TRANSFORM)]
    kinds = [one.type for one in real]
    if len(set(kinds)) != len(kinds) or not set(real) <= set(offered.transforms):
        raise WireError("the responder chose what was not offered")
    return proposal


def _types_within(proposal: Proposal, known: set[TransformType]) -> bool:
    """A proposal with a transform type that we do not know is not for us (RFC 7296 section 3.3.6)."""
    return all(transform.type in known for transform in proposal.transforms)


def _first_cipher(proposal: Proposal, ciphers: Sequence[EspSuite]) -> EspSuite | None:
    wanted = set(proposal.of_type(TransformType.ENCR))
    return next((suite for suite in ciphers if _ciphers([suite])[0] in wanted), None)


def _absent_or_none(proposal: Proposal, kind: TransformType) -> bool:
    found = {transform.id for transform in proposal.of_type(kind)}
    return not found or NO_TRANSFORM in found
