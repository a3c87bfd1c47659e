"""Names of members and of groups: one DNS label, lower case (RFC 1123 section 2.1, RFC 5890 section 2.3.1)."""

from __future__ import annotations

import re

from p2pvpn.core.errors import Fault, LocalError

MAX_NAME_CHARS = 63
"""RFC 1035 section 2.3.4."""
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


def is_name(text: str) -> bool:
    """Whether this is 1 to 63 lower-case letters, digits and hyphens, with no hyphen at either end."""
    return _LABEL.fullmatch(text) is not None


def require_name(text: str, what: str = "name") -> str:
    """The text. Raises LocalError when it is not a name."""
    if not is_name(text):
        raise LocalError(
            f"{text!r} cannot be a {what}",
            hint="use 1 to 63 lower-case letters, digits and hyphens, beginning and ending with a letter or digit",
            fault=Fault.REFUSED,
        )
    return text
