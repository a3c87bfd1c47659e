"""Certificates and their verification: every cause of refusal, and what a stolen issuer cannot do."""

from __future__ import annotations

import uuid
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from p2pvpn.core.errors import TrustError, WireError
from p2pvpn.core.ids import overlay_address
from p2pvpn.core.selector import Selector
from p2pvpn.identity import blocks
from p2pvpn.identity.admin import AdminNetwork
from p2pvpn.identity.certificates import (
    DAY_S,
    MEMBERSHIP_OID,
    Authority,
    issue_issuer,
    issue_leaf,
    parse_untrusted,
)
from p2pvpn.identity.enrolment import JoinResult
from p2pvpn.identity.genesis import ipv4_range, issuer_blocks
from p2pvpn.identity.keys import PeerKey
from p2pvpn.identity.member import Role
from p2pvpn.identity.trust import Trust

from .world import WALL, World, entropy, join, make_world, rebuilt


@pytest.fixture
def world() -> World:
    return make_world()


@pytest.fixture
def key() -> PeerKey:
    return PeerKey.generate()


@pytest.fixture
def laptop(world: World, key: PeerKey) -> JoinResult:
    return join(world.issuer(), "laptop", key)


def test_a_hub_is_what_its_grant_says(world: World) -> None:
    member = world.trust.verify_chain(world.hub.chain, WALL)
    assert (member.name, member.peer_id) == ("hub-one", world.hub_key.peer_id)
    assert member.roles == {Role.HUB, Role.RELAY, Role.ISSUER}
    assert member.is_hub
    assert member.ipv4 in ipv4_range(world.admin.genesis.network_id, 0)
    assert member.not_after - WALL == 365 * DAY_S


def test_a_gateway_holds_its_prefixes(world: World) -> None:
    member = world.trust.verify_leaf(world.gateway.chain[0], WALL)
    assert member.roles == {Role.GATEWAY}
    for prefix in ("192.168.7.0/24", "2001:db8:7::/48", str(member.overlay), str(member.ipv4)):
        assert any(block.holds(Selector.of_network(prefix)) for block in member.blocks)


def test_a_member_is_verified_by_its_leaf_alone(world: World, key: PeerKey, laptop: JoinResult) -> None:
    member = world.trust.verify_leaf(laptop.chain[0], WALL)
    assert (member.name, member.peer_id, member.roles, member.groups) == (
        "laptop",
        key.peer_id,
        frozenset(),
        {"default"},
    )
    assert member.overlay == overlay_address(world.admin.genesis.network_id, key.peer_id)
    assert member.overlay in world.admin.genesis.ipv6_prefix
    assert member.ipv4 in ipv4_range(world.admin.genesis.network_id, 1)
    assert member.blocks == (Selector.of_address(member.ipv4), Selector.of_address(member.overlay))
    assert member.not_before == WALL - 300
    assert member.not_after == WALL + 7 * DAY_S


def test_an_issuer_that_the_document_does_not_list_yet_comes_with_the_chain(world: World, laptop: JoinResult) -> None:
    old = replace(world.admin.document, issuers=(), signature=b"").sign(world.admin.root_key)
    trust = Trust(world.admin.genesis, old)
    with pytest.raises(TrustError):
        trust.verify_leaf(laptop.chain[0], WALL)
    assert trust.verify_chain(laptop.chain, WALL).name == "laptop"


def test_a_member_of_another_network_is_refused(world: World) -> None:
    other = make_world("elsewhere")
    guest = join(other.issuer(), "guest", PeerKey.generate())
    for chain in (guest.chain, other.hub.chain):
        with pytest.raises(TrustError, match="another network"):
            world.trust.verify_chain(chain, WALL)


def test_a_certificate_counts_between_its_dates_only(world: World, laptop: JoinResult) -> None:
    trust = world.trust
    assert trust.verify_chain(laptop.chain, WALL - 300)
    with pytest.raises(TrustError, match="not valid yet"):
        trust.verify_chain(laptop.chain, WALL - 301)
    assert trust.verify_chain(laptop.chain, WALL + 7 * DAY_S)
    with pytest.raises(TrustError, match="expired"):
        trust.verify_chain(laptop.chain, WALL + 7 * DAY_S + 1)
    assert trust.verify_chain(laptop.chain, WALL + 8 * DAY_S, grace=2 * DAY_S)


def test_a_leaf_falls_with_the_dates_of_its_issuer(world: World, key: PeerKey) -> None:
    genesis = world.admin.genesis
    root = Authority(world.admin.root_key, genesis.root.certificate)
    issuing = PeerKey.generate()
    short = issue_issuer(
        root,
        issuing.public_key,
        genesis.network_id,
        name="brief",
        group="default",
        blocks=issuer_blocks(genesis.network_id, 9),
        wall=WALL,
        serial=1,
        lifetime=DAY_S,
    )
    longer = replace(parse_untrusted(short), not_after=WALL + 30 * DAY_S)
    leaf = issue_leaf(
        Authority(issuing, longer),
        key.public_key,
        genesis.network_id,
        name="late",
        wall=WALL,
        serial=2,
        lifetime=3 * DAY_S,
    )
    assert world.trust.verify_chain((leaf, short), WALL)
    with pytest.raises(TrustError, match="issuer's certificate has expired"):
        world.trust.verify_chain((leaf, short), WALL + 2 * DAY_S)


def test_every_changed_byte_of_a_leaf_is_refused(world: World, laptop: JoinResult) -> None:
    der = laptop.chain[0]
    trust = world.trust
    for position in range(0, len(der), 7):
        damaged = der[:position] + bytes([der[position] ^ 1]) + der[position + 1 :]
        with pytest.raises(TrustError):
            trust.verify_leaf(damaged, WALL)


def test_every_changed_byte_of_an_issuer_is_refused(world: World, laptop: JoinResult) -> None:
    old = replace(world.admin.document, issuers=(), signature=b"").sign(world.admin.root_key)
    trust = Trust(world.admin.genesis, old)
    leaf, issuer = laptop.chain
    for position in range(0, len(issuer), 11):
        damaged = issuer[:position] + bytes([issuer[position] ^ 1]) + issuer[position + 1 :]
        with pytest.raises(TrustError):
            trust.verify_chain((leaf, damaged), WALL)


def test_a_stolen_issuer_cannot_give_roles(world: World, key: PeerKey) -> None:
    for role in Role:
        with pytest.raises(TrustError, match="roles"):
            world.trust.verify_leaf(world.stolen(key, roles=[role]), WALL)


def test_a_stolen_issuer_cannot_give_groups(world: World, key: PeerKey) -> None:
    with pytest.raises(TrustError, match="group"):
        world.trust.verify_leaf(world.stolen(key, groups=["default", "admins"]), WALL)


@pytest.mark.parametrize("prefix", ["192.168.7.0/24", "8.8.8.8/32", "2001:db8::/32"])
def test_a_stolen_issuer_cannot_give_prefixes(world: World, key: PeerKey, prefix: str) -> None:
    with pytest.raises(TrustError, match="outside its range"):
        world.trust.verify_leaf(world.stolen(key, blocks=[Selector.of_network(prefix)]), WALL)


def test_a_stolen_issuer_cannot_give_another_issuers_address(world: World, key: PeerKey) -> None:
    other = next(ipv4_range(world.admin.genesis.network_id, 2).hosts())
    with pytest.raises(TrustError, match="outside its range"):
        world.trust.verify_leaf(world.stolen(key, blocks=[Selector.of_address(other)]), WALL)


def test_a_stolen_issuer_cannot_give_many_addresses(world: World, key: PeerKey) -> None:
    first = world.authority.certificate.blocks[0].start
    for given in (
        [Selector.of_address(first + 1), Selector.of_address(first + 5)],
        [Selector.of_network(f"{first}/28")],
    ):
        with pytest.raises(TrustError, match="more than one IPv4"):
            world.trust.verify_leaf(world.stolen(key, blocks=given), WALL)


def test_a_stolen_issuer_cannot_give_away_anothers_overlay_address(world: World, key: PeerKey) -> None:
    victim = overlay_address(world.admin.genesis.network_id, world.gateway_key.peer_id)
    with pytest.raises(TrustError, match="just its own overlay"):
        world.trust.verify_leaf(world.stolen(key, blocks=[Selector.of_address(victim)]), WALL)


def test_a_stolen_issuer_cannot_give_the_name_of_a_hub(world: World, key: PeerKey) -> None:
    with pytest.raises(TrustError, match="name of a hub"):
        world.trust.verify_leaf(world.stolen(key, name="hub-one"), WALL)


def test_a_stolen_issuer_cannot_give_further_names(world: World, key: PeerKey) -> None:
    for also in ("bank.example", "192.0.2.9"):
        with pytest.raises(TrustError, match="more than one name"):
            world.trust.verify_leaf(world.stolen(key, dialled_as=[also]), WALL)


def test_a_stolen_issuer_cannot_give_more_than_a_week(world: World, key: PeerKey) -> None:
    with pytest.raises(TrustError, match="seven days"):
        world.trust.verify_leaf(world.stolen(key, lifetime=8 * DAY_S), WALL)


def test_a_stolen_issuer_cannot_make_another_issuer(world: World, key: PeerKey) -> None:
    network = world.admin.genesis.network_id
    child = issue_issuer(
        world.authority,
        key.public_key,
        network,
        name="child",
        group="default",
        blocks=issuer_blocks(network, 1),
        wall=WALL,
        serial=5,
    )
    leaf = issue_leaf(
        Authority(key, parse_untrusted(child)),
        PeerKey.generate().public_key,
        network,
        name="grandchild",
        wall=WALL,
        serial=6,
        lifetime=DAY_S,
        groups=["default"],
    )
    with pytest.raises(TrustError, match="no root of this network"):
        world.trust.verify_chain((leaf, child, world.hub.issuer_certificate), WALL)
    with pytest.raises(TrustError, match="authority is no member"):
        world.trust.verify_chain((child, world.hub.issuer_certificate), WALL)


@pytest.mark.parametrize("name", ["Mallory", "a_b", "-a", "a-", "a.b", "*", "x" * 64, "a b"])
def test_a_name_that_is_no_lower_case_label_is_refused(world: World, key: PeerKey, name: str) -> None:
    with pytest.raises(TrustError):
        world.trust.verify_leaf(world.stolen(key, name=name), WALL)


def test_a_leaf_with_a_key_that_does_not_match_its_identifier_is_refused(world: World, key: PeerKey) -> None:
    leaf = rebuilt(world.stolen(key), world.authority.key, key=PeerKey.generate().public_key)
    with pytest.raises(TrustError, match="key identifier does not follow"):
        world.trust.verify_leaf(leaf, WALL)


def test_a_leaf_whose_overlay_address_is_not_its_keys_is_refused(world: World, key: PeerKey) -> None:
    wrong = x509.SubjectAlternativeName([x509.DNSName("mallory"), x509.IPAddress(ip_address("fd00::1"))])
    leaf = rebuilt(world.stolen(key), world.authority.key, drop=[x509.SubjectAlternativeName.oid], add=[(wrong, False)])
    with pytest.raises(TrustError, match="overlay address does not follow"):
        world.trust.verify_leaf(leaf, WALL)


def test_a_leaf_without_blocks_is_refused(world: World, key: PeerKey) -> None:
    leaf = rebuilt(world.stolen(key), world.authority.key, drop=[blocks.OID])
    with pytest.raises(TrustError, match="overlay"):
        world.trust.verify_leaf(leaf, WALL)


def test_a_leaf_that_is_not_for_ike_is_refused(world: World, key: PeerKey) -> None:
    web = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    for add in ([], [(web, False)]):
        leaf = rebuilt(world.stolen(key), world.authority.key, drop=[x509.ExtendedKeyUsage.oid], add=add)
        with pytest.raises(TrustError, match="not for IKE"):
            world.trust.verify_leaf(leaf, WALL)


def test_a_leaf_that_says_it_is_an_authority_is_refused(world: World, key: PeerKey) -> None:
    ca = x509.BasicConstraints(ca=True, path_length=None)
    leaf = rebuilt(world.stolen(key), world.authority.key, drop=[x509.BasicConstraints.oid], add=[(ca, True)])
    with pytest.raises(TrustError, match="authority is no member"):
        world.trust.verify_leaf(leaf, WALL)


def test_an_unknown_critical_extension_is_refused_and_another_is_not(world: World, key: PeerKey) -> None:
    unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"\x05\x00")
    for critical in (True, False):
        leaf = rebuilt(world.stolen(key), world.authority.key, add=[(unknown, critical)])
        if critical:
            with pytest.raises(TrustError, match="critical"):
                world.trust.verify_leaf(leaf, WALL)
        else:
            assert world.trust.verify_leaf(leaf, WALL).name == "mallory"


def test_a_role_that_this_version_does_not_know_gives_nothing(world: World) -> None:
    der = world.hub.chain[0]
    membership = x509.UnrecognizedExtension(
        MEMBERSHIP_OID, bytes.fromhex("300b3007 0c0575 6e6b6e6f 3000".replace(" ", ""))
    )
    leaf = rebuilt(der, world.admin.root_key, drop=[MEMBERSHIP_OID], add=[(membership, False)])
    assert world.trust.verify_leaf(leaf, WALL).roles == frozenset()


def test_prefixes_need_the_role_of_a_gateway_even_from_the_root(world: World, key: PeerKey) -> None:
    root = Authority(world.admin.root_key, world.admin.genesis.root.certificate)
    leaf = issue_leaf(
        root,
        key.public_key,
        world.admin.genesis.network_id,
        name="sneaky",
        wall=WALL,
        serial=3,
        lifetime=DAY_S,
        blocks=[Selector.of_network(ip_network("192.168.0.0/16"))],
    )
    with pytest.raises(TrustError, match="without the role of a gateway"):
        world.trust.verify_leaf(leaf, WALL)


def test_a_revoked_member_is_refused_as_soon_as_the_document_is_there(
    world: World, key: PeerKey, laptop: JoinResult
) -> None:
    trust = world.trust
    assert trust.verify_chain(laptop.chain, WALL)
    world.admin.revoke(key.peer_id, wall=WALL + 1)
    assert trust.replace_document(world.admin.document)
    with pytest.raises(TrustError, match="revoked"):
        trust.verify_chain(laptop.chain, WALL + 2)


def test_a_revoked_serial_is_refused(world: World, laptop: JoinResult) -> None:
    serial = parse_untrusted(laptop.chain[0]).serial
    changed = replace(world.admin.document, version=99, revoked_serials=frozenset({serial}), signature=b"")
    trust = Trust(world.admin.genesis, changed.sign(world.admin.root_key))
    with pytest.raises(TrustError, match="revoked"):
        trust.verify_chain(laptop.chain, WALL)


def test_what_a_revoked_issuer_certified_before_its_cut_off_lives_out_its_week(
    world: World, key: PeerKey, laptop: JoinResult
) -> None:
    world.admin.revoke("hub-one", wall=WALL + 1000)
    trust = world.trust
    assert trust.verify_leaf(laptop.chain[0], WALL + DAY_S).name == "laptop"
    with pytest.raises(TrustError, match="issuer was revoked"):
        trust.verify_leaf(world.stolen(PeerKey.generate(), wall=WALL + 1001), WALL + 1001)
    with pytest.raises(TrustError, match="revoked"):
        trust.verify_chain(world.hub.chain, WALL)


def test_documents_only_go_forward(world: World) -> None:
    before = world.admin.document
    trust = world.trust
    world.admin.revoke("office", wall=WALL)
    assert trust.replace_document(world.admin.document)
    assert not trust.replace_document(before)
    assert not trust.replace_document(world.admin.document)
    assert trust.document == world.admin.document
    with pytest.raises(TrustError):
        trust.replace_document(make_world("elsewhere").admin.document)


def test_a_planned_change_of_root_changes_nothing_for_members(world: World, laptop: JoinResult) -> None:
    trust = world.trust
    world.admin.replace_root(world.admin.root_key, wall=WALL + 10)
    assert trust.replace_document(world.admin.document)
    assert trust.verify_chain(laptop.chain, WALL + 20).name == "laptop"
    assert trust.verify_chain(world.hub.chain, WALL + 20).is_hub
    assert trust.verify_chain(world.admin.regrant("hub-one").chain, WALL + 20).is_hub


def test_recovery_takes_a_network_back_from_a_thief_of_the_root(world: World, laptop: JoinResult) -> None:
    thief = AdminNetwork(world.admin.genesis, world.admin.document, world.admin.root_key, entropy("thief"))
    for _ in range(3):
        thief.replace_root(thief.root_key, wall=WALL + 5)
    trust = world.trust
    assert trust.replace_document(thief.document)
    world.admin.replace_root(world.admin.recovery_key, wall=WALL + 10)
    assert trust.replace_document(world.admin.document)
    assert not trust.replace_document(thief.document)
    assert trust.verify_leaf(laptop.chain[0], WALL + 20).name == "laptop"
    with pytest.raises(TrustError):
        trust.verify_chain(world.hub.chain, WALL + 20)
    assert trust.verify_chain(world.admin.regrant("hub-one").chain, WALL + 20).is_hub


def test_the_recovery_key_alone_brings_a_network_back(world: World, laptop: JoinResult) -> None:
    admin = AdminNetwork.recover(
        world.admin.genesis, world.admin.document, world.admin.recovery_key, wall=WALL + 10, entropy=entropy("late")
    )
    trust = world.trust
    assert trust.replace_document(admin.document)
    assert trust.verify_leaf(laptop.chain[0], WALL + 20).name == "laptop"
    assert admin.document.hubs == world.admin.document.hubs


def test_verifying_the_same_leaf_again_is_cheap_and_still_right(world: World, laptop: JoinResult) -> None:
    trust = world.trust
    first = trust.verify_leaf(laptop.chain[0], WALL)
    assert trust.verify_leaf(laptop.chain[0], WALL + 1) is first
    with pytest.raises(TrustError, match="expired"):
        trust.verify_leaf(laptop.chain[0], WALL + 30 * DAY_S)


def test_chains_of_no_or_many_certificates_are_refused(world: World, laptop: JoinResult) -> None:
    for chain in ((), (*laptop.chain, *laptop.chain, *laptop.chain)):
        with pytest.raises(TrustError, match="chain of"):
            world.trust.verify_chain(chain, WALL)


def test_the_membership_extension_is_where_its_uuid_says() -> None:
    arc = uuid.uuid5(uuid.NAMESPACE_DNS, "membership.p2pvpn.org")
    assert MEMBERSHIP_OID.dotted_string == f"2.25.{arc.int}"


def test_a_huge_certificate_is_not_parsed(world: World) -> None:
    with pytest.raises(WireError):
        parse_untrusted(bytes(9000))
