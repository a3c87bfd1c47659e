"""Proposals of the SA payload (RFC 7296 section 3.3): offering, choosing, checking a choice.

    proposal:   | more 2/0 u8 | zero | length u16 | number u8 | protocol u8 | spi size u8 | transforms u8 | spi |
                | transform ... |
    transform:  | more 3/0 u8 | zero | length u16 | type u8 | zero | id u16 | attribute ... |
    attribute:  | 1 bit set, type 15 bits | value u16 |   or   | 0 bit, type 15 bits | length u16 | value ... |

Combined ciphers and those that need integrity besides are offered in proposals of their own (RFC 7296 section 3.3).
"""

from __future__ import annotations

import functools
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
MAX_REMEMBERED_BYTES = 1024
MORE_PROPOSALS = 2
MORE_TRANSFORMS = 3
ADDITIONAL = range(6, 13)
"""Transform types ADDKE1 to ADDKE7 (RFC 9370 section 2.2.1)."""
MAY_BE_NONE = frozenset({TransformType.INTEG, TransformType.KE, *ADDITIONAL})
"""Transform types that a proposal may carry as NONE."""

IkeCipher = EspSuite
"""What protects IKE messages."""
Alternatives = Sequence[Sequence[KexMethod]]
"""Per additional key exchange, the methods that will do, the best first."""


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
    """The algorithms of an IKE SA; `additional` key exchanges follow the first (RFC 9370)."""

    cipher: IkeCipher
    prf: Prf
    kex: KexMethod
    additional: tuple[KexMethod, ...] = ()

    def __str__(self) -> str:
        return "/".join([self.cipher.name, self.prf.name, *(kex.name for kex in (self.kex, *self.additional))])


@dataclass(frozen=True, slots=True)
class ChildSuite:
    """The algorithms of a Child SA; `kex` is None when its keys come from those of the IKE SA alone."""

    cipher: EspSuite
    esn: bool
    kex: KexMethod | None = None
    additional: tuple[KexMethod, ...] = ()

    def __str__(self) -> str:
        names = [self.cipher.name] + (["ESN"] if self.esn else [])
        return "/".join(names + [kex.name for kex in (self.kex, *self.additional) if kex is not None])


@dataclass(frozen=True, slots=True)
class Allowed:
    """What we take: ciphers, PRFs and key exchange methods in order of preference, ESN.

    `sent_group` is that of the peer's KE payload: it is taken when it is allowed, for that saves a round trip, unless
    it is a slow one and there is something better.
    """

    ciphers: Sequence[IkeCipher]
    prfs: Sequence[Prf] = ()
    kexes: Sequence[KexMethod] = ()
    additional: Sequence[KexMethod] = ()
    esn: bool = True
    sent_group: int = 0


def parse_proposals_untrusted(data: bytes) -> tuple[Proposal, ...]:
    """The body of an SA payload. Raises WireError."""
    return _remembered(data) if len(data) <= MAX_REMEMBERED_BYTES else _parse_proposals(data)


@functools.lru_cache(maxsize=64)
def _remembered(data: bytes) -> tuple[Proposal, ...]:
    """All machines with one configuration send the same bytes in their IKE_SA_INIT."""
    return _parse_proposals(data)


def _parse_proposals(data: bytes) -> tuple[Proposal, ...]:
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


def _cipher(suite: IkeCipher) -> Transform:
    return Transform(TransformType.ENCR, suite.transform, suite.key_bits)


def _key_exchanges(kexes: Iterable[KexMethod], additional: Alternatives) -> list[Transform]:
    out = [Transform(TransformType.KE, kex.transform) for kex in kexes]
    for number, methods in zip(ADDITIONAL, additional, strict=False):
        out += [Transform(number, kex.transform) for kex in methods]
    return out


def _integrity(suites: Iterable[IkeCipher]) -> list[Transform]:
    numbers = dict.fromkeys(suite.integrity for suite in suites if not suite.is_combined)
    return [Transform(TransformType.INTEG, one) for one in numbers]


def offer_ike(
    ciphers: Iterable[IkeCipher],
    prfs: Iterable[Prf],
    kexes: Iterable[KexMethod],
    additional: Alternatives = (),
    *,
    number: int = 1,
    spi: bytes = b"",
) -> Proposal:
    """One proposal with all combinations, each list in order of preference; ciphers are all combined or all not."""
    suites = list(ciphers)
    transforms = list(dict.fromkeys(_cipher(suite) for suite in suites))
    transforms += [Transform(TransformType.PRF, prf.transform) for prf in prfs]
    transforms += _integrity(suites)
    return Proposal(number, Protocol.IKE, spi, (*transforms, *_key_exchanges(kexes, additional)))


def offers_ike(
    ciphers: Sequence[IkeCipher],
    prfs: Sequence[Prf],
    kexes: Sequence[KexMethod],
    additional: Alternatives,
    spi: bytes = b"",
    *,
    required: bool = False,
) -> tuple[Proposal, ...]:
    """With the additional key exchanges first, then without, for those who do not know them; then ciphers with HMAC.

    When they are `required`, with them or not at all.
    """
    combined = [suite for suite in ciphers if suite.is_combined]
    separate = [suite for suite in ciphers if not suite.is_combined]
    lists: list[tuple[Sequence[IkeCipher], Alternatives]] = []
    for suites in (combined, separate):
        for more in (additional, ()):
            if suites and (more or not required) and not (suites is separate and combined and more):
                lists.append((suites, more))
    lists = list(dict.fromkeys((tuple(suites), tuple(map(tuple, more))) for suites, more in lists))
    return tuple(
        offer_ike(suites, prfs, kexes, more, number=number, spi=spi) for number, (suites, more) in enumerate(lists, 1)
    )


def offer_child(
    ciphers: Iterable[EspSuite],
    esn: bool,
    spi: bytes,
    kexes: Iterable[KexMethod] = (),
    additional: Alternatives = (),
    *,
    number: int = 1,
) -> Proposal:
    """One proposal; ciphers are all combined or all not. With `esn`, plain sequence numbers are the second choice."""
    suites = list(ciphers)
    transforms = list(dict.fromkeys(_cipher(suite) for suite in suites))
    transforms += _integrity(suites)
    transforms += _key_exchanges(kexes, additional)
    transforms += [Transform(TransformType.ESN, value) for value in ((1, 0) if esn else (0,))]
    return Proposal(number, Protocol.ESP, spi, tuple(transforms))


def offers_child(
    ciphers: Sequence[EspSuite],
    esn: bool,
    spi: bytes,
    kexes: Sequence[KexMethod] = (),
    additional: Alternatives = (),
) -> tuple[Proposal, ...]:
    """Combined ciphers before others; with every key exchange, then with the first of them alone, then with none."""
    kinds = [[one for one in ciphers if one.is_combined is is_combined] for is_combined in (True, False)]
    exchanges = [(kexes, additional)] * bool(kexes and additional) + [(kexes, ())] * bool(kexes) + [((), ())]
    lists = [(suites, *more) for suites in kinds if suites for more in exchanges]
    return tuple(
        offer_child(suites, esn, spi, first, more, number=number)
        for number, (suites, first, more) in enumerate(lists, 1)
    )


def choose_ike(
    proposals: Iterable[Proposal], allowed: Allowed, spi: bytes = b""
) -> tuple[Proposal, Proposal, IkeSuite] | None:
    """The first proposal that we can satisfy: it, the answer with our `spi`, and what it means. None: there is none.

    The SPI is empty in IKE_SA_INIT and 8 bytes long in a rekeying (RFC 7296 section 3.3.1).
    """
    known = {TransformType.ENCR, TransformType.PRF, TransformType.INTEG, TransformType.KE, *ADDITIONAL}
    for proposal in proposals:
        if proposal.protocol != Protocol.IKE or len(proposal.spi) != len(spi) or not _types_within(proposal, known):
            continue
        cipher = _first_cipher(proposal, allowed.ciphers)
        prf = next((one for one in allowed.prfs if _offers(proposal, TransformType.PRF, one.transform)), None)
        kex = _first_kex(proposal, allowed)
        more = _additional(proposal, kex, allowed.additional)
        if cipher is None or prf is None or kex is None or more is None:
            continue
        transforms = offer_ike([cipher], [prf], [kex]).transforms + more
        answer = Proposal(proposal.number, Protocol.IKE, spi, transforms)
        return proposal, answer, IkeSuite(cipher, prf, kex, _methods(more))
    return None


def choose_child(
    proposals: Iterable[Proposal], allowed: Allowed, spi: bytes, *, first: bool = True
) -> tuple[Proposal, Proposal, ChildSuite] | None:
    """The first ESP proposal that we can satisfy: it, the answer with our `spi`, and what it means.

    ESN is chosen when it is offered and allowed. In IKE_AUTH (`first`) key exchange transforms are passed over: there
    is no KE payload, and not every peer leaves them out (RFC 7296 section 1.2).
    """
    known = {TransformType.ENCR, TransformType.INTEG, TransformType.KE, TransformType.ESN, *ADDITIONAL}
    for proposal in proposals:
        if proposal.protocol != Protocol.ESP or not _types_within(proposal, known):
            continue
        cipher = _first_cipher(proposal, allowed.ciphers)
        numbers = {transform.id for transform in proposal.of_type(TransformType.ESN)} or {0}
        number = 1 if allowed.esn and 1 in numbers else 0
        if cipher is None or number not in numbers:
            continue
        kex, more = (None, ()) if first else _child_exchanges(proposal, allowed)
        if more is None:
            continue
        transforms = offer_child([cipher], False, b"", [kex] if kex else ()).transforms[:-1]
        transforms = (*transforms, *more, Transform(TransformType.ESN, number))
        suite = ChildSuite(cipher, bool(number), kex, _methods(more))
        return proposal, Proposal(proposal.number, Protocol.ESP, spi, transforms), suite
    return None


def _child_exchanges(proposal: Proposal, allowed: Allowed) -> tuple[KexMethod | None, tuple[Transform, ...] | None]:
    """The key exchange of a Child SA (None for none), and the additional ones (None: the proposal does not fit)."""
    kex = _first_kex(proposal, allowed)
    if kex is None:
        return None, () if _absent_or_none(proposal, TransformType.KE) else None
    return kex, _additional(proposal, kex, allowed.additional)


def chosen_ike_untrusted(
    answer: Sequence[Proposal], offered: Sequence[Proposal], spi: bytes = b""
) -> tuple[Proposal, IkeSuite]:
    """The responder's proposal and its meaning. Raises WireError unless it is one of the things we offered."""
    proposal = _single_choice(answer, offered)
    found = choose_ike([proposal], _everything(), spi)
    if found is None:
        raise WireError("the responder chose what was not offered")
    return proposal, found[2]


def chosen_child_untrusted(
    answer: Sequence[Proposal], offered: Sequence[Proposal], *, first: bool = True
) -> tuple[Proposal, ChildSuite]:
    """The responder's proposal and its meaning. Raises WireError unless it is one of the things we offered."""
    proposal = _single_choice(answer, offered)
    found = choose_child([proposal], _everything(), b"", first=first)
    if found is None:
        raise WireError("the responder chose what was not offered")
    return proposal, found[2]


def _everything() -> Allowed:
    """All that exists: what is in an answer was checked against our offer already."""
    methods = list(KexMethod)
    return Allowed(list(EspSuite), list(Prf), methods, methods)


def _single_choice(answer: Sequence[Proposal], offered: Sequence[Proposal]) -> Proposal:
    """One proposal with our number, one transform of each type, all of them offered (RFC 7296 section 2.7)."""
    if len(answer) != 1:
        raise WireError("an answer has one proposal")
    proposal = answer[0]
    ours = next((one for one in offered if one.number == proposal.number), None)
    if ours is None or proposal.protocol != ours.protocol:
        raise WireError("the answer is to another proposal")
    real = _real(proposal.transforms)
    kinds = [one.type for one in real]
    if len(set(kinds)) != len(kinds) or not set(real) <= set(ours.transforms):
        raise WireError("the responder chose what was not offered")
    # Some leave out that sequence numbers are plain.
    if {one.type for one in _real(ours.transforms)} - set(kinds) - {TransformType.ESN}:
        raise WireError("the responder left something out")
    return proposal


def _real(transforms: Iterable[Transform]) -> list[Transform]:
    """Without NONE; an answer may leave out plain sequence numbers too."""
    return [one for one in transforms if not (one.type in MAY_BE_NONE and one.id == NO_TRANSFORM)]


def _types_within(proposal: Proposal, known: set[int]) -> bool:
    """A proposal with a transform type that we do not know is not for us (RFC 7296 section 3.3.6)."""
    return all(transform.type in known for transform in proposal.transforms)


def _offers(proposal: Proposal, kind: int, number: int) -> bool:
    return Transform(kind, number) in proposal.transforms


def _first_cipher(proposal: Proposal, ciphers: Sequence[IkeCipher]) -> IkeCipher | None:
    """With its integrity transform, which a combined cipher must not have (RFC 7296 section 3.3)."""
    for suite in ciphers:
        if _cipher(suite) not in proposal.transforms:
            continue
        if suite.is_combined:
            if _absent_or_none(proposal, TransformType.INTEG):
                return suite
        elif _offers(proposal, TransformType.INTEG, suite.integrity):
            return suite
    return None


def _first_kex(proposal: Proposal, allowed: Allowed) -> KexMethod | None:
    ordered = sorted(allowed.kexes, key=lambda kex: (kex.is_slow, kex.transform != allowed.sent_group))
    return next((one for one in ordered if _offers(proposal, TransformType.KE, one.transform)), None)


def _additional(
    proposal: Proposal, kex: KexMethod | None, methods: Sequence[KexMethod]
) -> tuple[Transform, ...] | None:
    """One transform for each additional exchange that is offered, all different or NONE (RFC 9370 section 2.2.2)."""
    used, out = [kex], list[Transform]()
    for number in ADDITIONAL:
        offered = {transform.id for transform in proposal.of_type(number)}
        if not offered:
            continue
        found = next((one for one in methods if one.transform in offered and one not in used), None)
        if found is None and NO_TRANSFORM not in offered:
            return None
        out.append(Transform(number, found.transform if found else NO_TRANSFORM))
        used += [found] * bool(found)
    return tuple(out)


def _methods(transforms: Iterable[Transform]) -> tuple[KexMethod, ...]:
    by_number = {kex.transform: kex for kex in KexMethod}
    return tuple(by_number[one.id] for one in transforms if one.id != NO_TRANSFORM)


def _absent_or_none(proposal: Proposal, kind: int) -> bool:
    found = {transform.id for transform in proposal.of_type(kind)}
    return not found or NO_TRANSFORM in found
