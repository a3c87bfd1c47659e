"""What must be possible between two hosts: a direct path by which means, or only a relayed one.

Derived from what mappings and filters do, and from nothing that the product does. Both hosts know each other's
*reflexive* endpoint, the one that a hub sees; each keeps sending from its one socket to the other's, answers what
comes in, and no more.

    X's packet reaches Y   when every NAT of Y lets it in. A NAT with endpoint-independent filtering does. Any other
                           does only if Y's own packets to X went through the very mapping that the hub saw, which
                           they do when it and every NAT nearer to Y map endpoint-independently; and then, if it looks
                           at addresses alone, or if X's packet comes from the port that Y sent to, which it does
                           when all NATs of X map endpoint-independently.
    Y's answer gets back   when it comes from where X sent to: when all NATs of Y map endpoint-independently. Else it
                           comes from another port of the same address, and every NAT of X must overlook ports.

    Both settle            when each may go on answering to where packets come from. If NATs on both sides map by port,
                           every answer opens one more port, to which the other's answer opens one more, for ever.

A path is direct when the first two hold in at least one direction and both settle. Before that: hosts on one LAN need
no NAT at all; a NAT that both are behind must turn packets back (hairpin); and a network that blocks UDP leaves only
streams to a relay.

What is left can be *guessed* if one side shows every destination the same endpoint. Then the other side's packets to it
have opened all its NATs and firewalls for it, and all that is unknown is the port that they left by. Where the
allocator of that port goes on by steps it is one of the next; where it is random, many sockets on that side against
many probes of the other meet by the birthday paradox: with s sockets and p probes of n ports each, 1 - (1 - s/n)^p.
If both sides show each destination another endpoint, a guess would have to be right about both: nothing is promised.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import Enum

from .nat import NatKind, Ports, Rule

BIRTHDAY_SHARE = 0.96
"""Of the seeds in which the birthday method has to meet."""


class Verdict(Enum):
    """How a pair must come together."""

    DIRECT = "direct"
    """By sending to the reflexive endpoint alone."""
    PREDICTED = "predicted"
    """Directly, as the next port of an endpoint-dependent NAT can be told."""
    BIRTHDAY = "birthday"
    """Directly in most cases, by many guesses."""
    RELAYED = "relayed"
    """Nothing better is promised, nor forbidden."""
    STREAM = "needs TCP"
    """UDP is blocked on the way to the relay."""

    @property
    def direct_share(self) -> float:
        """Of many seeds, how many have to find a direct path."""
        return {Verdict.DIRECT: 1.0, Verdict.PREDICTED: 1.0, Verdict.BIRTHDAY: BIRTHDAY_SHARE}.get(self, 0.0)


@dataclass(frozen=True, slots=True)
class Box:
    """One NAT or firewall on the way; equal names are one box. A firewall maps endpoint-independently."""

    name: Hashable
    mapping: Rule
    filtering: Rule
    hairpin: bool = True
    ports: Ports = Ports.PRESERVE

    @classmethod
    def of(cls, name: Hashable, kind: NatKind) -> Box:
        return cls(name, kind.mapping, kind.filtering, kind.hairpin, kind.ports)

    @classmethod
    def firewall(cls, name: Hashable, filtering: Rule) -> Box:
        """Without translation: packets of one LAN to another behind the same box are simply routed."""
        return cls(name, Rule.EI, filtering)


@dataclass(frozen=True, slots=True)
class Side:
    """Where one host is. Boxes are listed from the host outwards; None means no connectivity of that family."""

    lan: Hashable
    ipv4: tuple[Box, ...] | None = ()
    ipv6: tuple[Box, ...] | None = None
    udp_blocked: bool = False


def verdict(one: Side, other: Side) -> Verdict:
    """What must be possible for this pair."""
    if one.lan == other.lan:
        return Verdict.DIRECT
    if one.udp_blocked or other.udp_blocked:
        return Verdict.STREAM
    families = [
        _of_family(mine, theirs)
        for mine, theirs in ((one.ipv6, other.ipv6), (one.ipv4, other.ipv4))
        if mine is not None and theirs is not None
    ]
    return next((best for best in Verdict if best in families), Verdict.RELAYED)


def _of_family(one: Sequence[Box], other: Sequence[Box]) -> Verdict:
    if one and other and one[-1].name == other[-1].name and not one[-1].hairpin:
        return Verdict.RELAYED
    if _is_direct(one, other):
        return Verdict.DIRECT
    if not (_keeps_endpoint(one) or _keeps_endpoint(other)):
        return Verdict.RELAYED
    return Verdict.PREDICTED if _is_predictable(other if _keeps_endpoint(one) else one) else Verdict.BIRTHDAY


def _is_direct(one: Sequence[Box], other: Sequence[Box]) -> bool:
    if _maps_by_port(one) and _maps_by_port(other):
        return False
    return any(_reaches(x, y) and _answers(y, x) for x, y in ((one, other), (other, one)))


def _reaches(sender: Sequence[Box], receiver: Sequence[Box]) -> bool:
    """Whether the sender's packet to the receiver's reflexive endpoint comes in, when both send."""
    from_known_port = _keeps_endpoint(sender)
    for depth, box in enumerate(receiver):
        if box.filtering is Rule.EI:
            continue
        same_mapping = _keeps_endpoint(receiver[: depth + 1])
        if not same_mapping or (box.filtering is Rule.APD and not from_known_port):
            return False
    return True


def _answers(receiver: Sequence[Box], sender: Sequence[Box]) -> bool:
    """Whether the answer to such a packet comes back in to its sender."""
    return _keeps_endpoint(receiver) or all(box.filtering is not Rule.APD for box in sender)


def _keeps_endpoint(boxes: Sequence[Box]) -> bool:
    """Whether every destination sees the same endpoint."""
    return all(box.mapping is Rule.EI for box in boxes)


def _is_predictable(boxes: Sequence[Box]) -> bool:
    """Whether the port of the next mapping follows from the last one.

    The first NAT that maps endpoint-dependently and all outside of it make a new mapping then; the outermost of them
    that does not preserve the port decides. A port that the first one would preserve is taken.
    """
    first = next(depth for depth, box in enumerate(boxes) if box.mapping is not Rule.EI)
    chosen = (box.ports for box in reversed(boxes[first:]) if box.ports is not Ports.PRESERVE)
    return next(chosen, None) is Ports.SEQUENTIAL


def _maps_by_port(boxes: Sequence[Box]) -> bool:
    """Whether two ports of one address see different endpoints."""
    return any(box.mapping is Rule.APD for box in boxes)
