"""Shows a hub that a peer receives at an address, without the hub keeping anything of it.

    peer > hub   Binding request with NONCE = zeros
    hub > peer   success with XOR-MAPPED-ADDRESS and NONCE = boot mark (4) | keyed hash over time slot and address (12)

Whoever can hand the NONCE back has read a packet that was sent to that address, so a request with a forged source
proves nothing. The boot mark is another one after each start of the hub: an attached peer learns from it that the hub
knows its SAs no more. A request is as long as its answer, XOR-MAPPED-ADDRESS excepted.
"""

from __future__ import annotations

import hashlib
import hmac

from p2pvpn.core.address import Endpoint
from p2pvpn.core.errors import TrustError

MARK_BYTES = 4
HASH_BYTES = 12
PROOF_BYTES = MARK_BYTES + HASH_BYTES
NO_PROOF = bytes(PROOF_BYTES)
"""What a request carries to ask for one."""
SLOT_S = 600.0
"""A proof holds for one to two of these: longer than the longest silence that a binding is tried with."""


def mark_of(proof: bytes) -> bytes:
    """The hub's boot mark; it is not authenticated."""
    return proof[:MARK_BYTES]


class Proofs:
    """Makes and checks proofs under one secret of this run of the hub."""

    def __init__(self, secret: bytes) -> None:
        self._key = secret
        self._mark = hmac.digest(secret, b"boot", hashlib.sha256)[:MARK_BYTES]

    def make(self, endpoint: Endpoint, now: float) -> bytes:
        """For whoever receives at `endpoint`."""
        return self._mark + self._hash(endpoint, int(now // SLOT_S))

    def check(self, proof: bytes, endpoint: Endpoint, now: float) -> None:
        """Raises TrustError unless it was made for this endpoint not long ago."""
        slot = int(now // SLOT_S)
        if len(proof) == PROOF_BYTES:
            for number in (slot, slot - 1):
                if hmac.compare_digest(proof[MARK_BYTES:], self._hash(endpoint, number)):
                    return
        raise TrustError("no proof that the address receives")

    def _hash(self, endpoint: Endpoint, slot: int) -> bytes:
        text = slot.to_bytes(8, "big", signed=True) + endpoint.packed()
        return hmac.digest(self._key, text, hashlib.sha256)[:HASH_BYTES]
