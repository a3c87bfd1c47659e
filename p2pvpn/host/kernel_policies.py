"""Which SAs each pair of prefixes is accepted by and sent by, and the messages that tell the kernel's policies so.

    accept   `in` policies (and `fwd`, for what is forwarded) name every SA that may bring the packets
    use      the `out` policy names one
    forget   `out` goes back to the SA before, `in` and `fwd` name those left; without any, the policies go

Packets that no policy of an SA covers are left to the trap (`kernel_trap`).
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Iterable

from p2pvpn.core.address import IpAddress

from .kernel_child import InstalledChild, bypass_of, is_exact, priority
from .kernel_trap import SA_PRIORITY
from .xfrm import MAX_TEMPLATES, Direction, Message, Pair, delete_policy, set_policy

BYPASS_PRIORITY = SA_PRIORITY - 512
"""Before every SA's, whatever its prefixes."""


class PolicyBook:
    """The policies of all installed SAs. It sends nothing itself: its messages are to be sent in order."""

    def __init__(self) -> None:
        self._own: dict[str, frozenset[IpAddress]] = {}
        self._accepting: dict[Pair, list[InstalledChild]] = {}
        """By the pair in outbound direction: who is accepted, the newest last."""
        self._sending: dict[Pair, list[InstalledChild]] = {}
        """By pair: whom `use` was said of, the one in use last."""
        self._wide: dict[Pair, None] = {}
        """Those of them that are not about one address at each end and all protocols."""
        self._bypassed: Counter[Pair] = Counter()
        """How many SAs in transport mode need what carries them to pass in the clear."""

    def own(self, network: str, addresses: Iterable[IpAddress]) -> None:
        """This machine's addresses in a network; without any, the network is closed."""
        self._own[network] = frozenset(addresses)
        if not self._own[network]:
            del self._own[network]

    def accept(self, entry: InstalledChild) -> list[Message]:
        """Let in what the SA brings, beside those that stand."""
        for pair in entry.pairs:
            self._accepting.setdefault(pair, []).append(entry)
        return [*self._bypass(entry, more=1), *self.acceptance(entry)]

    def acceptance(self, entry: InstalledChild, *, moving: bool = False) -> list[Message]:
        """Policies that let in what the SAs of the entry's pairs bring, as many as there are now.

        With `moving` also what the entry's SA brings from any address: a packet that was decrypted before the move
        may be looked at after it.
        """
        messages = []
        for pair in entry.pairs:
            accepted = self._accepting.get(pair, [])[-(MAX_TEMPLATES - moving) :]
            several = len(accepted) + moving > 1
            templates = [other.template(other.flow_in, optional=several) for other in accepted]
            if moving:
                templates.append(entry.template(entry.flow_in.from_anywhere, optional=True))
            for direction in self._ways_in(entry, pair):
                if templates:
                    messages.append(set_policy(pair.reverse, direction, priority(pair), templates))
                else:
                    messages.append(delete_policy(pair.reverse, direction))
        return messages

    def use(self, entry: InstalledChild) -> list[Message]:
        """Send by the SA from now on."""
        messages = []
        for pair in entry.pairs:
            users = self._sending.setdefault(pair, [])
            if entry in users:
                users.remove(entry)
            users.append(entry)
            if not is_exact(pair):
                self._wide[pair] = None
            messages.append(send_by(pair, entry))
        return messages

    def forget(self, entry: InstalledChild) -> list[Message]:
        """Take the SA out of every policy that names it."""
        messages = []
        for pair in entry.pairs:
            users = self._sending.get(pair, [])
            if entry in users:
                was_in_use = users[-1] is entry
                users.remove(entry)
                if users and was_in_use:
                    messages.append(send_by(pair, users[-1]))
                elif not users:
                    messages.append(delete_policy(pair, Direction.OUT))
                    del self._sending[pair]
                    self._wide.pop(pair, None)
        for pair in entry.pairs:
            accepted = self._accepting[pair]
            accepted.remove(entry)
            if not accepted:
                del self._accepting[pair]
        return [*messages, *self.acceptance(entry), *self._bypass(entry, more=-1)]

    def naming(self, entry: InstalledChild) -> tuple[list[tuple[Pair, Direction]], list[tuple[Pair, Direction]]]:
        """The policies that name the SA: to send by it, and to let in what it brings."""
        sent = [(pair, Direction.OUT) for pair in entry.pairs if self._sending.get(pair, [None])[-1] is entry]
        taken = [(pair.reverse, way) for pair in entry.pairs for way in self._ways_in(entry, pair)]
        return sent, taken

    def covering(self, network: str, packet: bytes) -> Pair | None:
        """The pair of an SA in use that takes the packet."""
        if packet[0] >> 4 == 4:
            source, target = ipaddress.ip_address(packet[12:16]), ipaddress.ip_address(packet[16:20])
        else:
            source, target = ipaddress.ip_address(packet[8:24]), ipaddress.ip_address(packet[24:40])
        exact = Pair(ipaddress.ip_network(source), ipaddress.ip_network(target))
        for pair in (exact, *self._wide):
            users = self._sending.get(pair)
            if (
                users
                and users[-1].child.network == network
                and pair.source.version == source.version
                and source in pair.source
                and target in pair.destination
            ):
                return pair
        return None

    def _bypass(self, entry: InstalledChild, *, more: int) -> list[Message]:
        """Before everything that the SA protects."""
        if not entry.child.transport_mode:
            return []
        pair = bypass_of(entry)
        self._bypassed[pair] += more
        ways = ((pair, Direction.OUT), (pair.reverse, Direction.IN))
        if self._bypassed[pair] == 0:
            return [delete_policy(one, way) for one, way in ways]
        return [set_policy(one, way, BYPASS_PRIORITY) for one, way in ways]

    def _ways_in(self, entry: InstalledChild, pair: Pair) -> tuple[Direction, ...]:
        """Packets for an address of our own are never forwarded."""
        own = self._own.get(entry.child.network, frozenset())
        is_host = pair.source.prefixlen == pair.source.max_prefixlen
        if is_host and pair.source.network_address in own:
            return (Direction.IN,)
        return (Direction.IN, Direction.FORWARD)


def send_by(pair: Pair, entry: InstalledChild) -> Message:
    return set_policy(pair, Direction.OUT, priority(pair), [entry.template(entry.flow_out)])
