"""A TUN device with the offloads of a network card: packets of up to 64 KB that the kernel has not cut or summed yet.

Every packet has a virtio header of 10 bytes before it (IFF_VNET_HDR; virtio 1.3 section 5.1.6.1, with the machine's own
byte order):

    | flags | GSO type | header length, 16 | segment size, 16 | checksum from, 16 | checksum at, 16 |

What is read may want its checksum completed (NEEDS_CSUM) and be cut (GSO type); what is written may be such a packet as
well. The device promises to do both, so the kernel leaves it to us.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Sequence

from p2pvpn.core.errors import LocalError

from .tun import Tun

HEADER = struct.Struct("=BBHHHH")
HEADER_BYTES = HEADER.size
NEEDS_CSUM = 1
GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP = 0, 1, 4, 5
GSO_ECN = 0x80
"""Added to the type of a TCP super-packet with CWR."""

_IFF_VNET_HDR = 0x4000
_TUNSETOFFLOAD = 0x400454D0
_CSUM, _TSO4, _TSO6, _TSO_ECN, _USO4, _USO6 = 0x01, 0x02, 0x04, 0x08, 0x20, 0x40
_TCP_OFFLOADS = _CSUM | _TSO4 | _TSO6 | _TSO_ECN
_ALL_OFFLOADS = _TCP_OFFLOADS | _USO4 | _USO6
_PLAIN = bytes(HEADER_BYTES)


class OffloadTun(Tun):
    """An open device. `joins_udp` is whether the kernel takes super-packets of UDP (Linux 6.2)."""

    __slots__ = ("joins_udp",)

    def __init__(self, pattern: str = "p2pvpn%d") -> None:
        """Make a device. Raises LocalError."""
        super().__init__(pattern, _IFF_VNET_HDR)
        self.joins_udp = True
        try:
            fcntl.ioctl(self.fd, _TUNSETOFFLOAD, _ALL_OFFLOADS)
        except OSError:
            self.joins_udp = False
            try:
                fcntl.ioctl(self.fd, _TUNSETOFFLOAD, _TCP_OFFLOADS)
            except OSError as error:
                self.close()
                raise LocalError(f"offloads of a TUN device: {error.strerror}") from None

    def read_many(self, slots: Sequence[Sequence[memoryview]], slot_bytes: int) -> tuple[list[int], int]:
        """Read what waits, each packet with its header into the buffers of the next slot: the sizes of those that fit
        the first buffer, of `slot_bytes`, and the size of one that did not, which is the last then (0: none)."""
        sizes: list[int] = []
        fd, readv, add = self.fd, os.readv, sizes.append
        try:
            for buffers in slots:
                size = readv(fd, buffers)
                if size > slot_bytes:
                    return sizes, size
                add(size)
        except BlockingIOError:
            pass
        except OSError as error:
            if not self.is_removed(error):
                raise
        return sizes, 0

    def write(self, packet: bytes) -> bool:
        """A single packet, whose checksums are complete; the kernel checks them."""
        try:
            os.writev(self.fd, (_PLAIN, packet))
        except OSError:
            return False
        return True

    def write_whole(self, data: memoryview) -> bool:
        """A packet with a virtio header before it."""
        try:
            os.write(self.fd, data)
        except OSError:
            return False
        return True
