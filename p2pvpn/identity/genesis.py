"""Where a network begins: the statement that names its root keys, and how a root is replaced.

The **genesis statement** names the network, the root key and an offline recovery key. Its SHA-256 is the network ID,
and everything that follows from the network ID (overlay addresses, the IPv4 pool) stays when a root is replaced.

    statement  [kind, name, root SPKI, recovery SPKI, created]      bundle  [statement, signature, root certificate]

A **succession** names the next root. The root of the day may sign one (planned replacement: what earlier roots
certified stays valid until it expires), and so may the recovery key (the root was lost or stolen: nothing that an
earlier root signed counts any more).

    statement  [kind, network ID, sequence, next root SPKI, created]   bundle  [statement, by, signature, certificate]

`by` is 0 for root and 1 for recovery. A history with more recoveries is newer than one with fewer, whatever a thief
of the root adds to his. Signatures are ECDSA with SHA-256.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from p2pvpn.core.address import IpNetwork
from p2pvpn.core.errors import TrustError, WireError
from p2pvpn.core.ids import NetworkId
from p2pvpn.core.ports import Entropy
from p2pvpn.core.selector import Selector
from p2pvpn.crypto.signatures import PublicKey, Scheme, is_p256, public_key_untrusted, spki, verify

from .canonical import Fields, pack
from .certificates import MAX_CERTIFICATE_BYTES, Certificate, issue_root, new_serial, parse_untrusted
from .keys import PeerKey, peer_id_of
from .names import MAX_NAME_CHARS, is_name, require_name

_KIND = "p2pvpn-genesis-1"
_SUCCESSION_KIND = "p2pvpn-root-1"
MAX_SPKI_BYTES = 256
MAX_SIGNATURE_BYTES = 80
"""A DER Ecdsa-Sig-Value of P-256 has at most 72 bytes."""
MAX_GENESIS_BYTES = 16384
MAX_SUCCESSIONS = 16
"""Roots that a network can go through; a document carries the history."""
RANGE_PREFIX = 22
"""An issuer's share of the IPv4 pool: 1022 addresses."""
RANGES = 1 << (RANGE_PREFIX - 16)


@dataclass(frozen=True, slots=True)
class Root:
    """A key that signs for a network, with its self-signed certificate."""

    public_key: PublicKey
    certificate: Certificate

    @property
    def key_id(self) -> bytes:
        return bytes(peer_id_of(self.public_key))


@dataclass(frozen=True, slots=True)
class Genesis:
    """A verified genesis; `created` is in seconds since the epoch."""

    name: str
    root_key_spki: bytes
    recovery_key_spki: bytes
    created: int
    signature: bytes
    root_certificate: bytes

    @classmethod
    def create(cls, name: str, root: PeerKey, recovery: PublicKey, *, wall: float, entropy: Entropy) -> Genesis:
        """A new network. Raises LocalError for a bad name."""
        require_name(name, "network name")
        statement = _statement(name, root.spki, spki(recovery), int(wall))
        network = NetworkId(hashlib.sha256(statement).digest())
        certificate = issue_root(root, network, name, 0, wall=wall, serial=new_serial(entropy))
        return cls(name, root.spki, spki(recovery), int(wall), root.sign(statement), certificate)

    @classmethod
    def parse_untrusted(cls, data: bytes) -> Genesis:
        """From `encode`. Raises WireError, or TrustError when a signature does not hold."""
        bundle = Fields.unpack_untrusted(data, "a genesis", MAX_GENESIS_BYTES)
        statement = bundle.raw(MAX_GENESIS_BYTES)
        signature = bundle.raw(MAX_SIGNATURE_BYTES)
        certificate = bundle.raw(MAX_CERTIFICATE_BYTES)
        bundle.end()
        fields = Fields.unpack_untrusted(statement, "a genesis statement", MAX_GENESIS_BYTES)
        fields.kind(_KIND)
        name = fields.text(MAX_NAME_CHARS)
        genesis = cls(
            name, fields.raw(MAX_SPKI_BYTES), fields.raw(MAX_SPKI_BYTES), fields.uint(), signature, certificate
        )
        fields.end()
        if not is_name(name):
            raise WireError("a genesis with a bad name")
        _key(genesis.recovery_key_spki)
        verify(_key(genesis.root_key_spki), Scheme.ECDSA_SHA256, signature, statement)
        _root(genesis.root_key_spki, certificate)
        return genesis

    def encode(self) -> bytes:
        return pack((self.statement, self.signature, self.root_certificate))

    @property
    def statement(self) -> bytes:
        return _statement(self.name, self.root_key_spki, self.recovery_key_spki, self.created)

    @property
    def network_id(self) -> NetworkId:
        return NetworkId(hashlib.sha256(self.statement).digest())

    @property
    def root(self) -> Root:
        """The first root."""
        return _root(self.root_key_spki, self.root_certificate)

    @property
    def recovery_key(self) -> PublicKey:
        return _key(self.recovery_key_spki)

    @property
    def ipv6_prefix(self) -> ipaddress.IPv6Network:
        """All overlay addresses (RFC 4193 section 3.1)."""
        return overlay_prefix(self.network_id)

    @property
    def ipv4_pool(self) -> ipaddress.IPv4Network:
        """All IPv4 addresses of members."""
        return ipv4_pool(self.network_id)


def overlay_prefix(network: NetworkId) -> ipaddress.IPv6Network:
    """The /48 that holds every overlay address of a network."""
    return ipaddress.IPv6Network((b"\xfd" + network[:5] + bytes(10), 48))


def ipv4_pool(network: NetworkId) -> ipaddress.IPv4Network:
    """10.N.0.0/16 with N in 1..254 from the network ID."""
    return ipaddress.IPv4Network(f"10.{1 + int.from_bytes(network[5:9], 'big') % 254}.0.0/16")


def ipv4_range(network: NetworkId, index: int) -> ipaddress.IPv4Network:
    """The share of issuer `index` (1..63); share 0 is the root's own, for hubs and gateways. Raises ValueError."""
    if not 0 <= index < RANGES:
        raise ValueError(f"the IPv4 pool has {RANGES} ranges")
    pool = ipv4_pool(network)
    return ipaddress.IPv4Network((int(pool.network_address) + (index << (32 - RANGE_PREFIX)), RANGE_PREFIX))


def issuer_blocks(network: NetworkId, index: int) -> tuple[Selector, ...]:
    """What the certificate of issuer `index` holds."""
    networks: list[IpNetwork] = [ipv4_range(network, index), overlay_prefix(network)]
    return tuple(Selector.of_network(item) for item in networks)


@dataclass(frozen=True, slots=True)
class Succession:
    """A statement that names the next root, parsed; `verify_successions` says whether it counts."""

    network: NetworkId
    sequence: int
    root_key_spki: bytes
    created: int
    by_recovery: bool
    signature: bytes
    root_certificate: bytes

    @classmethod
    def create(
        cls,
        genesis: Genesis,
        sequence: int,
        next_root: PeerKey,
        signer: PeerKey,
        *,
        wall: float,
        entropy: Entropy,
    ) -> Succession:
        """Signed by the recovery key if `signer` is that, or else by `signer` as the root of the day."""
        network = genesis.network_id
        statement = _succession_statement(network, sequence, next_root.spki, int(wall))
        return cls(
            network,
            sequence,
            next_root.spki,
            int(wall),
            signer.spki == genesis.recovery_key_spki,
            signer.sign(statement),
            issue_root(next_root, network, genesis.name, sequence, wall=wall, serial=new_serial(entropy)),
        )

    @classmethod
    def parse_untrusted(cls, data: bytes) -> Succession:
        """From `encode`. Raises WireError."""
        bundle = Fields.unpack_untrusted(data, "a succession", MAX_GENESIS_BYTES)
        statement = bundle.raw(MAX_GENESIS_BYTES)
        by = bundle.uint(1)
        signature = bundle.raw(MAX_SIGNATURE_BYTES)
        certificate = bundle.raw(MAX_CERTIFICATE_BYTES)
        bundle.end()
        fields = Fields.unpack_untrusted(statement, "a succession statement", MAX_GENESIS_BYTES)
        fields.kind(_SUCCESSION_KIND)
        out = cls(
            NetworkId(fields.exactly(32)),
            fields.uint(),
            fields.raw(MAX_SPKI_BYTES),
            fields.uint(),
            by == 1,
            signature,
            certificate,
        )
        fields.end()
        return out

    def encode(self) -> bytes:
        return pack((self.statement, int(self.by_recovery), self.signature, self.root_certificate))

    @property
    def statement(self) -> bytes:
        return _succession_statement(self.network, self.sequence, self.root_key_spki, self.created)


@dataclass(frozen=True, slots=True)
class Roots:
    """The outcome of a history: `current` signs documents, `accepted` are those whose certificates count."""

    current: Root
    accepted: tuple[Root, ...]
    recoveries: int
    sequence: int


def verify_successions(genesis: Genesis, successions: Sequence[Succession]) -> Roots:
    """Who is root after this history. Raises TrustError."""
    if len(successions) > MAX_SUCCESSIONS:
        raise TrustError(f"a network has at most {MAX_SUCCESSIONS} changes of root")
    roots = Roots(genesis.root, (genesis.root,), 0, 0)
    for item in successions:
        if item.network != genesis.network_id:
            raise TrustError("a change of root of another network")
        if item.sequence <= roots.sequence:
            raise TrustError("a change of root out of order")
        signer = genesis.recovery_key if item.by_recovery else roots.current.public_key
        verify(signer, Scheme.ECDSA_SHA256, item.signature, item.statement)
        root = _root(item.root_key_spki, item.root_certificate)
        accepted = (root,) if item.by_recovery else (*roots.accepted, root)
        roots = Roots(root, accepted, roots.recoveries + item.by_recovery, item.sequence)
    return roots


def _statement(name: str, root: bytes, recovery: bytes, created: int) -> bytes:
    return pack((_KIND, name, root, recovery, created))


def _succession_statement(network: NetworkId, sequence: int, root: bytes, created: int) -> bytes:
    return pack((_SUCCESSION_KIND, bytes(network), sequence, root, created))


def _key(der: bytes) -> PublicKey:
    key = public_key_untrusted(der)
    if not is_p256(key) or spki(key) != der:
        raise TrustError("a root or recovery key is ECDSA on P-256")
    return key


def _root(key_spki: bytes, certificate: bytes) -> Root:
    """The root, once its certificate is found to be a CA's, for this key and signed by it. Raises TrustError."""
    key = _key(key_spki)
    try:
        parsed = parse_untrusted(certificate)
    except WireError as problem:
        raise TrustError(f"the root's certificate: {problem}") from None
    if spki(parsed.public_key) != key_spki or not parsed.is_ca or not parsed.signs_certificates:
        raise TrustError("the root's certificate is not that of the root")
    parsed.verify_signature(key)
    return Root(key, parsed)
