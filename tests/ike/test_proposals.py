"""Choosing a proposal, and checking what the other side chose."""

from __future__ import annotations

import pytest

from p2pvpn.core.child import EspSuite
from p2pvpn.core.errors import WireError
from p2pvpn.crypto.kex import KexMethod
from p2pvpn.crypto.prf import Prf
from p2pvpn.ike.config import IkeSettings
from p2pvpn.ike.proposals import (
    Allowed,
    Proposal,
    Transform,
    choose_child,
    choose_ike,
    chosen_child_untrusted,
    chosen_ike_untrusted,
    offer_child,
    offer_ike,
)

ALL = IkeSettings()
CIPHERS, PRFS, KEXES = ALL.esp_suites, ALL.prfs, (KexMethod.CURVE25519, KexMethod.ECP_256, KexMethod.ECP_384)
OFFER = offer_ike(CIPHERS, PRFS, KEXES)
CHILD_OFFER = offer_child(CIPHERS, True, b"\xc0\0\0\1")
GCM, SHA, X25519 = Transform(1, 20, 256), Transform(2, 5), Transform(4, 31)


def ike(*transforms: Transform, number: int = 1, protocol: int = 1, spi: bytes = b"") -> Proposal:
    return Proposal(number, protocol, spi, transforms)


def allowed(sent: int = 31, esn: bool = True) -> Allowed:
    return Allowed(CIPHERS, PRFS, KEXES, esn=esn, sent_group=sent)


def test_the_group_that_was_sent_is_taken_when_it_is_allowed():
    for kex in KEXES:
        found = choose_ike([OFFER], allowed(kex.transform))
        assert found is not None
        assert found[2].kex is kex
    found = choose_ike([OFFER], allowed(14))
    assert found is not None
    assert found[2].kex is KEXES[0]


def test_the_first_proposal_of_the_peer_that_fits_is_answered_by_its_number():
    cbc = ike(Transform(1, 12, 256), Transform(3, 12), SHA, X25519, number=1)
    gcm = ike(Transform(1, 20, 128), Transform(3, 0), SHA, X25519, number=2)
    _, answer, suite = choose_ike([cbc, gcm, OFFER], allowed())
    assert answer.number == 2
    assert suite.cipher is EspSuite.AES_GCM_16_128
    assert answer.transforms == (Transform(1, 20, 128), SHA, X25519)


@pytest.mark.parametrize(
    "unfit",
    [
        ike(GCM, SHA, X25519, protocol=3),
        ike(GCM, SHA, X25519, spi=b"12345678"),
        ike(GCM, SHA, X25519, Transform(3, 12)),
        ike(GCM, SHA, X25519, Transform(6, 36)),
        ike(GCM, SHA),
        ike(GCM, X25519),
        ike(SHA, X25519),
        ike(Transform(1, 20, 192), SHA, X25519),
        ike(Transform(1, 20, 0), SHA, X25519),
        ike(Transform(1, 20, -1), SHA, X25519),
        ike(Transform(1, 28, 256), SHA, X25519),
        ike(),
    ],
)
def test_what_does_not_fit_is_passed_over(unfit):
    assert choose_ike([unfit], allowed()) is None


@pytest.mark.parametrize("esn", [False, True])
def test_extended_sequence_numbers_are_taken_when_both_want_them(esn):
    for offered, expected in (((1, 0), esn), ((1,), esn or None), ((0,), False), ((), False)):
        numbers = tuple(Transform(5, one) for one in offered)
        found = choose_child([ike(GCM, *numbers, protocol=3)], allowed(esn=esn), b"")
        assert (None if found is None else found[2].esn) is expected


@pytest.mark.parametrize(
    "answer",
    [
        [],
        [ike(GCM, SHA, X25519)] * 2,
        [ike(GCM, SHA, X25519, number=2)],
        [ike(GCM, SHA, X25519, protocol=3)],
        [ike(GCM, SHA)],
        [ike(GCM, GCM, SHA, X25519)],
        [ike(GCM, Transform(1, 20, 128), SHA, X25519)],
        [ike(GCM, SHA, X25519, Transform(4, 19))],
        [ike(Transform(1, 12, 256), SHA, X25519)],
        [ike(GCM, SHA, X25519, Transform(3, 2))],
    ],
)
def test_a_responder_that_chooses_what_was_not_offered_is_not_believed(answer):
    with pytest.raises(WireError):
        chosen_ike_untrusted(answer, [OFFER])


def test_a_choice_within_the_offer_is_understood():
    _, suite = chosen_ike_untrusted([ike(GCM, SHA, X25519, Transform(3, 0))], [OFFER])
    assert (suite.cipher, suite.prf, suite.kex) == (EspSuite.AES_GCM_16_256, Prf.HMAC_SHA2_256, KexMethod.CURVE25519)
    assert str(suite) == "AES_GCM_16_256/HMAC_SHA2_256/CURVE25519"


@pytest.mark.parametrize(
    "answer",
    [
        [ike(GCM, Transform(5, 2), protocol=3)],
        [ike(GCM, Transform(5, 0), Transform(5, 1), protocol=3)],
        [ike(Transform(5, 0), protocol=3)],
        [ike(GCM, Transform(5, 0), protocol=2)],
        [ike(GCM, Transform(5, 0), X25519, protocol=3)],
    ],
)
def test_a_child_that_was_not_offered_is_not_believed(answer):
    with pytest.raises(WireError):
        chosen_child_untrusted(answer, [CHILD_OFFER])


def test_a_child_within_the_offer_is_understood():
    _, suite = chosen_child_untrusted([ike(GCM, Transform(5, 1), protocol=3)], [CHILD_OFFER])
    assert str(suite) == "AES_GCM_16_256/ESN"
