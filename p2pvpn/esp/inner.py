"""The packet inside: what a tunnel looks at, copies and answers.

Header fields as in RFC 791 and RFC 8200. The kernel on each side of the TUN device is the host or the router, so TTL
and hop limit are its business; ours are the traffic class (RFC 4301 section 5.1.2, RFC 6040), the path MTU (RFC 4301
section 8) and the flow that selectors look at.
"""

from __future__ import annotations

from collections.abc import Sequence

from p2pvpn.core.errors import WireError

IPV4_HEADER_BYTES = 20
IPV6_HEADER_BYTES = 40
MIN_MTU_IPV6 = 1280
"""Every IPv6 link carries this (RFC 8200 section 5), so nothing smaller may be announced."""
MIN_MTU_IPV4 = 576

ICMP = 1
ICMPV6 = 58
_PORT_PROTOCOLS = frozenset((6, 17, 33, 132, 136))
"""TCP, UDP, DCCP, SCTP, UDP-Lite: two ports in the first four bytes."""
_ICMP_ERRORS = frozenset((3, 4, 5, 11, 12))
_EXTENSIONS = frozenset((0, 43, 60, 135, 139, 140))
"""IPv6 extension headers of the common shape: next header, length in 8-byte units less one."""
_FRAGMENT = 44
_MAX_EXTENSIONS = 8
"""More extension headers than this are no traffic but an attempt to hide."""
NO_PORT = -1
"""Of a packet that shows no port; below every port, so that no range but the whole one holds it."""

NOT_ECT, ECT_1, ECT_0, CE = range(4)
_COMBINED: tuple[tuple[int | None, ...], ...] = (
    # outer: Not-ECT, ECT(1), ECT(0), CE                     inner
    (NOT_ECT, NOT_ECT, NOT_ECT, None),  #                    Not-ECT: it cannot learn of congestion, so it is dropped
    (ECT_1, ECT_1, ECT_1, CE),  #                            ECT(1)
    (ECT_0, ECT_1, ECT_0, CE),  #                            ECT(0)
    (CE, CE, CE, CE),  #                                     CE
)
"""RFC 6040 section 4.2, figure 4; None drops the packet."""


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of `data`: what goes into the field when the field counted as zero."""
    if len(data) & 1:
        data += b"\0"
    return 0xFFFF - (int.from_bytes(data, "big") % 0xFFFF or (0xFFFF if any(data) else 0))


def with_checksum(packet: bytes, start: int, offset: int) -> bytes:
    """The packet with its transport checksum over everything from `start`, `offset` bytes further on, where the sum of
    the pseudo header stands; as a device with checksum offload completes it."""
    found = 0xFFFF - (int.from_bytes(packet[start:], "little") % 0xFFFF or 0xFFFF)
    if offset == 6 and not found:
        found = 0xFFFF  # UDP: zero would say that there is none (RFC 768)
    at = start + offset
    return packet[:at] + found.to_bytes(2, "little") + packet[at + 2 :]


def trimmed_untrusted(packet: bytes) -> bytes:
    """A whole IPv4 or IPv6 packet without what follows its end (traffic-flow confidentiality padding, RFC 4303
    section 2.7). Raises WireError unless header and length fit the bytes."""
    size = len(packet)
    version = packet[0] >> 4 if size else 0
    if version == 4:
        header = (packet[0] & 15) * 4
        total = packet[2] << 8 | packet[3] if size >= IPV4_HEADER_BYTES else 0
        if header < IPV4_HEADER_BYTES or not header <= total <= size:
            raise WireError("an IPv4 packet whose lengths do not fit")
    elif version == 6:
        if size < IPV6_HEADER_BYTES:
            raise WireError("an IPv6 packet without a whole header")
        total = (packet[4] << 8 | packet[5]) + IPV6_HEADER_BYTES
        if total > size:
            raise WireError("an IPv6 packet whose length does not fit")
    else:
        raise WireError(f"an IP packet of version {version}")
    return packet if total == size else packet[:total]


def flow_untrusted(packet: bytes) -> tuple[int, int, int]:
    """Protocol, source port and destination port of a trimmed packet.

    Ports are NO_PORT where there are none to see; for ICMP both are type * 256 + code (RFC 7296 section 3.13.1).
    """
    if packet[0] >> 4 == 4:
        protocol = packet[9]
        at = (packet[0] & 15) * 4
        first = not (packet[6] << 8 | packet[7]) & 0x1FFF
    else:
        protocol, at, first = _upper_of_ipv6_untrusted(packet)
    if not first or len(packet) < at + 4:
        return protocol, NO_PORT, NO_PORT
    if protocol in _PORT_PROTOCOLS:
        return protocol, packet[at] << 8 | packet[at + 1], packet[at + 2] << 8 | packet[at + 3]
    if protocol in (ICMP, ICMPV6):
        message = packet[at] << 8 | packet[at + 1]
        return protocol, message, message
    return protocol, NO_PORT, NO_PORT


def _upper_of_ipv6_untrusted(packet: bytes) -> tuple[int, int, bool]:
    """Upper-layer protocol, its offset, and whether this is a first or only fragment."""
    protocol, at = packet[6], IPV6_HEADER_BYTES
    for _ in range(_MAX_EXTENSIONS):
        if len(packet) < at + 8:
            return protocol, at, True
        if protocol == _FRAGMENT:
            protocol, offset, at = packet[at], (packet[at + 2] << 8 | packet[at + 3]) & 0xFFF8, at + 8
            if offset:
                return protocol, at, False
        elif protocol in _EXTENSIONS:
            protocol, at = packet[at], at + 8 + packet[at + 1] * 8
        elif protocol == 51:  # AH counts 4-byte units less two (RFC 4302 section 2.2)
            protocol, at = packet[at], at + 8 + packet[at + 1] * 4
        else:
            return protocol, at, True
    raise WireError("too many IPv6 extension headers")


def traffic_class(packet: bytes) -> int:
    """DSCP and ECN, the byte that the outer header copies (RFC 4301 section 5.1.2.1, RFC 6040 section 4.1)."""
    if packet[0] >> 4 == 4:
        return packet[1]
    return (packet[0] & 15) << 4 | packet[1] >> 4


def with_outer_ecn(packet: bytes, outer: int) -> bytes | None:
    """The packet with its ECN field combined with the outer one (RFC 6040 section 4.2); None if it must be dropped."""
    inner = traffic_class(packet) & 3
    ecn = _COMBINED[inner][outer & 3]
    if ecn is None or ecn == inner:
        return None if ecn is None else packet
    changed = bytearray(packet)
    if packet[0] >> 4 == 4:
        changed[1] = packet[1] & 0xFC | ecn
        changed[10:12] = b"\0\0"
        changed[10:12] = checksum(bytes(changed[: (packet[0] & 15) * 4])).to_bytes(2, "big")
    else:
        changed[1] = packet[1] & 0xCF | ecn << 4
    return bytes(changed)


def is_link_scoped(packet: bytes) -> bool:
    """Whether the destination never leaves a link: link-local addresses, the control multicast blocks, broadcast."""
    if packet[0] >> 4 == 4:
        return packet[16:18] == b"\xa9\xfe" or packet[16:19] == b"\xe0\0\0" or packet[16:20] == b"\xff\xff\xff\xff"
    if packet[24] == 0xFF:
        return packet[25] & 15 <= 2
    return packet[24] == 0xFE and packet[25] & 0xC0 == 0x80


def may_fragment(packet: bytes) -> bool:
    """Whether a router may cut the packet: IPv4 without DF."""
    return packet[0] >> 4 == 4 and not packet[6] & 0x40


def too_big(packet: bytes, mtu: int) -> bytes | None:
    """The ICMP error that tells the packet's source of `mtu`, or None when no error may be sent.

    It comes from the packet's own destination: an address whose route leads into the tunnel, so that no reverse-path
    filter refuses it. RFC 1191 section 4, RFC 4443 section 3.2; never about ICMP errors or to a multicast source
    (RFC 1122 section 3.2.2, RFC 4443 section 2.4).
    """
    if packet[0] >> 4 == 4:
        return _too_big_ipv4(packet, mtu)
    return _too_big_ipv6(packet, mtu)


def _too_big_ipv4(packet: bytes, mtu: int) -> bytes | None:
    at = (packet[0] & 15) * 4
    if packet[12] >= 224 or packet[12:16] == bytes(4) or (packet[6] << 8 | packet[7]) & 0x1FFF:
        return None
    if packet[9] == ICMP and len(packet) > at and packet[at] in _ICMP_ERRORS:
        return None
    quoted = packet[: at + 8]
    body = b"\x03\x04\0\0\0\0" + mtu.to_bytes(2, "big") + quoted
    body = body[:2] + checksum(body).to_bytes(2, "big") + body[4:]
    total = IPV4_HEADER_BYTES + len(body)
    source, destination = packet[16:20], packet[12:16]
    header = b"\x45\0" + total.to_bytes(2, "big") + b"\0\0\0\0\x40\x01\0\0" + source + destination
    return header[:10] + checksum(header).to_bytes(2, "big") + header[12:] + body


def _too_big_ipv6(packet: bytes, mtu: int) -> bytes | None:
    if packet[8] == 0xFF or packet[8:24] == bytes(16) or packet[24] == 0xFF:
        return None
    if packet[6] == ICMPV6 and len(packet) > IPV6_HEADER_BYTES and packet[IPV6_HEADER_BYTES] < 128:
        return None
    quoted = packet[: MIN_MTU_IPV6 - IPV6_HEADER_BYTES - 8]
    body = b"\x02\0\0\0" + max(mtu, MIN_MTU_IPV6).to_bytes(4, "big") + quoted
    source, destination = packet[24:40], packet[8:24]
    pseudo = source + destination + len(body).to_bytes(4, "big") + b"\0\0\0\x3a"
    body = body[:2] + checksum(pseudo + body).to_bytes(2, "big") + body[4:]
    return b"\x60\0\0\0" + len(body).to_bytes(2, "big") + b"\x3a\x40" + source + destination + body


def fragments(packet: bytes, mtu: int) -> Sequence[bytes]:
    """An IPv4 packet without DF, cut to `mtu` bytes (RFC 791 section 2.3). Options that must not be copied are
    replaced by no-operations in all but the first."""
    size = (packet[0] & 15) * 4
    first_header = packet[:size]
    later_header = packet[:IPV4_HEADER_BYTES] + _copied_options(packet[IPV4_HEADER_BYTES:size])
    payload = packet[size:]
    field = packet[6] << 8 | packet[7]
    offset, more_follow = field & 0x1FFF, field & 0x2000
    step = (max(mtu, MIN_MTU_IPV4 // 4) - size) // 8
    out: list[bytes] = []
    for start in range(0, max(len(payload), 1), step * 8):
        piece = payload[start : start + step * 8]
        more = more_follow if start + len(piece) >= len(payload) else 0x2000
        header = bytearray(later_header if start else first_header)
        header[2:4] = (size + len(piece)).to_bytes(2, "big")
        header[6:8] = (more | offset + start // 8).to_bytes(2, "big")
        header[10:12] = b"\0\0"
        header[10:12] = checksum(bytes(header)).to_bytes(2, "big")
        out.append(bytes(header) + piece)
    return out


def _copied_options(options: bytes) -> bytes:
    """IPv4 options with those that belong to the first fragment alone made no-operations (RFC 791 section 3.1)."""
    out = bytearray(options)
    at = 0
    while at < len(out) and out[at] != 0:
        length = 1 if out[at] == 1 else (out[at + 1] if at + 1 < len(out) else 0)
        if length < 1 or (length == 1 and out[at] != 1) or at + length > len(out):
            break
        if not out[at] & 0x80:
            out[at : at + length] = b"\x01" * length
        at += length
    return bytes(out)
