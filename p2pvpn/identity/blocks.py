"""Addresses that a certificate holds: the IPAddrBlocks extension of RFC 3779 section 2.

    IPAddrBlocks    ::= SEQUENCE OF IPAddressFamily
    IPAddressFamily ::= SEQUENCE { addressFamily OCTET STRING (2 bytes), addressesOrRanges SEQUENCE OF
                        CHOICE { prefix BIT STRING, range SEQUENCE { min BIT STRING, max BIT STRING } } }

Families come in order of their number, addresses ascend, neighbours are merged, and a range that is a prefix is
written as one (section 2.2.3). So a set of addresses has one encoding, and the decoder accepts only that. `inherit`
and SAFI families are refused: certificates of ours say what they hold.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from cryptography.hazmat import asn1
from cryptography.x509 import ObjectIdentifier

from p2pvpn.core.address import IpAddress
from p2pvpn.core.errors import WireError
from p2pvpn.core.selector import Selector

OID = ObjectIdentifier("1.3.6.1.5.5.7.1.7")
"""id-pe-ipAddrBlocks."""
MAX_BLOCKS = 256
"""Ranges in one certificate, over both families."""
MAX_DER_BYTES = 16384
_FAMILIES = {4: b"\x00\x01", 6: b"\x00\x02"}
"""Address family numbers (IANA): 1 is IPv4, 2 is IPv6."""
_BITS = {4: 32, 6: 128}


@asn1.sequence
class _Range:
    min: asn1.BitString
    max: asn1.BitString


@asn1.sequence
class _Family:
    family: bytes
    blocks: list[asn1.BitString | _Range]


@asn1.sequence
class _Wrapped:
    families: list[_Family]


def merge(selectors: Iterable[Selector]) -> tuple[Selector, ...]:
    """The same addresses as the fewest ranges: IPv4 first, ascending. Raises ValueError for ports or protocols."""
    out: list[Selector] = []
    for item in sorted(selectors, key=lambda s: (s.version, int(s.start), int(s.end))):
        if item.protocol or (item.start_port, item.end_port) != (0, 65535):
            raise ValueError("a certificate holds addresses, not ports or protocols")
        if item.is_empty:
            raise ValueError("an empty range")
        last = out[-1] if out else None
        if last is not None and last.version == item.version and int(item.start) <= int(last.end) + 1:
            if int(item.end) > int(last.end):
                out[-1] = Selector(last.start, item.end)
        else:
            out.append(item)
    return tuple(out)


def encode(selectors: Iterable[Selector]) -> bytes:
    """The extension's DER. Raises ValueError when a selector is narrower than whole addresses, or for too many."""
    merged = merge(selectors)
    if len(merged) > MAX_BLOCKS:
        raise ValueError(f"a certificate holds at most {MAX_BLOCKS} ranges")
    families = []
    for version, number in _FAMILIES.items():
        blocks = [_encode_block(item) for item in merged if item.version == version]
        if blocks:
            families.append(_Family(family=number, blocks=blocks))
    wrapped = asn1.encode_der(_Wrapped(families=families))
    return wrapped[_header_bytes(wrapped) :]


def decode_untrusted(der: bytes) -> tuple[Selector, ...]:
    """The ranges, merged and ascending. Raises WireError for everything that `encode` would not write."""
    if len(der) > MAX_DER_BYTES:
        raise WireError("IPAddrBlocks of more than 16384 bytes")
    try:
        # A bare SEQUENCE OF cannot be decoded on its own: it is put into a sequence first.
        families = asn1.decode_der(_Wrapped, _sequence(der)).families
        selectors = [_decode_block(block, _VERSIONS[entry.family]) for entry in families for block in entry.blocks]
        same = encode(selectors) == der
    except (ValueError, KeyError, TypeError) as problem:
        raise WireError(f"not IPAddrBlocks: {problem}") from None
    if not same:
        raise WireError("IPAddrBlocks in a form that RFC 3779 section 2.2.3 does not allow")
    return merge(selectors)


_VERSIONS = {number: version for version, number in _FAMILIES.items()}


def _encode_block(item: Selector) -> asn1.BitString | _Range:
    size = _BITS[item.version]
    low, high = int(item.start), int(item.end)
    count = high - low + 1
    if count & (count - 1) == 0 and low % count == 0:
        return _bits(low, size - (count.bit_length() - 1), item.version)
    # Section 2.1.2: trailing zero bits of the minimum and trailing one bits of the maximum are left out.
    low_zeros = (low & -low).bit_length() - 1 if low else size
    high_ones = ((high + 1) & -(high + 1)).bit_length() - 1
    return _Range(min=_bits(low, size - low_zeros, item.version), max=_bits(high, size - high_ones, item.version))


def _bits(value: int, length: int, version: int) -> asn1.BitString:
    """The leading `length` bits of an address."""
    size = _BITS[version]
    count = (length + 7) // 8
    kept = value >> (size - length) << (size - length)
    return asn1.BitString(kept.to_bytes(size // 8, "big")[:count], count * 8 - length)


def _decode_block(block: asn1.BitString | _Range, version: int) -> Selector:
    if isinstance(block, asn1.BitString):
        return Selector(_fill(block, version, ones=False), _fill(block, version, ones=True))
    return Selector(_fill(block.min, version, ones=False), _fill(block.max, version, ones=True))


def _fill(bits: asn1.BitString, version: int, *, ones: bool) -> IpAddress:
    data = bits.as_bytes()
    size = _BITS[version]
    length = len(data) * 8 - bits.padding_bits()
    if length > size:
        raise ValueError("more bits than an address has")
    value = int.from_bytes(data.ljust(size // 8, b"\x00"), "big")
    if ones:
        value |= (1 << (size - length)) - 1
    return ipaddress.IPv4Address(value) if version == 4 else ipaddress.IPv6Address(value)


def _header_bytes(der: bytes) -> int:
    """Bytes of tag and length in front of a DER value's content."""
    return 2 if der[1] < 0x80 else 2 + (der[1] & 0x7F)


def _sequence(content: bytes) -> bytes:
    """A DER SEQUENCE with this content."""
    size = len(content)
    if size < 0x80:
        return b"\x30" + bytes([size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return b"\x30" + bytes([0x80 | len(length)]) + length + content
