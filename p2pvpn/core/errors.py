"""Whose fault an error is, what to say of it, and whether the machine that met it survives."""

from __future__ import annotations


class P2pvpnError(Exception):
    """Base of every error of ours.

    `hint` says what a person can do next; the command line prints it under the message.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class LocalError(P2pvpnError):
    """Our side asked for something impossible: a bad command, a bad file, a wrong state."""


class RemoteError(P2pvpnError):
    """The other side sent something it must not. `fatal` means that its session is over."""

    def __init__(self, message: str, *, hint: str = "", fatal: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.fatal = fatal


class WireError(RemoteError):
    """Bytes that do not parse. The only error that a function named `*_untrusted` may raise."""


class TrustError(RemoteError):
    """A signature, certificate, authorisation or secret that does not hold; verification raises it."""
