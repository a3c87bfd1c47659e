"""Joining, renewing and what an issuer refuses; profiles."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pvpn.core.errors import LocalError, TrustError
from p2pvpn.core.secret import Secret
from p2pvpn.identity.canonical import pack
from p2pvpn.identity.certificates import DAY_S, parse_untrusted
from p2pvpn.identity.enrolment import RENEW_GRACE_S, Code, Issuer, JoinResult, Refused, join_request, renew_request
from p2pvpn.identity.genesis import ipv4_range
from p2pvpn.identity.invitations import MAX_INVITATIONS, InvitationBook, Token, proof_of
from p2pvpn.identity.keys import PeerKey
from p2pvpn.identity.profile import CHAIN, ISSUER_STATE, KEY, Profile

from .world import WALL, World, entropy, join, make_world


@pytest.fixture
def world() -> World:
    return make_world()


@pytest.fixture
def issuer(world: World) -> Issuer:
    return world.issuer()


@pytest.fixture
def key() -> PeerKey:
    return PeerKey.generate()


def ask(issuer: Issuer, request: bytes, wall: float = WALL) -> JoinResult:
    return JoinResult.parse_untrusted(issuer.handle_untrusted(request, wall))


def refused(issuer: Issuer, request: bytes, wall: float = WALL) -> Code:
    with pytest.raises(Refused) as caught:
        ask(issuer, request, wall)
    assert str(caught.value)
    return Code(caught.value.code)


def test_a_token_says_where_to_go_and_whom_to_believe(world: World, issuer: Issuer) -> None:
    token = Token.decode_untrusted(issuer.invite("laptop", WALL).encode())
    assert token.network == world.admin.genesis.network_id
    assert token.addresses == ("hub.example.net:443", "192.0.2.1:443", "198.51.100.7:8443")
    assert (token.issuer, token.name, token.expires) == (world.hub_key.peer_id, "laptop", int(WALL + DAY_S))
    assert len(token.encode()) < 320
    assert token.secret.reveal().hex() not in repr(token)


def test_a_token_makes_a_member(world: World, issuer: Issuer, key: PeerKey) -> None:
    result = join(issuer, "laptop", key)
    member = result.verify(world.admin.genesis.network_id, key, WALL)
    assert (member.name, member.peer_id) == ("laptop", key.peer_id)
    assert result.document == world.admin.document


def test_an_answer_for_another_key_or_network_is_not_believed(world: World, issuer: Issuer, key: PeerKey) -> None:
    result = join(issuer, "laptop", key)
    with pytest.raises(TrustError, match="another key"):
        result.verify(world.admin.genesis.network_id, PeerKey.generate(), WALL)
    with pytest.raises(TrustError, match="another network"):
        result.verify(make_world("elsewhere").admin.genesis.network_id, key, WALL)


def test_a_used_token_gives_the_same_key_the_same_certificate_and_no_other_key_any(
    issuer: Issuer, key: PeerKey
) -> None:
    token = issuer.invite("laptop", WALL)
    first = ask(issuer, join_request(token, key))
    again = ask(issuer, join_request(token, key), WALL + 60)
    assert again.chain == first.chain
    assert refused(issuer, join_request(token, PeerKey.generate())) is Code.USED


def test_a_used_token_stays_used_over_a_restart(world: World, key: PeerKey) -> None:
    stored: list[bytes] = []
    profile = world.profile(world.hub_key, world.hub)
    first = Issuer(
        profile.trust,
        world.hub_key.peer_id,
        world.hub_key.issuing_key(),
        world.hub.issuer_certificate,
        entropy=entropy("a"),
        persist=stored.append,
    )
    token = first.invite("laptop", WALL)
    result = ask(first, join_request(token, key))
    second = Issuer(
        profile.trust,
        world.hub_key.peer_id,
        world.hub_key.issuing_key(),
        world.hub.issuer_certificate,
        entropy=entropy("b"),
        state=stored[-1],
    )
    assert ask(second, join_request(token, key)).chain == result.chain
    assert refused(second, join_request(token, PeerKey.generate())) is Code.USED
    with pytest.raises(LocalError, match="member already"):
        second.invite("laptop", WALL)


def test_what_was_not_written_down_is_not_answered(world: World, key: PeerKey) -> None:
    full = False

    def write(_name: str, _data: bytes, *, secret: bool = False) -> None:
        assert secret
        if full:
            raise LocalError("disk full")

    issuer = world.issuer(write=write)
    token = issuer.invite("laptop", WALL)
    full = True
    assert refused(issuer, join_request(token, key)) is Code.FAILED
    full = False
    assert ask(issuer, join_request(token, key)).chain


def test_tokens_expire_and_can_be_withdrawn(issuer: Issuer, key: PeerKey) -> None:
    token = issuer.invite("laptop", WALL, lifetime=60)
    assert refused(issuer, join_request(token, key), WALL + 61) is Code.EXPIRED
    tablet = issuer.invite("tablet", WALL)
    assert issuer.withdraw("tablet")
    assert not issuer.withdraw("tablet")
    assert refused(issuer, join_request(tablet, key)) is Code.UNKNOWN


def test_a_second_invitation_of_a_name_replaces_the_first(issuer: Issuer, key: PeerKey) -> None:
    old, new = issuer.invite("laptop", WALL), issuer.invite("laptop", WALL)
    assert refused(issuer, join_request(old, key)) is Code.UNKNOWN
    assert ask(issuer, join_request(new, key)).chain


def test_requests_that_do_not_prove_what_they_must(world: World, issuer: Issuer, key: PeerKey) -> None:
    token = issuer.invite("laptop", WALL)
    other = world.second_issuer()
    guess = replace(token, secret=Secret(bytes(16)))
    assert refused(issuer, join_request(guess, key)) is Code.UNKNOWN
    elsewhere = replace(token, network=make_world("elsewhere").admin.genesis.network_id)
    assert refused(issuer, join_request(elsewhere, key)) is Code.WRONG_NETWORK
    assert refused(other, join_request(token, key)) is Code.WRONG_ISSUER
    assert refused(issuer, b"") is Code.MALFORMED
    assert refused(issuer, b"\x92\x01\x02") is Code.MALFORMED

    from p2pvpn.identity.canonical import Fields

    fields = Fields.unpack_untrusted(join_request(token, key), "request", 4096)
    body, proof, mac = fields.raw(4096), fields.raw(4096), fields.raw(4096)
    assert refused(issuer, pack((body, proof, bytes(32)))) is Code.BAD_PROOF
    forged = PeerKey.generate().sign(body)
    assert refused(issuer, pack((body, forged, mac))) is Code.BAD_PROOF
    own_mac = proof_of(token.verifier, pack((body, forged)))
    assert refused(issuer, pack((body, forged, own_mac))) is Code.BAD_PROOF
    assert ask(issuer, pack((body, proof, mac))).chain


def test_every_changed_byte_of_a_request_is_refused(issuer: Issuer, key: PeerKey) -> None:
    request = join_request(issuer.invite("laptop", WALL), key)
    for position in range(len(request)):
        changed = request[:position] + bytes([request[position] ^ 2]) + request[position + 1 :]
        with pytest.raises(Refused):
            ask(issuer, changed)
    assert ask(issuer, request).chain


def test_every_changed_byte_of_a_renewal_is_refused(issuer: Issuer, world: World, key: PeerKey) -> None:
    chain = join(issuer, "laptop", key).chain
    request = renew_request(key, chain, world.admin.genesis.network_id, world.hub_key.peer_id)
    for position in range(0, len(request), 13):
        changed = request[:position] + bytes([request[position] ^ 2]) + request[position + 1 :]
        with pytest.raises(Refused):
            ask(issuer, changed)


ISSUER = make_world().issuer()


@given(st.binary(max_size=400))
def test_an_issuer_answers_whatever_it_is_sent(data: bytes) -> None:
    with pytest.raises(Refused):
        JoinResult.parse_untrusted(ISSUER.handle_untrusted(data, WALL))


def test_names_and_addresses_belong_to_one_machine(world: World, issuer: Issuer, key: PeerKey) -> None:
    first = join(issuer, "laptop", key).verify(world.admin.genesis.network_id, key, WALL)
    with pytest.raises(LocalError, match="member already"):
        issuer.invite("laptop", WALL)
    with pytest.raises(LocalError, match="name of a hub"):
        issuer.invite("hub-two", WALL)
    with pytest.raises(LocalError, match="cannot be a name"):
        issuer.invite("Not A Name", WALL)
    other = PeerKey.generate()
    second = join(issuer, "tablet", other).verify(world.admin.genesis.network_id, other, WALL)
    assert first.ipv4 != second.ipv4
    assert {first.ipv4, second.ipv4} <= set(ipv4_range(world.admin.genesis.network_id, 1).hosts())


def test_a_new_machine_may_replace_the_one_that_had_the_name(world: World, issuer: Issuer, key: PeerKey) -> None:
    old = join(issuer, "laptop", key)
    token = issuer.invite("laptop", WALL, replaces=True)
    new_key = PeerKey.generate()
    new = ask(issuer, join_request(token, new_key)).verify(world.admin.genesis.network_id, new_key, WALL)
    assert new.name == "laptop"
    request = renew_request(key, old.chain, world.admin.genesis.network_id, world.hub_key.peer_id)
    assert refused(issuer, request) is Code.NAME_TAKEN


def test_names_are_free_again_long_after_a_member_is_gone(issuer: Issuer, key: PeerKey) -> None:
    join(issuer, "laptop", key)
    with pytest.raises(LocalError):
        issuer.invite("laptop", WALL + 90 * DAY_S)
    assert issuer.invite("laptop", WALL + 98 * DAY_S)


def test_members_renew_with_name_and_address(world: World, issuer: Issuer, key: PeerKey) -> None:
    profile = Profile.from_join(key, join(issuer, "laptop", key))
    before = profile.member
    assert profile.renew_at == (WALL - 300 + WALL + 7 * DAY_S) / 2
    wall = WALL + 4 * DAY_S
    answer = issuer.handle_untrusted(profile.renew_request(world.hub_key.peer_id), wall)
    after = profile.accept_untrusted(answer, wall)
    assert (after.name, after.ipv4, after.overlay) == (before.name, before.ipv4, before.overlay)
    assert after.not_after == before.not_after + 4 * DAY_S
    assert profile.member == after


def test_members_renew_at_any_issuer_with_an_address_of_its_range(world: World, issuer: Issuer, key: PeerKey) -> None:
    profile = Profile.from_join(key, join(issuer, "laptop", key))
    second = world.second_issuer()
    request = profile.renew_request(world.second_key.peer_id)
    there = profile.accept_untrusted(second.handle_untrusted(request, WALL + DAY_S), WALL + DAY_S)
    assert there.name == "laptop"
    assert there.ipv4 in ipv4_range(world.admin.genesis.network_id, 2)
    request = profile.renew_request(world.hub_key.peer_id)
    back = profile.accept_untrusted(issuer.handle_untrusted(request, WALL + 2 * DAY_S), WALL + 2 * DAY_S)
    assert back.ipv4 in ipv4_range(world.admin.genesis.network_id, 1)


def test_a_laptop_that_slept_for_a_month_renews(world: World, issuer: Issuer, key: PeerKey) -> None:
    chain = join(issuer, "laptop", key).chain
    request = renew_request(key, chain, world.admin.genesis.network_id, world.hub_key.peer_id)
    assert ask(issuer, request, WALL + 37 * DAY_S).chain
    assert refused(issuer, request, WALL + 7 * DAY_S + RENEW_GRACE_S + 1) is Code.UNTRUSTED


def test_who_cannot_renew(world: World, issuer: Issuer, key: PeerKey) -> None:
    network, hub = world.admin.genesis.network_id, world.hub_key.peer_id
    chain = join(issuer, "laptop", key).chain
    assert refused(issuer, renew_request(PeerKey.generate(), chain, network, hub)) is Code.BAD_PROOF
    assert refused(issuer, renew_request(world.gateway_key, world.gateway.chain, network, hub)) is Code.GRANTED
    elsewhere = make_world("elsewhere")
    guest = PeerKey.generate()
    foreign = join(elsewhere.issuer(), "guest", guest).chain
    assert refused(issuer, renew_request(guest, foreign, network, hub)) is Code.UNTRUSTED
    world.admin.revoke(key.peer_id, wall=WALL)
    issuer.trust.replace_document(world.admin.document)
    assert refused(issuer, renew_request(key, chain, network, hub)) is Code.UNTRUSTED
    assert refused(issuer, join_request(issuer.invite("again", WALL), key)) is Code.REVOKED


def test_a_member_cannot_keep_an_issuer_busy(world: World, issuer: Issuer, key: PeerKey) -> None:
    chain = join(issuer, "laptop", key).chain
    request = renew_request(key, chain, world.admin.genesis.network_id, world.hub_key.peer_id)
    for _ in range(5):
        assert ask(issuer, request).chain
    assert refused(issuer, request) is Code.BUSY
    assert ask(issuer, request, WALL + 61).chain


def test_members_of_a_revoked_issuer_renew_elsewhere_if_hubs_saw_them_before(world: World, issuer: Issuer) -> None:
    network, there = world.admin.genesis.network_id, world.second_key.peer_id
    second = world.second_issuer()
    seen, unseen = PeerKey.generate(), PeerKey.generate()
    seen_chain, unseen_chain = join(issuer, "seen", seen).chain, join(issuer, "unseen", unseen).chain
    second.note(second.trust.verify_chain(seen_chain, WALL), WALL)
    world.admin.revoke("hub-one", wall=WALL + 100)
    second.trust.replace_document(world.admin.document)
    second.note(second.trust.verify_chain(unseen_chain, WALL + 200), WALL + 200)
    backdated = PeerKey.generate()
    forged = world.stolen(backdated, wall=WALL - DAY_S)
    assert ask(second, renew_request(seen, seen_chain, network, there), WALL + 300).chain
    assert refused(second, renew_request(unseen, unseen_chain, network, there), WALL + 300) is Code.REVOKED
    request = renew_request(backdated, (forged, world.hub.issuer_certificate), network, there)
    assert refused(second, request, WALL + 300) is Code.REVOKED


def test_a_revoked_or_expired_issuer_issues_nothing(world: World, issuer: Issuer, key: PeerKey) -> None:
    token = issuer.invite("laptop", WALL, lifetime=400 * DAY_S)
    assert refused(issuer, join_request(token, key), WALL + 366 * DAY_S) is Code.FAILED
    world.admin.revoke("hub-one", wall=WALL)
    issuer.trust.replace_document(world.admin.document)
    assert refused(issuer, join_request(token, key)) is Code.FAILED


def test_a_full_ipv4_range_does_not_stop_anybody_from_joining(world: World, issuer: Issuer, key: PeerKey) -> None:
    from p2pvpn.identity.enrolment import _Holder

    hosts = ipv4_range(world.admin.genesis.network_id, 1).hosts()
    for number, address in enumerate(hosts):
        peer = type(key.peer_id)(number.to_bytes(20, "big"))
        issuer._members[peer] = _Holder(f"m{number}", int(address), int(WALL + DAY_S))
    member = join(issuer, "laptop", key).verify(world.admin.genesis.network_id, key, WALL)
    assert member.ipv4 is None
    assert len(member.blocks) == 1


def test_the_book_of_invitations_is_bounded_and_forgets_the_expired() -> None:
    book, draw = InvitationBook(), entropy("book")
    for number in range(MAX_INVITATIONS):
        book.invite(f"m{number}", expires=WALL + 10, wall=WALL, entropy=draw)
    with pytest.raises(LocalError, match="are open"):
        book.invite("one-more", expires=WALL + 10, wall=WALL, entropy=draw)
    book.invite("later", expires=WALL + 30, wall=WALL + 20, entropy=draw)
    assert len(book) == 1


def test_an_issuer_needs_its_own_key_and_an_undamaged_state(world: World) -> None:
    profile = world.profile(world.hub_key, world.hub)
    with pytest.raises(LocalError, match="not for the issuing key"):
        Issuer(
            profile.trust,
            world.hub_key.peer_id,
            world.second_key.issuing_key(),
            world.hub.issuer_certificate,
            entropy=entropy("x"),
        )
    profile.issuer_state = b"\x90"
    with pytest.raises(LocalError, match="damaged"):
        profile.make_issuer(entropy=entropy("x"))


class Files(dict):
    """A state store in memory, with the names of secret files."""

    def __init__(self) -> None:
        super().__init__()
        self.secret: set[str] = set()

    def write(self, name: str, data: bytes, *, secret: bool = False) -> None:
        self[name] = data
        if secret:
            self.secret.add(name)


def test_a_profile_round_trips_through_files(world: World, issuer: Issuer, key: PeerKey) -> None:
    files = Files()
    profile = Profile.from_join(key, join(issuer, "laptop", key))
    profile.save(files.write)
    again = Profile.load(files.get)
    assert (again.key.peer_id, again.chain, again.member) == (key.peer_id, profile.chain, profile.member)
    assert (again.genesis, again.document) == (profile.genesis, profile.document)
    assert again.make_issuer(entropy=entropy("x")) is None
    assert not again.is_granted
    assert files.secret == {KEY}


def test_an_issuers_profile_keeps_its_state(world: World, key: PeerKey) -> None:
    files = Files()
    profile = Profile.from_grant(world.hub_key, replace(world.hub, document=world.admin.document))
    profile.save(files.write)
    issuer = profile.make_issuer(entropy=entropy("one"), write=files.write)
    token = issuer.invite("laptop", WALL)
    result = ask(issuer, join_request(token, key))
    assert ISSUER_STATE in files.secret
    again = Profile.load(files.get)
    assert again.is_granted
    assert again.member.is_hub
    restarted = again.make_issuer(entropy=entropy("two"))
    assert ask(restarted, join_request(token, key)).chain == result.chain


def test_a_profile_takes_newer_documents_and_grants_only(world: World) -> None:
    profile = world.profile(world.gateway_key, world.gateway)
    old = profile.document
    world.admin.revoke("hub-two", wall=WALL)
    assert profile.adopt_document(world.admin.document)
    assert not profile.adopt_document(old)
    from p2pvpn.identity.grants import Request

    prefixes = ["192.168.7.0/24", "2001:db8:7::/48", "192.168.8.0/24"]
    grant = world.admin.grant(Request.create(world.gateway_key), prefixes=prefixes, wall=WALL + DAY_S)
    member = profile.accept_grant(grant)
    assert member.not_before > WALL
    with pytest.raises(TrustError):
        profile.accept_grant(make_world("elsewhere").gateway)


def test_a_profile_is_for_its_own_key(world: World, key: PeerKey) -> None:
    with pytest.raises(TrustError, match="another key"):
        Profile.from_grant(key, world.hub)


def test_a_damaged_profile_says_what_is_wrong(world: World, issuer: Issuer, key: PeerKey) -> None:
    files = Files()
    Profile.from_join(key, join(issuer, "laptop", key)).save(files.write)
    for name in ("key.pem", "genesis", "document", "chain"):
        with pytest.raises(LocalError, match=name):
            Profile.load({**files, name: None}.get)
        with pytest.raises(LocalError, match="cannot be used"):
            Profile.load({**files, name: files[name][:-30]}.get)
    with pytest.raises(LocalError, match="another key"):
        Profile.load({**files, CHAIN: pack(world.hub.chain)}.get)


def test_a_renewal_under_another_name_is_not_taken(world: World, issuer: Issuer, key: PeerKey) -> None:
    profile = Profile.from_join(key, join(issuer, "laptop", key))
    forged = (world.stolen(key, name="elsewhere"), world.hub.issuer_certificate)
    answer = pack(("p2pvpn-enrolled-1", world.admin.genesis.encode(), world.admin.document.encode(), forged))
    with pytest.raises(TrustError, match="changed the name"):
        profile.accept_untrusted(answer, WALL)
    assert parse_untrusted(profile.chain[0]).dns_names == ("laptop",)
