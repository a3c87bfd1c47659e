"""What a task is: one exchange that we begin, or the answer to one that the peer began.

A new kind of exchange is a new subclass of `Task`, a responder in `responders`, a row in `rules` and, when it is a step
of its own in the life of the SA, rows in `states`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, ClassVar

from p2pvpn.core.address import Path
from p2pvpn.core.errors import RemoteError
from p2pvpn.core.output import Output
from p2pvpn.ike.codes import Exchange
from p2pvpn.ike.config import IkeSettings
from p2pvpn.ike.keys import IkeKeys
from p2pvpn.ike.message import Message
from p2pvpn.ike.notifies import Notify, NotifyType
from p2pvpn.ike.payloads import Payload
from p2pvpn.ike.states import Step

if TYPE_CHECKING:
    from p2pvpn.ike.sa import IkeSa


class Verdict(Enum):
    """What an answer did to its exchange."""

    DONE = "complete: the window is free"
    AGAIN = "the same message goes out again, built anew"
    IGNORED = "not the answer that is waited for"


@dataclass(frozen=True, slots=True)
class Received:
    """A message with the path it came over and, in the clear, its bytes."""

    message: Message
    path: Path
    raw: bytes = b""


class Task(ABC):
    """An exchange that we begin. A task belongs to one SA and is used once."""

    exchange: ClassVar[Exchange]
    passes_on: ClassVar[bool] = True
    """Whether a successor of the IKE SA inherits it while it waits."""
    holds_back_rekeying: ClassVar[bool] = False
    """Whether the IKE SA cannot be rekeyed by the peer while this is under way (RFC 7296 section 2.25.2)."""

    @abstractmethod
    def request(self, sa: IkeSa) -> list[Payload]:
        """The payloads of the request, built when the window is free."""

    @abstractmethod
    def answered(self, sa: IkeSa, received: Received, now: float) -> Verdict:
        """Takes the answer. WireError means that the peer broke the protocol: the SA ends."""

    def sent(self, packet: bytes) -> None:  # noqa: B027 (most tasks do not care)
        """Told the first packet of the request as it goes out."""

    def wanted(self, sa: IkeSa) -> bool:
        """Asked when its turn has come: whether there is still a reason for it."""
        return True

    def ready(self, sa: IkeSa, now: float) -> bool:
        """Asked next: whether it makes sense now, or after a pause."""
        return True

    def gave_up(self, sa: IkeSa, now: float) -> None:
        """No answer to any transmission."""
        sa.end(Step.TIMED_OUT, "the peer does not answer", now)

    def path(self, sa: IkeSa) -> Path:
        """Where the request goes: while a move is under way, over the new path (RFC 4555 section 3.5)."""
        return sa.move_path

    def tries(self, settings: IkeSettings) -> int:
        """Transmissions before giving up."""
        return settings.tries


class Refusal(RemoteError):
    """A request that is answered with an error notification alone; `fatal` ends the SA."""

    def __init__(
        self,
        reason: str,
        kind: NotifyType,
        data: bytes = b"",
        *,
        fatal: bool = False,
        protocol: int = 0,
        spi: bytes = b"",
    ) -> None:
        super().__init__(reason, fatal=fatal)
        self.notify = Notify(kind, data, protocol, spi)


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a request of the peer; `then` follows the answer in the list of outputs, and `step` comes last.

    What comes after the answer is protected by `keys`, if there are any.
    """

    payloads: tuple[Payload, ...] = ()
    then: tuple[Output, ...] = ()
    step: Step | None = None
    reason: str = ""
    keys: IkeKeys | None = None
