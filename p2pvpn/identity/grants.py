"""Requests and grants: how an admin certifies a hub, a gateway or an issuer without either key leaving its machine.

    request  p2pvpn-request:  [kind, SPKI, issuing SPKI or nil, wanted name]  signed by both keys
    grant    p2pvpn-grant:    [kind, genesis, document, chain, issuer certificate or nil, address it answers]

The signatures prove that who asks has the keys (as RFC 2986 does). A grant carries all that the machine needs, each
part signed by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from p2pvpn.core.errors import TrustError, WireError
from p2pvpn.core.ids import PeerId
from p2pvpn.crypto.signatures import PublicKey, Scheme, is_p256, public_key_untrusted, spki, verify

from .armour import Kind, armour, dearmour_untrusted
from .canonical import Fields, pack
from .certificates import MAX_CERTIFICATE_BYTES
from .document import MAX_DOCUMENT_BYTES, NetworkDocument
from .genesis import MAX_GENESIS_BYTES, MAX_SIGNATURE_BYTES, MAX_SPKI_BYTES, Genesis
from .keys import PeerKey, peer_id_of
from .names import MAX_NAME_CHARS, is_name, require_name
from .trust import MAX_CHAIN

_REQUEST_KIND = "p2pvpn-request-1"
_GRANT_KIND = "p2pvpn-grant-1"
MAX_REQUEST_BYTES = 1024
MAX_GRANT_BYTES = MAX_DOCUMENT_BYTES + 65536


@dataclass(frozen=True, slots=True)
class Request:
    """What a machine asks of the admin, possession of its keys proven. `name` may be empty: the admin chooses."""

    public_key: PublicKey
    issuing_key: PublicKey | None
    name: str
    proof: bytes
    issuing_proof: bytes

    @classmethod
    def create(cls, key: PeerKey, name: str = "") -> Request:
        """The request of a machine with this key. Raises LocalError for a bad name."""
        if name:
            require_name(name)
        issuing = key.issuing_key()
        body = _request_body(key.public_key, issuing.public_key, name)
        return cls(key.public_key, issuing.public_key, name, key.sign(body), issuing.sign(body))

    def encode(self) -> str:
        """One line of text."""
        body = _request_body(self.public_key, self.issuing_key, self.name)
        return armour(Kind.REQUEST, pack((body, self.proof, self.issuing_proof)))

    @classmethod
    def decode_untrusted(cls, text: str) -> Request:
        """Raises WireError, or TrustError when a proof of possession does not hold."""
        bundle = Fields.unpack_untrusted(dearmour_untrusted(Kind.REQUEST, text), "a request", MAX_REQUEST_BYTES)
        body, proof, issuing_proof = (
            bundle.raw(MAX_REQUEST_BYTES),
            bundle.raw(MAX_SIGNATURE_BYTES),
            bundle.raw(MAX_SIGNATURE_BYTES),
        )
        bundle.end()
        fields = Fields.unpack_untrusted(body, "a request", MAX_REQUEST_BYTES)
        fields.kind(_REQUEST_KIND)
        key = _key(fields.raw(MAX_SPKI_BYTES))
        issuing_spki = fields.optional(MAX_SPKI_BYTES)
        issuing = None if issuing_spki is None else _key(issuing_spki)
        name = fields.text(MAX_NAME_CHARS)
        fields.end()
        if name and not is_name(name):
            raise WireError("a request with a bad name")
        verify(key, Scheme.ECDSA_SHA256, proof, body)
        if issuing is not None:
            verify(issuing, Scheme.ECDSA_SHA256, issuing_proof, body)
        return cls(key, issuing, name, proof, issuing_proof)

    @property
    def peer_id(self) -> PeerId:
        return peer_id_of(self.public_key)


@dataclass(frozen=True, slots=True)
class Grant:
    """The admin's answer. `chain` is the machine's certificate; `hub` is the address it serves at, if it is a hub."""

    genesis: Genesis
    document: NetworkDocument
    chain: tuple[bytes, ...]
    issuer_certificate: bytes | None = None
    hub: str = ""

    def encode(self) -> str:
        """One line of text."""
        return armour(
            Kind.GRANT,
            pack(
                (
                    _GRANT_KIND,
                    self.genesis.encode(),
                    self.document.encode(),
                    self.chain,
                    self.issuer_certificate,
                    self.hub,
                )
            ),
        )

    @classmethod
    def decode_untrusted(cls, text: str) -> Grant:
        """Raises WireError, or TrustError when genesis or document are not signed as they must be."""
        fields = Fields.unpack_untrusted(dearmour_untrusted(Kind.GRANT, text), "a grant", MAX_GRANT_BYTES)
        fields.kind(_GRANT_KIND)
        genesis = Genesis.parse_untrusted(fields.raw(MAX_GENESIS_BYTES))
        document = NetworkDocument.parse_untrusted(fields.raw(MAX_DOCUMENT_BYTES))
        document.verify(genesis)
        chain = fields.raws(MAX_CHAIN, MAX_CERTIFICATE_BYTES)
        grant = cls(genesis, document, chain, fields.optional(MAX_CERTIFICATE_BYTES), fields.text(1024))
        fields.end()
        if not chain:
            raise WireError("a grant without a certificate")
        return grant


def _request_body(key: PublicKey, issuing: PublicKey | None, name: str) -> bytes:
    return pack((_REQUEST_KIND, spki(key), None if issuing is None else spki(issuing), name))


def _key(der: bytes) -> PublicKey:
    try:
        key = public_key_untrusted(der)
    except TrustError as problem:
        raise WireError(f"a request with a bad key: {problem}") from None
    if not is_p256(key) or spki(key) != der:
        raise WireError("a request for a key that is not ECDSA on P-256")
    return key
