"""A NAT of RFC 4787 as a pure machine: endpoints and the time in, endpoints or None out.

    inside                    NAT                         outside
    10.0.0.2:4500   ->   198.51.100.1:4500   ->   203.0.113.9:500
      source             external endpoint           remote

A *mapping* ties an inside endpoint to an external one. Its mapping rule says for which remotes the same mapping is
used (section 4.1), its filtering rule which remotes may send back through it (section 5): a packet out leaves a
*permit* for what the rule keeps of the remote. Packets out refresh both (REQ-6), packets in refresh the mapping only
where the kind says so. No external endpoint ever belongs to two mappings (REQ-1 to REQ-3: no overloading), an inside
address always gets the same public address ("paired" pooling, REQ-2), and a full table forgets its least recently
used mapping.

`Firewall` is the same filter without translation, which is what IPv6 homes have (RFC 6092).
"""

from __future__ import annotations

import random
import zlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from p2pvpn.core.address import Endpoint

FIRST_PORT = 1024
LAST_PORT = 65535
"""Range of ports that are chosen; a preserved port may lie below (REQ-3)."""
DRAWS = 32
"""Random draws before the next free port upwards is taken: enough while the table is less than 80 % full."""
MAX_PERMITS = 4096
"""Remotes that one mapping remembers; the least recently used one is forgotten."""


class Rule(Enum):
    """What of the remote endpoint a mapping or a filter looks at."""

    EI = "ei"
    """Nothing: endpoint-independent."""
    AD = "ad"
    """Its address: address-dependent."""
    APD = "apd"
    """Its address and port: address and port-dependent."""

    def part(self, remote: Endpoint) -> Hashable:
        """What the rule keeps of a remote."""
        if self is Rule.EI:
            return None
        return remote.host if self is Rule.AD else remote


class Ports(Enum):
    """How the external port of a new mapping is chosen (section 4.2)."""

    PRESERVE = "preserve"
    """The inside port while it is free, else a random one."""
    RANDOM = "random"
    SEQUENTIAL = "sequential"
    """The next one upwards, which is what port prediction lives on."""


TIMEOUT_S = 300.0
"""Of a mapping: what REQ-5 recommends; it forbids less than two minutes, and many home routers have 30 s."""


@dataclass(frozen=True, slots=True)
class NatKind:
    """How a NAT behaves. Times in seconds; `table` is the greatest number of mappings.

    A sequential allocator goes on by `step` ports per mapping. `others_per_s` mappings are opened by other hosts behind
    the same NAT, which we do not see but for the ports that they take.
    """

    mapping: Rule
    filtering: Rule
    ports: Ports = Ports.PRESERVE
    hairpin: bool = True
    timeout_s: float = TIMEOUT_S
    step: int = 1
    others_per_s: float = 0.0
    inbound_refresh: bool = False
    table: int = 4096

    def __str__(self) -> str:
        """As `of` reads it."""
        fields = [self.mapping.value, self.filtering.value, self.ports.value]
        if self.step != 1:
            fields[-1] += f"+{self.step}"
        if self.others_per_s:
            fields.append(f"others={self.others_per_s:g}")
        if self.timeout_s != TIMEOUT_S:
            fields.append(f"{self.timeout_s:g}s")
        if not self.hairpin:
            fields.append("no-hairpin")
        return "/".join(fields)

    @classmethod
    def of(cls, text: str) -> NatKind:
        """From a name in KINDS or `mapping/filtering`, and what is special: `random`, `sequential`, `sequential+2`,
        `30s`, `others=5`, `no-hairpin`, as in `symmetric/sequential/30s`. Raises ValueError.
        """
        name, *fields = text.split("/")
        kind = KINDS.get(name)
        if kind is None:
            if not fields:
                raise ValueError(f"{text!r} is not a kind of NAT: {', '.join(KINDS)} or mapping/filtering")
            kind = cls(Rule(name), Rule(fields.pop(0)))
        for field in fields:
            kind = kind._with(field)
        return kind

    def _with(self, field: str) -> NatKind:
        """The same kind but for what a field of its name says. Raises ValueError."""
        name, plus, step = field.partition("+")
        if field == "no-hairpin":
            return replace(self, hairpin=False)
        if field.startswith("others="):
            return replace(self, others_per_s=float(field.removeprefix("others=")))
        if field[:1].isdigit() and field.endswith("s"):
            return replace(self, timeout_s=float(field[:-1]))
        return replace(self, ports=Ports(name), step=int(step) if plus else 1)


KINDS = {
    "full-cone": NatKind(Rule.EI, Rule.EI),
    "restricted": NatKind(Rule.EI, Rule.AD),
    "port-restricted": NatKind(Rule.EI, Rule.APD),
    "symmetric": NatKind(Rule.APD, Rule.APD, Ports.RANDOM),
}
"""The four kinds of RFC 3489 section 5, in the words of RFC 4787."""


class _Mapping:
    """One inside endpoint, its external one, and who may answer."""

    __slots__ = ("external", "inside", "key", "permits", "used_at")

    def __init__(self, key: Hashable, inside: Endpoint, external: Endpoint, now: float) -> None:
        self.key = key
        self.inside = inside
        self.external = external
        self.used_at = now
        self.permits: OrderedDict[Hashable, float] = OrderedDict()


class Nat:
    """One NAT box with one or more public IPv4 addresses. `now` is monotonic seconds everywhere."""

    def __init__(self, public: Sequence[str], kind: NatKind, draw: random.Random) -> None:
        if not public:
            raise ValueError("a NAT has at least one public address")
        self.public = tuple(public)
        self.kind = kind
        self._draw = draw
        self._by_key: OrderedDict[Hashable, _Mapping] = OrderedDict()  # least recently used first
        self._by_external: dict[Endpoint, _Mapping] = {}
        self._next_port = draw.randint(FIRST_PORT, LAST_PORT)
        self._others_at: float | None = None
        self.is_taken: Callable[[Endpoint], bool] = lambda external: False
        """Whether somebody else of the same box has an external endpoint."""

    def __len__(self) -> int:
        """Mappings held, some of which may have timed out."""
        return len(self._by_key)

    def translate_out(self, source: Endpoint, remote: Endpoint, now: float) -> Endpoint | None:
        """The external endpoint that a packet from inside leaves with; None when no port is free."""
        key = (source, self.kind.mapping.part(remote))
        mapping = self._by_key.get(key)
        if mapping is not None and self._is_dead(mapping, now):
            self._forget(mapping)
            mapping = None
        if mapping is None:
            mapping = self._open(key, source, now)
            if mapping is None:
                return None
        else:
            self._by_key.move_to_end(key)
        mapping.used_at = now
        permit = self.kind.filtering.part(remote)
        mapping.permits[permit] = now
        mapping.permits.move_to_end(permit)
        if len(mapping.permits) > MAX_PERMITS:
            mapping.permits.popitem(last=False)
        return mapping.external

    def translate_in(self, remote: Endpoint, external: Endpoint, now: float) -> Endpoint | None:
        """The inside endpoint that a packet from `remote` to `external` is for; None when it is filtered."""
        mapping = self._by_external.get(external)
        if mapping is None:
            return None
        if self._is_dead(mapping, now):
            self._forget(mapping)
            return None
        permit = self.kind.filtering.part(remote)
        permitted_at = mapping.permits.get(permit)
        if permitted_at is None or now - permitted_at >= self.kind.timeout_s:
            return None
        if self.kind.inbound_refresh:
            mapping.used_at = mapping.permits[permit] = now
            self._by_key.move_to_end(mapping.key)
        return mapping.inside

    def translate_hairpin(self, source: Endpoint, external: Endpoint, now: float) -> tuple[Endpoint, Endpoint] | None:
        """Source and destination of a packet from inside to one of our own external endpoints, or None.

        The receiver sees the external source, as REQ-9 demands.
        """
        if not self.kind.hairpin:
            return None
        seen_as = self.translate_out(source, external, now)
        if seen_as is None:
            return None
        inside = self.translate_in(seen_as, external, now)
        return None if inside is None else (seen_as, inside)

    def flush(self) -> None:
        """Forget everything, as a restart does."""
        self._by_key.clear()
        self._by_external.clear()

    def external_of(self, source: Endpoint, remote: Endpoint, now: float) -> Endpoint | None:
        """The mapping that a packet would use now; makes and refreshes nothing."""
        mapping = self._by_key.get((source, self.kind.mapping.part(remote)))
        return None if mapping is None or self._is_dead(mapping, now) else mapping.external

    def serves(self, external: Endpoint, inside: Endpoint, now: float) -> bool:
        """Whether an external endpoint is free, or this inside one's."""
        mapping = self._by_external.get(external)
        return mapping is None or self._is_dead(mapping, now) or mapping.inside == inside

    def _is_dead(self, mapping: _Mapping, now: float) -> bool:
        return now - mapping.used_at >= self.kind.timeout_s

    def _forget(self, mapping: _Mapping) -> None:
        del self._by_key[mapping.key], self._by_external[mapping.external]

    def _open(self, key: Hashable, source: Endpoint, now: float) -> _Mapping | None:
        while self._by_key:
            oldest = next(iter(self._by_key.values()))
            if len(self._by_key) < self.kind.table and not self._is_dead(oldest, now):
                break
            self._forget(oldest)
        self._let_others_open(now)
        host = self.public[zlib.crc32(source.host.encode()) % len(self.public)]
        port = self._choose_port(host, source.port)
        if port is None:
            return None
        mapping = _Mapping(key, source, Endpoint(host, port), now)
        self._by_key[key] = self._by_external[mapping.external] = mapping
        return mapping

    def _choose_port(self, host: str, wanted: int) -> int | None:
        if self.kind.ports is Ports.SEQUENTIAL:
            port = self._free_from(host, self._next_port)
            if port is not None:
                self._next_port = self._after(port, self.kind.step)
            return port
        if self.kind.ports is Ports.PRESERVE and self._is_free(host, wanted):
            return wanted
        for _ in range(DRAWS):
            port = self._draw.randint(FIRST_PORT, LAST_PORT)
            if self._is_free(host, port):
                return port
        return self._free_from(host, self._draw.randint(FIRST_PORT, LAST_PORT))

    def _let_others_open(self, now: float) -> None:
        """The ports that other hosts took since the last mapping of ours, at random moments."""
        since, self._others_at = self._others_at, now
        expected = self.kind.others_per_s * (now - since) if since is not None else 0.0
        taken = 0
        while expected and (expected := expected - self._draw.expovariate(1.0)) > 0.0:
            taken += 1
        self._next_port = self._after(self._next_port, taken * self.kind.step)

    @staticmethod
    def _after(port: int, count: int) -> int:
        return FIRST_PORT + (port - FIRST_PORT + count) % (LAST_PORT - FIRST_PORT + 1)

    def _free_from(self, host: str, start: int) -> int | None:
        for step in range(LAST_PORT - FIRST_PORT + 1):
            port = self._after(start, step)
            if self._is_free(host, port):
                return port
        return None

    def _is_free(self, host: str, port: int) -> bool:
        external = Endpoint(host, port)
        return external not in self._by_external and not self.is_taken(external)


class Firewall:
    """A stateful filter without translation (RFC 6092): who was sent to may answer, as far as `filtering` looks.

    At most `table` permits; the least recently used one is forgotten.
    """

    def __init__(self, filtering: Rule, timeout_s: float = 300.0, table: int = 4096) -> None:
        self.filtering = filtering
        self.timeout_s = timeout_s
        self.table = table
        self._permits: OrderedDict[tuple[Endpoint, Hashable], float] = OrderedDict()

    def pass_out(self, source: Endpoint, remote: Endpoint, now: float) -> None:
        """A packet from inside leaves."""
        key = (source, self.filtering.part(remote))
        self._permits[key] = now
        self._permits.move_to_end(key)
        if len(self._permits) > self.table:
            self._permits.popitem(last=False)

    def admits(self, remote: Endpoint, inside: Endpoint, now: float) -> bool:
        """Whether a packet from outside may pass."""
        permitted_at = self._permits.get((inside, self.filtering.part(remote)))
        return permitted_at is not None and now - permitted_at < self.timeout_s

    def flush(self) -> None:
        self._permits.clear()
