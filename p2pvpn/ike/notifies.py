"""Notifications (RFC 7296 section 3.10): their types, and the class that carries one.

Types below 16384 are errors, the others tell a status. 40960 and up are for private use.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from .codes import Protocol

FIRST_STATUS_TYPE = 16384
FIRST_PRIVATE_STATUS_TYPE = 40960


class NotifyType(IntEnum):
    """Those that we send or act on (IANA registry of RFC 7296)."""

    UNSUPPORTED_CRITICAL_PAYLOAD = 1
    INVALID_IKE_SPI = 4
    INVALID_MAJOR_VERSION = 5
    INVALID_SYNTAX = 7
    INVALID_MESSAGE_ID = 9
    INVALID_SPI = 11
    NO_PROPOSAL_CHOSEN = 14
    INVALID_KE_PAYLOAD = 17
    AUTHENTICATION_FAILED = 24
    NO_ADDITIONAL_SAS = 35
    INTERNAL_ADDRESS_FAILURE = 36
    FAILED_CP_REQUIRED = 37
    TS_UNACCEPTABLE = 38
    UNACCEPTABLE_ADDRESSES = 40
    UNEXPECTED_NAT_DETECTED = 41
    TEMPORARY_FAILURE = 43
    CHILD_SA_NOT_FOUND = 44
    STATE_NOT_FOUND = 47

    INITIAL_CONTACT = 16384
    NAT_DETECTION_SOURCE_IP = 16388
    NAT_DETECTION_DESTINATION_IP = 16389
    COOKIE = 16390
    USE_TRANSPORT_MODE = 16391
    REKEY_SA = 16393
    MOBIKE_SUPPORTED = 16396
    ADDITIONAL_IP4_ADDRESS = 16397
    ADDITIONAL_IP6_ADDRESS = 16398
    NO_ADDITIONAL_ADDRESSES = 16399
    UPDATE_SA_ADDRESSES = 16400
    COOKIE2 = 16401
    NO_NATS_ALLOWED = 16402
    REDIRECT_SUPPORTED = 16406
    REDIRECT = 16407
    REDIRECTED_FROM = 16408
    CHILDLESS_IKEV2_SUPPORTED = 16418
    IKEV2_FRAGMENTATION_SUPPORTED = 16430
    SIGNATURE_HASH_ALGORITHMS = 16431
    USE_PPK = 16435
    PPK_IDENTITY = 16436
    NO_PPK_AUTH = 16437
    INTERMEDIATE_EXCHANGE_SUPPORTED = 16438
    ADDITIONAL_KEY_EXCHANGE = 16441
    SUPPORTED_AUTH_METHODS = 16443


CHILD_ERRORS = frozenset(
    {
        NotifyType.NO_PROPOSAL_CHOSEN,
        NotifyType.NO_ADDITIONAL_SAS,
        NotifyType.INTERNAL_ADDRESS_FAILURE,
        NotifyType.FAILED_CP_REQUIRED,
        NotifyType.TS_UNACCEPTABLE,
    }
)
"""In IKE_AUTH these refuse the Child SA alone: the IKE SA stands (RFC 7296 section 1.2)."""

_CONSUMED = frozenset(
    {
        NotifyType.NAT_DETECTION_SOURCE_IP,
        NotifyType.NAT_DETECTION_DESTINATION_IP,
        NotifyType.COOKIE,
        NotifyType.COOKIE2,
        NotifyType.MOBIKE_SUPPORTED,
        NotifyType.UPDATE_SA_ADDRESSES,
        NotifyType.CHILDLESS_IKEV2_SUPPORTED,
        NotifyType.IKEV2_FRAGMENTATION_SUPPORTED,
        NotifyType.SIGNATURE_HASH_ALGORITHMS,
        NotifyType.USE_TRANSPORT_MODE,
        NotifyType.REKEY_SA,
        NotifyType.INITIAL_CONTACT,
        NotifyType.REDIRECT_SUPPORTED,
        NotifyType.REDIRECT,
        NotifyType.REDIRECTED_FROM,
        NotifyType.USE_PPK,
        NotifyType.PPK_IDENTITY,
        NotifyType.NO_PPK_AUTH,
        NotifyType.INTERMEDIATE_EXCHANGE_SUPPORTED,
        NotifyType.ADDITIONAL_KEY_EXCHANGE,
        NotifyType.SUPPORTED_AUTH_METHODS,
    }
)
"""Status notifications that the machine deals with itself."""


@dataclass(frozen=True, slots=True)
class Notify:
    """One notification: its type and data; `protocol` and `spi` only when it is about one SA."""

    type: int
    data: bytes = b""
    protocol: int = Protocol.NONE
    spi: bytes = b""

    @property
    def is_error(self) -> bool:
        return self.type < FIRST_STATUS_TYPE

    @property
    def is_for_the_engine(self) -> bool:
        """A status that the machine does not deal with itself, so that it goes up in an event."""
        return not self.is_error and self.type not in _CONSUMED

    def __str__(self) -> str:
        try:
            return NotifyType(self.type).name
        except ValueError:
            return f"{'error' if self.is_error else 'status'} {self.type}"
