"""What a hub does for peers beyond the DHT: it takes calls, gives relays, and tells STUN clients who they are.

A call is judged three times: by the caller's hub, by the target's hub, and by the target. Each checks the caller's
certificate and the document's allowed pairs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from ipaddress import IPv6Address
from typing import Protocol

from p2pvpn.core.address import Endpoint, IpAddress
from p2pvpn.core.errors import LocalError, P2pvpnError, TrustError
from p2pvpn.core.ids import PeerId
from p2pvpn.core.output import Output
from p2pvpn.dht.hub import HubNode
from p2pvpn.dht.policy import AcceptancePolicy
from p2pvpn.dht.records import LocatorBody, Record, key_of_locator
from p2pvpn.dht.rpc import RpcNode, RpcRefusedError
from p2pvpn.dht.storage import Backend, RecordStore
from p2pvpn.identity.member import Member
from p2pvpn.relay.limits import RelayLimits
from p2pvpn.relay.server import Answer, Bind, ClosePair, Forward, RelayServer

from .calls import CALL, FORWARD, MEET, Answered, Call, Invitation, Meet, Told, decode_response_untrusted
from .calls import Forward as ForwardCall
from .directory import Directory
from .ports import Forwarder
from .pump import Pump
from .services import Services
from .standing import Standing


class Refusal:
    """Codes of refused calls on the wire."""

    FOREIGN = 32
    DENIED = 33
    QUOTA = 34
    FULL = 35
    ABSENT = 36
    UNTRUSTED = 37


FORWARD_HUBS = 3
"""Hubs of the target that are asked to tell it; it ignores the second word of the same relay."""
ANSWER_WAIT_S = 1.0
"""For what a called peer says to the IKE message: longer than any round trip that is worth using."""
FORWARD_TIMEOUT_S = 1.5
"""For each of them; the caller waits twice as long."""
USAGE_POLL_S = 10.0


class Registry(Protocol):
    """What the hub asks of its network."""

    standing: Standing
    directory: Directory

    def is_hub(self, overlay: IPv6Address) -> bool: ...

    def outer_address(self, overlay: IPv6Address) -> IpAddress | None:
        """Where the peer's tunnel to us lives; None without a tunnel."""
        ...


class HubSide:
    """DHT node, calls and relays of one hub in one network."""

    def __init__(
        self,
        *,
        services: Services,
        registry: Registry,
        rpc: RpcNode,
        forwarder: Forwarder,
        policy: AcceptancePolicy,
        backend: Backend | None,
    ) -> None:
        self._services = services
        self._registry = registry
        self._rpc = rpc
        self._forwarder = forwarder
        self.relay = RelayServer(RelayLimits(), services.entropy)
        self._pump = Pump(self.relay, services.underlay, self._execute)
        self._ports: set[int] = set()
        self.store = RecordStore(backend)
        self.node = HubNode(
            rpc, registry.standing.me.peer_id, policy, self.store, services.wall, allowed=self._may_look_up
        )
        rpc.register(CALL, self._on_call)
        rpc.register(FORWARD, self._on_forward)

    async def run(self) -> None:
        """Serve until cancelled. What the forwarder carried is told to the relay: idle and greedy pairs end by it."""
        await self.node.start()
        while True:
            await asyncio.sleep(USAGE_POLL_S)
            for port in list(self.relay.ports()):
                at, total = self._forwarder.used_at(port)
                self._pump.feed(self.relay.forwarded(port, at, total))

    async def close(self) -> None:
        """Stop to serve and close every relay port."""
        await self.node.stop()
        for port in list(self.relay.ports()):
            self._forwarder.close_pair(port)
        self._ports.clear()
        self._pump.close()

    def apply(self, hubs: list[PeerId], revoked: Iterable[PeerId]) -> None:
        """A document is in force: these are its hubs, and nothing is kept or relayed for those whom it revokes."""
        self.node.set_hubs(hubs)
        for peer in revoked:
            self.store.remove_subject(peer)
            self._pump.feed(self.relay.release_owner(peer, self._services.now))

    def _may_look_up(self, asker: IPv6Address, record: Record) -> bool:
        """Look-ups are answered only for pairs that the document allows."""
        standing = self._registry.standing
        member = self._registry.directory.member(asker)
        try:
            return member is None or standing.document.allows(member, standing.verify(record.certificate))
        except TrustError:
            return False

    # Relay.

    def on_unbound(self, port: int, source: Endpoint, data: bytes) -> None:
        """A packet at a relay port that the forwarder hands up."""
        if port in self._ports:
            self._pump.feed(self.relay.handle(port, source, data, self._services.now))

    def _execute(self, output: Output) -> None:
        match output:
            case Bind(port, source):
                self._forwarder.bind(port, source)
                self._services.lines.vouch(source)
            case Answer(port, to, data) | Forward(port, to, data):
                self._forwarder.answer(port, to, data)
            case ClosePair(port):
                self._forwarder.close_pair(port)
                self._ports.discard(port)

    def has_port(self, port: int) -> bool:
        """Whether it is a relay port of ours."""
        return port in self._ports

    def peer_at(self, peer_id: PeerId, address: IpAddress | None) -> None:
        """A peer's tunnel to us came up, moved or ended."""
        self.relay.owner_at(peer_id, address)

    # Calls.

    async def _on_call(self, sender: IPv6Address, args: object) -> list[object]:
        call = Call.decode_untrusted(args)
        caller = self._caller(call.certificate)
        if caller.overlay != sender:
            raise RpcRefusedError(Refusal.FOREIGN, "the certificate is not the caller's")
        target, hubs = await self._whereabouts(sender, call.target)
        self._judge(caller, target)
        relays, side_a, side_b = await self._allocate(caller, target)
        invitation = Invitation(relays(side_b[0]), side_b[1], _outside(self._registry.outer_address(sender)))
        meet = Meet(call.certificate, invitation, call.resume, call.ike)
        if hubs:
            told = await self._forward(call.target, hubs, meet)
            self.relay.owner_at(target.peer_id, told.seen_at)
        else:
            told = await self._tell(call.target, meet)
        return Answered(Invitation(relays(side_a[0]), side_a[1], told.seen_at), told.ike).encode()

    async def _whereabouts(self, asker: IPv6Address, overlay: IPv6Address) -> tuple[Member, tuple[PeerId, ...]]:
        """Who is called, and the other hubs that can tell it; none when it is attached here."""
        registry = self._registry
        member = registry.directory.member(overlay)
        if member is not None and registry.outer_address(overlay) is not None:
            return member, ()
        standing = registry.standing
        found = await self.node.find(asker, key_of_locator(standing.me.network, overlay))
        record = max(found, key=lambda one: one.sequence, default=None)
        if record is None or not isinstance(record.body, LocatorBody):
            raise RpcRefusedError(Refusal.ABSENT, "no hub knows the peer")
        hubs = tuple(hub for hub in record.body.hubs if hub != standing.me.peer_id)
        if not hubs:
            raise RpcRefusedError(Refusal.ABSENT, "the peer is not attached to any hub")
        return self._caller(record.certificate), hubs

    async def _allocate(
        self, caller: Member, target: Member
    ) -> tuple[Callable[[int], tuple[Endpoint, ...]], tuple[int, bytes], tuple[int, bytes]]:
        now = self._services.now
        if not self.relay.may_allocate(caller.peer_id, now):
            raise RpcRefusedError(Refusal.QUOTA, "the caller has as many relays as it may have")
        try:
            port_a, port_b = await self._forwarder.open_pair()
        except LocalError as problem:
            raise RpcRefusedError(Refusal.FULL, str(problem)) from None
        registry = self._registry
        try:
            allocation = self.relay.allocate(
                port_a,
                port_b,
                caller.peer_id,
                target.peer_id,
                registry.outer_address(caller.overlay),
                registry.outer_address(target.overlay),
                now,
            )
        except P2pvpnError as problem:
            self._forwarder.close_pair(port_a)
            raise RpcRefusedError(Refusal.QUOTA, str(problem)) from None
        self._ports |= {port_a, port_b}
        self._pump.feed([])
        addresses = self._public_addresses()

        def relays(port: int) -> tuple[Endpoint, ...]:
            return tuple(Endpoint.of(str(address), port) for address in addresses)

        return relays, (port_a, allocation.side_a.encode()), (port_b, allocation.side_b.encode())

    async def _tell(self, target: IPv6Address, meet: Meet) -> Told:
        """Tell a peer that is attached here; its IKE answer is waited for, but not for long: the caller has other ways
        to go on."""
        telling = self._services.tasks.start(self._invite(target, meet), f"invite {target}")
        if meet.ike:
            await asyncio.wait((telling,), timeout=ANSWER_WAIT_S)
        ike = telling.result() if telling.done() and not telling.cancelled() else b""
        return Told(_outside(self._registry.outer_address(target)), ike)

    async def _invite(self, target: IPv6Address, meet: Meet) -> bytes:
        timeout_s = self._services.tuning.call_timeout_s
        try:
            return decode_response_untrusted(await self._rpc.request(target, MEET, meet.encode(), timeout=timeout_s))
        except P2pvpnError:
            return b""  # The caller's IKE retransmits over the relay, and its next attempt tries another hub.

    async def _forward(self, target: IPv6Address, hubs: tuple[PeerId, ...], meet: Meet) -> Told:
        """Have the target told by its hubs, all of them, as one may not know yet that it is gone from there. Returns
        what the first that answers says.
        """
        registry = self._registry
        overlays = [registry.standing.overlay_of(hub) for hub in hubs]
        args = ForwardCall(target, meet).encode()
        asking = {
            self._services.tasks.start(self._forward_to(overlay, args), f"forward to {overlay}")
            for overlay in list(filter(registry.is_hub, overlays))[:FORWARD_HUBS]
        }
        problem = "no hub knows the peer"
        while asking:
            done, asking = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                answer: Told | P2pvpnError = task.result()
                if isinstance(answer, Told):
                    return answer
                problem = f"the peer could not be told: {answer}"
        raise RpcRefusedError(Refusal.ABSENT, problem)

    async def _forward_to(self, hub: IPv6Address, args: list[object]) -> Told | P2pvpnError:
        try:
            return Told.decode_untrusted(await self._rpc.request(hub, FORWARD, args, timeout=FORWARD_TIMEOUT_S))
        except P2pvpnError as problem:
            return problem

    async def _on_forward(self, sender: IPv6Address, args: object) -> list[object]:
        forward = ForwardCall.decode_untrusted(args)
        if not self._registry.is_hub(sender):
            raise RpcRefusedError(Refusal.FOREIGN, "only hubs forward calls")
        caller = self._caller(forward.meet.certificate)
        target = self._registry.directory.member(forward.target)
        if target is None or self._registry.outer_address(forward.target) is None:
            raise RpcRefusedError(Refusal.ABSENT, "the peer is not attached here")
        self._judge(caller, target)
        return (await self._tell(forward.target, forward.meet)).encode()

    def _judge(self, caller: Member, target: Member) -> None:
        """Refuses what the document forbids."""
        if not self._registry.standing.document.allows(caller, target):
            raise RpcRefusedError(Refusal.DENIED, "the network document does not let the two talk")

    def _public_addresses(self) -> list[IpAddress]:
        """Ours: what the document says in numbers, else what the machine has."""
        standing = self._registry.standing
        entry = standing.document.hub(standing.me.peer_id)
        declared = [endpoint.ip for endpoint in entry.endpoints(0)] if entry is not None else []
        return declared or [endpoint.ip for endpoint in self._services.underlay.local_endpoints()]

    def _caller(self, certificate: bytes) -> Member:
        try:
            return self._registry.standing.verify(certificate)
        except TrustError as problem:
            raise RpcRefusedError(Refusal.UNTRUSTED, str(problem)) from None


def _outside(seen_at: IpAddress | None) -> IpAddress | None:
    """What another machine may be told of where a peer is: an address of the Internet, not that of a stream."""
    return None if seen_at is None or seen_at.is_loopback else seen_at
