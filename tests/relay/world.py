"""A relay in virtual time: the server's machine, a forwarder that does what it is told, and what left the relay."""

from __future__ import annotations

import random
from contextlib import suppress
from ipaddress import ip_address

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.errors import WireError
from p2pvpn.core.ids import PeerId
from p2pvpn.core.output import Output, Transmit
from p2pvpn.relay.client import RelayClient
from p2pvpn.relay.limits import RelayLimits
from p2pvpn.relay.server import Answer, Bind, ClosePair, Forward, RelayServer
from p2pvpn.relay.wire import is_bind

HUB = "198.51.100.1"
ALICE, BOB, MALLORY = (PeerId(bytes([number]) * 20) for number in (1, 2, 3))
ALICE_AT = Endpoint("192.0.2.10", 4500)
BOB_AT = Endpoint("203.0.113.20", 31234)
STRANGER_AT = Endpoint("203.0.113.99", 666)
LOCAL = Endpoint("10.0.0.2", 4500)


def entropy_of(seed: int):
    return random.Random(seed).randbytes


class Hub:
    """The server and its forwarder. `sent` holds (port, destination, bytes) in the order in which packets left."""

    def __init__(self, limits: RelayLimits | None = None) -> None:
        self.server = RelayServer(limits or RelayLimits(), entropy_of(1))
        self.now = 1000.0
        self.bound: dict[int, Endpoint] = {}
        self.twins: dict[int, int] = {}
        self.sent: list[tuple[int, Endpoint, bytes]] = []
        self.events: list[object] = []
        self.closed: list[int] = []
        self.next_port = 20000

    def allocate(self, known_a=None, known_b=None, owner_a=ALICE, owner_b=BOB):
        a, b = self.next_port, self.next_port + 1
        self.next_port += 2
        known = [ip_address(text) if text else None for text in (known_a, known_b)]
        allocation = self.server.allocate(a, b, owner_a, owner_b, known[0], known[1], self.now)
        self.twins |= {a: b, b: a}
        return allocation

    def receive(self, port: int, source: Endpoint, data: bytes) -> list[Output]:
        """A packet from the wire, as `mesh.ports.Forwarder` treats it."""
        twin = self.twins[port]
        if self.bound.get(port) == source and twin in self.bound and not is_bind(data):
            self.sent.append((twin, self.bound[twin], data))
            return []
        return self.do(self.server.handle(port, source, data, self.now))

    def do(self, outputs: list[Output]) -> list[Output]:
        for output in outputs:
            match output:
                case Bind(port, source):
                    self.bound[port] = source
                case Answer(port, to, data) | Forward(port, to, data):
                    self.sent.append((port, to, data))
                case ClosePair(port):
                    self.closed.append(port)
                    self.bound.pop(port, None)
                    self.bound.pop(self.twins[port], None)
                case event:
                    self.events.append(event)
        return outputs

    def take(self) -> list[tuple[int, Endpoint, bytes]]:
        sent, self.sent = self.sent, []
        return sent


class Peer:
    """A client behind a NAT that shows it as `seen_at`."""

    def __init__(self, hub: Hub, ticket, seen_at: Endpoint, seed: int = 7) -> None:
        self.hub = hub
        self.ticket = ticket
        self.seen_at = seen_at
        self.client = RelayClient(ticket, Path(LOCAL, Endpoint(HUB, ticket.port)), entropy_of(seed))
        self.events: list[object] = []
        self.requests: list[bytes] = []

    def do(self, outputs: list[Output], *, lose: int = 0) -> None:
        """Carry the client's packets to the hub and the answers back, losing the first `lose` requests."""
        waiting = list(outputs)
        while waiting:
            output = waiting.pop(0)
            if not isinstance(output, Transmit):
                self.events.append(output)
                continue
            self.requests.append(output.data)
            if lose:
                lose -= 1
                continue
            self.hub.receive(output.path.remote.port, self.seen_at, output.data)
            for port, to, data in list(self.hub.sent):
                if to == self.seen_at and port == self.ticket.port:
                    answer = self.client.handle(Path(LOCAL, Endpoint(HUB, port)), data, self.hub.now)
                    if answer is not None:
                        self.hub.sent.remove((port, to, data))
                        waiting += answer

    def bind(self) -> None:
        self.do(self.client.bind(self.hub.now))


def wire_errors_only(parse, data: bytes) -> None:
    """Call a parser; it may refuse in the one way that is allowed."""
    with suppress(WireError):
        parse(data)
