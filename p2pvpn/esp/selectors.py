"""Selector look-ups for every packet: plain integers and bytes, no address objects.

`SelectorSet` answers "may this SA carry it", `PrefixTable` "which SAs come into question for this destination": exact
addresses first, then prefixes from the longest to the shortest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from p2pvpn.core.address import IpNetwork
from p2pvpn.core.selector import ANY_PROTOCOL, Selector

T = TypeVar("T")


class SelectorSet:
    """One side (local or remote) of an SA's selectors, compiled."""

    __slots__ = ("_exact", "_ranges", "narrow")

    def __init__(self, selectors: Sequence[Selector]) -> None:
        self._exact: set[bytes] = set()
        self._ranges: dict[int, list[tuple[int, int, int, int, int]]] = {4: [], 16: []}
        self.narrow = False
        """Whether protocols or ports matter, so that addresses alone cannot decide."""
        for selector in selectors:
            open_to_all = selector.protocol == ANY_PROTOCOL and (selector.start_port, selector.end_port) == (0, 65535)
            self.narrow = self.narrow or not open_to_all
            if open_to_all and selector.start == selector.end:
                self._exact.add(selector.start.packed)
            else:
                self._ranges[len(selector.start.packed)].append(
                    (
                        int(selector.start),
                        int(selector.end),
                        selector.protocol,
                        selector.start_port,
                        selector.end_port,
                    )
                )

    def admits(self, address: bytes, protocol: int, port: int) -> bool:
        """Whether some selector holds this packed address (4 or 16 bytes), protocol and port.

        A packet that shows no port (`inner.NO_PORT`: a later fragment, a protocol without ports) passes only where
        every port does (RFC 4301 section 4.4.1.1).
        """
        if address in self._exact:
            return True
        number = int.from_bytes(address, "big")
        for first, last, wanted, start_port, end_port in self._ranges[len(address)]:
            if not first <= number <= last or wanted not in (ANY_PROTOCOL, protocol):
                continue
            if start_port <= port <= end_port or (start_port == 0 and end_port == 65535):
                return True
        return False


class PrefixTable(Generic[T]):
    """Values by prefix; a value may stand under many prefixes, a prefix hold many values, the newest first."""

    __slots__ = ("_exact", "_prefixes")

    def __init__(self) -> None:
        self._exact: dict[bytes, list[T]] = {}
        self._prefixes: dict[int, list[tuple[int, int, dict[int, list[T]]]]] = {4: [], 16: []}

    def add(self, network: IpNetwork, value: T) -> None:
        """Put `value` in front of the others of the prefix."""
        values = self._values(network)
        if value in values:
            values.remove(value)
        values.insert(0, value)

    def discard(self, network: IpNetwork, value: T) -> None:
        """Take `value` from the prefix; nothing happens if it is not there."""
        values = self._values(network)
        if value in values:
            values.remove(value)
        if values:
            return
        packed = network.network_address.packed
        if network.prefixlen == network.max_prefixlen:
            del self._exact[packed]
            return
        rows = self._prefixes[len(packed)]
        for row in rows:
            length, shift, table = row
            if length == network.prefixlen:
                del table[int(network.network_address) >> shift]
                if not table:
                    rows.remove(row)
                return

    def _values(self, network: IpNetwork) -> list[T]:
        packed = network.network_address.packed
        if network.prefixlen == network.max_prefixlen:
            return self._exact.setdefault(packed, [])
        rows = self._prefixes[len(packed)]
        shift = network.max_prefixlen - network.prefixlen
        table = next((row[2] for row in rows if row[0] == network.prefixlen), None)
        if table is None:
            table = {}
            rows.append((network.prefixlen, shift, table))
            rows.sort(key=lambda row: row[1])
        return table.setdefault(int(network.network_address) >> shift, [])

    def candidates(self, address: bytes) -> Iterator[T]:
        """Values whose prefix holds the packed address: longest prefix first, then newest first."""
        yield from self._exact.get(address, ())
        number = int.from_bytes(address, "big")
        for _, shift, table in self._prefixes[len(address)]:
            yield from table.get(number >> shift, ())
