"""Key exchange methods of IKEv2 (transform types 4 and 6 to 12).

Curve25519 (RFC 8031), the NIST curves (RFC 5903), the MODP groups of RFC 3526, and ML-KEM (FIPS 203), whose second side
answers the first one's public value instead of sending one of its own. Groups below 2048 bits are not for us.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from functools import cache
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric import dh, ec, x25519
from cryptography.hazmat.primitives.asymmetric.mlkem import (
    MLKEM768PrivateKey,
    MLKEM768PublicKey,
    MLKEM1024PrivateKey,
    MLKEM1024PublicKey,
)
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.utils import CryptographyDeprecationWarning

from p2pvpn.core.errors import TrustError
from p2pvpn.core.secret import Secret


class KexMethod(Enum):
    """IANA transform ID, bytes of the initiator's public value, and of the responder's."""

    MODP_2048 = (14, 256, 256)
    MODP_3072 = (15, 384, 384)
    MODP_4096 = (16, 512, 512)
    ECP_256 = (19, 64, 64)
    ECP_384 = (20, 96, 96)
    ECP_521 = (21, 132, 132)
    CURVE25519 = (31, 32, 32)
    ML_KEM_768 = (36, 1184, 1088)
    ML_KEM_1024 = (37, 1568, 1568)

    def __init__(self, transform: int, public_bytes: int, answer_bytes: int) -> None:
        self.transform = transform
        self.public_bytes = public_bytes
        self.answer_bytes = answer_bytes

    @property
    def is_slow(self) -> bool:
        """Costs milliseconds: taken from a stranger only when there is nothing better."""
        return self in _MODP

    @property
    def is_kem(self) -> bool:
        return self in _KEMS


_KEMS: dict[
    KexMethod, tuple[type[MLKEM768PrivateKey | MLKEM1024PrivateKey], type[MLKEM768PublicKey | MLKEM1024PublicKey]]
] = {
    KexMethod.ML_KEM_768: (MLKEM768PrivateKey, MLKEM768PublicKey),
    KexMethod.ML_KEM_1024: (MLKEM1024PrivateKey, MLKEM1024PublicKey),
}
_CURVES: dict[KexMethod, ec.EllipticCurve] = {
    KexMethod.ECP_256: ec.SECP256R1(),
    KexMethod.ECP_384: ec.SECP384R1(),
    KexMethod.ECP_521: ec.SECP521R1(),
}
_MODP = {
    KexMethod.MODP_2048: (2048, 124476),
    KexMethod.MODP_3072: (3072, 1690314),
    KexMethod.MODP_4096: (4096, 240904),
}
"""Bits of the prime, and the number that makes it one (RFC 3526 sections 3 to 5)."""


class KeyExchange(Protocol):
    """One ephemeral key: send `public`, receive the peer's, derive the secret."""

    @property
    def method(self) -> KexMethod: ...

    @property
    def public(self) -> bytes: ...

    def shared(self, peer_public: bytes) -> Secret:
        """Raises TrustError for a public value that is malformed, off the curve or of small order."""
        ...


class _X25519:
    method = KexMethod.CURVE25519

    def __init__(self) -> None:
        self._key = x25519.X25519PrivateKey.generate()
        self.public = self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

    def shared(self, peer_public: bytes) -> Secret:
        if len(peer_public) != self.method.public_bytes:
            raise TrustError("a Curve25519 public value has 32 bytes")
        try:
            # An all-zero result (small-order point) raises as RFC 8031 section 5 and RFC 7748 section 6.1 want.
            return Secret(self._key.exchange(x25519.X25519PublicKey.from_public_bytes(peer_public)))
        except ValueError:
            raise TrustError("the peer's Curve25519 value is of small order") from None


class _Ecp:
    def __init__(self, method: KexMethod) -> None:
        self.method = method
        self._curve = _CURVES[method]
        self._key = ec.generate_private_key(self._curve)
        # RFC 5903 section 7: x and y without the point-format octet.
        self.public = self._key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]

    def shared(self, peer_public: bytes) -> Secret:
        if len(peer_public) != self.method.public_bytes:
            raise TrustError(f"a {self.method.name} public value has {self.method.public_bytes} bytes")
        try:
            peer = ec.EllipticCurvePublicKey.from_encoded_point(self._curve, b"\x04" + peer_public)
            return Secret(self._key.exchange(ec.ECDH(), peer))
        except ValueError:
            raise TrustError("the peer's point is not on the curve") from None


@contextmanager
def _finite_fields() -> Iterator[None]:
    """The library says that it will drop finite fields one day; built-in clients still want group 14."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CryptographyDeprecationWarning)
        yield


class _Modp:
    def __init__(self, method: KexMethod) -> None:
        self.method = method
        self._numbers = modp_numbers(method)
        with _finite_fields():
            self._key = self._numbers.parameters().generate_private_key()
        self.public = self._key.public_key().public_numbers().y.to_bytes(method.public_bytes, "big")

    def shared(self, peer_public: bytes) -> Secret:
        value = int.from_bytes(peer_public, "big")
        # RFC 7296 section 2.12 and RFC 6989 section 2.1: within the group, and not one of the trivial elements.
        if len(peer_public) != self.method.public_bytes or not 1 < value < self._numbers.p - 1:
            raise TrustError(f"not a {self.method.name} public value")
        try:
            with _finite_fields():
                secret = self._key.exchange(dh.DHPublicNumbers(value, self._numbers).public_key())
        except ValueError:
            raise TrustError(f"not a {self.method.name} public value") from None
        return Secret(secret.rjust(self.method.public_bytes, b"\0"))


class _MlKem:
    """The initiator's side; the responder's is `respond`."""

    def __init__(self, method: KexMethod) -> None:
        self.method = method
        self._key = _KEMS[method][0].generate()
        self.public = self._key.public_key().public_bytes_raw()

    def shared(self, peer_public: bytes) -> Secret:
        if len(peer_public) != self.method.answer_bytes:
            raise TrustError(f"an {self.method.name} ciphertext has {self.method.answer_bytes} bytes")
        # A ciphertext that is not for this key gives a secret that nobody else has (FIPS 203 section 6.3).
        return Secret(self._key.decapsulate(peer_public))


def generate(method: KexMethod) -> KeyExchange:
    """A fresh ephemeral key. The randomness is the library's own; it never needs to be repeatable."""
    if method is KexMethod.CURVE25519:
        return _X25519()
    if method.is_kem:
        return _MlKem(method)
    return _Modp(method) if method.is_slow else _Ecp(method)


def respond(method: KexMethod, peer_public: bytes) -> tuple[bytes, Secret]:
    """The responder's public value (or ciphertext) and the secret. Raises TrustError for a bad public value."""
    if not method.is_kem:
        own = generate(method)
        return own.public, own.shared(peer_public)
    if len(peer_public) != method.public_bytes:
        raise TrustError(f"an {method.name} public key has {method.public_bytes} bytes")
    try:
        # The modulus check of FIPS 203 section 7.2 is the library's.
        secret, ciphertext = _KEMS[method][1].from_public_bytes(peer_public).encapsulate()
    except ValueError:
        raise TrustError(f"not an {method.name} public key") from None
    return ciphertext, Secret(secret)


@cache
def modp_numbers(method: KexMethod) -> dh.DHParameterNumbers:
    """Generator 2 and the prime 2^n - 2^(n-64) - 1 + 2^64 ([2^(n-130) pi] + k) of RFC 3526."""
    bits, addend = _MODP[method]
    prime = 2**bits - 2 ** (bits - 64) - 1 + 2**64 * (_pi(bits - 130) + addend)
    with _finite_fields():
        return dh.DHParameterNumbers(prime, 2)


def _pi(bits: int) -> int:
    """[2^bits pi], by Machin's formula with 64 bits to spare."""
    one = 1 << (bits + 64)

    def arctan_of_inverse(n: int) -> int:
        power = total = one // n
        divisor = 1
        while power:
            power //= n * n
            divisor += 2
            total += -(power // divisor) if divisor % 4 == 3 else power // divisor
        return total

    return 4 * (4 * arctan_of_inverse(5) - arctan_of_inverse(239)) >> 64
