"""One port mapped at one router by UPnP: finds the router's service, maps, renews and deletes.

SSDP goes out from our address towards the router, to the multicast group and to the router itself (some answer only
that); only the router's own answers are read. Every exchange is one TCP connection of bounded size and time.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

from p2pvpn.core.address import Endpoint
from p2pvpn.core.errors import P2pvpnError, RemoteError, WireError
from p2pvpn.core.ports import Entropy
from p2pvpn.punch.portmap import http, upnp, xml
from p2pvpn.punch.portmap.mapping import MapProtocol, PortMapping

SEARCH_TRIES = 2
SEARCH_S = upnp.SEARCH_WAIT_S + 0.5
"""For answers to each try."""
EXCHANGE_TIMEOUT_S = 5.0
"""For connection, request and answer."""
LEASE_S = 3600
"""Asked for; renewed at half of it. Version 2 allows a week at most, and takes 0 for that."""
PORT_TRIES = 4
"""External ports that are tried before the router counts as full: ours, then random ones."""
FIRST_RANDOM_PORT = 10000
"""Above what people forward by hand."""
MULTICAST_TTL = 2
"""UPnP Device Architecture 1.1 section 1.3.2."""


class Igd:
    """The UPnP side of the router `gateway`; `local` is our endpoint towards it."""

    def __init__(self, gateway: str, local: Endpoint, entropy: Entropy, search_s: float = SEARCH_S) -> None:
        self.gateway = gateway
        self.local = local
        self.mapping: PortMapping | None = None
        self._entropy = entropy
        self._search_s = search_s
        self._service: upnp.Service | None = None

    async def map(self) -> float:
        """Map the port, or renew it. Returns the seconds until that wants to be done again; raises P2pvpnError."""
        try:
            if self._service is None:
                self._service = await self._discover()
            result = await self._call("GetExternalIPAddress", {})
            address = upnp.external_address_untrusted(result)
            former = self.mapping.external.port if self.mapping is not None else self.local.port
            port = await self._take_port(former)
        except P2pvpnError:
            self._service = self.mapping = None  # It may be another router now: begin from the search.
            raise
        self.mapping = PortMapping(MapProtocol.UPNP, self.gateway, self.local, Endpoint.of(address, port))
        return LEASE_S / 2

    async def unmap(self) -> None:
        """Take it back, if there is one; best effort."""
        mapping, self.mapping = self.mapping, None
        if mapping is not None and self._service is not None:
            with contextlib.suppress(P2pvpnError):
                await self._call("DeletePortMapping", upnp.deletion_arguments(mapping.external.port))

    async def _take_port(self, wanted: int) -> int:
        assert self._service is not None
        lease_s = LEASE_S
        if self._service.can_choose:
            arguments = upnp.mapping_arguments(wanted, self.local.port, self.local.host, lease_s)
            with contextlib.suppress(upnp.UpnpError):  # version 2 in name only: version 1 is left
                return upnp.reserved_port_untrusted(await self._call("AddAnyPortMapping", arguments))
        for _ in range(PORT_TRIES):
            arguments = upnp.mapping_arguments(wanted, self.local.port, self.local.host, lease_s)
            try:
                await self._call("AddPortMapping", arguments)
                return wanted
            except upnp.UpnpError as problem:
                if problem.code == upnp.ErrorCode.PERMANENT_ONLY and lease_s:
                    lease_s = 0  # It is deleted when we end, and overwritten when we come back.
                elif problem.code == upnp.ErrorCode.CONFLICT:
                    wanted = self._random_port()
                elif problem.code == upnp.ErrorCode.SAME_PORTS_ONLY and wanted != self.local.port:
                    wanted = self.local.port
                else:
                    raise
        raise RemoteError("UPnP: the router found no free port")

    def _random_port(self) -> int:
        return FIRST_RANDOM_PORT + int.from_bytes(self._entropy(2), "big") % (65536 - FIRST_RANDOM_PORT)

    # Exchanges.

    async def _discover(self) -> upnp.Service:
        url = await self._search()
        answer = await self._exchange(url, http.request("GET", url))
        return upnp.parse_description_untrusted(answer, url, self.gateway)

    async def _search(self) -> http.Url:
        """Where the router's description is. Raises RemoteError when it does not answer."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            try:
                sock.bind((self.local.host, 0))
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, MULTICAST_TTL)
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(self.local.host))
            except OSError as problem:
                raise RemoteError(f"UPnP: {problem.strerror}") from None
            for _ in range(SEARCH_TRIES):
                for device in upnp.GATEWAY_DEVICES:
                    for host in (upnp.GROUP, self.gateway):
                        with contextlib.suppress(OSError):
                            sock.sendto(upnp.search(device), (host, upnp.PORT))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._search_s):
                        return await self._hear(sock)
        raise RemoteError("the router does not answer UPnP")

    async def _hear(self, sock: socket.socket) -> http.Url:
        loop = asyncio.get_running_loop()
        while True:
            try:
                data, source = await loop.sock_recvfrom(sock, upnp.MAX_SEARCH_ANSWER_BYTES + 1)
            except OSError:
                continue  # a soft error of a datagram of ours
            if source[0] == self.gateway:
                with contextlib.suppress(WireError):
                    return upnp.parse_search_answer_untrusted(data, self.gateway)

    async def _call(self, action: str, arguments: dict[str, str]) -> xml.Element:
        assert self._service is not None
        headers, body = upnp.call(self._service, action, arguments)
        answer = await self._exchange(self._service.control, http.request("POST", self._service.control, headers, body))
        return upnp.parse_result_untrusted(answer, action)

    async def _exchange(self, url: http.Url, request: bytes) -> http.Answer:
        """One request and its answer. Raises RemoteError or WireError."""
        try:
            async with asyncio.timeout(EXCHANGE_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(url.host, url.port, local_addr=(self.local.host, 0))
                try:
                    writer.write(request)
                    data = b""
                    while len(data) <= http.MAX_ANSWER_BYTES and not http.is_complete_untrusted(data):
                        piece = await reader.read(http.MAX_ANSWER_BYTES)
                        if not piece:
                            break
                        data += piece
                finally:
                    writer.close()
        except (OSError, TimeoutError) as problem:
            raise RemoteError(f"UPnP: {problem or 'the router takes too long'}") from None
        return http.parse_answer_untrusted(data)
