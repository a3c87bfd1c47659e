"""Drives the IKE machine: one input at a time, every output executed before the next input.

Installing an SA may have to wait for the plane, so inputs stand in a bounded queue and one task works through it. The
order is what makes "install the inbound SA, then answer" true.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from ipaddress import IPv6Address
from typing import TypeVar

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.datagram import KEEPALIVE, NON_ESP_MARKER
from p2pvpn.core.errors import P2pvpnError
from p2pvpn.core.output import Output, Transmit
from p2pvpn.ike.endpoint import IkeEndpoint
from p2pvpn.ike.notifies import Notify
from p2pvpn.ike.outputs import InstallChild, MoveChild, RemoveChild, SaClosed, SendKeepalive, UseChild

from .ports import Plane, Underlay

log = logging.getLogger(__name__)

T = TypeVar("T")
MAX_QUEUED_DATAGRAMS = 2000
"""A tenth of a second of a flood; honest peers retransmit."""
IKE_PORT_WITHOUT_MARKER = 500

Step = Callable[[float], list[Output]]


def carried_path(local: IPv6Address, remote: IPv6Address) -> Path:
    """Between two overlay addresses, for messages inside a call. Port 0 is nobody's: nothing is sent over it."""
    return Path(Endpoint(str(local), 0), Endpoint(str(remote), 0))


def is_carried(path: Path) -> bool:
    return not path.remote.port


class IkeDriver:
    """`on_output` gets events and effects in order, after the plane has executed the effect."""

    def __init__(
        self, endpoint: IkeEndpoint, underlay: Underlay, plane: Plane, on_output: Callable[[Output], None]
    ) -> None:
        self.endpoint = endpoint
        self._underlay = underlay
        self._plane = plane
        self._on_output = on_output
        self._loop = asyncio.get_running_loop()
        self._steps: asyncio.Queue[Step] = asyncio.Queue()
        self._datagrams = 0
        self._timer: asyncio.TimerHandle | None = None
        self._tick_queued = False

    async def run(self) -> None:
        """Work through the inputs until cancelled."""
        try:
            while True:
                step = await self._steps.get()
                try:
                    outputs = step(self._loop.time())
                except P2pvpnError as problem:
                    log.warning("IKE: %s", problem)
                else:
                    await self._execute(outputs)
                self._arm()
        finally:
            if self._timer is not None:
                self._timer.cancel()

    def receive(self, path: Path, data: bytes) -> None:
        """A datagram without its non-ESP marker; dropped when too many wait."""
        if self._datagrams >= MAX_QUEUED_DATAGRAMS:
            return
        self._datagrams += 1
        self._steps.put_nowait(lambda now: self._handle(path, data, now))

    def _handle(self, path: Path, data: bytes, now: float) -> list[Output]:
        self._datagrams -= 1
        return self.endpoint.handle(path, data, now)

    def post(self, step: Step) -> None:
        """Queue a call of the machine whose outputs are executed in turn."""
        self._steps.put_nowait(step)

    async def call(self, step: Callable[[float], tuple[T, list[Output]]]) -> T:
        """Like `post`, and returns the call's own result once its outputs are executed."""
        done: asyncio.Future[T] = self._loop.create_future()

        def run(now: float) -> list[Output]:
            try:
                result, outputs = step(now)
            except P2pvpnError as problem:
                if not done.done():
                    done.set_exception(problem)
                return []
            if not done.done():
                done.set_result(result)
            return outputs

        self._steps.put_nowait(run)
        return await done

    async def carried(self, path: Path, step: Callable[[float], tuple[T, list[Output]]]) -> tuple[T, bytes]:
        """Like `call`, and returns also the first message that goes over `path`, which somebody else carries."""
        messages: list[bytes] = []

        def run(now: float) -> tuple[T, list[Output]]:
            result, outputs = step(now)
            messages.extend(one.data for one in outputs if isinstance(one, Transmit) and one.path == path)
            return result, outputs

        result = await self.call(run)
        return result, messages[0] if messages else b""

    async def drained(self) -> None:
        """Wait until everything queued so far is executed."""
        await self.call(lambda now: (None, []))

    def inform(self, sa_id: int, notifies: tuple[Notify, ...]) -> None:
        """Tell the peer something in an INFORMATIONAL exchange."""
        self.post(lambda now: self.endpoint.inform(sa_id, notifies, now))

    def heard(self, sa_id: int) -> None:
        """ESP of the SA came in: its peer lives."""
        self.post(lambda now: self.endpoint.heard(sa_id, now))

    def trust_silence(self, sa_id: int, liveness_s: float) -> None:
        """Ask this peer whether it lives only after so long a silence."""
        self.post(lambda now: self.endpoint.trust_silence(sa_id, liveness_s, now))

    def probe(self, sa_id: int) -> None:
        """Ask whether the peer lives."""
        self.post(lambda now: self.endpoint.probe(sa_id, now))

    def resend(self, sa_id: int) -> None:
        """Send the request under way once more, now."""
        self.post(lambda now: self.endpoint.resend(sa_id, now))

    def close(self, sa_id: int, reason: str) -> None:
        """Delete an SA."""
        self.post(lambda now: self.endpoint.close(sa_id, now, reason))

    def move(self, sa_id: int, path: Path, *, eager: bool = False) -> None:
        """Take an SA that we initiated to another path; `eager` when the old one is dead."""
        self.post(lambda now: self.endpoint.move(sa_id, path, now, eager=eager))

    def appeal(self, sa_id: int, path: Path, notifies: tuple[Notify, ...]) -> None:
        """Have an SA that the peer initiated moved to another path."""
        self.post(lambda now: self.endpoint.appeal(sa_id, path, notifies, now))

    def drop(self, sa_id: int, reason: str) -> None:
        """Forget an SA without a word to the peer."""
        self.post(lambda now: [*self.endpoint.drop(sa_id), SaClosed(sa_id, reason)])

    async def _execute(self, outputs: list[Output]) -> None:
        for output in outputs:
            match output:
                case Transmit(path) if is_carried(path):
                    pass
                case Transmit(path, data):
                    marker = b"" if path.local.port == IKE_PORT_WITHOUT_MARKER else NON_ESP_MARKER
                    self._underlay.send(path, marker + data)
                case SendKeepalive(path=path):
                    self._underlay.send(path, KEEPALIVE)
                case InstallChild(child=child):
                    await self._try("installed", child.id, self._plane.install(child))
                    self._on_output(output)
                case UseChild(child_id=child_id):
                    await self._try("used", child_id, self._plane.use(child_id))
                    self._on_output(output)
                case MoveChild(child_id=child_id, path=path):
                    await self._try("moved", child_id, self._plane.move(child_id, path))
                    self._on_output(output)
                case RemoveChild(child_id=child_id):
                    await self._try("removed", child_id, self._plane.remove(child_id))
                    self._on_output(output)
                case _:
                    self._on_output(output)

    async def _try(self, what: str, child_id: int, effect: Awaitable[None]) -> None:
        """A plane that refuses, or died a moment ago, must not end the IKE machine: `plane_died` starts over."""
        try:
            await effect
        except P2pvpnError as problem:
            log.error("SA %d could not be %s: %s", child_id, what, problem)

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self.endpoint.next_deadline()
        if deadline is not None and not self._tick_queued:
            self._timer = self._loop.call_at(max(deadline, self._loop.time()), self._tick)

    def _tick(self) -> None:
        self._tick_queued = True
        self._steps.put_nowait(self._run_tick)

    def _run_tick(self, now: float) -> list[Output]:
        self._tick_queued = False
        return self.endpoint.tick(now)
