"""Which payloads a message may and must have, as a table (RFC 7296 appendix C).

A message is checked against the forms of its exchange and direction before any task sees it. Payload types that nobody
knows were left out before (or refused, when critical); a known payload that a form does not name is not allowed in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from p2pvpn.core.errors import WireError

from .codes import Exchange, PayloadType
from .message import MAX_PAYLOADS, Message
from .payloads import Certificate

MAX_CERTIFICATES = 8
"""A leaf, a few intermediates, a root nobody needs."""
MAX_CERTIFICATE_BYTES = 24_576
"""Of all of them together."""
MAX_REQUESTS = 8
"""CERTREQ payloads: one per certificate encoding."""
ONE = (1, 1)
OPTIONAL = (0, 1)
ANY = (0, MAX_PAYLOADS)

Counts = Mapping[PayloadType, tuple[int, int]]
_REMARKS: Counts = {PayloadType.NOTIFY: ANY, PayloadType.VENDOR: ANY}
_ERROR: Counts = {PayloadType.NOTIFY: (1, MAX_PAYLOADS), PayloadType.VENDOR: ANY}
_CHILD: Counts = {PayloadType.SA: OPTIONAL, PayloadType.TSI: OPTIONAL, PayloadType.TSR: OPTIONAL}


@dataclass(frozen=True, slots=True)
class Rule:
    """The forms of one message. `together` are payloads of which a message has all or none."""

    protected: bool
    forms: tuple[Counts, ...]
    together: frozenset[PayloadType] = frozenset()


_AUTH_COMMON: Counts = {
    PayloadType.CERT: (0, MAX_CERTIFICATES),
    **_CHILD,
    PayloadType.CP: OPTIONAL,
    PayloadType.EAP: OPTIONAL,
    **_REMARKS,
}
_NEW_IKE: Counts = {PayloadType.SA: ONE, PayloadType.NONCE: ONE, PayloadType.KE: ONE, **_REMARKS}
_NEW_CHILD: Counts = {
    PayloadType.SA: ONE,
    PayloadType.NONCE: ONE,
    PayloadType.KE: OPTIONAL,
    PayloadType.TSI: ONE,
    PayloadType.TSR: ONE,
    PayloadType.CP: OPTIONAL,
    **_REMARKS,
}
_TRIPLE = frozenset({PayloadType.SA, PayloadType.TSI, PayloadType.TSR})

RULES: dict[tuple[Exchange, bool], Rule] = {
    (Exchange.IKE_SA_INIT, False): Rule(
        False, ({PayloadType.SA: ONE, PayloadType.KE: ONE, PayloadType.NONCE: ONE, **_REMARKS},)
    ),
    (Exchange.IKE_SA_INIT, True): Rule(
        False,
        (
            {
                PayloadType.SA: ONE,
                PayloadType.KE: ONE,
                PayloadType.NONCE: ONE,
                PayloadType.CERTREQ: (0, MAX_REQUESTS),
                **_REMARKS,
            },
            _ERROR,
        ),
    ),
    (Exchange.IKE_AUTH, False): Rule(
        True,
        (
            {
                PayloadType.IDI: ONE,
                PayloadType.CERTREQ: (0, MAX_REQUESTS),
                PayloadType.IDR: OPTIONAL,
                PayloadType.AUTH: OPTIONAL,
                **_AUTH_COMMON,
            },
        ),
        _TRIPLE,
    ),
    (Exchange.IKE_AUTH, True): Rule(
        True, ({PayloadType.IDR: ONE, PayloadType.AUTH: ONE, **_AUTH_COMMON}, _ERROR), _TRIPLE
    ),
    (Exchange.IKE_INTERMEDIATE, False): Rule(True, ({PayloadType.KE: ONE, **_REMARKS},)),
    (Exchange.IKE_INTERMEDIATE, True): Rule(True, ({PayloadType.KE: ONE, **_REMARKS}, _ERROR)),
    (Exchange.CREATE_CHILD_SA, False): Rule(True, (_NEW_CHILD, _NEW_IKE)),
    (Exchange.CREATE_CHILD_SA, True): Rule(True, (_NEW_CHILD, _NEW_IKE, _ERROR)),
    (Exchange.IKE_FOLLOWUP_KE, False): Rule(True, ({PayloadType.KE: ONE, **_REMARKS},)),
    (Exchange.IKE_FOLLOWUP_KE, True): Rule(True, ({PayloadType.KE: ONE, **_REMARKS}, _ERROR)),
    (Exchange.INFORMATIONAL, False): Rule(True, ({PayloadType.DELETE: ANY, PayloadType.CP: OPTIONAL, **_REMARKS},)),
    (Exchange.INFORMATIONAL, True): Rule(True, ({PayloadType.DELETE: ANY, PayloadType.CP: OPTIONAL, **_REMARKS},)),
}
"""An exchange without a row does not exist for us: its messages are dropped."""


def rule_for(exchange: int, response: bool) -> Rule | None:
    try:
        return RULES.get((Exchange(exchange), response))
    except ValueError:
        return None


def check_untrusted(message: Message) -> None:
    """Raises WireError unless the message has one of the forms of its exchange and direction."""
    rule = rule_for(message.header.exchange, message.header.response)
    if rule is None:
        raise WireError(f"exchange {message.header.exchange} does not exist")
    counts: dict[PayloadType, int] = {}
    for payload in message.payloads:
        counts[payload.TYPE] = counts.get(payload.TYPE, 0) + 1
    if not any(_fits(counts, form) for form in rule.forms):
        raise WireError(f"payloads that do not make a message of exchange {message.header.exchange}")
    present = rule.together & counts.keys()
    if present and present != rule.together:
        raise WireError("an SA payload without its traffic selectors, or selectors without an SA payload")
    if PayloadType.CERT in counts and sum(len(one.data) for one in message.all(Certificate)) > MAX_CERTIFICATE_BYTES:
        raise WireError("too many bytes of certificates")


def _fits(counts: Mapping[PayloadType, int], form: Counts) -> bool:
    if not counts.keys() <= form.keys():
        return False
    return all(low <= counts.get(kind, 0) <= high for kind, (low, high) in form.items())
