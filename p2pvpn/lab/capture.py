"""Capture of every hop of the underlay: one process, a packet socket per link, a pcap file per link.

It sees what a wire would carry (the laboratory's links have no offloads), both directions, with the kernel's
timestamps. Frames that it could not keep up with are counted and told, so that "nothing was seen" means something.
The files grow while the capture runs, and can be read meanwhile.

    python -m p2pvpn.lab.capture DIRECTORY FD=LABEL ...     says `ready`, writes until SIGTERM, then DIRECTORY/dropped
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from p2pvpn.core.errors import LocalError, WireError
from p2pvpn.core.wire import Reader

from .net import Hop

ETH_P_ALL = 3
SO_RCVBUFFORCE = 33
SO_TIMESTAMPNS = 35
SOL_PACKET = 263
PACKET_STATISTICS = 6
SOCKET_BYTES = 64 << 20
"""Some seconds of the demo's traffic, for when this process gets no CPU."""
FRAME_BYTES = 65550
PCAP_MAGIC = 0xA1B23C4D
"""Timestamps in nanoseconds (draft-ietf-opsawg-pcap section 4)."""
LINKTYPE_ETHERNET = 1
PCAP_HEADER_BYTES = 24
READ_BURST = 256


class Frame(NamedTuple):
    """A captured Ethernet frame and when it passed, in seconds since the epoch."""

    at: float
    data: bytes


class Capture:
    """A running capture of those hops into `directory`."""

    def __init__(self, hops: Iterable[Hop], directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        with contextlib.ExitStack() as sockets:
            taps = {hop.label: sockets.enter_context(_tap(hop)) for hop in hops}
            specs = [f"{tap.fileno()}={label}" for label, tap in taps.items()]
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(directory), *specs],
                pass_fds=[tap.fileno() for tap in taps.values()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
            )
        self.files = {label: directory / f"{label}.pcap" for label in taps}
        """The pcap file of each hop."""
        assert self._process.stdout is not None
        with self._process.stdout as said:
            if said.readline() != b"ready\n":
                raise LocalError("the capture does not start")

    def close(self) -> None:
        """End it, whatever it has; again does no harm."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()

    def stop(self) -> None:
        """Write out the rest. Raises LocalError when frames were missed."""
        self.close()
        dropped = self.directory / "dropped"
        missed = int(dropped.read_text()) if dropped.exists() else -1
        if missed:
            raise LocalError(f"the capture missed {missed} frames" if missed > 0 else "the capture died")


def _tap(hop: Hop) -> socket.socket:
    tap = hop.node.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    tap.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, SOCKET_BYTES)
    tap.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    tap.setblocking(False)
    tap.bind((hop.interface, ETH_P_ALL))
    return tap


def read_pcap_untrusted(data: bytes) -> Iterator[Frame]:
    """The frames of a pcap file as written here. Raises WireError."""
    reader = Reader(data)
    magic, link = struct.unpack("<I16xI", reader.take(PCAP_HEADER_BYTES))
    if (magic, link) != (PCAP_MAGIC, LINKTYPE_ETHERNET):
        raise WireError("not a pcap file with nanoseconds and Ethernet frames")
    yield from read_records_untrusted(reader.rest())


def read_records_untrusted(data: bytes) -> Iterator[Frame]:
    """The frames of a later piece of such a file. Raises WireError."""
    reader = Reader(data)
    while reader.left:
        seconds, nanoseconds, length, _ = struct.unpack("<IIII", reader.take(16))
        yield Frame(seconds + nanoseconds / 1e9, reader.take(length))


def whole_records(data: bytes) -> int:
    """How many bytes of a piece of a growing file are whole records."""
    end = 0
    while end + 16 <= len(data):
        following = end + 16 + int.from_bytes(data[end + 8 : end + 12], "little")
        if following > len(data):
            break
        end = following
    return end


def write_pcap(frames: Iterable[Frame]) -> bytes:
    """The inverse of `read_pcap_untrusted`."""
    out = bytearray(struct.pack("<IHHiIII", PCAP_MAGIC, 2, 4, 0, 0, FRAME_BYTES, LINKTYPE_ETHERNET))
    for at, data in frames:
        seconds = int(at)
        out += struct.pack("<IIII", seconds, int((at - seconds) * 1e9), len(data), len(data)) + data
    return bytes(out)


def main(arguments: list[str]) -> None:
    directory = Path(arguments[0])
    files, taps = {}, {}
    for spec in arguments[1:]:
        number, _, label = spec.partition("=")
        tap = socket.socket(fileno=int(number))
        taps[tap.fileno()] = tap
        files[tap.fileno()] = (directory / f"{label}.pcap").open("wb", buffering=1 << 20)
        files[tap.fileno()].write(write_pcap([]))
    wake_r, wake_w = os.pipe()
    os.set_blocking(wake_w, False)
    signal.set_wakeup_fd(wake_w)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(-5)
    poller = select.epoll()
    for fd in (*taps, wake_r):
        poller.register(fd, select.EPOLLIN)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    stopping = False
    while not stopping:
        for fd, _ in poller.poll():
            if fd == wake_r:
                stopping = True
            else:
                _read(taps[fd], files[fd], READ_BURST)
                files[fd].flush()
    dropped = 0
    for fd, tap in taps.items():
        _read(tap, files[fd], sys.maxsize)
        files[fd].close()
        _, drops = struct.unpack("II", tap.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
        dropped += drops
    (directory / "dropped").write_text(str(dropped))


def _read(tap: socket.socket, file: BinaryIO, limit: int) -> None:
    write = file.write
    space = socket.CMSG_SPACE(16)
    with contextlib.suppress(BlockingIOError):
        for _ in range(limit):
            data, extra, _, _ = tap.recvmsg(FRAME_BYTES, space)
            seconds, nanoseconds = struct.unpack("qq", extra[0][2])
            write(struct.pack("<IIII", seconds, nanoseconds, len(data), len(data)))
            write(data)


if __name__ == "__main__":
    main(sys.argv[1:])
