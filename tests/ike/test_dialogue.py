"""Two endpoints, a wire, virtual time: set-up, its failures, its end."""

from __future__ import annotations

import pytest

from p2pvpn.core.child import EspSuite
from p2pvpn.core.output import Transmit
from p2pvpn.crypto.kex import KexMethod
from p2pvpn.crypto.prf import Prf
from p2pvpn.ike.message import parse_header_untrusted
from p2pvpn.ike.notifies import Notify
from p2pvpn.ike.outputs import ChildFailed, InstallChild, Refused, SaClosed, SaEstablished, SaFailed, UseChild

from .people import Authority, credential, psk_credential
from .world import World, selectors

BLOCKS = {"alice": ("fd00::a/128",), "bob": ("fd00::b/128",), "carol": ("fd00::c/128",)}
ROOT = Authority()


def member(name: str, kind: str = "ecdsa", root: Authority = ROOT, **more):
    return credential(root, name, kind, blocks=BLOCKS, local=BLOCKS[name], **more)


def pair(kind: str = "ecdsa", seed: int = 0, **settings):
    world = World(seed)
    alice = world.host("alice", "192.0.2.1", member("alice", kind), **settings)
    bob = world.host("bob", "192.0.2.2", member("bob", kind), **settings)
    return world, alice, bob


def assert_mated(alice, bob) -> None:
    (ours,) = alice.installed.values()
    (theirs,) = bob.installed.values()
    assert (ours.spi_in, ours.spi_out) == (theirs.spi_out, theirs.spi_in)
    assert (ours.key_in, ours.key_out) == (theirs.key_out, theirs.key_in)
    assert (ours.local, ours.remote) == (theirs.remote, theirs.local)
    assert (ours.suite, ours.esn) == (theirs.suite, theirs.esn)
    assert ours.transport_mode is theirs.transport_mode
    assert ours.id in alice.used
    assert theirs.id in bob.used


@pytest.mark.parametrize("kind", ["ecdsa", "ecdsa384", "rsa", "pkcs1", "ed25519"])
def test_two_members_agree_on_everything(kind):
    world, alice, bob = pair(kind)
    alice.initiate(bob, tag="call 7")
    world.run(1)
    assert_mated(alice, bob)
    (up,) = alice.events(SaEstablished)
    assert (up.initiator, up.tag, up.network, up.remote.subject) == (True, "call 7", "net", "bob")
    (up,) = bob.events(SaEstablished)
    assert (up.initiator, up.tag, up.network, up.remote.subject) == (False, None, "net", "alice")
    (child,) = alice.installed.values()
    assert child.local == selectors("fd00::a/128")
    assert child.remote == selectors("fd00::b/128")
    assert child.esn
    assert child.suite is EspSuite.AES_GCM_16_256
    assert len(world.wire) == 4


def test_a_shared_secret_is_enough():
    world = World()
    blocks = {"alice": ("fd00::a/128",), "bob": ("fd00::b/128",)}
    alice = world.host("alice", "192.0.2.1", psk_credential("alice", b"s" * 32, blocks=blocks, local=blocks["alice"]))
    bob = world.host("bob", "192.0.2.2", psk_credential("bob", b"s" * 32, blocks=blocks, local=blocks["bob"]))
    alice.initiate(bob)
    world.run(1)
    assert_mated(alice, bob)


def test_effects_and_events_come_in_the_order_that_loses_no_packet():
    world, alice, bob = pair()
    alice.initiate(bob)
    world.run(1)
    assert [type(one) for one in alice.log[2:]] == [InstallChild, UseChild, SaEstablished]
    assert [type(one) for one in bob.log[1:]] == [InstallChild, Transmit, UseChild, SaEstablished]


def test_both_ends_export_the_same_secret_and_another_for_another_label():
    world, alice, bob = pair()
    alice.initiate(bob)
    world.run(1)
    one = alice.ike.export(alice.sa, b"ice", 40)
    assert one == bob.ike.export(bob.sa, b"ice", 40)
    assert len(one) == 40
    assert one.reveal()[:32] != alice.ike.export(alice.sa, b"relay", 32).reveal()


@pytest.mark.parametrize(
    ("offered", "accepted"),
    [
        ({"ciphers": (EspSuite.CHACHA20_POLY1305,)}, {}),
        ({}, {"ciphers": (EspSuite.AES_GCM_16_128,)}),
        ({"prfs": (Prf.HMAC_SHA2_512,)}, {}),
        ({}, {"prfs": (Prf.HMAC_SHA2_384,)}),
        ({"kexes": (KexMethod.ECP_256,)}, {}),
        ({}, {"kexes": (KexMethod.ECP_384,)}),
        ({"esp_suites": (EspSuite.CHACHA20_POLY1305,)}, {}),
        ({}, {"esp_suites": (EspSuite.AES_GCM_16_128,)}),
        ({"esn": False}, {}),
        ({}, {"esn": False}),
    ],
)
def test_the_narrower_side_decides_the_algorithms(offered, accepted):
    world = World()
    alice = world.host("alice", "192.0.2.1", member("alice"), **offered)
    bob = world.host("bob", "192.0.2.2", member("bob"), **accepted)
    alice.initiate(bob)
    world.run(1)
    assert_mated(alice, bob)
    (child,) = bob.installed.values()
    limits = {**offered, **accepted}
    assert child.suite in limits.get("esp_suites", (child.suite,))
    assert child.esn == limits.get("esn", True)


def test_another_group_costs_one_more_round_trip():
    world = World()
    alice = world.host("alice", "192.0.2.1", member("alice"))
    bob = world.host("bob", "192.0.2.2", member("bob"), kexes=(KexMethod.ECP_384,))
    alice.initiate(bob)
    world.run(1)
    assert len(world.wire) == 6
    assert_mated(alice, bob)


def test_without_a_common_proposal_the_attempt_fails_with_the_reason_after_the_grace_time():
    world = World()
    alice = world.host("alice", "192.0.2.1", member("alice"), prfs=(Prf.HMAC_SHA2_256,))
    bob = world.host("bob", "192.0.2.2", member("bob"), prfs=(Prf.HMAC_SHA2_384,))
    alice.initiate(bob)
    world.run(1)
    assert not alice.events()
    world.run(2)
    (failed,) = alice.events()
    assert failed.reason == "NO_PROPOSAL_CHOSEN"
    assert not failed.timed_out
    assert not alice.ike.sa_ids()
    assert not bob.ike.sa_ids()


def refused(make_alice, make_bob=lambda: member("bob"), **request):
    """A set-up that must not come up: alice's reason, bob's, and the length of the answer to IKE_AUTH."""
    world = World()
    alice = world.host("alice", "192.0.2.1", make_alice())
    bob = world.host("bob", "192.0.2.2", make_bob())
    alice.initiate(bob, **request)
    world.run(60)
    assert not alice.events(SaEstablished)
    assert not bob.events(SaEstablished)
    assert not alice.installed
    assert not bob.installed
    assert not bob.ike.sa_ids()
    (failed,) = alice.events(SaFailed)
    (told,) = bob.events(Refused)
    return failed.reason, told.reason, bytes(bob.sent()[-1][16:24]), len(bob.sent()[-1])


def test_every_reason_not_to_trust_an_initiator_looks_the_same_on_the_wire():
    stranger = Authority("elsewhere")
    names = {"alice": ("fd00::a/128",), "bob": ("fd00::b/128",)}

    def wrong_key():
        own = member("alice")
        return credential(ROOT, "alice", blocks=BLOCKS, local=(), schemes=own.schemes, certificates_of="carol")

    causes = [
        refused(lambda: credential(stranger, "alice", blocks=BLOCKS)),
        refused(lambda: credential(ROOT, "alice", blocks=BLOCKS, own_name="carol")),
        refused(wrong_key),
        refused(lambda: psk_credential("alice", b"x" * 32, blocks=names, local=())),
        refused(lambda: credential(ROOT, "alice", blocks=BLOCKS, send_chain=False)),
    ]
    assert len({told for _, told, _, _ in causes}) >= 4
    assert {reason for reason, _, _, _ in causes} == {"the responder says AUTHENTICATION_FAILED"}
    assert len({(head, size) for _, _, head, size in causes}) == 1


def test_another_shared_secret_is_refused():
    blocks = {"alice": ("fd00::a/128",), "bob": ("fd00::b/128",)}
    refused(
        lambda: psk_credential("alice", b"a" * 32, blocks=blocks, local=()),
        lambda: psk_credential("bob", b"b" * 32, blocks=blocks, local=()),
    )


@pytest.mark.parametrize("wrong", ["root", "name"])
def test_a_responder_that_does_not_prove_itself_is_told_and_forgets_the_sa(wrong):
    world = World()
    alice = world.host("alice", "192.0.2.1", member("alice"))
    impostor = credential(
        Authority("elsewhere") if wrong == "root" else ROOT,
        "bob" if wrong == "root" else "carol",
        blocks=BLOCKS,
        local=BLOCKS["bob"],
        trusts=ROOT,
    )
    bob = world.host("bob", "192.0.2.2", impostor)
    alice.initiate(bob)
    world.run(30)
    (failed,) = alice.events()
    assert isinstance(failed, SaFailed)
    assert not alice.installed
    (closed,) = bob.events(SaClosed)
    assert closed.reason == "the peer says AUTHENTICATION_FAILED"
    assert not bob.installed
    assert not alice.ike.sa_ids()
    assert not bob.ike.sa_ids()


def test_a_peer_gets_no_more_addresses_than_its_identity_holds():
    world, alice, bob = pair()
    alice.initiate(bob, local=selectors("fd00::a/128", "fd00::c/128", "10.0.0.0/8"), remote=selectors("::/0"))
    world.run(1)
    (child,) = bob.installed.values()
    assert child.remote == selectors("fd00::a/128")
    assert child.local == selectors("fd00::b/128")


def test_disjoint_selectors_refuse_the_child_and_leave_the_sa():
    world, alice, bob = pair()
    alice.initiate(bob, local=selectors("fd00::c/128"))
    world.run(1)
    for host in (alice, bob):
        assert len(host.events(SaEstablished)) == 1
        (failed,) = host.events(ChildFailed)
        assert not host.installed
    assert "TS_UNACCEPTABLE" in alice.events(ChildFailed)[0].reason
    assert failed.sa == bob.sa


def test_a_responder_cannot_give_itself_addresses_that_its_identity_does_not_hold():
    world = World()
    alice = world.host("alice", "192.0.2.1", member("alice"))
    greedy = credential(ROOT, "bob", blocks=BLOCKS, local=("fd00::c/128",))
    bob = world.host("bob", "192.0.2.2", greedy)
    alice.initiate(bob)
    world.run(1)
    assert "does not hold" in alice.events(ChildFailed)[0].reason
    assert not alice.installed
    assert not bob.installed


def test_without_a_child_the_sa_stands_alone():
    world, alice, bob = pair()
    alice.initiate(bob, childless=True)
    world.run(1)
    assert alice.events(SaEstablished)
    assert bob.events(SaEstablished)
    assert not alice.installed
    assert not bob.installed
    assert not alice.events(ChildFailed)


def both_networks(name: str):
    other = Authority("other root")
    return [member(name), credential(other, name + ".other", blocks={}, network="other")], other


def test_the_responder_answers_as_whom_the_initiator_names():
    world = World()
    creds, other = both_networks("bob")
    mine = credential(other, "alice.other", blocks={}, network="other")
    alice = world.host("alice", "192.0.2.1", mine)
    bob = world.host("bob.other", "192.0.2.2", *creds)
    alice.initiate(bob)
    world.run(1)
    assert bob.events(SaEstablished)[0].network == "other"
    assert alice.events(SaEstablished)[0].remote.subject == "bob.other"


@pytest.mark.parametrize("ask", [True, False])
def test_without_a_name_the_responder_goes_by_the_authorities_and_else_tries_all(ask):
    world = World()
    creds, other = both_networks("bob")
    mine = credential(other, "alice.other", blocks={}, network="other", ask=ask)
    alice = world.host("alice", "192.0.2.1", mine)
    bob = world.host("bob.other", "192.0.2.2", *creds)
    alice.initiate(bob, remote_id=None)
    world.run(1)
    assert bob.events(SaEstablished)[0].network == "other"
    assert alice.events(SaEstablished)


def test_two_that_call_each_other_at_once_get_two_sas_and_either_can_be_closed():
    world, alice, bob = pair()
    first = alice.initiate(bob)
    bob.initiate(alice)
    world.run(1)
    assert len(alice.installed) == len(bob.installed) == 2
    alice.do("close", first, world.now, "the other one stays")
    world.run(30)
    assert len(alice.installed) == len(bob.installed) == 1
    assert_mated(alice, bob)


def test_status_notifications_ride_in_both_auth_messages():
    world = World()
    hello = (Notify(40961, b"from alice"), Notify(40962, b""))
    alice = world.host("alice", "192.0.2.1", member("alice", auth_notifies=lambda: hello))
    bob = world.host("bob", "192.0.2.2", member("bob", auth_notifies=lambda: (Notify(40961, b"from bob"),)))
    alice.initiate(bob)
    world.run(1)
    assert bob.events(SaEstablished)[0].notifies == hello
    assert alice.events(SaEstablished)[0].notifies == (Notify(40961, b"from bob"),)


def test_a_view_tells_of_an_sa_and_nothing_of_its_keys():
    world, alice, bob = pair()
    alice.initiate(bob)
    world.run(1)
    view = alice.ike.view(alice.sa)
    assert view.state == "ESTABLISHED"
    assert view.remote.subject == "bob"
    assert view.suite == "AES_GCM_16_256/HMAC_SHA2_384/CURVE25519"
    assert view.child_ids == tuple(alice.installed)
    assert view.mobike
    assert alice.ike.view(99) is None


def test_nothing_is_answered_to_a_datagram_of_an_unknown_sa():
    world, alice, bob = pair()
    alice.initiate(bob)
    world.run(1)
    carol = world.host("carol", "192.0.2.3", member("carol"))
    for path, data in list(world.wire):
        header, _ = parse_header_untrusted(data)
        if header.exchange != 34:
            carol.run(carol.ike.handle(path, data, world.now))
    assert not carol.log
