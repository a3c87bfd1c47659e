"""A profile: all that one machine has for one network, as a handful of files.

    key.pem       the peer's key, secret        genesis     the network's genesis bundle
    chain         its certificate, and issuers  document    the newest network document seen
    issuer-certificate, issuer-state            on machines that issue; the state holds what proves tokens, secret

A profile comes out of a grant, or out of the answer to a join, and takes in renewals and newer documents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from p2pvpn.core.errors import Fault, LocalError, P2pvpnError, TrustError
from p2pvpn.core.ids import PeerId
from p2pvpn.core.ports import Entropy
from p2pvpn.crypto.signatures import spki

from .canonical import Fields, pack
from .certificates import MAX_CERTIFICATE_BYTES
from .document import NetworkDocument
from .enrolment import Issuer, JoinResult, renew_request
from .genesis import Genesis
from .grants import Grant
from .keys import PeerKey
from .member import Member
from .trust import MAX_CHAIN, Trust

KEY = "key.pem"
GENESIS = "genesis"
DOCUMENT = "document"
CHAIN = "chain"
ISSUER_CERTIFICATE = "issuer-certificate"
ISSUER_STATE = "issuer-state"


class Write(Protocol):
    """Replaces one named file; `mesh.ports.StateStore.write` is one."""

    def __call__(self, name: str, data: bytes, *, secret: bool = False) -> None: ...


class Profile:
    """One machine in one network. `member` describes it; `trust` verifies the others."""

    def __init__(
        self,
        key: PeerKey,
        genesis: Genesis,
        document: NetworkDocument,
        chain: tuple[bytes, ...],
        *,
        issuer_certificate: bytes | None = None,
        issuer_state: bytes | None = None,
    ) -> None:
        """Raises TrustError when the parts do not belong together."""
        self.key = key
        self.genesis = genesis
        self.trust = Trust(genesis, document)
        self.chain = chain
        self.issuer_certificate = issuer_certificate
        self.issuer_state = issuer_state
        self._member = self._own(chain)

    @classmethod
    def from_grant(cls, key: PeerKey, grant: Grant) -> Profile:
        """Raises TrustError when the grant is for another key or does not hold."""
        return cls(key, grant.genesis, grant.document, grant.chain, issuer_certificate=grant.issuer_certificate)

    @classmethod
    def from_join(cls, key: PeerKey, result: JoinResult) -> Profile:
        """Raises TrustError when the answer is for another key or does not hold."""
        return cls(key, result.genesis, result.document, result.chain)

    @classmethod
    def load(cls, read: Callable[[str], bytes | None]) -> Profile:
        """Raises LocalError when a file is missing or damaged."""
        parts = {name: read(name) for name in (KEY, GENESIS, DOCUMENT, CHAIN)}
        missing = [name for name, data in parts.items() if data is None]
        if missing:
            raise LocalError(f"the network's state lacks {', '.join(missing)}", fault=Fault.STATE)
        try:
            chain = Fields.unpack_untrusted(parts[CHAIN] or b"", "the chain", MAX_CHAIN * MAX_CERTIFICATE_BYTES + 64)
            return cls(
                PeerKey.from_pem(parts[KEY] or b""),
                Genesis.parse_untrusted(parts[GENESIS] or b""),
                NetworkDocument.parse_untrusted(parts[DOCUMENT] or b""),
                tuple(chain.raw(MAX_CERTIFICATE_BYTES) for _ in range(chain.left)),
                issuer_certificate=read(ISSUER_CERTIFICATE),
                issuer_state=read(ISSUER_STATE),
            )
        except P2pvpnError as problem:
            raise LocalError(f"the network's state cannot be used: {problem}", fault=Fault.STATE) from None

    def save(self, write: Write) -> None:
        """Write every file; what `write` raises goes through."""
        write(KEY, self.key.to_pem().reveal(), secret=True)
        write(GENESIS, self.genesis.encode())
        write(DOCUMENT, self.trust.document.encode())
        write(CHAIN, pack(self.chain))
        if self.issuer_certificate is not None:
            write(ISSUER_CERTIFICATE, self.issuer_certificate)
        if self.issuer_state is not None:
            write(ISSUER_STATE, self.issuer_state, secret=True)

    @property
    def document(self) -> NetworkDocument:
        return self.trust.document

    @property
    def member(self) -> Member:
        """What this machine's certificate says, whether or not it is valid now."""
        return self._member

    @property
    def name(self) -> str:
        """The network's name."""
        return self.genesis.name

    @property
    def renew_at(self) -> float:
        """Half the certificate's life, in seconds since the epoch."""
        return (self._member.not_before + self._member.not_after) / 2

    @property
    def is_granted(self) -> bool:
        """Whether a root signed the certificate: then the admin renews it, and not an issuer."""
        return any(root.key_id == self._member.issuer for root in self.trust.roots.accepted)

    def adopt_document(self, document: NetworkDocument) -> bool:
        """Take a newer document; whether it was newer. Raises TrustError."""
        return self.trust.replace_document(document)

    def renew_request(self, issuer: PeerId) -> bytes:
        """The request for a fresh certificate to the issuer on that hub."""
        return renew_request(self.key, self.chain, self.genesis.network_id, issuer)

    def accept_untrusted(self, answer: bytes, wall: float) -> Member:
        """Take in an issuer's answer to a renewal, and the document in it. Raises Refused, WireError or TrustError."""
        result = JoinResult.parse_untrusted(answer)
        member = result.verify(self.genesis.network_id, self.key, wall)
        if member.name != self._member.name:
            raise TrustError(f"the issuer changed the name {self._member.name} to {member.name}")
        self.trust.replace_document(result.document)
        self._member = self._own(result.chain)
        self.chain = result.chain
        return self._member

    def accept_grant(self, grant: Grant) -> Member:
        """Take in a newer grant of the same network. Raises TrustError."""
        if grant.genesis.network_id != self.genesis.network_id:
            raise TrustError("a grant of another network")
        self.trust.replace_document(grant.document)
        self._member = self._own(grant.chain)
        self.chain = grant.chain
        self.issuer_certificate = grant.issuer_certificate or self.issuer_certificate
        return self._member

    def make_issuer(self, *, entropy: Entropy, write: Write | None = None) -> Issuer | None:
        """The issuer on this machine, if it is one; with `write`, its state is stored before each answer."""
        if self.issuer_certificate is None:
            return None

        def persist(state: bytes) -> None:
            self.issuer_state = state
            if write is not None:
                write(ISSUER_STATE, state, secret=True)

        return Issuer(
            self.trust,
            self.key.peer_id,
            self.key.issuing_key(),
            self.issuer_certificate,
            entropy=entropy,
            state=self.issuer_state,
            persist=persist,
        )

    def _own(self, chain: tuple[bytes, ...]) -> Member:
        member = self.trust.describe(chain)
        if spki(member.public_key) != self.key.spki:
            raise TrustError("the certificate is for another key", hint="the key was made anew since it was requested")
        return member
