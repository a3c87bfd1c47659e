"""Numbers of IKEv2 as IANA assigns them (registry "Internet Key Exchange Version 2 (IKEv2) Parameters").

Fields of messages stay plain integers, so that unknown values survive; these enums name the ones that we act on.
"""

from __future__ import annotations

from enum import IntEnum


class Exchange(IntEnum):
    """Exchange types (RFC 7296 section 3.1; 43 is RFC 9242, 44 is RFC 9370)."""

    IKE_SA_INIT = 34
    IKE_AUTH = 35
    CREATE_CHILD_SA = 36
    INFORMATIONAL = 37
    IKE_INTERMEDIATE = 43
    IKE_FOLLOWUP_KE = 44


class PayloadType(IntEnum):
    """Next Payload values (RFC 7296 section 3.2; SKF is RFC 7383)."""

    NONE = 0
    SA = 33
    KE = 34
    IDI = 35
    IDR = 36
    CERT = 37
    CERTREQ = 38
    AUTH = 39
    NONCE = 40
    NOTIFY = 41
    DELETE = 42
    VENDOR = 43
    TSI = 44
    TSR = 45
    SK = 46
    CP = 47
    EAP = 48
    SKF = 53


class Protocol(IntEnum):
    """Security protocol identifiers (RFC 7296 section 3.3.1)."""

    NONE = 0
    IKE = 1
    AH = 2
    ESP = 3


class TransformType(IntEnum):
    """What a transform is for (RFC 7296 section 3.3.2; 6 to 12 are the additional key exchanges of RFC 9370)."""

    ENCR = 1
    PRF = 2
    INTEG = 3
    KE = 4
    ESN = 5


class IdKind(IntEnum):
    """Identification types (RFC 7296 section 3.5)."""

    IPV4_ADDR = 1
    FQDN = 2
    RFC822_ADDR = 3
    IPV6_ADDR = 5
    DER_ASN1_DN = 9
    DER_ASN1_GN = 10
    KEY_ID = 11


class AuthMethod(IntEnum):
    """Authentication methods (RFC 7296 section 3.8, RFC 4754 section 4, RFC 7427 section 3)."""

    RSA = 1
    SHARED_KEY = 2
    ECDSA_256 = 9
    ECDSA_384 = 10
    ECDSA_521 = 11
    DIGITAL_SIGNATURE = 14


class HashId(IntEnum):
    """Hashes of SIGNATURE_HASH_ALGORITHMS (RFC 7427 section 4; IDENTITY is RFC 8420). SHA-1 is not for us."""

    SHA2_256 = 2
    SHA2_384 = 3
    SHA2_512 = 4
    IDENTITY = 5


class TsType(IntEnum):
    """Traffic selector types (RFC 7296 section 3.13.1)."""

    IPV4_RANGE = 7
    IPV6_RANGE = 8


CERT_X509_SIGNATURE = 4
"""Certificate encoding "X.509 Certificate - Signature" (RFC 7296 section 3.6)."""
NO_TRANSFORM = 0
"""The NONE transform of the types that have one (INTEG, KE)."""
KEY_LENGTH_ATTRIBUTE = 14
"""The one transform attribute there is (RFC 7296 section 3.3.5)."""
