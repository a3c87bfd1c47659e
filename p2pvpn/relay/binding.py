"""The STUN messages of a relay binding (RFC 8489), under the short-term credential of a ticket (section 9.1).

    request     USERNAME, SOFTWARE, NONCE once there is one, MESSAGE-INTEGRITY, FINGERPRINT
    challenge   ERROR-CODE 401, NONCE, MESSAGE-INTEGRITY, FINGERPRINT
    success     XOR-MAPPED-ADDRESS, MESSAGE-INTEGRITY, FINGERPRINT

The short-term credential knows no NONCE; section 9.2's serves here as the proof that the sender receives at the address
it sends from. Answers go only to requests whose integrity holds, are signed themselves, and are never longer than the
request: SOFTWARE is there to make room.
"""

from __future__ import annotations

from dataclasses import dataclass

from p2pvpn.core import stun
from p2pvpn.core.address import Endpoint
from p2pvpn.core.errors import WireError

from .wire import RelayTicket, counter_of, is_bind

SOFTWARE = "p2pvpn relay"
NONCE_BYTES = 24
UNAUTHENTICATED = 401


@dataclass(frozen=True, slots=True)
class BindRequest:
    """A request that parses. Nothing in it is proven before `stun.verify(message, key)`."""

    message: stun.Message
    username: str
    nonce: bytes
    size: int

    @property
    def transaction_id(self) -> bytes:
        return self.message.transaction_id

    @property
    def counter(self) -> int:
        return counter_of(self.message.transaction_id)


def build_request(ticket: RelayTicket, transaction: bytes, nonce: bytes) -> bytes:
    """Wire bytes of a bind; an empty `nonce` is left out."""
    attributes: dict[str, object] = {"username": ticket.username, "software": SOFTWARE}
    if nonce:
        attributes["nonce"] = nonce
    return stun.build(stun.request(transaction, **attributes), ticket.key.reveal())


def parse_request_untrusted(data: bytes) -> BindRequest:
    """Raises WireError for everything that is not a bind."""
    if not is_bind(data):
        raise WireError("not a relay Binding request")
    message = stun.parse_untrusted(data)
    username = message.attributes.get("USERNAME", "")
    nonce = message.attributes.get("NONCE", b"")
    if not username or len(nonce) not in (0, NONCE_BYTES):
        raise WireError("a relay Binding request without a username, or with a nonce that is not ours")
    return BindRequest(message, username, nonce, len(data))


def build_challenge(request: BindRequest, key: bytes, nonce: bytes) -> bytes:
    return stun.build(stun.error(request.transaction_id, UNAUTHENTICATED, "", nonce=nonce), key)


def build_success(request: BindRequest, key: bytes, mapped: Endpoint) -> bytes:
    return stun.build(stun.success(request.transaction_id, mapped), key)
