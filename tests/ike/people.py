"""Small certificate authorities and credentials for the dialogues: leaf under a root, the ID in the SAN."""

from __future__ import annotations

import datetime
import hashlib
from dataclasses import dataclass, field
from ipaddress import ip_address

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

from p2pvpn.core.errors import TrustError, WireError
from p2pvpn.core.secret import Secret
from p2pvpn.core.selector import Selector
from p2pvpn.crypto import signatures
from p2pvpn.crypto.signatures import Scheme
from p2pvpn.ike.codes import IdKind
from p2pvpn.ike.config import Credential, IkeId, RemoteIdentity

SCHEMES = {
    "ecdsa": (Scheme.ECDSA_SHA256, Scheme.ECDSA_SHA384),
    "ecdsa384": (Scheme.ECDSA_SHA384,),
    "rsa": (Scheme.RSA_PSS_SHA256, Scheme.RSA_PKCS1_SHA256),
    "pkcs1": (Scheme.RSA_PKCS1_SHA256,),
    "ed25519": (Scheme.ED25519,),
}
_KEYS = {}
NO_CERTIFICATE = b"\x30\x00"
"""DER of an empty SEQUENCE."""


def key_of(kind: str, name: str):
    """One key per name and kind and test run: RSA keys are slow to make."""
    kind = {"pkcs1": "rsa"}.get(kind, kind)
    if (kind, name) not in _KEYS:
        if kind == "rsa":
            _KEYS[kind, name] = rsa.generate_private_key(65537, 2048)
        elif kind == "ed25519":
            _KEYS[kind, name] = ed25519.Ed25519PrivateKey.generate()
        else:
            _KEYS[kind, name] = ec.generate_private_key(ec.SECP384R1() if kind == "ecdsa384" else ec.SECP256R1())
    return _KEYS[kind, name]


@dataclass
class Authority:
    """A root that signs leaves."""

    name: str = "test root"
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def __post_init__(self) -> None:
        self.certificate = self._sign(self.name, self.key.public_key(), ca=True)

    def _sign(self, name, public_key, *, ca=False, sans=()):
        issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)])
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca, None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        if ca:
            usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
            builder = builder.add_extension(usage, critical=True)
        if sans:
            builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=False)
        return builder.sign(self.key, hashes.SHA256())

    @property
    def key_hash(self) -> bytes:
        spki = self.key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return hashlib.sha1(spki, usedforsecurity=False).digest()

    def leaf(self, name: str, public_key) -> x509.Certificate:
        try:
            san = x509.IPAddress(ip_address(name))
        except ValueError:
            san = x509.DNSName(name)
        return self._sign(name, public_key, sans=[san])


def ike_id(name: str) -> IkeId:
    try:
        return IkeId.address(name)
    except ValueError:
        return IkeId.fqdn(name)


def _names(leaf: x509.Certificate) -> set[IkeId]:
    san = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    names = {IkeId.fqdn(one) for one in san.get_values_for_type(x509.DNSName)}
    return names | {IkeId.address(one) for one in san.get_values_for_type(x509.IPAddress)}


def credential(
    authority: Authority,
    name: str,
    kind: str = "ecdsa",
    *,
    blocks: dict[str, tuple[str, ...]] | None = None,
    local: tuple[str, ...] = (),
    network: str = "net",
    padding_certificates: int = 0,
    trusts: Authority | None = None,
    own_name: str | None = None,
    certificates_of: str | None = None,
    send_chain: bool = True,
    ask: bool = True,
    **more,
) -> Credential:
    """`blocks` are the prefixes each peer may have, by ID text; `local` are our own.

    The rest is for impostors: another root than the one trusted, another name in the certificate, another's key in it,
    no certificate at all, no CERTREQ.
    """
    key = key_of(kind, name)
    leaf = authority.leaf(own_name or name, key_of(kind, certificates_of or name).public_key())
    root = (trusts or authority).certificate
    held = blocks or {}

    def verify(identity: IkeId, chain: tuple[bytes, ...]) -> RemoteIdentity:
        try:
            cert = x509.load_der_x509_certificate(chain[0])
        except (ValueError, x509.InvalidVersion):
            raise WireError("not a certificate") from None
        try:
            cert.verify_directly_issued_by(root)
        except (ValueError, TypeError, InvalidSignature):
            raise TrustError("not one of ours") from None
        if identity not in _names(cert):
            raise TrustError(f"{identity} is not in the certificate")
        own = tuple(Selector.of_network(one) for one in held.get(str(identity), ()))
        return RemoteIdentity(identity, cert.public_key(), own, subject=str(identity))

    der = leaf.public_bytes(serialization.Encoding.DER)
    return Credential(
        network=network,
        local_id=ike_id(name),
        certificates=(der, *[der] * padding_certificates) if send_chain else (NO_CERTIFICATE,),
        schemes=more.pop("schemes", SCHEMES[kind]),
        sign=lambda scheme, data: signatures.sign(key, scheme, data),
        authorities=((trusts or authority).key_hash,) if ask else (),
        verify=verify,
        local_blocks=tuple(Selector.of_network(one) for one in local),
        **more,
    )


def psk_credential(
    name: str, secret: bytes, *, blocks: dict[str, tuple[str, ...]], local: tuple[str, ...], network: str = "net"
) -> Credential:
    def verify(identity: IkeId, chain: tuple[bytes, ...]) -> RemoteIdentity:
        if str(identity) not in blocks or chain:
            raise TrustError("a stranger")
        own = tuple(Selector.of_network(one) for one in blocks[str(identity)])
        return RemoteIdentity(identity, None, own, subject=str(identity))

    def sign(scheme: Scheme, data: bytes) -> bytes:
        raise AssertionError("a shared secret signs nothing")

    return Credential(
        network=network,
        local_id=ike_id(name),
        certificates=(),
        schemes=(),
        sign=sign,
        authorities=(),
        verify=verify,
        local_blocks=tuple(Selector.of_network(one) for one in local),
        psk=Secret(secret),
    )


__all__ = ["SCHEMES", "Authority", "IdKind", "credential", "ike_id", "key_of", "psk_credential"]
