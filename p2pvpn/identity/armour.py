"""Bytes as one line of text that people copy: requests, grants and tokens.

    kind ":" text of  [length: 3 bytes, payload, first 4 bytes of SHA-256 of kind and payload]

The length comes first, so that a line cut short is told from a damaged one, and a person hears what happened. Long
things use base64url; tokens use base32, which survives being typed, read aloud or put into a compact QR code, in
either case. White space anywhere is ignored, since mail programs break lines.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from enum import Enum

from p2pvpn.core.errors import WireError

MAX_TEXT_CHARS = 1_000_000
"""A grant in a network with every bound used up stays below half of this."""
_LENGTH_BYTES = 3
_CHECK_BYTES = 4


class Kind(Enum):
    """The word in front of the colon, what people call it, and whether it is written in base32."""

    TOKEN = ("p2pvpn", "an invitation token", True)
    REQUEST = ("p2pvpn-request", "a request", False)
    GRANT = ("p2pvpn-grant", "a grant", False)

    def __init__(self, prefix: str, said: str, base32: bool) -> None:
        self.prefix = prefix
        self.said = said
        self.base32 = base32


def armour(kind: Kind, payload: bytes) -> str:
    """One line of text."""
    framed = len(payload).to_bytes(_LENGTH_BYTES, "big") + payload + _check(kind, payload)
    if kind.base32:
        text = base64.b32encode(framed).decode().lower()
    else:
        text = base64.urlsafe_b64encode(framed).decode()
    return f"{kind.prefix}:{text.rstrip('=')}"


def dearmour_untrusted(kind: Kind, text: str) -> bytes:
    """The payload. Raises WireError, with a hint for the person who pasted it."""
    if len(text) > MAX_TEXT_CHARS:
        raise WireError(f"this is too long for {kind.said}")
    prefix, colon, body = "".join(text.split()).partition(":")
    found = next((other for other in Kind if other.prefix == prefix.lower()), None)
    if not colon or found is None:
        raise WireError(f"this is not {kind.said}", hint=f"it begins with {kind.prefix}:")
    if found is not kind:
        raise WireError(f"this is {found.said}, not {kind.said}", hint=f"the right text begins with {kind.prefix}:")
    framed = _decode(kind, body)
    length = int.from_bytes(framed[:_LENGTH_BYTES], "big")
    wanted = _LENGTH_BYTES + length + _CHECK_BYTES
    if len(framed) < _LENGTH_BYTES or len(framed) < wanted:
        raise WireError(f"{kind.said} that is cut off at the end", hint="copy the whole of it once more")
    payload, check = framed[_LENGTH_BYTES : _LENGTH_BYTES + length], framed[_LENGTH_BYTES + length : wanted]
    # Encoding again also catches a last character whose unused bits are set.
    whole = armour(kind, payload).partition(":")[2]
    same = body.lower() == whole if kind.base32 else body == whole
    if check != _check(kind, payload) or not same:
        raise WireError(f"{kind.said} with a wrong character in it", hint="copy the whole of it once more")
    return payload


def _check(kind: Kind, payload: bytes) -> bytes:
    return hashlib.sha256(kind.prefix.encode() + b":" + payload).digest()[:_CHECK_BYTES]


def _decode(kind: Kind, body: str) -> bytes:
    """The bytes that the whole characters make up; characters that make up no byte are dropped."""
    try:
        if kind.base32:
            usable = body.upper()[: len(body) - (1 if len(body) % 8 in (1, 3, 6) else 0)]
            return base64.b32decode(usable + "=" * (-len(usable) % 8))
        usable = body[: len(body) - (1 if len(body) % 4 == 1 else 0)]
        return base64.b64decode(usable + "=" * (-len(usable) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise WireError(f"{kind.said} with a character that does not belong", hint="copy it once more") from None
