"""Whose fault an error is, what to say of it, and whether the machine that met it survives."""

from __future__ import annotations

from enum import IntEnum


class Fault(IntEnum):
    """What a person has to look at: the exit code of a command that ends with such an error (docs/errors.md).

    The values are for scripts, so they stay; 2 is the command line's own (bad usage), 130 an interrupt.
    """

    FAILED = 1
    """It did not work, for a reason that only the sentence tells."""
    NOT_RUNNING = 3
    """The daemon does not run, or is not the one that the command expects."""
    REFUSED = 4
    """A token, request, grant, passphrase or name that is not good (any more)."""
    UNREACHABLE = 5
    """Nobody answered: hubs, an issuer, a peer."""
    NOT_ALLOWED = 6
    """The user may not do this here: not root, or no right to a file."""
    MACHINE = 7
    """The machine lacks something, or something else is in the way: a port, a route, a device, a program."""
    STATE = 8
    """Files that hold our state are damaged, or cannot be written."""
    BUG = 70
    """A mistake in p2pvpn itself."""


class P2pvpnError(Exception):
    """Base of every error of ours.

    `hint` says what a person can do next; the command line prints it under the message. `fault` is the exit code.
    """

    default_fault = Fault.FAILED

    def __init__(self, message: str, *, hint: str = "", fault: Fault | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        self.fault = self.default_fault if fault is None else fault


class LocalError(P2pvpnError):
    """Our side asked for something impossible: a bad command, a bad file, a wrong state."""


class RemoteError(P2pvpnError):
    """The other side sent something it must not. `fatal` means that its session is over."""

    def __init__(self, message: str, *, hint: str = "", fatal: bool = False, fault: Fault | None = None) -> None:
        super().__init__(message, hint=hint, fault=fault)
        self.fatal = fatal


class WireError(RemoteError):
    """Bytes that do not parse. The only error that a function named `*_untrusted` may raise."""

    default_fault = Fault.REFUSED


class TrustError(RemoteError):
    """A signature, certificate, authorisation or secret that does not hold; verification raises it."""

    default_fault = Fault.REFUSED
