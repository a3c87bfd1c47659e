"""What peers tell each other inside IKE, as private status notifies (RFC 7296 section 3.10.1, types 40960-65535)."""

from __future__ import annotations

from dataclasses import dataclass

from p2pvpn.core.errors import WireError
from p2pvpn.core.wire import Reader
from p2pvpn.ike.notifies import Notify

CANDIDATES = 41001
"""The sender's ICE candidates, the whole list (`punch.candidates.encode_candidates`)."""
DOCUMENT_VERSION = 41002
"""Version and hash of the network document that the sender has."""
MOVE_WANTED = 41003
"""To the SA's initiator: the sender checked the direct path and is not on it, so move it there (again); over a relay:
the sender is cut off on the SA's path, so move it to the relay. No data."""
NAT = 41004
"""What the sender knows of the NAT in front of it (`punch.traversal.encode_nat`)."""
RUN = 41005
"""A step of a run of guesses (`punch.traversal.RunNotice`)."""
RTTS_WANTED = 41006
"""The sender asks for the receiver's round trips to the hubs. No data."""
RTTS = 41007
"""The sender's round trips to the hubs (`nearest.encode`)."""
DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class DocumentVersion:
    """`version` counts up; `digest` is SHA-256 of the document."""

    version: int
    digest: bytes

    def notify(self) -> Notify:
        return Notify(DOCUMENT_VERSION, self.version.to_bytes(8, "big") + self.digest)

    @classmethod
    def parse_untrusted(cls, data: bytes) -> DocumentVersion:
        reader = Reader(data)
        version, digest = reader.u64(), reader.take(DIGEST_BYTES)
        reader.end()
        return cls(version, digest)


def find(notifies: tuple[Notify, ...], kind: int) -> bytes | None:
    """The data of the first notify of a type."""
    return next((notify.data for notify in notifies if notify.type == kind), None)


def document_version(notifies: tuple[Notify, ...]) -> DocumentVersion | None:
    """The peer's document version, None when it said nothing that parses."""
    data = find(notifies, DOCUMENT_VERSION)
    if data is None:
        return None
    try:
        return DocumentVersion.parse_untrusted(data)
    except WireError:
        return None
