"""The daemon: puts the engine on this machine's ports, and answers the command line.

One daemon owns the UDP port, the state directory and the control socket of a machine, for any number of networks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path

from p2pvpn.core.errors import LocalError
from p2pvpn.identity.profile import Profile
from p2pvpn.mesh.events import MeshEvent
from p2pvpn.mesh.node import Node

from . import planes, supervise
from .control import ControlServer, control_path
from .forwarder import UserForwarder
from .guard import Guard
from .keylog import KeyLogFile
from .netlink import Netlink
from .requests import Requests
from .resolver import SystemResolver
from .service import NetworkService
from .store import NetworkDirectory, StateLock, list_networks, runtime_root, state_root
from .underlay import Underlay

log = logging.getLogger("p2pvpn")

DEFAULT_PORT = 4500
"""UDP: IKE and ESP behind NATs (RFC 3948 section 4)."""
MACHINE_FILE = "machine.json"
START_S = 20.0
"""How long `up` waits for the daemon to answer; it takes about a second."""
EVENTS_PER_S = 50
"""Events that reach the log; a storm is counted, not written."""


def log_path() -> Path:
    return state_root() / "daemon.log"


class Daemon:
    """Everything that runs on one machine."""

    def __init__(self, port: int | None, plane: planes.Wanted = planes.Wanted.AUTO) -> None:
        self._asked_port = port
        self._asked_plane = plane
        self._started = time.monotonic()
        self._services: dict[str, NetworkService] = {}
        self._stop = asyncio.Event()
        self._quota = (0.0, 0)

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises LocalError when something that is needed cannot be had."""
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(StateLock(state_root()))
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._stop.set)
            await self._open(stack)
            supervise.notify("READY=1")
            networks, plane = len(self._services), self.plane_choice.plane
            log.info("up on UDP port %d with %d network(s), %s plane", self.underlay.port, networks, plane)
            await self._stop.wait()
            supervise.notify("STOPPING=1")
            log.info("going down")

    async def _open(self, stack: contextlib.AsyncExitStack) -> None:
        profiles = self._load_all()
        netlink = await Netlink.open()
        stack.callback(netlink.close)
        self.underlay = await Underlay.open(netlink, self._choose_port(list(profiles.values())))
        stack.callback(self.underlay.close)
        self._guard = Guard()
        stack.push_async_callback(self._guard.close)
        self.plane_choice = planes.choose(self._asked_plane)
        self.plane = planes.make(self.plane_choice, self.underlay.esp_sockets, netlink, self._guard)
        await self.plane.start()
        stack.push_async_callback(self.plane.stop)
        self.plane.on_died = self._plane_died
        forwarder = UserForwarder()
        await forwarder.start()
        stack.push_async_callback(forwarder.close)
        key_log = KeyLogFile.from_environment()
        if key_log is not None:
            stack.callback(key_log.close)
        self.control = ControlServer(control_path(), Requests(self).handle)
        self.node = Node(
            underlay=self.underlay,
            plane=self.plane,
            forwarder=forwarder,
            resolver=SystemResolver(),
            entropy=os.urandom,
            wall=time.time,
            emit=self._on_event,
            key_log=key_log,
        )
        await self.node.start()
        stack.push_async_callback(self.node.close)
        stack.push_async_callback(self._close_services)
        for directory, profile in profiles.items():
            await self._start_network(directory, profile)
        await self.control.start()
        stack.push_async_callback(self.control.close)

    @property
    def services(self) -> list[NetworkService]:
        return list(self._services.values())

    @property
    def up_s(self) -> float:
        return time.monotonic() - self._started

    async def reload(self) -> None:
        """Memberships on disk changed: start new networks, stop those that were left, take in new grants."""
        profiles = self._load_all()
        wanted = {profile.genesis.network_id.hex(): (directory, profile) for directory, profile in profiles.items()}
        for identifier in [known for known in self._services if known not in wanted]:
            await self._services.pop(identifier).close()
        for identifier, (directory, profile) in wanted.items():
            service = self._services.get(identifier)
            if service is not None and service.profile.chain == profile.chain:
                service.take_document(profile.document)
                continue
            if service is not None:
                await self._services.pop(identifier).close()
            await self._start_network(directory, profile)

    async def _start_network(self, directory: NetworkDirectory, profile: Profile) -> None:
        service = NetworkService(self.node, directory, profile)
        await service.open()
        self._services[profile.genesis.network_id.hex()] = service

    async def _close_services(self) -> None:
        for identifier in list(self._services):
            await self._services.pop(identifier).close()

    def _load_all(self) -> dict[NetworkDirectory, Profile]:
        """The profiles on disk; one that cannot be read is told of and left alone."""
        profiles = {}
        for directory in list_networks(state_root()):
            try:
                profiles[directory] = Profile.load(directory.open().read)
            except LocalError as problem:
                log.error("network %s is not brought up: %s", directory.name, problem)
        return profiles

    def _choose_port(self, profiles: list[Profile]) -> int:
        """What was asked for, else what the network says of us as a hub, else what was used before, else 4500."""
        if self._asked_port is not None:
            return self._asked_port
        for profile in profiles:
            entry = profile.document.hub(profile.key.peer_id)
            if entry is not None and (endpoints := entry.endpoints(DEFAULT_PORT)):
                return endpoints[0].port
        return DEFAULT_PORT

    def _plane_died(self) -> None:
        log.error("the plane that encrypts died; starting over")
        self.node.services.tasks.start(self._revive(), "revive the plane")

    async def _revive(self) -> None:
        await self.plane.start()
        await self.node.plane_died()

    def _on_event(self, event: MeshEvent) -> None:
        second, count = self._quota
        now = time.monotonic()
        if now - second >= 1.0:
            if count > EVENTS_PER_S:
                log.warning("%d more events in one second", count - EVENTS_PER_S)
            second, count = now, 0
        self._quota = (second, count + 1)
        if count < EVENTS_PER_S:
            log.info("%s", event)
        self.control.publish(event.as_dict())


def run_foreground(*, port: int | None, plane: str | None, verbose: bool) -> None:
    """Run the daemon in this process until it is told to stop. Raises LocalError."""
    level = logging.INFO if verbose or not sys.stderr.isatty() else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for noisy in ("asyncio", "pyroute2", "kademlia", "rpcudp"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if os.geteuid() != 0:
        raise LocalError("p2pvpn up needs root for its TUN device and routes", hint="try again with sudo")
    if not Path("/dev/net/tun").exists():
        raise LocalError("this machine has no /dev/net/tun", hint="load the module: modprobe tun")
    os.umask(0o077)
    asyncio.run(Daemon(port, planes.wanted(plane)).run())


# The command line's side.


def is_running() -> bool:
    """Whether a daemon answers at the control socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(control_path()))
        except OSError:
            return False
        return True


def start_background(*, port: int | None, plane: str | None = None) -> None:
    """Start the daemon under systemd or under our own supervisor, and wait until it answers. Raises LocalError."""
    if os.geteuid() != 0:
        raise LocalError("p2pvpn up needs root for its TUN device and routes", hint="try again with sudo")
    command = [sys.executable, "-m", "p2pvpn.cli.main", "up", "--foreground"]
    if port is not None:
        command += ["--port", str(port)]
    if plane is not None:
        command += ["--plane", plane]
    if supervise.has_systemd() or supervise.running(runtime_root()) is None:
        supervise.up(command, runtime_root(), log_path())
    deadline = time.monotonic() + START_S
    while not is_running():
        if time.monotonic() > deadline or (not supervise.has_systemd() and supervise.running(runtime_root()) is None):
            raise LocalError(f"the daemon does not come up: {_last_words()}", hint=f"its log is {log_path()}")
        time.sleep(0.05)


def stop_background() -> bool:
    """End the daemon; False when none ran. Raises LocalError."""
    return supervise.down(runtime_root())


def _last_words() -> str:
    """The last line of the log that says what is wrong."""
    try:
        lines = log_path().read_text(errors="replace").splitlines()
    except OSError:
        return "it wrote no log"
    return next((line for line in reversed(lines) if line.strip()), "it wrote no log")
