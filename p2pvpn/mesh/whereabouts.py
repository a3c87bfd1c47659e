"""What hubs say of where a peer's tunnel comes from: the word of two of them lets guesses go there.

    peer -> hub   where [target, witness]   -> [address]     empty when that hub has no tunnel of the target
    hub  -> hub   where [target, witness]   -> [address]

The witness is the hub whose own sight is asked for; another hub that is asked asks it. So a peer that is attached to
only one hub of the target has two words all the same, and `witnesses` takes care that no single hub has a part in both.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from ipaddress import IPv6Address

from p2pvpn.core.address import IpAddress
from p2pvpn.core.errors import P2pvpnError, WireError
from p2pvpn.core.ids import PEER_ID_BYTES, PeerId
from p2pvpn.dht.rpc import Code, RpcNode, RpcRefusedError

from .attach import Hub
from .calls import decode_address_untrusted, encode_address
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
    rpc: RpcNode, attached: Sequence[Hub], target: PeerId, of_target: Sequence[PeerId]
) -> dict[IpAddress, frozenset[bytes]]:
    """Addresses of the target and the witnesses for each."""
    asked = witnesses(attached, of_target)
    words = await asyncio.gather(*(_ask_one(rpc, hub.overlay, target, witness) for hub, witness in asked))
    found: dict[IpAddress, frozenset[bytes]] = {}
    for (_, witness), word in zip(asked, words, strict=True):
        if word is not None:
            found[word] = found.get(word, frozenset()) | {bytes(witness)}
    return found


async def _ask_one(rpc: RpcNode, hub: IPv6Address, target: PeerId, witness: PeerId) -> IpAddress | None:
    try:
        answer = await rpc.request(hub, WHERE, [bytes(target), bytes(witness)], timeout=WHERE_TIMEOUT_S)
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
        target, witness = _decode_untrusted(args)
        registry = self._registry
        standing = registry.standing
        overlay = standing.overlay_of(target)
        if not registry.is_hub(sender):
            self._judge(sender, overlay)
        if witness == standing.me.peer_id:
            return encode_address(registry.outer_address(overlay))
        hub = standing.overlay_of(witness)
        if registry.is_hub(sender) or not registry.is_hub(hub):
            return b""
        try:
            answer = await self._rpc.request(hub, WHERE, [bytes(target), bytes(witness)], timeout=FORWARD_TIMEOUT_S)
            return encode_address(decode_address_untrusted(answer))
        except P2pvpnError:
            return b""

    def _judge(self, sender: IPv6Address, target: IPv6Address) -> None:
        """Refuses pairs that the document forbids; of a target that we do not know its own hub judges."""
        directory, document = self._registry.directory, self._registry.standing.document
        asker, member = directory.member(sender), directory.member(target)
        if asker is None or (member is not None and not document.allows(asker, member)):
            raise RpcRefusedError(Code.APPLICATION, "the network document does not let the two talk")


def _decode_untrusted(args: object) -> tuple[PeerId, PeerId]:
    if not isinstance(args, list | tuple) or len(args) != 2:
        raise WireError("expected two fields")
    for field in args:
        if not isinstance(field, bytes) or len(field) != PEER_ID_BYTES:
            raise WireError("a peer ID has 20 bytes")
    return PeerId(args[0]), PeerId(args[1])
