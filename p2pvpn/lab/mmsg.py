"""Several datagrams by one system call: sendmmsg(2) and recvmmsg(2), which Python's socket module does not have.

A generator that pays for one system call per packet competes with what it measures, most of all in User-Mode Linux,
where a call takes 40 microseconds.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Sequence

MSG_DONTWAIT = 0x40


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Message(ctypes.Structure):
    """struct msghdr."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint),
        ("iov", ctypes.POINTER(_Iovec)),
        ("iov_length", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Header(ctypes.Structure):
    """struct mmsghdr."""

    _fields_ = (("message", _Message), ("went", ctypes.c_uint))


_libc = ctypes.CDLL(None, use_errno=True)


class Batch:
    """Room for `count` datagrams of at most `size` bytes to and from a non-blocking socket; `target` gets them."""

    def __init__(self, sock: socket.socket, target: tuple[str, int], count: int, size: int) -> None:
        self._sock = sock
        address = _address(sock.family, *target)
        self._target = ctypes.create_string_buffer(address, len(address))
        self._count, self._size = count, size
        self._buffer = (ctypes.c_char * (count * size))()
        self._view = memoryview(self._buffer).cast("B")
        self._pieces = (_Iovec * count)()
        self._headers = (_Header * count)()
        for number in range(count):
            self._pieces[number].base = ctypes.addressof(self._buffer) + number * size
            self._headers[number].message.iov = ctypes.pointer(self._pieces[number])
            self._headers[number].message.iov_length = 1

    def send(self, datagrams: Sequence[bytes]) -> int:
        """How many of the first were taken, at least one of them; raises OSError for what the first met."""
        for number, data in enumerate(datagrams[: self._count]):
            self._view[number * self._size : number * self._size + len(data)] = data
            self._pieces[number].length = len(data)
            self._headers[number].message.name = ctypes.addressof(self._target)
            self._headers[number].message.name_length = len(self._target)
        return self._call("sendmmsg", min(len(datagrams), self._count), MSG_DONTWAIT)

    def receive(self) -> list[bytes]:
        """What waits, as much as there is room for. Raises OSError: BlockingIOError when nothing does."""
        for number in range(self._count):
            self._pieces[number].length = self._size
            self._headers[number].message.name, self._headers[number].message.name_length = None, 0
        came = self._call("recvmmsg", self._count, MSG_DONTWAIT, None)
        return [
            bytes(self._view[number * self._size : number * self._size + self._headers[number].went])
            for number in range(came)
        ]

    def _call(self, name: str, count: int, *arguments: object) -> int:
        done: int = getattr(_libc, name)(self._sock.fileno(), self._headers, count, *arguments)
        if done < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return done


def _address(family: int, host: str, port: int) -> bytes:
    """struct sockaddr_in or sockaddr_in6."""
    packed = socket.inet_pton(family, host)
    if family == socket.AF_INET6:
        return struct.pack("=H", family) + struct.pack("!HI16sI", port, 0, packed, 0)
    return struct.pack("=H", family) + struct.pack("!H4s8x", port, packed)
