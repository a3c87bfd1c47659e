"""What happened to each peer lately, for `p2pvpn why`: a bounded number of events for a bounded number of peers."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from p2pvpn.core.limits import BoundedTable

from .events import Called, ConnectFailed, Located, MeshEvent, PathChanged, PeerConnected, PeerLost

EVENTS_PER_PEER = 20
MAX_PEERS = 2000
"""The least recently used is forgotten first."""


@dataclass(frozen=True, slots=True)
class Happened:
    """`at` is wall time in seconds."""

    at: float
    text: str


class History:
    """By the peer's name, or its overlay address while the name is not known."""

    def __init__(self) -> None:
        self._of: BoundedTable[str, deque[Happened]] = BoundedTable(MAX_PEERS)

    def note(self, event: MeshEvent, wall: float) -> None:
        """Keep an event that is about a peer."""
        match event:
            case PeerConnected(peer=peer, path=path, remote=remote, initiator=initiator, took_s=took_s):
                began = "we began" if initiator else "the peer began"
                after = "" if took_s is None else f", after {1000 * took_s:.0f} ms"
                text = f"connected, {path} at {remote}: {began}{after}"
            case PathChanged(peer=peer, path=path, remote=remote, reason=reason):
                text = f"moved to {path} at {remote}: {reason}"
            case PeerLost(peer=peer, reason=reason):
                text = f"disconnected: {reason}"
            case ConnectFailed(peer=peer, step=step, reason=reason):
                text = f"not connected, at the step {step}: {reason}"
            case Called(peer=peer, relay=relay):
                text = f"the peer called, to meet at {relay}"
            case Located(peer=peer, hubs=hubs):
                text = f"located, at {hubs} hub(s)"
            case _:
                return
        kept = self._of.get(peer)
        if kept is None:
            kept = deque(maxlen=EVENTS_PER_PEER)
            self._of.put(peer, kept)
        kept.append(Happened(wall, text))

    def of(self, *names: str) -> list[Happened]:
        """What happened to a peer under any of its names, the oldest first."""
        found = [one for name in dict.fromkeys(names) for one in self._of.peek(name) or ()]
        return sorted(found, key=lambda one: one.at)[-EVENTS_PER_PEER:]
