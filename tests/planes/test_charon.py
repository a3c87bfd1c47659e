"""strongSwan on the same kernel's IPsec: its charon with kernel-netlink, our IKE and our kernel plane, both roles."""

from __future__ import annotations

import contextlib
import re
import subprocess
import time

import pytest

from p2pvpn.core.selector import Selector
from p2pvpn.host import planes
from p2pvpn.ike.config import IkeSettings
from p2pvpn.lab import uml
from tests.ike.people import credential
from tests.ike.test_stranger import (
    BLOCKS,
    OUR_NET,
    OURS,
    OURS_TOO,
    ROOT,
    THEIR_NET,
    THEIRS,
    connection,
    give_certificate,
)
from tests.strangers.charon import PLUGINS, Charon
from tests.strangers.gateway import Gateway
from tests.strangers.test_charon_ping import OUR_INNER, THEIR_INNER, assert_pings_both_ways

pytestmark = [pytest.mark.stranger, pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(120)]
CHANGE_S = 1.0
"""A guest without a core of its own, Python and charon, to the last message to the kernel."""
KERNEL_ONLY = PLUGINS.replace("kernel-libipsec ", "")

if uml.is_inside():

    @pytest.fixture
    def hosts(lab, tmp_path):
        """Our host, and their daemon, not yet running."""
        us, them = lab.public("us", OURS, OURS_TOO), lab.public("charon", THEIRS)
        them.ip(f"addr add {THEIR_INNER}/32 dev lo")
        charon = Charon(them, tmp_path, plugins=KERNEL_ONLY, retransmit_timeout="2", retransmit_tries="3")
        give_certificate(charon)
        yield us, charon
        charon.stop()

    @contextlib.contextmanager
    def gateway_on(us, *, plane="kernel", **options):
        """Our gateway, ready."""
        ours = credential(ROOT, "us.test", "ecdsa", blocks=BLOCKS, local=(OUR_NET,))
        gateway = Gateway(us, ours, OUR_INNER, [THEIR_NET], planes.Choice(plane), **options)
        gateway.wait_for("ready")
        yield gateway
        gateway.close()

    @pytest.fixture
    def ends(hosts):
        """Their daemon, and our gateway."""
        us, charon = hosts
        with gateway_on(us) as gateway:
            yield charon, gateway

    def establish(charon, gateway, who):
        """By whoever begins."""
        if who == "we":
            gateway.initiate(THEIRS)
            gateway.wait_for("SaEstablished")
        else:
            swanctl = charon.initiate("net")
            gateway.wait_for("SaEstablished")
            assert "completed successfully" in swanctl.communicate(timeout=20)[0]

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

    @pytest.mark.parametrize("who", ["we", "charon"])
    @pytest.mark.parametrize("esp", ["aes256gcm16-esn", "aes256-sha256-esn"])
    def test_64_bit_numbers_and_hmac_by_two_kernels(ends, who, esp):
        charon, gateway = ends
        if who == "we" and "sha" in esp:
            return  # we never begin with it
        with charon.running(connection(esp=esp)):
            establish(charon, gateway, who)
            assert_pings_both_ways(charon, gateway)
            for node in (charon.node, gateway.node):
                assert node.run(["ip", "xfrm", "state"]).stdout.count("esn") >= 2

    @pytest.mark.parametrize("who", ["we", "charon"])
    def test_transport_mode_by_two_kernels(hosts, who):
        us, charon = hosts
        hosts_only = {"us.test": (f"{OURS}/32",), "charon.test": (f"{THEIRS}/32",)}
        ours = credential(ROOT, "us.test", "ecdsa", blocks=hosts_only, local=(f"{OURS}/32",))
        wish = {"transport": True, "remote": (Selector.of_address(THEIRS),)}
        gateway = Gateway(
            us, ours, OUR_INNER, [], planes.Choice("kernel"), settings=IkeSettings(transport_mode=True), **wish
        )
        gateway.wait_for("ready")
        children = {"net": {"mode": "transport", "esp_proposals": "aes256gcm16-esn"}}
        with charon.running(connection(children=children)):
            establish(charon, gateway, who)
            assert "TRANSPORT-in-UDP" in charon.sas()
            for node, target in ((us, THEIRS), (charon.node, OURS)):
                assert len(node.ping(target, count=3)) == 3
            counted = packets(us)
            assert counted == packets(charon.node)
            assert all(number >= 6 for number in counted.values())
            assert us.run(["ip", "xfrm", "state"]).stdout.count("mode transport") == 2
            gateway.rekey("child")
            gateway.wait_for("ChildRekeyed")
            assert len(us.ping(THEIRS, count=3)) == 3
        gateway.close()
        assert "mode transport" not in us.run(["ip", "xfrm", "state"]).stdout

    def ping_through(gateway, seconds):
        argv = ["ping", "-n", "-D", "-i", "0.02", "-w", str(seconds), THEIR_INNER]
        return gateway.node.popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def lost_after(ping, moved_at):
        """Pings that never came back, sent later than that and the time that a kernel takes to change its SAs: of each
        when the next one that did came back."""
        rows = re.findall(r"\[([0-9.]+)\] \d+ bytes from .*?icmp_seq=(\d+)", ping.communicate()[0])
        came = {int(number): float(at) for at, number in rows}
        assert max(came.values()) > moved_at + CHANGE_S
        lost = [number for number in range(1, max(came)) if number not in came]
        print(f"{len(lost)} of {max(came)} lost, at {lost}")
        ends = [min(at for other, at in came.items() if other > number) for number in lost]
        return [at for at in ends if at > moved_at + CHANGE_S]

    @pytest.mark.parametrize("plane", ["kernel", "user"])
    def test_no_ping_is_lost_once_our_move_to_another_address_is_known(hosts, plane):
        us, charon = hosts
        with gateway_on(us, plane=plane) as gateway, charon.running(connection(mobike="yes")):
            establish(charon, gateway, "we")
            ping = ping_through(gateway, 6)
            time.sleep(2)
            gateway.move(OURS_TOO)
            gateway.wait_for("SaMoved")
            moved_at = time.time()
            us.ip(f"addr del {OURS}/32 dev wan")
            assert not lost_after(ping, moved_at)
            assert OURS_TOO in charon.sas()

    @pytest.mark.parametrize("plane", ["kernel", "user"])
    def test_no_ping_is_lost_once_the_move_of_charon_is_known(lab, hosts, plane):
        """Its address is taken away: what is lost is lost before the move is known."""
        us, charon = hosts
        elsewhere = "203.0.113.77"
        lab.internet.ip(f"route add {elsewhere}/32 dev to-charon")
        charon.node.ip(f"addr add {elsewhere}/32 dev wan")
        conf = connection(mobike="yes", local_addrs=f"{THEIRS},{elsewhere}")
        with gateway_on(us, plane=plane) as gateway, charon.running(conf):
            establish(charon, gateway, "charon")
            found = THEIRS if f"local  'charon.test' @ {THEIRS}" in charon.sas() else elsewhere
            ping = ping_through(gateway, 14)
            time.sleep(2)
            charon.node.ip(f"addr del {found}/32 dev wan")
            gateway.wait_for("SaMoved")
            moved_at = time.time()
            assert not lost_after(ping, moved_at)

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
