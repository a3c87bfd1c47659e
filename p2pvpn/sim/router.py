"""A router between a LAN and the segment above it: a NAT for IPv4 and a stateful firewall for IPv6, or plain routing.

It can be changed while the world runs, as real lines and boxes are: `flush`, `replace_nat`, `renumber`, `blocks_udp`.
"""

from __future__ import annotations

import contextvars
import ipaddress
from collections.abc import Iterable

from p2pvpn.core.address import Endpoint
from p2pvpn.core.errors import LocalError

from .internet import ACCESS, Datagram, Fate, Interface, Quality, Segment
from .nat import Firewall, Nat, NatKind
from .portmap import PCP_PORT, Forwards, PcpServer


class Router:
    """The gateway of `lan`, attached to `above` by its line.

    `outside` holds its addresses above; the IPv4 ones are the NAT's public addresses. Without a NAT the LAN's IPv4
    prefixes are announced above; IPv6 prefixes always are. `blocks_udp` drops every datagram that would pass. With
    `pcp` the router maps ports for those who ask.
    """

    context: contextvars.Context | None = None

    def __init__(
        self,
        name: str,
        lan: Segment,
        above: Segment,
        *,
        inside: Iterable[str],
        outside: Iterable[str],
        nat: NatKind | None,
        firewall: Firewall | None = None,
        line: Quality = ACCESS,
        blocks_udp: bool = False,
        pcp: bool = False,
    ) -> None:
        self.name = name
        self.blocks_udp = blocks_udp
        self.only_udp_port: int | None = None
        """If given, UDP passes to and from this port of the outside world, and no other."""
        self.portal = ""
        """The address of a captive portal that answers all TCP, until somebody logs in."""
        self.firewall = firewall
        self._internet = above.internet
        self.inside = Interface(self, lan, [ipaddress.ip_address(address) for address in inside], Quality())
        self.outside = Interface(self, above, [ipaddress.ip_address(address) for address in outside], line)
        self.forwards = Forwards()
        self.pcp = PcpServer(self.forwards, lambda: self._public()[0], self._is_free) if pcp else None
        self.nat = None if nat is None else self._new_nat(nat)
        lan.gateway = self.inside
        for prefix in lan.prefixes:
            if nat is None or prefix.version == 6:
                above.route(prefix, self.outside)

    def receive(self, interface: Interface, datagram: Datagram) -> None:
        """Translate or filter a datagram, and pass it on."""
        remote = datagram.destination if interface is self.inside else datagram.source
        if self.blocks_udp or (self.only_udp_port is not None and remote.port != self.only_udp_port):
            self._filter(datagram)
        elif interface is self.inside:
            self._receive_inside(datagram)
        else:
            self._receive_outside(datagram)

    def _receive_inside(self, datagram: Datagram) -> None:
        source, destination, data = datagram
        now = self._internet.loop.instant
        if destination.host in self.inside.hosts:
            self._serve(datagram, now)
        elif destination.is_ipv6 or self.nat is None:
            if destination.is_ipv6 and self.firewall is not None:
                self.firewall.pass_out(source, destination, now)
            self.outside.send(datagram)
        elif destination.host in self.nat.public:
            ends = self._hairpin(self.nat, source, destination, now)
            if ends is None:
                self._filter(datagram)
            else:
                self.inside.send(Datagram(ends[0], ends[1], data))
        else:
            external = self._leaves_as(self.nat, source, destination, now)
            if external is None:
                self._filter(datagram)
            else:
                self.outside.send(Datagram(external, destination, data))

    def _receive_outside(self, datagram: Datagram) -> None:
        source, destination, data = datagram
        now = self._internet.loop.instant
        if destination.is_ipv6 or self.nat is None:
            if destination.is_ipv6 and self.firewall is not None and not self.firewall.admits(source, destination, now):
                self._filter(datagram)
            else:
                self.inside.send(datagram)
            return
        inside = self.forwards.translate_in(source, destination, now)
        inside = inside or self.nat.translate_in(source, destination, now)
        if inside is None:
            self._filter(datagram)
        else:
            self.inside.send(Datagram(source, inside, data))

    def _leaves_as(self, nat: Nat, source: Endpoint, remote: Endpoint, now: float) -> Endpoint | None:
        return self.forwards.translate_out(source, remote, now) or nat.translate_out(source, remote, now)

    def _hairpin(self, nat: Nat, source: Endpoint, external: Endpoint, now: float) -> tuple[Endpoint, Endpoint] | None:
        if self.forwards.owner(external, now) is None:
            return nat.translate_hairpin(source, external, now)
        seen_as = self._leaves_as(nat, source, external, now) if nat.kind.hairpin else None
        inside = None if seen_as is None else self.forwards.translate_in(seen_as, external, now)
        return None if seen_as is None or inside is None else (seen_as, inside)

    def _serve(self, datagram: Datagram, now: float) -> None:
        """A datagram for the router itself."""
        source, destination, data = datagram
        answer = self.pcp.handle(source, data, now) if self.pcp is not None and destination.port == PCP_PORT else None
        if answer is None:
            self._filter(datagram)
        else:
            self.inside.send(Datagram(destination, source, answer))

    def _is_free(self, external: Endpoint, inside: Endpoint) -> bool:
        return self.nat is None or self.nat.serves(external, inside, self._internet.loop.instant)

    def _filter(self, datagram: Datagram) -> None:
        self._internet.note(self._internet.loop.instant, self.name, self.name, datagram, Fate.FILTERED)

    def flush(self) -> None:
        """Forget all mappings and permits, as a power cut does."""
        if self.nat is not None:
            self.nat.flush()
        if self.pcp is not None:
            self.pcp.restart(self._internet.loop.instant)
        if self.firewall is not None:
            self.firewall.flush()

    def replace_nat(self, kind: NatKind) -> None:
        """Another box at the same public address: other behaviour, no memory. Raises LocalError without a NAT."""
        if self.nat is None:
            raise LocalError(f"{self.name} has no NAT to replace")
        self.nat = self._new_nat(kind)

    def renumber(self, *addresses: str) -> None:
        """The provider gives the line other addresses; the NAT starts empty on the new IPv4 ones."""
        self.outside.readdress(*addresses)
        if self.nat is not None:
            self.nat = self._new_nat(self.nat.kind)

    def _new_nat(self, kind: NatKind) -> Nat:
        loop = self._internet.loop
        if self.pcp is not None:
            self.pcp.restart(loop.instant)
        nat = Nat(self._public(), kind, self._internet.draw(f"nat/{self.name}/{loop.elapsed}"))
        nat.is_taken = lambda external: self.forwards.owner(external, loop.instant) is not None
        return nat

    def _public(self) -> list[str]:
        return [str(address) for address in self.outside.addresses if address.version == 4]
