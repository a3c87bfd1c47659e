"""Genesis, network document and the admin's side."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_network

import pytest

from p2pvpn.core.errors import LocalError, TrustError, WireError
from p2pvpn.core.secret import Secret
from p2pvpn.identity.admin import NETWORK_FILE, RECOVERY_FILE, ROOT_FILE, AdminNetwork
from p2pvpn.identity.canonical import Fields, pack
from p2pvpn.identity.certificates import DAY_S, parse_untrusted
from p2pvpn.identity.document import HubEntry, NetworkDocument, Topology, split_address
from p2pvpn.identity.genesis import Genesis, Succession, ipv4_range, verify_successions
from p2pvpn.identity.grants import Request
from p2pvpn.identity.keys import PeerKey
from p2pvpn.identity.member import Member, Role
from p2pvpn.identity.trust import Trust

from .world import WALL, World, entropy, make_world

PASSPHRASE = Secret(b"correct horse")


@pytest.fixture
def world() -> World:
    return make_world()


def test_a_genesis_survives_the_wire_with_its_network_id(world: World) -> None:
    genesis = world.admin.genesis
    again = Genesis.parse_untrusted(genesis.encode())
    assert again == genesis
    assert again.network_id == genesis.network_id
    assert again.name == "home"


def test_the_ipv4_pool_is_a_16_in_10_and_issuers_share_it(world: World) -> None:
    genesis = world.admin.genesis
    assert genesis.ipv4_pool.subnet_of(ip_network("10.0.0.0/8"))
    assert 1 <= genesis.ipv4_pool.network_address.packed[1] <= 254
    assert genesis.ipv4_pool.prefixlen == 16
    shares = [ipv4_range(genesis.network_id, index) for index in range(64)]
    assert shares == list(genesis.ipv4_pool.subnets(new_prefix=22))
    with pytest.raises(ValueError, match="64 ranges"):
        ipv4_range(genesis.network_id, 64)


@pytest.mark.parametrize("what", ["genesis", "document", "succession"])
def test_every_changed_byte_of_a_signed_statement_is_refused(world: World, what: str) -> None:
    genesis = world.admin.genesis
    step = Succession.create(genesis, 1, PeerKey.generate(), world.admin.root_key, wall=WALL, entropy=entropy("next"))

    def check(data: bytes) -> None:
        if what == "genesis":
            if Genesis.parse_untrusted(data).network_id != genesis.network_id:
                raise TrustError("another network")
        elif what == "document":
            NetworkDocument.parse_untrusted(data).verify(genesis)
        else:
            verify_successions(genesis, [Succession.parse_untrusted(data)])

    good = {
        "genesis": genesis.encode(),
        "document": world.admin.document.encode(),
        "succession": step.encode(),
    }[what]
    check(good)
    for position in range(0, len(good), 1 if len(good) < 1000 else 5):
        with pytest.raises((TrustError, WireError)):
            check(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])


def test_successions_have_to_be_in_order_and_of_this_network(world: World) -> None:
    genesis, root = world.admin.genesis, world.admin.root_key
    second, third = PeerKey.generate(), PeerKey.generate()
    one = Succession.create(genesis, 1, second, root, wall=WALL, entropy=entropy("1"))
    two = Succession.create(genesis, 2, third, second, wall=WALL, entropy=entropy("2"))
    roots = verify_successions(genesis, [one, two])
    assert roots.current.key_id == third.peer_id
    assert [r.key_id for r in roots.accepted] == [root.peer_id, second.peer_id, third.peer_id]
    for bad in ([two], [two, one], [one, one]):
        with pytest.raises(TrustError):
            verify_successions(genesis, bad)
    with pytest.raises(TrustError):
        verify_successions(make_world("elsewhere").admin.genesis, [one])


def test_recovery_drops_the_roots_before_it(world: World) -> None:
    genesis, recovery = world.admin.genesis, world.admin.recovery_key
    new = PeerKey.generate()
    step = Succession.create(genesis, 5, new, recovery, wall=WALL, entropy=entropy("r"))
    roots = verify_successions(genesis, [step])
    assert [r.key_id for r in roots.accepted] == [new.peer_id]
    assert roots.recoveries == 1
    with pytest.raises(TrustError):
        verify_successions(genesis, [replace(step, by_recovery=False)])


def test_fields_of_a_newer_program_survive(world: World) -> None:
    document = world.admin.document
    hub = replace(document.hubs[0], extra=(("colour", b"red"),))
    newer = replace(
        document, hubs=(hub, *document.hubs[1:]), qos=((1, "voice"),), extra=(7, ("later",)), signature=b""
    ).sign(world.admin.root_key)
    again = NetworkDocument.parse_untrusted(newer.encode())
    again.verify(world.admin.genesis)
    assert again == newer
    assert again.encode() == newer.encode()
    assert again.digest == newer.digest != document.digest


def test_unordered_revocations_are_not_a_document(world: World) -> None:
    document = replace(
        world.admin.document,
        revoked_peers=frozenset({world.hub_key.peer_id, world.second_key.peer_id}),
        signature=b"",
    ).sign(world.admin.root_key)
    fields = Fields.unpack_untrusted(document.statement, "document", 1 << 20)
    values = list(fields.rest())
    values[12] = tuple(reversed(values[12]))
    with pytest.raises(WireError):
        NetworkDocument.parse_untrusted(pack((pack(tuple(values)), document.signature)))


def test_a_document_that_would_be_too_large_is_not_signed(world: World) -> None:
    hubs = tuple(replace(world.admin.document.hubs[0], name=f"h{i}") for i in range(65))
    with pytest.raises(LocalError, match="cannot be signed"):
        replace(world.admin.document, hubs=hubs).sign(world.admin.root_key)


def test_documents_of_the_same_version_still_have_an_order(world: World) -> None:
    one = replace(world.admin.document, issued=1).sign(world.admin.root_key)
    two = replace(world.admin.document, issued=2).sign(world.admin.root_key)
    assert one.is_newer_than(two) != two.is_newer_than(one)
    assert not one.is_newer_than(one)


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("hub.example.net", ("hub.example.net", None)),
        ("hub.example.net:4500", ("hub.example.net", 4500)),
        ("192.0.2.1:80", ("192.0.2.1", 80)),
        ("2001:db8::1", ("2001:db8::1", None)),
        ("[2001:db8::1]:443", ("2001:db8::1", 443)),
        ("[2001:db8::1]", ("2001:db8::1", None)),
    ],
)
def test_addresses_are_host_and_port(text: str, split: tuple[str, int | None]) -> None:
    assert split_address(text) == split


@pytest.mark.parametrize("text", ["", ":80", "host:0", "host:99999", "host:x", "[::1", "a b", "ü", "h" * 300])
def test_other_texts_are_no_addresses(text: str) -> None:
    with pytest.raises(LocalError):
        split_address(text)


def test_a_hub_entry_says_where_it_enrols() -> None:
    hub = HubEntry(PeerKey.generate().peer_id, "h", ("hub.example.net:4500", "2001:db8::1"), 8443)
    assert hub.enrol_addresses == ("hub.example.net:8443", "[2001:db8::1]:8443")
    assert [str(e) for e in hub.endpoints(4500)] == ["[2001:db8::1]:4500"]
    assert hub.address == "hub.example.net:4500"


def _member(world: World, name: str, *groups: str, hub: bool = False) -> Member:
    """A member as verification would make it."""
    base = world.trust.verify_chain(world.hub.chain if hub else world.gateway.chain, WALL)
    if hub:
        return base
    return replace(base, name=name, peer_id=PeerKey.generate().peer_id, groups=frozenset(groups), roles=frozenset())


def test_topologies_allow_what_they_say(world: World) -> None:
    a, b, c = _member(world, "a", "dev"), _member(world, "b", "ops"), _member(world, "c", "dev")
    hub = _member(world, "hub-one", hub=True)
    admin = world.admin
    assert admin.document.allows(a, b)
    admin.set_topology(Topology.STAR, wall=WALL)
    assert not admin.document.allows(a, b)
    assert admin.document.allows(a, hub)
    assert admin.document.allows(hub, a)
    admin.set_topology(Topology.PARTIAL, [("dev", "ops")], wall=WALL)
    assert admin.document.allows(a, b)
    assert admin.document.allows(b, a)
    assert not admin.document.allows(a, c)
    assert admin.document.allows(hub, c)
    admin.set_topology(Topology.DYNAMIC, wall=WALL)
    assert admin.document.allows(a, c)


def test_nobody_is_allowed_anything_once_revoked_or_from_elsewhere(world: World) -> None:
    hub = _member(world, "hub-one", hub=True)
    gateway = world.trust.verify_chain(world.gateway.chain, WALL)
    elsewhere = make_world("elsewhere")
    stranger = elsewhere.trust.verify_chain(elsewhere.hub.chain, WALL)
    assert world.admin.document.allows(hub, gateway)
    assert not world.admin.document.allows(hub, stranger)
    world.admin.revoke("office", wall=WALL)
    assert not world.admin.document.allows(hub, gateway)


def test_a_hub_that_the_document_does_not_list_is_no_hub_in_a_star(world: World) -> None:
    hub, other = _member(world, "hub-one", hub=True), _member(world, "a", "dev")
    star = replace(world.admin.document, topology=Topology.STAR, hubs=(), issuers=())
    assert not star.allows(hub, other)


def test_the_document_follows_hubs_issuers_and_prefixes(world: World) -> None:
    document = world.admin.document
    assert [(h.name, h.addresses, h.enrol_port) for h in document.hubs] == [
        ("hub-one", ("hub.example.net:4500", "192.0.2.1"), 443),
        ("hub-two", ("198.51.100.7",), 8443),
    ]
    assert document.issuer_ids == (world.hub_key.peer_id, world.second_key.peer_id)
    assert document.hub_ids == set(document.issuer_ids)
    assert document.prefix_lengths == ((4, 24), (6, 48))
    before = document.version
    world.admin.grant(Request.create(PeerKey.generate()), name="printer", wall=WALL)
    assert world.admin.document.version == before
    world.admin.grant(Request.create(PeerKey.generate()), name="warehouse", prefixes=["172.16.0.0/20"], wall=WALL)
    assert world.admin.document.version == before + 1
    assert (4, 20) in world.admin.document.prefix_lengths


def test_granting_the_same_key_again_replaces_what_it_had(world: World) -> None:
    before = world.trust.verify_chain(world.hub.chain, WALL)
    grant = world.admin.grant(
        Request.create(world.hub_key), name="hub-one", hub="203.0.113.5", issuer=True, wall=WALL + DAY_S
    )
    after = world.trust.verify_chain(grant.chain, WALL + DAY_S)
    assert (after.ipv4, after.overlay) == (before.ipv4, before.overlay)
    assert after.serial != before.serial
    assert world.admin.document.hub(world.hub_key.peer_id).addresses == ("203.0.113.5",)
    assert len(world.admin.document.hubs) == 2
    assert len(world.admin.ledger) == 3
    old = parse_untrusted(world.hub.issuer_certificate)
    assert parse_untrusted(grant.issuer_certificate).blocks == old.blocks
    assert world.trust.verify_chain(world.hub.chain, WALL + DAY_S), "nothing was taken away, so nothing was revoked"


def test_taking_something_away_revokes_the_former_certificate(world: World) -> None:
    world.admin.grant(Request.create(world.gateway_key), name="office", prefixes=["192.168.7.0/24"], wall=WALL)
    with pytest.raises(TrustError, match="revoked"):
        world.trust.verify_chain(world.gateway.chain, WALL)


def test_an_issuer_that_is_only_a_hub_from_now_on_issues_no_more(world: World) -> None:
    world.admin.grant(Request.create(world.hub_key), name="hub-one", hub="192.0.2.1", wall=WALL)
    leaf = world.stolen(PeerKey.generate())
    with pytest.raises(TrustError, match="issuer was revoked"):
        world.trust.verify_chain((leaf, world.hub.issuer_certificate), WALL)
    world.admin.grant(Request.create(world.hub_key), name="hub-one", hub="192.0.2.1", issuer=True, wall=WALL)
    assert world.trust.verify_leaf(leaf, WALL)


def test_revoking_a_hub_takes_it_off_the_list_and_keeps_its_issuer_for_a_week(world: World) -> None:
    assert world.admin.revoke("hub-one", wall=WALL) == world.hub_key.peer_id
    document = world.admin.document
    assert document.hub(world.hub_key.peer_id) is None
    assert document.issuer_ids == (world.second_key.peer_id,)
    assert len(document.issuers) == 2
    world.admin.revoke("office", wall=WALL + 8 * DAY_S)
    assert len(world.admin.document.issuers) == 1
    assert world.admin.document.cut_offs, "the cut-off stays, since the issuer's certificate is still valid"


def test_members_that_were_not_granted_are_revoked_by_peer_id(world: World) -> None:
    peer = PeerKey.generate().peer_id
    assert world.admin.revoke(str(peer), wall=WALL) == peer
    assert peer in world.admin.document.revoked_peers
    with pytest.raises(LocalError, match="not granted here"):
        world.admin.revoke("laptop", wall=WALL)


def test_what_an_admin_cannot_grant(world: World) -> None:
    request = Request.create(PeerKey.generate())
    admin = world.admin
    pool, prefix = admin.genesis.ipv4_pool, admin.genesis.ipv6_prefix
    for match, kwargs in (
        ("no name", {}),
        ("cannot be a name", {"name": "Büro"}),
        ("another machine's name", {"name": "office"}),
        ("has to be a hub", {"name": "x", "issuer": True}),
        ("overlaps", {"name": "x", "prefixes": [pool]}),
        ("overlaps", {"name": "x", "prefixes": ["10.0.0.0/8"]}),
        ("overlaps", {"name": "x", "prefixes": [prefix]}),
        ("not a prefix", {"name": "x", "prefixes": ["192.168.7.1/24"]}),
        ("cannot be a group", {"name": "x", "groups": ["A B"]}),
        ("not an address", {"name": "x", "hub": "a b"}),
        ("cannot be signed", {"name": "x", "hub": ",".join(f"192.0.2.{n}" for n in range(9))}),
    ):
        before = admin.document
        with pytest.raises(LocalError, match=match):
            admin.grant(request, wall=WALL, **kwargs)
        assert admin.document == before
        assert request.peer_id not in {entry.peer_id for entry in admin.ledger}
    with pytest.raises(LocalError, match="no issuing key"):
        admin.grant(replace(request, issuing_key=None), name="x", hub="192.0.2.9", issuer=True, wall=WALL)
    admin.revoke("office", wall=WALL)
    with pytest.raises(LocalError, match="was revoked"):
        admin.grant(Request.create(world.gateway_key), name="office", wall=WALL)


def test_a_hub_is_certified_for_what_clients_dial(world: World) -> None:
    leaf = parse_untrusted(world.hub.chain[0])
    assert leaf.dns_names == ("hub-one", "hub.example.net")
    assert [str(a) for a in leaf.addresses][1:] == ["192.0.2.1"]


def test_the_admins_files_round_trip_under_their_passphrase(world: World) -> None:
    files = world.admin.to_files(PASSPHRASE)
    assert set(files) == {ROOT_FILE, RECOVERY_FILE, NETWORK_FILE}
    assert b"ENCRYPTED" in files[ROOT_FILE]
    again = AdminNetwork.from_files(files, PASSPHRASE, entropy("again"))
    assert again.document == world.admin.document
    assert again.ledger == world.admin.ledger
    del files[RECOVERY_FILE]
    again = AdminNetwork.from_files(files, PASSPHRASE, entropy("again"))
    assert again.recovery_key is None
    again.revoke("office", wall=WALL)
    Trust(world.admin.genesis, world.admin.document).replace_document(again.document)


def test_the_admins_files_are_not_opened_by_another_passphrase_or_key(world: World) -> None:
    files = world.admin.to_files(PASSPHRASE)
    with pytest.raises(LocalError, match="wrong passphrase"):
        AdminNetwork.from_files(files, Secret(b"guess"), entropy("x"))
    with pytest.raises(LocalError, match="missing"):
        AdminNetwork.from_files({}, PASSPHRASE, entropy("x"))
    other = make_world("elsewhere").admin.to_files(PASSPHRASE)
    with pytest.raises(LocalError, match="root key is not"):
        AdminNetwork.from_files({**files, ROOT_FILE: other[ROOT_FILE]}, PASSPHRASE, entropy("x"))
    with pytest.raises(LocalError, match="cannot be used"):
        AdminNetwork.from_files({**files, NETWORK_FILE: files[NETWORK_FILE][:-1]}, PASSPHRASE, entropy("x"))


def test_a_grant_survives_being_text(world: World) -> None:
    from p2pvpn.identity.grants import Grant

    again = Grant.decode_untrusted(world.hub.encode())
    assert again == world.hub
    assert again.hub == "hub.example.net:4500,192.0.2.1"


def test_a_request_proves_both_keys(world: World) -> None:
    request = Request.create(world.hub_key, "desk")
    assert Request.decode_untrusted(request.encode()) == request
    assert request.peer_id == world.hub_key.peer_id
    other = Request.create(PeerKey.generate(), "desk")
    for forged in (
        replace(request, proof=other.proof),
        replace(request, issuing_proof=other.issuing_proof),
        replace(request, name="x"),
        replace(request, issuing_key=other.issuing_key),
    ):
        with pytest.raises(TrustError):
            Request.decode_untrusted(forged.encode())


def test_keys_keep_to_themselves_and_survive_pem() -> None:
    key = PeerKey.generate()
    again = PeerKey.from_pem(key.to_pem().reveal())
    assert again.peer_id == key.peer_id
    assert again.issuing_key().peer_id == key.issuing_key().peer_id != key.peer_id
    assert repr(key) == f"PeerKey({key.peer_id.hex()[:12]})"
    with pytest.raises(LocalError):
        PeerKey.from_pem(b"nonsense")


def test_roles_of_a_hub_without_issuer() -> None:
    world = make_world()
    grant = world.admin.grant(Request.create(PeerKey.generate()), name="relay", hub="192.0.2.77", wall=WALL)
    assert grant.issuer_certificate is None
    assert world.trust.verify_chain(grant.chain, WALL).roles == {Role.HUB, Role.RELAY}
