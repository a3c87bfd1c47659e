"""What hubs say of where a peer's tunnel comes from: the word of two of them lets guesses go there.

    peer -> hub   where [target, witness, the asker's certificate]   -> address    none without a tunnel of the target
    hub  -> hub   the same

The witness is the hub whose own sight is asked for; another hub that is asked asks it. So a peer that is attached to
only one hub of the target has two words all the same, and `independent` takes care that no hub has a part in two.
The witness judges by the certificate whether the document lets the asker talk to the target.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
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
MAX_ASKED = 4
"""Hubs of ours, and of the target; both have two or three."""


@dataclass(frozen=True, slots=True)
class Word:
    """What the `witness` sees by the word of the hub that was asked, which may be itself."""

    asked: PeerId
    witness: PeerId
    address: IpAddress


def independent(words: Sequence[Word]) -> dict[IpAddress, frozenset[bytes]]:
    """By address, witnesses of words of which no two have a hub in common."""
    found: dict[IpAddress, frozenset[bytes]] = {}
    involved: dict[IpAddress, set[PeerId]] = {}
    for word in sorted(words, key=lambda word: word.asked != word.witness):
        hubs = involved.setdefault(word.address, set())
        if word.asked not in hubs and word.witness not in hubs:
            hubs.update((word.asked, word.witness))
            found[word.address] = found.get(word.address, frozenset()) | {bytes(word.witness)}
    return found


async def ask(
    rpc: RpcNode, attached: Sequence[Hub], target: PeerId, of_target: Sequence[PeerId], certificate: bytes
) -> dict[IpAddress, frozenset[bytes]]:
    """Addresses of the target and independent witnesses for each. `of_target` may be out of date, so every hub of ours
    is asked what it sees and what each of them does.
    """
    asked = [
        (hub, witness)
        for hub in attached[:MAX_ASKED]
        for witness in dict.fromkeys((hub.peer_id, *of_target[:MAX_ASKED]))
    ]
    answers = await asyncio.gather(
        *(_ask_one(rpc, hub.overlay, [bytes(target), bytes(witness), certificate]) for hub, witness in asked)
    )
    pairs = zip(asked, answers, strict=True)
    return independent(
        [Word(hub.peer_id, witness, address) for (hub, witness), address in pairs if address is not None]
    )


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
