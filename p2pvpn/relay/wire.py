"""The ticket of one side of an allocation, and the mark by which a forwarder knows a relay Binding request.

Ticket, as the allocation's RPC carries it:

    0       1   version, 1
    1       2   port of this side on the relay
    3       4   seconds within which the side must bind again
    7       1   length of the username, 1 to 64
    8       n   username, ASCII
    8 + n   32  key

Transaction ID of a relay Binding request (RFC 8489 section 5 leaves its 96 bits to the client):

    0       4   MARK, so that a forwarder finds such requests among a bound source's packets by a comparison at a fixed
                offset, and a peer's own STUN checks pass through untouched
    4       4   counter, higher in each new request under one ticket: a captured request never binds again
    8       4   random

MESSAGE-INTEGRITY covers the transaction ID, and so the counter.
"""

from __future__ import annotations

from dataclasses import dataclass

from p2pvpn.core.datagram import STUN_COOKIE, STUN_HEADER_BYTES
from p2pvpn.core.errors import WireError
from p2pvpn.core.secret import Secret
from p2pvpn.core.wire import Reader

TICKET_VERSION = 1
MAX_USERNAME_BYTES = 64
KEY_BYTES = 32
"""As long as a SHA-256 output: no attack on HMAC is cheaper than guessing."""
MAX_LIFETIME_S = 86_400
"""A day: longer promises than this are a mistake."""
MAX_TICKET_BYTES = 8 + MAX_USERNAME_BYTES + KEY_BYTES

MARK = b"rly1"
MAX_BIND_BYTES = 256
"""The largest Binding request that counts as one for a relay; ours have about 120 bytes."""

_BINDING_REQUEST = b"\x00\x01"


@dataclass(frozen=True, slots=True)
class RelayTicket:
    """What lets its holder bind at `port` of the relay. `lifetime_s`: bind again within so many seconds."""

    port: int
    username: str
    key: Secret
    lifetime_s: int

    def encode(self) -> bytes:
        name = self.username.encode("ascii")
        head = bytes([TICKET_VERSION]) + self.port.to_bytes(2, "big") + self.lifetime_s.to_bytes(4, "big")
        return head + bytes([len(name)]) + name + self.key.reveal()

    @classmethod
    def decode_untrusted(cls, data: bytes) -> RelayTicket:
        """The inverse of `encode`. Raises WireError."""
        reader = Reader(data)
        if (version := reader.u8()) != TICKET_VERSION:
            raise WireError(f"relay ticket of version {version}")
        port, lifetime_s, length = reader.u16(), reader.u32(), reader.u8()
        if port == 0 or not 1 <= lifetime_s <= MAX_LIFETIME_S or not 1 <= length <= MAX_USERNAME_BYTES:
            raise WireError("relay ticket with an impossible port, lifetime or username")
        name, key = reader.take(length), reader.take(KEY_BYTES)
        reader.end()
        if not all(0x21 <= byte <= 0x7E for byte in name):
            raise WireError("relay ticket whose username is not printable ASCII")
        return cls(port, name.decode("ascii"), Secret(key), lifetime_s)


def is_bind(data: bytes | memoryview) -> bool:
    """Whether the datagram is a relay Binding request by its marks; whether it holds is for the server to say."""
    return (
        STUN_HEADER_BYTES <= len(data) <= MAX_BIND_BYTES
        and data[:2] == _BINDING_REQUEST
        and data[4:8] == STUN_COOKIE
        and data[8:12] == MARK
    )


def transaction_id(counter: int, random: bytes) -> bytes:
    """The transaction ID of the bind with this counter; `random` has 4 bytes."""
    return MARK + counter.to_bytes(4, "big") + random


def counter_of(transaction: bytes) -> int:
    """The counter in a transaction ID that `is_bind` has looked at."""
    return int.from_bytes(transaction[4:8], "big")
