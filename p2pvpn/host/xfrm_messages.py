"""The messages of NETLINK_XFRM, declared: layouts of linux/xfrm.h with 64-bit alignment.

    message       fixed part          attributes used
    NEWSA, UPDSA  usersa_info         ALG_AEAD or ALG_CRYPT and ALG_AUTH_TRUNC, ENCAP, REPLAY_ESN_VAL, MTIMER_THRESH
    GETSA, DELSA  usersa_id           (an answer is a usersa_info)
    NEW-, UPDPOLICY  userpolicy_info  TMPL
    DEL-, GETPOLICY  userpolicy_id
    MIGRATE       userpolicy_id       MIGRATE, ENCAP
    EXPIRE        user_expire         told when an SA reached a limit of its
    MAPPING       user_mapping        told when an authenticated packet came from another address or port

Ports and SPIs are big-endian, addresses 16 bytes with IPv4 in the first four, all else is in the machine's order.
pyroute2 has the netlink machinery but none of these; here and `host.netlink` are where it is imported. It reads by the
declarations; we write by them ourselves, since a machine with many peers installs thousands.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Any

from pyroute2.netlink import nla, nlmsg

Fields = tuple[tuple[str, str], ...]


class Kind(IntEnum):
    """Message types."""

    NEWSA = 0x10
    DELSA = 0x11
    GETSA = 0x12
    NEWPOLICY = 0x13
    DELPOLICY = 0x14
    GETPOLICY = 0x15
    EXPIRE = 0x18
    UPDPOLICY = 0x19
    UPDSA = 0x1A
    MIGRATE = 0x21
    MAPPING = 0x26


class Group(IntEnum):
    """Multicast groups."""

    EXPIRE = 2
    MAPPING = 8


_ID: Fields = (("daddr", "16s"), ("spi", ">I"), ("proto", "B"), ("pad_id", "3x"))
_SELECTOR: Fields = (
    ("sel_daddr", "16s"),
    ("sel_saddr", "16s"),
    ("sel_dport", ">H"),
    ("sel_dport_mask", ">H"),
    ("sel_sport", ">H"),
    ("sel_sport_mask", ">H"),
    ("sel_family", "H"),
    ("sel_prefixlen_d", "B"),
    ("sel_prefixlen_s", "B"),
    ("sel_proto", "B"),
    ("pad_sel", "3x"),
    ("sel_ifindex", "i"),
    ("sel_user", "I"),
)
_LIMITS: Fields = tuple(
    (name, "Q")
    for name in (
        "soft_bytes",
        "hard_bytes",
        "soft_packets",
        "hard_packets",
        "soft_add_s",
        "hard_add_s",
        "soft_use_s",
        "hard_use_s",
    )
)
_CURRENT: Fields = (("bytes", "Q"), ("packets", "Q"), ("add_time", "Q"), ("use_time", "Q"))
STATE: Fields = (
    *_SELECTOR,
    *_ID,
    ("saddr", "16s"),
    *_LIMITS,
    *_CURRENT,
    ("replay_window_errors", "I"),
    ("replay_errors", "I"),
    ("integrity_errors", "I"),
    ("seq", "I"),
    ("reqid", "I"),
    ("family", "H"),
    ("mode", "B"),
    ("replay_window", "B"),
    ("flags", "B"),
    ("pad_sa", "7x"),
)
_POLICY: Fields = (
    *_SELECTOR,
    *_LIMITS,
    *_CURRENT,
    ("priority", "I"),
    ("index", "I"),
    ("dir", "B"),
    ("action", "B"),
    ("flags", "B"),
    ("share", "B"),
    ("pad_pol", "4x"),
)
_STATE_ID: Fields = (("daddr", "16s"), ("spi", ">I"), ("family", "H"), ("proto", "B"), ("pad_said", "1x"))


class _Attributes:
    """The layouts of attributes, by name."""

    class aead(nla):  # type: ignore[misc]
        fields = (("name", "64s"), ("key_bits", "I"), ("icv_bits", "I"), ("key", "s"))

    class encap(nla):  # type: ignore[misc]
        fields = (("type", "H"), ("sport", ">H"), ("dport", ">H"), ("pad", "2x"), ("oa", "16s"))

    class esn(nla):  # type: ignore[misc]
        fields = (
            ("words", "I"),
            ("oseq", "I"),
            ("seq", "I"),
            ("oseq_hi", "I"),
            ("seq_hi", "I"),
            ("replay_window", "I"),
            ("bitmap", "s"),
        )


_NLA_MAP = tuple(
    (f"XFRMA_{name}", layout)
    for name, layout in (
        ("UNSPEC", "none"),
        ("ALG_AUTH", "cdata"),
        ("ALG_CRYPT", "cdata"),
        ("ALG_COMP", "cdata"),
        ("ENCAP", "encap"),
        ("TMPL", "cdata"),
        ("SA", "cdata"),
        ("POLICY", "cdata"),
        ("SEC_CTX", "cdata"),
        ("LTIME_VAL", "cdata"),
        ("REPLAY_VAL", "cdata"),
        ("REPLAY_THRESH", "uint32"),
        ("ETIMER_THRESH", "uint32"),
        ("SRCADDR", "cdata"),
        ("COADDR", "cdata"),
        ("LASTUSED", "uint64"),
        ("POLICY_TYPE", "cdata"),
        ("MIGRATE", "cdata"),
        ("ALG_AEAD", "aead"),
        ("KMADDRESS", "cdata"),
        ("ALG_AUTH_TRUNC", "cdata"),
        ("MARK", "cdata"),
        ("TFCPAD", "uint32"),
        ("REPLAY_ESN_VAL", "esn"),
        ("SA_EXTRA_FLAGS", "uint32"),
        ("PROTO", "uint8"),
        ("ADDRESS_FILTER", "cdata"),
        ("PAD", "cdata"),
        ("OFFLOAD_DEV", "cdata"),
        ("SET_MARK", "uint32"),
        ("SET_MARK_MASK", "uint32"),
        ("IF_ID", "uint32"),
        ("MTIMER_THRESH", "uint32"),
    )
)


class _Message(nlmsg, _Attributes):  # type: ignore[misc]
    nla_map = _NLA_MAP


class usersa_info(_Message):
    fields = STATE


class usersa_id(_Message):
    fields = _STATE_ID


class userpolicy_info(_Message):
    fields = _POLICY


class userpolicy_id(_Message):
    fields = (*_SELECTOR, ("index", "I"), ("dir", "B"), ("pad_polid", "3x"))


class user_expire(_Message):
    fields = (*STATE, ("hard", "B"), ("pad_expire", "7x"))


class user_mapping(_Message):
    fields = (
        *_STATE_ID,
        ("reqid", "I"),
        ("old_saddr", "16s"),
        ("new_saddr", "16s"),
        ("old_sport", ">H"),
        ("new_sport", ">H"),
    )


TEMPLATE: Fields = (
    *_ID,
    ("family", "H"),
    ("pad_family", "2x"),
    ("saddr", "16s"),
    ("reqid", "I"),
    ("mode", "B"),
    ("share", "B"),
    ("optional", "B"),
    ("pad_optional", "1x"),
    ("aalgos", "I"),
    ("ealgos", "I"),
    ("calgos", "I"),
)
"""xfrm_user_tmpl; the TMPL attribute is a row of them."""
MIGRATION: Fields = (
    ("old_daddr", "16s"),
    ("old_saddr", "16s"),
    ("new_daddr", "16s"),
    ("new_saddr", "16s"),
    ("proto", "B"),
    ("mode", "B"),
    ("reserved", "H"),
    ("reqid", "I"),
    ("old_family", "H"),
    ("new_family", "H"),
)
"""xfrm_user_migrate: the MIGRATE attribute."""
MESSAGES: dict[Kind, type[_Message]] = {
    Kind.NEWSA: usersa_info,
    Kind.UPDSA: usersa_info,
    Kind.DELSA: usersa_id,
    Kind.GETSA: usersa_id,
    Kind.NEWPOLICY: userpolicy_info,
    Kind.UPDPOLICY: userpolicy_info,
    Kind.DELPOLICY: userpolicy_id,
    Kind.GETPOLICY: userpolicy_id,
    Kind.MIGRATE: userpolicy_id,
    Kind.EXPIRE: user_expire,
    Kind.MAPPING: user_mapping,
}


class Layout:
    """A declaration made into one `struct`: it packs a message in microseconds, pyroute2 in a hundred and more."""

    def __init__(self, fields: Fields) -> None:
        self._struct = struct.Struct("=" + "".join(layout.lstrip(">") for _, layout in fields))
        self._fields = [
            (name, b"" if layout.endswith("s") else 0, _SWAPS.get(layout))
            for name, layout in fields
            if not layout.endswith("x")
        ]

    def pack(self, values: Mapping[str, int | bytes]) -> bytes:
        """What is not given is zero."""
        row = []
        for name, default, swap in self._fields:
            value = values.get(name, default)
            row.append(swap(value) if swap is not None else value)
        return self._struct.pack(*row)


def offset(fields: Fields, wanted: str) -> int:
    """Where a field is in a structure; its whole size for the name `end`."""
    at = 0
    for name, layout in fields:
        if name == wanted:
            break
        at += struct.calcsize("=" + layout.lstrip(">"))
    return at


_SWAPS: dict[str, Callable[[Any], int]] = {">H": socket.htons, ">I": socket.htonl}
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_LAYOUTS = {kind: Layout(message.fields) for kind, message in MESSAGES.items()}
_ATTRIBUTES = {name: number for number, (name, _) in enumerate(_NLA_MAP)}
TEMPLATE_LAYOUT = Layout(TEMPLATE)
MIGRATION_LAYOUT = Layout(MIGRATION)
AEAD_LAYOUT = Layout(_Attributes.aead.fields[:-1])
"""Without the key, which follows; that of integrity is laid out the same way."""
CRYPT_LAYOUT = Layout((("name", "64s"), ("key_bits", "I")))
"""xfrm_algo without the key, which follows."""
ENCAP_LAYOUT = Layout(_Attributes.encap.fields)


def encoded(
    kind: Kind, flags: int, sequence: int, fields: Mapping[str, int | bytes], attributes: Sequence[tuple[str, bytes]]
) -> bytes:
    """A whole message, padded to four bytes; attributes by name, packed."""
    body = _LAYOUTS[kind].pack(fields)
    body += bytes(-len(body) % 4)
    for name, data in attributes:
        body += _ATTRIBUTE.pack(_ATTRIBUTE.size + len(data), _ATTRIBUTES[name]) + data + bytes(-len(data) % 4)
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, sequence, 0) + body


def decoded(kind: Kind, data: bytes) -> Any:
    """A message of the kernel's, header included, by field name; attributes by `get_attr`."""
    message = MESSAGES[kind](data)
    message.decode()
    return message
