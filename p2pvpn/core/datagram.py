"""What a UDP datagram on the shared port is.

    first byte   11xxxxxx           ESP for one of our SPIs (all of ours have the two top bits set)
    first word   00000000           IKE behind the non-ESP marker (RFC 3948 section 2.2)
    first byte   00xxxxxx and the magic cookie at 4   STUN (RFC 8489 section 5)
    one byte     ff                 NAT keepalive (RFC 3948 section 2.3)

The SO_REUSEPORT program on the port sorts by the first of these rules, and sorts out first messages of strangers;
these functions are the specification of it, and of what the control socket does with the rest.
"""

from __future__ import annotations

from enum import Enum

SPI_MARK = 0xC0000000
"""Set in every inbound SPI of ours, so that ESP can be told from IKE and STUN by its first two bits."""
NON_ESP_MARKER = bytes(4)
KEEPALIVE = b"\xff"
STUN_COOKIE = bytes.fromhex("2112a442")
STUN_HEADER_BYTES = 20
_FIRST_PAYLOAD_AT, _EXCHANGE_AT = 20, 22
_NOTIFY, _IKE_SA_INIT = 41, 34


class Kind(Enum):
    ESP = "esp"
    IKE = "ike"
    STUN = "stun"
    KEEPALIVE = "keepalive"
    OTHER = "other"


def classify(data: bytes) -> Kind:
    """The kind of a datagram, by its first bytes alone."""
    if data == KEEPALIVE:
        return Kind.KEEPALIVE
    if len(data) < 8:
        return Kind.OTHER
    if data[0] >> 6 == 3:
        return Kind.ESP
    if len(data) >= STUN_HEADER_BYTES and data[0] >> 6 == 0 and data[4:8] == STUN_COOKIE:
        return Kind.STUN
    if data[:4] == NON_ESP_MARKER:
        return Kind.IKE
    return Kind.OTHER


def is_first_message(data: bytes) -> bool:
    """Whether a datagram begins an IKE SA and brings no cookie: exchange IKE_SA_INIT behind the marker, no responder's
    SPI, and another payload than a notification in front (RFC 7296 sections 2.6 and 3.1)."""
    return (
        len(data) > _EXCHANGE_AT
        and data[:4] == NON_ESP_MARKER
        and data[12:20] == bytes(8)
        and data[_FIRST_PAYLOAD_AT] != _NOTIFY
        and data[_EXCHANGE_AT] == _IKE_SA_INIT
    )
