"""What a NAT is, as coturn's `turnutils_natdiscovery` sees it (RFC 5780): a judge that nobody here wrote."""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

from p2pvpn.core.errors import LocalError

from .net import Lab, Node, running

SERVER_ADDRESSES = ("192.0.2.200", "192.0.2.201")
"""RFC 5780 tells address-dependent from address- and port-dependent with two addresses and two ports."""
START_S = 10.0
DISCOVERY_S = 30.0
"""The client waits 3 s for each answer that a filter keeps from it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Behaviours in the client's words: `Endpoint Independent`, `Address Dependent` or `Address and Port Dependent`."""

    mapping: str
    filtering: str


@contextlib.contextmanager
def stun_server(lab: Lab) -> Iterator[str]:
    """A public host with coturn's `turnserver` on two addresses meanwhile; its first address."""
    node = lab.public("stun", *SERVER_ADDRESSES)
    argv = ["turnserver", "-n", "--no-cli", "--stun-only", "--no-tls", "--no-dtls", "--no-tcp", "--log-file=stdout"]
    argv += [f"--listening-ip={address}" for address in SERVER_ADDRESSES] + ["--pidfile=/run/turnserver.pid"]
    quiet = subprocess.DEVNULL
    with running(node.popen(argv, stdout=quiet, stderr=quiet)) as server:
        _wait_for(node, server)
        yield SERVER_ADDRESSES[0]


def discover(node: Node, server: str) -> Verdict:
    """Ask the stranger. Raises LocalError with its words when it comes to no verdict."""
    text = node.run(["turnutils_natdiscovery", "-m", "-f", server], timeout_s=DISCOVERY_S).stdout
    found = {what.lower(): kind for kind, what in re.findall(r"NAT with (.+) (Mapping|Filtering)!", text)}
    if found.keys() != {"mapping", "filtering"}:
        raise LocalError(f"turnutils_natdiscovery on {node} came to no verdict:\n{text}")
    return Verdict(**found)


def _wait_for(node: Node, server: subprocess.Popen[str]) -> None:
    """Until every address and both ports are bound."""
    deadline = time.monotonic() + START_S
    while node.run(["ss", "-Hlun"]).stdout.count("192.0.2.20") < 2 * len(SERVER_ADDRESSES):
        if server.poll() is not None or time.monotonic() > deadline:
            raise LocalError("turnserver does not start", hint="it is in Debian's package coturn")
        time.sleep(0.05)
