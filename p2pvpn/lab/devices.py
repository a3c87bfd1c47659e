"""Settings of network devices by ioctl(2), in the network namespace of the calling thread.

ip(8) and ethtool(8) would do, but a laboratory of many links starts them by the dozen, each a tenth of a second in
User-Mode Linux.
"""

from __future__ import annotations

import ctypes
import fcntl
import socket
import struct

_SIOCSIFFLAGS, _SIOCETHTOOL = 0x8914, 0x8946
_IFF_UP = 1
_OFFLOADS = (0x17, 0x1F, 0x24, 0x2C)
"""ETHTOOL_STXCSUM, ETHTOOL_STSO, ETHTOOL_SGSO, ETHTOOL_SGRO."""


def bring_up(device: str) -> None:
    """As `ip link set DEVICE up`. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH22x", device.encode(), _IFF_UP))


def without_offloads(device: str) -> None:
    """Packets leave it as a wire would carry them: whole, none larger than its MTU. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for command in _OFFLOADS:
            value = ctypes.create_string_buffer(struct.pack("=II", command, 0), 8)
            fcntl.ioctl(sock, _SIOCETHTOOL, struct.pack("16sP16x", device.encode(), ctypes.addressof(value)))
