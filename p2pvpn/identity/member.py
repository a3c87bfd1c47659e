"""A member as its certificate describes it, after verification."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address, IPv6Address

from p2pvpn.core.ids import NetworkId, PeerId, overlay_address
from p2pvpn.core.selector import Selector
from p2pvpn.crypto.signatures import PublicKey


class Role(Enum):
    """What a certificate lets its holder do beyond being a peer."""

    HUB = "hub"
    GATEWAY = "gateway"
    ISSUER = "issuer"
    RELAY = "relay"


@dataclass(frozen=True, slots=True)
class Member:
    """A verified member of one network. Only verification makes these.

    `blocks` are the addresses that the certificate holds (RFC 3779): the overlay addresses and, for gateways, prefixes.
    `not_after` is in seconds since the epoch; `issuer` is the key identifier of the certificate that signed this one.
    """

    network: NetworkId
    peer_id: PeerId
    name: str
    roles: frozenset[Role]
    groups: frozenset[str]
    ipv4: IPv4Address | None
    blocks: tuple[Selector, ...]
    public_key: PublicKey
    not_before: float
    not_after: float
    serial: int
    issuer: bytes
    certificate: bytes

    @property
    def overlay(self) -> IPv6Address:
        """The overlay address that follows from network and key."""
        return overlay_address(self.network, self.peer_id)

    @property
    def is_hub(self) -> bool:
        return Role.HUB in self.roles
