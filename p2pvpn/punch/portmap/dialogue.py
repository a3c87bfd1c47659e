"""What is said to a router in either protocol, and what its answers mean: the part of a client without time.

A dialogue makes a request, and takes an answer into a step: the mapping is granted, or denied, or more has to be asked
first, or the router speaks another protocol.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from p2pvpn.core.address import Endpoint
from p2pvpn.core.errors import WireError
from p2pvpn.core.ports import Entropy

from . import natpmp, pcp
from .mapping import LIFETIME_S, MapProtocol

REST_S = 300.0
"""After a refusal that names no time."""


@dataclass(frozen=True, slots=True)
class Granted:
    external: Endpoint
    lifetime_s: int
    epoch_s: int


@dataclass(frozen=True, slots=True)
class Denied:
    """Not now; the router wants to be left alone for `wait_s`."""

    reason: str
    wait_s: float


@dataclass(frozen=True, slots=True)
class AskNext:
    """An answer on the way; this is the next request."""

    request: bytes


@dataclass(frozen=True, slots=True)
class OtherVersion:
    """The router does not speak this protocol; `version` is its own."""

    version: int


Step = Granted | Denied | AskNext | OtherVersion


class Dialogue(Protocol):
    """One protocol with one router for one port."""

    protocol: MapProtocol
    first_s: float
    """First retransmission time, doubled each time."""
    max_s: float
    tries: int
    """Requests without any answer after which the router does not speak the protocol."""
    jitter: float

    def ask(self, former: Endpoint | None) -> bytes:
        """The request for a mapping; `former` is the external endpoint that we had and would like again."""
        ...

    def give_back(self) -> bytes:
        """The request to take it back."""
        ...

    def take_untrusted(self, data: bytes) -> Step:
        """What an answer means. Raises WireError for what is no answer to us."""
        ...

    def news_untrusted(self, data: bytes) -> int:
        """The epoch time of a multicast announcement. Raises WireError."""
        ...


class PcpDialogue:
    """RFC 6887: one request, known by its nonce."""

    protocol = MapProtocol.PCP
    first_s = 3.0
    max_s = 1024.0
    tries = 3
    jitter = 0.1

    def __init__(self, local: Endpoint, entropy: Entropy) -> None:
        self._local = local
        self._nonce = entropy(pcp.NONCE_BYTES)

    def ask(self, former: Endpoint | None) -> bytes:
        any_host = "::" if self._local.is_ipv6 else "0.0.0.0"  # noqa: S104 (no address to bind)
        suggested = former or Endpoint(any_host, self._local.port)
        return pcp.map_request(self._local.ip, self._nonce, self._local.port, LIFETIME_S, suggested)

    def give_back(self) -> bytes:
        return pcp.map_request(self._local.ip, self._nonce, self._local.port, 0, None)

    def take_untrusted(self, data: bytes) -> Step:
        version = pcp.unsupported_version_untrusted(data)
        if version is not None:
            return OtherVersion(version)
        answer = pcp.parse_response_untrusted(data)
        if answer.opcode != pcp.Opcode.MAP or (answer.nonce is not None and answer.nonce != self._nonce):
            raise WireError("not an answer to us")
        if answer.result != pcp.Result.SUCCESS:
            return Denied(_reason(pcp.Result, answer.result), answer.lifetime_s)
        if answer.external is None or (answer.protocol, answer.internal_port) != (pcp.UDP, self._local.port):
            raise WireError("a mapping that was not asked for")
        if not answer.lifetime_s:
            raise WireError("a mapping that is gone")
        return Granted(answer.external, answer.lifetime_s, answer.epoch_s)

    def news_untrusted(self, data: bytes) -> int:
        answer = pcp.parse_response_untrusted(data)
        if answer.opcode != pcp.Opcode.ANNOUNCE or answer.result != pcp.Result.SUCCESS:
            raise WireError("not an announcement")
        return answer.epoch_s


class NatPmpDialogue:
    """RFC 6886: the router's address first, then the mapping. Nothing but the router's address marks its answers."""

    protocol = MapProtocol.NAT_PMP
    first_s = 0.25
    max_s = 64.0
    tries = 9
    jitter = 0.0

    def __init__(self, local: Endpoint) -> None:
        self._port = local.port
        self._former = 0
        self._address: str | None = None

    def ask(self, former: Endpoint | None) -> bytes:
        self._former = former.port if former is not None else self._port
        self._address = None
        return natpmp.address_request()

    def give_back(self) -> bytes:
        return natpmp.map_request(self._port, 0, 0)

    def take_untrusted(self, data: bytes) -> Step:
        answer = natpmp.parse_response_untrusted(data)
        if answer.result != natpmp.Result.SUCCESS:
            return Denied(_reason(natpmp.Result, answer.result), REST_S)
        if isinstance(answer, natpmp.AddressResponse):
            if self._address is not None:
                raise WireError("answered before")
            self._address = str(answer.address)
            return AskNext(natpmp.map_request(self._port, self._former, LIFETIME_S))
        if self._address is None or answer.internal_port != self._port or not answer.lifetime_s:
            raise WireError("a mapping that was not asked for")
        return Granted(Endpoint(self._address, answer.external_port), answer.lifetime_s, answer.epoch_s)

    def news_untrusted(self, data: bytes) -> int:
        answer = natpmp.parse_response_untrusted(data)
        if not isinstance(answer, natpmp.AddressResponse):
            raise WireError("not an announcement")
        return answer.epoch_s


def _reason(results: type[IntEnum], code: int) -> str:
    """A router's result code as a person reads it."""
    try:
        return results(code).name.lower().replace("_", " ")
    except ValueError:
        return f"error {code}"
