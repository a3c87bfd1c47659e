"""What AUTH payloads sign, and how (RFC 7296 section 2.15, RFC 7427, RFC 8420, RFC 4754).

    signed octets = own IKE_SA_INIT message | the other's nonce | prf(own SK_p, body of own ID payload) [| IntAuth]
    method 14     = | length u8 | AlgorithmIdentifier, DER | signature ... |
    method 9 - 11 = | r | s |                  P-256 with SHA-256, P-384 with SHA-384, P-521 with SHA-512
    method 1      = PKCS #1 v1.5 with a SHA-2 hash
    method 2      = prf(prf(shared secret, "Key Pad for IKEv2"), signed octets)

AlgorithmIdentifiers are compared with the few that exist, byte by byte: there is no ASN.1 parser to attack. SHA-1 is
neither made nor accepted, which leaves out method 1 of peers that know nothing newer.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from functools import cache
from itertools import product

from p2pvpn.core.errors import LocalError, TrustError
from p2pvpn.core.secret import Secret
from p2pvpn.crypto.prf import Prf
from p2pvpn.crypto.signatures import PublicKey, Scheme, curve_bits, ecdsa_from_raw, ecdsa_to_raw, verify

from .codes import AuthMethod, HashId
from .config import Credential, IkeId
from .notifies import Notify, NotifyType
from .payloads import Authentication, IdInitiator, IdResponder, build_payload

_KEY_PAD = b"Key Pad for IKEv2"
_HASH_IDS = {"sha256": HashId.SHA2_256, "sha384": HashId.SHA2_384, "sha512": HashId.SHA2_512}
_RSA = "2a864886f70d0101"
_PSS, _MGF1 = _RSA + "0a", _RSA + "08"
_SHA2_OIDS = {"sha256": "608648016503040201", "sha384": "608648016503040202", "sha512": "608648016503040203"}
_HASH_BYTES = {"sha256": 32, "sha384": 48, "sha512": 64}
_PLAIN_OIDS = {
    Scheme.ECDSA_SHA256: "2a8648ce3d040302",
    Scheme.ECDSA_SHA384: "2a8648ce3d040303",
    Scheme.ECDSA_SHA512: "2a8648ce3d040304",
    Scheme.ED25519: "2b6570",
    Scheme.RSA_PKCS1_SHA256: _RSA + "0b",
    Scheme.RSA_PKCS1_SHA384: _RSA + "0c",
    Scheme.RSA_PKCS1_SHA512: _RSA + "0d",
}
_NULL = bytes.fromhex("0500")
_ECDSA_METHODS = {
    Scheme.ECDSA_SHA256: (AuthMethod.ECDSA_256, 32, 256),
    Scheme.ECDSA_SHA384: (AuthMethod.ECDSA_384, 48, 384),
    Scheme.ECDSA_SHA512: (AuthMethod.ECDSA_521, 66, 521),
}
"""Method, bytes of r and of s, bits of the curve (RFC 4754 section 5)."""
_PKCS1 = (Scheme.RSA_PKCS1_SHA256, Scheme.RSA_PKCS1_SHA384, Scheme.RSA_PKCS1_SHA512)


def _der(tag: int, content: bytes) -> bytes:
    """A DER element of less than 128 bytes."""
    return bytes([tag, len(content)]) + content


def _oid(text: str) -> bytes:
    return _der(0x06, bytes.fromhex(text))


def _hash_name(scheme: Scheme) -> str:
    return scheme.value.rpartition("-")[2]


def _pss_identifier(name: str, hash_null: bool, mgf_null: bool, trailer: bool) -> bytes:
    """RSASSA-PSS with one hash throughout and a salt of its length (RFC 4055 section 3.1, RFC 7427 appendix A.4)."""
    oid = _oid(_SHA2_OIDS[name])
    hashed = _der(0x30, oid + (_NULL if hash_null else b""))
    masked = _der(0x30, _oid(_MGF1) + _der(0x30, oid + (_NULL if mgf_null else b"")))
    params = _der(0xA0, hashed) + _der(0xA1, masked) + _der(0xA2, _der(0x02, bytes([_HASH_BYTES[name]])))
    if trailer:
        params += _der(0xA3, _der(0x02, b"\x01"))
    return _der(0x30, _oid(_PSS) + _der(0x30, params))


@cache
def algorithm_identifier(scheme: Scheme) -> bytes:
    """The DER AlgorithmIdentifier that we send for a scheme."""
    oid = _PLAIN_OIDS.get(scheme)
    if oid is None:
        return _pss_identifier(_hash_name(scheme), True, True, False)
    return _der(0x30, _oid(oid) + (_NULL if scheme in _PKCS1 else b""))


def _accepted_identifiers() -> dict[bytes, Scheme]:
    """Those that we send, and the other encodings of RSASSA-PSS that RFC 4055 and RFC 7427 allow or show."""
    known = {algorithm_identifier(scheme): scheme for scheme in Scheme}
    for scheme in (Scheme.RSA_PSS_SHA256, Scheme.RSA_PSS_SHA384, Scheme.RSA_PSS_SHA512):
        for variant in product((True, False), repeat=3):
            known[_pss_identifier(_hash_name(scheme), *variant)] = scheme
    return known


_SCHEMES = _accepted_identifiers()


def hash_id(scheme: Scheme) -> HashId:
    """The number that SIGNATURE_HASH_ALGORITHMS has for the scheme's hash."""
    return HashId.IDENTITY if scheme is Scheme.ED25519 else _HASH_IDS[_hash_name(scheme)]


@cache
def hash_notify() -> Notify:
    """SIGNATURE_HASH_ALGORITHMS with all that we verify (RFC 7427 section 4)."""
    numbers = (HashId.SHA2_256, HashId.SHA2_384, HashId.SHA2_512, HashId.IDENTITY)
    return Notify(NotifyType.SIGNATURE_HASH_ALGORITHMS, b"".join(number.to_bytes(2, "big") for number in numbers))


def peer_hashes(notify: Notify | None) -> frozenset[int]:
    """The hashes a peer announced; empty when it knows nothing of RFC 7427."""
    data = b"" if notify is None else notify.data
    return frozenset(int.from_bytes(data[at : at + 2], "big") for at in range(0, len(data) - 1, 2))


@cache
def methods_notify() -> Notify:
    """SUPPORTED_AUTH_METHODS with the signatures that we verify (RFC 9593 section 3.2.3); of PSS only the first."""
    out = b""
    for scheme in Scheme:
        if scheme not in (Scheme.RSA_PSS_SHA384, Scheme.RSA_PSS_SHA512):
            identifier = algorithm_identifier(scheme)
            out += bytes([3 + len(identifier), 0, AuthMethod.DIGITAL_SIGNATURE]) + identifier
    return Notify(NotifyType.SUPPORTED_AUTH_METHODS, out)


def announced_methods(notify: Notify | None) -> frozenset[bytes]:
    """The AlgorithmIdentifiers of a peer's SUPPORTED_AUTH_METHODS; what does not fit ends the list."""
    data, found = b"" if notify is None else notify.data, set[bytes]()
    while len(data) >= 2 and 2 <= data[0] <= len(data):
        if data[0] > 3 and data[2] == AuthMethod.DIGITAL_SIGNATURE:
            found.add(data[3 : data[0]])
        data = data[data[0] :]
    return frozenset(found)


def signed_octets(
    prf: Prf, own_message: bytes, other_nonce: bytes, sk_p: Secret, own_id: IkeId, *, int_auth: bytes = b""
) -> bytes:
    """What one side signs. `own_message` is its last IKE_SA_INIT message, as it was on the wire.

    `int_auth` stands for the IKE_INTERMEDIATE exchanges, if there were any (RFC 9242 section 3.3.2).
    """
    body = build_payload(IdInitiator(own_id.kind, own_id.data))
    return own_message + other_nonce + prf(sk_p.reveal(), body) + int_auth


def id_payload(identity: IkeId, initiator: bool) -> IdInitiator | IdResponder:
    cls = IdInitiator if initiator else IdResponder
    return cls(identity.kind, identity.data)


def shared_key_auth(prf: Prf, psk: Secret, octets: bytes) -> Authentication:
    """AUTH with method 2."""
    return Authentication(AuthMethod.SHARED_KEY, prf(prf(psk.reveal(), _KEY_PAD), octets))


def sign(
    credential: Credential, hashes: Iterable[int], octets: bytes, methods: frozenset[bytes] = frozenset()
) -> Authentication:
    """AUTH with the first of the credential's schemes that the peer understands; those it named (`methods`) come first.

    A peer that announced no hashes gets methods 9, 10 or 1. Raises LocalError when no scheme will do.
    """
    known = set(hashes)
    for scheme in sorted(credential.schemes, key=lambda one: algorithm_identifier(one) not in methods):
        if hash_id(scheme) in known:
            identifier = algorithm_identifier(scheme)
            data = bytes([len(identifier)]) + identifier + credential.sign(scheme, octets)
            return Authentication(AuthMethod.DIGITAL_SIGNATURE, data)
        if not known and scheme in _ECDSA_METHODS:
            method, size, _ = _ECDSA_METHODS[scheme]
            return Authentication(method, ecdsa_to_raw(credential.sign(scheme, octets), size))
        if not known and scheme in _PKCS1:
            return Authentication(AuthMethod.RSA, credential.sign(scheme, octets))
    raise LocalError("none of our signature schemes is one that the peer understands")


def verify_shared_key(prf: Prf, psk: Secret, auth: Authentication, octets: bytes) -> None:
    """Raises TrustError."""
    if auth.method != AuthMethod.SHARED_KEY:
        raise TrustError(f"authentication method {auth.method} where a shared secret is wanted")
    if not hmac.compare_digest(auth.data, shared_key_auth(prf, psk, octets).data):
        raise TrustError("the shared secret is another one")


def verify_signature(key: PublicKey, auth: Authentication, octets: bytes) -> None:
    """Raises TrustError unless the AUTH payload is the key's signature of the octets."""
    if auth.method == AuthMethod.DIGITAL_SIGNATURE:
        if not auth.data:
            raise TrustError("an empty signature")
        end = 1 + auth.data[0]
        scheme = _SCHEMES.get(auth.data[1:end])
        if scheme is None:
            raise TrustError("a signature algorithm that is not accepted")
        return verify(key, scheme, auth.data[end:], octets)
    for scheme, (method, size, bits) in _ECDSA_METHODS.items():
        if auth.method == method:
            if curve_bits(key) != bits or len(auth.data) != 2 * size:
                raise TrustError("the signature is not of the size that its method wants")
            return verify(key, scheme, ecdsa_from_raw(auth.data), octets)
    if auth.method == AuthMethod.RSA:
        return _verify_pkcs1(key, auth.data, octets)
    raise TrustError(f"authentication method {auth.method}")


def _verify_pkcs1(key: PublicKey, signature: bytes, octets: bytes) -> None:
    """Method 1 does not say its hash, the signature does (RFC 7296 section 3.8)."""
    for scheme in _PKCS1:
        try:
            return verify(key, scheme, signature, octets)
        except TrustError:
            continue
    raise TrustError("the signature does not hold")
