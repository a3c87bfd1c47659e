"""Where UDP does not pass: tunnels to hubs over streams, relays over streams, and the way back when UDP works again.

    a hub is silent over UDP        a stream to it besides (`connect`), or its live SA moves to one (`paths`)
    a hub's tunnel is on a stream   so are the relays that it gives us: one stream each
    its relay ports are silent      the same, though the hub itself answers (firewalls that allow port 4500 alone)
    a hub answers STUN over UDP     its SA moves there; then each peer's relay that is on a stream is replaced by one
                                    that is not, and the SA moves over. Streams are closed when nothing is in flight

The requests to the hubs' STUN services, which every peer sends all the time, are what finds out that UDP works again:
every 25 s, and at once when the network changes.
"""

from __future__ import annotations

from ipaddress import IPv6Address

from p2pvpn.core.address import Endpoint, Path, any_local
from p2pvpn.identity.document import ENROL_PORT

from .attach import Attachments, Hub
from .calls import Invitation
from .connect import ConnectError
from .events import EventSink, Intercepted, UdpBlocked, UdpWorks
from .lines import Line
from .ports import Resolver, StreamFailed, StreamTrouble
from .relaying import RelayPath
from .services import Services
from .session import Session
from .standing import Standing

DEFAULT_HUB_PORT = 4500


class Fallback:
    """Of one network."""

    def __init__(
        self,
        *,
        services: Services,
        standing: Standing,
        resolver: Resolver,
        attachments: Attachments,
        sessions: dict[IPv6Address, Session],
        emit: EventSink,
    ) -> None:
        self._services = services
        self._standing = standing
        self._resolver = resolver
        self._attachments = attachments
        self._sessions = sessions
        self._emit = emit
        self._lines: dict[IPv6Address, list[Line]] = {}
        """Streams to the IKE port of each hub."""
        self._used: set[Line] = set()
        """Those that an SA was on."""
        self._by_tcp: set[IPv6Address] = set()
        """Hubs whose tunnel is, or was at last, on a stream."""
        self._silent_relays: dict[IPv6Address, float] = {}
        """Until when the relay ports of a hub are taken for silent over UDP."""
        self.warnings: dict[IPv6Address, Intercepted] = {}
        """What stands between us and a hub, until it is reached."""

    # Hubs.

    async def line_to(self, overlay: IPv6Address) -> Path:
        """A stream to a hub. Raises ConnectError."""
        hub = self._attachments.hub_at(overlay)
        if hub is None or self._standing.me.is_hub or not self._services.lines.can_open:
            raise ConnectError("TCP", "there is no way over TCP")
        try:
            is_alone = not self._attachments.connected()
            line = await self._services.lines.open(
                hub.peer_id, await self._ways(hub), self._lost, look_for_portal=is_alone
            )
        except StreamFailed as problem:
            self._warn(hub, problem)
            raise ConnectError("TCP", str(problem)) from None
        self._lines.setdefault(overlay, []).append(line)
        return any_local(line.stream, self._services.underlay.port)

    def tidy(self, overlay: IPv6Address, *, unused: bool = True) -> None:
        """Leave the streams to a hub that no SA is on (any more); those on which none was yet only if `unused`."""
        session = self._sessions.get(overlay)
        paths = {sa.path.remote for sa in session.sas.values()} if session is not None else set()
        kept: list[Line] = []
        for line in self._lines.pop(overlay, []):
            if line.stream in paths:
                self._used.add(line)
                kept.append(line)
            elif unused or line in self._used:
                self._used.discard(line)
                self._services.lines.leave(line.stream)
            else:
                kept.append(line)
        if kept:
            self._lines[overlay] = kept

    def changed(self, session: Session) -> None:
        """A session came up, moved or ended."""
        for sa in session.sas.values():
            if sa.path.remote.is_stream:
                self._services.lines.vouch(sa.path.remote)
        overlay = session.overlay
        if self._standing.me.is_hub or self._attachments.hub_at(overlay) is None or session.current is None:
            return
        self.tidy(overlay, unused=False)
        self.warnings.pop(overlay, None)
        is_stream = session.current.path.remote.is_stream
        if is_stream and overlay not in self._by_tcp:
            self._by_tcp.add(overlay)
            self._emit(UdpBlocked(self._standing.label, session.name))
        elif not is_stream and overlay in self._by_tcp:
            self._by_tcp.discard(overlay)
            self._emit(UdpWorks(self._standing.label, session.name))
            self._leave_relays()

    def heard(self, hub: Endpoint) -> None:
        """The STUN service of a hub answered over UDP."""
        for overlay, lines in self._lines.items():
            session = self._sessions.get(overlay)
            if session is None or all(line.udp != hub for line in lines):
                continue
            for sa in session.sas.values():
                if sa.initiator and sa.path.remote.is_stream:
                    session.paths.move(sa, any_local(hub, self._services.underlay.port), "UDP works")
        self._leave_relays()

    def _leave_relays(self) -> None:
        """Relays are on UDP as soon as the hubs are; a call that crossed that change may have brought another one."""
        hubs = [self._sessions.get(hub.overlay) for hub in self._attachments.connected()]
        is_any_on_stream = any(hub is not None and hub.transport == "tcp" for hub in hubs)
        if not is_any_on_stream and all(until < self._services.now for until in self._silent_relays.values()):
            for session in list(self._sessions.values()):
                session.paths.detour.leave()

    def _lost(self, line: Line) -> None:
        """A stream to a hub ended: another way for the SA on it, which may well be UDP."""
        for overlay, lines in self._lines.items():
            session = self._sessions.get(overlay)
            current = session.current if session is not None else None
            if session is not None and line in lines and current is not None and current.path.remote == line.stream:
                session.suspect()

    async def _ways(self, hub: Hub) -> list[tuple[Endpoint, Endpoint]]:
        """The TLS endpoints of a hub, each with the UDP endpoint for which it stands."""
        entry = self._standing.document.hub(hub.peer_id)
        ways: list[tuple[Endpoint, Endpoint]] = []
        for address in entry.addresses if entry is not None else ():
            for udp in await self._resolver.resolve(address, DEFAULT_HUB_PORT):
                ways.append((Endpoint(udp.host, entry.enrol_port if entry is not None else ENROL_PORT), udp))
        return ways

    def _warn(self, hub: Hub, problem: StreamFailed) -> None:
        if problem.trouble not in (StreamTrouble.PORTAL, StreamTrouble.INTERCEPTED):
            return
        is_portal = problem.trouble is StreamTrouble.PORTAL
        warning = Intercepted(self._standing.label, hub.name, is_portal, problem.detail)
        if self.warnings.get(hub.overlay) != warning:
            self.warnings[hub.overlay] = warning
            self._emit(warning)

    # Relays.

    async def relay(self, hub: IPv6Address, invitation: Invitation) -> RelayPath | None:
        """Our side of a relay of this hub over a stream, or None where UDP will do. Raises StreamFailed, WireError."""
        entry = self._attachments.hub_at(hub)
        if entry is None or not self._wants_stream(hub):
            return None
        ways = [
            (tcp, Endpoint(tcp.host, relay.port))
            for tcp, _ in await self._ways(entry)
            for relay in invitation.relays[:1]
        ]
        services = self._services
        line = await services.lines.open(
            entry.peer_id, ways, lambda line: services.relays.lose(line.stream), relay=True
        )
        try:
            return services.relays.bind_over(invitation.ticket, line.stream, line.udp)
        except BaseException:
            services.lines.leave(line.stream)
            raise

    def _wants_stream(self, hub: IPv6Address) -> bool:
        session = self._sessions.get(hub)
        current = session.current if session is not None else None
        if current is not None and current.path.remote.is_stream:
            return True
        return self._services.lines.can_open and self._silent_relays.get(hub, 0.0) > self._services.now

    def relay_silent(self, hub: IPv6Address, relay: RelayPath) -> None:
        """A relay port never answered. When the hub itself does, something stops UDP to all but its own port."""
        session = self._sessions.get(hub)
        if session is not None and session.connected and not session.is_doubtful and not relay.endpoint.is_stream:
            self._silent_relays[hub] = self._services.now + self._services.tuning.relay_silence_s

    def network_changed(self) -> None:
        """Another network, other filters."""
        self._silent_relays.clear()
