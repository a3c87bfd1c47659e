"""strongSwan on the same kernel's IPsec: its charon with kernel-netlink, our IKE and our kernel plane, both roles."""

from __future__ import annotations

import re

import pytest

from p2pvpn.host import planes
from p2pvpn.lab import uml
from tests.ike.people import credential
from tests.ike.test_stranger import BLOCKS, OUR_NET, OURS, ROOT, THEIR_NET, THEIRS, connection, give_certificate
from tests.strangers.charon import PLUGINS, Charon
from tests.strangers.gateway import Gateway
from tests.strangers.test_charon_ping import OUR_INNER, THEIR_INNER, assert_pings_both_ways

pytestmark = [pytest.mark.stranger, pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(120)]
KERNEL_ONLY = PLUGINS.replace("kernel-libipsec ", "")

if uml.is_inside():

    @pytest.fixture
    def ends(lab, tmp_path):
        """Their daemon, not yet running, and our gateway."""
        us, them = lab.public("us", OURS), lab.public("charon", THEIRS)
        them.ip(f"addr add {THEIR_INNER}/32 dev lo")
        charon = Charon(them, tmp_path, plugins=KERNEL_ONLY, retransmit_timeout="2", retransmit_tries="3")
        give_certificate(charon)
        ours = credential(ROOT, "us.test", "ecdsa", blocks=BLOCKS, local=(OUR_NET,))
        gateway = Gateway(us, ours, OUR_INNER, [THEIR_NET], planes.Choice("kernel"))
        gateway.wait_for("ready")
        yield charon, gateway
        charon.stop()
        gateway.close()

    def packets(node):
        """What the kernel counted on each SA of a host, by SPI."""
        text = node.run(["ip", "-s", "xfrm", "state"]).stdout
        counts = re.findall(
            r"spi (0x[0-9a-f]{8}).*?lifetime current:\s+\d+\(bytes\), (\d+)\(packets\)", text, re.DOTALL
        )
        return {spi: int(number) for spi, number in counts}

    def assert_counted(charon, gateway):
        """Both kernels have the same two SAs, and counted every packet of the pings on them."""
        ours, theirs = packets(gateway.node), packets(charon.node)
        assert len(ours) == 2
        assert ours.keys() == theirs.keys()
        for spi, number in ours.items():
            assert number == theirs[spi] >= 8
        state = gateway.node.run(["ip", "xfrm", "state"]).stdout
        assert state.count("encap type espinudp sport 4500 dport 4500") == 2
        assert state.count("reqid 1000000001 mode tunnel") == 2

    @pytest.mark.parametrize("esp", ["aes256gcm16", "chacha20poly1305"])
    def test_we_begin_and_ping_by_two_kernels(ends, esp):
        charon, gateway = ends
        with charon.running(connection(esp=esp)):
            gateway.initiate(THEIRS)
            gateway.wait_for("SaEstablished")
            assert_pings_both_ways(charon, gateway)
            assert_counted(charon, gateway)
            assert "TUNNEL-in-UDP" in charon.sas()

    def test_charon_begins_and_pings_by_two_kernels(ends):
        charon, gateway = ends
        with charon.running(connection()):
            swanctl = charon.initiate("net")
            gateway.wait_for("SaEstablished")
            assert "completed successfully" in swanctl.communicate(timeout=20)[0]
            assert_pings_both_ways(charon, gateway)
            assert_counted(charon, gateway)
