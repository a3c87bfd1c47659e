"""tshark reads our exchanges: no malformed mark, and everything decrypted with our key log."""

from __future__ import annotations

import itertools
import json
import struct
import subprocess
from pathlib import Path

import pytest

from p2pvpn.core.child import EspSuite
from p2pvpn.core.datagram import NON_ESP_MARKER
from p2pvpn.crypto.kex import KexMethod
from p2pvpn.esp.cbc import CbcSealer
from p2pvpn.esp.packet import NEXT_IPV6, Sealer
from p2pvpn.ike.keylog import ESP_TABLE, IKE_TABLE
from p2pvpn.ike.notifies import Notify
from tests.ike.schedules import CREDENTIALS
from tests.ike.world import World, selectors

pytestmark = pytest.mark.stranger

KEM = ((KexMethod.ML_KEM_768,),)
LINKTYPE_RAW = 101


def datagram(path, payload: bytes) -> bytes:
    """An IPv4 packet; checksums are left out, and tshark does not ask for them."""
    udp = struct.pack("!4H", path.local.port, path.remote.port, 8 + len(payload), 0) + payload
    head = struct.pack("!2B3H2BH", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0)
    return head + path.local.ip.packed + path.remote.ip.packed + udp


def capture(file: Path, packets: list[bytes]) -> None:
    """A pcap file, a packet each millisecond."""
    with file.open("wb") as out:
        out.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, LINKTYPE_RAW))
        for number, packet in enumerate(packets):
            out.write(struct.pack("<IIII", number // 1000, number % 1000 * 1000, len(packet), len(packet)) + packet)


def read(file: Path, key_log: list[tuple[str, str]], home: Path) -> list[dict]:
    """What tshark makes of it."""
    profile = home / "wireshark"
    profile.mkdir(exist_ok=True)
    for table in (IKE_TABLE, ESP_TABLE):
        lines = [line for name, line in key_log if name == table]
        (profile / table).write_text("".join(f"{line}\n" for line in dict.fromkeys(lines)))
    return dissected(file, home)


def dissected(file: Path, home: Path) -> list[dict]:
    """What tshark makes of it with the tables in the profile `wireshark` below `home`."""
    options = ["-o", "esp.enable_encryption_decode:TRUE", "-o", "esp.enable_null_encryption_decode_heuristic:FALSE"]
    done = subprocess.run(
        ["tshark", "-r", str(file), *options, "-T", "json"],
        capture_output=True,
        check=True,
        text=True,
        timeout=50,
        env={"XDG_CONFIG_HOME": str(home), "HOME": str(home), "PATH": "/usr/bin:/bin"},
    )
    # Repeated keys are what a message with several payloads has: keep them all.
    pairs = json.loads(done.stdout, object_pairs_hook=lambda found: found)
    return [dict(one) for one in pairs]


def flat(node) -> list[tuple[str, object]]:
    """Every (name, value) of a dissection."""
    out = []
    for name, value in node if isinstance(node, list) and node and isinstance(node[0], tuple) else ():
        out.append((name, value))
        out += flat(value)
    return out


def cbc(suite: EspSuite, **more):
    """Settings for one of the ciphers of built-in clients, in IKE and ESP."""
    return {"ciphers": (suite,), "esp_suites": (suite,), **more}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"additional_kexes": KEM, "child_additional_kexes": KEM},
        cbc(EspSuite.AES_CBC_256_HMAC_SHA2_256),
        cbc(EspSuite.AES_CBC_128_HMAC_SHA2_256, kexes=(KexMethod.MODP_2048,)),
        cbc(EspSuite.AES_CBC_256_HMAC_SHA2_512, kexes=(KexMethod.ECP_521,)),
        {"ciphers": (EspSuite.AES_GCM_16_128,), "esp_suites": (EspSuite.AES_GCM_16_128,), "fragment_bytes": 400},
    ],
    ids=["default", "several key exchanges", "cbc sha256", "modp2048", "sha512 ecp521", "fragments"],
)
def test_every_exchange_is_dissected_and_decrypted(tmp_path: Path, settings) -> None:
    world = World(7)
    alice = world.host("alice", "192.0.2.1", CREDENTIALS["alice"], **settings)
    bob = world.host("bob", "192.0.2.2", CREDENTIALS["bob"], **settings, cookie_total=0)
    alice.initiate(bob, local=selectors("fd00::a/128"), remote=selectors("fd00::b/128"))
    world.run(1)
    alice.do("inform", 1, [Notify(40961, b"hello")], world.now)
    world.run(1)
    alice.do("rekey_child", 1, alice.ike.view(1).child_ids[0], world.now)
    world.run(10)
    alice.do("rekey", 1, world.now)
    world.run(40)
    alice.do("move", 1, alice.ike.view(1).path, world.now)
    world.run(1)
    packets = [datagram(path, NON_ESP_MARKER + data) for path, data in world.wire]
    inner = bytes.fromhex("6000000000083a40") + bytes.fromhex("fd" + "00" * 14 + "0a" + "fd" + "00" * 14 + "0b")
    inner += bytes.fromhex("8000000000010001")
    for host, child in itertools.product((alice, bob), (0,)):
        one = list(host.installed.values())[child]
        kind = Sealer if one.suite.is_combined else CbcSealer
        sealer = kind(one.suite, one.key_out.reveal(), one.spi_out, esn=False)
        packets += [datagram(one.path, sealer.seal(number, inner, NEXT_IPV6)) for number in (1, 2)]
    alice.do("close", 1, world.now, "enough")
    world.run(1)
    packets += [datagram(path, NON_ESP_MARKER + data) for path, data in world.wire[len(packets) - 4 :]]
    capture(tmp_path / "ours.pcap", packets)
    frames = read(tmp_path / "ours.pcap", alice.key_log, tmp_path)
    assert len(frames) == len(packets)
    # Wireshark has one set of keys for a pair of SPIs: IKE_INTERMEDIATE is read with those that the log comments out.
    first = [(table, line.partition(": ")[2]) for table, line in alice.key_log if line.startswith("#")]
    early = read(tmp_path / "ours.pcap", first, tmp_path)
    frames = [
        other if dict(flat(other["_source"])).get("isakmp.exchangetype") == "43" else frame
        for frame, other in zip(frames, early, strict=True)
    ]
    esp = 0
    for frame in frames:
        layers = dict(dict(frame["_source"])["layers"])
        fields = flat(frame["_source"])
        names = [name for name, _ in fields]
        assert "_ws.malformed" not in names, fields
        assert not any("malformed" in str(value).lower() for _, value in fields)
        exchange = int(dict(fields).get("isakmp.exchangetype", 0))
        assert ("isakmp" in layers) or ("esp" in layers)
        if "esp" in layers:
            esp += 1
            assert "icmpv6" in layers, "the inner packet is readable"
        elif exchange != 34 and "isakmp.frag.number" not in names:
            assert "isakmp.enc.decrypted" in names, (exchange, names)
    assert esp == 4
