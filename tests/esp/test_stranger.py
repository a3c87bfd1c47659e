"""tshark, which nobody here wrote, decrypts our ESP with nothing but the keys."""

from __future__ import annotations

import struct
import subprocess

import pytest

from p2pvpn.core.child import EspSuite
from p2pvpn.esp.engine import EspEngine

from .packets import ALICE, ALICE6, ALICE_AT, BOB, BOB6, BOB_AT, NETWORK, ipv4, ipv6, pair, ports

pytestmark = pytest.mark.stranger

RAW_IP = 101
"""LINKTYPE_RAW of the pcap format: packets start with the IP header."""


def write_pcap(path, packets) -> None:
    with path.open("wb") as file:
        file.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, RAW_IP))
        for second, packet in enumerate(packets):
            file.write(struct.pack("<IIII", second, 0, len(packet), len(packet)) + packet)


@pytest.mark.parametrize("suite", [EspSuite.AES_GCM_16_256, EspSuite.AES_GCM_16_128])
def test_tshark_reads_our_packets_with_the_keys(suite, tmp_path):
    left, right = pair(suite=suite)
    alice = EspEngine()
    alice.install(left)
    alice.use(left.id)
    inner = [
        ipv4(ALICE, BOB, ports(1111, 2222, struct.pack("!HH", 8 + size, 0) + bytes(size)), tos=0xB8)
        for size in range(4)
    ]
    inner += [ipv6(ALICE6, BOB6, ports(3333, 4444, struct.pack("!HH", 8 + size, 0) + bytes(size))) for size in range(4)]
    outer = []
    for packet in inner:
        esp = alice.outbound(NETWORK, packet, 0.0).datagram
        udp = ports(4500, 4500, struct.pack("!HH", 8 + len(esp), 0) + esp)
        outer.append(ipv4(ALICE_AT.host, BOB_AT.host, udp))
    write_pcap(tmp_path / "esp.pcap", outer)
    keys = [
        "IPv4",
        ALICE_AT.host,
        BOB_AT.host,
        f"{right.spi_in:#010x}",
        "AES-GCM with 16 octet ICV [RFC4106]",
        f"0x{left.key_out.reveal().hex()}",
        "NULL",
        "",
    ]
    fields = ["esp.spi", "esp.sequence", "esp.contained_data", "ip.src", "ipv6.src", "udp.srcport", "udp.dstport"]
    done = subprocess.run(
        [
            "tshark",
            "-n",
            "-r",
            str(tmp_path / "esp.pcap"),
            "-o",
            "esp.enable_encryption_decode:TRUE",
            "-o",
            "uat:esp_sa:" + ",".join(f'"{key}"' for key in keys),
            "-T",
            "fields",
            *(word for field in fields for word in ("-e", field)),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(rows) == len(inner)
    for number, (row, packet) in enumerate(zip(rows, inner, strict=True), start=1):
        spi, sequence, data, v4, v6, source, destination = row
        assert (int(spi, 16), int(sequence)) == (right.spi_in, number)
        assert bytes.fromhex(data) == packet
        if packet[0] >> 4 == 4:
            assert (v4, v6, source, destination) == (f"{ALICE_AT.host},{ALICE}", "", "4500,1111", "4500,2222")
        else:
            assert (v4, v6, source, destination) == (ALICE_AT.host, ALICE6, "4500,3333", "4500,4444")
