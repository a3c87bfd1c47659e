"""What is on the wire: every captured frame sorted into one of eight classes, ESP only if it decrypts.

    esp          UDP that decrypts and authenticates under a key of the key log
    ike          UDP with the non-ESP marker and an IKEv2 header of the right length, or an RFC 3948 NAT keepalive
    stun         UDP with a STUN header of the right length
    other_udp    any other UDP, ESP that does not decrypt included
    enrol_tcp    TCP of the hubs' port: enrolments, and the handshakes of all connections
    stream_tcp   TCP of the hubs' port in connections that begin with TLS: IKE and ESP over TCP (RFC 9329)
    arp_nd_icmp  ARP, ICMP, ICMPv6 (with neighbour discovery)
    unexpected   anything else

The key log is a directory (`P2PVPN_KEYLOG`) with files (*.jsonl) of one JSON object a line:
`{"kind": "esp", "spi": int, "suite": "AES_GCM_16_256", "key": hex of key and salt, "esn": bool}`. The code here shares
nothing with `p2pvpn.esp` but the cipher, so that the one checks the other.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from p2pvpn.core.address import Endpoint, IpAddress
from p2pvpn.core.child import EspSuite
from p2pvpn.core.datagram import KEEPALIVE, NON_ESP_MARKER, STUN_COOKIE, STUN_HEADER_BYTES
from p2pvpn.core.errors import LocalError, TrustError, WireError
from p2pvpn.core.wire import Reader
from p2pvpn.crypto.aead import Aead

from .capture import PCAP_HEADER_BYTES, Frame, read_records_untrusted, whole_records

ETHERTYPE_IPV4, ETHERTYPE_ARP, ETHERTYPE_IPV6 = 0x0800, 0x0806, 0x86DD
ICMP, TCP, UDP, IPV6_FRAGMENT, ICMPV6, HOP_BY_HOP = 1, 6, 17, 44, 58, 0
ESP_HEADER_BYTES = 8
NOWHERE = Endpoint("0.0.0.0", 0)  # noqa: S104 (a value)
IKE_HEADER_BYTES = 28
IKE_VERSION_2 = 0x20
TLS_HANDSHAKE = b"\x16"


class Class(Enum):
    """The classes above, by their names in the result."""

    ESP = "esp"
    IKE = "ike"
    STUN = "stun"
    OTHER_UDP = "other_udp"
    ENROL_TCP = "enrol_tcp"
    ARP_ND_ICMP = "arp_nd_icmp"
    STREAM_TCP = "stream_tcp"
    UNEXPECTED = "unexpected"


class Packet(NamedTuple):
    """One sorted frame. `spi` and `inner` are of ESP, `inner` what it carried; ports are 0 where there are none."""

    at: float
    hop: str
    kind: Class
    source: Endpoint
    destination: Endpoint
    inner: bytes = b""
    spi: int = 0


class KeyLog:
    """The keys of every ESP SA there was, by SPI (two hosts may have picked the same)."""

    def __init__(self, directory: Path) -> None:
        self._ciphers: dict[bytes, list[tuple[Aead, bool]]] = {}
        for file in sorted(directory.glob("*.jsonl")):
            for line in file.read_text().splitlines():
                entry = json.loads(line)
                if entry["kind"] == "esp":
                    cipher = Aead(EspSuite[entry["suite"]], bytes.fromhex(entry["key"]))
                    self._ciphers.setdefault(struct.pack("!I", entry["spi"]), []).append((cipher, bool(entry["esn"])))

    def __len__(self) -> int:
        return sum(map(len, self._ciphers.values()))

    def open_untrusted(self, packet: bytes) -> bytes | None:
        """The inner packet of ESP (RFC 4303 section 2), or None when no key fits."""
        for cipher, esn in self._ciphers.get(packet[:4], ()):
            # RFC 4106 section 5: with ESN the high half is authenticated too; no SA of the laboratory leaves its zero.
            aad = packet[:4] + bytes(4) + packet[4:8] if esn else packet[:8]
            try:
                plain = cipher.open(packet[8:16], packet[16:], aad)
            except TrustError:
                continue
            if len(plain) >= 2 and plain[-2] + 2 <= len(plain):
                return plain[: len(plain) - 2 - plain[-2]]
        return None


class Wire:
    """All that was captured so far, in order of time, and what of it can be asked."""

    def __init__(self, captures: Mapping[str, Path], key_log: Path, *, marker: bytes, enrol_port: int) -> None:
        """From the pcap file of each hop and the directory of the key log; frames that show `marker` are told."""
        self.packets: list[Packet] = []
        self.clear: list[tuple[str, float]] = []
        """Hop and time of each frame in which the marker was readable."""
        self.sealed = 0
        """Decrypted packets in which the marker was: the search does find it where it should be."""
        self._captures = captures
        self._key_log = key_log
        self._marker = marker
        self._read = dict.fromkeys(captures, PCAP_HEADER_BYTES)
        opened: dict[bytes, bytes | None] = {}
        self._sorters = {hop: Sorter(KeyLog(key_log), enrol_port, opened) for hop in captures}

    def update(self) -> None:
        """Read on to the files' present ends. Raises LocalError when a frame does not parse."""
        pieces = {hop: file.read_bytes()[self._read[hop] :] for hop, file in self._captures.items()}
        keys = KeyLog(self._key_log)  # after the frames: a key is logged before it is used
        for hop, piece in pieces.items():
            whole = whole_records(piece)
            self._read[hop] += whole
            self._sorters[hop].keys = keys
            try:
                for frame in read_records_untrusted(piece[:whole]):
                    self._take_untrusted(hop, frame)
            except WireError as error:
                raise LocalError(f"{hop} carried a frame that does not parse: {error}") from error
        self.packets.sort(key=lambda packet: packet.at)

    def finish(self) -> None:
        """After the capture has ended: the rest of it, and what never became whole."""
        self.update()
        for hop, sorter in self._sorters.items():
            self.packets += sorter.incomplete(hop)

    def _take_untrusted(self, hop: str, frame: Frame) -> None:
        if self._marker in frame.data:
            self.clear.append((hop, frame.at))
        packet = self._sorters[hop].sort_untrusted(hop, frame)
        if packet is not None:
            self.sealed += self._marker in packet.inner
            self.packets.append(packet)

    def totals(self) -> dict[str, int]:
        """Packets of each class, each counted at every hop."""
        counts = Counter(packet.kind for packet in self.packets)
        return {kind.value: counts[kind] for kind in Class}

    def by_hop(self) -> dict[str, dict[str, int]]:
        """The totals of each hop apart."""
        table: dict[str, Counter[Class]] = {}
        for packet in self.packets:
            table.setdefault(packet.hop, Counter())[packet.kind] += 1
        return {hop: {kind.value: counts[kind] for kind in Class} for hop, counts in table.items()}

    def between(self, one: Iterable[str], other: Iterable[str]) -> Iterator[Packet]:
        """Packets straight between two parties, each given by all its addresses, earliest first."""
        ones, others = frozenset(one), frozenset(other)
        for packet in self.packets:
            ends = (packet.source.host, packet.destination.host)
            if (ends[0] in ones and ends[1] in others) or (ends[0] in others and ends[1] in ones):
                yield packet

    def carrying(self, text: bytes) -> Iterator[Packet]:
        """ESP packets whose inner packet has these bytes, earliest first."""
        return (packet for packet in self.packets if text in packet.inner)

    def unsorted(self) -> list[Packet]:
        """The packets that should not be there: `other_udp` and `unexpected`."""
        return [packet for packet in self.packets if packet.kind in (Class.OTHER_UDP, Class.UNEXPECTED)]


class Sorter:
    """Sorts the frames of one hop; holds the fragments of that hop until they are whole."""

    def __init__(self, keys: KeyLog, enrol_port: int, opened: dict[bytes, bytes | None] | None = None) -> None:
        self.keys = keys
        self._enrol_port = enrol_port
        self._opened = {} if opened is None else opened
        self._begun: dict[frozenset[tuple[str, int]], Class] = {}
        """What each TCP connection began with, by its ends."""
        self._fragments: dict[tuple[object, ...], dict[int, tuple[bytes, bool]]] = {}

    def sort_untrusted(self, hop: str, frame: Frame) -> Packet | None:
        """The packet, or None for a fragment that does not complete one. Raises WireError."""
        reader = Reader(frame.data)
        reader.take(12)
        ethertype = reader.u16()
        if ethertype == ETHERTYPE_ARP:
            return Packet(frame.at, hop, Class.ARP_ND_ICMP, NOWHERE, NOWHERE)
        if ethertype == ETHERTYPE_IPV4:
            source, destination, protocol, body = self._ipv4_untrusted(reader)
        elif ethertype == ETHERTYPE_IPV6:
            source, destination, protocol, body = self._ipv6_untrusted(reader)
        else:
            return Packet(frame.at, hop, Class.UNEXPECTED, NOWHERE, NOWHERE)
        if body is None:
            return None
        ports, kind, inner = (0, 0), Class.UNEXPECTED, b""
        if protocol in (UDP, TCP):
            head = Reader(body)
            ports = (head.u16(), head.u16())
        if protocol == UDP:
            length = head.u16()
            head.u16()
            if not 8 <= length <= len(body):
                raise WireError(f"a UDP length of {length} in {len(body)} bytes")
            kind, inner = self._datagram_untrusted(body[8:length])
        elif protocol == TCP and self._enrol_port in ports:
            kind = self._segment_untrusted((str(source), ports[0]), (str(destination), ports[1]), body)
        elif protocol in (ICMP, ICMPV6):
            kind = Class.ARP_ND_ICMP
        ends = Endpoint(str(source), ports[0]), Endpoint(str(destination), ports[1])
        spi = int.from_bytes(body[8:12], "big") if kind is Class.ESP else 0
        return Packet(frame.at, hop, kind, *ends, inner, spi)

    def _segment_untrusted(self, source: tuple[str, int], destination: tuple[str, int], body: bytes) -> Class:
        """RFC 9293 section 3.1: the header's length is in the upper half of byte 12, in words."""
        data = body[(body[12] >> 4) * 4 :] if len(body) > 12 else b""
        ends = frozenset((source, destination))
        if data and ends not in self._begun:
            self._begun[ends] = Class.STREAM_TCP if data[:1] == TLS_HANDSHAKE else Class.ENROL_TCP
        return self._begun.get(ends, Class.ENROL_TCP)

    def incomplete(self, hop: str) -> list[Packet]:
        """A packet of the class `unexpected` for each that never became whole."""
        return [Packet(0.0, hop, Class.UNEXPECTED, NOWHERE, NOWHERE) for _ in self._fragments]

    def _ipv4_untrusted(self, reader: Reader) -> tuple[IpAddress, IpAddress, int, bytes | None]:
        """RFC 791 section 3.1."""
        start = reader.left
        words = reader.u8() & 15
        reader.u8()
        length, ident, fragment = reader.u16(), reader.u16(), reader.u16()
        reader.u8()
        protocol = reader.u8()
        reader.u16()
        addresses = reader.take(8)
        header = words * 4
        if not 20 <= header <= length <= start:
            raise WireError("IPv4 lengths do not agree")
        reader.take(header - 20)
        body: bytes | None = reader.take(length - header)
        if fragment & 0x3FFF and body is not None:
            key = (addresses, ident, protocol)
            body = self._join(key, (fragment & 0x1FFF) * 8, body, bool(fragment & 0x2000))
        return _ip(addresses[:4]), _ip(addresses[4:]), protocol, body

    def _ipv6_untrusted(self, reader: Reader) -> tuple[IpAddress, IpAddress, int, bytes | None]:
        """RFC 8200 sections 3 and 4; of the extension headers those that occur here."""
        reader.u32()
        length, protocol = reader.u16(), reader.u8()
        reader.u8()
        addresses = reader.take(32)
        rest = reader.sub(length)
        body: bytes | None = None
        if protocol == HOP_BY_HOP:
            protocol = rest.u8()
            rest.take(rest.u8() * 8 + 6)
        if protocol == IPV6_FRAGMENT:
            protocol = rest.u8()
            rest.u8()
            offset = rest.u16()
            body = self._join((addresses, rest.u32()), offset & 0xFFF8, rest.rest(), bool(offset & 1))
        else:
            body = rest.rest()
        return _ip(addresses[:16]), _ip(addresses[16:]), protocol, body

    def _join(self, key: tuple[object, ...], offset: int, body: bytes, more: bool) -> bytes | None:
        parts = self._fragments.setdefault(key, {})
        parts[offset] = (body, more)
        whole, more = b"", True
        while more:
            part = parts.get(len(whole))
            if part is None or not part[0]:
                return None
            whole, more = whole + part[0], part[1]
        del self._fragments[key]
        return whole

    def _datagram_untrusted(self, data: bytes) -> tuple[Class, bytes]:
        if data == KEEPALIVE or _is_ike(data):
            return Class.IKE, b""
        if data[4:8] == STUN_COOKIE and len(data) >= STUN_HEADER_BYTES and data[0] >> 6 == 0:
            size = int.from_bytes(data[2:4], "big")
            if size % 4 == 0 and size + STUN_HEADER_BYTES == len(data):
                return Class.STUN, b""
        if data not in self._opened:
            self._opened[data] = self.keys.open_untrusted(data) if len(data) > ESP_HEADER_BYTES else None
        inner = self._opened[data]
        return (Class.OTHER_UDP, b"") if inner is None else (Class.ESP, inner)


def _is_ike(data: bytes) -> bool:
    """The marker of RFC 3948 section 2.2, then an RFC 7296 section 3.1 header that tells the datagram's length."""
    if data[:4] != NON_ESP_MARKER or len(data) < 4 + IKE_HEADER_BYTES or not any(data[4:12]):
        return False
    return data[21] == IKE_VERSION_2 and int.from_bytes(data[28:32], "big") == len(data) - 4


def _ip(packed: bytes) -> IpAddress:
    return Endpoint.unpack_untrusted(packed + b"\0\0").ip
