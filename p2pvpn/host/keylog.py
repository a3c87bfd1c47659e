"""A log of keys for people who look at their own wire: off unless P2PVPN_KEYLOG names a directory, and loud.

    esp-PID.jsonl            one JSON object a line and direction of a Child SA: kind, spi, suite, key (keying material
                             in hex, salt or integrity key last) and esn
    ikev2_decryption_table   Wireshark's tables: it reads them when the directory is that of its profile,
    esp_sa                   $XDG_CONFIG_HOME/wireshark for the default one

Several daemons may log to one directory: lines are appended whole.
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
    """Appends to files of `directory` that only their owner can read."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: dict[str, int] = {}
        self._children = f"esp-{os.getpid()}.jsonl"
        log.warning("KEYS ARE LOGGED to %s: who reads it reads the traffic; unset %s to end this", directory, VARIABLE)

    @classmethod
    def from_environment(cls) -> KeyLogFile | None:
        """The log that the environment asks for, or None."""
        directory = os.environ.get(VARIABLE)
        return cls(Path(directory)) if directory else None

    def child(self, child: ChildSa) -> None:
        """Both directions of a Child SA."""
        self._child(child.spi_in, child.key_in, child)
        self._child(child.spi_out, child.key_out, child)

    def line(self, table: str, line: str) -> None:
        """A line of one of Wireshark's tables."""
        self._append(table, line)

    def _child(self, spi: int, key: Secret, child: ChildSa) -> None:
        entry = {"kind": "esp", "spi": spi, "suite": child.suite.name, "key": key.reveal().hex(), "esn": child.esn}
        self._append(self._children, json.dumps(entry))

    def _append(self, name: str, line: str) -> None:
        descriptor = self._files.get(name)
        if descriptor is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
            descriptor = self._files[name] = os.open(self.directory / name, flags, 0o600)
        os.write(descriptor, line.encode("ascii") + b"\n")

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
