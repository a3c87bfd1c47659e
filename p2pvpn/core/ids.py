"""Who is who: peers and networks as fixed-size hashes, and the overlay address that follows from both."""

from __future__ import annotations

import hashlib
from ipaddress import IPv6Address

PEER_ID_BYTES = 20
"""RFC 7093 section 2 method 1: the leftmost 160 bits of SHA-256; also the size of a Kademlia key."""
NETWORK_ID_BYTES = 32
"""SHA-256 of the genesis statement."""


class PeerId(bytes):
    """20 bytes naming a peer's public key."""

    def __new__(cls, value: bytes) -> PeerId:
        if len(value) != PEER_ID_BYTES:
            raise ValueError(f"a peer ID has {PEER_ID_BYTES} bytes, not {len(value)}")
        return super().__new__(cls, value)

    @classmethod
    def of_key(cls, subject_public_key: bytes) -> PeerId:
        """From the content of the subjectPublicKey BIT STRING (RFC 7093 section 2 method 1)."""
        return cls(hashlib.sha256(subject_public_key).digest()[:PEER_ID_BYTES])

    def __str__(self) -> str:
        return self.hex()

    def __repr__(self) -> str:
        return f"PeerId({self.hex()[:12]})"


class NetworkId(bytes):
    """32 bytes naming a network: the hash of its genesis statement."""

    def __new__(cls, value: bytes) -> NetworkId:
        if len(value) != NETWORK_ID_BYTES:
            raise ValueError(f"a network ID has {NETWORK_ID_BYTES} bytes, not {len(value)}")
        return super().__new__(cls, value)

    def __str__(self) -> str:
        return self.hex()

    def __repr__(self) -> str:
        return f"NetworkId({self.hex()[:12]})"


def overlay_address(network: NetworkId, peer: PeerId) -> IPv6Address:
    """The peer's overlay address: fd, 40 bits of the network ID, 80 bits of the peer ID (RFC 4193 section 3.1)."""
    return IPv6Address(b"\xfd" + network[:5] + peer[:10])
