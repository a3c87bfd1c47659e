"""What the endpoint says: effects on the ESP plane and events, besides `core.output.Transmit`.

`sa` is the local number of an IKE SA, a counter that is never used again. `at` is monotonic seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from p2pvpn.core.address import IpAddress, Path
from p2pvpn.core.child import ChildSa
from p2pvpn.core.output import Effect, Event

from .config import RemoteIdentity
from .lease import Lease
from .notifies import Notify


@dataclass(frozen=True, slots=True)
class InstallChild(Effect):
    """Accept ESP of this Child SA from now on."""

    sa: int
    child: ChildSa


@dataclass(frozen=True, slots=True)
class UseChild(Effect):
    """Send the traffic of the Child SA's selectors over it from now on."""

    sa: int
    child_id: int


@dataclass(frozen=True, slots=True)
class MoveChild(Effect):
    """Send the Child SA's packets over this path from now on."""

    sa: int
    child_id: int
    path: Path


@dataclass(frozen=True, slots=True)
class RemoveChild(Effect):
    """Forget the Child SA."""

    sa: int
    child_id: int


@dataclass(frozen=True, slots=True)
class SendKeepalive(Effect):
    """Send the one-byte NAT keepalive over this path (RFC 3948 section 4): it takes no non-ESP marker."""

    path: Path


@dataclass(frozen=True, slots=True)
class SaEstablished(Event):
    """Both sides are authenticated. `notifies` are the peer's status notifications from IKE_AUTH."""

    sa: int
    network: str
    remote: RemoteIdentity
    initiator: bool
    path: Path
    notifies: tuple[Notify, ...]
    tag: object
    at: float
    lease: Lease | None = None
    """What the client has from the gateway; released by the engine after SaClosed."""


@dataclass(frozen=True, slots=True)
class Redirected(Event):
    """The peer sends us to another gateway. While an SA is being set up (`followed`) the attempt went there already."""

    sa: int
    gateway: IpAddress
    followed: bool


@dataclass(frozen=True, slots=True)
class SaFailed(Event):
    """An SA that we began did not come up. `timed_out` when nothing (trustworthy) was heard."""

    sa: int
    tag: object
    reason: str
    timed_out: bool


@dataclass(frozen=True, slots=True)
class Refused(Event):
    """A peer's attempt was refused; the peer was told no reason. Said at most once a second."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class ChildFailed(Event):
    """The IKE SA stands, but a Child SA (or its replacement) was refused."""

    sa: int
    reason: str


@dataclass(frozen=True, slots=True)
class ChildClosed(Event):
    """The peer deleted one Child SA, or does not know it; the IKE SA stands."""

    sa: int
    child_id: int


@dataclass(frozen=True, slots=True)
class ChildAdded(Event):
    """One more Child SA, made by either side, is in use."""

    sa: int
    child_id: int


@dataclass(frozen=True, slots=True)
class ChildRekeyed(Event):
    """`new_id` has taken the place of `old_id`, which is removed when nothing can be in flight any more."""

    sa: int
    old_id: int
    new_id: int


@dataclass(frozen=True, slots=True)
class SaRekeyed(Event):
    """The IKE SA has new keys and SPIs (initiator's, responder's). Its local id and its Child SAs stay.

    What `export` gives is different from now on.
    """

    sa: int
    old_spis: tuple[bytes, bytes]
    new_spis: tuple[bytes, bytes]
    at: float


@dataclass(frozen=True, slots=True)
class RekeyFailed(Event):
    """The peer does not want to rekey the IKE SA, which stands as it is."""

    sa: int
    reason: str


@dataclass(frozen=True, slots=True)
class SaClosed(Event):
    """An established SA ended; its Child SAs were removed before."""

    sa: int
    reason: str


@dataclass(frozen=True, slots=True)
class SaMoved(Event):
    """The SA and its Child SAs use this path now."""

    sa: int
    path: Path


@dataclass(frozen=True, slots=True)
class MoveFailed(Event):
    """A move that we asked for did not happen; the SA stays on its path."""

    sa: int
    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Informed(Event):
    """Status notifications of the peer in an INFORMATIONAL request, authenticated and in order; it came over `path`."""

    sa: int
    notifies: tuple[Notify, ...]
    path: Path


@dataclass(frozen=True, slots=True)
class PeerPathHint(Event):
    """The newest authenticated message came from an address that is not the SA's. A hint, said once per address."""

    sa: int
    path: Path


@dataclass(frozen=True, slots=True)
class Liveness(Event):
    """The peer answered at this time."""

    sa: int
    alive_at: float
