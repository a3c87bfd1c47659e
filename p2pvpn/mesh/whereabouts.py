"""What hubs say of where a peer's tunnel comes from: the word of two of them lets guesses go there.

    peer -> hub   where [target, witness, the asker's certificate]   -> address    none without a tunnel of the target
    hub  -> hub   the same

The witness is the hub whose own sight is asked for; another hub that is asked asks it. So a peer that is attached to
only one hub of the target has two words all the same, and `witnesses` takes care that no single hub has a part in both.
The witness judges by the certificate whether the document lets the asker talk to the target.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from ipaddress import IPv6Address

from p2pvpn.core.address import IpAddress
from p2pvpn.core.errors import P2pvpnError, TrustError, WireError
from p2pvpn.core.ids import PEER_ID_BYTES, PeerId
from p2pvpn.dht.rpc import Code, RpcNode, RpcRefusedError
from p2pvpn.identity.member import Member

from .attach import Hub
from .calls import MAX_CERTIFICATE_BYTES, decode_address_untrusted, encode_address
from .hubside import Registry

WHERE = "where"
WHERE_TIMEOUT_S = 1.5
FORWARD_TIMEOUT_S = 1.0


def witnesses(attached: Sequence[Hub], of_target: Sequence[PeerId]) -> list[tuple[Hub, PeerId]]:
    """Which of our hubs to ask for the sight of which of the target's: each hub has a part in one word at most."""
    own = [(hub, hub.peer_id) for hub in attached if hub.peer_id in of_target]
    others = [hub for hub in attached if hub.peer_id not in of_target]
    unseen = [peer_id for peer_id in of_target if all(hub.peer_id != peer_id for hub, _ in own)]
    return own + list(zip(others, unseen, strict=False))


async def ask(
    rpc: RpcNode, attached: Sequence[Hub], target: PeerId, of_target: Sequence[PeerId], certificate: bytes
) -> dict[IpAddress, frozenset[bytes]]:
    """Addresses of the target and the witnesses for each."""
    asked = witnesses(attached, of_target)
    words = await asyncio.gather(
        *(_ask_one(rpc, hub.overlay, [bytes(target), bytes(witness), certificate]) for hub, witness in asked)
    )
    found: dict[IpAddress, frozenset[bytes]] = {}
    for (_, witness), word in zip(asked, words, strict=True):
        if word is not None:
            found[word] = found.get(word, frozenset()) | {bytes(witness)}
    return found


async def _ask_one(rpc: RpcNode, hub: IPv6Address, question: list[object]) -> IpAddress | None:
    try:
        answer = await rpc.request(hub, WHERE, question, timeout=WHERE_TIMEOUT_S)
        return decode_address_untrusted(answer)
    except P2pvpnError:
        return None


class Whereabouts:
    """A hub's answers."""

    def __init__(self, rpc: RpcNode, registry: Registry) -> None:
        self._rpc = rpc
        self._registry = registry
        rpc.register(WHERE, self._on_where)

    async def _on_where(self, sender: IPv6Address, args: object) -> bytes:
        target, witness, certificate = _decode_untrusted(args)
        registry = self._registry
        standing = registry.standing
        asker = self._verify(certificate)
        if asker.overlay != sender and not registry.is_hub(sender):
            raise RpcRefusedError(Code.APPLICATION, "the certificate is not the asker's")
        if witness == standing.me.peer_id:
            return self._testify(asker, standing.overlay_of(target))
        hub = standing.overlay_of(witness)
        if registry.is_hub(sender) or not registry.is_hub(hub):
            return b""
        question = [bytes(target), bytes(witness), certificate]
        try:
            answer = await self._rpc.request(hub, WHERE, question, timeout=FORWARD_TIMEOUT_S)
            return encode_address(decode_address_untrusted(answer))
        except P2pvpnError:
            return b""

    def _testify(self, asker: Member, target: IPv6Address) -> bytes:
        """What we see ourselves, for whom the document lets talk to the target."""
        registry = self._registry
        member = registry.directory.member(target)
        if member is None or not registry.standing.document.allows(asker, member):
            raise RpcRefusedError(Code.APPLICATION, "the network document does not let the two talk")
        return encode_address(registry.outer_address(target))

    def _verify(self, certificate: bytes) -> Member:
        try:
            return self._registry.standing.verify(certificate)
        except TrustError as problem:
            raise RpcRefusedError(Code.APPLICATION, str(problem)) from None


def _decode_untrusted(args: object) -> tuple[PeerId, PeerId, bytes]:
    if not isinstance(args, list | tuple) or len(args) != 3:
        raise WireError("expected three fields")
    target, witness, certificate = args
    for field in (target, witness):
        if not isinstance(field, bytes) or len(field) != PEER_ID_BYTES:
            raise WireError("a peer ID has 20 bytes")
    if not isinstance(certificate, bytes) or len(certificate) > MAX_CERTIFICATE_BYTES:
        raise WireError("a certificate of too many bytes")
    return PeerId(target), PeerId(witness), certificate
