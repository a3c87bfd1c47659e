"""Which records are believed: each way to lie, and the reason it is refused for."""

from __future__ import annotations

import ipaddress

import pytest

from p2pvpn.core.errors import TrustError
from p2pvpn.core.ids import NetworkId
from p2pvpn.dht import records
from p2pvpn.dht.policy import AcceptancePolicy, Reason, RecordRefused
from p2pvpn.dht.records import NameBody, RouteBody, key_of, parse_untrusted
from p2pvpn.identity.member import Role

from .world import NETWORK, WALL, Registry


@pytest.fixture
def registry() -> Registry:
    return Registry()


@pytest.fixture
def policy(registry: Registry) -> AcceptancePolicy:
    return AcceptancePolicy(NETWORK, registry.verify_leaf)


def refusal(policy: AcceptancePolicy, raw: bytes, key: bytes | None = None, **options: object) -> Reason:
    with pytest.raises(RecordRefused) as refused:
        policy.check(raw, key if key is not None else key_of(parse_untrusted(raw)), WALL, **options)  # type: ignore[arg-type]
    return refused.value.reason


def test_a_true_record_is_believed_from_its_subject_from_a_hub_and_at_look_up(
    registry: Registry, policy: AcceptancePolicy
) -> None:
    who = registry.join("laptop")
    for sender in (who.overlay, None):
        assert policy.check(who.record(), who.key, WALL, sender).subject == who.peer_id


def test_nobody_stores_what_is_not_its_own(registry: Registry, policy: AcceptancePolicy) -> None:
    who, other = registry.join("laptop"), registry.join("mallory")
    assert refusal(policy, who.record(), sender=other.overlay) is Reason.SENDER


def test_forgeries_are_refused(registry: Registry, policy: AcceptancePolicy) -> None:
    who, mallory = registry.join("laptop"), registry.join("mallory")
    assert refusal(policy, mallory.impersonating(who).record()) is Reason.SIGNATURE
    assert refusal(policy, mallory.record(subject=who.peer_id)) is Reason.SUBJECT
    assert refusal(policy, who.record(certificate=b"made up")) is Reason.CERTIFICATE
    assert refusal(policy, who.record(certificate=mallory.certificate)) is Reason.SUBJECT
    raw = who.record()
    assert refusal(policy, raw[:-1] + bytes([raw[-1] ^ 1])) is Reason.SIGNATURE
    assert refusal(policy, who.record(network=NetworkId(bytes(32)))) is Reason.NETWORK


def test_a_signature_does_not_carry_over_to_other_content(registry: Registry, policy: AcceptancePolicy) -> None:
    who = registry.join("laptop")
    old, new = parse_untrusted(who.record(WALL - 5)), parse_untrusted(who.record(WALL))
    mixed = records.build(
        NETWORK,
        who.peer_id,
        new.body,
        sequence=new.sequence,
        expires=new.expires,
        sign=lambda data: old.signature,
        certificate=who.certificate,
    )
    assert refusal(policy, mixed) is Reason.SIGNATURE


def test_the_clock_is_obeyed(registry: Registry, policy: AcceptancePolicy) -> None:
    who = registry.join("laptop")
    policy.check(who.record(WALL + 59), who.key, WALL)
    assert refusal(policy, who.record(WALL + 61)) is Reason.FUTURE
    assert refusal(policy, who.record(WALL - 601)) is Reason.EXPIRED
    assert refusal(policy, who.record(lifetime=0)) is Reason.EXPIRED
    assert refusal(policy, who.record(lifetime=700)) is Reason.LIFETIME
    policy.check(who.record(body=NameBody("laptop", who.overlay)), records.key_of_name(NETWORK, "laptop"), WALL)


def test_a_replaced_record_cannot_outlive_its_successor_by_much(registry: Registry, policy: AcceptancePolicy) -> None:
    who = registry.join("laptop")
    assert refusal(policy, who.record(WALL - 3600, lifetime=4000)) is Reason.LIFETIME


def test_a_record_under_another_key_is_refused(registry: Registry, policy: AcceptancePolicy) -> None:
    who, other = registry.join("laptop"), registry.join("other")
    assert refusal(policy, who.record(), key=other.key) is Reason.KEY
    assert refusal(policy, who.record(), key=b"") is Reason.KEY


def test_rubbish_is_refused(policy: AcceptancePolicy) -> None:
    for raw in (b"", b"\x90", bytes(3000)):
        assert refusal(policy, raw, key=bytes(20)) is Reason.MALFORMED


def test_a_name_belongs_to_the_certificate_that_holds_it(registry: Registry, policy: AcceptancePolicy) -> None:
    who, other = registry.join("laptop", ipv4="100.64.0.7"), registry.join("desktop", ipv4="100.64.0.8")
    for name in ("laptop", "LAPTOP", "100.64.0.7"):
        record = policy.check(who.record(body=NameBody(name, who.overlay)), records.key_of_name(NETWORK, name), WALL)
        assert record.body == NameBody(name, who.overlay)
    for name in ("desktop", "100.64.0.8", "100.64.0.9", "laptop.evil"):
        assert refusal(policy, who.record(body=NameBody(name, who.overlay))) is Reason.AUTHORITY
    assert refusal(policy, who.record(body=NameBody("laptop", other.overlay))) is Reason.AUTHORITY


def test_a_route_needs_the_role_and_the_prefix(registry: Registry, policy: AcceptancePolicy) -> None:
    gateway = registry.join("gateway", roles=(Role.GATEWAY,), blocks=("10.1.0.0/16",))
    plain = registry.join("plain", blocks=("10.2.0.0/16",))
    for prefix in ("10.1.0.0/16", "10.1.2.0/24"):
        net = ipaddress.ip_network(prefix)
        policy.check(gateway.record(body=RouteBody(net)), records.key_of_route(NETWORK, net), WALL)
    for prefix in ("10.0.0.0/8", "10.2.0.0/16", "0.0.0.0/0", "2001:db8::/32"):
        assert refusal(policy, gateway.record(body=RouteBody(ipaddress.ip_network(prefix)))) is Reason.AUTHORITY
    assert refusal(policy, plain.record(body=RouteBody(ipaddress.ip_network("10.2.0.0/16")))) is Reason.AUTHORITY


def test_the_cheap_half_comes_first(registry: Registry, policy: AcceptancePolicy) -> None:
    who, mallory = registry.join("laptop"), registry.join("mallory")
    refusal(policy, bytes(100), key=bytes(20))
    refusal(policy, who.record(WALL - 700))
    refusal(policy, who.record(), key=bytes(20))
    refusal(policy, who.record(), sender=mallory.overlay)
    assert registry.verifications == 0


def test_what_the_verifier_says_is_passed_on(policy: AcceptancePolicy, registry: Registry) -> None:
    def refuse(der: bytes, wall: float) -> object:
        raise TrustError("the certificate is revoked")

    who = registry.join("laptop")
    strict = AcceptancePolicy(NETWORK, refuse)  # type: ignore[arg-type]
    with pytest.raises(RecordRefused, match="revoked"):
        strict.check(who.record(), who.key, WALL)
