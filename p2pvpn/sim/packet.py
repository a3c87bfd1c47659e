"""Inner packets as a host's own IP stack builds and reads them: UDP and ICMP echo over IPv4 and IPv6, and fragments.

IPv6 (RFC 8200)   6 class flow | length | next header | hop limit | source | destination
fragment (4.5)    next header | 0 | offset/8 and M | identification
UDP (RFC 768)     source port | destination port | length | checksum
echo (RFC 792, RFC 4443)   type | 0 | checksum | identifier | sequence | data
"""

from __future__ import annotations

import ipaddress
import struct
from collections import OrderedDict
from typing import NamedTuple

from p2pvpn.core.address import IpAddress
from p2pvpn.core.errors import WireError
from p2pvpn.esp.inner import checksum, fragments, trimmed_untrusted

UDP = 17
ICMP = 1
ICMPV6 = 58
FRAGMENT = 44
HOP_LIMIT = 64
ECHO_TYPES = {4: (8, 0), 6: (128, 129)}
"""Request and reply, by IP version."""
TOO_BIG_TYPE = 2
"""ICMPv6 Packet Too Big (RFC 4443 section 3.2)."""
UNREACHABLE_TYPE, FRAGMENTATION_NEEDED = 3, 4
"""ICMP type and code that carry a next-hop MTU (RFC 1191 section 4)."""
MAX_ASSEMBLIES = 64
"""Packets in reassembly at once; the oldest is given up."""

_IPV6 = struct.Struct("!IHBB16s16s")
_IPV4 = struct.Struct("!BBHHHBBH4s4s")
_UDP = struct.Struct("!HHHH")
_ECHO = struct.Struct("!BBHHH")


class Inner(NamedTuple):
    """A whole packet, parsed. `protocol` is the upper layer's."""

    source: IpAddress
    destination: IpAddress
    protocol: int
    hop_limit: int
    payload: bytes


class Echo(NamedTuple):
    is_reply: bool
    identifier: int
    sequence: int
    data: bytes


def ip_packet(source: IpAddress, destination: IpAddress, protocol: int, payload: bytes) -> bytes:
    """An IP packet of one family. IPv4 packets may be fragmented on the way."""
    if source.version == 6:
        return _IPV6.pack(0x6 << 28, len(payload), protocol, HOP_LIMIT, source.packed, destination.packed) + payload
    size = 20 + len(payload)
    header = _IPV4.pack(0x45, 0, size, 0, 0, HOP_LIMIT, protocol, 0, source.packed, destination.packed)
    return header[:10] + checksum(header).to_bytes(2, "big") + header[12:] + payload


def udp_packet(source: IpAddress, source_port: int, destination: IpAddress, port: int, data: bytes) -> bytes:
    size = 8 + len(data)
    segment = _UDP.pack(source_port, port, size, 0) + data
    value = checksum(_pseudo(source, destination, UDP, size) + segment) or 0xFFFF
    return ip_packet(source, destination, UDP, segment[:6] + value.to_bytes(2, "big") + data)


def echo_packet(source: IpAddress, destination: IpAddress, echo: Echo) -> bytes:
    kind = ECHO_TYPES[source.version][echo.is_reply]
    message = _ECHO.pack(kind, 0, 0, echo.identifier, echo.sequence) + echo.data
    if source.version == 6:
        value = checksum(_pseudo(source, destination, ICMPV6, len(message)) + message)
        protocol = ICMPV6
    else:
        value = checksum(message)
        protocol = ICMP
    return ip_packet(source, destination, protocol, message[:2] + value.to_bytes(2, "big") + message[4:])


def parse_untrusted(packet: bytes) -> Inner:
    """Headers of a whole packet (no fragment). Raises WireError."""
    packet = trimmed_untrusted(packet)
    if packet[0] >> 4 == 6:
        _, _, protocol, hop_limit, source, destination = _IPV6.unpack_from(packet)
        return Inner(
            ipaddress.IPv6Address(source), ipaddress.IPv6Address(destination), protocol, hop_limit, packet[40:]
        )
    size = (packet[0] & 15) * 4
    if checksum(packet[:size]) != 0:
        raise WireError("IPv4 header checksum does not hold")
    return Inner(
        ipaddress.IPv4Address(packet[12:16]), ipaddress.IPv4Address(packet[16:20]), packet[9], packet[8], packet[size:]
    )


def udp_untrusted(inner: Inner) -> tuple[int, int, bytes]:
    """Source port, destination port and data. Raises WireError, also when the checksum does not hold."""
    segment = inner.payload
    if len(segment) < 8:
        raise WireError("a UDP header that is cut")
    source_port, port, size, value = _UDP.unpack_from(segment)
    if size != len(segment):
        raise WireError("a UDP length that does not fit")
    if value == 0:
        if inner.source.version == 6:
            raise WireError("UDP over IPv6 without a checksum")
    elif checksum(_pseudo(inner.source, inner.destination, UDP, size) + segment) != 0:
        raise WireError("UDP checksum does not hold")
    return source_port, port, segment[8:]


def echo_untrusted(inner: Inner) -> Echo | None:
    """An echo request or reply, or None for other ICMP messages. Raises WireError."""
    message = inner.payload
    if len(message) < 8:
        raise WireError("an ICMP message that is cut")
    front = b"" if inner.source.version == 4 else _pseudo(inner.source, inner.destination, ICMPV6, len(message))
    if checksum(front + message) != 0:
        raise WireError("ICMP checksum does not hold")
    kind, _, _, identifier, sequence = _ECHO.unpack_from(message)
    request, reply = ECHO_TYPES[inner.source.version]
    if kind not in (request, reply):
        return None
    return Echo(kind == reply, identifier, sequence, message[8:])


def narrowed_untrusted(inner: Inner) -> tuple[IpAddress, int] | None:
    """Of an ICMP error that says a packet was too big: the packet's destination, and the MTU. Raises WireError."""
    message = inner.payload
    if inner.protocol == ICMPV6 and len(message) >= 48 and message[0] == TOO_BIG_TYPE:
        return ipaddress.IPv6Address(message[32:48]), int.from_bytes(message[4:8], "big")
    if inner.protocol == ICMP and len(message) >= 28 and message[:2] == b"\x03\x04":
        return ipaddress.IPv4Address(message[24:28]), int.from_bytes(message[6:8], "big")
    return None


def forwarded(packet: bytes) -> bytes | None:
    """The packet as a router sends it on: one hop less, or None when there is none left."""
    changed = bytearray(packet)
    at = 7 if packet[0] >> 4 == 6 else 8
    if packet[at] <= 1:
        return None
    changed[at] -= 1
    if packet[0] >> 4 == 4:
        size = (packet[0] & 15) * 4
        changed[10:12] = b"\0\0"
        changed[10:12] = checksum(bytes(changed[:size])).to_bytes(2, "big")
    return bytes(changed)


def cut(packet: bytes, mtu: int, identification: int) -> list[bytes]:
    """The packet of a local sender as fragments of at most `mtu` bytes; whole if it fits (RFC 8200 section 4.5)."""
    if len(packet) <= mtu:
        return [packet]
    if packet[0] >> 4 == 4:
        marked = packet[:4] + (identification & 0xFFFF).to_bytes(2, "big") + packet[6:10] + b"\0\0" + packet[12:]
        header = marked[:20]
        return list(fragments(header[:10] + checksum(header).to_bytes(2, "big") + marked[12:], mtu))
    step = (mtu - 48) // 8 * 8
    payload = packet[40:]
    out = []
    for offset in range(0, len(payload), step):
        piece = payload[offset : offset + step]
        more = offset + step < len(payload)
        extension = struct.pack("!BBHI", packet[6], 0, offset | more, identification & 0xFFFFFFFF)
        size = (len(piece) + 8).to_bytes(2, "big")
        out.append(packet[:4] + size + bytes((FRAGMENT,)) + packet[7:40] + extension + piece)
    return out


class Reassembler:
    """Puts fragments together; overlapping ones make a packet that no checksum will accept."""

    def __init__(self) -> None:
        self._parts: OrderedDict[bytes, dict[int, tuple[bytes, bool]]] = OrderedDict()

    def take_untrusted(self, packet: bytes) -> bytes | None:
        """A whole packet, once its last fragment came; packets that are no fragments pass at once. Raises WireError."""
        packet = trimmed_untrusted(packet)
        if packet[0] >> 4 == 6:
            if packet[6] != FRAGMENT:
                return packet
            if len(packet) < 48:
                raise WireError("a fragment header that is cut")
            field = packet[42] << 8 | packet[43]
            key, offset, more, piece = packet[8:40] + packet[44:48], field & 0xFFF8, bool(field & 1), packet[48:]
        else:
            field = packet[6] << 8 | packet[7]
            if not field & 0x3FFF:
                return packet
            size = (packet[0] & 15) * 4
            key = packet[12:20] + packet[4:6] + packet[9:10]
            offset, more, piece = (field & 0x1FFF) * 8, bool(field & 0x2000), packet[size:]
        parts = self._parts.setdefault(key, {})
        parts[offset] = (piece, more)
        if len(self._parts) > MAX_ASSEMBLIES:
            self._parts.popitem(last=False)
        payload = b""
        while (part := parts.get(len(payload))) is not None and part[0]:
            payload += part[0]
            if not part[1]:
                self._parts.pop(key, None)
                return self._whole(packet, payload)
        return None

    @staticmethod
    def _whole(packet: bytes, payload: bytes) -> bytes:
        if packet[0] >> 4 == 6:
            return packet[:4] + len(payload).to_bytes(2, "big") + packet[40:41] + packet[7:40] + payload
        size = 20 + len(payload)
        header = (
            b"\x45"
            + packet[1:2]
            + size.to_bytes(2, "big")
            + packet[4:6]
            + b"\0\0"
            + packet[8:10]
            + b"\0\0"
            + packet[12:20]
        )
        return header[:10] + checksum(header).to_bytes(2, "big") + header[12:] + payload


def _pseudo(source: IpAddress, destination: IpAddress, protocol: int, size: int) -> bytes:
    if source.version == 6:
        return source.packed + destination.packed + size.to_bytes(4, "big") + bytes((0, 0, 0, protocol))
    return source.packed + destination.packed + bytes((0, protocol)) + size.to_bytes(2, "big")
