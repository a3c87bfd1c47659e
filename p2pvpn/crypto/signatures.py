"""Signing keys and the signature schemes of certificates and of IKE_AUTH (RFC 7427, RFC 8420)."""

from __future__ import annotations

import hmac
from enum import Enum

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from p2pvpn.core.errors import Fault, LocalError, TrustError

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey
PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey

EcPrivateKey = ec.EllipticCurvePrivateKey

MIN_RSA_BITS = 2048
MAX_RSA_BITS = 8192
"""A larger modulus would let a stranger buy our CPU time with one certificate."""


class Scheme(Enum):
    """A way to sign: the name says key and hash."""

    ECDSA_SHA256 = "ecdsa-sha256"
    ECDSA_SHA384 = "ecdsa-sha384"
    ECDSA_SHA512 = "ecdsa-sha512"
    ED25519 = "ed25519"
    RSA_PSS_SHA256 = "rsa-pss-sha256"
    RSA_PSS_SHA384 = "rsa-pss-sha384"
    RSA_PSS_SHA512 = "rsa-pss-sha512"
    RSA_PKCS1_SHA256 = "rsa-pkcs1-sha256"
    RSA_PKCS1_SHA384 = "rsa-pkcs1-sha384"
    RSA_PKCS1_SHA512 = "rsa-pkcs1-sha512"


_HASHES: dict[str, type[hashes.SHA256 | hashes.SHA384 | hashes.SHA512]] = {
    "sha256": hashes.SHA256,
    "sha384": hashes.SHA384,
    "sha512": hashes.SHA512,
}


def _hash(scheme: Scheme) -> hashes.SHA256 | hashes.SHA384 | hashes.SHA512:
    return _HASHES[scheme.value.rpartition("-")[2]]()


def own_scheme(key: PublicKey) -> Scheme:
    """The one scheme that we ourselves use with this kind of key."""
    if isinstance(key, ec.EllipticCurvePublicKey):
        return Scheme.ECDSA_SHA256
    if isinstance(key, ed25519.Ed25519PublicKey):
        return Scheme.ED25519
    return Scheme.RSA_PSS_SHA256


def generate_key() -> ec.EllipticCurvePrivateKey:
    """A P-256 key: the kind that TPMs and secure enclaves hold."""
    return ec.generate_private_key(ec.SECP256R1())


P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
"""The order of P-256's base point (FIPS 186-4 appendix D.1.2.3)."""


def derived_key(key: ec.EllipticCurvePrivateKey, label: bytes) -> ec.EllipticCurvePrivateKey:
    """A second P-256 key that follows from the first and says nothing about it.

    512 bits are reduced to 256, so that the bias is far below what counts (FIPS 186-4 appendix B.4.1).
    """
    scalar = key.private_numbers().private_value.to_bytes((key.key_size + 7) // 8, "big")
    return seeded_key(hmac.digest(scalar, label, "sha512"))


def seeded_key(seed: bytes) -> ec.EllipticCurvePrivateKey:
    """The P-256 key that follows from 64 bytes; whoever has the seed has the key."""
    if len(seed) != 64:
        raise ValueError("the seed of a key has 64 bytes")
    return ec.derive_private_key(int.from_bytes(seed, "big") % (P256_ORDER - 1) + 1, ec.SECP256R1())


def is_p256(key: PrivateKey | PublicKey) -> bool:
    """Whether the key is on the curve that every key of our own is on."""
    if not isinstance(key, ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey):
        return False
    return isinstance(key.curve, ec.SECP256R1)


def sign_certificate(key: ec.EllipticCurvePrivateKey, builder: x509.CertificateBuilder) -> bytes:
    """The DER certificate that `builder` describes, signed with ECDSA and SHA-256."""
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def sign(key: PrivateKey, scheme: Scheme, data: bytes) -> bytes:
    """A signature (ECDSA: DER Ecdsa-Sig-Value). Raises LocalError when key and scheme do not go together."""
    if isinstance(key, ec.EllipticCurvePrivateKey) and scheme.value.startswith("ecdsa"):
        return key.sign(data, ec.ECDSA(_hash(scheme)))
    if isinstance(key, ed25519.Ed25519PrivateKey) and scheme is Scheme.ED25519:
        return key.sign(data)
    if isinstance(key, rsa.RSAPrivateKey) and scheme.value.startswith("rsa"):
        return key.sign(data, _rsa_padding(scheme), _hash(scheme))
    raise LocalError(f"a {type(key).__name__} cannot sign with {scheme.value}")


def verify(key: PublicKey, scheme: Scheme, signature: bytes, data: bytes) -> None:
    """Raises TrustError unless the signature holds."""
    try:
        if isinstance(key, ec.EllipticCurvePublicKey) and scheme.value.startswith("ecdsa"):
            return key.verify(signature, data, ec.ECDSA(_hash(scheme)))
        if isinstance(key, ed25519.Ed25519PublicKey) and scheme is Scheme.ED25519:
            return key.verify(signature, data)
        if isinstance(key, rsa.RSAPublicKey) and scheme.value.startswith("rsa"):
            if not MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS:
                raise TrustError(f"an RSA key of {key.key_size} bits")
            return key.verify(signature, data, _rsa_padding(scheme), _hash(scheme))
    except (InvalidSignature, ValueError):
        raise TrustError("the signature does not hold") from None
    raise TrustError("the signature scheme does not belong to the key")


def _rsa_padding(scheme: Scheme) -> padding.AsymmetricPadding:
    if "pss" in scheme.value:
        return padding.PSS(padding.MGF1(_hash(scheme)), padding.PSS.DIGEST_LENGTH)
    return padding.PKCS1v15()


def ecdsa_to_raw(signature: bytes, size: int) -> bytes:
    """r and s of a DER Ecdsa-Sig-Value side by side, `size` bytes each (RFC 4754 section 7). Raises LocalError."""
    r, s = decode_dss_signature(signature)
    try:
        return r.to_bytes(size, "big") + s.to_bytes(size, "big")
    except OverflowError:
        raise LocalError(f"the signature is of a curve larger than {size * 8} bits") from None


def ecdsa_from_raw(raw: bytes) -> bytes:
    """The inverse of `ecdsa_to_raw`."""
    half = len(raw) // 2
    return encode_dss_signature(int.from_bytes(raw[:half], "big"), int.from_bytes(raw[half:], "big"))


def curve_bits(key: PublicKey) -> int:
    """The size of an elliptic curve key, 0 for other keys."""
    return key.key_size if isinstance(key, ec.EllipticCurvePublicKey) else 0


def subject_public_key(key: PublicKey) -> bytes:
    """The content of the subjectPublicKey BIT STRING: what peer IDs and key identifiers are hashes of."""
    if isinstance(key, ec.EllipticCurvePublicKey):
        return key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.PKCS1)


def spki(key: PublicKey) -> bytes:
    """DER SubjectPublicKeyInfo."""
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def public_key_untrusted(der: bytes) -> PublicKey:
    """From DER SubjectPublicKeyInfo. Raises TrustError for every kind of key we have no use for."""
    try:
        key = serialization.load_der_public_key(der)
    except Exception:  # noqa: BLE001 (the parser's set of errors is open)
        raise TrustError("not a public key") from None
    if not isinstance(key, ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey):
        raise TrustError(f"a public key of kind {type(key).__name__}")
    return key


def key_to_pem(key: PrivateKey, passphrase: bytes | None = None) -> bytes:
    """PKCS#8, encrypted when a passphrase is given."""
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        encryption = serialization.BestAvailableEncryption(passphrase)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def key_from_pem(pem: bytes, passphrase: bytes | None = None) -> PrivateKey:
    """Raises LocalError for a wrong passphrase or a damaged file."""
    try:
        key = serialization.load_pem_private_key(pem, passphrase)
    except (ValueError, TypeError):
        raise LocalError("the key cannot be read: wrong passphrase or damaged file", fault=Fault.REFUSED) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey):
        raise LocalError(f"a key of kind {type(key).__name__} is of no use here")
    return key
