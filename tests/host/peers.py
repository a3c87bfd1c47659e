"""Two machines with the real user plane, each told what to do over pipes; for tests in a laboratory."""

from __future__ import annotations

import asyncio
import json
import os
import random
import select
import signal
import sys
import time
import traceback

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.child import ChildSa, EspSuite
from p2pvpn.core.secret import Secret
from p2pvpn.core.selector import Selector
from p2pvpn.lab.net import Lab, Node
from tools.bench import endpoint
from tools.bench.endpoint import encode_child

PORT = 4500
PUBLIC = {"a": ("192.0.2.10", "2001:db8::10"), "b": ("192.0.2.20", "2001:db8::20"), "c": ("192.0.2.30", "2001:db8::30")}
INNER = {"a": ("10.9.0.1", "fd00:9::1"), "b": ("10.9.0.2", "fd00:9::2"), "c": ("10.9.0.3", "fd00:9::3")}
ROUTES = ("10.9.0.0/16", "fd00:9::/48")
WAIT_S = 20.0


class Refusal(Exception):
    """The other process answered with an error."""


class _Process:
    """A fork of this one in a node's namespace, with the port and the plane: it has imported everything already."""

    def __init__(self, node: Node, port: int, plane: str) -> None:
        ours_in, self._stdin = os.pipe()
        self.stdout, ours_out = os.pipe()
        os.set_blocking(self.stdout, False)
        self.status: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            os.close(ours_in)
            os.close(ours_out)
            return
        try:
            with node.inside():
                os.dup2(ours_in, 0)
                os.dup2(ours_out, 1)
                os.closerange(3, 1024)
                sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
                asyncio.run(endpoint.serve(port, plane))
        except BaseException:  # noqa: BLE001 (the forked process ends here, whatever happens)
            traceback.print_exc()
        finally:
            os._exit(1)

    def write(self, line: str) -> None:
        os.write(self._stdin, line.encode() + b"\n")

    def wait(self, timeout_s: float = WAIT_S) -> None:
        """Until it has ended. Raises TimeoutError."""
        if self.status is None:
            pidfd = os.pidfd_open(self.pid)
            ended = select.select([pidfd], [], [], timeout_s)[0]
            os.close(pidfd)
            if not ended:
                raise TimeoutError
            _, self.status = os.waitpid(self.pid, 0)

    def close(self) -> None:
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
        os.close(self._stdin)
        os.close(self.stdout)


class Peer:
    """A process in a node's namespace that has the port and the plane."""

    def __init__(self, node: Node, port: int = PORT, plane: str = "user") -> None:
        self.node = node
        self.events: list[tuple[str, list]] = []
        self.process = _Process(node, port, plane)
        self._buffer = b""
        self.port = self._answer()
        self.device = ""
        self.worker = 0

    def ask(self, *command):
        """Carry a command out in the process and give its answer. Raises Refusal."""
        self.process.write(json.dumps(command))
        return self._answer()

    def open(self, mtu: int = 1400) -> None:
        """Start the worker and open the network with this peer's inner addresses."""
        self.worker = self.ask("start")
        self.device = self.ask("open", INNER[self.node.name], ROUTES, mtu)

    def wait_for(self, name: str) -> list:
        """The arguments of the next event of that name."""
        while True:
            for number, (event, arguments) in enumerate(self.events):
                if event == name:
                    del self.events[number]
                    return arguments
            self._take(self._line())

    def _answer(self):
        while True:
            message = self._take(self._line())
            if message is not None:
                if "error" in message:
                    raise Refusal(message["error"])
                return message["answer"]

    def _take(self, line: bytes) -> dict | None:
        message = json.loads(line)
        if "event" in message:
            self.events.append((message["event"], message["arguments"]))
            return None
        return message

    def _line(self) -> bytes:
        deadline = time.monotonic() + WAIT_S
        fd = self.process.stdout
        while b"\n" not in self._buffer:
            if not select.select([fd], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise AssertionError(f"{self.node}: no word from the process")
            data = os.read(fd, 65536)
            if not data:
                raise AssertionError(f"{self.node}: the process ended")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def close(self) -> None:
        self.process.close()


def link(lab: Lab) -> tuple[Node, Node]:
    """Hosts a and b on one wire, without the router between them."""
    one, other = lab.node("a"), lab.node("b")
    lab.link(one, "wire", other, "wire")
    for node in (one, other):
        v4, v6 = PUBLIC[node.name]
        node.ip(f"addr add {v4}/24 dev wire\naddr add {v6}/64 dev wire nodad")
    return one, other


def path(source: str, destination: str, *, ipv6: bool = False) -> Path:
    return Path(Endpoint(PUBLIC[source][ipv6], PORT), Endpoint(PUBLIC[destination][ipv6], PORT))


def children(
    child_id: int = 1,
    *,
    one: str = "a",
    other: str = "b",
    suite: EspSuite = EspSuite.AES_GCM_16_256,
    outer_ipv6: bool = False,
    esn: bool = False,
    mtu: int = 1400,
    left: tuple[str, ...] | None = None,
    right: tuple[str, ...] | None = None,
) -> tuple[ChildSa, ChildSa]:
    """Both ends of a Child SA between two hosts."""
    draw = random.Random(child_id)
    forth, back = Secret(draw.randbytes(suite.keymat_bytes)), Secret(draw.randbytes(suite.keymat_bytes))
    near = tuple(Selector.of_network(net) for net in left or INNER[one])
    far = tuple(Selector.of_network(net) for net in right or INNER[other])
    spi_one, spi_other = 0xC0000100 | child_id, 0xC0000200 | child_id
    paths = path(one, other, ipv6=outer_ipv6), path(other, one, ipv6=outer_ipv6)
    ours = ChildSa(child_id, "bench", suite, spi_one, spi_other, back, forth, near, far, paths[0], esn=esn, mtu=mtu)
    theirs = ChildSa(child_id, "bench", suite, spi_other, spi_one, forth, back, far, near, paths[1], esn=esn, mtu=mtu)
    return ours, theirs


def connect(one: Peer, other: Peer, pair: tuple[ChildSa, ChildSa]) -> None:
    """Install both ends and use them."""
    for peer, child in zip((one, other), pair, strict=True):
        peer.ask("install", encode_child(child))
    for peer, child in zip((one, other), pair, strict=True):
        peer.ask("use", child.id)
