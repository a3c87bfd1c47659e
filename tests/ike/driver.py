"""An endpoint on a real UDP socket and a real clock: what the engine's driver does, as small as it can be."""

from __future__ import annotations

import itertools
import os
import select
import socket
import time
from collections.abc import Callable, Iterable

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.datagram import NON_ESP_MARKER, SPI_MARK, Kind, classify
from p2pvpn.core.output import Event, Output, Transmit
from p2pvpn.ike.config import Credential, IkeSettings, Initiate
from p2pvpn.ike.endpoint import IkeEndpoint
from p2pvpn.lab.net import Node

PORT = 4500
PLAIN_PORT = 500
"""Where IKE has no marker in front (RFC 7296 section 2.23)."""


class Driver:
    """One endpoint on `node`, with a socket per local address."""

    def __init__(self, node: Node, addresses: Iterable[str], credentials: Iterable[Credential], **settings) -> None:
        self.sockets: dict[Endpoint, socket.socket] = {}
        for address, port in itertools.product(addresses, (PORT, PLAIN_PORT)):
            sock = node.socket()
            sock.bind((address, port))
            sock.setblocking(False)
            self.sockets[Endpoint.of(address, port)] = sock
        children, spis = itertools.count(1), itertools.count(1)
        self.ike = IkeEndpoint(
            IkeSettings(**settings), os.urandom, lambda: next(children), lambda: SPI_MARK | next(spis)
        )
        self.ike.set_credentials(tuple(credentials))
        self.log: list[Output] = []
        self.lose: Callable[[bytes], bool] = lambda data: False
        self.other: list[bytes] = []

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *exc: object) -> None:
        for sock in self.sockets.values():
            sock.close()

    @property
    def now(self) -> float:
        return time.monotonic()

    def path(self, remote: str, local: str | None = None) -> Path:
        own = Endpoint.of(local, PORT) if local else next(iter(self.sockets))
        return Path(own, Endpoint.of(remote, PORT))

    def initiate(self, request: Initiate) -> int:
        sa, out = self.ike.initiate(request, self.now)
        self.execute(out)
        return sa

    def execute(self, outputs: list[Output]) -> None:
        for one in outputs:
            self.log.append(one)
            if isinstance(one, Transmit) and not self.lose(one.data):
                marker = b"" if one.path.local.port == PLAIN_PORT else NON_ESP_MARKER
                self.sockets[one.path.local].sendto(marker + one.data, tuple(one.path.remote))

    def events(self, kind: type = Event) -> list:
        return [one for one in self.log if isinstance(one, kind)]

    def run(self, until: Callable[[], bool], timeout_s: float = 15.0) -> None:
        """Work until something is true. Raises TimeoutError with the events so far."""
        deadline = self.now + timeout_s
        while not until():
            if self.now > deadline:
                raise TimeoutError(f"it did not happen: {self.events()}")
            due = self.ike.next_deadline()
            wait = min(0.2, max(0.0, (due if due is not None else deadline) - self.now))
            readable, _, _ = select.select(list(self.sockets.values()), [], [], wait)
            for local, sock in self.sockets.items():
                if sock in readable:
                    self._read(local, sock)
            self.execute(self.ike.tick(self.now))

    def _read(self, local: Endpoint, sock: socket.socket) -> None:
        data, source = sock.recvfrom(65535)
        if local.port == PORT:
            if classify(data) is not Kind.IKE:
                self.other.append(data)
                return
            data = data[len(NON_ESP_MARKER) :]
        path = Path(local, Endpoint.of(*source[:2]))
        self.execute(self.ike.handle(path, data, self.now))
