"""What the engine needs of the world: the production side is in `host`, the simulated one in `sim`.

Time is `asyncio.get_running_loop().time()`, monotonic and virtual in simulations; the wall clock and entropy are the
ports of `core.ports`. Datagrams of the DHT go through `loop.create_datagram_endpoint` on overlay addresses, which the
simulation's loop provides too.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from p2pvpn.core.address import Endpoint, IpAddress, IpNetwork, Path
from p2pvpn.core.child import ChildSa
from p2pvpn.core.errors import Fault, RemoteError
from p2pvpn.core.ids import PeerId
from p2pvpn.punch.portmap.mapping import PortMapping


class Underlay(Protocol):
    """The shared UDP socket, one per address family: everything but ESP arrives here, still as it was on the wire."""

    on_datagram: Callable[[Path, bytes], None]
    """Called for each datagram that is not for the ESP socket; `path.local.host` is the address it came to."""
    screen: Callable[[tuple[str, int], bytes], bytes | None]
    """Asked before `on_datagram`, with source and datagram: what to send back at once, empty for nothing, or None when
    the datagram is to go its way. A flood must not cost more than that."""
    on_change: Callable[[], None]
    """Called when an address, a link or the default route of the machine changed."""
    on_resume: Callable[[float], None]
    """Called when the machine was suspended for so many seconds, in which the monotonic clock stood still."""

    @property
    def port(self) -> int:
        """The local port of both families."""
        ...

    def listen_at(self, ports: Sequence[int]) -> Sequence[int]:
        """Receive at these ports too; those of them that we have then. What comes there has them in `path.local`."""
        ...

    def open_probe(self, ipv6: bool) -> int:
        """A further socket of one family, to measure with: no ESP comes by it. Returns its port; raises LocalError."""
        ...

    def close_probe(self, port: int) -> None:
        """Close what `open_probe` opened."""
        ...

    def send(self, path: Path, data: bytes) -> None:
        """Send, best effort: an unroutable or full network loses the packet, never raises."""
        ...

    def open_extra(self, count: int) -> Sequence[int]:
        """Open further IPv4 sockets on ports of their own, fewer than `count` if the machine has no more; what arrives
        there comes by `on_datagram` too, and `send` takes a path whose local port is one of them.
        """
        ...

    def close_extra(self, port: int) -> None:
        """Close such a socket; another port is ignored."""
        ...

    def local_endpoints(self) -> Sequence[Endpoint]:
        """Addresses of the machine that a peer might reach (not loopback, not link-local, not ours), with our port."""
        ...

    def local_networks(self) -> Sequence[IpNetwork]:
        """The subnets that those addresses are in."""
        ...

    def gateways(self) -> Sequence[str]:
        """Addresses of the routers that default routes lead to, the preferred first."""
        ...


@dataclass(frozen=True, slots=True)
class SaUsage:
    """Counters of one Child SA; `last_in_at` is the monotonic time of the last authenticated packet, 0.0 for never."""

    packets_in: int = 0
    bytes_in: int = 0
    packets_out: int = 0
    bytes_out: int = 0
    last_in_at: float = 0.0
    last_out_at: float = 0.0
    sequence_out: int = 0


class Plane(Protocol):
    """What encrypts packets: worker process or kernel. `network` names one TUN device and its traps.

    Inbound and outbound are apart, so that a change of SA loses nothing: `install` makes an SA able to receive on both
    ends, then `use` turns the traffic of its remote selectors to it.
    """

    on_trapped: Callable[[str, bytes], None]
    """(network, inner IP packet): a packet for an overlay address that no SA in use covers."""
    on_moved: Callable[[int, Endpoint], None]
    """(child id, outer source): an authenticated packet, newer than all before, came from an address that is not the
    path's. A hint for the path agent, never a command; said once per new address."""

    async def open_network(
        self, network: str, addresses: Sequence[IpAddress], routes: Sequence[IpNetwork], mtu: int
    ) -> str:
        """Make the network's TUN device with these addresses and routes; returns the device's name."""
        ...

    async def close_network(self, network: str) -> None:
        """Remove the device and every SA of the network."""
        ...

    async def install(self, child: ChildSa) -> None:
        """Accept ESP of this SA; send nothing over it yet. Raises LocalError when the id or SPI is taken."""
        ...

    async def use(self, child_id: int) -> None:
        """Send the traffic of the SA's remote selectors over it from now on; a former SA for them keeps receiving."""
        ...

    async def move(self, child_id: int, path: Path) -> None:
        """Send over this path from now on; sequence numbers and replay window stay."""
        ...

    async def remove(self, child_id: int) -> None:
        """Forget the SA; unknown ids are ignored."""
        ...

    async def listen(self, port: int) -> None:
        """Take ESP in at this extra port of the underlay too, and send it over paths that begin there. Raises
        LocalError when there is no such port.
        """
        ...

    async def unlisten(self, port: int) -> None:
        """No more; another port is ignored."""
        ...

    async def inject(self, network: str, packets: Sequence[bytes]) -> None:
        """Send these inner packets, trapped before, in order, over the SAs in use now."""
        ...

    async def usage(self, child_ids: Sequence[int]) -> dict[int, SaUsage]:
        """Counters of those SAs that exist."""
        ...


class Forwarder(Protocol):
    """Where relay ports live on a hub: a pair of UDP ports per allocation, bytes in at one leave from the other."""

    on_unbound: Callable[[int, Endpoint, bytes], None]
    """(port, source, datagram): a packet for the relay server itself. That is one from a source that is not bound at
    this port of ours, one from a bound source while the twin port has no binding, and every relay Binding request
    (`relay.wire.is_bind`), from bound sources too. Everything else is forwarded and never seen here."""

    async def open_pair(self) -> tuple[int, int]:
        """Open two ports, at all public addresses of the hub. Raises LocalError when there is none left."""
        ...

    def bind(self, port: int, source: Endpoint) -> None:
        """Packets at `port` from `source` leave unchanged from the twin port to the twin's bound source from now on."""
        ...

    def answer(self, port: int, to: Endpoint, data: bytes) -> None:
        """Send bytes of the relay itself from one of its ports."""
        ...

    def used_at(self, port: int) -> tuple[float, int]:
        """Monotonic time of the last forwarded packet of the pair, and bytes forwarded so far, both directions."""
        ...

    def close_pair(self, port: int) -> None:
        """Close both ports of the pair that `port` belongs to."""
        ...


@dataclass(frozen=True, slots=True)
class PortMapStatus:
    """One router: what it maps for us, or why nothing that peers can use."""

    gateway: str
    mapping: PortMapping | None
    reason: str


class PortMapper(Protocol):
    """Asks routers to forward a port to us (PCP, NAT-PMP, UPnP), and keeps asking."""

    on_change: Callable[[], None]
    """Called when `mappings` are other than before."""

    @property
    def is_on(self) -> bool:
        """Whether the owner lets us ask."""
        ...

    def start(self, port: int) -> None:
        """Have UDP to our `port` mapped from now on; called once."""
        ...

    def mappings(self) -> Sequence[PortMapping]:
        """What routers map for us now, by their word."""
        ...

    def status(self) -> Sequence[PortMapStatus]: ...

    def network_changed(self) -> None:
        """Addresses or routes of the machine are other than before."""
        ...


class StreamTrouble(Enum):
    """Why there is no stream to a hub."""

    SILENT = "TCP is not answered either"
    INTERCEPTED = "something on the way answers TLS in the hub's place"
    PORTAL = "a captive portal wants somebody to log in"
    REFUSED = "the hub has no room for it, or nothing at that port"


class StreamFailed(RemoteError):
    """A stream cannot be had. `detail` is what answered, for a person: printable and short, but a stranger's word."""

    def __init__(self, trouble: StreamTrouble, detail: str = "") -> None:
        hint = "open a browser and log in to the network" if trouble is StreamTrouble.PORTAL else ""
        super().__init__(f"{trouble.value}{f': {detail}' if detail else ''}", hint=hint, fault=Fault.UNREACHABLE)
        self.trouble = trouble
        self.detail = detail


class Streams(Protocol):
    """Datagrams over TLS over TCP, where UDP does not pass. A stream is to one UDP port of a hub.

    At either end a loopback endpoint of `core.address.STREAM_NETWORK` stands for it: what the engine or the plane sends
    there comes out at the other end, from the endpoint that stands for the stream there. So neither IKE nor relays nor
    planes know of TCP. Streams from one outside address have one host address at the hub, as UDP has.
    """

    on_lost: Callable[[Endpoint], None]
    """The stream of this endpoint ended, and we did not close it."""
    may_reach: Callable[[int], bool]
    """On a hub: whether strangers may have a stream to this UDP port; 0 is that of IKE and ESP."""

    async def open(self, hub: Endpoint, hub_id: PeerId, port: int) -> Endpoint:
        """A stream to `port` (0: that of IKE and ESP) of the hub whose TLS answers at `hub` with the key of `hub_id`.

        Raises StreamFailed.
        """
        ...

    async def find_portal(self, hub: Endpoint, *, intercepted: bool) -> str | None:
        """Where the captive portal is that answers at the hub's address, or nothing. `intercepted`: TLS was."""
        ...

    def close(self, stream: Endpoint) -> None:
        """End it; unknown ones are ignored."""
        ...

    def vouch(self, stream: Endpoint) -> None:
        """On a hub: a member is behind it, so it may stay."""
        ...


class StateStore(Protocol):
    """Small named files of one network, each replaced atomically; reading what is not there gives None."""

    def read(self, name: str) -> bytes | None: ...

    def write(self, name: str, data: bytes, *, secret: bool = False) -> None:
        """Raises LocalError when the disk is full or refuses; the old content stands then."""
        ...

    def delete(self, name: str) -> None: ...


Renew = Callable[[Endpoint, bytes], Awaitable[bytes]]
"""(issuer's enrolment endpoint, request) -> answer, over TLS pinned to the issuer by what the request says."""


class KeyLog(Protocol):
    """Where keys are written for the owner's own analysis, if he asked for it."""

    def child(self, child: ChildSa) -> None: ...

    def line(self, table: str, line: str) -> None:
        """One line of one of Wireshark's tables, IKE's or ESP's."""
        ...


class Resolver(Protocol):
    """Turns the address of a hub, as the admin wrote it, into endpoints."""

    async def resolve(self, address: str, default_port: int) -> Sequence[Endpoint]:
        """Numeric endpoints of `host[:port]`, the best first; empty when the name has none."""
        ...
