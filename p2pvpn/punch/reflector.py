"""A hub's STUN server: tells whoever asks where its packet came from, and nothing else (RFC 8489 section 7.3.1).

Only plain Binding requests are answered: no USERNAME (checks are the agents' business), no CHANGE-REQUEST (answering
elsewhere would help reflection). The answer has XOR-MAPPED-ADDRESS and FINGERPRINT, 40 or 52 bytes. Counted with the IP
and UDP headers, as a victim of a forged source would, even the shortest request of 20 bytes is returned less than 1.5
times its size. A request that brings a NONCE gets a proof in it (module `proof`).
"""

from __future__ import annotations

from p2pvpn.core import stun
from p2pvpn.core.address import Path
from p2pvpn.core.datagram import Kind, classify
from p2pvpn.core.errors import WireError
from p2pvpn.core.limits import SourceLimiter

from .proof import PROOF_BYTES, Proofs

MAX_REQUEST_BYTES = 548
"""What fits any IPv4 path (RFC 8489 section 6.1); nobody needs more to ask for an address."""
REFUSED = frozenset({"USERNAME", "MESSAGE-INTEGRITY", "CHANGE-REQUEST"})
REQUESTS_PER_S = 10.0
"""From one address: a household behind one NAT starting up at once."""
REQUESTS_BURST = 50.0
SOURCES = 16384
"""Addresses whose rate is remembered; the least recently used one is forgotten first."""


def reflect(path: Path, data: bytes, proofs: Proofs | None = None, now: float = 0.0) -> bytes | None:
    """The answer to a plain Binding request that came over `path`; None for everything else."""
    if len(data) > MAX_REQUEST_BYTES or classify(data) is not Kind.STUN:
        return None
    try:
        message = stun.parse_untrusted(data)
    except WireError:
        return None
    if message.message_class is not stun.Class.REQUEST or not REFUSED.isdisjoint(message.attributes):
        return None
    extra = {}
    if proofs is not None and len(message.attributes.get("NONCE", b"")) == PROOF_BYTES:
        extra["nonce"] = proofs.make(path.remote, now)
    return stun.build(stun.success(message.transaction_id, path.remote, **extra))


class Reflector:
    """`reflect` with a rate per source address."""

    def __init__(self, proofs: Proofs | None = None) -> None:
        self._proofs = proofs
        self._sources: SourceLimiter[str] = SourceLimiter(REQUESTS_PER_S, REQUESTS_BURST, SOURCES)

    def handle(self, path: Path, data: bytes, now: float) -> bytes | None:
        """The answer, to be sent back over `path`, or None. Only what would be answered counts towards the rate."""
        answer = reflect(path, data, self._proofs, now)
        if answer is None or not path.remote.port or not self._sources.take(path.remote.host, now):
            return None
        return answer
