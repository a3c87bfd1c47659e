"""What happens in the mesh, as typed events: each becomes a log line, a metric and a message on the control socket."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class MeshEvent:
    """Base: `network` is the network's label."""

    network: str

    @property
    def kind(self) -> str:
        return type(self).__name__

    def as_dict(self) -> dict[str, object]:
        return {"event": self.kind, **asdict(self)}

    def __str__(self) -> str:
        fields = asdict(self)
        fields.pop("network")
        return f"[{self.network}] {self.kind}: " + ", ".join(f"{name} {value}" for name, value in fields.items())


@dataclass(frozen=True, slots=True)
class PeerConnected(MeshEvent):
    """An SA with the peer is up; `path` says how it is reached."""

    peer: str
    overlay: str
    path: str
    remote: str
    initiator: bool
    took_s: float | None


@dataclass(frozen=True, slots=True)
class PathChanged(MeshEvent):
    """The live SA with the peer moved."""

    peer: str
    path: str
    remote: str
    reason: str


@dataclass(frozen=True, slots=True)
class Guessed(MeshEvent):
    """A run of guesses at a peer's NAT ended; `method` is prediction or birthday."""

    peer: str
    method: str
    met: bool
    packets: int
    took_s: float


@dataclass(frozen=True, slots=True)
class PeerLost(MeshEvent):
    """The last SA with the peer is gone."""

    peer: str
    reason: str


@dataclass(frozen=True, slots=True)
class ConnectFailed(MeshEvent):
    """An attempt to reach a peer ended without an SA; the next trapped packet or the back-off tries again."""

    peer: str
    step: str
    reason: str


@dataclass(frozen=True, slots=True)
class HubAttached(MeshEvent):
    """A tunnel to a hub is up."""

    hub: str
    remote: str


@dataclass(frozen=True, slots=True)
class HubDetached(MeshEvent):
    """The tunnel to a hub is gone."""

    hub: str
    reason: str


@dataclass(frozen=True, slots=True)
class UdpBlocked(MeshEvent):
    """A hub is silent over UDP and reached over TCP."""

    hub: str


@dataclass(frozen=True, slots=True)
class UdpWorks(MeshEvent):
    """A hub that was reached over TCP answers over UDP, and its tunnel is there again."""

    hub: str


@dataclass(frozen=True, slots=True)
class Intercepted(MeshEvent):
    """Neither UDP nor TCP reaches a hub as it is; `portal` says that somebody has to log in, `answer` who answered."""

    hub: str
    portal: bool
    answer: str


@dataclass(frozen=True, slots=True)
class Called(MeshEvent):
    """A peer asks us, through a hub, to meet it at a relay."""

    peer: str
    relay: str


@dataclass(frozen=True, slots=True)
class Located(MeshEvent):
    """A peer's locator was found."""

    peer: str
    hubs: int
    took_s: float


@dataclass(frozen=True, slots=True)
class DocumentReplaced(MeshEvent):
    """A newer network document is in force."""

    version: int
    source: str


@dataclass(frozen=True, slots=True)
class CertificateRenewed(MeshEvent):
    """Our own certificate was renewed; `until` in seconds since the epoch."""

    until: float


@dataclass(frozen=True, slots=True)
class Refused(MeshEvent):
    """Something from a peer or hub was refused; at most one line a second leaves for the log."""

    who: str
    what: str


EventSink = Callable[[MeshEvent], None]
