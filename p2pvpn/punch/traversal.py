"""What two sides do about an endpoint-dependent NAT, and the words in which they agree on it inside IKE.

Both sides know their own NAT and what the peer says of its own, so both come to the same plan:

    mine        theirs      plan
    easy        easy        nothing: ordinary checks do (unknown NATs count as easy)
    hard        easy        I open sockets, the peer probes
    easy        hard        I probe what the peer opened
    hard        hard        both open sockets at predicted ports, if both allocators can be predicted; else stay relayed

The prober asks for a run, as it bears the greater part, and the opener answers when its sockets are open:

    prober > opener   WANT                 opener > prober   OPEN, with the ports predicted, or none: guess
    opener > prober   BUSY                 another run is under way on that machine: ask again later
    both hard         READY, with the ports predicted for one's sockets; answered by READY, with those of the other

Wire formats, in private notifies of IKE_AUTH and INFORMATIONAL. What follows the fields belongs to later versions.

    NAT   version(1) mapping(1) filtering(1) allocation(1) step(2, two's complement)
    RUN   version(1) step(1) run(4) count(1) port(2) ..
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from p2pvpn.core.errors import LocalError, WireError
from p2pvpn.core.wire import Reader

from .behaviour import Allocation, Filtering, Mapping, NatBehaviour

VERSION = 1
MAX_PORTS = 64
"""Ports of a RUN notice."""
MAX_NOTICE_BYTES = 512

_MAPPINGS = dict(enumerate(Mapping))
_FILTERINGS = dict(enumerate(Filtering))
_ALLOCATIONS = dict(enumerate(Allocation))
_STEPS = range(-0x8000, 0x8000)


class Part(Enum):
    """What one side does in a plan."""

    NOTHING = "nothing"
    OPEN = "open sockets"
    PROBE = "probe"
    MEET = "open sockets at predicted ports and aim at the peer's"
    RELAYED = "stay relayed"


def part(mine: NatBehaviour, theirs: NatBehaviour) -> Part:
    """Our part; the peer's follows from the same table with the sides exchanged."""
    if not mine.mapping.is_dependent and not theirs.mapping.is_dependent:
        return Part.NOTHING
    if not theirs.mapping.is_dependent:
        return Part.OPEN
    if not mine.mapping.is_dependent:
        return Part.PROBE
    return Part.MEET if _is_predictable(mine) and _is_predictable(theirs) else Part.RELAYED


def _is_predictable(nat: NatBehaviour) -> bool:
    return nat.allocation in (Allocation.PRESERVING, Allocation.SEQUENTIAL)


def encode_nat(nat: NatBehaviour) -> bytes:
    """What the peer may know of our NAT."""
    step = nat.step if nat.step in _STEPS else 0
    codes = (_code(_MAPPINGS, nat.mapping), _code(_FILTERINGS, nat.filtering), _code(_ALLOCATIONS, nat.allocation))
    return bytes((VERSION, *codes)) + step.to_bytes(2, "big", signed=True)


def decode_nat_untrusted(data: bytes) -> NatBehaviour:
    """The peer's NAT as it says; values of later versions are unknown. Raises WireError."""
    reader = _open(data)
    mapping = _MAPPINGS.get(reader.u8(), Mapping.UNKNOWN)
    filtering = _FILTERINGS.get(reader.u8(), Filtering.UNKNOWN)
    allocation = _ALLOCATIONS.get(reader.u8(), Allocation.UNKNOWN)
    return NatBehaviour(mapping, filtering, allocation, int.from_bytes(reader.take(2), "big", signed=True))


class Step(Enum):
    """What a RUN notice says."""

    WANT = 1
    OPEN = 2
    BUSY = 3
    READY = 4


@dataclass(frozen=True, slots=True)
class RunNotice:
    """A step of the run with this number; `ports` are outer ports of the sender's sockets, as predicted."""

    step: Step
    run: int
    ports: tuple[int, ...] = ()

    def encode(self) -> bytes:
        """Raises LocalError for too many ports."""
        if len(self.ports) > MAX_PORTS:
            raise LocalError(f"a RUN notice has at most {MAX_PORTS} ports")
        packed = b"".join(port.to_bytes(2, "big") for port in self.ports)
        return bytes((VERSION, self.step.value)) + self.run.to_bytes(4, "big") + bytes((len(self.ports),)) + packed

    @classmethod
    def decode_untrusted(cls, data: bytes) -> RunNotice:
        """Raises WireError."""
        reader = _open(data)
        try:
            step = Step(reader.u8())
        except ValueError:
            raise WireError("an unknown step of a run") from None
        run, count = reader.u32(), reader.u8()
        if count > MAX_PORTS:
            raise WireError(f"{count} ports")
        ports = tuple(reader.u16() for _ in range(count))
        if 0 in ports or len(set(ports)) != count:
            raise WireError("port 0, or a port twice")
        return cls(step, run, ports)


def _open(data: bytes) -> Reader:
    if len(data) > MAX_NOTICE_BYTES:
        raise WireError(f"a notice of {len(data)} bytes")
    reader = Reader(data)
    if not reader.u8():
        raise WireError("version 0")
    return reader


def _code(values: dict[int, Mapping] | dict[int, Filtering] | dict[int, Allocation], wanted: Enum) -> int:
    return next(code for code, value in values.items() if value is wanted)
