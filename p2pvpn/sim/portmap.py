"""Port mapping in the simulation: the PCP server of a router (RFC 6887), and the machine's port towards it.

The server knows MAP of UDP over IPv4, ANNOUNCE, and the errors that a client meets. What it forwards is in `Forwards`,
which goes before the NAT's own mappings. The wire format is written here a second time, so that the one checks the
other.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.output import Output
from p2pvpn.mesh.ports import PortMapStatus
from p2pvpn.mesh.pump import Pump
from p2pvpn.punch.portmap.client import GatewayClient
from p2pvpn.punch.portmap.mapping import PortMapping

if TYPE_CHECKING:
    from .host import SimHost

PCP_PORT = 5351
FLOW_S = 300.0
"""How long a router remembers who came in by a forwarded port."""
MIN_LIFETIME_S, MAX_LIFETIME_S = 120, 86400
_REQUEST = struct.Struct("!BBHI16s")
_MAP = struct.Struct("!12sB3xHH16s")
_RESPONSE = struct.Struct("!BBBBII12x")
_SUCCESS, _UNSUPP_VERSION, _NOT_AUTHORIZED, _UNSUPP_OPCODE, _ADDRESS_MISMATCH = 0, 1, 2, 4, 12


@dataclass(slots=True)
class _Forward:
    inside: Endpoint
    nonce: bytes
    expires_at: float


class Forwards:
    """External endpoints that belong to an inside one for good, and the flows that came in by them."""

    def __init__(self) -> None:
        self._by_external: dict[Endpoint, _Forward] = {}
        self._flows: dict[tuple[Endpoint, Endpoint], tuple[Endpoint, float]] = {}

    def translate_in(self, remote: Endpoint, external: Endpoint, now: float) -> Endpoint | None:
        """The inside endpoint of a packet to a forwarded port; None for any other."""
        forward = self._by_external.get(external)
        if forward is None or forward.expires_at <= now:
            return None
        self._flows[forward.inside, remote] = (external, now)
        return forward.inside

    def translate_out(self, source: Endpoint, remote: Endpoint, now: float) -> Endpoint | None:
        """What an answer within such a flow leaves as; None when there is no flow."""
        external, used_at = self._flows.get((source, remote), (None, 0.0))
        if external is None or now - used_at >= FLOW_S:
            return None
        self._flows[source, remote] = (external, now)
        return external

    def owner(self, external: Endpoint, now: float) -> _Forward | None:
        forward = self._by_external.get(external)
        return forward if forward is not None and forward.expires_at > now else None

    def add(self, external: Endpoint, inside: Endpoint) -> None:
        """Forward by hand, for good, as owners do on their router's web page."""
        self._by_external[external] = _Forward(inside, b"", math.inf)

    def put(self, external: Endpoint, forward: _Forward) -> None:
        self._by_external[external] = forward

    def find(self, inside: Endpoint, now: float) -> Endpoint | None:
        return next((e for e, f in self._by_external.items() if f.inside == inside and f.expires_at > now), None)

    def remove(self, external: Endpoint) -> None:
        self._by_external.pop(external, None)

    def clear(self) -> None:
        self._by_external.clear()
        self._flows.clear()


class PcpServer:
    """`public` gives the router's outer IPv4 address, `is_free` says whether the NAT uses an external endpoint for
    another inside one."""

    def __init__(
        self, forwards: Forwards, public: Callable[[], str], is_free: Callable[[Endpoint, Endpoint], bool]
    ) -> None:
        self.forwards = forwards
        self.refuses = False
        """Answers NOT_AUTHORIZED, as routers do whose owner turned it off."""
        self._public = public
        self._is_free = is_free
        self._started_at = 0.0

    def restart(self, now: float) -> None:
        """The router lost its memory."""
        self.forwards.clear()
        self._started_at = now

    def handle(self, source: Endpoint, data: bytes, now: float) -> bytes | None:
        """The answer to a request from inside; None for what is no request."""
        if len(data) < 4 or data[1] & 0x80:
            return None
        if data[0] != 2 or len(data) < _REQUEST.size:
            return self._response(data[1], _UNSUPP_VERSION, 1800, now)
        _, opcode, _, lifetime_s, client = _REQUEST.unpack_from(data)
        if opcode != 1 or len(data) < _REQUEST.size + _MAP.size:
            return self._response(opcode, _SUCCESS if opcode == 0 else _UNSUPP_OPCODE, 0, now)
        body = data[_REQUEST.size : _REQUEST.size + _MAP.size]
        nonce, protocol, port, suggested_port, _ = _MAP.unpack(body)
        if client != _mapped(source.host):
            return self._response(opcode, _ADDRESS_MISMATCH, 1800, now) + body
        if self.refuses:
            return self._response(opcode, _NOT_AUTHORIZED, 1800, now) + body
        inside = Endpoint(source.host, port)
        if lifetime_s == 0:
            held = self.forwards.find(inside, now)
            if held is not None:
                self.forwards.remove(held)
            return self._response(opcode, _SUCCESS, 0, now) + body
        external = self.forwards.find(inside, now) or self._choose(inside, suggested_port, now)
        lifetime_s = min(max(lifetime_s, MIN_LIFETIME_S), MAX_LIFETIME_S)
        self.forwards.put(external, _Forward(inside, nonce, now + lifetime_s))
        answer = _MAP.pack(nonce, protocol, port, external.port, _mapped(external.host))
        return self._response(opcode, _SUCCESS, lifetime_s, now) + answer

    def _choose(self, inside: Endpoint, suggested_port: int, now: float) -> Endpoint:
        external = Endpoint(self._public(), suggested_port or inside.port)
        while self.forwards.owner(external, now) is not None or not self._is_free(external, inside):
            external = Endpoint(external.host, external.port % 65535 + 1)
        return external

    def _response(self, opcode: int, result: int, lifetime_s: int, now: float) -> bytes:
        return _RESPONSE.pack(2, 0x80 | opcode, 0, result, lifetime_s, int(now - self._started_at))


class SimPortMapper:
    """mesh.ports.PortMapper: asks the gateway of the LAN that the host is in."""

    on_change: Callable[[], None]
    is_on = True

    def __init__(self, host: SimHost) -> None:
        self.on_change = _ignore_change
        self._host = host
        self._port = 0
        self._own_port = 0
        self._client: GatewayClient | None = None
        self._pump: Pump | None = None

    def start(self, port: int) -> None:
        self._port = port
        self._own_port = self._host.sockets.bind(None, 0, self._receive)
        self.network_changed()

    def mappings(self) -> Sequence[PortMapping]:
        return [self._client.mapping] if self._client is not None and self._client.mapping is not None else []

    def status(self) -> Sequence[PortMapStatus]:
        client = self._client
        return [] if client is None else [PortMapStatus(client.gateway, client.mapping, client.reason)]

    def network_changed(self) -> None:
        way = self._way()
        client = self._client
        if client is None or way != (client.local.host, client.gateway):
            if self._pump is not None:
                self._pump.close()
            if way is None:
                self._client = self._pump = None
                return
            client = self._client = GatewayClient(
                local=Endpoint(way[0], self._port), gateway=way[1], entropy=self._host.entropy
            )
            self._pump = Pump(client, self, self._on_output)
        assert self._pump is not None
        self._pump.feed(client.start(self._pump.now))

    def send(self, path: Path, data: bytes) -> None:
        self._host.send(Endpoint(path.local.host, self._own_port), path.remote, data)

    def _way(self) -> tuple[str, str] | None:
        """Our address and the gateway's, of the first LAN that has one."""
        for interface in self._host.interfaces:
            gateway = interface.segment.gateway
            local = interface.host(ipv6=False)
            if interface.is_up and gateway is not None and local is not None:
                address = gateway.host(ipv6=False)
                if address is not None:
                    return local, address
        return None

    def _receive(self, local: Endpoint, remote: Endpoint, data: bytes) -> None:
        if self._client is not None and self._pump is not None:
            self._pump.feed(self._client.handle(remote, data, asyncio.get_running_loop().time()))

    def _on_output(self, output: Output) -> None:
        self.on_change()


def _mapped(host: str) -> bytes:
    return bytes(10) + b"\xff\xff" + ipaddress.IPv4Address(host).packed


def _ignore_change() -> None:
    """Before the engine listens."""
