"""Who is where: publishes what others need to find us, and finds others.

Published: a locator (which hubs can call us, at which public endpoints we answer), our name and our IPv4 address.
Found: locators by overlay address, overlay addresses by name or IPv4 address. Everything is verified by the client of
the DHT; this part only remembers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Protocol

from p2pvpn.core.address import Endpoint
from p2pvpn.core.errors import LocalError, P2pvpnError, TrustError
from p2pvpn.core.ids import PeerId
from p2pvpn.core.limits import BoundedTable
from p2pvpn.dht import records
from p2pvpn.dht.client import DhtClient, NoHubAnsweredError
from p2pvpn.dht.records import LocatorBody, NameBody
from p2pvpn.identity.keys import PeerKey
from p2pvpn.identity.member import Member

from .connect import ConnectError
from .events import Located
from .services import Services

MAX_KNOWN = 20_000
"""Members and addresses remembered; the least recently used are forgotten first."""
PUBLISH_DELAY_S = 0.2
"""Changes come in bunches: two hubs, three interfaces."""
MAX_RESOLVING = 100


class Owner(Protocol):
    """What the directory asks of its network."""

    label: str

    @property
    def me(self) -> Member: ...

    @property
    def key(self) -> PeerKey: ...

    def emit(self, event: Located) -> None: ...

    def verify(self, certificate: bytes) -> Member: ...

    def public_endpoints(self) -> tuple[Endpoint, ...]: ...


class NobodyToAsk(ConnectError):
    """No hub answered a look-up."""


@dataclass(frozen=True, slots=True)
class Locator:
    """Where a peer can be reached."""

    peer_id: PeerId
    hubs: tuple[PeerId, ...]
    endpoints: tuple[Endpoint, ...]


class Directory:
    """One network's names and places."""

    def __init__(self, services: Services, owner: Owner, dht: DhtClient) -> None:
        self._services = services
        self._owner = owner
        self._dht = dht
        self._members: BoundedTable[IPv6Address, Member] = BoundedTable(MAX_KNOWN)
        self._ipv4: BoundedTable[IPv4Address, IPv6Address] = BoundedTable(MAX_KNOWN)
        self._resolving: set[IPv4Address] = set()
        self._hubs: tuple[PeerId, ...] = ()
        self._dirty = asyncio.Event()
        self._named: object = None
        """The name and address that the hubs were told of."""
        self._name_again_at = 0.0

    # What we know.

    def learn(self, member: Member) -> None:
        """A member whose certificate was verified."""
        self._members.put(member.overlay, member)
        if member.ipv4 is not None:
            self._ipv4.put(member.ipv4, member.overlay)

    def member(self, overlay: IPv6Address) -> Member | None:
        return self._members.get(overlay)

    def name_of(self, overlay: IPv6Address) -> str | None:
        member = self._members.peek(overlay)
        return member.name if member is not None else None

    def known_ipv4(self, address: IPv4Address) -> IPv6Address | None:
        return self._ipv4.get(address)

    def forget(self, overlay: IPv6Address) -> None:
        """Drop what was cached about a peer."""
        member = self._members.pop(overlay)
        if member is not None and member.ipv4 is not None:
            self._ipv4.pop(member.ipv4)
        self._dht.forget(records.key_of_locator(self._owner.me.network, overlay))

    def known_locator(self, overlay: IPv6Address) -> Locator | None:
        """A peer's locator if it need not be looked up."""
        known = self._dht.remembered(records.key_of_locator(self._owner.me.network, overlay))
        return _locator(known[0]) if known else None

    # Finding.

    async def locator(self, overlay: IPv6Address) -> Locator:
        """Raises ConnectError when nobody knows the peer."""
        started = self._services.now
        record = await self._lookup(records.key_of_locator(self._owner.me.network, overlay), str(overlay))
        locator = _locator(record)
        took = round(self._services.now - started, 4)
        self._owner.emit(Located(self._owner.label, self.name_of(overlay) or str(overlay), len(locator.hubs), took))
        return locator

    async def resolve(self, text: str) -> IPv6Address:
        """An overlay address from a name or any address of a peer. Raises LocalError or ConnectError."""
        try:
            return IPv6Address(text)
        except ValueError:
            pass
        try:
            record = await self._lookup(records.key_of_name(self._owner.me.network, text), text)
        except NobodyToAsk:
            known = self._known_as(text)
            if known is None:
                raise
            return known
        assert isinstance(record.body, NameBody)
        return record.body.overlay

    def _known_as(self, text: str) -> IPv6Address | None:
        """Whom we met under a name or an IPv4 address: what serves while no hub answers."""
        return next((one.overlay for _, one in self._members.items() if text in (one.name, str(one.ipv4))), None)

    async def _lookup(self, key: bytes, what: str) -> records.Record:
        try:
            record = await self._dht.lookup(key)
        except NoHubAnsweredError as problem:
            raise NobodyToAsk("locate", f"{what}: {problem}") from None
        except P2pvpnError as problem:
            raise ConnectError("locate", f"{what}: {problem}") from None
        if record is None:
            raise ConnectError("locate", f"no hub knows {what}")
        try:
            self.learn(self._owner.verify(record.certificate))
        except TrustError as problem:
            raise ConnectError("locate", f"{what}: {problem}") from None
        return record

    def resolve_then(self, address: IPv4Address, found: Callable[[IPv6Address], None]) -> None:
        """Find who has an IPv4 address; a packet that comes while a look-up is under way is lost to its sender's
        retransmission.
        """
        if address in self._resolving or len(self._resolving) >= MAX_RESOLVING:
            return
        self._resolving.add(address)
        self._services.tasks.start(self._resolve_ipv4(address, found), f"resolve {address}")

    async def _resolve_ipv4(self, address: IPv4Address, found: Callable[[IPv6Address], None]) -> None:
        try:
            overlay = await self.resolve(str(address))
        except (ConnectError, LocalError):
            return
        finally:
            self._resolving.discard(address)
        self._ipv4.put(address, overlay)
        found(overlay)

    # Publishing.

    def hubs_changed(self, hubs: Sequence[PeerId]) -> None:
        """The hubs we are attached to now."""
        if tuple(hubs) != self._hubs:
            self._hubs = tuple(hubs)
            self.publish_soon()

    def publish_soon(self) -> None:
        self._dirty.set()

    async def run(self) -> None:
        """Publish at every change and again before the records end, until cancelled."""
        while True:
            self._dirty.clear()
            published = await self._publish() if self._hubs else True
            pause = self._services.tuning.locator_refresh_s if published else self._services.tuning.retry_first_s
            try:
                async with asyncio.timeout(pause):
                    await self._dirty.wait()
                await asyncio.sleep(PUBLISH_DELAY_S)
            except TimeoutError:
                pass

    async def _publish(self) -> bool:
        me = self._owner.me
        bodies: list[records.Body] = [
            LocatorBody(self._hubs[: records.MAX_HUBS], self._owner.public_endpoints()[: records.MAX_ENDPOINTS]),
        ]
        now, held = self._services.now, (me.name, me.ipv4)
        if held != self._named or now >= self._name_again_at:
            bodies += [NameBody(name, me.overlay) for name in (me.name, str(me.ipv4 or "")) if name]
        wall = self._services.wall()
        raws = [
            records.build(
                me.network,
                me.peer_id,
                body,
                sequence=int(wall * 1000),
                expires=int(min(wall + records.LIFETIME_S[body.kind], me.not_after)),
                sign=self._owner.key.sign,
                certificate=me.certificate,
            )
            for body in bodies
        ]
        answers = await asyncio.gather(*(self._dht.publish(raw) for raw in raws), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, P2pvpnError):
                raise answer
        done = all(isinstance(answer, int) and answer > 0 for answer in answers)
        if done and len(bodies) > 1:
            self._named, self._name_again_at = held, now + self._services.tuning.name_refresh_s
        return done


def _locator(record: records.Record) -> Locator:
    assert isinstance(record.body, LocatorBody)
    return Locator(record.subject, record.body.hubs, record.body.endpoints)
