"""A ping through our user plane to strongSwan's, after a handshake that either of us began."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from p2pvpn.core.child import CBC_SUITES
from p2pvpn.ike.config import IkeSettings
from p2pvpn.lab.net import Lab
from tests.ike.people import credential
from tests.ike.test_stranger import BLOCKS, OUR_NET, OURS, ROOT, THEIR_NET, THEIRS, connection, give_certificate

from .charon import Charon
from .gateway import Gateway

pytestmark = [pytest.mark.stranger, pytest.mark.netns]

OUR_INNER, THEIR_INNER = "10.201.0.1", "10.202.0.1"


@pytest.fixture
def charon(lab: Lab, tmp_path: Path) -> Iterator[Charon]:
    lab.public("us", OURS)
    node = lab.public("charon", THEIRS)
    node.ip(f"addr add {THEIR_INNER}/32 dev lo")
    charon = Charon(node, tmp_path, retransmit_timeout="1", retransmit_tries="3")
    give_certificate(charon)
    yield charon
    charon.stop()


@contextlib.contextmanager
def gateway_on(lab: Lab, *, ends_by: signal.Signals = signal.SIGTERM, **options: Any) -> Iterator[Gateway]:
    """Our side, ready, and how it ends."""
    node = next(one for one in lab.nodes if one.name == "us")
    ours = credential(ROOT, "us.test", "ecdsa", blocks=BLOCKS, local=(OUR_NET,))
    gateway = Gateway(node, ours, OUR_INNER, [THEIR_NET], **options)
    gateway.wait_for("ready")
    yield gateway
    gateway.close(ends_by)


@pytest.fixture
def gateway(lab: Lab, charon: Charon) -> Iterator[Gateway]:
    with gateway_on(lab) as gateway:
        yield gateway


def assert_pings_both_ways(charon: Charon, gateway: Gateway) -> None:
    for node, target in ((gateway.node, THEIR_INNER), (charon.node, OUR_INNER)):
        assert len(node.ping(target, count=3)) == 3
        large = ["ping", "-n", "-c", "1", "-W", "3", "-s", "1200", target]
        assert node.run(large, check=False).returncode == 0


def test_we_begin_and_ping(charon: Charon, gateway: Gateway) -> None:
    with charon.running(connection()):
        gateway.initiate(THEIRS)
        gateway.wait_for("SaEstablished")
        assert_pings_both_ways(charon, gateway)


def test_charon_begins_and_pings(charon: Charon, gateway: Gateway) -> None:
    with charon.running(connection()):
        swanctl = charon.initiate("net")
        gateway.wait_for("SaEstablished")
        assert "completed successfully" in swanctl.communicate(timeout=20)[0]
        assert_pings_both_ways(charon, gateway)


def test_chacha20_is_understood_by_both(charon: Charon, gateway: Gateway) -> None:
    with charon.running(connection(esp="chacha20poly1305")):
        gateway.initiate(THEIRS)
        gateway.wait_for("SaEstablished")
        assert_pings_both_ways(charon, gateway)


@pytest.mark.parametrize("esp", ["aes256-sha512", "aes128-sha256"])
def test_a_client_with_cbc_and_hmac_begins_and_pings(charon: Charon, gateway: Gateway, esp: str) -> None:
    ike = "aes256-sha256-prfsha256-modp2048"
    with charon.running(connection(proposals=ike, esp=esp)):
        swanctl = charon.initiate("net")
        gateway.wait_for("SaEstablished")
        assert "completed successfully" in swanctl.communicate(timeout=20)[0]
        assert_pings_both_ways(charon, gateway)
        gateway.rekey("child")  # we never offer such ciphers, but for what has them already
        gateway.wait_for("ChildRekeyed")
        assert_pings_both_ways(charon, gateway)


def test_we_begin_with_cbc_and_hmac_and_ping(lab: Lab, charon: Charon) -> None:
    settings = IkeSettings(ciphers=CBC_SUITES, esp_suites=CBC_SUITES)
    running = charon.running(connection(proposals="aes256-sha384-x25519", esp="aes256-sha256"))
    with gateway_on(lab, settings=settings) as gateway, running:
        gateway.initiate(THEIRS)
        gateway.wait_for("SaEstablished")
        assert_pings_both_ways(charon, gateway)
