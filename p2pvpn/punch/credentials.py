"""ICE credentials: from the IKE SA, so that a hub which carries the call cannot answer checks and pose as the path."""

from __future__ import annotations

import base64
import string
from collections.abc import Callable
from dataclasses import dataclass

from p2pvpn.core.errors import LocalError
from p2pvpn.core.secret import Secret

EXPORT_LABEL = b"p2pvpn ICE credentials"
UFRAG_BYTES = 6
"""8 characters: requests are routed by it, so it must be unique among all sessions of a machine."""
PASSWORD_BYTES = 18
"""24 characters, 144 bits (RFC 8445 section 5.3 asks for 128)."""
MIN_UFRAG_CHARS = 8
MIN_REMOTE_UFRAG_CHARS = 4
"""What RFC 8839 section 5.4 allows; ours are longer."""
MIN_PASSWORD_CHARS = 22
MAX_CHARS = 256
ICE_CHARS = frozenset(string.ascii_letters + string.digits + "+/")
"""RFC 8839 section 5.4."""


@dataclass(frozen=True, slots=True)
class IceCredentials:
    """Username fragments and passwords of both sides. Raises LocalError when one is too short, too long or misspelt."""

    local_ufrag: str
    local_password: Secret
    remote_ufrag: str
    remote_password: Secret

    def __post_init__(self) -> None:
        _check("username fragment", self.local_ufrag, MIN_UFRAG_CHARS)
        _check("username fragment", self.remote_ufrag, MIN_REMOTE_UFRAG_CHARS)
        for password in (self.local_password, self.remote_password):
            _check("password", password.reveal().decode("latin-1"), MIN_PASSWORD_CHARS)

    @property
    def username_in(self) -> str:
        """USERNAME of the checks that we receive (RFC 8445 section 7.2.2)."""
        return f"{self.local_ufrag}:{self.remote_ufrag}"

    @property
    def username_out(self) -> str:
        """USERNAME of the checks that we send."""
        return f"{self.remote_ufrag}:{self.local_ufrag}"


def derive(exporter: Callable[[bytes, int], Secret], initiator: bool) -> IceCredentials:
    """Credentials from an exporter (label, length in bytes) over the key material of the IKE SA.

    Both sides get the same; `initiator` is whether we are the original initiator of the SA, whose half comes first.
    """
    half = UFRAG_BYTES + PASSWORD_BYTES
    material = exporter(EXPORT_LABEL, 2 * half).reveal()
    ours, theirs = material[:half], material[half:]
    if not initiator:
        ours, theirs = theirs, ours
    return IceCredentials(
        base64.b64encode(ours[:UFRAG_BYTES]).decode(),
        Secret(base64.b64encode(ours[UFRAG_BYTES:])),
        base64.b64encode(theirs[:UFRAG_BYTES]).decode(),
        Secret(base64.b64encode(theirs[UFRAG_BYTES:])),
    )


def _check(what: str, value: str, least: int) -> None:
    if not least <= len(value) <= MAX_CHARS or not ICE_CHARS.issuperset(value):
        raise LocalError(f"an ICE {what} has {least}..{MAX_CHARS} letters, digits, + or /")
