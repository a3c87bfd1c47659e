"""Key exchange methods of IKEv2 (transform type 4): Curve25519 (RFC 8031) and the NIST curves (RFC 5903)."""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric import ec, x25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from p2pvpn.core.errors import TrustError
from p2pvpn.core.secret import Secret


class KexMethod(Enum):
    """IANA transform ID and bytes of a public value."""

    ECP_256 = (19, 64)
    ECP_384 = (20, 96)
    CURVE25519 = (31, 32)

    def __init__(self, transform: int, public_bytes: int) -> None:
        self.transform = transform
        self.public_bytes = public_bytes


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
    def __init__(self, method: KexMethod, curve: ec.EllipticCurve) -> None:
        self.method = method
        self._curve = curve
        self._key = ec.generate_private_key(curve)
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


def generate(method: KexMethod) -> KeyExchange:
    """A fresh ephemeral key. The randomness is the library's own; it never needs to be repeatable."""
    if method is KexMethod.CURVE25519:
        return _X25519()
    if method is KexMethod.ECP_256:
        return _Ecp(method, ec.SECP256R1())
    return _Ecp(method, ec.SECP384R1())
