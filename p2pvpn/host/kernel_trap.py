"""The trap of the kernel plane: a TUN device that only packets without an SA reach, and the way back out.

    local or forwarded packet -> route to the TUN device -> is there an out policy of an SA?
          yes: ESP, the device never sees it        no: the device, the daemon, `on_trapped`
    later, the same packet    -> raw socket, in the name of its own source -> out policy -> ESP

Route look-up comes before policy look-up, which is why the device's routes stand for good and SAs override them. The
raw sockets are transparent: the kernel looks for the policy of the packet's source, whether that is ours or one that we
forwarded for, so nothing is ever written to the device and it needs no exceptions from policies.

Around the trap stand wide policies of low priority. None of them lets anything in that has no SA:

    in, fwd  from an overlay route                      block     (no SA of ours decrypted it)
    in, out  from an address of ours to one of ours     allow

Nothing may leave without an SA either when the daemon and its device are gone: routes that lead nowhere stand behind
those to the device. A policy could not tell the device's packets from others', as IPv6 looks policies up before it
knows the device.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import struct
from collections import Counter
from collections.abc import Callable, Sequence

from p2pvpn.core.address import IpAddress, IpNetwork
from p2pvpn.core.errors import LocalError
from p2pvpn.esp.inner import is_link_scoped

from .tun import Tun
from .xfrm import Action, Direction, Message, Pair, delete_policy, set_policy

SELF_PRIORITY = 100
SA_PRIORITY = 1000
"""Of the widest SA policy less 256 at most: the longer its prefixes, the sooner a policy is found."""
BLOCK_PRIORITY = 4000
BATCH = 64
"""Packets taken from the device per wake-up, so that a flood of trapped packets leaves the loop to others."""
SEND_BUFFER_BYTES = 4 << 20
"""Of a raw socket: what waited for one peer, with the kernel's overhead."""

_SO_SNDBUFFORCE = 32
_IP_PKTINFO, _IP_TRANSPARENT = 8, 19
_IPV6_TRANSPARENT = 75
_IN_PKTINFO = struct.Struct("=i4s4s")
_IN6_PKTINFO = struct.Struct("=16si")
_ANY = {4: ipaddress.ip_network("0.0.0.0/0"), 6: ipaddress.ip_network("::/0")}


class Trap:
    """The device of one network. `on_packet` gets what was trapped, `on_gone` is called when the device was removed."""

    def __init__(self, on_packet: Callable[[bytes], None], on_gone: Callable[[], None]) -> None:
        self.lost: Counter[str] = Counter()
        self._on_packet = on_packet
        self._on_gone = on_gone
        self._tun = Tun()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._tun.fd, self._read)

    @property
    def device(self) -> str:
        return self._tun.name

    def close(self) -> None:
        self._loop.remove_reader(self._tun.fd)
        self._tun.close()

    def _read(self) -> None:
        for number in range(BATCH):
            packet = self._tun.read()
            if packet is None:
                if number == 0 and self._tun.is_gone:
                    self._loop.remove_reader(self._tun.fd)
                    self._on_gone()
                return
            if len(packet) < 20 or packet[0] >> 4 not in (4, 6) or (packet[0] >> 4 == 6 and len(packet) < 40):
                self.lost["BAD_INNER"] += 1
            elif is_link_scoped(packet):
                self.lost["LINK_SCOPED"] += 1
            else:
                self._on_packet(packet)


class Reinjector:
    """Raw sockets that send whole inner packets in the name of their own source."""

    def __init__(self) -> None:
        self.lost: Counter[str] = Counter()
        self._sockets: dict[int, socket.socket] = {}
        for family, level, option in (
            (socket.AF_INET, socket.IPPROTO_IP, _IP_TRANSPARENT),
            (socket.AF_INET6, socket.IPPROTO_IPV6, _IPV6_TRANSPARENT),
        ):
            try:
                sock = socket.socket(family, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_RAW)
            except OSError:
                continue  # a machine without this family
            sock.setsockopt(level, option, 1)
            sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, SEND_BUFFER_BYTES)
            self._sockets[family] = sock
        if not self._sockets:
            raise LocalError("the kernel gives no raw sockets", hint="run as root")

    def close(self) -> None:
        for sock in self._sockets.values():
            sock.close()

    def send(self, packet: bytes) -> None:
        """Best effort: what the kernel does not take is counted."""
        if packet[0] >> 4 == 4:
            family, target = socket.AF_INET, (str(ipaddress.IPv4Address(packet[16:20])), 0)
            info = (socket.IPPROTO_IP, _IP_PKTINFO, _IN_PKTINFO.pack(0, packet[12:16], bytes(4)))
        else:
            family, target = socket.AF_INET6, (str(ipaddress.IPv6Address(packet[24:40])), 0)
            info = (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, _IN6_PKTINFO.pack(packet[8:24], 0))
        try:
            self._sockets[family].sendmsg([packet], [info], 0, target)
        except (OSError, KeyError):
            self.lost["kernel refused"] += 1


def wide_policies(addresses: Sequence[IpAddress], routes: Sequence[IpNetwork]) -> list[tuple[Message, Message]]:
    """The policies around a trap: each with the message that removes it."""
    rows: list[tuple[Pair, Direction, int, Action]] = []
    for one in addresses:
        for other in addresses:
            if one.version == other.version:
                pair = Pair(ipaddress.ip_network(one), ipaddress.ip_network(other))
                rows += [(pair, way, SELF_PRIORITY, Action.ALLOW) for way in (Direction.IN, Direction.OUT)]
    for route in routes:
        pair = Pair(route, _ANY[route.version])
        rows += [(pair, way, BLOCK_PRIORITY, Action.BLOCK) for way in (Direction.IN, Direction.FORWARD)]
    return [
        (set_policy(pair, direction, priority, action=action), delete_policy(pair, direction))
        for pair, direction, priority, action in rows
    ]
