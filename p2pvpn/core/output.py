"""What a machine answers: an ordered list of outputs, which its caller executes in order before the next input."""

from __future__ import annotations

from dataclasses import dataclass

from .address import Path


@dataclass(frozen=True, slots=True)
class Transmit:
    """Send these bytes over this path."""

    path: Path
    data: bytes


class Event:
    """Something became true. Subclasses are frozen slotted dataclasses beside the machine that says them."""

    __slots__ = ()


class Effect:
    """The system has to do something (install an SA, say) before the outputs that follow make sense."""

    __slots__ = ()


Output = Transmit | Event | Effect
