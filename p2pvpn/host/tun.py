"""A TUN device: whole IP packets in and out, without a header of its own (IFF_NO_PI).

The device lives as long as its descriptor, so it vanishes with the process that opened it. `read` and `write` are the
per-packet functions of the worker; `offload_tun` has the batched form.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from p2pvpn.core.errors import LocalError

DEVICE = "/dev/net/tun"
MIN_MTU = 1280
"""Every IPv6 link carries this (RFC 8200 section 5)."""
MAX_MTU = 1420
"""Over IPv6 an Ethernet frame of 1500 bytes has room for 1418, over IPv4 for 1438; a larger device would only cause
ICMP errors on every path."""
DEFAULT_MTU = 1400
READ_BYTES = 2048
"""More than any packet of a device of MAX_MTU."""

_TUNSETIFF, _TUNGETIFF = 0x400454CA, 0x800454D2
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_IFREQ = struct.Struct("=16sH22x")


class Tun:
    """An open device. `name` is what the kernel called it."""

    __slots__ = ("fd", "name")

    def __init__(self, pattern: str = "p2pvpn%d", flags: int = 0) -> None:
        """Make a device; `%d` in the pattern becomes the first free number. Raises LocalError. `flags` are added to
        those of TUNSETIFF."""
        try:
            self.fd = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise LocalError(f"{DEVICE}: {error.strerror}", hint="modprobe tun; run as root") from None
        request = _IFREQ.pack(pattern.encode(), _IFF_TUN | _IFF_NO_PI | flags)
        try:
            answer = fcntl.ioctl(self.fd, _TUNSETIFF, request)
        except OSError as error:
            os.close(self.fd)
            hint = "run as root" if error.errno == errno.EPERM else ""
            raise LocalError(f"making a TUN device: {error.strerror}", hint=hint) from None
        self.name = answer[:16].rstrip(b"\0").decode()

    def read(self) -> bytes | None:
        """The next packet that the kernel routed here, or None when there is none now."""
        try:
            return os.read(self.fd, READ_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            if self.is_removed(error):
                return None
            raise

    def write(self, packet: bytes) -> bool:
        """Give the kernel a packet as if it came in by the device; False when it would not take it."""
        try:
            os.write(self.fd, packet)
        except OSError:
            return False
        return True

    @staticmethod
    def is_removed(error: OSError) -> bool:
        """Whether an error of reading says that the device is being removed."""
        return error.errno in (errno.EBADFD, errno.EIO)

    @property
    def is_gone(self) -> bool:
        """Whether somebody removed the device."""
        try:
            fcntl.ioctl(self.fd, _TUNGETIFF, bytes(_IFREQ.size))
        except OSError:
            return True
        return False

    def close(self) -> None:
        os.close(self.fd)
