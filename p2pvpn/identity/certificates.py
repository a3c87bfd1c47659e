"""X.509 certificates of a network: root, issuers and leaves (RFC 5280, with RFC 4945 section 5.1 for use in IKE).

    root      signed by itself       CA                 the anchor that other IKE implementations are given
    issuer    signed by the root     CA, path length 0  its IPv4 range, the network's IPv6 prefix, its default group
    leaf      by root or issuer      not CA             one member: SAN, blocks, roles and groups, key identifier

A leaf says the member's name as the first DNS name and its overlay address as the first IP address of the subject
alternative name; a hub's leaf adds what it is dialled by, because clients that are built into systems compare that.
IPAddrBlocks and the membership extension are not critical, since those clients refuse critical extensions that they
do not know; `trust` insists on both.

    Membership ::= SEQUENCE { roles SEQUENCE OF UTF8String, groups SEQUENCE OF UTF8String }

In an issuer's certificate the roles are just `issuer` and the groups are the one that it puts members into.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from cryptography import x509
from cryptography.hazmat import asn1
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, SignatureAlgorithmOID

from p2pvpn.core.address import IpAddress, normal_ip
from p2pvpn.core.errors import WireError
from p2pvpn.core.ids import NetworkId, PeerId, overlay_address
from p2pvpn.core.ports import Entropy
from p2pvpn.core.selector import Selector
from p2pvpn.crypto.signatures import (
    PublicKey,
    Scheme,
    sign_certificate,
    verify,
)

from . import blocks as ip_blocks
from .keys import PeerKey, peer_id_of
from .member import Role

MEMBERSHIP_OID = x509.ObjectIdentifier("2.25.180018172079752916364139584075387227667")
"""The arc of UUIDs (ITU-T X.667) with 876e3d22-edd6-5c7e-993b-1a983c71ce13, which is the version 5 UUID of the DNS
name membership.p2pvpn.org."""
IPSEC_IKE = ExtendedKeyUsageOID.IPSEC_IKE
"""id-kp-ipsecIKE (RFC 4945 section 5.1.3.12)."""

DAY_S = 86400
MEMBER_LIFETIME_S = 7 * DAY_S
"""An issuer's certificates: short, so that a member that nobody renews is gone soon."""
GRANT_LIFETIME_S = 365 * DAY_S
"""The root's certificates for hubs, gateways and issuers: an admin is asked once a year."""
BACKDATE_S = 300
"""Certificates begin this long ago, so that clocks may differ by as much."""
MAX_CERTIFICATE_BYTES = 8192
"""A leaf of ours has about 800; foreign keys and many prefixes make it larger."""
MAX_LABELS = 32
"""Roles, or groups, of one certificate."""
_NO_END = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)
"""RFC 5280 section 4.1.2.5: no well-defined expiry. Trust in the root comes from the genesis, not from a date."""
_KNOWN = frozenset(
    {
        x509.BasicConstraints.oid,
        x509.KeyUsage.oid,
        x509.ExtendedKeyUsage.oid,
        x509.SubjectAlternativeName.oid,
        x509.SubjectKeyIdentifier.oid,
        x509.AuthorityKeyIdentifier.oid,
        ip_blocks.OID,
        MEMBERSHIP_OID,
    }
)

E = TypeVar("E", bound=x509.ExtensionType)


@asn1.sequence
class _Membership:
    roles: list[str]
    groups: list[str]


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a certificate says, not yet believed. Times are in seconds since the epoch.

    `key_id` and `issuer_key_id` are key identifiers, empty when missing; `path_length` is None for no limit;
    `unknown_critical` says that it must be refused (RFC 5280 section 4.2).
    """

    der: bytes
    serial: int
    subject: bytes
    issuer: bytes
    key_id: bytes
    issuer_key_id: bytes
    public_key: PublicKey
    not_before: float
    not_after: float
    is_ca: bool
    path_length: int | None
    signs_certificates: bool
    signs_data: bool
    purposes: frozenset[str]
    dns_names: tuple[str, ...]
    addresses: tuple[IpAddress, ...]
    blocks: tuple[Selector, ...]
    roles: tuple[str, ...]
    groups: tuple[str, ...]
    unknown_critical: bool
    tbs: bytes
    signature: bytes

    def verify_signature(self, key: PublicKey) -> None:
        """Raises TrustError unless `key` signed this certificate."""
        verify(key, Scheme.ECDSA_SHA256, self.signature, self.tbs)

    @property
    def peer_id(self) -> PeerId:
        """The peer ID of the key, computed and not read."""
        return peer_id_of(self.public_key)


@dataclass(frozen=True, slots=True)
class Authority:
    """A key that signs certificates, with its own."""

    key: PeerKey
    certificate: Certificate


def parse_untrusted(der: bytes) -> Certificate:
    """What the certificate says; nothing is verified. Raises WireError."""
    if len(der) > MAX_CERTIFICATE_BYTES:
        raise WireError(f"a certificate of {len(der)} bytes")
    try:
        return _parse(x509.load_der_x509_certificate(der), der)
    except WireError:
        raise
    except Exception as problem:  # noqa: BLE001 (the parser's set of errors is open)
        raise WireError(f"not a certificate: {type(problem).__name__}") from None


def _parse(cert: x509.Certificate, der: bytes) -> Certificate:
    if cert.version is not x509.Version.v3 or cert.serial_number <= 0:
        raise WireError("not a version 3 certificate with a positive serial number")
    # The last element is the signature's BIT STRING, whose first octet counts unused bits. X.690 section 8.6.2.
    if der[-len(cert.signature) - 1] != 0:
        raise WireError("a signature that does not end on an octet")
    if cert.signature_algorithm_oid != SignatureAlgorithmOID.ECDSA_WITH_SHA256:
        raise WireError("certificates of a network are signed with ECDSA and SHA-256")
    key = cert.public_key()
    if not isinstance(key, PublicKey):
        raise WireError("a certificate for a kind of key we have no use for")
    extensions = cert.extensions
    constraints = _value(extensions, x509.BasicConstraints)
    usage = _value(extensions, x509.KeyUsage)
    purposes = _value(extensions, x509.ExtendedKeyUsage)
    names = _value(extensions, x509.SubjectAlternativeName)
    key_id = _value(extensions, x509.SubjectKeyIdentifier)
    issuer_key_id = _value(extensions, x509.AuthorityKeyIdentifier)
    membership = _membership(_raw(extensions, MEMBERSHIP_OID))
    blocks = _raw(extensions, ip_blocks.OID)
    return Certificate(
        der=der,
        serial=cert.serial_number,
        subject=cert.subject.public_bytes(),
        issuer=cert.issuer.public_bytes(),
        key_id=key_id.digest if key_id else b"",
        issuer_key_id=(issuer_key_id.key_identifier or b"") if issuer_key_id else b"",
        public_key=key,
        not_before=cert.not_valid_before_utc.timestamp(),
        not_after=cert.not_valid_after_utc.timestamp(),
        is_ca=constraints.ca if constraints else False,
        path_length=constraints.path_length if constraints else None,
        signs_certificates=usage.key_cert_sign if usage else False,
        signs_data=usage.digital_signature if usage else False,
        purposes=frozenset(oid.dotted_string for oid in purposes) if purposes else frozenset(),
        dns_names=tuple(names.get_values_for_type(x509.DNSName)) if names else (),
        addresses=_addresses(names) if names else (),
        blocks=ip_blocks.decode_untrusted(blocks) if blocks is not None else (),
        roles=tuple(membership.roles),
        groups=tuple(membership.groups),
        unknown_critical=any(extension.critical and extension.oid not in _KNOWN for extension in extensions),
        tbs=cert.tbs_certificate_bytes,
        signature=cert.signature,
    )


def _value(extensions: x509.Extensions, kind: type[E]) -> E | None:
    for extension in extensions:
        if isinstance(extension.value, kind):
            return extension.value
    return None


def _raw(extensions: x509.Extensions, oid: x509.ObjectIdentifier) -> bytes | None:
    for extension in extensions:
        if extension.oid == oid and isinstance(extension.value, x509.UnrecognizedExtension):
            return extension.value.value
    return None


def _addresses(names: x509.SubjectAlternativeName) -> tuple[IpAddress, ...]:
    out: list[IpAddress] = []
    for value in names.get_values_for_type(x509.IPAddress):
        if not isinstance(value, ipaddress.IPv4Address | ipaddress.IPv6Address):
            raise WireError("a network among the alternative names")
        out.append(value)
    return tuple(out)


def _membership(der: bytes | None) -> _Membership:
    if der is None:
        return _Membership(roles=[], groups=[])
    value = asn1.decode_der(_Membership, der)
    if max(len(value.roles), len(value.groups)) > MAX_LABELS:
        raise WireError("too many roles or groups")
    return value


def new_serial(entropy: Entropy) -> int:
    """159 random bits, never 0: positive and at most 20 bytes long (RFC 5280 section 4.1.2.2)."""
    return int.from_bytes(entropy(20), "big") >> 1 or 1


def issue_root(key: PeerKey, network: NetworkId, name: str, sequence: int, *, wall: float, serial: int) -> bytes:
    """The self-signed certificate of a root; `sequence` counts the roots of the network from 0."""
    subject = _subject(f"{name} root {sequence}", network)
    builder = _builder(subject, subject, key.public_key, issuer_key_id=key.peer_id, wall=wall, end=None, serial=serial)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
    builder = builder.add_extension(_usage(ca=True), critical=True)
    # RFC 3779 section 2.3: what a certificate holds, each above it has to hold, the anchor too.
    everything = ip_blocks.encode([Selector.of_network("0.0.0.0/0"), Selector.of_network("::/0")])
    builder = builder.add_extension(x509.UnrecognizedExtension(ip_blocks.OID, everything), critical=False)
    return sign_certificate(key.private, builder)


def issue_issuer(
    root: Authority,
    public_key: PublicKey,
    network: NetworkId,
    *,
    name: str,
    group: str,
    blocks: Iterable[Selector],
    wall: float,
    serial: int,
    lifetime: float = GRANT_LIFETIME_S,
) -> bytes:
    """The constrained intermediate of a hub named `name`: `blocks` bound the addresses that it can hand out."""
    issuer = x509.load_der_x509_certificate(root.certificate.der).subject
    subject = _subject(f"{name} issuer", network)
    builder = _builder(
        subject, issuer, public_key, issuer_key_id=root.key.peer_id, wall=wall, end=wall + lifetime, serial=serial
    )
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(ca=True), critical=True)
    builder = _add_ours(builder, [Role.ISSUER], [group], blocks)
    return sign_certificate(root.key.private, builder)


def issue_leaf(
    authority: Authority,
    public_key: PublicKey,
    network: NetworkId,
    *,
    name: str,
    wall: float,
    serial: int,
    lifetime: float,
    roles: Iterable[Role] = (),
    groups: Iterable[str] = (),
    blocks: Iterable[Selector] = (),
    dialled_as: Sequence[str] = (),
) -> bytes:
    """A member's certificate. The overlay address follows from the key; `blocks` are what it holds beside it.

    `dialled_as` are host names or numeric addresses of a hub. The certificate never outlives the authority's.
    """
    overlay = overlay_address(network, peer_id_of(public_key))
    issuer = x509.load_der_x509_certificate(authority.certificate.der).subject
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    end = min(wall + lifetime, authority.certificate.not_after)
    builder = _builder(
        subject, issuer, public_key, issuer_key_id=authority.key.peer_id, wall=wall, end=end, serial=serial
    )
    names: list[x509.GeneralName] = [x509.DNSName(name), x509.IPAddress(overlay)]
    for host in dialled_as:
        try:
            names.append(x509.IPAddress(normal_ip(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(ca=False), critical=True)
    builder = builder.add_extension(
        # Clients built into systems want serverAuth of a gateway they dial, and default verifiers clientAuth.
        x509.ExtendedKeyUsage([IPSEC_IKE, ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
        critical=False,
    )
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = _add_ours(builder, roles, groups, [Selector.of_address(overlay), *blocks])
    return sign_certificate(authority.key.private, builder)


def _subject(text: str, network: NetworkId) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, f"p2pvpn {network.hex()[:16]}"),
            # A common name has at most 64 characters (RFC 5280 appendix A.1); nothing looks anybody up by it.
            x509.NameAttribute(NameOID.COMMON_NAME, text[-64:]),
        ]
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: PublicKey,
    *,
    issuer_key_id: bytes,
    wall: float,
    end: float | None,
    serial: int,
) -> x509.CertificateBuilder:
    begin = datetime.datetime.fromtimestamp(int(wall) - BACKDATE_S, datetime.UTC)
    finish = _NO_END if end is None else datetime.datetime.fromtimestamp(int(end), datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public_key)
    builder = builder.serial_number(serial).not_valid_before(begin).not_valid_after(finish)
    builder = builder.add_extension(x509.SubjectKeyIdentifier(bytes(peer_id_of(public_key))), critical=False)
    return builder.add_extension(x509.AuthorityKeyIdentifier(bytes(issuer_key_id), None, None), critical=False)


def _add_ours(
    builder: x509.CertificateBuilder, roles: Iterable[Role], groups: Iterable[str], blocks: Iterable[Selector]
) -> x509.CertificateBuilder:
    membership = _Membership(roles=sorted(role.value for role in roles), groups=sorted(groups))
    der = asn1.encode_der(membership)
    builder = builder.add_extension(x509.UnrecognizedExtension(MEMBERSHIP_OID, der), critical=False)
    return builder.add_extension(x509.UnrecognizedExtension(ip_blocks.OID, ip_blocks.encode(blocks)), critical=False)


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )
