"""A log of ESP keys for people who look at their own wire: off unless P2PVPN_KEYLOG names a directory, and loud.

One JSON object a line: kind, spi, suite, key (keying material in hex, salt last) and esn, one line per direction.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from p2pvpn.core.child import ChildSa
from p2pvpn.core.secret import Secret

log = logging.getLogger(__name__)

VARIABLE = "P2PVPN_KEYLOG"


class KeyLogFile:
    """Appends to one file that only its owner can read."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / f"esp-{os.getpid()}.jsonl"
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        self._file = os.fdopen(descriptor, "a", encoding="ascii")
        log.warning("KEYS ARE LOGGED to %s: who reads it reads the traffic; unset %s to end this", self._path, VARIABLE)

    @classmethod
    def from_environment(cls) -> KeyLogFile | None:
        """The log that the environment asks for, or None."""
        directory = os.environ.get(VARIABLE)
        return cls(Path(directory)) if directory else None

    def child(self, child: ChildSa) -> None:
        """Both directions of a Child SA."""
        self._line(child.spi_in, child.key_in, child)
        self._line(child.spi_out, child.key_out, child)

    def _line(self, spi: int, key: Secret, child: ChildSa) -> None:
        entry = {"kind": "esp", "spi": spi, "suite": child.suite.name, "key": key.reveal().hex(), "esn": child.esn}
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
