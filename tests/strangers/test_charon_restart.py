"""Either side dies without a word, under a ping: the other one notices, and a new start brings the traffic back."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pvpn.ike.config import IkeSettings
from p2pvpn.lab.net import Lab
from tests.ike.test_stranger import OURS, THEIRS, connection, give_certificate

from .charon import Charon
from .gateway import Gateway
from .test_charon_ping import THEIR_INNER, assert_pings_both_ways, gateway_on

pytestmark = [pytest.mark.stranger, pytest.mark.netns]

IMPATIENT = IkeSettings(liveness_s=1.0, tries=3)
"""Asks after a second of silence and gives up 2.6 s later."""


@pytest.fixture
def charon(lab: Lab, tmp_path: Path) -> Iterator[Charon]:
    lab.public("us", OURS)
    node = lab.public("charon", THEIRS)
    node.ip(f"addr add {THEIR_INNER}/32 dev lo")
    charon = Charon(node, tmp_path, retransmit_timeout="1", retransmit_tries="2", retransmit_base="1")
    give_certificate(charon)
    yield charon
    charon.stop()


def answers_end(gateway: Gateway) -> bool:
    """Whether a ping that runs for two seconds is answered at its end, once the tunnel is (back) up."""
    argv = ["ping", "-n", "-i", "0.1", "-w", "2", THEIR_INNER]
    text = gateway.node.popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT).communicate()[0]
    return "bytes from" in text


def test_charon_comes_back_and_its_initial_contact_ends_what_it_forgot(lab: Lab, charon: Charon) -> None:
    conf = connection()
    with gateway_on(lab) as gateway, charon.running(conf):
        gateway.initiate(THEIRS)
        gateway.wait_for("SaEstablished")
        assert answers_end(gateway)
        charon.kill()
        assert not answers_end(gateway)
        charon.start(conf)
        swanctl = charon.initiate("net")
        assert "began anew" in gateway.wait_for("SaClosed")
        assert "completed successfully" in swanctl.communicate(timeout=20)[0]
        assert_pings_both_ways(charon, gateway)


def test_we_come_back_and_charon_forgets_what_we_forgot(lab: Lab, charon: Charon) -> None:
    with charon.running(connection()):
        with gateway_on(lab, ends_by=signal.SIGKILL) as gateway:
            gateway.initiate(THEIRS)
            gateway.wait_for("SaEstablished")
            assert answers_end(gateway)
        with gateway_on(lab, initial_contact=True) as gateway:
            gateway.initiate(THEIRS)
            gateway.wait_for("SaEstablished")
            assert "received INITIAL_CONTACT" in charon.log
            assert charon.sas().count("ESTABLISHED") == 1
            assert_pings_both_ways(charon, gateway)


def test_we_notice_that_charon_is_gone(lab: Lab, charon: Charon) -> None:
    with gateway_on(lab, settings=IMPATIENT) as gateway, charon.running(connection()):
        gateway.initiate(THEIRS)
        gateway.wait_for("SaEstablished")
        gateway.wait_for("Liveness")
        began = time.monotonic()
        charon.kill()
        gateway.wait_for("SaClosed", 10)
        assert time.monotonic() - began < 8


def test_charon_notices_that_we_are_gone(lab: Lab, charon: Charon) -> None:
    with charon.running(connection(dpd_delay="1s")):
        with gateway_on(lab, ends_by=signal.SIGKILL) as gateway:
            gateway.initiate(THEIRS)
            gateway.wait_for("SaEstablished")
        deadline = time.monotonic() + 10
        while "ESTABLISHED" in charon.sas():
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert "giving up after 2 retransmits" in charon.log
