"""Sorting of captured frames: ESP counts only if it decrypts, and nothing malformed gets through unseen."""

from __future__ import annotations

import contextlib
import json
import struct
import time
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pvpn.core.child import EspSuite
from p2pvpn.core.errors import WireError
from p2pvpn.crypto.aead import Aead
from p2pvpn.lab import nat
from p2pvpn.lab.capture import Capture, Frame, read_pcap_untrusted, write_pcap
from p2pvpn.lab.net import Lab
from p2pvpn.lab.wire import Class, KeyLog, Packet, Sorter, Wire

SPI = 0xC0000001
KEY = bytes(range(36))
MARK = b"a marker of mine"


def keys(directory: Path, *, esn: bool = False) -> KeyLog:
    entry = {"kind": "esp", "spi": SPI, "suite": "AES_GCM_16_256", "key": KEY.hex(), "esn": esn}
    (directory / "esp-1.jsonl").write_text(json.dumps(entry) + "\n")
    return KeyLog(directory)


def esp(inner: bytes, *, esn: bool = False, number: int = 1) -> bytes:
    """RFC 4303 section 2 with RFC 4106, written from the RFCs."""
    pad = -(len(inner) + 2) % 4
    head, iv = struct.pack("!II", SPI, number), struct.pack("!Q", number)
    aad = struct.pack("!III", SPI, 0, number) if esn else head
    plain = inner + bytes(range(1, pad + 1)) + bytes([pad, 4])
    return head + iv + Aead(EspSuite.AES_GCM_16_256, KEY).seal(iv, plain, aad)


def udp(
    payload: bytes, source: tuple[str, int] = ("192.0.2.1", 4500), to: tuple[str, int] = ("192.0.2.2", 4500)
) -> bytes:
    body = struct.pack("!HHHH", source[1], to[1], 8 + len(payload), 0) + payload
    return ip(17, body, source[0], to[0])


def ip(protocol: int, body: bytes, source: str = "192.0.2.1", to: str = "192.0.2.2", fragment: int = 0) -> bytes:
    ends = ip_address(source).packed + ip_address(to).packed
    if ":" in source:
        return bytes(12) + b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, len(body), protocol, 64) + ends + body
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 7, fragment, 64, protocol, 0)
    return bytes(12) + b"\x08\x00" + head + ends + body


def sort(keylog: KeyLog, *frames: bytes) -> list[Packet | None]:
    sorter = Sorter(keylog, 443)
    return [sorter.sort_untrusted("hop", Frame(0.0, frame)) for frame in frames]


def kind_of(keylog: KeyLog, frame: bytes) -> Class:
    packet = sort(keylog, frame)[0]
    assert packet is not None
    return packet.kind


@pytest.mark.parametrize("esn", [False, True])
def test_esp_counts_only_when_it_decrypts(tmp_path: Path, esn: bool) -> None:
    keylog = keys(tmp_path, esn=esn)
    good = esp(MARK, esn=esn)
    packet = sort(keylog, udp(good))[0]
    assert packet is not None
    assert (packet.kind, packet.inner) == (Class.ESP, MARK)
    assert kind_of(keylog, udp(good[:-1] + bytes([good[-1] ^ 1]))) is Class.OTHER_UDP
    assert kind_of(keylog, udp(b"\xc0\0\0\x02" + good[4:])) is Class.OTHER_UDP
    assert kind_of(KeyLog(tmp_path / "none"), udp(good)) is Class.OTHER_UDP


def test_ike_and_stun_need_headers_that_tell_their_length(tmp_path: Path) -> None:
    keylog = keys(tmp_path)
    ike = bytes(4) + b"i" * 8 + bytes(8) + bytes([33, 0x20, 34, 8]) + struct.pack("!II", 0, 28)
    stun = struct.pack("!HH", 1, 0) + bytes.fromhex("2112a442") + bytes(12)
    assert kind_of(keylog, udp(ike)) is Class.IKE
    assert kind_of(keylog, udp(b"\xff")) is Class.IKE
    assert kind_of(keylog, udp(ike + b"x")) is Class.OTHER_UDP
    assert kind_of(keylog, udp(stun)) is Class.STUN
    assert kind_of(keylog, udp(stun + b"x")) is Class.OTHER_UDP
    assert kind_of(keylog, udp(b"hello")) is Class.OTHER_UDP


def test_the_rest_is_sorted_by_protocol(tmp_path: Path) -> None:
    keylog = keys(tmp_path)
    tcp = struct.pack("!HH", 50000, 443) + bytes(16)
    assert kind_of(keylog, ip(6, tcp)) is Class.ENROL_TCP
    assert kind_of(keylog, ip(6, struct.pack("!HH", 50000, 80) + bytes(16))) is Class.UNEXPECTED
    assert kind_of(keylog, ip(1, bytes(8))) is Class.ARP_ND_ICMP
    assert kind_of(keylog, ip(58, bytes(8), "fe80::1", "ff02::1")) is Class.ARP_ND_ICMP
    assert (
        kind_of(keylog, ip(0, bytes([58, 0, 0, 0, 0, 0, 0, 0]) + bytes(8), "fe80::1", "ff02::16")) is Class.ARP_ND_ICMP
    )
    assert kind_of(keylog, bytes(12) + b"\x08\x06" + bytes(28)) is Class.ARP_ND_ICMP
    assert kind_of(keylog, ip(47, bytes(8))) is Class.UNEXPECTED
    assert kind_of(keylog, bytes(12) + b"\x88\xcc") is Class.UNEXPECTED


def test_fragments_are_one_packet(tmp_path: Path) -> None:
    keylog = keys(tmp_path)
    packet = esp(bytes(3000))
    body = struct.pack("!HHHH", 4500, 4500, 8 + len(packet), 0) + packet
    parts = [ip(17, body[1480:], fragment=185), ip(17, body[:1480], fragment=0x2000)]
    first, second = sort(keylog, *parts)
    assert first is None
    assert second is not None
    assert second.kind is Class.ESP
    six = [
        ip(44, struct.pack("!BBHI", 17, 0, 1, 9) + body[:1480], "2001:db8::1", "2001:db8::2"),
        ip(44, struct.pack("!BBHI", 17, 0, 1480, 9) + body[1480:], "2001:db8::1", "2001:db8::2"),
    ]
    first, second = sort(keylog, *six)
    assert first is None
    assert second is not None
    assert second.kind is Class.ESP


def _wire(tmp_path: Path, *frames: bytes) -> Wire:
    (tmp_path / "keys").mkdir()
    file = tmp_path / "hop.pcap"
    file.write_bytes(write_pcap(Frame(float(at), frame) for at, frame in enumerate(frames)))
    keys(tmp_path / "keys")
    wire = Wire({"hop": file}, tmp_path / "keys", marker=MARK, enrol_port=443)
    wire.finish()
    return wire


def test_the_earliest_packet_between_two_parties_is_found(tmp_path: Path) -> None:
    wire = _wire(
        tmp_path,
        udp(esp(b"1"), ("198.51.100.1", 1), ("192.0.2.1", 2)),
        udp(esp(b"2"), ("203.0.113.1", 1), ("198.51.100.1", 2)),
        udp(esp(b"3"), ("198.51.100.1", 1), ("203.0.113.1", 2)),
    )
    assert [packet.at for packet in wire.between({"198.51.100.1"}, {"203.0.113.1"})] == [1.0, 2.0]
    assert wire.totals() == {**dict.fromkeys((kind.value for kind in Class), 0), "esp": 3}


def test_a_marker_in_clear_is_told_and_a_sealed_one_is_found(tmp_path: Path) -> None:
    wire = _wire(tmp_path, udp(esp(b"x" + MARK)), udp(MARK))
    assert wire.clear == [("hop", 1.0)]
    assert wire.sealed == 1
    assert [packet.kind for packet in wire.unsorted()] == [Class.OTHER_UDP]


@given(st.lists(st.tuples(st.integers(0, 2**31), st.binary(max_size=100)), max_size=5))
def test_pcap_files_read_back_as_written(frames: list[tuple[int, bytes]]) -> None:
    written = [Frame(float(at), data) for at, data in frames]
    assert list(read_pcap_untrusted(write_pcap(written))) == written


@given(st.binary(max_size=200))
def test_nothing_but_wire_errors_escapes_the_pcap_reader(data: bytes) -> None:
    with contextlib.suppress(WireError):
        list(read_pcap_untrusted(write_pcap([]) + data))


SEEDS = st.sampled_from(
    [
        udp(esp(b"x" * 50)),
        udp(bytes(4) + b"i" * 32),
        ip(44, struct.pack("!BBHI", 17, 0, 1480, 9) + bytes(40), "2001:db8::1", "2001:db8::2"),
        ip(0, bytes(16), "fe80::1", "ff02::16"),
        ip(17, bytes(64), fragment=0x2000),
    ]
)


@given(SEEDS, st.binary(max_size=40), st.integers(0, 80), st.integers(0, 120))
def test_nothing_but_wire_errors_escapes_the_sorter(frame: bytes, patch: bytes, at: int, end: int) -> None:
    frame = (frame[:at] + patch + frame[at + len(patch) :])[: max(end, 14)]
    sorter = Sorter(KeyLog(Path("/nonexistent")), 443)
    with contextlib.suppress(WireError):
        sorter.sort_untrusted("hop", Frame(0.0, frame))


def test_fragments_that_never_become_whole_are_told(tmp_path: Path) -> None:
    wire = _wire(tmp_path, ip(17, bytes(64), fragment=0x2000))
    assert [packet.kind for packet in wire.unsorted()] == [Class.UNEXPECTED]


@pytest.mark.netns
def test_every_packet_is_captured_at_every_hop_of_its_way(lab: Lab, tmp_path: Path) -> None:
    hub = lab.public("hub", "192.0.2.1", delay_s=0.005)
    home = lab.home("a", "198.51.100.1", number=1)
    nat.apply(home, nat.NatKind.PORT_RESTRICTED)
    (tmp_path / "keys").mkdir()
    keys(tmp_path / "keys")
    capture = Capture(lab.hops, tmp_path / "pcap")
    with home.peer.socket() as sock, hub.socket() as sink:
        sink.bind(("192.0.2.1", 4500))
        sink.settimeout(2.0)
        for number in range(100):
            sock.sendto(esp(MARK, number=number), ("192.0.2.1", 4500))
        before = time.time()
        for _ in range(100):
            sink.recv(4000)
    wire = Wire(capture.files, tmp_path / "keys", marker=MARK, enrol_port=443)
    deadline = time.monotonic() + 5
    while wire.totals()["esp"] < 300 and time.monotonic() < deadline:
        wire.update()  # while the capture runs
    capture.stop()
    wire.finish()
    assert {hop: counts["esp"] for hop, counts in wire.by_hop().items()} == {
        "hub-internet": 100,
        "nat-a-internet": 100,
        "a-nat-a": 100,
    }
    assert wire.totals()["other_udp"] == wire.totals()["unexpected"] == 0
    assert not wire.clear
    assert wire.sealed == 300
    assert {packet.source.host for packet in wire.packets if packet.hop == "hub-internet" and packet.inner} == {
        "198.51.100.1"
    }
    assert all(abs(packet.at - before) < 5 for packet in wire.packets)
