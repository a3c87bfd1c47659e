"""Key material that does not show itself."""

from __future__ import annotations

import hmac


class Secret:
    """Bytes that print as `Secret(32 bytes)` and compare in constant time. `reveal()` is the one way in."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = bytes(value)

    def reveal(self) -> bytes:
        return self._value

    def __len__(self) -> int:
        return len(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._value, other._value)

    def __hash__(self) -> int:
        raise TypeError("a secret is no dictionary key")

    def __repr__(self) -> str:
        return f"Secret({len(self._value)} bytes)"

    def __reduce__(self) -> str:
        raise TypeError("a secret is not pickled")
