"""ESP packets: the format, its vectors, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pvpn.core.child import EspSuite
from p2pvpn.core.errors import TrustError, WireError
from p2pvpn.crypto.aead import raw_cipher
from p2pvpn.esp.cbc import CbcOpener, CbcSealer
from p2pvpn.esp.packet import NEXT_IPV4, NEXT_IPV6, Opener, Sealer, inner_mtu

SUITES = st.sampled_from(list(EspSuite))


def sealer(suite, keymat, *, esn):
    return (Sealer if suite.is_combined else CbcSealer)(suite, keymat, 0xC0000001, esn=esn)


def opener_of(suite, keymat, *, esn):
    return (Opener if suite.is_combined else CbcOpener)(suite, keymat, esn=esn)


@given(SUITES, st.booleans(), st.integers(1, 2**64 - 1), st.binary(max_size=300), st.sampled_from([4, 41]))
def test_what_is_sealed_opens_again(suite, esn, sequence, packet, next_header):
    keymat = bytes(range(suite.keymat_bytes))
    if not esn:
        sequence &= 0xFFFFFFFF
    datagram = sealer(suite, keymat, esn=esn).seal(sequence, packet, next_header)
    assert datagram[:8] == b"\xc0\0\0\1" + (sequence & 0xFFFFFFFF).to_bytes(4, "big")
    assert len(datagram) % 4 == 0
    overhead = 10 + suite.iv_bytes + suite.icv_bytes
    assert overhead <= len(datagram) - len(packet) <= overhead + (3 if suite.is_combined else 15)
    assert opener_of(suite, keymat, esn=esn).open_untrusted(sequence, datagram) == (next_header, packet)
    later = sealer(suite, keymat, esn=esn).seal(sequence ^ 1, packet, next_header)
    assert later[8 : 8 + suite.iv_bytes] != datagram[8 : 8 + suite.iv_bytes]


@pytest.mark.parametrize("suite", EspSuite)
@pytest.mark.parametrize("esn", [False, True])
def test_every_changed_bit_is_refused(suite, esn):
    keymat = bytes(range(suite.keymat_bytes))
    datagram = sealer(suite, keymat, esn=esn).seal(7, b"the packet", NEXT_IPV4)
    opener = opener_of(suite, keymat, esn=esn)
    for at in range(len(datagram) * 8):
        changed = bytearray(datagram)
        changed[at // 8] ^= 1 << at % 8
        with pytest.raises(TrustError):
            opener.open_untrusted(int.from_bytes(changed[4:8], "big"), bytes(changed))


@pytest.mark.parametrize("suite", EspSuite)
def test_the_high_half_of_the_number_is_authenticated_with_esn(suite):
    keymat = bytes(suite.keymat_bytes)
    datagram = sealer(suite, keymat, esn=True).seal(1 << 32 | 5, b"packet", NEXT_IPV6)
    opener = opener_of(suite, keymat, esn=True)
    assert opener.open_untrusted(1 << 32 | 5, datagram) == (NEXT_IPV6, b"packet")
    with pytest.raises(TrustError):
        opener.open_untrusted(5, datagram)


@given(SUITES, st.booleans(), st.integers(0, 2**64 - 1), st.binary(max_size=200))
def test_nothing_but_our_errors_escapes(suite, esn, sequence, data):
    with pytest.raises((WireError, TrustError)):
        opener_of(suite, bytes(suite.keymat_bytes), esn=esn).open_untrusted(sequence, data)


@given(st.binary(min_size=4, max_size=400).filter(lambda plain: len(plain) % 4 == 0))
def test_any_authentic_plaintext_opens_or_is_a_wire_error(plain):
    cipher, salt = raw_cipher(EspSuite.AES_GCM_16_256, bytes(36))
    datagram = b"\xc0\0\0\1\0\0\0\1" + bytes(8) + cipher.encrypt(salt + bytes(8), plain, b"\xc0\0\0\1\0\0\0\1")
    opener = Opener(EspSuite.AES_GCM_16_256, bytes(36), esn=False)
    pad = plain[-2]
    well_formed = pad <= len(plain) - 2 and plain[-2 - pad : -2] == bytes(range(1, pad + 1))
    if well_formed:
        assert opener.open_untrusted(1, datagram) == (plain[-1], plain[: len(plain) - 2 - pad])
    else:
        with pytest.raises(WireError):
            opener.open_untrusted(1, datagram)


def test_the_chacha_example_of_rfc_7634_appendix_a():
    # RFC 7634 appendix A: key, salt, IV, SPI and sequence number of the example, its ICMP packet, and the result.
    key = bytes.fromhex("808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9fa0a1a2a3")
    packet = bytes.fromhex(
        "45000054a6f200004001e778c6336405c000020508005b7a3a080000553bec10"
        "0007362708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f20212223"
        "2425262728292a2b2c2d2e2f3031323334353637"
    )
    expected = bytes.fromhex(
        "0102030400000005101112131415161724039428b97f417e3c13753a4f05087b"
        "67c352e6a7fab1b982d466ef407ae5c614ee8099d52844eb61aa95dfab4c02f7"
        "2aa71e7c4c4f64c9befe2facc638e8f3cbec163fac469b502773f6fb94e664da"
        "9165b82829f641e076aaa8266b7fb0f7b11b369907e1ad43"
    )
    opener = Opener(EspSuite.CHACHA20_POLY1305, key, esn=False)
    assert opener.open_untrusted(5, expected) == (NEXT_IPV4, packet)


def test_the_gcm_example_with_esn_of_draft_mcgrew_gcm_test_01_section_4():
    # draft-mcgrew-gcm-test-01 section 4, first case: SPI 00004321, sequence number 8765432100000000, AES-128.
    key = bytes.fromhex("4c80cdefbb5d10da906ac73c3613a6342e443b68")
    plain = bytes.fromhex(
        "45000048699a000080114db7c0a80102c0a801010a9bf15638d3010000010000"
        "00000000045f736970045f756470037369700963796265726369747902646b00"
        "0021000101020201"
    )
    datagram = bytes.fromhex(
        "00004321000000004956ed7e3b244cfe"
        "fecf537e729d5b07dc30df528dd22b768d1b98736696a6fd348509fa13ceac34"
        "cfa2436f14a3f3cf65925bf1f4a13c5d15b21e1884f5ff6247aeabb786b93bce"
        "61bc17d768fd9732459018148f6cbe722fd04796562dfdb4"
    )
    opener = Opener(EspSuite.AES_GCM_16_128, key, esn=True)
    assert opener.open_untrusted(0x8765432100000000, datagram) == (plain[-1], plain[:-4])


def test_the_gcm_example_without_esn_of_draft_mcgrew_gcm_test_01_section_4():
    # draft-mcgrew-gcm-test-01 section 4, the AES-256 case: SPI 4a2cbfe3, sequence number 2, IV 0102030405060708.
    key = bytes.fromhex("abbccddef00112233445566778899aababbccddef00112233445566778899aab11223344")
    plain = bytes.fromhex(
        "4500003069a6400080062690c0a801029389155e0a9e008b2dc57ee0000000007002400020bf0000020405b40101040201020201"
    )
    datagram = bytes.fromhex(
        "4a2cbfe3000000020102030405060708"
        "ff425c9b724599df7a3bcd510194e00d6a78107f1b0b1cbf06efae9d65a5d763"
        "748a637985771d347f0545659f14e99def842d8eb335f4eecfdbf831824b4c49"
        "15956c96"
    )
    opener = Opener(EspSuite.AES_GCM_16_256, key, esn=False)
    assert opener.open_untrusted(2, datagram) == (plain[-1], plain[:-4])


@pytest.mark.parametrize("suite", EspSuite)
@pytest.mark.parametrize(("ipv6", "outer"), [(False, 1500), (True, 1500), (False, 1492), (True, 1280), (False, 576)])
def test_the_inner_mtu_is_the_largest_packet_that_fits(suite, ipv6, outer):
    end = sealer(suite, bytes(suite.keymat_bytes), esn=False)
    headers = (40 if ipv6 else 20) + 8
    mtu = inner_mtu(outer, outer_ipv6=ipv6, suite=suite)
    assert headers + len(end.seal(1, bytes(mtu), NEXT_IPV4)) <= outer
    assert headers + len(end.seal(1, bytes(mtu + 1), NEXT_IPV4)) > outer


def test_the_inner_mtu_of_ethernet_is_what_linux_derives():
    # Linux 6.18 with AES-GCM in UDP over IPv4 derives 1438 for a device of 1500.
    assert inner_mtu(1500, outer_ipv6=False) == 1438
