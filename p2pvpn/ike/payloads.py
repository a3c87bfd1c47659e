"""The payloads of IKEv2 messages (RFC 7296 sections 3.3 to 3.16), each with its layout drawn in its docstring.

A payload is a frozen dataclass with the class attributes TYPE (its Next Payload number) and LAYOUT (which parses and
builds it). What the class does not know it keeps as it came.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from ipaddress import IPv4Address, IPv6Address
from typing import Any, ClassVar

from p2pvpn.core.address import IpAddress
from p2pvpn.core.errors import WireError
from p2pvpn.core.selector import Selector
from p2pvpn.core.wire import Reader

from .codes import PayloadType, TsType
from .layout import Layout, Rest, Sized, SizeOf, Uint, Values, Zeros
from .notifies import Notify
from .proposals import Proposal, build_proposals, parse_proposals_untrusted

MIN_NONCE_BYTES = 16
MAX_NONCE_BYTES = 256
MAX_SPIS = 4096
"""In one DELETE payload; our own peers have a handful of Child SAs."""
SHA1_BYTES = 20


class _ProposalList:
    def read(self, reader: Reader, values: Values) -> None:
        values["proposals"] = parse_proposals_untrusted(reader.rest())

    def write(self, values: Mapping[str, Any]) -> bytes:
        return build_proposals(values["proposals"])


class _SpiList:
    """| spi size u8 | count u16 | spi ... |"""

    def read(self, reader: Reader, values: Values) -> None:
        size, count = reader.u8(), reader.u16()
        if count > MAX_SPIS or size * count != reader.left or (size == 0 and count):
            raise WireError("the SPIs of a DELETE are not as many as it says")
        values["spis"] = tuple(reader.take(size) for _ in range(count))

    def write(self, values: Mapping[str, Any]) -> bytes:
        spis: Sequence[bytes] = values["spis"]
        size = len(spis[0]) if spis else 0
        return bytes([size]) + len(spis).to_bytes(2, "big") + b"".join(spis)


class _SelectorList:
    """| count u8 | zero 3 | selector ... |, where a selector is

    | type u8 | protocol u8 | length u16 | start port u16 | end port u16 | start address | end address |
    """

    _SIZES: ClassVar[dict[int, int]] = {TsType.IPV4_RANGE: 4, TsType.IPV6_RANGE: 16}

    def read(self, reader: Reader, values: Values) -> None:
        count = reader.u8()
        reader.take(3)
        selectors = []
        for _ in range(count):
            kind, protocol, length = reader.u8(), reader.u8(), reader.u16()
            body = reader.sub(length - 4)
            size = self._SIZES.get(kind)
            if size is None:
                continue  # a kind of selector that we do not know is as if it were not offered
            ports = body.u16(), body.u16()
            start, end = (_address(body.take(size)) for _ in range(2))
            body.end()
            selectors.append(Selector(start, end, protocol, *ports))
        values["selectors"] = tuple(selectors)

    def write(self, values: Mapping[str, Any]) -> bytes:
        selectors: Sequence[Selector] = values["selectors"]
        out = bytes([len(selectors), 0, 0, 0])
        for one in selectors:
            kind = TsType.IPV4_RANGE if one.version == 4 else TsType.IPV6_RANGE
            body = one.start_port.to_bytes(2, "big") + one.end_port.to_bytes(2, "big")
            body += one.start.packed + one.end.packed
            out += bytes([kind, one.protocol]) + (len(body) + 4).to_bytes(2, "big") + body
        return out


def _address(packed: bytes) -> IpAddress:
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)


@dataclass(frozen=True, slots=True)
class SecurityAssociation:
    """SA: | proposal ... | (section 3.3)"""

    TYPE: ClassVar = PayloadType.SA
    LAYOUT: ClassVar = Layout(_ProposalList())
    proposals: tuple[Proposal, ...]


@dataclass(frozen=True, slots=True)
class KeyExchangeData:
    """KE: | group u16 | zero 2 | public value ... | (section 3.4)"""

    TYPE: ClassVar = PayloadType.KE
    LAYOUT: ClassVar = Layout(Uint("group", 2), Zeros(2), Rest("data", minimum=1))
    group: int
    data: bytes


@dataclass(frozen=True, slots=True)
class _Identification:
    """IDi, IDr: | kind u8 | zero 3 | data ... | (section 3.5)"""

    LAYOUT: ClassVar = Layout(Uint("kind", 1), Zeros(3), Rest("data"))
    kind: int
    data: bytes


@dataclass(frozen=True, slots=True)
class IdInitiator(_Identification):
    TYPE: ClassVar = PayloadType.IDI


@dataclass(frozen=True, slots=True)
class IdResponder(_Identification):
    TYPE: ClassVar = PayloadType.IDR


@dataclass(frozen=True, slots=True)
class Certificate:
    """CERT: | encoding u8 | data ... | (section 3.6)"""

    TYPE: ClassVar = PayloadType.CERT
    LAYOUT: ClassVar = Layout(Uint("encoding", 1), Rest("data", minimum=1))
    encoding: int
    data: bytes


@dataclass(frozen=True, slots=True)
class CertificateRequest:
    """CERTREQ: | encoding u8 | SHA-1 hashes of authorities' SubjectPublicKeyInfo ... | (section 3.7)"""

    TYPE: ClassVar = PayloadType.CERTREQ
    LAYOUT: ClassVar = Layout(Uint("encoding", 1), Rest("data"))
    encoding: int
    data: bytes

    @property
    def authorities(self) -> frozenset[bytes]:
        """The hashes; a tail that is no whole hash is passed over."""
        whole = len(self.data) - len(self.data) % SHA1_BYTES
        return frozenset(self.data[at : at + SHA1_BYTES] for at in range(0, whole, SHA1_BYTES))


@dataclass(frozen=True, slots=True)
class Authentication:
    """AUTH: | method u8 | zero 3 | data ... | (section 3.8)"""

    TYPE: ClassVar = PayloadType.AUTH
    LAYOUT: ClassVar = Layout(Uint("method", 1), Zeros(3), Rest("data"))
    method: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Nonce:
    """Ni, Nr: | 16 to 256 bytes | (section 3.9)"""

    TYPE: ClassVar = PayloadType.NONCE
    LAYOUT: ClassVar = Layout(Rest("data", MIN_NONCE_BYTES, MAX_NONCE_BYTES))
    data: bytes


@dataclass(frozen=True, slots=True)
class Notification:
    """N: | protocol u8 | spi size u8 | type u16 | spi | data ... | (section 3.10)"""

    TYPE: ClassVar = PayloadType.NOTIFY
    LAYOUT: ClassVar = Layout(Uint("protocol", 1), SizeOf("spi"), Uint("type", 2), Sized("spi"), Rest("data"))
    protocol: int
    type: int
    spi: bytes
    data: bytes

    @classmethod
    def of(cls, notify: Notify) -> Notification:
        return cls(notify.protocol, notify.type, notify.spi, notify.data)

    @property
    def notify(self) -> Notify:
        return Notify(self.type, self.data, self.protocol, self.spi)


@dataclass(frozen=True, slots=True)
class Delete:
    """D: | protocol u8 | spi size u8 | count u16 | spi ... | (section 3.11)"""

    TYPE: ClassVar = PayloadType.DELETE
    LAYOUT: ClassVar = Layout(Uint("protocol", 1), _SpiList())
    protocol: int
    spis: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class VendorId:
    """V: | data ... | (section 3.12)"""

    TYPE: ClassVar = PayloadType.VENDOR
    LAYOUT: ClassVar = Layout(Rest("data"))
    data: bytes


@dataclass(frozen=True, slots=True)
class _TrafficSelectors:
    """TSi, TSr: | count u8 | zero 3 | selector ... | (section 3.13)"""

    LAYOUT: ClassVar = Layout(_SelectorList())
    selectors: tuple[Selector, ...]


@dataclass(frozen=True, slots=True)
class SelectorsInitiator(_TrafficSelectors):
    TYPE: ClassVar = PayloadType.TSI


@dataclass(frozen=True, slots=True)
class SelectorsResponder(_TrafficSelectors):
    TYPE: ClassVar = PayloadType.TSR


@dataclass(frozen=True, slots=True)
class Configuration:
    """CP: | kind u8 | zero 3 | attributes ... | (section 3.15)"""

    TYPE: ClassVar = PayloadType.CP
    LAYOUT: ClassVar = Layout(Uint("kind", 1), Zeros(3), Rest("attributes"))
    kind: int
    attributes: bytes


@dataclass(frozen=True, slots=True)
class Eap:
    """EAP: | an EAP packet | (section 3.16)"""

    TYPE: ClassVar = PayloadType.EAP
    LAYOUT: ClassVar = Layout(Rest("packet"))
    packet: bytes


Payload = (
    SecurityAssociation
    | KeyExchangeData
    | IdInitiator
    | IdResponder
    | Certificate
    | CertificateRequest
    | Authentication
    | Nonce
    | Notification
    | Delete
    | VendorId
    | SelectorsInitiator
    | SelectorsResponder
    | Configuration
    | Eap
)

_CLASSES: tuple[type[Payload], ...] = (
    SecurityAssociation,
    KeyExchangeData,
    IdInitiator,
    IdResponder,
    Certificate,
    CertificateRequest,
    Authentication,
    Nonce,
    Notification,
    Delete,
    VendorId,
    SelectorsInitiator,
    SelectorsResponder,
    Configuration,
    Eap,
)
BY_TYPE: dict[int, type[Payload]] = {cls.TYPE: cls for cls in _CLASSES}
_NAMES: dict[type[Payload], tuple[str, ...]] = {cls: tuple(one.name for one in fields(cls)) for cls in _CLASSES}


def parse_payload_untrusted(kind: int, body: bytes) -> Payload | None:
    """The payload of that type, or None for a type that we do not know. Raises WireError."""
    cls = BY_TYPE.get(kind)
    return None if cls is None else cls(**cls.LAYOUT.parse_untrusted(body))


def build_payload(payload: Payload) -> bytes:
    """The body, without the generic header."""
    return payload.LAYOUT.build({name: getattr(payload, name) for name in _NAMES[type(payload)]})
