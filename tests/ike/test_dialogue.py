"""Two endpoints, a wire, virtual time: set-up, its failures, its end."""

from __future__ import annotations

import pytest

from p2pvpn.core.child import EspSuite
from p2pvpn.ike.outputs import (
    SaEstablished,
)

from .people import Authority, credential
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
