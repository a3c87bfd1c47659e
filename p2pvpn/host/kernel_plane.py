"""The kernel plane: the machine's own IPsec encrypts, behind the `Plane` port of the engine.

    install   in SA, out SA; `in` (and, for what is forwarded, `fwd`) policies accept the SA beside those that stand
    use       the `out` policies name the SA
    move      new ports: UPDSA. New addresses: MIGRATE of the SA with its policies; where the kernel cannot (no such
              option, or no policy names the SA), the SA is made anew with the numbers and the window of the old one
    remove    `out` policies go back to the SA before, `in` policies accept those left, the SAs go

Each Child SA has a reqid of its own: by a shared one, two peers behind one relay would get each other's packets.

A policy that must accept several SAs names them as optional templates, and then a packet with no SA at all passes it
too. Plaintext is therefore kept out by the guard, which looks for the mark of decryption, and where one SA stands, as
nearly always, also by its policy. Encrypting, replay windows and path MTUs are the kernel's.

What comes in by the loopback device, as ESP of streams does (`host.streams`), the kernel lets pass by the policies: the
plane turns that off (`net.ipv4.conf.lo.disable_policy`), or such a peer could speak in anybody's name.

A daemon that is killed leaves SAs and policies behind, and no way in the clear: the wide block policies, the guard's
rules and routes that lead nowhere stand with them. The next start removes what is marked as ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path as FilePath

from p2pvpn.core.address import Endpoint, IpAddress, IpNetwork, Path
from p2pvpn.core.child import ChildSa
from p2pvpn.core.datagram import SPI_MARK
from p2pvpn.core.errors import LocalError
from p2pvpn.mesh.ports import SaUsage

from .guard import Guard
from .kernel_child import InstalledChild, pairs_of
from .kernel_policies import PolicyBook, send_by
from .kernel_trap import Reinjector, Trap, wide_policies
from .netlink import Netlink
from .tun import MAX_MTU, MIN_MTU
from .udp import no_socket
from .xfrm import (
    Direction,
    Flow,
    Message,
    Pair,
    Xfrm,
    XfrmError,
    XfrmEvents,
    delete_state,
    migrate,
    set_state,
)

log = logging.getLogger(__name__)

LOOPBACK_POLICY = FilePath("/proc/sys/net/ipv4/conf/lo/disable_policy")
ARRIVAL_S = 0.2
"""For a packet from decryption to its policy, on a machine that is busy."""
LOOK_PAUSE_S = 1.0
"""Between looks whether the policies of SAs in use still stand."""

_UDP_ENCAP, _UDP_GRO, _ESPINUDP = 100, 104, 2
_GONE = (errno.ENOENT, errno.ESRCH)


def _ignore(*_: object) -> None:
    """Before the engine listens."""


class _Network:
    """One network's trap, and the policies around it."""

    __slots__ = ("removals", "routes", "trap")

    def __init__(self, trap: Trap, routes: Sequence[IpNetwork]) -> None:
        self.trap = trap
        self.routes = tuple(routes)
        self.removals: list[Message] = []


class KernelPlane:
    """Implements `mesh.ports.Plane`. `start` it before anything else; it may be started again after `on_died`."""

    def __init__(self, esp_sockets: Sequence[socket.socket], netlink: Netlink, guard: Guard) -> None:
        self.on_trapped: Callable[[str, bytes], None] = _ignore
        self.on_moved: Callable[[int, Endpoint], None] = _ignore
        self.on_died: Callable[[], None] = _ignore
        """Somebody removed a device, SA or policy of ours; everything was taken down."""
        self._esp_sockets = tuple(esp_sockets)
        self.extra_socket: Callable[[int], socket.socket] = no_socket
        """The ESP socket at a further port of the underlay. Raises LocalError."""
        self._netlink = netlink
        self._guard = guard
        self._loop = asyncio.get_running_loop()
        self._kernel: Xfrm | None = None
        self._former_loopback: str | None = None
        self._events: XfrmEvents | None = None
        self._reinjector: Reinjector | None = None
        self._networks: dict[str, _Network] = {}
        self._children: dict[int, InstalledChild] = {}
        self._by_spi: dict[int, InstalledChild] = {}
        self._policies = PolicyBook()
        self._lost: Counter[str] = Counter()
        self._dying: asyncio.Task[None] | None = None
        self._looked_at = 0.0
        """Loop time of the last look for a policy that a trapped packet should have met."""

    # ------------------------------------------------------------------ life

    async def start(self) -> None:
        """Make the ESP sockets the kernel's, and remove what a dead daemon left. Raises LocalError."""
        if self._kernel is not None:
            raise LocalError("the kernel plane runs already")
        kernel = Xfrm()
        try:
            left = kernel.clean_up()
            await self._netlink.clear_barriers()
            self._reinjector = Reinjector()
            for sock in self._esp_sockets:
                _hand_to_kernel(sock)
        except BaseException:
            kernel.close()
            raise
        if left:
            log.info("removed %d SAs and policies that a former daemon left", left)
        self._former_loopback = self._ask_policies_on_loopback()
        self._kernel = kernel
        self._events = XfrmEvents(self._on_mapping, self._on_expired)
        self._netlink.watch(self._on_network_change)

    async def stop(self) -> None:
        """Take everything down."""
        if self._kernel is None:
            return
        self._netlink.unwatch(self._on_network_change)
        for network in list(self._networks):
            await self.close_network(network)
        for sock in self._esp_sockets:
            with contextlib.suppress(OSError):  # closed before us
                sock.setsockopt(socket.IPPROTO_UDP, _UDP_ENCAP, struct.pack("=i", 0))
        assert self._events is not None and self._reinjector is not None  # noqa: PT018 (set together with the kernel)
        self._leave_loopback()
        self._events.close()
        self._reinjector.close()
        self._kernel.close()
        self._kernel = self._events = self._reinjector = None

    @property
    def takes_streams(self) -> bool:
        """Whether ESP may come in by the loopback device: where its policies are not asked, it must not."""
        return self._former_loopback is not None

    def _ask_policies_on_loopback(self) -> str | None:
        """Returns what stood there before, or None when it cannot be changed."""
        try:
            former = LOOPBACK_POLICY.read_text()
            if former.strip() != "0":
                LOOPBACK_POLICY.write_text("0")
        except OSError as problem:
            log.warning("no TCP where UDP is blocked: %s cannot be changed (%s)", LOOPBACK_POLICY, problem.strerror)
            return None
        return former

    def _leave_loopback(self) -> None:
        if self._former_loopback is not None:
            with contextlib.suppress(OSError):
                LOOPBACK_POLICY.write_text(self._former_loopback)

    @property
    def worker_pid(self) -> int | None:
        """The kernel needs no process."""
        return None

    @property
    def _xfrm(self) -> Xfrm:
        if self._kernel is None:
            raise LocalError("the kernel plane does not run")
        return self._kernel

    def _start_over(self, reason: str) -> None:
        """What somebody else removed cannot be put back: numbers and windows are lost with it."""
        if self._dying is None and self._kernel is not None:
            log.error("%s; starting over", reason)
            self._dying = self._loop.create_task(self._die())

    async def _die(self) -> None:
        try:
            await self.stop()
        finally:
            self._dying = None
        self.on_died()

    # ------------------------------------------------------------------ networks

    async def open_network(
        self, network: str, addresses: Sequence[IpAddress], routes: Sequence[IpNetwork], mtu: int
    ) -> str:
        if not MIN_MTU <= mtu <= MAX_MTU:
            raise LocalError(f"an MTU of {mtu} is not in {MIN_MTU}..{MAX_MTU}")
        if network in self._networks:
            raise LocalError(f"the network {network!r} has a device already")
        kernel = self._xfrm
        trap = Trap(
            lambda packet: self._on_packet(network, packet),
            lambda: self._start_over("somebody removed a TUN device"),
        )
        entry = self._networks[network] = _Network(trap, routes)
        self._policies.own(network, addresses)
        try:
            await self._guard.protect(trap.device, routes, or_decrypted=True)
            for add, remove in wide_policies(addresses, routes):
                kernel.request(add)
                entry.removals.append(remove)
            await self._netlink.set_up_device(trap.device, addresses, routes, mtu)
            await self._netlink.add_barriers(routes)
        except BaseException:
            with contextlib.suppress(LocalError):
                await self.close_network(network)
            raise
        return trap.device

    async def close_network(self, network: str) -> None:
        entry = self._networks.pop(network, None)
        if entry is None:
            return
        for child_id in [known for known, child in self._children.items() if child.child.network == network]:
            await self.remove(child_id)
        self._policies.own(network, ())
        entry.trap.close()
        self._lost.update(entry.trap.lost)
        self._take_away(entry.removals)
        await self._netlink.remove_barriers(entry.routes)
        await self._guard.release(entry.trap.device)

    def _on_packet(self, network: str, packet: bytes) -> None:
        """A trapped packet. One that an SA covers was on its way when that came up, or somebody removed the policy.

        Then it would come back from `inject` for ever.
        """
        pair = self._policies.covering(network, packet)
        now = self._loop.time()
        if pair is not None and now - self._looked_at > LOOK_PAUSE_S:
            self._looked_at = now
            if not self._xfrm.has_policy(pair, Direction.OUT):
                self._start_over("somebody removed our policies")
        self.on_trapped(network, packet)

    # ------------------------------------------------------------------ SAs

    async def install(self, child: ChildSa) -> None:
        kernel = self._xfrm
        if child.spi_in & SPI_MARK != SPI_MARK or child.spi_in > 0xFFFFFFFF:
            raise LocalError("an inbound SPI has its two top bits set")
        if child.id in self._children:
            raise LocalError(f"Child SA {child.id} is installed already")
        if child.spi_in in self._by_spi:
            raise LocalError(f"SPI {child.spi_in:#010x} is taken")
        entry = InstalledChild(child, pairs_of(child), _with_source(child.path))
        kernel.request(set_state(entry.state(entry.flow_in, inbound=True)))
        self._children[child.id] = self._by_spi[child.spi_in] = entry
        try:
            kernel.request(set_state(entry.state(entry.flow_out, inbound=False)), *self._policies.accept(entry))
        except XfrmError as problem:
            await self._forget(entry, keep_out=problem.index == 0)
            raise

    async def use(self, child_id: int) -> None:
        entry = self._known(child_id)
        self._xfrm.request(*self._policies.use(entry))

    async def move(self, child_id: int, path: Path) -> None:
        entry = self._known(child_id)
        if entry.child.transport_mode:
            raise LocalError("a Child SA in transport mode is about its addresses, and cannot leave them")
        entry.asked = path
        try:
            self._relocate(entry)
        except XfrmError as problem:
            self._start_over(f"Child SA {child_id} cannot be moved ({problem})")

    async def remove(self, child_id: int) -> None:
        entry = self._children.get(child_id)
        if entry is not None:
            await self._forget(entry)

    async def listen(self, port: int) -> None:
        _hand_to_kernel(self.extra_socket(port))

    async def unlisten(self, port: int) -> None:
        """The socket goes with the port."""

    async def inject(self, network: str, packets: Sequence[bytes]) -> None:
        reinjector = self._reinjector
        for packet in packets:
            if reinjector is not None and self._policies.covering(network, packet):
                reinjector.send(packet)
            else:
                self._lost["injected too early"] += 1  # it would come out of the trap again, for ever

    async def usage(self, child_ids: Sequence[int]) -> dict[int, SaUsage]:
        kernel, now = self._xfrm, self._loop.time()
        entries = [self._children[child_id] for child_id in child_ids if child_id in self._children]
        states = [
            state
            for entry in entries
            for state in ((entry.flow_in, entry.child.spi_in), (entry.flow_out, entry.child.spi_out))
        ]
        counted = kernel.counted(states)
        out = {}
        if None in counted:
            self._start_over("somebody removed an SA, or its numbers are used up")
        for number, entry in enumerate(entries):
            found_in, found_out = counted[2 * number], counted[2 * number + 1]
            totals = list(entry.base)
            for at, found in ((0, found_in), (2, found_out)):
                if found is not None:
                    totals[at] += found.packets
                    totals[at + 1] += found.octets
            for way in (0, 1):
                if totals[2 * way] > entry.seen[2 * way]:
                    entry.last_at[way] = now
            entry.seen = totals
            sequence_out = found_out.sequence_out if found_out is not None else 0
            in_packets, in_octets, out_packets, out_octets = totals
            out[entry.child.id] = SaUsage(
                in_packets, in_octets, out_packets, out_octets, entry.last_at[0], entry.last_at[1], sequence_out
            )
        return out

    async def counters(self) -> dict[str, int]:
        """Packets that went no further, by reason: the kernel's own counts (of everybody's IPsec) and ours."""
        lost = Counter(self._lost)
        for network in self._networks.values():
            lost.update(network.trap.lost)
        if self._reinjector is not None:
            lost.update(self._reinjector.lost)
        lost.update(_kernel_counts())
        return {name: number for name, number in lost.items() if number}

    async def _forget(self, entry: InstalledChild, *, keep_out: bool = False) -> None:
        """Take the entry's policies and states away; with `keep_out` the outbound state is somebody else's."""
        del self._children[entry.child.id], self._by_spi[entry.child.spi_in]
        messages = self._policies.forget(entry)
        messages.append(delete_state(entry.flow_in, entry.child.spi_in))
        if not keep_out:
            messages.append(delete_state(entry.flow_out, entry.child.spi_out))
        self._take_away(messages)

    def _take_away(self, messages: Sequence[Message]) -> None:
        """Removals; what is gone already is fine."""
        if messages and self._kernel is not None:
            try:
                self._kernel.request(*messages)
            except XfrmError as problem:
                if problem.errno not in _GONE:
                    raise

    # ------------------------------------------------------------------ moves

    def _relocate(self, entry: InstalledChild) -> None:
        """Take both states to where the entry shall be now."""
        path = _with_source(entry.asked)
        old_in, old_out = entry.flow_in, entry.flow_out
        new_in, new_out = Flow(path.remote, path.local), Flow(path.local, path.remote)
        entry.told = path.remote
        if new_out == old_out:
            return
        if new_out.hosts == old_out.hosts:
            self._xfrm.request(
                set_state(entry.state(new_out, inbound=False), update=True),
                set_state(entry.state(new_in, inbound=True), update=True),
            )
            entry.flow_in, entry.flow_out = new_in, new_out
            return
        sent, taken = self._policies.naming(entry)
        self._xfrm.request(*self._policies.acceptance(entry, moving=True))
        self._loop.call_later(ARRIVAL_S, self._arrive, entry)
        entry.flow_in, entry.flow_out = new_in, new_out
        self._carry(entry, sent, old_out, new_out, inbound=False)
        self._carry(entry, taken, old_in, new_in, inbound=True)

    def _arrive(self, entry: InstalledChild) -> None:
        """Nothing from before a move is on its way through the kernel any more."""
        if self._kernel is not None and self._children.get(entry.child.id) is entry:
            self._take_away(self._policies.acceptance(entry))

    def _carry(
        self, entry: InstalledChild, policies: list[tuple[Pair, Direction]], old: Flow, new: Flow, *, inbound: bool
    ) -> None:
        """Move one state with the policies that name it."""
        kernel = self._xfrm
        try:
            if policies:
                kernel.request(*(migrate(pair, way, entry.reqid, old, new) for pair, way in policies))
                return
        except XfrmError as problem:
            log.debug("SA %d is made anew: %s", entry.child.id, problem)
        spi = entry.child.spi_in if inbound else entry.child.spi_out
        before, after = kernel.counted([(old, spi), (new, spi)])
        messages = []
        if after is None:
            if before is None:
                raise XfrmError(errno.ESRCH, 0, f"Child SA {entry.child.id}")
            entry.keep_counts(before, inbound=inbound)
            messages = [delete_state(old, spi), set_state(entry.state(new, before.replay, inbound=inbound))]
        if inbound:
            messages += self._policies.acceptance(entry)
        else:
            messages += [send_by(pair, entry) for pair, _ in policies]
        kernel.request(*messages)

    def _on_network_change(self) -> None:
        """Where routing chooses the source address, it may choose another one now."""
        for entry in list(self._children.values()):
            is_open = entry.asked.local.is_unspecified and not entry.child.transport_mode
            if is_open and _with_source(entry.asked).local != entry.flow_out.source:
                try:
                    self._relocate(entry)
                except XfrmError as problem:
                    self._start_over(f"Child SA {entry.child.id} cannot be moved ({problem})")
                    return

    # ------------------------------------------------------------------ what the kernel tells

    def _on_mapping(self, spi: int, source: Endpoint) -> None:
        entry = self._by_spi.get(spi)
        if entry is not None and source != entry.told:
            entry.told = source
            if source != entry.flow_out.destination:
                self.on_moved(entry.child.id, source)

    def _on_expired(self, spi: int, hard: bool) -> None:
        if hard:
            self._lost["SAs expired"] += 1
            log.warning("the kernel let SA %#010x expire: its numbers are used up", spi)

    # ------------------------------------------------------------------ look-ups

    def _known(self, child_id: int) -> InstalledChild:
        entry = self._children.get(child_id)
        if entry is None:
            raise LocalError(f"there is no Child SA {child_id}")
        return entry


def _hand_to_kernel(sock: socket.socket) -> None:
    """ESP on this socket is decrypted by the kernel. Batches (UDP_GRO) would reach it as one giant packet."""
    try:
        with contextlib.suppress(OSError):  # an old kernel, which makes no batches either
            sock.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 0)
        sock.setsockopt(socket.IPPROTO_UDP, _UDP_ENCAP, struct.pack("=i", _ESPINUDP))
    except OSError as error:
        raise LocalError(f"the kernel has no ESP in UDP: {error.strerror}") from None


def _kernel_counts() -> dict[str, int]:
    """Packets that IPsec of this network namespace dropped, by reason."""
    try:
        lines = FilePath("/proc/net/xfrm_stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {name: int(number) for name, number in (line.split() for line in lines)}


def _with_source(path: Path) -> Path:
    """The path with the address that routing chooses as its source, if that was left open and there is a way."""
    if not path.local.is_unspecified:
        return path
    family = socket.AF_INET6 if path.remote.is_ipv6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((path.remote.host, path.remote.port or 9))
        return Path(Endpoint.of(probe.getsockname()[0], path.local.port), path.remote)
    return path
