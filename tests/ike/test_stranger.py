"""Debian's strongSwan at the other end, in both roles: set-up by every kind of proof, fragments, MOBIKE, the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path as FilePath

import pytest
from cryptography.hazmat.primitives import serialization
from strangers.charon import Charon, block

from p2pvpn.core.child import EspSuite
from p2pvpn.crypto.kex import KexMethod
from p2pvpn.ike.config import Initiate
from p2pvpn.ike.outputs import (
    InstallChild,
    Liveness,
    MoveFailed,
    Refused,
    SaClosed,
    SaEstablished,
    SaFailed,
    SaMoved,
)
from p2pvpn.lab.net import Lab

from .driver import PORT, Driver
from .people import Authority, credential, ike_id, key_of, psk_credential
from .world import selectors

pytestmark = [pytest.mark.stranger, pytest.mark.netns]

OURS, OURS_TOO, THEIRS = "198.51.100.1", "198.51.100.3", "203.0.113.2"
OUR_NET, THEIR_NET = "10.201.0.0/24", "10.202.0.0/24"
BLOCKS = {"us.test": (OUR_NET,), "charon.test": (THEIR_NET,)}
ROOT = Authority()
SECRET = b"a secret that both know"
SECRETS = block("secrets", {"ike": {"id-a": "us.test", "id-b": "charon.test", "secret": f'"{SECRET.decode()}"'}})


@dataclass
class Scene:
    lab: Lab
    charon: Charon
    work: FilePath

    def driver(self, *credentials, **settings) -> Driver:
        node = next(one for one in self.lab.nodes if one.name == "us")
        return Driver(node, (OURS, OURS_TOO), credentials, **settings)


@pytest.fixture
def scene(lab: Lab, tmp_path: FilePath) -> Iterator[Scene]:
    lab.public("us", OURS, OURS_TOO)
    node = lab.public("charon", THEIRS)
    node.ip("addr add 10.202.0.1/32 dev lo")  # charon wants an address of its own inside the selectors
    charon = Charon(node, tmp_path, retransmit_timeout="1", retransmit_tries="3")
    yield Scene(lab, charon, tmp_path)
    charon.stop()


def options(charon: Charon, **more: str) -> None:
    """More lines for its strongswan.conf."""
    path = charon.work / "strongswan.conf"
    lines = "".join(f"\n  {key} = {value}" for key, value in more.items())
    path.write_text(path.read_text().replace("charon {", "charon {" + lines, 1))


def ours(kind: str = "ecdsa", **more):
    return credential(ROOT, "us.test", kind, blocks=BLOCKS, local=(OUR_NET,), **more)


def give_certificate(charon: Charon, kind: str = "ecdsa", root: Authority = ROOT) -> None:
    """Charon gets the root and a certificate of that kind."""
    key = key_of(kind, "charon.test")
    leaf = root.leaf("charon.test", key.public_key())
    pem = serialization.Encoding.PEM
    charon.trust(ROOT.certificate.public_bytes(pem))
    plain = serialization.NoEncryption()
    key_pem = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    charon.own("charon.pem", leaf.public_bytes(pem), key_pem)


def connection(*, auth: str = "pubkey", proposals: str = "default", esp: str = "aes256gcm16", **more: object) -> str:
    local: dict[str, object] = {"auth": auth, "id": "charon.test"}
    if auth != "psk":
        local["certs"] = "charon.pem"
    us = {
        "version": 2,
        "local_addrs": THEIRS,
        "remote_addrs": OURS,
        "local_port": PORT,
        "remote_port": PORT,
        "proposals": proposals,
        "local": local,
        "remote": {"auth": auth, "id": "us.test"},
        "children": {"net": {"local_ts": THEIR_NET, "remote_ts": OUR_NET, "esp_proposals": esp}},
        **more,
    }
    return block("connections", {"us": us}) + ("\n" + SECRETS if auth == "psk" else "") + "\n"


def request(driver: Driver, own, **more) -> Initiate:
    defaults = {"local": selectors(OUR_NET), "remote": selectors(THEIR_NET), "remote_id": ike_id("charon.test")}
    return Initiate(credential=own, path=driver.path(THEIRS), **{**defaults, **more})


def assert_up(driver: Driver, charon: Charon, suite: EspSuite = EspSuite.AES_GCM_16_256) -> None:
    """Both sides have one IKE SA and one Child SA, and name the same SPIs."""
    (up,) = driver.events(SaEstablished)
    (install,) = driver.events(InstallChild)
    child = install.child
    assert up.remote.id == ike_id("charon.test")
    assert (child.local, child.remote) == (selectors(OUR_NET), selectors(THEIR_NET))
    assert child.suite is suite
    assert not child.esn
    listing = charon.sas()
    assert "ESTABLISHED" in listing
    assert "INSTALLED, TUNNEL-in-UDP" in listing
    assert f"in  {child.spi_out:08x}" in listing
    assert f"out {child.spi_in:08x}" in listing


def establish(driver: Driver, own, **more) -> int:
    sa = driver.initiate(request(driver, own, **more))
    driver.run(lambda: bool(driver.events()))
    return sa


@pytest.mark.parametrize("kind", ["ecdsa", "ecdsa384", "rsa", "pkcs1", "ed25519"])
def test_we_begin_with_certificates(scene: Scene, kind: str) -> None:
    give_certificate(scene.charon, kind)
    if kind == "rsa":
        options(scene.charon, rsa_pss="yes")
    with scene.charon.running(connection()), scene.driver(ours(kind)) as us:
        establish(us, ours(kind))
        assert_up(us, scene.charon)


@pytest.mark.parametrize("kind", ["ecdsa", "ecdsa384", "rsa", "pkcs1", "ed25519"])
def test_charon_begins_with_certificates(scene: Scene, kind: str) -> None:
    give_certificate(scene.charon, kind)
    if kind == "rsa":
        options(scene.charon, rsa_pss="yes")
    with scene.charon.running(connection()), scene.driver(ours(kind)) as us:
        running = scene.charon.initiate("net")
        us.run(lambda: running.poll() is not None)
        assert "initiate completed successfully" in running.communicate()[0]
        assert_up(us, scene.charon)


@pytest.mark.parametrize("kind", ["ecdsa", "ecdsa384"])
def test_charon_without_rfc_7427_gets_and_gives_the_old_methods(scene: Scene, kind: str) -> None:
    give_certificate(scene.charon, kind)
    options(scene.charon, signature_authentication="no")
    with scene.charon.running(connection()), scene.driver(ours(kind)) as us:
        establish(us, ours(kind))
        assert_up(us, scene.charon)
        number = {"ecdsa": "256", "ecdsa384": "384"}[kind]
        assert f"authentication of 'us.test' with ECDSA-{number} signature successful" in scene.charon.log


@pytest.mark.parametrize("who", ["we", "charon"])
def test_a_shared_secret_works_in_both_roles(scene: Scene, who: str) -> None:
    own = psk_credential("us.test", SECRET, blocks=BLOCKS, local=(OUR_NET,))
    with scene.charon.running(connection(auth="psk")), scene.driver(own) as us:
        if who == "we":
            establish(us, own)
        else:
            running = scene.charon.initiate("net")
            us.run(lambda: running.poll() is not None)
            running.communicate()
        assert_up(us, scene.charon)


@pytest.mark.parametrize(
    ("ike", "esp", "suite"),
    [
        ("aes128gcm16-prfsha256-x25519", "aes128gcm16", EspSuite.AES_GCM_16_128),
        ("aes256gcm16-prfsha384-ecp384", "aes256gcm16", EspSuite.AES_GCM_16_256),
        ("chacha20poly1305-prfsha512-ecp256", "chacha20poly1305", EspSuite.CHACHA20_POLY1305),
    ],
)
@pytest.mark.parametrize("who", ["we", "charon"])
def test_charon_and_we_speak_the_same_algorithms(scene: Scene, ike: str, esp: str, suite: EspSuite, who: str) -> None:
    give_certificate(scene.charon)
    with scene.charon.running(connection(proposals=ike, esp=esp)), scene.driver(ours()) as us:
        if who == "we":
            establish(us, ours())  # our first group is x25519: charon asks for another by INVALID_KE_PAYLOAD
        else:
            running = scene.charon.initiate("net")
            us.run(lambda: running.poll() is not None)
            running.communicate()
        assert_up(us, scene.charon, suite)


def test_we_ask_charon_for_another_group_and_for_a_cookie(scene: Scene) -> None:
    give_certificate(scene.charon)
    groups = "aes256gcm16-prfsha256-x25519-ecp256"
    settings = {"kexes": (KexMethod.ECP_256,), "cookie_total": 0}
    with scene.charon.running(connection(proposals=groups)), scene.driver(ours(), **settings) as us:
        running = scene.charon.initiate("net")
        us.run(lambda: running.poll() is not None)
        running.communicate()
        assert_up(us, scene.charon)
        assert "it requested ECP_256" in scene.charon.log
        assert "COOKIE" in scene.charon.log


@pytest.mark.parametrize("who", ["we", "charon"])
def test_messages_in_pieces_both_ways(scene: Scene, who: str) -> None:
    give_certificate(scene.charon, "rsa")
    options(scene.charon, fragment_size="576")
    long = ours("rsa", padding_certificates=2)
    with scene.charon.running(connection(fragmentation="yes")), scene.driver(long, fragment_bytes=576) as us:
        lost = []
        us.lose = lambda data: data[16] == 53 and data[33] == 2 and not lost and not lost.append(data)
        if who == "we":
            establish(us, long)
        else:
            running = scene.charon.initiate("net")
            us.run(lambda: running.poll() is not None)
            running.communicate()
        assert_up(us, scene.charon)
        assert lost
        assert "splitting IKE message" in scene.charon.log
        assert "reassembled fragmented IKE message" in scene.charon.log


@pytest.mark.parametrize("who", ["we", "charon"])
def test_each_side_can_end_it(scene: Scene, who: str) -> None:
    give_certificate(scene.charon)
    with scene.charon.running(connection()), scene.driver(ours()) as us:
        sa = establish(us, ours())
        if who == "we":
            us.execute(us.ike.close(sa, us.now, "enough"))
            us.run(lambda: bool(us.events(SaClosed)))
            assert "received DELETE for IKE_SA" in scene.charon.log
        else:
            running = scene.charon.terminate("us")
            us.run(lambda: running.poll() is not None)
            assert "terminate completed successfully" in running.communicate()[0]
            assert us.events(SaClosed)[0].reason == "the peer closed it"
        assert "ESTABLISHED" not in scene.charon.sas()


def test_both_sides_answer_liveness_checks(scene: Scene) -> None:
    give_certificate(scene.charon)
    with scene.charon.running(connection(dpd_delay="1s")), scene.driver(ours()) as us:
        sa = establish(us, ours())
        us.execute(us.ike.probe(sa, us.now))
        us.run(lambda: bool(us.events(Liveness)))
        us.run(lambda: scene.charon.log.count("sending DPD request") >= 2)
        us.run(lambda: "parsed INFORMATIONAL response 1" in scene.charon.log)
        assert_up(us, scene.charon)


def test_we_move_and_charon_follows(scene: Scene) -> None:
    give_certificate(scene.charon)
    with scene.charon.running(connection(mobike="yes")), scene.driver(ours()) as us:
        sa = establish(us, ours())
        assert us.ike.view(sa).mobike
        us.execute(us.ike.move(sa, us.path(THEIRS, OURS_TOO), us.now))
        us.run(lambda: bool(us.events(SaMoved) or us.events(MoveFailed)))
        assert us.ike.view(sa).path == us.path(THEIRS, OURS_TOO)
        assert f"remote endpoint changed from {OURS}[4500] to {OURS_TOO}[4500]" in scene.charon.log
        # libipsec cannot move a Child SA, so charon replaces it: with a fresh IKE SA, as we make no second child.
        us.run(lambda: f"{OURS_TOO}[4500]" in scene.charon.sas() and "INSTALLED" in scene.charon.sas())


def test_charon_moves_and_we_follow_after_a_cookie2_round_trip(scene: Scene) -> None:
    give_certificate(scene.charon)
    node = scene.charon.node
    elsewhere = "203.0.113.77"
    scene.lab.internet.ip(f"route add {elsewhere}/32 dev to-charon")
    node.ip(f"addr add {elsewhere}/32 dev wan")
    conf = connection(mobike="yes", local_addrs=f"{THEIRS},{elsewhere}")
    with scene.charon.running(conf), scene.driver(ours()) as us:
        running = scene.charon.initiate("net")
        us.run(lambda: running.poll() is not None)
        running.communicate()
        (up,) = us.events(SaEstablished)
        node.ip(f"addr del {up.path.remote.host}/32 dev wan")
        us.run(lambda: bool(us.events(SaMoved)), 40)
        moved = us.events(SaMoved)[0].path
        assert moved.remote.host == ({THEIRS, elsewhere} - {up.path.remote.host}).pop()
        assert "COOKIE2" in scene.charon.log


@pytest.mark.parametrize("who", ["we", "charon"])
def test_an_untrusted_charon_gets_nothing(scene: Scene, who: str) -> None:
    give_certificate(scene.charon, root=Authority("elsewhere"))
    own = ours()
    with scene.charon.running(connection()), scene.driver(own) as us:
        if who == "we":
            us.initiate(request(us, own))
            us.run(lambda: bool(us.events(SaFailed)))
            us.run(
                lambda: "received AUTHENTICATION_FAILED notify" in scene.charon.log or "AUTH_FAILED" in scene.charon.log
            )
        else:
            running = scene.charon.initiate("net")
            us.run(lambda: running.poll() is not None)
            running.communicate()
            assert us.events(Refused)
            assert "received AUTHENTICATION_FAILED notify error" in scene.charon.log
        assert not us.events(SaEstablished)
        assert not us.events(InstallChild)


def test_charon_that_does_not_trust_us_says_so(scene: Scene) -> None:
    give_certificate(scene.charon)
    stranger = credential(Authority("elsewhere"), "us.test", blocks=BLOCKS, local=(OUR_NET,), trusts=ROOT)
    with scene.charon.running(connection()), scene.driver(stranger) as us:
        us.initiate(request(us, stranger))
        us.run(lambda: bool(us.events(SaFailed)))
        assert us.events(SaFailed)[0].reason == "the responder says AUTHENTICATION_FAILED"


def test_charon_wants_more_than_its_identity_holds_and_is_narrowed(scene: Scene) -> None:
    give_certificate(scene.charon)
    greedy = {"net": {"local_ts": "10.0.0.0/8", "remote_ts": "10.0.0.0/8", "esp_proposals": "aes256gcm16"}}
    with scene.charon.running(connection(children=greedy)), scene.driver(ours()) as us:
        running = scene.charon.initiate("net")
        us.run(lambda: running.poll() is not None)
        running.communicate()
        assert_up(us, scene.charon)
        assert f"{THEIR_NET}" in scene.charon.sas()
