"""How two peers meet at a relay: the caller asks a hub, the called one is told, both bind their sides."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from ipaddress import IPv6Address

from p2pvpn.core.errors import P2pvpnError, TrustError
from p2pvpn.dht.rpc import Code, RpcNode, RpcRefusedError

from .attach import Attachments, Hub
from .calls import CALL, MEET, Call, Invitation, Meet
from .connect import ConnectError
from .directory import Directory, Locator
from .events import Called, EventSink, Refused
from .relaying import RelayPath
from .services import Services
from .session import Session
from .standing import Standing

CALL_TIMEOUT_S = 3.0
STAGGER_S = 0.4
"""A hub that takes longer to answer and relay is not waited for: the next one is asked too."""
UNCLAIMED_S = 20.0
"""A relay on which no SA began is given up after this."""


class Rendezvous:
    """Calls out and calls in, of one network."""

    def __init__(
        self,
        *,
        services: Services,
        standing: Standing,
        rpc: RpcNode,
        attachments: Attachments,
        directory: Directory,
        session: Callable[[IPv6Address], Session],
        emit: EventSink,
    ) -> None:
        self._services = services
        self._standing = standing
        self._rpc = rpc
        self._attachments = attachments
        self._directory = directory
        self._session = session
        self._emit = emit
        rpc.register(MEET, self._on_meet)

    async def relay_to(self, locator: Locator, tried: Sequence[str], *, resume: bool = False) -> RelayPath:
        """Call a peer through our hubs, to `resume` a live SA or for a new one. Raises ConnectError.

        Hubs that the peer is attached to are asked first, hubs at addresses that were `tried` last.
        """
        overlay = self._standing.overlay_of(locator.peer_id)
        call = Call(locator.peer_id, locator.hubs, self._standing.me.certificate, resume)
        hubs = sorted(self._attachments.connected(), key=lambda hub: self._rank(hub, locator, tried))
        problem = "no hub is attached"
        asking: set[asyncio.Task[tuple[RelayPath, Invitation]]] = set()
        try:
            while hubs or asking:
                if hubs:
                    asking.add(asyncio.create_task(self._ask(hubs.pop(0), call), name="call"))
                done, asking = await asyncio.wait(
                    asking, timeout=STAGGER_S if hubs else None, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    try:
                        relay, invitation = await task
                    except ConnectError as failure:
                        problem = str(failure)
                    else:
                        self._keep(relay, overlay, invitation)
                        return relay
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        self._directory.forget(overlay)
        raise ConnectError("call", problem)

    def _rank(self, hub: Hub, locator: Locator, tried: Sequence[str]) -> tuple[int, bool, bool]:
        host = self._host_of(hub.overlay)
        silent = self._rpc.is_silent(hub.overlay) or self._session(hub.overlay).is_doubtful
        return tried.count(host or ""), silent, hub.peer_id not in locator.hubs

    def _host_of(self, hub: IPv6Address) -> str | None:
        """Where our tunnel to a hub goes."""
        current = self._session(hub).current
        return None if current is None else current.path.remote.host

    async def _ask(self, hub: Hub, call: Call) -> tuple[RelayPath, Invitation]:
        try:
            answer = await self._rpc.request(hub.overlay, CALL, call.encode(), timeout=CALL_TIMEOUT_S)
            invitation = Invitation.decode_untrusted(answer)
            return await self._bind(hub.overlay, invitation), invitation
        except P2pvpnError as failure:
            self._session(hub.overlay).suspect()
            raise ConnectError("call", f"{hub.name}: {failure}") from None

    async def _bind(self, hub: IPv6Address, invitation: Invitation) -> RelayPath:
        return await self._services.relays.bind(invitation.ticket, invitation.relays, self._host_of(hub))

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
        return []

    async def _answer(self, hub: IPv6Address, meet: Meet, caller: IPv6Address) -> None:
        if not self._session(caller).paths.relays.keys().isdisjoint(meet.invitation.relays):
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
