"""Our side of a tunnel to a stranger with the product's own drivers: shared port, IKE driver and plane.

It runs in a forked process inside a host of the laboratory, so that test and gateway share keys and certificates.
"""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
import os
import select
import signal
import time
import traceback
from typing import Any

from p2pvpn.core.address import Endpoint, Path, any_local
from p2pvpn.core.datagram import NON_ESP_MARKER, SPI_MARK, Kind, classify
from p2pvpn.core.output import Output
from p2pvpn.core.selector import Selector
from p2pvpn.host import planes
from p2pvpn.host.guard import Guard
from p2pvpn.host.netlink import Netlink
from p2pvpn.host.underlay import Underlay
from p2pvpn.ike.config import Credential, IkeSettings, Initiate
from p2pvpn.ike.endpoint import IkeEndpoint
from p2pvpn.ike.outputs import (
    ChildFailed,
    ChildRekeyed,
    Liveness,
    MoveFailed,
    SaClosed,
    SaEstablished,
    SaFailed,
    SaMoved,
    SaRekeyed,
)
from p2pvpn.lab.net import Node
from p2pvpn.mesh.ike_driver import IkeDriver

PORT = 4500
WAIT_S = 20.0
MTU = 1400
USER = planes.Choice("user")
TOLD = (SaEstablished, SaClosed, SaFailed, SaMoved, MoveFailed, SaRekeyed, ChildRekeyed, ChildFailed, Liveness)
"""Events that the test's process may wait for."""


class Gateway:
    """One gateway on `node` with `inner` as its address on the tunnel; `initiate` makes it begin.

    `settings` are those of its endpoint, and `wish` is what is special about the SAs that it begins.
    """

    def __init__(
        self,
        node: Node,
        credential: Credential,
        inner: str,
        routes: list[str],
        plane: planes.Choice = USER,
        *,
        settings: IkeSettings | None = None,
        **wish: Any,
    ) -> None:
        self.node = node
        self._plane = plane
        self._settings = settings if settings is not None else IkeSettings()
        self._wish = wish
        self._credential = credential
        self._inner = inner
        self._routes = routes
        self._reader, writer = os.pipe()
        commands, self._commands = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            code = 1
            try:
                with node.inside():
                    asyncio.run(self._serve(commands, writer))
                code = 0
            except BaseException:  # noqa: BLE001 (the forked process ends here, whatever happens)
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(writer)
        os.close(commands)
        self._buffer = b""

    # In the test's process.

    def initiate(self, remote: str) -> None:
        """Begin an SA with UDP 4500 of an address, for all that is routed into the tunnel."""
        os.write(self._commands, remote.encode() + b"\n")

    def rekey(self, what: str) -> None:
        """Rekey the IKE SA ("ike") or its Child SA ("child")."""
        os.write(self._commands, f"rekey {what}\n".encode())

    def move(self, local: str) -> None:
        """Take the SA to another address of ours (MOBIKE)."""
        os.write(self._commands, f"move {local}\n".encode())

    def wait_for(self, kind: str, timeout_s: float = WAIT_S) -> str:
        """The next event of that class. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        seen = []
        while True:
            while b"\n" in self._buffer:
                line, _, self._buffer = self._buffer.partition(b"\n")
                seen.append(line.decode())
                if line.decode().split()[0] == kind:
                    return line.decode()
            if not select.select([self._reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"no {kind}; seen: {seen}")
            data = os.read(self._reader, 65536)
            if not data:
                raise TimeoutError(f"the gateway ended; seen: {seen}")
            self._buffer += data

    def close(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End it, by SIGKILL without a chance to say so."""
        os.close(self._commands)
        os.close(self._reader)
        os.kill(self._pid, number)
        os.waitpid(self._pid, 0)

    # In the host.

    async def _serve(self, commands: int, writer: int) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        netlink = await Netlink.open()
        underlay = await Underlay.open(netlink, PORT)
        plane = planes.make(self._plane, underlay.esp_sockets, netlink, Guard())
        await plane.start()
        routes = [ipaddress.ip_network(route) for route in self._routes]
        await plane.open_network(self._credential.network, [ipaddress.ip_address(self._inner)], routes, MTU)
        children, spis = itertools.count(1), itertools.count(1)
        endpoint = IkeEndpoint(
            self._settings,
            os.urandom,
            lambda: next(children),
            lambda: SPI_MARK | int.from_bytes(os.urandom(3)) + next(spis),
        )
        endpoint.set_credentials([self._credential])

        def tell(output: Output) -> None:
            if isinstance(output, TOLD):
                os.write(writer, f"{type(output).__name__} {output!r}\n".replace("\n", " ").encode() + b"\n")

        driver = IkeDriver(endpoint, underlay, plane, tell)

        def receive(path: Path, data: bytes) -> None:
            if classify(data) is Kind.IKE:
                driver.receive(path, data[len(NON_ESP_MARKER) :])

        underlay.on_datagram = receive
        loop = asyncio.get_running_loop()
        orders: asyncio.Queue[bytes] = asyncio.Queue()
        loop.add_reader(commands, lambda: orders.put_nowait(os.read(commands, 65536)))
        os.write(writer, b"ready\n")
        task = asyncio.create_task(driver.run())
        while not task.done():
            line = await orders.get()
            if not line:
                return
            if line.startswith((b"rekey", b"move")):
                (sa,) = endpoint.sa_ids()
                if line.startswith(b"move"):
                    local = Endpoint.of(line.decode().split()[1], PORT)
                    path = endpoint.view(sa).path._replace(local=local)
                    driver.post(lambda now, sa=sa, path=path: endpoint.move(sa, path, now))
                elif line.endswith(b"ike\n"):
                    driver.post(lambda now, sa=sa: endpoint.rekey(sa, now))
                else:
                    (child,) = endpoint.view(sa).child_ids
                    driver.post(lambda now, sa=sa, child=child: endpoint.rekey_child(sa, child, now))
                continue
            wish: dict[str, Any] = {
                "local": self._credential.local_blocks,
                "remote": tuple(Selector.of_network(route) for route in self._routes),
                **self._wish,
            }
            path = any_local(Endpoint.of(line.decode().strip(), PORT), PORT)
            request = Initiate(credential=self._credential, path=path, remote_id=None, **wish)
            await driver.call(lambda now, request=request: endpoint.initiate(request, now))
