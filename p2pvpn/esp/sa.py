"""The two directions of a Child SA in user space: keys, counters, window, selectors.

An SA ends before its sequence numbers do (RFC 4303 section 3.3.3): `OutboundSa.seal` refuses then, for ever. Nothing
here can set a sequence number back, since a number that repeats would repeat a nonce.
"""

from __future__ import annotations

from p2pvpn.core.address import Endpoint
from p2pvpn.core.child import ChildSa

from .cbc import CbcOpener, CbcSealer
from .inner import flow_untrusted
from .packet import Opener, Sealer
from .ration import NO_SERVICE, Ration, Service
from .replay import ReplayWindow
from .selectors import SelectorSet

LAST_SEQUENCE = 0xFFFFFFFF
LAST_SEQUENCE_ESN = 0xFFFFFFFFFFFFFFFF
MAX_PAIRS = 4096
"""Address pairs remembered as admitted, per SA and per network: a bound on what an address scan can cost."""


class OutboundSa:
    """Seals packets for one peer. `mtu` is in bytes of inner packet and sinks when the path turns out to be narrow."""

    __slots__ = (
        "batches",
        "bytes",
        "child",
        "last_at",
        "local",
        "mtu",
        "packets",
        "path",
        "remote",
        "sealer",
        "sequence",
        "stop_at",
    )

    def __init__(self, child: ChildSa) -> None:
        self.child = child
        self.path = child.path
        self.mtu = child.mtu
        self.local = SelectorSet(child.local)
        self.remote = SelectorSet(child.remote)
        self.batches = child.suite.is_combined
        """Whether many packets may be sealed at once."""
        kind = Sealer if self.batches else CbcSealer
        self.sealer = kind(child.suite, child.key_out.reveal(), child.spi_out, esn=child.esn)
        self.stop_at = LAST_SEQUENCE_ESN if child.esn else LAST_SEQUENCE
        self.sequence = 0
        self.packets = 0
        self.bytes = 0
        self.last_at = 0.0

    @property
    def is_narrow(self) -> bool:
        """Whether addresses alone cannot decide what it carries."""
        return self.local.narrow or self.remote.narrow

    def admits_untrusted(self, packet: bytes, source: bytes, destination: bytes) -> bool:
        """Whether source and destination of a trimmed packet are the SA's. Raises WireError."""
        protocol, source_port, destination_port = flow_untrusted(packet)
        return self.remote.admits(destination, protocol, destination_port) and self.local.admits(
            source, protocol, source_port
        )

    def seal(self, packet: bytes, next_header: int, now: float) -> bytes | None:
        """The ESP packet, or None when the sequence numbers are used up."""
        sequence = self.sequence + 1
        if sequence > self.stop_at:
            return None
        self.sequence = sequence
        self.packets += 1
        self.bytes += len(packet)
        self.last_at = now
        return self.sealer.seal(sequence, packet, next_header)

    def reserve(self, count: int, size: int, now: float) -> int | None:
        """The first of `count` sequence numbers for packets of `size` bytes each; None when so many are not left."""
        first = self.sequence + 1
        if self.sequence + count > self.stop_at:
            return None
        self.sequence += count
        self.packets += count
        self.bytes += count * size
        self.last_at = now
        return first


class InboundSa:
    """Opens packets of one peer. `home` is where the path leads, `source` where the newest packet came from."""

    __slots__ = (
        "bytes",
        "child",
        "esn",
        "home",
        "last_at",
        "local",
        "narrow",
        "opener",
        "packets",
        "pairs",
        "ration",
        "remote",
        "source",
        "window",
    )

    def __init__(self, child: ChildSa, local: SelectorSet, remote: SelectorSet, service: Service = NO_SERVICE) -> None:
        self.child = child
        self.esn = child.esn
        self.home = child.path.remote
        self.source: tuple[str, int] = self.home
        self.local = local
        self.remote = remote
        self.narrow = local.narrow or remote.narrow
        self.pairs: set[bytes] = set()
        self.ration = Ration(service)
        kind = Opener if child.suite.is_combined else CbcOpener
        self.opener = kind(child.suite, child.key_in.reveal(), esn=child.esn)
        self.window = ReplayWindow(esn=child.esn)
        self.packets = 0
        self.bytes = 0
        self.last_at = 0.0

    def admits_untrusted(self, packet: bytes, pair: bytes) -> bool:
        """Whether a trimmed packet is the SA's (RFC 4301 section 5.2 step 4); `pair` is its source and destination.

        Pairs that need no second look are remembered in `pairs`. Raises WireError.
        """
        half = len(pair) // 2
        source, destination = pair[:half], pair[half:]
        protocol, source_port, destination_port = flow_untrusted(packet)
        if not self.remote.admits(source, protocol, source_port):
            return False
        if not self.local.admits(destination, protocol, destination_port):
            return False
        if not self.narrow:
            if len(self.pairs) >= MAX_PAIRS:
                self.pairs.clear()
            self.pairs.add(pair)
        return True

    def came_from(self, source: tuple[str, int]) -> Endpoint | None:
        """Note where the newest packet came from; the new address, unless the path leads there anyway."""
        self.source = source
        endpoint = Endpoint.of(*source)
        return None if endpoint == self.home else endpoint
