"""A simulated machine: its interfaces, its shared UDP socket, and everything of it that a crash takes away.

    application -> overlay stack -> SimPlane (real ESP) -\\
                                                          SimHost -> interfaces -> segments
    mesh engine -> SimUnderlay --------------------------/

`SimHost` owns the ports of `mesh.ports`: `underlay`, `plane`, `forwarder`, `streams`, `store`. What runs on the host is
known by its context: `spawn` starts it, and every task and timer that comes of it belongs to the host. `crash()` takes
all sockets away without a word and ends those tasks and timers; `restart()` gives new ports, with the store as it was
unless lost. `suspend()` stops everything as it is, and `resume()` goes on with it.
"""

from __future__ import annotations

import asyncio
import contextvars
import errno
import ipaddress
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from p2pvpn.core.address import Endpoint, IpNetwork, Path
from p2pvpn.core.errors import LocalError

from .forwarder import SimForwarder
from .internet import LAN, Datagram, Fate, Interface, Internet, Quality, Segment
from .loop import HostClock, SeededEntropy, SimWallClock, host_clock
from .overlay import OverlayStack
from .plane import SimPlane
from .portmap import SimPortMapper
from .sockets import SimTransport, SocketTable
from .streams import SimStreams

T = TypeVar("T")

current_host: contextvars.ContextVar[SimHost | None] = contextvars.ContextVar("current_host", default=None)
"""Whose code is running: sockets that are bound to no particular address are opened on this host."""

UNDERLAY_PORT = 4500


class SimUnderlay:
    """mesh.ports.Underlay: the control half of the SO_REUSEPORT pair; ESP goes to the plane."""

    on_datagram: Callable[[Path, bytes], None]
    screen: Callable[[tuple[str, int], bytes], bytes | None]
    on_change: Callable[[], None]
    on_resume: Callable[[float], None]

    def __init__(self, host: SimHost, ports: Sequence[int]) -> None:
        self.on_datagram = _ignore_datagram
        self.screen = _screen_nothing
        self.on_change = _ignore_change
        self.on_resume = _ignore_resume
        self.ports = tuple(ports)
        """Port numbers that the socket listens on: the shared one first, then those where only STUN is answered."""
        self.extra_ports: set[int] = set()
        self._host = host
        self._closed = False
        for port in self.ports:
            host.sockets.bind(None, port, self._receive)

    @property
    def port(self) -> int:
        return self.ports[0]

    def listen_at(self, ports: Sequence[int]) -> Sequence[int]:
        for port in ports:
            if port not in self.ports:
                self._host.sockets.bind(None, port, self._receive)
                self.ports = (*self.ports, port)
        return ports

    def open_probe(self, ipv6: bool) -> int:
        port = self._host.sockets.bind(None, 0, self._receive)
        self.ports = (*self.ports, port)
        return port

    def close_probe(self, port: int) -> None:
        self._host.sockets.unbind(None, port)
        self.ports = tuple(known for known in self.ports if known != port)

    def send(self, path: Path, data: bytes) -> None:
        if not self._closed and (path.local.port in self.ports or path.local.port in self.extra_ports):
            self._host.send(path.local, path.remote, data)

    def open_extra(self, count: int) -> Sequence[int]:
        ports = [] if self._closed else [self._host.sockets.bind(None, 0, self._receive) for _ in range(count)]
        self.extra_ports.update(ports)
        return ports

    def close_extra(self, port: int) -> None:
        if port in self.extra_ports:
            self.extra_ports.remove(port)
            self._host.sockets.unbind(None, port)

    def local_endpoints(self) -> Sequence[Endpoint]:
        return [
            Endpoint(host, self.port)
            for interface in self._host.interfaces
            if interface.is_up
            for host in interface.hosts
        ]

    def local_networks(self) -> Sequence[IpNetwork]:
        return [
            next((prefix for prefix in interface.segment.prefixes if address in prefix), ipaddress.ip_network(address))
            for interface in self._host.interfaces
            if interface.is_up
            for address in interface.addresses
        ]

    def gateways(self) -> Sequence[str]:
        routers = [interface.segment.gateway for interface in self._host.interfaces if interface.is_up]
        return [router.hosts[0] for router in routers if router is not None and router.hosts]

    def change(self) -> None:
        """Links or addresses of the host are other than before."""
        if not self._closed:
            self.on_change()

    def woke(self, slept_s: float) -> None:
        """The machine was asleep."""
        if not self._closed:
            self.on_resume(slept_s)

    def close(self) -> None:
        """The process died: nothing goes in or out any more."""
        self._closed = True

    def _receive(self, local: Endpoint, remote: Endpoint, data: bytes) -> None:
        if data and data[0] >> 6 == 3:
            self._host.plane.receive(remote, data)
            return
        answer = self.screen(remote, data)
        if answer is None:
            self.on_datagram(Path(local, remote), data)
        elif answer:
            self.send(Path(local, remote), answer)


class MemoryStore:
    """mesh.ports.StateStore in memory. `is_full` makes every write fail, as a full disk does."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.is_full = False

    def read(self, name: str) -> bytes | None:
        return self.files.get(name)

    def write(self, name: str, data: bytes, *, secret: bool = False) -> None:
        if self.is_full:
            raise LocalError(f"cannot write {name}: no space left")
        self.files[name] = bytes(data)

    def delete(self, name: str) -> None:
        self.files.pop(name, None)


class SimHost:
    """One machine on the Internet.

    `counts` says what became of datagrams that nobody took. `extra_ports` are further numbers of the underlay's
    control socket, such as a hub's 500 and 3478.
    """

    def __init__(
        self,
        internet: Internet,
        name: str,
        *,
        port: int = UNDERLAY_PORT,
        extra_ports: Sequence[int] = (),
        clock_skew_s: float = 0.0,
    ) -> None:
        self.name = name
        self.internet = internet
        self.loop = internet.loop
        self.wall = SimWallClock(internet.loop, clock_skew_s)
        self.entropy = SeededEntropy(internet.seed, name)
        self.interfaces: list[Interface] = []
        self.counts: Counter[str] = Counter()
        self.is_running = True
        self.clock = HostClock()
        self.context = contextvars.Context()
        self.context.run(current_host.set, self)
        self.context.run(host_clock.set, self.clock)
        self._frozen: list[asyncio.Handle] | None = None
        self._suspended_at = 0.0
        self._changed_asleep = False
        self._ports = (port, *extra_ports)
        self._tasks: dict[asyncio.Task[Any], None] = {}  # ordered, so that runs repeat
        self.loop.set_task_factory(_host_task)  # type: ignore[arg-type]  # ours is narrower than the stub
        self._boot(MemoryStore())

    def _boot(self, store: MemoryStore) -> None:
        self.store = store
        self.sockets = SocketTable()
        self.underlay = SimUnderlay(self, self._ports)
        self.plane = SimPlane(lambda path, data: self.send(path.local, path.remote, data))
        self.forwarder = SimForwarder(self.sockets, self.send)
        self.streams = SimStreams(self)
        self.port_mapper = SimPortMapper(self)

    def __repr__(self) -> str:
        return f"SimHost({self.name})"

    # ------------------------------------------------------------------ interfaces

    def attach(self, segment: Segment, *addresses: str, quality: Quality = LAN) -> Interface:
        """Plug a link in; what is attached last is preferred last. The underlay is told."""
        interface = Interface(self, segment, [ipaddress.ip_address(address) for address in addresses], quality)
        self.interfaces.append(interface)
        self.changed()
        return interface

    def readdress(self, interface: Interface, *addresses: str) -> None:
        """Other addresses on the same link, as a new DHCP lease gives."""
        interface.readdress(*addresses)
        self.changed()

    def unplug(self, interface: Interface, *, up: bool = False) -> None:
        """Take the link down, or `up` again; the addresses stay configured."""
        interface.is_up = up
        self.changed()

    def detach(self, interface: Interface) -> None:
        """Remove a link for good."""
        interface.detach()
        self.interfaces.remove(interface)
        self.changed()

    def move(self, segment: Segment, *addresses: str, quality: Quality = LAN) -> Interface:
        """Leave all networks and join another one: the roaming laptop."""
        for interface in list(self.interfaces):
            interface.detach()
            self.interfaces.remove(interface)
        return self.attach(segment, *addresses, quality=quality)

    def changed(self) -> None:
        """Tell the underlay that links or addresses are other than before, as netlink does."""
        if self.is_suspended:
            self._changed_asleep = True
        elif self.is_running:
            self.streams.changed()
            self.loop.call_soon(self.underlay.change, context=self.context)

    # ------------------------------------------------------------------ datagrams

    def send(self, local: Endpoint, remote: Endpoint, data: bytes) -> None:
        """Send from a local endpoint, whose host may be unspecified; what cannot be routed is lost."""
        if not self.is_running:
            return
        if remote.is_stream:
            self.streams.send(local.port, remote, data)
            return
        interface = self._interface_for(local, remote)
        if interface is None:
            self.counts["unroutable"] += 1
            return
        if local.is_unspecified:
            local = Endpoint(interface.host(ipv6=remote.is_ipv6) or local.host, local.port)
        if any(remote.host in own.hosts for own in self.interfaces):
            self.loop.call_soon(self.receive, interface, Datagram(local, remote, data), context=self.context)
        else:
            interface.send(Datagram(local, remote, data))

    def _interface_for(self, local: Endpoint, remote: Endpoint) -> Interface | None:
        fallback = None
        for interface in self.interfaces:
            if not interface.is_up:
                continue
            if not local.is_unspecified:
                if local.host in interface.hosts:
                    return interface
            elif interface.host(ipv6=remote.is_ipv6) is not None:
                if interface.segment.is_on_link(remote.host):
                    return interface
                fallback = fallback or interface
        return fallback

    def receive(self, interface: Interface, datagram: Datagram) -> None:
        """A datagram from a segment, in this host's context."""
        if not self.is_running or self.is_suspended:
            return
        receiver = self.sockets.find(datagram.destination)
        if receiver is None:
            self.counts["no socket"] += 1
            self.internet.note(self.loop.instant, self.name, self.name, datagram, Fate.NOBODY)
        else:
            receiver(datagram.destination, datagram.source, datagram.data)

    def owns(self, address: str) -> bool:
        """Whether the address is one of the host's, on the underlay or on an overlay network."""
        wanted = ipaddress.ip_address(address)
        return any(wanted in interface.addresses for interface in self.interfaces) or any(
            stack.is_local(wanted) for stack in self.plane.stacks.values()
        )

    def open_udp(
        self, protocol: asyncio.DatagramProtocol, local: tuple[str, int], remote: tuple[str, int] | None
    ) -> asyncio.DatagramTransport:
        """A socket on one of the host's addresses, or on all underlay addresses. Raises OSError."""
        wildcard = local[0] in ("", "0.0.0.0", "::")  # noqa: S104 (compared, not bound)
        if not wildcard:
            wanted = ipaddress.ip_address(local[0])
            for stack in self.plane.stacks.values():
                if stack.is_local(wanted):
                    return stack.open_udp(protocol, local, remote)
            if not self.owns(local[0]):
                raise OSError(errno.EADDRNOTAVAIL, f"{self.name} does not have {local[0]}")
        return SimTransport(self.sockets, protocol, local, remote, self.send)

    def stack(self, network: str | None = None) -> OverlayStack:
        """The overlay stack of a network; without a name, of the only one. Raises LocalError when it is not open."""
        stacks = self.plane.stacks
        if network is None and len(stacks) == 1:
            return next(iter(stacks.values()))
        if network is None or network not in stacks:
            raise LocalError(f"{self.name} has no open network {network or ''}".rstrip())
        return stacks[network]

    # ------------------------------------------------------------------ life and death

    def spawn(self, work: Coroutine[Any, Any, T], name: str = "task") -> asyncio.Task[T]:
        """Run a coroutine as this host; it dies with the host."""
        return self.loop.create_task(work, name=f"{self.name}: {name}", context=self.context.copy())

    def adopt(self, task: asyncio.Task[Any]) -> None:
        """The task was started by code of this host."""
        self._tasks[task] = None
        task.add_done_callback(lambda done: self._tasks.pop(done, None))

    def crash(self, *, lose_disk: bool = False) -> None:
        """Power off: sockets, SAs and tasks are gone, and nobody is told."""
        if not self.is_running:
            return
        if self.is_suspended:
            self.resume()
        self.is_running = False
        self.streams.crash()
        self.underlay.close()
        self.plane.close()
        self.sockets.close()
        self.loop.cancel_timers(lambda context: context.get(current_host) is self)
        for task in list(self._tasks):
            task.cancel()
        if lose_disk:
            self.store = MemoryStore()

    def restart(self) -> None:
        """Power on again with fresh ports; starting the engine is up to the caller."""
        if self.is_running:
            raise LocalError(f"{self.name} is running")
        self.is_running = True
        self._boot(self.store)

    @property
    def is_suspended(self) -> bool:
        return self._frozen is not None

    def suspend(self) -> None:
        """Stop in the middle of everything; call it from outside of the host. What comes in meanwhile is lost."""
        if not self.is_running or self.is_suspended:
            raise LocalError(f"{self.name} is not awake")
        self._frozen = self.loop.freeze(lambda context: context.get(current_host) is self)
        self._suspended_at = self.loop.instant

    def resume(self, *, clock_ran: bool = False) -> None:
        """Go on. The monotonic clock stood still, as in a laptop that slept, or ran on, as for a process that was
        stopped: then every timer that came due goes off now.
        """
        frozen, self._frozen = self._frozen, None
        if frozen is None:
            raise LocalError(f"{self.name} is awake")
        self.loop.thaw(frozen, self.clock, 0.0 if clock_ran else self.loop.instant - self._suspended_at)
        self.loop.call_soon(self.underlay.woke, self.loop.instant - self._suspended_at, context=self.context)
        if self._changed_asleep:
            self._changed_asleep = False
            self.changed()


def _host_task(
    loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T], *, context: contextvars.Context | None = None
) -> asyncio.Task[T]:
    """A task, known to the host in whose context it was started."""
    task = asyncio.Task(work, loop=loop, context=context)
    host = current_host.get() if context is None else context.get(current_host)
    if host is not None:
        host.adopt(task)
    return task


def _ignore_datagram(path: Path, data: bytes) -> None:
    """Until the engine listens."""


def _screen_nothing(source: tuple[str, int], data: bytes) -> bytes | None:
    """Until the engine listens."""
    return None


def _ignore_change() -> None:
    """Until the engine listens."""


def _ignore_resume(slept_s: float) -> None:
    """Until the engine listens."""
