"""Which plane encrypts on this machine: the kernel's IPsec where it has what we need, our own worker elsewhere.

`auto` finds out by doing: it adds a throw-away ESP SA in this network namespace, and takes it away again. Policies and
netlink alone prove nothing, since kernels exist that have both and no ESP.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import NamedTuple

from p2pvpn.core.address import Endpoint
from p2pvpn.core.child import EspSuite
from p2pvpn.core.errors import Fault, LocalError
from p2pvpn.core.secret import Secret

from .guard import Guard
from .kernel_plane import KernelPlane
from .netlink import Netlink
from .user_plane import UserPlane
from .xfrm import REQIDS, Flow, State, Xfrm, delete_state, set_state

VARIABLE = "P2PVPN_PLANE"
"""Environment variable: auto, kernel or user."""

_UDP_ENCAP, _ESPINUDP = 100, 2
_PROBE_FLOW = Flow(Endpoint("127.0.0.1", 4500), Endpoint("127.0.0.1", 4500))


class Wanted(Enum):
    AUTO = "auto"
    KERNEL = "kernel"
    USER = "user"


class Choice(NamedTuple):
    """`plane` is `kernel` or `user`; `reason` says why it is not the kernel, if that was possible at all."""

    plane: str
    reason: str = ""


def wanted(asked: str | None, environment: Mapping[str, str] = os.environ) -> Wanted:
    """What the command line asks for, else the environment, else auto. Raises LocalError for another word."""
    word = asked or environment.get(VARIABLE) or Wanted.AUTO.value
    try:
        return Wanted(word)
    except ValueError:
        raise LocalError(f"there is no plane {word!r}", hint="it is one of auto, kernel and user") from None


def choose(what: Wanted) -> Choice:
    """Look what this network namespace can do. Raises LocalError when the kernel is asked for and cannot."""
    if what is Wanted.USER:
        return Choice("user")
    try:
        probe()
    except LocalError as problem:
        if what is Wanted.KERNEL:
            raise LocalError(
                f"this kernel cannot be the plane: {problem}",
                hint="modprobe esp4; or use --plane user",
                fault=Fault.MACHINE,
            ) from None
        return Choice("user", str(problem))
    return Choice("kernel")


def probe() -> None:
    """Add and remove an ESP SA, and hand a socket to the kernel. Raises LocalError with what it refused."""
    suite = EspSuite.AES_GCM_16_256
    spi = 0xC0000000 | int.from_bytes(os.urandom(4), "big") >> 2
    key = Secret(os.urandom(suite.keymat_bytes))
    state = State(_PROBE_FLOW, spi, REQIDS.start, suite, key, esn=False, inbound=True)
    kernel = Xfrm()
    try:
        kernel.request(set_state(state))
        kernel.request(delete_state(_PROBE_FLOW, spi))
    finally:
        kernel.close()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.setsockopt(socket.IPPROTO_UDP, _UDP_ENCAP, struct.pack("=i", _ESPINUDP))
        except OSError as error:
            raise LocalError(f"no ESP in UDP: {error.strerror}") from None


def clean_up() -> None:
    """Remove what the kernel plane of a daemon that was killed left, when another plane comes next."""
    try:
        kernel = Xfrm()
    except LocalError:
        return
    try:
        kernel.clean_up()
    finally:
        kernel.close()


def make(
    choice: Choice, esp_sockets: Sequence[socket.socket], netlink: Netlink, guard: Guard
) -> KernelPlane | UserPlane:
    """The plane, not yet started."""
    if choice.plane == "kernel":
        return KernelPlane(esp_sockets, netlink, guard)
    clean_up()
    return UserPlane(esp_sockets, netlink, guard)
