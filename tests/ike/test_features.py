"""What two sides can agree on beyond the core: post-quantum and preshared keys, redirection, leases, contact."""

from __future__ import annotations

import contextlib
import ipaddress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pvpn.core.child import EspSuite
from p2pvpn.core.errors import WireError
from p2pvpn.core.secret import Secret
from p2pvpn.crypto.kex import KexMethod
from p2pvpn.crypto.signatures import Scheme
from p2pvpn.ike.auth import announced_methods, methods_notify
from p2pvpn.ike.config import IkeSettings
from p2pvpn.ike.lease import Lease, attributes_untrusted, request
from p2pvpn.ike.message import notifications, parse_header_untrusted
from p2pvpn.ike.notifies import Notify, NotifyType
from p2pvpn.ike.outputs import ChildFailed, Redirected, Refused, SaClosed, SaEstablished, SaFailed
from p2pvpn.ike.payloads import Configuration
from p2pvpn.ike.redirect import parse_redirect_untrusted, redirect_notify

from .evil import Evil
from .people import Authority, credential, psk_credential
from .test_dialogue import BLOCKS, ROOT, assert_mated, member
from .world import World, selectors

KEM = ((KexMethod.ML_KEM_768,),)
DEFAULT = IkeSettings()


def two(first, second, *, ours=None, theirs=None):
    world = World()
    alice = world.host("alice", "192.0.2.1", first, **(ours or {}))
    bob = world.host("bob", "192.0.2.2", second, **(theirs or {}))
    return world, alice, bob


def hybrid(**more):
    return {"additional_kexes": KEM, **more}


def test_the_default_between_our_peers_is_aes_256_gcm_sha_384_x25519_and_ml_kem_768():
    defaults = {"additional_kexes": DEFAULT.additional_kexes}
    world, alice, bob = two(member("alice"), member("bob"), ours=defaults, theirs=defaults)
    alice.initiate(bob)
    world.run(1)
    assert_mated(alice, bob)
    expected = "AES_GCM_16_256/HMAC_SHA2_384/CURVE25519/ML_KEM_768"
    assert alice.ike.view(1).suite == bob.ike.view(1).suite == expected
    exchanges = [parse_header_untrusted(data)[0].exchange for _, data in world.wire]
    assert list(dict.fromkeys(exchanges)) == [34, 43, 35], "one more round trip"


@pytest.mark.parametrize("lacks", ["initiator", "responder"])
def test_a_stranger_without_ml_kem_gets_an_sa_without(lacks):
    plain, post = {"additional_kexes": ()}, hybrid()
    ours, theirs = (plain, post) if lacks == "initiator" else (post, plain)
    world, alice, bob = two(member("alice"), member("bob"), ours=ours, theirs=theirs)
    alice.initiate(bob)
    world.run(1)
    assert_mated(alice, bob)
    assert alice.ike.view(1).suite == "AES_GCM_16_256/HMAC_SHA2_384/CURVE25519"
    assert len(world.wire) == 4


@pytest.mark.parametrize("lacks", ["initiator", "responder"])
def test_whoever_insists_on_ml_kem_gets_no_sa_without(lacks):
    plain, post = {"additional_kexes": ()}, hybrid(additional_required=True)
    ours, theirs = (plain, post) if lacks == "initiator" else (post, plain)
    world, alice, bob = two(member("alice"), member("bob"), ours=ours, theirs=theirs)
    alice.initiate(bob)
    world.run(5)
    assert alice.events(SaFailed)[0].reason == "NO_PROPOSAL_CHOSEN"


def test_several_additional_exchanges_in_a_row():
    several = {"additional_kexes": (KEM[0], (KexMethod.ECP_384,), (KexMethod.ML_KEM_1024,))}
    world, alice, bob = two(member("alice"), member("bob"), ours=several, theirs=several)
    alice.initiate(bob)
    world.run(1)
    assert_mated(alice, bob)
    assert bob.ike.view(1).suite.endswith("CURVE25519/ML_KEM_768/ECP_384/ML_KEM_1024")
    assert alice.ike._by_id[1].keys.d == bob.ike._by_id[1].keys.d


@pytest.mark.parametrize("seed", range(10))
def test_additional_exchanges_survive_loss_and_any_order(seed):
    world = World(seed)
    alice = world.host("alice", "192.0.2.1", member("alice"), **hybrid(), setup_tries=12, fragment_bytes=500)
    bob = world.host("bob", "192.0.2.2", member("bob"), **hybrid(), fragment_bytes=500)
    dice = world.random
    world.fate = lambda path, data: [dice.uniform(0.01, 0.3) for _ in range(dice.choice((0, 1, 1, 1, 2)))]
    alice.initiate(bob)
    world.run(60)
    assert_mated(alice, bob)


def test_whoever_removes_the_better_proposal_on_the_way_is_found_out():
    """Without INTERMEDIATE_EXCHANGE_SUPPORTED the responder takes less, and AUTH tells."""
    world, alice, bob = two(member("alice"), member("bob"), ours=hybrid(), theirs=hybrid())
    number = NotifyType.INTERMEDIATE_EXCHANGE_SUPPORTED.to_bytes(2, "big")
    world.tamper = lambda path, data: (
        data.replace(b"\0\0\0" + number, b"\0\0\0" + b"\xa0\x01", 1) if data[18] == 34 else data
    )
    world.tamper = lambda path, data: data.replace(number, b"\xa0\x01", 1) if data[18] == 34 else data
    alice.initiate(bob)
    world.run(60)
    assert not alice.events(SaEstablished)
    assert not bob.events(SaEstablished)


def test_a_key_share_that_is_none_ends_the_attempt():
    world, alice, bob = two(member("alice"), member("bob"), ours=hybrid(), theirs=hybrid())
    world.fate = lambda path, data: () if data[18] == 43 else (0.01,)
    alice.initiate(bob)
    world.run(0.1)
    evil = Evil(alice, 1, bob)
    from p2pvpn.ike.payloads import KeyExchangeData

    evil.next_id = 1
    answer = evil.ask(43, [KeyExchangeData(36, bytes(10))])
    assert [one.type for one in answer] == [NotifyType.INVALID_SYNTAX]
    world.run(60)
    assert not bob.ike._by_id


@pytest.mark.parametrize("cipher", EspSuite)
@pytest.mark.parametrize("kex", list(KexMethod)[:7])
def test_every_cipher_and_every_key_exchange(cipher, kex):
    settings = {"ciphers": (cipher,), "kexes": (kex,), "fragment_bytes": 300}
    world, alice, bob = two(member("alice"), member("bob"), ours=settings, theirs=settings)
    alice.initiate(bob)
    world.run(2)
    assert_mated(alice, bob)
    alice.do("rekey", 1, world.now)
    world.run(1)
    alice.do("inform", 1, [Notify(40961, b"x" * 700)], world.now)
    world.run(1)
    assert alice.ike.view(1).suite == bob.ike.view(1).suite
    assert alice.ike.view(1).suite.startswith(cipher.name)


@pytest.mark.parametrize("suite", EspSuite)
def test_every_suite_of_a_child_sa_and_its_replacement(suite):
    """Ciphers of built-in clients are never offered, but taken, and kept when what has them is replaced."""
    world, alice, bob = two(member("alice"), member("bob"), ours={"esp_suites": (suite,)})
    alice.initiate(bob)
    world.run(1)
    bob.do("rekey_child", 1, bob.ike.view(1).child_ids[0], world.now)
    world.run(20)
    assert_mated(alice, bob)
    (child,) = bob.installed.values()
    assert child.suite is suite
    assert len(child.key_in.reveal()) == suite.keymat_bytes


ENDS = {"local": selectors("192.0.2.1/32"), "remote": selectors("192.0.2.2/32")}


HOSTS = {"alice": ("192.0.2.1/32",), "bob": ("192.0.2.2/32",)}


def of_hosts():
    """Identities that hold their own outer addresses."""
    return [credential(ROOT, name, "ecdsa", blocks=HOSTS, local=HOSTS[name]) for name in HOSTS]


@pytest.mark.parametrize("esn", [True, False])
def test_transport_mode_between_the_ends_of_the_path(esn):
    world, alice, bob = two(*of_hosts(), theirs={"transport_mode": True, "esn": esn}, ours={"transport_mode": True})
    alice.initiate(bob, transport=True, **ENDS)
    world.run(1)
    assert_mated(alice, bob)
    for host in (bob, alice):
        host.do("rekey_child", 1, host.ike.view(1).child_ids[0], world.now)
        world.run(20)
        assert_mated(alice, bob)
        for end in (alice, bob):
            (child,) = end.installed.values()
            assert child.transport_mode
            assert child.esn is esn


@pytest.mark.parametrize(
    ("taken", "wish"),
    [(False, ENDS), (True, {"local": selectors("fd00::a/128"), "remote": selectors("fd00::b/128")})],
    ids=["not wanted", "other addresses"],
)
def test_transport_mode_becomes_tunnel_mode(taken, wish):
    ends = of_hosts() if wish is ENDS else [member("alice"), member("bob")]
    world, alice, bob = two(*ends, theirs={"transport_mode": taken})
    alice.initiate(bob, transport=True, **wish)
    world.run(1)
    assert_mated(alice, bob)
    assert not any(child.transport_mode for end in (alice, bob) for child in end.installed.values())


def test_a_slow_group_is_taken_only_when_there_is_nothing_better():
    """Android begins with modp4096."""
    android = {"kexes": (KexMethod.MODP_4096, KexMethod.CURVE25519)}
    world, alice, bob = two(member("alice"), member("bob"), ours=android)
    alice.initiate(bob)
    world.run(1)
    assert_mated(alice, bob)
    assert bob.ike.view(1).suite.endswith("CURVE25519")


# Postquantum preshared keys (RFC 8784)

PPK = (b"ppk of ours", Secret(b"q" * 32))
OTHER = (b"another ppk", Secret(b"r" * 32))
WRONG = (PPK[0], Secret(b"w" * 32))


@pytest.mark.parametrize("proof", ["certificate", "shared secret"])
@pytest.mark.parametrize(
    ("ours", "theirs", "result"),
    [
        ((PPK, False), (PPK, False), "mixed"),
        ((PPK, True), (PPK, True), "mixed"),
        ((PPK, False), (None, False), "plain"),
        ((None, False), (PPK, False), "plain"),
        ((PPK, False), (OTHER, False), "plain"),
        ((PPK, True), (None, False), None),
        ((None, False), (PPK, True), None),
        ((PPK, False), (OTHER, True), None),
        ((PPK, True), (OTHER, False), None),
        ((PPK, True), (WRONG, False), None),
    ],
)
def test_a_postquantum_preshared_key(ours, theirs, result, proof):
    def own(name, ppk):
        if proof == "certificate":
            made = member(name)
        else:
            made = psk_credential(name, b"s" * 32, blocks=BLOCKS, local=BLOCKS[name])
        return replace(made, ppk=ppk[0], ppk_required=ppk[1])

    world, alice, bob = two(own("alice", ours), own("bob", theirs))
    alice.initiate(bob)
    world.run(60)
    if result is None:
        assert not alice.events(SaEstablished)
        assert not bob.installed
        return
    assert_mated(alice, bob)
    assert [host.ike._by_id[1].peer.ppk_used for host in (alice, bob)] == [result == "mixed"] * 2
    bob.do("rekey", 1, world.now)
    world.run(1)
    assert alice.ike._by_id[1].keys.d == bob.ike._by_id[1].keys.d


# Redirection (RFC 5685)


def test_a_client_follows_to_the_other_gateway():
    world = World()
    alice = world.host("alice", "192.0.2.1", member("alice"))
    full = world.host("bob", "192.0.2.2", member("bob"), redirect=lambda path: ipaddress.ip_address("192.0.2.3"))
    free = world.host("bob", "192.0.2.3", member("bob"))
    alice.initiate(full)
    world.run(1)
    assert [str(one.gateway) for one in alice.events(Redirected)] == ["192.0.2.3"]
    assert_mated(alice, free)
    assert not full.ike._by_id
    assert alice.ike.view(1).path.remote == free.address


def test_two_gateways_cannot_play_ball_with_a_client():
    world = World()
    alice = world.host("alice", "192.0.2.1", member("alice"))
    one = world.host("bob", "192.0.2.2", member("bob"), redirect=lambda path: ipaddress.ip_address("192.0.2.3"))
    world.host("bob", "192.0.2.3", member("bob"), redirect=lambda path: ipaddress.ip_address("192.0.2.2"))
    alice.initiate(one)
    world.run(90)
    assert len(alice.events(Redirected)) <= 5
    assert alice.events(SaFailed) or alice.events(SaEstablished)


def test_nobody_without_our_nonce_redirects_us():
    world, alice, bob = two(member("alice"), member("bob"))
    forged = redirect_notify(ipaddress.ip_address("203.0.113.66"), b"n" * 32)
    alice.initiate(bob)
    path, first = world.wire[0]
    from p2pvpn.ike.message import Header, build_clear

    header, _ = parse_header_untrusted(first)
    answer = Header(header.spi_i, bytes(8), 34, False, True, 0)
    world.inject(
        path._replace(local=path.remote, remote=path.local), build_clear(answer, notifications([forged])), 0.001
    )
    world.run(1)
    assert not alice.events(Redirected)
    assert_mated(alice, bob)


def test_a_live_client_is_told_where_to_go():
    world, alice, bob = two(member("alice"), member("bob"))
    alice.initiate(bob)
    world.run(1)
    bob.do("inform", 1, [redirect_notify(ipaddress.ip_address("2001:db8::7"))], world.now)
    world.run(1)
    (told,) = alice.events(Redirected)
    assert (str(told.gateway), told.followed) == ("2001:db8::7", False)


@given(st.binary(max_size=40))
def test_no_redirection_does_harm(data):
    with contextlib.suppress(WireError):
        parse_redirect_untrusted(data)


# Configuration payloads

LEASE = Lease(
    (ipaddress.ip_address("10.9.0.7"), ipaddress.ip_address("fd09::7")),
    (ipaddress.ip_address("10.9.0.1"), ipaddress.ip_address("fd09::1")),
    (ipaddress.ip_network("10.8.0.0/16"), ipaddress.ip_network("fd08::/32")),
)


def test_a_client_gets_addresses_resolvers_and_subnets_and_its_selectors_are_those_addresses():
    gateway = credential(ROOT, "bob", blocks={}, local=("10.8.0.0/16", "fd08::/32"), lease=lambda remote: LEASE)
    world, alice, bob = two(credential(ROOT, "alice", blocks={"bob": ("::/0", "0.0.0.0/0")}), gateway)
    anything = selectors("0.0.0.0/0", "::/0")
    alice.initiate(bob, request_lease=True, local=anything, remote=anything)
    world.run(1)
    assert alice.events(SaEstablished)[0].lease == LEASE
    assert bob.events(SaEstablished)[0].lease == LEASE
    assert_mated(alice, bob)
    (child,) = bob.installed.values()
    assert child.remote == selectors("10.9.0.7/32", "fd09::7/128")
    alice.do("rekey_child", 1, 1, world.now)
    world.run(1)
    assert len(bob.ike.view(1).child_ids) == 1


def test_without_a_free_address_there_is_no_child_and_the_sa_stands():
    gateway = credential(ROOT, "bob", blocks=BLOCKS, local=BLOCKS["bob"], lease=lambda remote: None)
    world, alice, bob = two(member("alice"), gateway)
    alice.initiate(bob, request_lease=True)
    world.run(1)
    assert "INTERNAL_ADDRESS_FAILURE" in alice.events(ChildFailed)[0].reason
    assert bob.events(ChildFailed)
    assert alice.ike.view(1).state == bob.ike.view(1).state == "ESTABLISHED"


@given(st.binary(max_size=200))
def test_no_configuration_does_harm(data):
    try:
        attributes_untrusted(Configuration(2, data))
        Lease.of_untrusted(Configuration(2, data))
    except WireError:
        pass


def test_a_lease_comes_back_as_it_was_given():
    kinds = frozenset(kind for kind, _ in attributes_untrusted(request()))
    assert Lease.of_untrusted(LEASE.reply(kinds)) == LEASE


# First contact, and what the peer verifies


def test_initial_contact_ends_the_other_sas_of_the_same_two_identities_alone():
    world = World()
    bob = world.host("bob", "192.0.2.2", member("bob"))
    alice = world.host("alice", "192.0.2.1", member("alice"))
    carol = world.host("carol", "192.0.2.3", member("carol"))
    alice.initiate(bob)
    carol.initiate(bob)
    world.run(1)
    reborn = world.host("alice", "192.0.2.1", member("alice"))
    world.hosts.remove(alice)
    reborn.initiate(bob, initial_contact=True)
    world.run(1)
    (closed,) = bob.events(SaClosed)
    assert closed.reason == "the peer began anew"
    assert {bob.ike.view(one).remote.subject for one in bob.ike.sa_ids()} == {"alice", "carol"}
    assert len(bob.installed) == 2


def test_initial_contact_of_somebody_who_is_refused_ends_nothing():
    world = World()
    bob = world.host("bob", "192.0.2.2", member("bob"))
    alice = world.host("alice", "192.0.2.1", member("alice"))
    alice.initiate(bob)
    world.run(1)
    liar = world.host("alice", "192.0.2.9", credential(Authority("elsewhere"), "alice", blocks=BLOCKS))
    liar.initiate(bob, initial_contact=True)
    world.run(30)
    assert bob.events(Refused)
    assert not bob.events(SaClosed)


def test_supported_auth_methods_pick_the_scheme():
    methods = announced_methods(methods_notify())
    assert len(methods) == len(Scheme) - 2
    assert announced_methods(None) == announced_methods(Notify(16443, b"\x01\x00")) == frozenset()
    assert announced_methods(Notify(16443, b"\x05\x00\x0e\x01")) == frozenset()
