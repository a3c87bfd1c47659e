"""Invitations: the token that a new member is given, and the book in which an issuer keeps what it promised.

    token  p2pvpn:  [kind, network ID, hub addresses, issuer's peer ID, secret, expiry, name]

The secret has 16 bytes and is used once. The issuer keeps only its **verifier**, SHA-256 of the secret under a label;
the new member proves that it knows the secret by an HMAC keyed with the same verifier, over a connection that is
pinned to the issuer. A used token keeps answering the key that used it with the same certificate until it expires, so
that an answer lost on the way burns nothing; for any other key it is spent.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, replace

from p2pvpn.core.errors import LocalError, WireError
from p2pvpn.core.ids import NETWORK_ID_BYTES, PEER_ID_BYTES, NetworkId, PeerId
from p2pvpn.core.ports import Entropy
from p2pvpn.core.secret import Secret

from .armour import Kind, armour, dearmour_untrusted
from .canonical import Fields, Value, pack
from .certificates import DAY_S, MAX_CERTIFICATE_BYTES
from .document import MAX_ADDRESS_CHARS
from .names import MAX_NAME_CHARS, is_name

_KIND = "p2pvpn-token-1"
SECRET_BYTES = 16
VERIFIER_BYTES = 32
LOOKUP_BYTES = 16
TOKEN_LIFETIME_S = DAY_S
"""Long enough to walk over to the other machine, short enough to be forgotten in a chat."""
MAX_TOKEN_BYTES = 2048
MAX_TOKEN_ADDRESSES = 4
"""More make the QR code too fine to be scanned from a screen."""
MAX_INVITATIONS = 1024
"""Open at the same time at one issuer."""


@dataclass(frozen=True, slots=True)
class Token:
    """What `invite` prints. `expires` is in seconds since the epoch; `addresses` are `host:port` of enrolment."""

    network: NetworkId
    addresses: tuple[str, ...]
    issuer: PeerId
    secret: Secret
    expires: int
    name: str

    def encode(self) -> str:
        """One line of text."""
        fields = (
            _KIND,
            bytes(self.network),
            self.addresses,
            bytes(self.issuer),
            self.secret.reveal(),
            self.expires,
            self.name,
        )
        return armour(Kind.TOKEN, pack(fields))

    @classmethod
    def decode_untrusted(cls, text: str) -> Token:
        """Raises WireError."""
        fields = Fields.unpack_untrusted(dearmour_untrusted(Kind.TOKEN, text), "a token", MAX_TOKEN_BYTES)
        fields.kind(_KIND)
        token = cls(
            NetworkId(fields.exactly(NETWORK_ID_BYTES)),
            fields.texts(MAX_TOKEN_ADDRESSES, MAX_ADDRESS_CHARS + 8),
            PeerId(fields.exactly(PEER_ID_BYTES)),
            Secret(fields.exactly(SECRET_BYTES)),
            fields.uint(),
            fields.text(MAX_NAME_CHARS),
        )
        fields.end()
        if not token.addresses or not is_name(token.name):
            raise WireError("a token without addresses or name")
        return token

    @property
    def verifier(self) -> Secret:
        return verifier_of(self.secret)


def verifier_of(secret: Secret) -> Secret:
    """What the issuer keeps in place of the secret."""
    return Secret(hashlib.sha256(b"p2pvpn invitation 1" + secret.reveal()).digest())


def lookup_of(verifier: Secret) -> bytes:
    """Names an invitation in a request without giving anything away."""
    return hashlib.sha256(b"p2pvpn lookup 1" + verifier.reveal()).digest()[:LOOKUP_BYTES]


@dataclass(frozen=True, slots=True)
class Invitation:
    """An entry of the book. `used_by` and `certificate` are empty until the token is used."""

    verifier: Secret
    name: str
    expires: int
    replaces: bool = False
    used_by: bytes = b""
    certificate: bytes = b""


class InvitationBook:
    """What one issuer has promised, at most 1024 entries; expired ones leave first, and open ones never."""

    def __init__(self) -> None:
        self._entries: dict[bytes, Invitation] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def invite(self, name: str, *, expires: float, wall: float, entropy: Entropy, replaces: bool = False) -> Secret:
        """Note a new invitation and answer its secret. Raises LocalError when too many are open."""
        self.prune(wall)
        if len(self._entries) >= MAX_INVITATIONS:
            raise LocalError(f"{MAX_INVITATIONS} invitations are open", hint="wait until some of them expire")
        secret = Secret(entropy(SECRET_BYTES))
        verifier = verifier_of(secret)
        self._entries[lookup_of(verifier)] = Invitation(verifier, name, int(expires), replaces)
        return secret

    def find(self, lookup: bytes) -> Invitation | None:
        return self._entries.get(lookup)

    def open_for(self, name: str, wall: float) -> bool:
        """Whether an unused invitation of that name is open."""
        return any(e.name == name and not e.used_by and e.expires >= wall for e in self._entries.values())

    def use(self, lookup: bytes, peer_id: PeerId, certificate: bytes) -> None:
        """Spend an invitation for this key."""
        entry = self._entries[lookup]
        self._entries[lookup] = replace(entry, used_by=bytes(peer_id), certificate=certificate)

    def withdraw(self, name: str) -> bool:
        """Forget the unused invitations of that name; whether there were any."""
        gone = [lookup for lookup, e in self._entries.items() if e.name == name and not e.used_by]
        for lookup in gone:
            del self._entries[lookup]
        return bool(gone)

    def prune(self, wall: float) -> None:
        """Forget what has expired."""
        self._entries = {lookup: e for lookup, e in self._entries.items() if e.expires >= wall}

    def to_value(self) -> Value:
        """For the issuer's state."""
        return tuple(
            (e.verifier.reveal(), e.name, e.expires, e.replaces, e.used_by, e.certificate)
            for e in self._entries.values()
        )

    @classmethod
    def from_fields_untrusted(cls, fields: Fields) -> InvitationBook:
        """The inverse of `to_value`. Raises WireError."""
        book = cls()
        while fields.left:
            entry = fields.array(6)
            invitation = Invitation(
                Secret(entry.exactly(VERIFIER_BYTES)),
                entry.text(MAX_NAME_CHARS),
                entry.uint(),
                entry.flag(),
                entry.raw(PEER_ID_BYTES),
                entry.raw(MAX_CERTIFICATE_BYTES),
            )
            entry.end()
            book._entries[lookup_of(invitation.verifier)] = invitation
        return book


def proof_of(verifier: Secret, data: bytes) -> bytes:
    """HMAC-SHA256 that shows knowledge of a token's secret."""
    return hmac.digest(verifier.reveal(), data, "sha256")
