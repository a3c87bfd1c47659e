"""What is known of the NAT in front of us, and what of it a peer may know (RFC 4787, RFC 5780).

Everything here is what was observed, never more: `UNKNOWN` is a value like the others, and every user of it must be
right with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Mapping(Enum):
    """How the NAT maps the shared socket (RFC 4787 section 4.1)."""

    UNKNOWN = "unknown"
    """Too few hubs answered."""
    NONE = "none"
    """The hubs see our own address."""
    ENDPOINT_INDEPENDENT = "endpoint-independent"
    """All destinations see the same address: what the hubs see works for peers."""
    ENDPOINT_DEPENDENT = "endpoint-dependent"
    """Two hubs see different ones; whether also two ports of one hub would is not known."""
    ADDRESS_DEPENDENT = "address-dependent"
    """Two ports of one hub see the same address, two hubs see different ones."""
    ADDRESS_AND_PORT_DEPENDENT = "address-and-port-dependent"
    """Two ports of one hub see different ones."""

    @property
    def is_dependent(self) -> bool:
        """Whether a peer sees us at an address that no hub can tell."""
        return self in (Mapping.ENDPOINT_DEPENDENT, Mapping.ADDRESS_DEPENDENT, Mapping.ADDRESS_AND_PORT_DEPENDENT)


class Filtering(Enum):
    """Whose packets the NAT or a firewall lets in (RFC 4787 section 5)."""

    UNKNOWN = "unknown"
    ENDPOINT_INDEPENDENT = "endpoint-independent"
    ADDRESS_DEPENDENT = "address-dependent"
    ADDRESS_AND_PORT_DEPENDENT = "address-and-port-dependent"


class Allocation(Enum):
    """Which outer ports an endpoint-dependent NAT takes for new mappings."""

    UNKNOWN = "unknown"
    PRESERVING = "preserving"
    """The inner port, unless it is taken."""
    SEQUENTIAL = "sequential"
    """The last one and a small step."""
    RANDOM = "random"


@dataclass(frozen=True, slots=True)
class NatBehaviour:
    """One address family's NAT, as far as it is known.

    `step` is the distance between two successive ports of a sequential allocator. `lifetime_s` is how long a silent
    binding was seen to live, None while that is not known. `hairpin` says whether the NAT turns packets for its own
    outer addresses around.
    """

    mapping: Mapping = Mapping.UNKNOWN
    filtering: Filtering = Filtering.UNKNOWN
    allocation: Allocation = Allocation.UNKNOWN
    step: int = 0
    lifetime_s: float | None = None
    hairpin: bool | None = None
