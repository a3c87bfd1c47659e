"""A hub knocks at a peer's address, so that the peer learns what its NAT lets in, and for how long.

    peer > hub   knock       [address, proof, transaction, our port, other hub]  -> []
    hub > hub    knock.for   [address, transaction]                              -> []

Nobody is knocked at who did not ask: the address is that of the asker's own tunnel, and its port one at which the asker
showed a moment ago that it receives (`punch.proof`). `our port` is where the knock is to come from, 0 for the port of
the tunnel; `other hub` is the peer ID of a hub that is to knock instead, or empty. A hub takes another hub's word for
the rest, at a rate.
"""

from __future__ import annotations

from ipaddress import IPv6Address
from typing import Protocol

from p2pvpn.core.address import Endpoint, IpAddress, Path, any_local
from p2pvpn.core.errors import TrustError, WireError
from p2pvpn.core.ids import PEER_ID_BYTES, PeerId
from p2pvpn.core.stun import TRANSACTION_ID_BYTES
from p2pvpn.dht.rpc import Code, RpcNode, RpcRefusedError
from p2pvpn.punch.filtering import KnockLimits, KnockRefused, knock
from p2pvpn.punch.proof import PROOF_BYTES, Proofs
from p2pvpn.punch.reflexive import STUN_PORTS

from .services import Services
from .standing import Standing

KNOCK = "knock"
KNOCK_FOR = "knock.for"
FORWARD_TIMEOUT_S = 1.0


class Registry(Protocol):
    """What this asks of its network."""

    standing: Standing

    def is_hub(self, overlay: IPv6Address) -> bool: ...

    def outer_address(self, overlay: IPv6Address) -> IpAddress | None: ...

    def local_address(self, overlay: IPv6Address) -> Endpoint | None:
        """Where the peer's tunnel reaches us."""
        ...


class Knocks:
    """A hub's answers in one network."""

    def __init__(self, services: Services, registry: Registry, rpc: RpcNode, proofs: Proofs) -> None:
        self._services = services
        self._registry = registry
        self._rpc = rpc
        self._proofs = proofs
        self._limits = KnockLimits()
        self.sent = 0
        self._ports = tuple(services.underlay.listen_at(STUN_PORTS))
        rpc.register(KNOCK, self._on_knock)
        rpc.register(KNOCK_FOR, self._on_knock_for)

    async def _on_knock(self, sender: IPv6Address, args: object) -> list[object]:
        target, proof, transaction, port, other = _asked_untrusted(args)
        seen_at = self._registry.outer_address(sender)
        if seen_at is None or target.ip != seen_at:
            raise RpcRefusedError(Code.APPLICATION, "not the address of the tunnel")
        now = self._services.now
        try:
            self._proofs.check(proof, target, now)
        except TrustError as problem:
            raise RpcRefusedError(Code.APPLICATION, str(problem)) from None
        self._take(sender, target)
        if other:
            overlay = self._registry.standing.overlay_of(PeerId(other))
            if not self._registry.is_hub(overlay):
                raise RpcRefusedError(Code.APPLICATION, "no other hub of that ID")
            await self._rpc.request(overlay, KNOCK_FOR, [target.packed(), transaction], timeout=FORWARD_TIMEOUT_S)
            return []
        local = self._registry.local_address(sender)
        if port not in (0, *self._ports) or local is None or local.is_ipv6 != target.is_ipv6:
            raise RpcRefusedError(Code.APPLICATION, "there is no such port here")
        self._send(Path(Endpoint(local.host, port or local.port), target), transaction)
        return []

    def _on_knock_for(self, sender: IPv6Address, args: object) -> list[object]:
        if not isinstance(args, list | tuple) or len(args) != 2:
            raise WireError("knock.for takes two fields")
        if not self._registry.is_hub(sender):
            raise RpcRefusedError(Code.UNKNOWN_METHOD, "for hubs")
        target, transaction = _target_untrusted(args[0]), _sized_untrusted(args[1], TRANSACTION_ID_BYTES)
        if self._services.punch_limits.refuses(target):
            raise RpcRefusedError(Code.APPLICATION, "not an address to knock at")
        self._take(sender, target, is_hub=True)
        self._send(any_local(target, self._services.underlay.port), transaction)
        return []

    def _take(self, asker: IPv6Address, target: Endpoint, *, is_hub: bool = False) -> None:
        try:
            self._limits.take(asker.packed, target, self._services.now, is_hub=is_hub)
        except KnockRefused as problem:
            raise RpcRefusedError(Code.BUSY, str(problem)) from None

    def _send(self, path: Path, transaction: bytes) -> None:
        self.sent += 1
        self._services.underlay.send(path, knock(transaction))


def ask(target: Endpoint, proof: bytes, transaction: bytes, port: int, other: bytes) -> list[object]:
    """The arguments of `knock`."""
    return [target.packed(), proof, transaction, port, other]


def _asked_untrusted(args: object) -> tuple[Endpoint, bytes, bytes, int, bytes]:
    if not isinstance(args, list | tuple) or len(args) != 5:
        raise WireError("knock takes five fields")
    target, proof, transaction, port, other = args
    if type(port) is not int or not isinstance(other, bytes) or len(other) not in (0, PEER_ID_BYTES):
        raise WireError("knock takes a port and a peer ID")
    return (
        _target_untrusted(target),
        _sized_untrusted(proof, PROOF_BYTES),
        _sized_untrusted(transaction, TRANSACTION_ID_BYTES),
        port,
        other,
    )


def _target_untrusted(value: object) -> Endpoint:
    if not isinstance(value, bytes):
        raise WireError("an address is bytes")
    target = Endpoint.unpack_untrusted(value)
    if not target.port:
        raise WireError("no port")
    return target


def _sized_untrusted(value: object, size: int) -> bytes:
    if not isinstance(value, bytes) or len(value) != size:
        raise WireError(f"wanted {size} bytes")
    return value
