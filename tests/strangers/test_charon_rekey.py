"""Rekeying with strongSwan, begun by either side, under a ping through both user planes: no packet is lost.

And what else of IKEv2 Debian's build can do: leases, postquantum preshared keys, redirection, childless SAs.
"""

from __future__ import annotations

import ipaddress
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pvpn.core.address import Endpoint
from p2pvpn.core.child import EspSuite
from p2pvpn.core.secret import Secret
from p2pvpn.crypto.kex import KexMethod
from p2pvpn.ike.lease import Lease
from p2pvpn.ike.outputs import ChildAdded, ChildRekeyed, SaClosed, SaEstablished, SaRekeyed
from p2pvpn.lab.net import Lab
from tests.ike.driver import PORT
from tests.ike.people import credential
from tests.ike.test_stranger import (
    BLOCKS,
    OUR_NET,
    OURS,
    OURS_TOO,
    ROOT,
    THEIR_NET,
    THEIRS,
    Scene,
    connection,
    establish,
    give_certificate,
    ours,
    request,
)
from tests.ike.world import selectors

from .charon import Charon, block
from .gateway import Gateway

pytestmark = [pytest.mark.stranger, pytest.mark.netns]

EVERYTHING = tuple(EspSuite)
OUR_INNER, THEIR_INNER = "10.201.0.1", "10.202.0.1"


@pytest.fixture
def scene(lab: Lab, tmp_path: Path) -> Iterator[Scene]:
    lab.public("us", OURS, OURS_TOO)
    node = lab.public("charon", THEIRS)
    node.ip("addr add 10.202.0.1/32 dev lo")
    charon = Charon(node, tmp_path, retransmit_timeout="1", retransmit_tries="3")
    give_certificate(charon)
    yield Scene(lab, charon, tmp_path)
    charon.stop()


def command(charon: Charon, *words: str) -> None:
    """swanctl(8); it does not wait for what it starts."""
    charon.control(*words)


def assert_mated(us, charon: Charon, sa: int) -> None:
    (child_id,) = us.ike.view(sa).child_ids
    child = us.ike._by_id[sa].children.get(child_id)
    listing = charon.sas()
    assert f"in  {child.spi_out:08x}" in listing
    assert f"out {child.spi_in:08x}" in listing
    assert us.ike.view(sa).spi_i.hex() in listing


@pytest.mark.parametrize("esp", ["aes256gcm16", "aes256gcm16-x25519", "aes256gcm16-ecp384"])
@pytest.mark.parametrize("who", ["we", "charon"])
def test_a_child_sa_is_rekeyed(scene: Scene, esp: str, who: str) -> None:
    """Without and with a key exchange of its own, and with another group than our first."""
    with scene.charon.running(connection(esp=esp)), scene.driver(ours()) as us:
        sa = establish(us, ours())
        (old,) = us.ike.view(sa).child_ids
        if who == "we":
            us.execute(us.ike.rekey_child(sa, old, us.now))
        else:
            command(scene.charon, "--rekey", "--child", "net")
        us.run(lambda: bool(us.events(ChildRekeyed)))
        us.run(lambda: us.ike._by_id[sa].requests.is_idle)
        (told,) = us.events(ChildRekeyed)
        assert told.old_id == old
        us.run(lambda: "CHILD_SA closed" in scene.charon.log or scene.charon.sas().count("INSTALLED") == 1)
        assert_mated(us, scene.charon, sa)


@pytest.mark.parametrize("who", ["we", "charon"])
@pytest.mark.parametrize("proposals", ["aes256gcm16-prfsha384-x25519", "aes256-sha256-prfsha256-modp2048"])
def test_the_ike_sa_is_rekeyed(scene: Scene, who: str, proposals: str) -> None:
    with scene.charon.running(connection(proposals=proposals)), scene.driver(ours(), ciphers=EVERYTHING) as us:
        sa = establish(us, ours())
        if who == "we":
            us.execute(us.ike.rekey(sa, us.now))
        else:
            command(scene.charon, "--rekey", "--ike", "us")
        us.run(lambda: bool(us.events(SaRekeyed)))
        us.run(lambda: us.ike._by_id[sa].requests.is_idle and len(us.ike._by_id) == 1, 20)
        assert_mated(us, scene.charon, sa)
        # The new one works: a Child SA is rekeyed in it by the side that did not begin.
        (old,) = us.ike.view(sa).child_ids
        if who == "we":
            command(scene.charon, "--rekey", "--child", "net")
        else:
            us.execute(us.ike.rekey_child(sa, old, us.now))
        us.run(lambda: bool(us.events(ChildRekeyed)))
        us.run(lambda: us.ike._by_id[sa].requests.is_idle)
        assert_mated(us, scene.charon, sa)


@pytest.mark.parametrize(
    ("ike", "group"),
    [
        ("aes256-sha256-prfsha256-modp2048", KexMethod.MODP_2048),
        ("aes256-sha384-prfsha384-modp3072", KexMethod.MODP_3072),
        ("aes128-sha256-prfsha256-modp4096", KexMethod.MODP_4096),
        ("aes256-sha512-prfsha512-ecp521", KexMethod.ECP_521),
    ],
)
@pytest.mark.parametrize("who", ["we", "charon"])
def test_the_algorithms_of_built_in_clients(scene: Scene, ike: str, group: KexMethod, who: str) -> None:
    with scene.charon.running(connection(proposals=ike)), scene.driver(ours(), ciphers=EVERYTHING) as us:
        if who == "we":
            sa = establish(us, ours())
        else:
            running = scene.charon.initiate("net")
            us.run(lambda: running.poll() is not None)
            assert "initiate completed successfully" in running.communicate()[0]
            (sa,) = us.ike.sa_ids()
        assert us.ike.view(sa).suite.startswith("AES_CBC_")
        assert us.ike.view(sa).suite.endswith(group.name)
        assert_mated(us, scene.charon, sa)


@pytest.fixture
def gateway(scene: Scene) -> Iterator[Gateway]:
    node = next(one for one in scene.lab.nodes if one.name == "us")
    mine = credential(ROOT, "us.test", "ecdsa", blocks=BLOCKS, local=(OUR_NET,))
    gateway = Gateway(node, mine, OUR_INNER, [THEIR_NET])
    gateway.wait_for("ready")
    yield gateway
    gateway.close()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("who", ["we", "charon"])
def test_no_ping_is_lost_while_child_and_ike_sa_are_rekeyed(scene: Scene, gateway: Gateway, who: str) -> None:
    with scene.charon.running(connection()):
        gateway.initiate(THEIRS)
        gateway.wait_for("SaEstablished")
        assert len(gateway.node.ping(THEIR_INNER, count=2)) == 2
        ping = gateway.node.popen(
            ["ping", "-n", "-i", "0.01", "-w", "6", THEIR_INNER], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for what in ("child", "ike"):
            time.sleep(1.5)
            if who == "we":
                gateway.rekey(what)
            else:
                command(scene.charon, "--rekey", f"--{what}", "net" if what == "child" else "us")
            gateway.wait_for("ChildRekeyed" if what == "child" else "SaRekeyed")
        text = ping.communicate()[0]
        sent, received = (int(text.split(f" {word}")[0].split()[-1]) for word in ("packets transmitted", "received"))
        assert sent > 100
        assert received == sent, text[-300:]


def test_charon_as_a_client_gets_an_address(scene: Scene) -> None:
    lease = Lease((ipaddress.ip_address("10.9.0.7"),), (ipaddress.ip_address("10.201.0.53"),))
    children = {"net": {"local_ts": "dynamic", "remote_ts": OUR_NET, "esp_proposals": "aes256gcm16"}}
    mine = ours(lease=lambda remote: lease)
    with scene.charon.running(connection(vips="0.0.0.0", children=children)), scene.driver(mine) as us:
        running = scene.charon.initiate("net")
        us.run(lambda: running.poll() is not None)
        assert "initiate completed successfully" in running.communicate()[0]
        assert "installing new virtual IP 10.9.0.7" in scene.charon.log
        assert us.events(SaEstablished)[0].lease == lease
        assert "10.9.0.7/32" in scene.charon.sas()


def test_charon_mixes_a_postquantum_preshared_key(scene: Scene) -> None:
    secret = "0x" + "5a" * 32
    conf = connection(ppk_id="quantum", ppk_required="yes")
    conf += block("secrets", {"ppk": {"id": "quantum", "secret": secret}}) + "\n"
    mine = ours(ppk=(b"quantum", Secret(b"\x5a" * 32)), ppk_required=True)
    with scene.charon.running(conf), scene.driver(mine) as us:
        sa = establish(us, mine)
        assert us.ike._by_id[sa].peer.ppk_used
        us.execute(us.ike.rekey(sa, us.now))
        us.run(lambda: bool(us.events(SaRekeyed)))
        us.execute(us.ike.close(sa, us.now, "again, the other way round"))
        us.run(lambda: bool(us.events(SaClosed)))
        running = scene.charon.initiate("net")
        us.run(lambda: running.poll() is not None)
        assert "initiate completed successfully" in running.communicate()[0]


def test_charon_follows_where_we_send_it(scene: Scene) -> None:
    """RFC 5685: it begins anew at port 500 of our other address, and goes on at 4500."""
    target = ipaddress.ip_address(OURS_TOO)

    def redirect(path):
        return target if path.local.host == OURS else None

    with scene.charon.running(connection()), scene.driver(ours(), redirect=redirect) as us:
        running = scene.charon.initiate("net")
        us.run(lambda: bool(us.events(SaEstablished)))
        us.run(lambda: running.poll() is not None, 30)
        running.communicate()
        assert f"to {OURS_TOO}[500]" in scene.charon.log
        assert f"redirected to {OURS_TOO}" in scene.charon.log
        (up,) = us.events(SaEstablished)
        assert up.path.local == Endpoint(OURS_TOO, PORT)
        assert_mated(us, scene.charon, up.sa)


@pytest.mark.parametrize("who", ["we", "charon"])
def test_childless(scene: Scene, who: str) -> None:
    with scene.charon.running(connection(childless="force")), scene.driver(ours()) as us:
        if who == "we":
            sa = us.initiate(request(us, ours(), childless=True))
            us.run(lambda: bool(us.events(SaEstablished)))
            us.execute(us.ike.add_child(sa, selectors(OUR_NET), selectors(THEIR_NET), us.now))
            us.run(lambda: bool(us.events(ChildAdded)))
        else:
            running = scene.charon.initiate("net")
            us.run(lambda: running.poll() is not None)
            assert "initiate completed successfully" in running.communicate()[0]
            (sa,) = us.ike.sa_ids()
        assert_mated(us, scene.charon, sa)
