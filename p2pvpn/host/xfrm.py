"""The kernel's IPsec: SAs and policies over NETLINK_XFRM.

A request is a batch of messages in one datagram. The kernel works through it while it is being sent and has answered
before the call returns, so requests are plain function calls, about 50 microseconds each, and nothing can overtake.
What the kernel tells by itself (an SA expired; a peer's address changed) comes by a socket of its own that the event
loop reads; its queue is the socket's buffer, and what overflows it is lost: hints, and expiries that the counters show.

Whatever we install carries TAG as the user of its selector, a field that no kernel matches packets by, and reqids from
REQIDS: so our leftovers are told from other programs' states after a crash.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import itertools
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from p2pvpn.core.address import Endpoint, IpAddress, IpNetwork, any_local
from p2pvpn.core.child import EspSuite
from p2pvpn.core.errors import LocalError
from p2pvpn.core.secret import Secret

from .xfrm_ciphers import cipher_attributes
from .xfrm_messages import (
    ENCAP_LAYOUT,
    MIGRATION_LAYOUT,
    STATE,
    TEMPLATE_LAYOUT,
    Group,
    Kind,
    decoded,
    encoded,
    offset,
)

TAG = 0x70327076
"""Of every selector of ours ("p2pv"); `ip xfrm` shows it as uid 1882353782."""
REQIDS = range(1_000_000_000, 2_000_000_000)
"""`reqid` of an SA is the first of these plus its Child SA's id."""
REPLAY_WINDOW = 4096
"""Packets: as many as the kernel allows. What comes later than that over a relay's long queue, when others came by the
direct path already, is lost; with 64-bit numbers it even looks forged (XfrmInStateProtoError)."""
MAPPING_PAUSE_S = 1
"""The kernel tells of one packet from a foreign address per SA in this time, or all of them would be told."""
MAX_TEMPLATES = 6
"""XFRM_MAX_DEPTH: SAs that one policy can accept."""

_NETLINK_XFRM = 6
_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP = 270, 1
_SO_RCVBUFFORCE = 33
_BUFFER_BYTES = 1 << 20
_READ_BYTES = 1 << 17
_ANSWER_S = 10.0
"""A kernel that loads a module for a cipher may take a second."""
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_ERRNO = struct.Struct("=i")
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_ESP, _UDP_ENCAP_ESPINUDP = 50, 2
_TRANSPORT, _TUNNEL = 0, 1
_FLAG_AF_UNSPEC, _FLAG_ESN = 0x20, 0x80
"""Without AF_UNSPEC an SA would carry inner packets of its outer family only."""
_NO_LIMIT = (1 << 64) - 1
_ALL_PACKETS_32 = (1 << 32) - 2
_CURRENT_AT = _HEADER.size + offset(STATE, "bytes")
_CURRENT = struct.Struct("=QQ")
_ATTRIBUTES_AT = _HEADER.size + offset(STATE, "end")
_ATTR_ESN = 23
_ESN_HEAD = struct.Struct("=IIIIII")
_DUMP_BATCH = 64
"""Questions of one batch: their answers must fit the socket's buffer."""


class XfrmError(LocalError):
    """The kernel refused; `errno` says why, `index` which message of the batch."""

    def __init__(self, number: int, index: int, what: str) -> None:
        super().__init__(f"xfrm {what}: {os.strerror(number)}")
        self.errno = number
        self.index = index


class Direction(IntEnum):
    IN = 0
    OUT = 1
    FORWARD = 2


class Action(IntEnum):
    ALLOW = 0
    BLOCK = 1


class Flow(NamedTuple):
    """The outer addresses and ports of an SA, in the direction of its packets."""

    source: Endpoint
    destination: Endpoint

    @property
    def family(self) -> int:
        return socket.AF_INET6 if self.destination.is_ipv6 else socket.AF_INET

    @property
    def from_anywhere(self) -> Flow:
        """In a template: from any source address."""
        return Flow(any_local(self.destination, self.source.port).local, self.destination)

    @property
    def hosts(self) -> tuple[str, str]:
        return self.source.host, self.destination.host


class Pair(NamedTuple):
    """Which inner packets a policy is about, in their direction. Zero is any protocol, any port."""

    source: IpNetwork
    destination: IpNetwork
    protocol: int = 0
    source_port: int = 0
    destination_port: int = 0

    @property
    def reverse(self) -> Pair:
        return Pair(self.destination, self.source, self.protocol, self.destination_port, self.source_port)


class Template(NamedTuple):
    """What a policy demands of a packet's SA, or seals it with."""

    flow: Flow
    reqid: int
    optional: bool = False
    transport: bool = False


@dataclass(frozen=True, slots=True)
class Counted:
    """What the kernel counted on an SA, and its replay state as it must be given back."""

    packets: int
    octets: int
    sequence_out: int
    replay: bytes


@dataclass(frozen=True, slots=True)
class State:
    """One direction of a Child SA. `replay` continues the numbers of a former state."""

    flow: Flow
    spi: int
    reqid: int
    suite: EspSuite
    key: Secret
    esn: bool
    inbound: bool
    replay: bytes = b""
    transport: bool = False


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a batch, not yet numbered."""

    kind: Kind
    fields: dict[str, int | bytes]
    attributes: list[tuple[str, bytes]] = field(default_factory=list)


class Xfrm:
    """Requests. Make it in the network namespace that it is about. Raises LocalError when there is no XFRM."""

    def __init__(self) -> None:
        self._socket = _open()
        self._socket.settimeout(_ANSWER_S)
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def request(self, *messages: Message) -> None:
        """Carry the messages out, in order; a failing one does not stop those behind it. Raises XfrmError for the
        first that failed."""
        if not messages:
            return
        first = self._sequence + 1
        self._send(messages, ack_last=True)
        problem: XfrmError | None = None
        for sequence, kind, data in self._answers():
            if kind != _NLMSG_ERROR or sequence < first:
                continue
            number = -_ERRNO.unpack_from(data, _HEADER.size)[0]
            if number and problem is None:
                index = sequence - first
                problem = XfrmError(number, index, messages[index].kind.name)
            if sequence == self._sequence:
                break
        if problem is not None:
            raise problem

    def counted(self, states: Sequence[tuple[Flow, int]]) -> list[Counted | None]:
        """The counters of SAs, by flow and SPI; None for those that the kernel does not have."""
        out: list[Counted | None] = []
        for at in range(0, len(states), _DUMP_BATCH):
            asked = [_question(flow, spi) for flow, spi in states[at : at + _DUMP_BATCH]]
            first = self._sequence + 1
            self._send(asked, ack_last=False)
            found: list[Counted | None] = [None] * len(asked)
            for sequence, kind, data in self._answers():
                if sequence < first:
                    continue
                if kind == Kind.NEWSA:
                    found[sequence - first] = _counted(data)
                if sequence == self._sequence:
                    break
            out += found
        return out

    def has_policy(self, pair: Pair, direction: Direction) -> bool:
        """Whether a policy of ours stands for these packets."""
        self._send([Message(Kind.GETPOLICY, {**_selector(pair), "dir": direction.value})], ack_last=False)
        return any(
            kind == Kind.NEWPOLICY
            for sequence, kind, _ in itertools.islice(self._answers(), 1)
            if sequence == self._sequence
        )

    def clean_up(self) -> int:
        """Remove every state and policy that carries our tag: what a dead daemon left. Returns how many there were."""
        removals: list[Message] = []
        for data in self._dump(Kind.GETPOLICY):
            policy = decoded(Kind.NEWPOLICY, data)
            if policy["sel_user"] == TAG and policy["dir"] in tuple(Direction):
                copied = {name: policy[name] for name, _ in policy.fields if name.startswith("sel_")}
                removals.append(Message(Kind.DELPOLICY, {**copied, "dir": policy["dir"]}))
        for data in self._dump(Kind.GETSA):
            state = decoded(Kind.NEWSA, data)
            if state["sel_user"] == TAG and state["reqid"] in REQIDS:
                copied = {name: state[name] for name in ("daddr", "spi", "family", "proto")}
                removals.append(Message(Kind.DELSA, copied))
        for at in range(0, len(removals), _DUMP_BATCH):
            with contextlib.suppress(XfrmError):  # gone by itself meanwhile
                self.request(*removals[at : at + _DUMP_BATCH])
        return len(removals)

    def _dump(self, kind: Kind) -> list[bytes]:
        self._sequence += 1
        self._socket.send(encoded(kind, _REQUEST | _DUMP, self._sequence, {}, []))
        out = []
        for sequence, answer, data in self._answers():
            if sequence != self._sequence:
                continue
            if answer == _NLMSG_DONE:
                break
            if answer == _NLMSG_ERROR:
                raise XfrmError(-_ERRNO.unpack_from(data, _HEADER.size)[0], 0, kind.name)
            out.append(data)
        return out

    def _send(self, messages: Sequence[Message], *, ack_last: bool) -> None:
        batch = []
        for number, message in enumerate(messages, start=1):
            self._sequence += 1
            flags = _REQUEST | (_ACK if ack_last and number == len(messages) else 0)
            batch.append(encoded(message.kind, flags, self._sequence, message.fields, message.attributes))
        self._socket.send(b"".join(batch))

    def _answers(self) -> Iterator[tuple[int, int, bytes]]:
        while True:
            try:
                data = self._socket.recv(_READ_BYTES)
            except TimeoutError:
                raise LocalError("the kernel does not answer on NETLINK_XFRM") from None
            yield from _split(data)


class XfrmEvents:
    """What the kernel tells by itself: `on_mapping(spi, source)` of inbound SAs, `on_expired(spi, hard)` of all."""

    def __init__(self, on_mapping: Callable[[int, Endpoint], None], on_expired: Callable[[int, bool], None]) -> None:
        self._on_mapping = on_mapping
        self._on_expired = on_expired
        self._socket = _open()
        for group in Group:
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, int(group))
        self._socket.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket, self._read)

    def close(self) -> None:
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def _read(self) -> None:
        for _ in range(_DUMP_BATCH):  # others get their turn; the reader is called again
            try:
                data = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    continue
                raise
            for _, kind, message in _split(data):
                if kind == Kind.MAPPING:
                    self._tell_mapping(message)
                elif kind == Kind.EXPIRE:
                    expired = decoded(Kind.EXPIRE, message)
                    if expired["reqid"] in REQIDS:
                        self._on_expired(expired["spi"], bool(expired["hard"]))

    def _tell_mapping(self, data: bytes) -> None:
        mapping = decoded(Kind.MAPPING, data)
        if mapping["reqid"] in REQIDS:
            address = bytes(mapping["new_saddr"])[: 4 if mapping["family"] == socket.AF_INET else 16]
            self._on_mapping(mapping["spi"], Endpoint(str(ipaddress.ip_address(address)), mapping["new_sport"]))


# ---------------------------------------------------------------------- messages


def set_state(state: State, *, update: bool = False) -> Message:
    """Add an SA, or (`update`) give one that stands the ports of `state.flow`."""
    fields: dict[str, int | bytes] = {
        **_UNLIMITED,
        "daddr": _bytes16(state.flow.destination.ip),
        "saddr": _bytes16(state.flow.source.ip),
        "spi": state.spi,
        "proto": _ESP,
        "sel_user": TAG,
        "reqid": state.reqid,
        "family": state.flow.family,
        "mode": _TRANSPORT if state.transport else _TUNNEL,
        "flags": (0 if state.transport else _FLAG_AF_UNSPEC) | (_FLAG_ESN if state.esn else 0),
    }
    if not state.inbound and not state.esn:
        fields["hard_packets"] = _ALL_PACKETS_32
    words = REPLAY_WINDOW // 32
    replay = state.replay or _ESN_HEAD.pack(words, 0, 0, 0, 0, REPLAY_WINDOW) + bytes(4 * words)
    attributes = [
        *cipher_attributes(state.suite, state.key.reveal()),
        ("XFRMA_ENCAP", _encap(state.flow)),
        ("XFRMA_REPLAY_ESN_VAL", replay),
    ]
    if state.inbound:
        attributes.append(("XFRMA_MTIMER_THRESH", struct.pack("=I", MAPPING_PAUSE_S)))
    return Message(Kind.UPDSA if update else Kind.NEWSA, fields, attributes)


def delete_state(flow: Flow, spi: int) -> Message:
    return Message(Kind.DELSA, _state_id(flow, spi))


def set_policy(
    pair: Pair,
    direction: Direction,
    priority: int,
    templates: Sequence[Template] = (),
    *,
    action: Action = Action.ALLOW,
) -> Message:
    """Make a policy, in the place of the one that stands for the same packets. The lowest priority number wins."""
    fields = {
        **_selector(pair),
        **_UNLIMITED,
        "priority": priority,
        "dir": direction.value,
        "action": action.value,
    }
    rows = b"".join(_template(template) for template in templates)
    return Message(Kind.UPDPOLICY, fields, [("XFRMA_TMPL", rows)] if rows else [])


def delete_policy(pair: Pair, direction: Direction) -> Message:
    return Message(Kind.DELPOLICY, {**_selector(pair), "dir": direction.value})


def migrate(pair: Pair, direction: Direction, reqid: int, old: Flow, new: Flow) -> Message:
    """Take the SA of that reqid and the templates of that policy to other addresses; numbers and window stay."""
    row: dict[str, int | bytes] = {
        "old_daddr": _bytes16(old.destination.ip),
        "old_saddr": _bytes16(old.source.ip),
        "new_daddr": _bytes16(new.destination.ip),
        "new_saddr": _bytes16(new.source.ip),
        "proto": _ESP,
        "mode": _TUNNEL,
        "reqid": reqid,
        "old_family": old.family,
        "new_family": new.family,
    }
    attributes = [("XFRMA_MIGRATE", MIGRATION_LAYOUT.pack(row)), ("XFRMA_ENCAP", _encap(new))]
    return Message(Kind.MIGRATE, {**_selector(pair), "dir": direction.value}, attributes)


_UNLIMITED: dict[str, int | bytes] = dict.fromkeys(
    ("soft_bytes", "hard_bytes", "soft_packets", "hard_packets"), _NO_LIMIT
)


def _question(flow: Flow, spi: int) -> Message:
    return Message(Kind.GETSA, _state_id(flow, spi))


def _state_id(flow: Flow, spi: int) -> dict[str, int | bytes]:
    return {"daddr": _bytes16(flow.destination.ip), "spi": spi, "family": flow.family, "proto": _ESP}


def _selector(pair: Pair) -> dict[str, int | bytes]:
    return {
        "sel_daddr": _bytes16(pair.destination.network_address),
        "sel_saddr": _bytes16(pair.source.network_address),
        "sel_dport": pair.destination_port,
        "sel_dport_mask": 0xFFFF if pair.destination_port else 0,
        "sel_sport": pair.source_port,
        "sel_sport_mask": 0xFFFF if pair.source_port else 0,
        "sel_family": socket.AF_INET if pair.source.version == 4 else socket.AF_INET6,
        "sel_prefixlen_d": pair.destination.prefixlen,
        "sel_prefixlen_s": pair.source.prefixlen,
        "sel_proto": pair.protocol,
        "sel_user": TAG,
    }


def _template(template: Template) -> bytes:
    return TEMPLATE_LAYOUT.pack(
        {
            "daddr": _bytes16(template.flow.destination.ip),
            "saddr": _bytes16(template.flow.source.ip),
            "proto": _ESP,
            "family": template.flow.family,
            "reqid": template.reqid,
            "mode": _TRANSPORT if template.transport else _TUNNEL,
            "optional": int(template.optional),
            "aalgos": 0xFFFFFFFF,
            "ealgos": 0xFFFFFFFF,
            "calgos": 0xFFFFFFFF,
        }
    )


def _encap(flow: Flow) -> bytes:
    return ENCAP_LAYOUT.pack({"type": _UDP_ENCAP_ESPINUDP, "sport": flow.source.port, "dport": flow.destination.port})


def _bytes16(ip: IpAddress) -> bytes:
    return ip.packed.ljust(16, b"\0")


# ---------------------------------------------------------------------- reading


def _open() -> socket.socket:
    try:
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_XFRM)
        sock.bind((0, 0))
    except OSError as error:
        raise LocalError(f"the kernel has no XFRM: {error.strerror}") from None
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
    return sock


def _split(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Sequence, type and bytes of each message in a datagram of the kernel's."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, _, sequence, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size or at + length > len(data):
            return
        yield sequence, kind, data[at : at + length]
        at += (length + 3) & ~3


def _counted(data: bytes) -> Counted:
    size, packets = _CURRENT.unpack_from(data, _CURRENT_AT)
    replay = b""
    sequence_out = 0
    at = _ATTRIBUTES_AT
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            break
        if kind & 0x3FFF == _ATTR_ESN:
            replay = data[at + _ATTRIBUTE.size : at + length]
            _, oseq, _, oseq_hi, _, _ = _ESN_HEAD.unpack_from(replay)
            sequence_out = oseq_hi << 32 | oseq
        at += (length + 3) & ~3
    return Counted(packets, size, sequence_out, replay)
