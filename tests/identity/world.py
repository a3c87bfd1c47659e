"""A small network for tests: an admin, an issuing hub, a second one, a gateway, and the means to forge."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from p2pvpn.core.selector import Selector
from p2pvpn.crypto.signatures import sign_certificate
from p2pvpn.identity.admin import AdminNetwork
from p2pvpn.identity.certificates import DAY_S, MEMBER_LIFETIME_S, Authority, issue_leaf, parse_untrusted
from p2pvpn.identity.enrolment import Issuer, JoinResult, join_request
from p2pvpn.identity.grants import Grant, Request
from p2pvpn.identity.keys import PeerKey
from p2pvpn.identity.profile import Profile
from p2pvpn.identity.trust import Trust

WALL = 1_800_000_000.0
"""January 2027, in seconds since the epoch."""


def entropy(seed: str) -> Callable[[int], bytes]:
    """Bytes that follow from a seed."""
    counter = 0

    def draw(count: int, /) -> bytes:
        nonlocal counter
        counter += 1
        return hashlib.shake_256(f"{seed} {counter}".encode()).digest(count)

    return draw


@dataclass
class World:
    admin: AdminNetwork
    hub_key: PeerKey
    hub: Grant
    second_key: PeerKey
    second: Grant
    gateway_key: PeerKey
    gateway: Grant

    @property
    def trust(self) -> Trust:
        return Trust(self.admin.genesis, self.admin.document)

    def issuer(self, **more: object) -> Issuer:
        """The issuer on the first hub, with today's document."""
        return self.profile(self.hub_key, self.hub).make_issuer(entropy=entropy("issuer"), **more)

    def second_issuer(self) -> Issuer:
        return self.profile(self.second_key, self.second).make_issuer(entropy=entropy("second issuer"))

    def profile(self, key: PeerKey, grant: Grant) -> Profile:
        return Profile.from_grant(key, replace(grant, document=self.admin.document))

    @property
    def authority(self) -> Authority:
        """What a thief of the first issuer has."""
        return Authority(self.hub_key.issuing_key(), parse_untrusted(self.hub.issuer_certificate))

    def stolen(self, key: PeerKey, **changes: object) -> bytes:
        """A leaf that the first issuer's key signs, right in all that is not changed."""
        said = {
            "name": "mallory",
            "wall": WALL,
            "serial": 4711,
            "lifetime": MEMBER_LIFETIME_S,
            "groups": ["default"],
            "blocks": [Selector.of_address(self.authority.certificate.blocks[0].start + 9)],
        }
        return issue_leaf(self.authority, key.public_key, self.admin.genesis.network_id, **said | changes)


@cache
def _keys(_name: str) -> tuple[PeerKey, ...]:
    return tuple(PeerKey.generate() for _ in range(3))


def make_world(name: str = "home") -> World:
    """Fresh each time, so that a test may change it."""
    admin = AdminNetwork.create(name, WALL, entropy(f"admin {name}"))
    hub_key, second_key, gateway_key = _keys(name)
    hub = admin.grant(Request.create(hub_key, "hub-one"), hub="hub.example.net:4500,192.0.2.1", issuer=True, wall=WALL)
    second = admin.grant(
        Request.create(second_key, "hub-two"), hub="198.51.100.7", issuer=True, enrol_port=8443, wall=WALL
    )
    gateway = admin.grant(
        Request.create(gateway_key), name="office", prefixes=["192.168.7.0/24", "2001:db8:7::/48"], wall=WALL
    )
    return World(admin, hub_key, hub, second_key, second, gateway_key, gateway)


def join(issuer: Issuer, name: str, key: PeerKey, wall: float = WALL) -> JoinResult:
    """A member that joins in the ordinary way."""
    token = issuer.invite(name, wall)
    return JoinResult.parse_untrusted(issuer.handle_untrusted(join_request(token, key), wall))


def rebuilt(
    der: bytes,
    signer: PeerKey,
    *,
    drop: Iterable[x509.ObjectIdentifier] = (),
    add: Iterable[tuple[x509.ExtensionType, bool]] = (),
    key: object = None,
) -> bytes:
    """A certificate with some extensions left out or added, signed again."""
    old = x509.load_der_x509_certificate(der)
    builder = x509.CertificateBuilder(
        old.issuer,
        old.subject,
        key or old.public_key(),
        old.serial_number,
        old.not_valid_before_utc.replace(tzinfo=None),
        old.not_valid_after_utc.replace(tzinfo=None),
    )
    for extension in old.extensions:
        if extension.oid not in drop:
            builder = builder.add_extension(extension.value, extension.critical)
    for value, critical in add:
        builder = builder.add_extension(value, critical)
    return sign_certificate(signer.private, builder)


def pem(der: bytes) -> bytes:
    return x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM)


__all__ = ["DAY_S", "WALL", "World", "entropy", "join", "make_world", "pem", "rebuilt"]
