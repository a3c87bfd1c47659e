"""The table of SAs: packets of TUN devices go out sealed, datagrams of the ESP socket come in opened.

    outbound                                            inbound
    packet -> source and destination -> SA in use       SPI -> window -> ICV -> window -> padding, lengths
       -> too big? -> sealed, with the path to send         -> addresses are the SA's -> ECN -> delivered
       -> no SA: trapped                                    -> anything else: refused, and counted by its reason

The worker process and the simulation run this same table. `outbound` and `inbound` are the per-packet path: they
return a named tuple or a constant, tell no log, and raise nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.child import ChildSa
from p2pvpn.core.datagram import KEEPALIVE, SPI_MARK
from p2pvpn.core.errors import LocalError, TrustError, WireError
from p2pvpn.core.limits import TokenBucket

from .inner import (
    MIN_MTU_IPV4,
    MIN_MTU_IPV6,
    fragments,
    is_link_scoped,
    may_fragment,
    too_big,
    trimmed_untrusted,
    with_outer_ecn,
)
from .packet import NEXT_IPV4, NEXT_IPV6, NEXT_NONE, SHORTEST_BYTES, inner_mtu, unpadded_untrusted
from .ration import NO_SERVICE, Service
from .sa import MAX_PAIRS, InboundSa, OutboundSa
from .selectors import PrefixTable

TOO_BIG_PER_S = 1000.0
"""ICMP errors a second: enough for a thousand new connections, too few to be a load (RFC 1812 section 4.3.2.8)."""


class Reason(Enum):
    """Why a packet went no further."""

    KEEPALIVE = "a NAT keepalive"
    MALFORMED = "too short or not aligned for ESP"
    UNKNOWN_SPI = "no SA has this SPI"
    REPLAYED = "the sequence number came before or is too old"
    FORGED = "the integrity check value does not hold"
    BAD_PADDING = "the padding is wrong"
    DUMMY = "a dummy packet"
    BAD_INNER = "the inner packet is no whole IP packet"
    WRONG_ADDRESS = "inner addresses, protocol or ports are not the SA's"
    CONGESTION = "marked congested on the way, and its sender cannot learn of it"
    LINK_SCOPED = "the destination never leaves a link"
    TOO_BIG = "too big for the path, and no error may be sent"
    RATIONED = "more than one member may send to a service of this machine"
    EXHAUSTED = "the sequence numbers of the SA are used up"


class Sealed(NamedTuple):
    """Send `datagram`, then those of `more`, over `path`, with `traffic_class` in the outer header."""

    path: Path
    datagram: bytes
    traffic_class: int = 0
    more: tuple[bytes, ...] = ()


class Trapped(NamedTuple):
    """No SA in use covers the packet."""


class TooBig(NamedTuple):
    """Give `reply`, an ICMP error, to the source of the packet."""

    reply: bytes


class Refused(NamedTuple):
    reason: Reason


class Delivered(NamedTuple):
    """Give `packet` to the network. `moved` is where the newest packet came from, said once per new address."""

    network: str
    child_id: int
    packet: bytes
    moved: Endpoint | None = None


class Usage(NamedTuple):
    """Counters of one SA; times are those of the `now` arguments, 0.0 for never; sizes are of inner packets."""

    packets_in: int
    bytes_in: int
    packets_out: int
    bytes_out: int
    last_in_at: float
    last_out_at: float
    sequence_out: int


_new_tuple = tuple.__new__
"""Makes a named tuple without its Python-level constructor, which costs as much as a seventh of sealing a packet."""
TRAPPED = Trapped()
_REFUSED = {reason: Refused(reason) for reason in Reason}
_KEEPALIVE = _REFUSED[Reason.KEEPALIVE]
_UNKNOWN_SPI = _REFUSED[Reason.UNKNOWN_SPI]
_MALFORMED = _REFUSED[Reason.MALFORMED]


class _Child:
    """One installed Child SA."""

    __slots__ = ("child", "inbound", "outbound", "used")

    def __init__(self, child: ChildSa, service: Service) -> None:
        self.child = child
        self.outbound = OutboundSa(child)
        self.inbound = InboundSa(child, self.outbound.local, self.outbound.remote, service)
        self.used = False


class _Network:
    """What leaves by which SA. `pairs` remembers decisions by packed source and destination."""

    __slots__ = ("pairs", "table")

    def __init__(self) -> None:
        self.table: PrefixTable[OutboundSa] = PrefixTable()
        self.pairs: dict[bytes, OutboundSa] = {}


class EspEngine:
    """All SAs of a machine. `drops` counts refused packets by reason."""

    def __init__(self) -> None:
        self.drops: Counter[Reason] = Counter()
        self._children: dict[int, _Child] = {}
        self._by_spi: dict[bytes, InboundSa] = {}
        self._networks: dict[str, _Network] = {}
        self._services: dict[str, Service] = {}
        self._errors = TokenBucket(TOO_BIG_PER_S, TOO_BIG_PER_S)

    # ------------------------------------------------------------------ commands

    def serve(self, network: str, service: Service) -> None:
        """What a member sends to this service of ours is rationed, on every SA that is installed from now on."""
        self._services[network] = service

    def install(self, child: ChildSa) -> None:
        """Receive on the SA. Raises LocalError when the id or SPI is taken or the SA is of a kind not carried here."""
        if child.transport_mode:
            raise LocalError("the user plane carries tunnel mode only")
        if child.spi_in & SPI_MARK != SPI_MARK or child.spi_in > 0xFFFFFFFF:
            raise LocalError("an inbound SPI has its two top bits set")
        if not 0 < child.spi_out <= 0xFFFFFFFF:
            raise LocalError("an outbound SPI is a positive number of 32 bits")
        spi = child.spi_in.to_bytes(4, "big")
        if child.id in self._children:
            raise LocalError(f"Child SA {child.id} is installed already")
        if spi in self._by_spi:
            raise LocalError(f"SPI {child.spi_in:#010x} is taken")
        try:
            entry = _Child(child, self._services.get(child.network, NO_SERVICE))
        except ValueError as error:
            raise LocalError(str(error)) from None
        self._children[child.id] = entry
        self._by_spi[spi] = entry.inbound

    def use(self, child_id: int) -> None:
        """Send the traffic of the SA's remote selectors over it. Raises LocalError for an unknown id."""
        entry = self._known(child_id)
        entry.used = True
        network = self._networks.setdefault(entry.child.network, _Network())
        network.pairs.clear()
        for selector in entry.child.remote:
            for prefix in selector.networks():
                network.table.add(prefix, entry.outbound)

    def move(self, child_id: int, path: Path) -> None:
        """Send over `path` from now on; what was learned of the old path's MTU is forgotten. Raises LocalError."""
        entry = self._known(child_id)
        entry.outbound.path = path
        entry.outbound.mtu = entry.child.mtu
        entry.inbound.home = entry.inbound.source = path.remote

    def remove(self, child_id: int) -> None:
        """Forget the SA; a former one for the same traffic takes over if it still stands. Unknown ids are ignored."""
        entry = self._children.pop(child_id, None)
        if entry is None:
            return
        del self._by_spi[entry.child.spi_in.to_bytes(4, "big")]
        network = self._networks.get(entry.child.network)
        if network is None or not entry.used:
            return
        network.pairs.clear()
        for selector in entry.child.remote:
            for prefix in selector.networks():
                network.table.discard(prefix, entry.outbound)

    def remove_network(self, network: str) -> None:
        """Forget every SA of the network."""
        for child_id in [key for key, entry in self._children.items() if entry.child.network == network]:
            self.remove(child_id)
        self._networks.pop(network, None)
        self._services.pop(network, None)

    def usage(self, child_ids: Iterable[int]) -> dict[int, Usage]:
        """Counters of those SAs that exist."""
        out: dict[int, Usage] = {}
        for child_id in child_ids:
            entry = self._children.get(child_id)
            if entry is not None:
                i, o = entry.inbound, entry.outbound
                out[child_id] = Usage(i.packets, i.bytes, o.packets, o.bytes, i.last_at, o.last_at, o.sequence)
        return out

    def narrow_path(self, remote: Endpoint, outer_mtu: int) -> None:
        """The way to `remote` carries IP packets of `outer_mtu` bytes at most: send nothing larger there."""
        for entry in self._children.values():
            if entry.outbound.path.remote == remote:
                mtu = inner_mtu(outer_mtu, outer_ipv6=remote.is_ipv6, suite=entry.child.suite)
                entry.outbound.mtu = min(entry.outbound.mtu, max(mtu, MIN_MTU_IPV4))

    def _known(self, child_id: int) -> _Child:
        entry = self._children.get(child_id)
        if entry is None:
            raise LocalError(f"there is no Child SA {child_id}")
        return entry

    def _refuse(self, reason: Reason) -> Refused:
        self.drops[reason] += 1
        return _REFUSED[reason]

    # ------------------------------------------------------------------ packets

    def outbound(self, network: str, packet: bytes, now: float) -> Sealed | Trapped | TooBig | Refused:
        """What to do with a packet that the network's device gave us."""
        size = len(packet)
        version = packet[0] >> 4 if size >= 20 else 0
        if version == 4:
            pair = packet[12:20]
        elif version == 6 and size >= 40:
            pair = packet[8:40]
        else:
            return self._refuse(Reason.BAD_INNER)
        table = self._networks.get(network)
        sa = table.pairs.get(pair) if table is not None else None
        if sa is None:
            found = self._choose(table, packet, pair)
            if not isinstance(found, OutboundSa):
                return found if isinstance(found, Trapped) else self._refuse(found)
            sa = found
        if size > sa.mtu and (version == 4 or size > MIN_MTU_IPV6):
            return self._oversized(sa, packet, now)
        if version == 4:
            sealed = sa.seal(packet, NEXT_IPV4, now)
            outer_class = packet[1]
        else:
            sealed = sa.seal(packet, NEXT_IPV6, now)
            outer_class = (packet[0] & 15) << 4 | packet[1] >> 4
        if sealed is None:
            return self._refuse(Reason.EXHAUSTED)
        return _new_tuple(Sealed, (sa.path, sealed, outer_class, ()))

    def outbound_sa(self, network: str, head: bytes) -> OutboundSa | None:
        """The SA for packets of one flow, which begin with `head`: an IP header with what follows it up to the ports.

        None when no SA carries them, or some other thing needs a look at each: ask `outbound` for each then.
        """
        table = self._networks.get(network)
        pair = head[12:20] if head[0] >> 4 == 4 else head[8:40]
        sa = table.pairs.get(pair) if table is not None else None
        if sa is None:
            found = self._choose(table, head, pair)
            if not isinstance(found, OutboundSa):
                return None
            sa = found
        return sa if sa.batches else None

    def outbound_sa_of_pair(self, network: str, pair: bytes) -> OutboundSa | None:
        """The SA for all packets with this packed source and destination, if it is known that these decide."""
        table = self._networks.get(network)
        sa = table.pairs.get(pair) if table is not None else None
        return sa if sa is not None and sa.batches else None

    def _choose(self, network: _Network | None, packet: bytes, pair: bytes) -> OutboundSa | Trapped | Reason:
        """The SA in use for the packet: the longest remote prefix, then the newest, that admits both addresses."""
        if is_link_scoped(packet):
            return Reason.LINK_SCOPED
        if network is None:
            return TRAPPED
        half = len(pair) // 2
        source, destination = pair[:half], pair[half:]
        by_addresses = True
        try:
            for sa in network.table.candidates(destination):
                by_addresses = by_addresses and not sa.is_narrow
                if sa.admits_untrusted(packet, source, destination):
                    if by_addresses:
                        if len(network.pairs) >= MAX_PAIRS:
                            network.pairs.clear()
                        network.pairs[pair] = sa
                    return sa
        except WireError:
            return Reason.BAD_INNER
        return TRAPPED

    def _oversized(self, sa: OutboundSa, packet: bytes, now: float) -> Sealed | TooBig | Refused:
        """Cut what may be cut, and tell the source of the rest (RFC 4301 section 8.2)."""
        try:
            packet = trimmed_untrusted(packet)
        except WireError:
            return self._refuse(Reason.BAD_INNER)
        if may_fragment(packet):
            sealed = [sa.seal(piece, NEXT_IPV4, now) for piece in fragments(packet, sa.mtu)]
            whole = tuple(datagram for datagram in sealed if datagram is not None)
            if len(whole) < len(sealed):
                return self._refuse(Reason.EXHAUSTED)
            return Sealed(sa.path, whole[0], packet[1], whole[1:])
        reply = too_big(packet, sa.mtu)
        if reply is None or not self._errors.take(now):
            return self._refuse(Reason.TOO_BIG)
        return TooBig(reply)

    def inbound(self, source: tuple[str, int], data: bytes, now: float, ecn: int = 0) -> Delivered | Refused:
        """What to do with a datagram of the ESP socket; `ecn` is the outer ECN field (any higher bits are ignored).

        An unknown SPI is not counted here: the caller may ask again after it took its commands, and counts then.
        """
        if len(data) < SHORTEST_BYTES or len(data) & 3:
            return _KEEPALIVE if data == KEEPALIVE else self._refuse(Reason.MALFORMED)
        sa = self._by_spi.get(data[:4])
        if sa is None:
            return _UNKNOWN_SPI
        window = sa.window
        sequence = int.from_bytes(data[4:8], "big")
        if sa.esn:
            sequence = window.whole(sequence)
        if sequence != window.top + 1 and not window.fresh(sequence):
            return self._refuse(Reason.REPLAYED)
        try:
            next_header, packet = sa.opener.open_untrusted(sequence, data)
        except TrustError:
            return self._refuse(Reason.FORGED)
        except WireError:
            # The ICV held, so the number is used up, whatever the padding looks like.
            window.accept(sequence)
            return self._refuse(Reason.BAD_PADDING)
        newest = window.accept(sequence)
        sa.packets += 1
        sa.last_at = now
        inner = self.admit(sa, next_header, packet, ecn)
        if isinstance(inner, Refused):
            return inner
        moved = sa.came_from(source) if newest and source != sa.source else None
        child = sa.child
        return _new_tuple(Delivered, (child.network, child.id, inner, moved))

    def inbound_spis(self) -> list[int]:
        """SPIs of all SAs that take packets."""
        return [int.from_bytes(spi, "big") for spi in self._by_spi]

    def inbound_sa(self, spi: bytes) -> InboundSa | None:
        """The SA of a batch of datagrams; None when `inbound` must look at each."""
        return self._by_spi.get(spi)

    def admit_text(self, sa: InboundSa, plain: bytes, ecn: int) -> bytes | Refused:
        """`admit` for a decrypted text with its padding."""
        try:
            next_header, packet = unpadded_untrusted(plain)
        except WireError:
            return self._refuse(Reason.BAD_PADDING)
        return self.admit(sa, next_header, packet, ecn)

    def admit_run(self, sa: InboundSa, head: bytes, count: int, size: int, ecn: int) -> bytes | None:
        """`admit` for `count` whole packets of `size` bytes of one flow, which begin with `head` in everything that is
        looked at here: `head` as the network may have it, or None when all of them are refused."""
        pair = head[12:20] if head[0] >> 4 == 4 else head[8:40]
        try:
            admitted = pair in sa.pairs or sa.admits_untrusted(head, pair)
            bounded = pair[16:] in sa.ration.addresses and not sa.ration.admits_untrusted(head, sa.last_at, count)
        except WireError:
            self.drops[Reason.BAD_INNER] += count
            return None
        if not admitted or bounded:
            self.drops[Reason.WRONG_ADDRESS if not admitted else Reason.RATIONED] += count
            return None
        sa.bytes += count * size
        if not ecn & 3:
            return head
        combined = with_outer_ecn(head, ecn)
        if combined is None:
            self.drops[Reason.CONGESTION] += count
        return combined

    def admit(self, sa: InboundSa, next_header: int, packet: bytes, ecn: int) -> bytes | Refused:
        """The inner packet as the network may have it, once ICV and window were found in order."""
        if next_header == NEXT_NONE:
            return self._refuse(Reason.DUMMY)
        size = len(packet)
        try:
            if next_header == NEXT_IPV4:
                if size < 20 or packet[0] != 0x45 or packet[2] << 8 | packet[3] != size:
                    packet = trimmed_untrusted(packet)
                pair, version = packet[12:20], 4
            elif next_header == NEXT_IPV6:
                if size < 40 or packet[4] << 8 | packet[5] != size - 40:
                    packet = trimmed_untrusted(packet)
                pair, version = packet[8:40], 6
            else:
                return self._refuse(Reason.BAD_INNER)
            if packet[0] >> 4 != version:
                return self._refuse(Reason.BAD_INNER)
            if pair not in sa.pairs and not sa.admits_untrusted(packet, pair):
                return self._refuse(Reason.WRONG_ADDRESS)
            if version == 6 and pair[16:] in sa.ration.addresses and not sa.ration.admits_untrusted(packet, sa.last_at):
                return self._refuse(Reason.RATIONED)
        except WireError:
            return self._refuse(Reason.BAD_INNER)
        sa.bytes += len(packet)
        if ecn & 3:
            combined = with_outer_ecn(packet, ecn)
            if combined is None:
                return self._refuse(Reason.CONGESTION)
            packet = combined
        return packet
