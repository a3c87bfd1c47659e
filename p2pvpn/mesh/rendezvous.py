"""How two peers meet at a relay: the caller asks a hub, the called one is told, both bind their sides.

The caller's IKE_SA_INIT request goes with the call, the called one's answer comes back with the relay.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from ipaddress import IPv6Address

from p2pvpn.core.errors import P2pvpnError, TrustError
from p2pvpn.dht.rpc import Code, RpcNode, RpcRefusedError

from .attach import Attachments, Hub, preference
from .calls import CALL, MEET, Answered, Call, Invitation, Meet
from .connect import ConnectError
from .directory import Directory
from .events import Called, EventSink, Refused
from .fallback import Fallback
from .ike_driver import carried_path
from .relaying import RelayPath
from .services import Services
from .session import Session
from .standing import Standing

CALL_TIMEOUT_S = 3.0
STAGGER_S = 0.4
"""A hub that takes longer to answer and relay is not waited for: the next one is asked too."""
NO_HUB_S = 2.0
"""How long a call waits for the first tunnel to a hub: after a start or a sleep it is on its way."""
UNCLAIMED_S = 20.0
"""A relay on which no SA began is given up after this."""


class Rendezvous:
    """Calls out and calls in, of one network."""

    def __init__(
        self,
        *,
        services: Services,
        fallback: Fallback,
        standing: Standing,
        rpc: RpcNode,
        attachments: Attachments,
        directory: Directory,
        session: Callable[[IPv6Address], Session],
        emit: EventSink,
    ) -> None:
        self._services = services
        self._fallback = fallback
        self._standing = standing
        self._rpc = rpc
        self._attachments = attachments
        self._directory = directory
        self._session = session
        self._emit = emit
        rpc.register(MEET, self._on_meet)

    async def relay_to(
        self, target: IPv6Address, tried: Sequence[str], *, ike: bytes = b"", resume: bool = False
    ) -> tuple[RelayPath, bytes]:
        """Call a peer through our hubs, to `resume` a live SA or for a new one that begins with `ike`; returns the
        relay, and the peer's answer to `ike` or nothing. Raises ConnectError.

        Hubs that the peer is attached to are asked first, hubs at addresses that were `tried` last.
        """
        await self._attachments.any_attached(NO_HUB_S)
        call = Call(target, self._standing.me.certificate, resume, ike)
        hubs = sorted(self._attachments.connected(), key=lambda hub: self._rank(hub, target, tried))
        problem = "no hub is attached"
        asking: set[asyncio.Task[tuple[RelayPath, Answered]]] = set()
        try:
            while hubs or asking:
                if hubs:
                    asking.add(asyncio.create_task(self._ask(hubs.pop(0), call), name="call"))
                done, asking = await asyncio.wait(
                    asking, timeout=STAGGER_S if hubs else None, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    try:
                        relay, answered = await task
                    except ConnectError as failure:
                        problem = str(failure)
                    else:
                        self._keep(relay, target, answered.invitation)
                        return relay, answered.ike
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        self._directory.forget(target)
        raise ConnectError("call", problem)

    async def relay_by(self, hub: Hub, target: IPv6Address) -> RelayPath:
        """Call a peer that we have a relayed SA with through this hub, for a relay there. Raises ConnectError."""
        relay, answered = await self._ask(hub, Call(target, self._standing.me.certificate, resume=True))
        self._keep(relay, target, answered.invitation)
        return relay

    def _rank(self, hub: Hub, target: IPv6Address, tried: Sequence[str]) -> tuple[int, bool, bool, bytes]:
        """By the target's locator if we have it, else by where it would attach if all hubs were well."""
        host = self._host_of(hub.overlay)
        silent = self._rpc.is_silent(hub.overlay) or self._session(hub.overlay).is_doubtful
        locator = self._directory.known_locator(target)
        elsewhere = locator is not None and hub.peer_id not in locator.hubs
        return tried.count(host or ""), silent, elsewhere, preference(target, hub.peer_id)

    def _host_of(self, hub: IPv6Address) -> str | None:
        """Where our tunnel to a hub goes."""
        current = self._session(hub).current
        return None if current is None else self._services.lines.udp_of(current.path.remote).host

    async def _ask(self, hub: Hub, call: Call) -> tuple[RelayPath, Answered]:
        try:
            answer = await self._rpc.request(hub.overlay, CALL, call.encode(), timeout=CALL_TIMEOUT_S)
            answered = Answered.decode_untrusted(answer)
            return await self._bind(hub.overlay, answered.invitation), answered
        except P2pvpnError as failure:
            if not isinstance(failure, RpcRefusedError):
                self._session(hub.overlay).suspect()
            raise ConnectError("call", f"{hub.name}: {failure}") from None

    async def _bind(self, hub: IPv6Address, invitation: Invitation) -> RelayPath:
        """At its port on the hub, or over a stream where UDP does not lead there."""
        over_stream = await self._fallback.relay(hub, invitation)
        if over_stream is not None:
            return over_stream
        relay = await self._services.relays.bind(invitation.ticket, invitation.relays, self._host_of(hub))
        relay.on_silent = lambda silent: self._fallback.relay_silent(hub, silent)
        return relay

    def _keep(self, relay: RelayPath, overlay: IPv6Address, invitation: Invitation) -> None:
        paths = self._session(overlay).paths
        paths.keep(relay, invitation.other)
        asyncio.get_running_loop().call_later(UNCLAIMED_S, paths.drop_unclaimed, relay)

    async def _on_meet(self, sender: IPv6Address, args: object) -> list[object]:
        meet = Meet.decode_untrusted(args)
        if self._attachments.hub_at(sender) is None:
            raise RpcRefusedError(Code.APPLICATION, "only hubs invite")
        try:
            caller = self._standing.verify(meet.certificate)
        except TrustError as problem:
            raise RpcRefusedError(Code.APPLICATION, str(problem)) from None
        if not self._standing.document.allows(self._standing.me, caller):
            raise RpcRefusedError(Code.APPLICATION, "the network document does not let us talk")
        self._directory.learn(caller)
        self._emit(Called(self._standing.label, caller.name, str(meet.invitation.relays[0])))
        self._services.tasks.start(self._answer(sender, meet, caller.overlay), f"meet {caller.name}")
        return [await self._take_init(meet.ike, caller.overlay)]

    async def _take_init(self, ike: bytes, caller: IPv6Address) -> bytes:
        """Our answer to the IKE_SA_INIT request that came with a call."""
        if not ike:
            return b""
        path, driver = carried_path(self._standing.me.overlay, caller), self._services.ike
        _, answer = await driver.carried(path, lambda now: (None, driver.endpoint.handle_carried(path, ike, now)))
        return answer

    async def _answer(self, hub: IPv6Address, meet: Meet, caller: IPv6Address) -> None:
        if {known.relay for known in self._session(caller).paths.relays.values()} & {*meet.invitation.relays}:
            return  # Two hubs told us of one relay.
        try:
            relay = await self._bind(hub, meet.invitation)
        except P2pvpnError as problem:
            name = self._directory.name_of(caller) or str(caller)
            self._emit(Refused(self._standing.label, name, f"relay: {problem}"))
            return
        self._keep(relay, caller, meet.invitation)
        if meet.resume:
            self._session(caller).resume(relay)
