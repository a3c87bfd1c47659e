"""The daemon: puts the engine on this machine's ports, and answers the command line.

One daemon owns the UDP port, the state directory and the control socket of a machine, for any number of networks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time

from p2pvpn.core.errors import LocalError, P2pvpnError
from p2pvpn.identity.profile import Profile
from p2pvpn.mesh.events import MeshEvent
from p2pvpn.mesh.node import Node

from . import background, membership, planes, supervise
from .control import ControlServer, control_path
from .forwarder import UserForwarder
from .guard import Guard
from .keylog import KeyLogFile
from .listeners import Listeners
from .netlink import Netlink
from .portmap import PortMapper
from .requests import Requests
from .resolver import SystemResolver
from .service import NetworkService, Problem
from .settings import MachineSettings
from .store import NetworkDirectory, StateLock, list_networks, state_root
from .streams import HostStreams
from .underlay import Underlay

log = logging.getLogger("p2pvpn")

DEFAULT_PORT = 4500
"""UDP: IKE and ESP behind NATs (RFC 3948 section 4)."""
REVIVE_FIRST_S, REVIVE_MAX_S = 1.0, 30.0
"""Pauses between attempts to start a plane that died."""
EVENTS_PER_S = 50
"""Events that reach the log; a storm is counted, not written."""


class Daemon:
    """Everything that runs on one machine."""

    def __init__(self, port: int | None, plane: planes.Wanted = planes.Wanted.AUTO) -> None:
        self._asked_port = port
        self._asked_plane = plane
        self._started = time.monotonic()
        self._services: dict[str, NetworkService] = {}
        self.problems: list[Problem] = []
        self._stop = asyncio.Event()
        self._failure: LocalError | None = None
        self._quota = (0.0, 0)
        self.key_log: KeyLogFile | None = None

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Raises LocalError when something that is needed cannot be had (any more)."""
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
        if self._failure is not None:
            raise self._failure

    async def _open(self, stack: contextlib.AsyncExitStack) -> None:
        profiles = self._load_all()
        netlink = await Netlink.open()
        stack.callback(netlink.close)
        self.underlay = await Underlay.open(netlink, self._choose_port(list(profiles.values())))
        stack.callback(self.underlay.close)
        self._guard = Guard()
        await self._guard.clear()
        stack.push_async_callback(self._guard.close)
        self.plane_choice = planes.choose(self._asked_plane)
        self.plane = planes.make(self.plane_choice, self.underlay.esp_sockets, netlink, self._guard)
        self.plane.extra_socket = self.underlay.esp_at
        await self.plane.start()
        stack.push_async_callback(self.plane.stop)
        self.plane.on_died = self._plane_died
        forwarder = UserForwarder()
        await forwarder.start()
        stack.push_async_callback(forwarder.close)
        settings = MachineSettings.load(state_root())
        self._mapper = PortMapper(netlink, is_on=settings.port_mapping)
        stack.push_async_callback(self._mapper.close)
        key_log = self.key_log = KeyLogFile.from_environment()
        if key_log is not None:
            stack.callback(key_log.close)
        streams = HostStreams(self.underlay.port)
        stack.callback(streams.close_all)
        stack.enter_context(streams.watching(netlink))
        self._listeners = Listeners(streams)
        self.control = ControlServer(control_path(), Requests(self).handle)
        self.node = Node(
            underlay=self.underlay,
            plane=self.plane,
            forwarder=forwarder,
            streams=streams if self.plane.takes_streams else None,
            resolver=SystemResolver(),
            entropy=os.urandom,
            wall=time.time,
            emit=self._on_event,
            key_log=key_log,
            port_mapper=self._mapper,
        )
        self.node.declare(settings.declared)
        await self.node.start()
        stack.push_async_callback(self.node.close)
        stack.push_async_callback(self._close_services)
        for directory, profile in profiles.items():
            await self._start_network(directory, profile)
        if self.problems and not self._services:
            raise self.problems[0].error  # whoever starts us hears of it; a part of the networks is better than none
        await self.control.start()
        stack.push_async_callback(self.control.close)

    @property
    def services(self) -> list[NetworkService]:
        return list(self._services.values())

    @property
    def up_s(self) -> float:
        return time.monotonic() - self._started

    async def reload(self) -> None:
        """Memberships or settings on disk changed: start new networks, stop those that were left, take in new grants.

        What is in the way of one is in `problems` then.
        """
        settings = MachineSettings.load(state_root())
        self.node.declare(settings.declared)
        if settings.port_mapping != self._mapper.is_on:
            await self._mapper.turn(on=settings.port_mapping)
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
        """Bring one up; what is in its way is noted, and the others go on."""
        try:
            service = NetworkService(self.node, self._listeners, directory, profile)
            await service.open()
        except P2pvpnError as problem:
            self._note(directory, problem)
            return
        self._services[profile.genesis.network_id.hex()] = service

    def _note(self, directory: NetworkDirectory, problem: P2pvpnError) -> None:
        log.error("network %s is not brought up: %s", directory.name, problem)
        self.problems.append(Problem(directory.name, problem))

    async def _close_services(self) -> None:
        for identifier in list(self._services):
            await self._services.pop(identifier).close()

    def _load_all(self) -> dict[NetworkDirectory, Profile]:
        """The profiles on disk; one that cannot be read is told of and left alone."""
        self.problems = []
        profiles = {}
        for directory in list_networks(state_root()):
            try:
                profiles[directory] = membership.load(directory)
            except LocalError as problem:
                self._note(directory, problem)
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
        pause_s = REVIVE_FIRST_S
        while True:
            try:
                await self.plane.start()
                break
            except LocalError as problem:
                log.error("the plane does not start, once more in %g s: %s", pause_s, problem)
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, REVIVE_MAX_S)
        try:
            await self.node.plane_died()
        except LocalError as problem:  # its devices cannot be made again: whoever supervises us starts us afresh
            self._failure = problem
            self._stop.set()

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
    """Run the daemon in this process until it is told to stop. Raises P2pvpnError, and leaves word of it."""
    level = logging.INFO if verbose or not sys.stderr.isatty() else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for noisy in ("asyncio", "pyroute2", "kademlia", "rpcudp"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        background.require_able()
        os.umask(0o077)
        asyncio.run(Daemon(port, planes.wanted(plane)).run())
    except P2pvpnError as problem:
        background.leave_failure(problem)
        raise
