"""NAT detection (RFC 7296 section 2.23): each side sends hashes of the addresses it sees.

    NAT_DETECTION_*_IP data: SHA-1(SPIi | SPIr | address | port), 20 bytes

Our ESP always travels in UDP. A peer leaves UDP out unless it believes in a NAT, so by default we send a source hash
that cannot match, as strongSwan does for the same reason; whether we are behind a NAT ourselves is still found out.
"""

from __future__ import annotations

import hashlib

from p2pvpn.core.address import Endpoint, Path

from .message import Message
from .notifies import Notify, NotifyType

HASH_BYTES = 20


def detection_hash(spi_i: bytes, spi_r: bytes, endpoint: Endpoint) -> bytes:
    """The hash of one endpoint as the sender of the message knows it."""
    return hashlib.sha1(spi_i + spi_r + endpoint.packed(), usedforsecurity=False).digest()


def detection_notifies(spi_i: bytes, spi_r: bytes, path: Path, fake_source: bytes | None) -> list[Notify]:
    """Both notifications for a message that goes over `path`; `fake_source` replaces the hash of our address."""
    source = detection_hash(spi_i, spi_r, path.local) if fake_source is None else fake_source
    return [
        Notify(NotifyType.NAT_DETECTION_SOURCE_IP, source),
        Notify(NotifyType.NAT_DETECTION_DESTINATION_IP, detection_hash(spi_i, spi_r, path.remote)),
    ]


def local_nat(message: Message, spi_i: bytes, spi_r: bytes, path: Path) -> bool | None:
    """Whether we are behind a NAT, as a message that came over `path` shows; None when it does not say."""
    seen = message.notify(NotifyType.NAT_DETECTION_DESTINATION_IP)
    if seen is None:
        return None
    return seen.data != detection_hash(spi_i, spi_r, path.local)


def remote_nat(message: Message, spi_i: bytes, spi_r: bytes, path: Path) -> bool | None:
    """Whether the sender is, or pretends to be, behind a NAT; None when the message does not say."""
    sources = [one for one in message.notifies if one.type == NotifyType.NAT_DETECTION_SOURCE_IP]
    if not sources:
        return None
    true = detection_hash(spi_i, spi_r, path.remote)
    return all(one.data != true for one in sources)
