"""What the owner of a machine set for it, in `machine.json` of the state directory: where it is reachable, and whether
routers are asked for ports.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from p2pvpn.core.address import Endpoint
from p2pvpn.core.errors import Fault, LocalError
from p2pvpn.punch.candidates import is_usable
from p2pvpn.punch.limits import LINK_LOCAL_IPV6

from .store import DirectoryStore

FILE = "machine.json"
MAX_DECLARED = 4
"""Of the 16 candidates that peers are told; a machine has one forwarded port per family, perhaps two."""


@dataclass(frozen=True, slots=True)
class MachineSettings:
    """`declared` are endpoints that somebody forwards to us; `port_mapping` lets us ask routers to do that."""

    declared: tuple[Endpoint, ...] = ()
    port_mapping: bool = True

    @classmethod
    def load(cls, root: Path) -> MachineSettings:
        """What is saved, or the defaults. Raises LocalError when the file is damaged."""
        path = root / FILE
        try:
            text = path.read_text()
        except FileNotFoundError:
            return cls()
        except OSError as problem:
            raise LocalError(f"cannot read {path}: {problem.strerror}", fault=Fault.STATE) from None
        try:
            content = json.loads(text)
            return cls(declared(content["declared"]), bool(content["port_mapping"]))
        except (ValueError, KeyError, TypeError, LocalError):
            raise LocalError(
                f"{path} is damaged", hint="delete it, and say p2pvpn up --declare again", fault=Fault.STATE
            ) from None

    def save(self, root: Path) -> None:
        """Raises LocalError."""
        content = {"declared": [str(endpoint) for endpoint in self.declared], "port_mapping": self.port_mapping}
        DirectoryStore(root).write(FILE, (json.dumps(content, indent=2) + os.linesep).encode())


def declared(texts: Iterable[str]) -> tuple[Endpoint, ...]:
    """Endpoints as a person writes them, `203.0.113.7:4500` or `[2001:db8::7]:4500`. Raises LocalError."""
    found = tuple(dict.fromkeys(_endpoint(text) for text in texts))
    if len(found) > MAX_DECLARED:
        raise LocalError(f"{len(found)} declared addresses; at most {MAX_DECLARED} are told", fault=Fault.REFUSED)
    return found


def _endpoint(text: str) -> Endpoint:
    hint = "write the router's public address and the port that it forwards, as 203.0.113.7:4500"
    try:
        endpoint = Endpoint.parse(text)
    except ValueError as problem:
        raise LocalError(f"cannot declare {text!r}: {problem}", hint=hint, fault=Fault.REFUSED) from None
    if not endpoint.port or not is_usable(endpoint.ip) or endpoint.ip.is_link_local or endpoint.ip in LINK_LOCAL_IPV6:
        raise LocalError(f"cannot declare {text}: no peer could use it", hint=hint, fault=Fault.REFUSED)
    return endpoint
