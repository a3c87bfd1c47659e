"""Key derivation and AUTH payloads, against values that others published and by way of every scheme."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from p2pvpn.core.child import EspSuite
from p2pvpn.core.errors import LocalError, TrustError, WireError
from p2pvpn.core.secret import Secret
from p2pvpn.crypto import signatures
from p2pvpn.crypto.kex import KexMethod, generate, modp_numbers, respond
from p2pvpn.crypto.prf import Prf
from p2pvpn.crypto.signatures import Scheme, ecdsa_to_raw
from p2pvpn.ike import auth, keys
from p2pvpn.ike.message import Header
from p2pvpn.ike.payloads import Authentication
from p2pvpn.ike.protect import Protection
from p2pvpn.ike.tasks.intermediate import int_auth

from .people import Authority, credential, key_of

OCTETS = b"what both sides sign"

# From the IKEv2 KDF tests of OpenSSL, test/recipes/30-test_evp_data/evpkdf_ikev2.txt at commit 0dd1c50fc070 (Apache
# License 2.0), there marked "self_test_data.c": the known-answer tests of NIST's libacvp for SP 800-135 section 4.1.
NONCE_I = bytes.fromhex("3651FEF5C9C35E93")
NONCE_R = bytes.fromhex("C09A8B90A3F04D59")
SPI_I = bytes.fromhex("8E5C3AE507221684")
SPI_R = bytes.fromhex("B1F201BB155C3ACD")
SHARED = bytes.fromhex(
    "D084A30166A50FB7325C3960874A839449EF9741C2F4F947D0201DD8C1269273D79509F37E3CA3EB4FA2FE2A28254E28"
    "9CD3F34DAD4EB4DF1A07685A4B8A94FA61E2491F7598B3CE65547FF133B3F63D1AC4175EAA695033F3CEDB026A6873A3"
    "6455172A8540B8A5D23A0143BED0390EE49B168269D75FFFEE9FB62BE965993C"
)
SKEYSEED = bytes.fromhex("EFAA7AB0EAA85A3D0BE2100CD4B6FE00FF5025A9EAFDDB3EF518E9F0D3FE60E6")
KEYS = bytes.fromhex(
    "462B9DD525D4FD71169174272779E704BAF62C6231779AE9EFE8C58B21916B42010164AF2111EBD762F6916CA9A6F0EE"
    "05C8B320E4EE27705521DE2589ADEA1878F1A551738AF7C88DC4F0BB0C096A3F7D1F1A670FC79F49F678D60D665BB371"
    "0C8657F03BA9F62B9A818D7A228968C506E237AE9502AA6DB395C61EA6A3E79504F86B7368BFB5423DF79E48809BBCCD"
    "49FD826D024F63D7C2A5566400A12E736AA034510428F5EA008FE2FC16886FA388274EA6C2B4FCFC6141BF04F8207EF8"
)
KEYMAT = bytes.fromhex(
    "23647677E7D403FA1E3006F19840AEE18AD9FECC4215814C4131BDEBA98433D8B0E31BFBBDDF822ABCCE5E06486AA388"
    "022B75E27E1E68AA5983028B65282C730C5D49EF7606770376CFDEC41F7CC435"
)


def test_keys_are_those_that_nist_publishes():
    prf, cipher = Prf.HMAC_SHA2_256, EspSuite.AES_GCM_16_256
    seed = keys.skeyseed(prf, NONCE_I, NONCE_R, Secret(SHARED))
    assert seed == Secret(SKEYSEED)
    made = keys.expand(prf, cipher, seed, (NONCE_I, NONCE_R), (SPI_I, SPI_R))
    parts = (made.d, made.ei, made.er, made.pi, made.pr)
    assert [len(one) for one in parts] == [32, 36, 36, 32, 32]
    assert KEYS.startswith(b"".join(one.reveal() for one in parts))
    forth, back = made.child(cipher, NONCE_I, NONCE_R)
    assert KEYMAT.startswith(forth.reveal() + back.reveal())


ALL_HASHES = auth.peer_hashes(auth.hash_notify())


def credential_with(kind: str, *schemes: Scheme):
    return credential(Authority(), "alice", kind, schemes=schemes)


@pytest.mark.parametrize("scheme", list(Scheme))
def test_every_scheme_signs_and_verifies_by_its_identifier(scheme):
    kind = {"ecdsa": "ecdsa", "ed25519": "ed25519", "rsa": "rsa"}[scheme.value.partition("-")[0]]
    made = auth.sign(credential_with(kind, scheme), ALL_HASHES, OCTETS)
    assert made.method == 14
    key = key_of(kind, "alice").public_key()
    auth.verify_signature(key, made, OCTETS)
    for wrong in (
        Authentication(14, made.data[:-1] + bytes([made.data[-1] ^ 1])),
        Authentication(14, made.data[:-1]),
        Authentication(14, made.data + b"\0"),
        Authentication(14, made.data[: 1 + made.data[0]]),
        Authentication(14, bytes([made.data[0] - 1]) + made.data[1:]),
        Authentication(14, bytes([made.data[0] + 1]) + made.data[1:]),
        Authentication(14, made.data[1:]),
        Authentication(14, bytes(len(made.data))),
    ):
        with pytest.raises(TrustError):
            auth.verify_signature(key, wrong, OCTETS)
    with pytest.raises(TrustError):
        auth.verify_signature(key, made, OCTETS + b"!")


def test_the_identifiers_are_those_of_rfc_7427_appendix_a():
    known = {
        Scheme.RSA_PKCS1_SHA256: "300d06092a864886f70d01010b0500",
        Scheme.RSA_PKCS1_SHA384: "300d06092a864886f70d01010c0500",
        Scheme.RSA_PKCS1_SHA512: "300d06092a864886f70d01010d0500",
        Scheme.ECDSA_SHA256: "300a06082a8648ce3d040302",
        Scheme.ECDSA_SHA384: "300a06082a8648ce3d040303",
        Scheme.ECDSA_SHA512: "300a06082a8648ce3d040304",
        Scheme.ED25519: "300506032b6570",  # RFC 8420 appendix A
    }
    for scheme, text in known.items():
        assert auth.algorithm_identifier(scheme).hex() == text


def test_pss_parameters_are_those_that_openssl_writes_into_certificates():
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding
    from cryptography.hazmat.primitives.serialization import Encoding

    key = key_of("rsa", "alice")
    name = x509.Name([])
    for scheme, algorithm in (
        (Scheme.RSA_PSS_SHA256, hashes.SHA256()),
        (Scheme.RSA_PSS_SHA384, hashes.SHA384()),
        (Scheme.RSA_PSS_SHA512, hashes.SHA512()),
    ):
        builder = x509.CertificateBuilder(name, name, key.public_key(), 1, datetime.datetime(2020, 1, 1))
        cert = builder.not_valid_after(datetime.datetime(2030, 1, 1)).sign(
            key, algorithm, rsa_padding=padding.PSS(padding.MGF1(algorithm), padding.PSS.DIGEST_LENGTH)
        )
        assert auth.algorithm_identifier(scheme) in cert.public_bytes(Encoding.DER)


@pytest.mark.parametrize(
    "hostile",
    [
        "",
        "ff" + "30" * 40,
        "0f 300d06092a864886f70d01010505 00",  # SHA-1 with RSA
        "0b 300906072a8648ce3d0401",  # SHA-1 with ECDSA
        "0d 300b06092a864886f70d01010a",  # RSASSA-PSS with its SHA-1 defaults
        # RSASSA-PSS with a salt of 2^31 - 1 bytes
        "49 304706092a864886f70d01010a303aa00f300d06096086480165030402010500"
        "a11c301a06092a864886f70d010108300d06096086480165030402010500a20602047fffffff",
        # an MGF inside an MGF
        "2a 302806092a864886f70d01010a301ba119301706092a864886f70d010108300a06092a864886f70d010108",
    ],
)
def test_hostile_algorithm_identifiers_are_refused(hostile):
    data = bytes.fromhex(hostile) + bytes(256)
    for kind in ("rsa", "ecdsa", "ed25519"):
        with pytest.raises(TrustError):
            auth.verify_signature(key_of(kind, "alice").public_key(), Authentication(14, data), OCTETS)


def test_a_peer_that_knows_no_hashes_gets_the_old_methods():
    for kind, scheme, method, size in (
        ("ecdsa", Scheme.ECDSA_SHA256, 9, 64),
        ("ecdsa384", Scheme.ECDSA_SHA384, 10, 96),
        ("pkcs1", Scheme.RSA_PKCS1_SHA256, 1, 256),
    ):
        made = auth.sign(credential_with(kind, scheme), (), OCTETS)
        assert (made.method, len(made.data)) == (method, size)
        auth.verify_signature(key_of(kind, "alice").public_key(), made, OCTETS)
        with pytest.raises(TrustError):
            auth.verify_signature(key_of(kind, "alice").public_key(), made, OCTETS + b"!")
        with pytest.raises(TrustError):
            auth.verify_signature(key_of(kind, "alice").public_key(), Authentication(method, bytes(size)), OCTETS)


def test_method_11_is_for_p_521_alone():
    key = ec.generate_private_key(ec.SECP521R1())
    raw = ecdsa_to_raw(signatures.sign(key, Scheme.ECDSA_SHA512, OCTETS), 66)
    auth.verify_signature(key.public_key(), Authentication(11, raw), OCTETS)
    for bad in (raw[:-1], bytes(132), raw + b"\0"):
        with pytest.raises(TrustError):
            auth.verify_signature(key.public_key(), Authentication(11, bad), OCTETS)
    with pytest.raises(TrustError):
        auth.verify_signature(key_of("ecdsa", "alice").public_key(), Authentication(11, raw), OCTETS)


def test_an_old_method_goes_with_its_own_curve_alone():
    made = auth.sign(credential_with("ecdsa", Scheme.ECDSA_SHA256), (), OCTETS)
    with pytest.raises(TrustError):
        auth.verify_signature(key_of("ecdsa384", "alice").public_key(), made, OCTETS)
    with pytest.raises(LocalError):
        auth.sign(credential_with("ecdsa384", Scheme.ECDSA_SHA256), (), OCTETS)
    with pytest.raises(LocalError):
        auth.sign(credential_with("ed25519", Scheme.ED25519), (), OCTETS)


def test_the_peers_hashes_pick_the_scheme():
    ours = credential_with("rsa", Scheme.RSA_PSS_SHA512, Scheme.RSA_PSS_SHA256)
    made = auth.sign(ours, {2}, OCTETS)
    assert auth.algorithm_identifier(Scheme.RSA_PSS_SHA256) in made.data
    with pytest.raises(LocalError):
        auth.sign(ours, {1}, OCTETS)


def test_small_rsa_keys_are_refused():
    small = rsa.generate_private_key(65537, 1024)  # noqa: S505
    data = auth.algorithm_identifier(Scheme.RSA_PKCS1_SHA256)
    made = bytes([len(data)]) + data + signatures.sign(small, Scheme.RSA_PKCS1_SHA256, OCTETS)
    with pytest.raises(TrustError):
        auth.verify_signature(small.public_key(), Authentication(14, made), OCTETS)


def test_a_shared_secret_is_compared_whole():
    prf = Prf.HMAC_SHA2_256
    made = auth.shared_key_auth(prf, Secret(b"secret"), OCTETS)
    auth.verify_shared_key(prf, Secret(b"secret"), made, OCTETS)
    for secret, data in ((b"other", made.data), (b"secret", made.data[:-1]), (b"secret", b"")):
        with pytest.raises(TrustError):
            auth.verify_shared_key(prf, Secret(secret), Authentication(2, data), OCTETS)


def test_hash_lists_of_odd_lengths_are_read_as_far_as_they_go():
    assert auth.peer_hashes(None) == frozenset()
    assert {2, 3, 4, 5} == ALL_HASHES
    assert auth.peer_hashes(auth.Notify(16431, b"\x00\x02\x00")) == {2}


def protections(suite: EspSuite):
    seed = Secret(bytes(range(32)))
    made = keys.expand(Prf.HMAC_SHA2_256, suite, seed, (b"i" * 32, b"r" * 32), (b"I" * 8, b"R" * 8))
    return Protection(made, True), Protection(made, False)


@pytest.mark.parametrize("suite", EspSuite)
def test_sealed_messages_open_at_the_other_end_and_nowhere_else(suite):
    ours, theirs = protections(suite)
    header = Header(b"I" * 8, b"R" * 8, 37, True, False, 3)
    packets = [ours.seal(header, 41, b"chain") for _ in range(3)]
    assert len({packet[32 : 32 + suite.iv_bytes] for packet in packets}) == 3, "no IV twice"
    for packet in packets:
        opened = theirs.open_untrusted(packet)
        assert (opened.first, opened.plain) == (41, b"chain")
        with pytest.raises(TrustError):
            ours.open_untrusted(packet)
    packet = packets[0]
    for at in range(len(packet)):
        damaged = packet[:at] + bytes([packet[at] ^ 0x40]) + packet[at + 1 :]
        with pytest.raises((TrustError, WireError)):
            theirs.open_untrusted(damaged)
    for end in range(len(packet)):
        cut = packet[:24] + end.to_bytes(4, "big") + packet[28:end]
        with pytest.raises((TrustError, WireError)):
            theirs.open_untrusted(cut)


@pytest.mark.parametrize(
    ("padding", "claimed", "plain"),
    [(0, 0, b"chain"), (7, 7, b"chain"), (2, 7, b""), (0, 5, b""), (0, 6, None), (3, 255, None)],
)
def test_padding_of_the_peer_is_taken_off_and_too_much_is_refused(padding, claimed, plain):
    ours, theirs = protections(EspSuite.AES_GCM_16_256)
    inner = b"chain" + bytes(padding) + bytes([claimed])
    size = 4 + 8 + len(inner) + 16
    aad = Header(b"I" * 8, b"R" * 8, 37, True, False, 3).build(46, 28 + size) + b"\x29\x00" + size.to_bytes(2, "big")
    packet = aad + bytes(8) + ours._outbound.seal(bytes(8), inner, aad)
    if plain is None:
        with pytest.raises(WireError):
            theirs.open_untrusted(packet)
    else:
        assert theirs.open_untrusted(packet).plain == plain


def test_keys_of_what_follows_are_those_that_the_rfcs_write():
    """RFC 7296 sections 2.17 and 2.18, RFC 9370 sections 2.2.2 and 2.2.4, RFC 8784 section 3, by hand."""
    prf, ni, nr = Prf.HMAC_SHA2_256, b"i" * 32, b"r" * 32
    made = keys.expand(prf, EspSuite.AES_GCM_16_256, Secret(bytes(32)), (ni, nr), (b"I" * 8, b"R" * 8))
    d, first, second = made.d.reveal(), Secret(b"first"), Secret(b"second")
    assert made.next_seed(ni, nr, [first]).reveal() == prf(d, b"first" + ni + nr)
    assert made.next_seed(ni, nr, [first, second]).reveal() == prf(d, b"first" + ni + nr + b"second")
    forth, back = made.child(EspSuite.AES_GCM_16_128, ni, nr, [first, second])
    assert forth.reveal() + back.reveal() == prf.plus(d, b"first" + ni + nr + b"second", 40)
    mixed = made.with_ppk(Secret(b"ppk"))
    assert mixed.d.reveal() == prf.plus(b"ppk", d, 32)
    assert mixed.pi.reveal() == prf.plus(b"ppk", made.pi.reveal(), 32)
    assert (mixed.ei, mixed.er) == (made.ei, made.er)
    assert len(made.ai) == 0
    cbc = keys.expand(prf, EspSuite.AES_CBC_256_HMAC_SHA2_384, Secret(bytes(32)), (ni, nr), (b"I" * 8, b"R" * 8))
    assert [len(one) for one in (cbc.ai, cbc.ei, cbc.pi)] == [48, 32, 32]


def test_int_auth_covers_header_and_payloads_as_if_there_were_no_cipher():
    """RFC 9242 section 3.3.2, by hand."""
    header, chain = Header(b"I" * 8, b"R" * 8, 43, True, False, 1), (34, b"payloads")
    outer = b"I" * 8 + b"R" * 8 + bytes.fromhex("2e202b08 00000001 00000028") + bytes.fromhex("2200000c")
    prf = Prf.HMAC_SHA2_384
    link = int_auth(prf, Secret(b"sk_pi"), b"", header, chain)
    assert link == prf(b"sk_pi", outer + b"payloads")
    assert int_auth(prf, Secret(b"sk_pi"), link, header, chain) == prf(b"sk_pi", link + outer + b"payloads")


@pytest.mark.parametrize("method", list(KexMethod))
def test_every_key_exchange_agrees_and_refuses_what_is_none(method):
    ours = generate(method)
    answer, secret = respond(method, ours.public)
    assert ours.shared(answer) == secret
    assert (len(ours.public), len(answer)) == (method.public_bytes, method.answer_bytes)
    for bad in (b"", ours.public[:-1], ours.public + b"\0", b"\xff" * method.public_bytes):
        if not (method is KexMethod.CURVE25519 and len(bad) == 32):
            with pytest.raises(TrustError):
                respond(method, bad)
    if not method.is_kem:
        one = (1).to_bytes(method.public_bytes, "little" if method is KexMethod.CURVE25519 else "big")
        for trivial in (bytes(method.public_bytes), one):
            with pytest.raises(TrustError):
                respond(method, trivial)
    for size in {0, method.answer_bytes - 1, method.answer_bytes + 1}:
        with pytest.raises(TrustError):
            ours.shared(bytes(size))


def test_the_finite_fields_are_those_of_rfc_3526():
    """The last 64 bits before the all-ones tail, from the RFC's sections 3 to 5; p and (p - 1) / 2 are prime."""
    tails = {
        KexMethod.MODP_2048: 0x15728E5A8AACAA68,
        KexMethod.MODP_3072: 0x4B82D120A93AD2CA,
        KexMethod.MODP_4096: 0x4DF435C934063199,
    }
    for method, tail in tails.items():
        prime = modp_numbers(method).p
        assert (prime.bit_length(), prime >> (prime.bit_length() - 64)) == (8 * method.public_bytes, 2**64 - 1)
        assert (prime >> 64 & 2**64 - 1, prime & 2**64 - 1) == (tail, 2**64 - 1)
        assert pow(3, prime - 1, prime) == 1
    prime = modp_numbers(KexMethod.MODP_2048).p // 2
    assert pow(3, prime - 1, prime) == 1
