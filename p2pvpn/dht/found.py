"""The `dht.find` method: what is asked, what is answered, and how several records come one page at a time.

    arguments   [key, after, at least]
    result      [[record..], next, [hub ID..]]

A page begins behind the subject `after` (empty at first) and holds as many records as fit one packet, at least one;
`next` is the `after` of the page that follows, or empty. A hub that has only sequences below `at least` asks the other
hubs before it answers a peer. To another hub it answers at once, with hubs nearer to the key when it has nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from p2pvpn.core.errors import WireError
from p2pvpn.core.ids import PEER_ID_BYTES

from .messages import GOOD_MESSAGE_BYTES
from .packing import list_untrusted, shape_untrusted
from .records import KEY_BYTES
from .storage import ROUTE_PUBLISHERS, Row

PAGE_BYTES = GOOD_MESSAGE_BYTES - 80
"""Records in one answer; the rest is the frame of the message."""
MAX_NEARER = 20


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is sought."""

    key: bytes
    after: bytes = b""
    at_least: int = 0

    @property
    def args(self) -> list[object]:
        """As the arguments of a request."""
        return [self.key, self.after, self.at_least]


@dataclass(frozen=True, slots=True)
class Found:
    """One page of what was found: records as bytes, not verified."""

    records: tuple[bytes, ...]
    next: bytes = b""
    nearer: tuple[bytes, ...] = ()

    @property
    def value(self) -> list[object]:
        """As the result of a request."""
        return [list(self.records), self.next, list(self.nearer)]


def wanted_untrusted(args: object) -> Wanted:
    """Raises WireError."""
    key, after, at_least = shape_untrusted(args, bytes, bytes, int)
    if len(key) != KEY_BYTES or len(after) not in (0, PEER_ID_BYTES) or at_least < 0:
        raise WireError("a key, cursor or sequence out of range")
    return Wanted(key, after, at_least)


def found_untrusted(value: object) -> Found:
    """Raises WireError."""
    records, following, nearer = shape_untrusted(value, list, bytes, list)
    list_untrusted(records, bytes, ROUTE_PUBLISHERS)
    list_untrusted(nearer, bytes, MAX_NEARER)
    if len(following) not in (0, PEER_ID_BYTES):
        raise WireError("a cursor of a wrong size")
    return Found(tuple(records), following, tuple(nearer))


def page(rows: Sequence[Row], after: bytes) -> Found:
    """The page of `rows` (in the order of their subjects) behind `after`."""
    records: list[bytes] = []
    last, room = b"", PAGE_BYTES
    for row in rows:
        if row.subject <= after:
            continue
        if records and len(row.raw) > room:
            return Found(tuple(records), last)
        records.append(row.raw)
        last, room = bytes(row.subject), room - len(row.raw)
    return Found(tuple(records))


async def find_all(ask: Callable[[list[object]], Awaitable[object]], key: bytes, at_least: int = 0) -> Found:
    """Every page of one hub, joined; `ask` makes the request. Raises WireError, and whatever `ask` raises."""
    records: tuple[bytes, ...] = ()
    wanted = Wanted(key, b"", at_least)
    for _ in range(ROUTE_PUBLISHERS):
        found = found_untrusted(await ask(wanted.args))
        records += found.records
        if not found.next:
            return Found(records, b"", found.nearer)
        if found.next <= wanted.after:
            raise WireError("a cursor that does not advance")
        wanted = Wanted(key, found.next, at_least)
    raise WireError("more pages than records")
