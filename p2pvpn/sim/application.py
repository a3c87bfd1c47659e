"""Traffic over the overlay, and what became of it: numbered pings, and paced packets in one direction."""

from __future__ import annotations

import asyncio
import ipaddress
import struct
from dataclasses import dataclass, field
from itertools import pairwise

from p2pvpn.core.address import Endpoint, IpAddress

from .host import SimHost
from .sockets import SimTransport

PING_BYTES = 56
"""Echo data, as ping(8) sends by default."""
MAX_SEQUENCE = 0xFFFF
FLOW_PORT = 5201
_NUMBERED = struct.Struct("!Id")


@dataclass(slots=True)
class Report:
    """Counts of one run. Times in seconds; `rtts_s` by sequence number, instants in virtual monotonic time."""

    started_at: float
    sent: int = 0
    rtts_s: dict[int, float] = field(default_factory=dict)
    """Round trips of pings, one-way delays of a flow."""
    arrived_at: dict[int, float] = field(default_factory=dict)
    duplicates: int = 0
    reordered: int = 0
    """Arrivals with a number below the highest so far."""

    @property
    def answered(self) -> int:
        return len(self.rtts_s)

    @property
    def lost(self) -> list[int]:
        """Sequence numbers that never came back."""
        return [number for number in range(self.sent) if number not in self.rtts_s]

    @property
    def first_answer_s(self) -> float | None:
        """From the start of the run to the first answer."""
        return min(self.arrived_at.values()) - self.started_at if self.arrived_at else None

    @property
    def longest_gap_s(self) -> float:
        """The longest time between two arrivals that followed each other."""
        at = sorted(self.arrived_at.values())
        return max((later - earlier for earlier, later in pairwise(at)), default=0.0)

    def arrive(self, number: int, sent_at: float, now: float) -> None:
        if number in self.rtts_s:
            self.duplicates += 1
            return
        self.reordered += bool(self.rtts_s) and number < max(self.rtts_s)
        self.rtts_s[number] = now - sent_at
        self.arrived_at[number] = now

    def __str__(self) -> str:
        lost = self.lost
        first = self.first_answer_s
        return (
            f"{self.sent} sent, {self.answered} answered, {len(lost)} lost"
            + (f" {lost[:6]}" if lost else "")
            + ("" if first is None else f", first after {first * 1e3:.1f} ms")
        )


class Pinger:
    """Pings an overlay address every `interval_s`, `count` times, or until `stop` if count is None.

    Answers are taken until `wait_s` after the last ping. `report` may be read at any time.
    """

    def __init__(
        self,
        host: SimHost,
        destination: IpAddress | str,
        *,
        count: int | None = 1,
        interval_s: float = 1.0,
        wait_s: float = 2.0,
        network: str | None = None,
        size: int = PING_BYTES,
    ) -> None:
        if count is not None and not 1 <= count <= MAX_SEQUENCE:
            raise ValueError(f"{count} pings cannot be numbered")
        self.report = Report(host.loop.time())
        self._host = host
        self._destination = ipaddress.ip_address(destination)
        self._count = count
        self._interval_s = interval_s
        self._wait_s = wait_s
        self._network = network
        self._data = bytes(size)
        self._stopped = asyncio.Event()
        self._complete = asyncio.Event()
        self._sent_at: dict[int, float] = {}
        self._task = host.spawn(self._run(), f"ping {destination}")

    async def done(self) -> Report:
        """Wait for the end of the run."""
        await self._task
        return self.report

    async def stop(self) -> Report:
        """Send no more, wait for what is on its way."""
        self._stopped.set()
        return await self.done()

    async def _run(self) -> None:
        stack = self._host.stack(self._network)
        identifier = stack.expect_echoes(self._answered)
        loop = self._host.loop
        try:
            while (self._count is None or self.report.sent < self._count) and not self._stopped.is_set():
                number = self.report.sent
                self._sent_at[number] = loop.time()
                self.report.sent += 1
                stack.send_echo(self._destination, identifier, number & MAX_SEQUENCE, self._data)
                if self.report.sent != self._count:
                    await _wait(self._stopped, self._interval_s)
            if self.report.answered < self.report.sent:
                await _wait(self._complete, self._wait_s)
        finally:
            stack.forget_echoes(identifier)

    def _answered(self, sequence: int, data: bytes) -> None:
        number = self.report.sent - 1 - ((self.report.sent - 1 - sequence) & MAX_SEQUENCE)
        sent_at = self._sent_at.get(number)
        if sent_at is not None and data == self._data:
            self.report.arrive(number, sent_at, self._host.loop.time())
            over = self._stopped.is_set() or self.report.sent == self._count
            if over and self.report.answered == self.report.sent:
                self._complete.set()


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Until the event or for so long."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return


async def ping(
    host: SimHost, destination: IpAddress | str, *, count: int = 1, interval_s: float = 1.0, wait_s: float = 2.0
) -> Report:
    """A whole run of pings."""
    return await Pinger(host, destination, count=count, interval_s=interval_s, wait_s=wait_s).done()


class Flow:
    """Numbered UDP packets from one host to another, paced at `rate` packets a second, `size` bytes of data each.

    `report.rtts_s` holds one-way delays: both ends are on one virtual clock.
    """

    def __init__(
        self,
        source: SimHost,
        sink: SimHost,
        *,
        rate: float = 50.0,
        count: int = 100,
        size: int = 200,
        port: int = FLOW_PORT,
        network: str | None = None,
        ipv6: bool = True,
    ) -> None:
        self.report = Report(source.loop.time())
        self._source = source
        self._sink = sink
        self._interval_s = 1.0 / rate
        self._count = count
        self._padding = bytes(max(0, size - _NUMBERED.size))
        stacks = source.stack(network), sink.stack(network)
        like = ipaddress.ip_address("::" if ipv6 else "0.0.0.0")  # noqa: S104 (names the family)
        self._from = (str(stacks[0].source_for(like)), 0)
        self._to = Endpoint(str(stacks[1].source_for(like)), port)
        self._inlet: SimTransport = stacks[0].open_udp(asyncio.DatagramProtocol(), self._from, None)
        self._outlet: SimTransport = stacks[1].open_udp(_Sink(self), (self._to.host, port), None)
        self._task = source.spawn(self._run(), f"flow to {sink.name}")

    async def done(self, wait_s: float = 2.0) -> Report:
        """Wait until everything is sent, and `wait_s` longer for what is on its way."""
        await self._task
        await asyncio.sleep(wait_s)
        self._inlet.close()
        self._outlet.close()
        return self.report

    async def _run(self) -> None:
        loop = self._source.loop
        for number in range(self._count):
            self.report.sent += 1
            self._inlet.sendto(_NUMBERED.pack(number, loop.time()) + self._padding, self._to)
            await asyncio.sleep(self._interval_s)


class _Sink(asyncio.DatagramProtocol):
    """The far end of a flow."""

    def __init__(self, flow: Flow) -> None:
        self._report = flow.report
        self._loop = flow._sink.loop

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        number, sent_at = _NUMBERED.unpack_from(data)
        self._report.arrive(number, sent_at, self._loop.time())
