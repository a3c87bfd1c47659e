"""A peer's key: ECDSA on P-256, made on the machine that uses it and never sent anywhere (RFC 7427 section 3)."""

from __future__ import annotations

from p2pvpn.core.errors import LocalError
from p2pvpn.core.ids import PeerId
from p2pvpn.core.secret import Secret
from p2pvpn.crypto.signatures import (
    EcPrivateKey,
    PublicKey,
    Scheme,
    derived_key,
    generate_key,
    is_p256,
    key_from_pem,
    key_to_pem,
    sign,
    spki,
    subject_public_key,
)

_ISSUING = b"p2pvpn issuing key 1"


class PeerKey:
    """A private key with the peer ID that follows from it. Shows only the peer ID when printed."""

    __slots__ = ("peer_id", "private", "public_key")

    def __init__(self, private: EcPrivateKey) -> None:
        self.private = private
        self.public_key: PublicKey = private.public_key()
        self.peer_id = peer_id_of(self.public_key)

    @classmethod
    def generate(cls) -> PeerKey:
        """A new key. The randomness is the library's own."""
        return cls(generate_key())

    @classmethod
    def from_pem(cls, pem: bytes, passphrase: bytes | None = None) -> PeerKey:
        """From PKCS#8. Raises LocalError for a wrong passphrase, a damaged file or a key that is not P-256."""
        key = key_from_pem(pem, passphrase)
        if not isinstance(key, EcPrivateKey) or not is_p256(key):
            raise LocalError("the key is not an ECDSA key on P-256")
        return cls(key)

    def to_pem(self, passphrase: bytes | None = None) -> Secret:
        """PKCS#8, encrypted when a passphrase is given."""
        return Secret(key_to_pem(self.private, passphrase))

    @property
    def spki(self) -> bytes:
        """DER SubjectPublicKeyInfo of the public key."""
        return spki(self.public_key)

    def sign(self, data: bytes) -> bytes:
        """ECDSA with SHA-256, as a DER Ecdsa-Sig-Value."""
        return sign(self.private, Scheme.ECDSA_SHA256, data)

    def issuing_key(self) -> PeerKey:
        """The key that this machine signs members' certificates with, if an admin ever makes it an issuer.

        It follows from the peer's own key, so that there is one file to keep, and differs from it, so that no
        signature made in IKE or TLS can ever pass for one on a certificate.
        """
        return PeerKey(derived_key(self.private, _ISSUING))

    def __repr__(self) -> str:
        return f"PeerKey({self.peer_id.hex()[:12]})"


def peer_id_of(key: PublicKey) -> PeerId:
    """The peer ID of a public key: also the subjectKeyIdentifier of its certificates."""
    return PeerId.of_key(subject_public_key(key))
