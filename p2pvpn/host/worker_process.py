"""The worker process of the user plane: `python -m p2pvpn.host.worker_process KIND PARENT CONTROL ESP ..`.

It inherits the descriptors. KIND is `plain` for the loop that takes one packet after the other, or `auto` for the
batched one where numpy is installed; numpy is imported here only then.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys

from .worker import Worker

PLAIN, AUTO = "plain", "auto"
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4


def worker_class(kind: str) -> type[Worker]:
    """The worker of this kind."""
    if kind == AUTO:
        with contextlib.suppress(ImportError):
            from .batch_worker import BatchWorker

            return BatchWorker
    return Worker


def _die_with_parent(parent: int) -> None:
    """Be killed when the daemon's main thread ends, and leave no core dump with keys in it."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0 or prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:
        raise SystemExit(0)


def main(arguments: list[str]) -> None:
    """Arguments: the kind of worker, the daemon's pid, the control descriptor, the ESP descriptors."""
    kind, *numbers = arguments
    parent, control, *esp = map(int, numbers)
    _die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's interrupt is for the daemon, which ends us
    with contextlib.suppress(KeyboardInterrupt):
        worker_class(kind)(socket.socket(fileno=control), [socket.socket(fileno=fd) for fd in esp]).run()


if __name__ == "__main__":
    main(sys.argv[1:])
