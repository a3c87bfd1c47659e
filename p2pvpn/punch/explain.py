"""What a NAT's behaviour means for its owner, in plain sentences."""

from __future__ import annotations

from .behaviour import Allocation, Filtering, Mapping, NatBehaviour

MAPPING = {
    Mapping.UNKNOWN: "too few hubs answered to tell",
    Mapping.NONE: "no address translation: the hubs see this machine's own address",
    Mapping.ENDPOINT_INDEPENDENT: "an easy NAT: peers see the same address as the hubs",
    Mapping.ENDPOINT_DEPENDENT: "a hard NAT: it shows another address to everybody",
    Mapping.ADDRESS_DEPENDENT: "a hard NAT: it shows another address to every host",
    Mapping.ADDRESS_AND_PORT_DEPENDENT: "a hard NAT: it shows another address to every port of every host",
}
FILTERING = {
    Filtering.UNKNOWN: "not known whose packets come in",
    Filtering.ENDPOINT_INDEPENDENT: "packets from anybody come in",
    Filtering.ADDRESS_DEPENDENT: "packets come in from hosts that were written to",
    Filtering.ADDRESS_AND_PORT_DEPENDENT: "packets come in from ports that were written to",
}
ALLOCATION = {
    Allocation.UNKNOWN: "not known how it chooses ports",
    Allocation.PRESERVING: "it keeps the port if it can",
    Allocation.SEQUENTIAL: "it takes one port after the other: they can be guessed",
    Allocation.RANDOM: "it takes random ports",
}
HAIRPIN = {
    None: "not known whether it turns packets around",
    True: "two machines behind it reach each other at its outer address",
    False: "two machines behind it reach each other by their own addresses only",
}
BLOCKED = "UDP does not get through: everything goes over TCP by way of a hub"
NO_ANSWER = "no hub answers"


def lifetime(seconds: float | None, refresh_s: float) -> str:
    """`seconds` that a silent binding lives; `refresh_s` between packets that keep it."""
    known = (
        "how long they live in silence is being learned" if seconds is None else f"they live {seconds:.0f} s at least"
    )
    return f"{known}; a packet every {refresh_s:.0f} s keeps them"


def summary(behaviour: NatBehaviour) -> str:
    """Who meets us directly."""
    mapping, filtering = behaviour.mapping, behaviour.filtering
    if mapping is Mapping.UNKNOWN:
        return "it cannot be told who reaches you directly; it is tried with everybody"
    if not mapping.is_dependent:
        if filtering is Filtering.ENDPOINT_INDEPENDENT:
            return "peers behind any NAT reach you directly"
        if filtering is Filtering.ADDRESS_DEPENDENT:
            return "direct with everybody, once both sides have written"
        if filtering is Filtering.ADDRESS_AND_PORT_DEPENDENT:
            return "direct with everybody but peers behind hard NATs, where ports have to be guessed"
        return "direct with peers behind easy NATs; what comes in from others is not known"
    guess = {
        Allocation.SEQUENTIAL: "others by guessing the next port",
        Allocation.RANDOM: "others with luck, else relayed",
        Allocation.PRESERVING: "others often, as it keeps ports where it can",
        Allocation.UNKNOWN: "others perhaps, else relayed",
    }[behaviour.allocation]
    return f"direct with peers without a NAT or behind one that does not look at ports; {guess}"
