"""What is measured: two hosts on one wire, joined by our user plane, by nebula, or by nothing."""

from __future__ import annotations

import contextlib
import functools
import json
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.child import ChildSa, EspSuite
from p2pvpn.core.errors import LocalError
from p2pvpn.core.secret import Secret
from p2pvpn.core.selector import Selector
from p2pvpn.lab.net import Lab, Node, running

from .endpoint import NETWORK, encode_child

PORT = 4500
MTU = 1400
"""Of the device of every subject, so that all carry the same number of packets."""
UNDERLAY = ("192.0.2.1", "192.0.2.2")
OVERLAY = ("10.78.0.1", "10.78.0.2")
UP_S = 15.0
"""A tunnel that is not up by then never will be."""


@dataclass(frozen=True)
class Tunnel:
    """A tunnel that is up: the address to send to, from the first host, and the processes that do the work."""

    target: str
    pids: tuple[int, ...]


Subject = Callable[[Node, Node], contextlib.AbstractContextManager[Tunnel]]


def wire(lab: Lab) -> tuple[Node, Node]:
    """Two hosts on a veth pair as the kernel makes it, offloads and all."""
    one, other = lab.node("one"), lab.node("other")
    one.ip(f"link add wire type veth peer name wire netns {other}")
    for node, address in zip((one, other), UNDERLAY, strict=True):
        node.ip(f"addr add {address}/24 dev wire\nlink set wire up")
    return one, other


@contextlib.contextmanager
def bare(one: Node, other: Node) -> Iterator[Tunnel]:
    """No tunnel: what the machine could do."""
    yield Tunnel(UNDERLAY[1], ())


@contextlib.contextmanager
def p2pvpn(one: Node, other: Node, plane: str = "user") -> Iterator[Tunnel]:
    """Our user plane with an SA of random keys."""
    with contextlib.ExitStack() as stack:
        ends = [_End(stack, node, plane) for node in (one, other)]
        workers: list[int] = []
        for end, address in zip(ends, OVERLAY, strict=True):
            workers.append(end.ask("start"))
            end.ask("open", [address], ["10.78.0.0/24"], MTU)
        pair = _static_sas()
        for end, child in zip(ends, pair, strict=True):
            end.ask("install", encode_child(child))
        for end, child in zip(ends, pair, strict=True):
            end.ask("use", child.id)
        _wait_until_up(one)
        yield Tunnel(OVERLAY[1], tuple(workers))


class _End:
    """The endpoint process on a host."""

    def __init__(self, stack: contextlib.ExitStack, node: Node, plane: str) -> None:
        self.process = stack.enter_context(
            running(
                node.popen(
                    [sys.executable, "-m", "tools.bench.endpoint", str(PORT), plane],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    environment={"PYTHONPATH": str(FilePath(__file__).parents[2])},
                )
            )
        )
        self._answer()

    def ask(self, *command: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            message = json.loads(line)
            if "error" in message:
                raise LocalError(message["error"])
            if "answer" in message:
                return message["answer"]
        raise LocalError("the endpoint ended")


def _static_sas() -> tuple[ChildSa, ChildSa]:
    suite = EspSuite.AES_GCM_16_256
    forth, back = Secret(secrets.token_bytes(suite.keymat_bytes)), Secret(secrets.token_bytes(suite.keymat_bytes))
    near, far = ((Selector.of_address(address),) for address in OVERLAY)
    here, there = (Endpoint(address, PORT) for address in UNDERLAY)
    one, other = 0xC0000001, 0xC0000002
    return (
        ChildSa(1, NETWORK, suite, one, other, back, forth, near, far, Path(here, there), mtu=MTU),
        ChildSa(1, NETWORK, suite, other, one, forth, back, far, near, Path(there, here), mtu=MTU),
    )


@contextlib.contextmanager
def nebula(one: Node, other: Node) -> Iterator[Tunnel]:
    """Debian's nebula with AES and certificates of its own."""
    with contextlib.ExitStack() as stack:
        home = FilePath(stack.enter_context(tempfile.TemporaryDirectory()))
        _certify(home)
        processes = []
        for number, node in enumerate((one, other)):
            config = home / f"{node}.yml"
            config.write_text(json.dumps(_nebula_config(home, node, number)))  # YAML holds JSON
            process = node.popen(["nebula", "-config", str(config)], stdout=subprocess.DEVNULL)
            processes.append(stack.enter_context(running(process)))
        _wait_until_up(one)
        yield Tunnel(OVERLAY[1], tuple(process.pid for process in processes))


def _certify(home: FilePath) -> None:
    commands = [["ca", "-name", "bench", "-out-crt", "ca.crt", "-out-key", "ca.key"]]
    for name, address in zip(("one", "other"), OVERLAY, strict=True):
        commands.append(
            ["sign", "-name", name, "-ip", f"{address}/24", "-out-crt", f"{name}.crt", "-out-key", f"{name}.key"]
        )
    for command in commands:
        subprocess.run(["nebula-cert", *command], cwd=home, check=True)


def _nebula_config(home: FilePath, node: Node, number: int) -> dict[str, Any]:
    everything = [{"port": "any", "proto": "any", "host": "any"}]
    return {
        "pki": {"ca": str(home / "ca.crt"), "cert": str(home / f"{node}.crt"), "key": str(home / f"{node}.key")},
        "static_host_map": {OVERLAY[1]: [f"{UNDERLAY[1]}:4242"]},
        "lighthouse": {"am_lighthouse": number == 1, "interval": 60, "hosts": [OVERLAY[1]] if number == 0 else []},
        "listen": {"host": "0.0.0.0", "port": 4242, "batch": 64, "read_buffer": 4194304, "write_buffer": 4194304},  # noqa: S104
        "punchy": {"punch": False},
        "tun": {"disabled": False, "dev": "nebula", "mtu": MTU, "tx_queue": 1000},
        "cipher": "aes",
        "logging": {"level": "warning", "format": "text"},
        "firewall": {"outbound": everything, "inbound": everything},
    }


def _wait_until_up(one: Node) -> None:
    deadline = time.monotonic() + UP_S
    while not one.ping(OVERLAY[1], wait_s=0.5):
        if time.monotonic() > deadline:
            raise LocalError("the tunnel did not come up")


SUBJECTS: dict[str, Subject] = {
    "p2pvpn": p2pvpn,
    "plain": functools.partial(p2pvpn, plane="plain"),
    "nebula": nebula,
    "bare": bare,
}
"""`plain` is ours without numpy and offloads: one packet at a time."""
