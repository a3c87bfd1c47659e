"""How a NAT maps, from where different hubs and ports see one socket (RFC 4787 section 4.1, RFC 5780 section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from p2pvpn.core.address import Endpoint

from .behaviour import Mapping


@dataclass(frozen=True, slots=True)
class Heard:
    """The server at `at` sees the socket at `seen`; its answer came to `local`."""

    at: Endpoint
    local: Endpoint
    seen: Endpoint


def judge_mapping(heard: Sequence[Heard]) -> Mapping:
    """The mapping that answers of one address family show.

    Another address of ours is another mapping: only answers to one local address can disagree. Two ports of one hub
    prove dependence, never independence.
    """
    if len({one.seen for one in heard}) > 1:
        found = [_compare([one for one in heard if one.local == local]) for local in {one.local for one in heard}]
        return next((mapping for mapping in found if mapping is not None), Mapping.UNKNOWN)
    if len({one.at.host for one in heard}) < 2:
        return Mapping.UNKNOWN
    return Mapping.NONE if all(one.seen == one.local for one in heard) else Mapping.ENDPOINT_INDEPENDENT


def _compare(heard: Sequence[Heard]) -> Mapping | None:
    """The dependence that answers to one local address show, if they show any."""
    if len({one.seen for one in heard}) < 2:
        return None
    told_apart = False
    for host in {one.at.host for one in heard}:
        same_host = [one.seen for one in heard if one.at.host == host]
        if len(set(same_host)) > 1:
            return Mapping.ADDRESS_AND_PORT_DEPENDENT
        told_apart = told_apart or len(same_host) > 1
    return Mapping.ADDRESS_DEPENDENT if told_apart else Mapping.ENDPOINT_DEPENDENT
