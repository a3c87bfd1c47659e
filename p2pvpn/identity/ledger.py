"""What an admin granted: a row for each machine, out of which names, IPv4 addresses and shares are free.

    entry  [peer ID, name, serial, share, IPv4, certificate, issuer certificate or nil]

A share is the n-th /22 of the network's IPv4 pool: 0 is the root's own, out of which hubs and gateways get their
addresses; issuers own 1 to 63 for good.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address

from p2pvpn.core.errors import Fault, LocalError, WireError
from p2pvpn.core.ids import PEER_ID_BYTES, NetworkId, PeerId

from .canonical import Fields, Value
from .certificates import MAX_CERTIFICATE_BYTES
from .genesis import RANGES, ipv4_range
from .names import MAX_NAME_CHARS

MAX_ENTRIES = 10000


@dataclass(frozen=True, slots=True)
class Entry:
    """A granted machine. `share` is the IPv4 share it issues or once issued from, 0 if it never did."""

    peer_id: PeerId
    name: str
    serial: int
    share: int
    ipv4: IPv4Address | None
    certificate: bytes
    issuer_certificate: bytes | None = None

    def encode(self) -> Value:
        """For the admin's file."""
        return (
            bytes(self.peer_id),
            self.name,
            self.serial.to_bytes(20, "big"),
            self.share,
            int(self.ipv4 or 0),
            self.certificate,
            self.issuer_certificate,
        )

    @classmethod
    def parse_untrusted(cls, fields: Fields) -> Entry:
        """Raises WireError."""
        entry = cls(
            PeerId(fields.exactly(PEER_ID_BYTES)),
            fields.text(MAX_NAME_CHARS),
            int.from_bytes(fields.exactly(20), "big"),
            fields.uint(RANGES - 1),
            _ipv4(fields.uint(2**32 - 1)),
            fields.raw(MAX_CERTIFICATE_BYTES),
            fields.optional(MAX_CERTIFICATE_BYTES),
        )
        fields.end()
        if not entry.name:
            raise WireError("a ledger entry without a name")
        return entry


class Ledger:
    """Entries by peer ID, in the order in which they were made."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._entries = {entry.peer_id: entry for entry in entries}

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(self._entries.values())

    def at(self, peer: PeerId) -> Entry | None:
        return self._entries.get(peer)

    def put(self, entry: Entry) -> None:
        """In the place of the peer's former entry, or at the end."""
        self._entries[entry.peer_id] = entry

    def remove(self, peer: PeerId) -> None:
        self._entries.pop(peer, None)

    def named(self, name: str) -> Entry | None:
        return next((entry for entry in self._entries.values() if entry.name == name), None)

    def find(self, who: PeerId | str) -> Entry:
        """By peer ID, as such or in hexadecimal digits, or by name. Raises LocalError."""
        peer = who if isinstance(who, PeerId) else peer_id_of(who)
        entry = self.at(peer) if peer is not None else None
        entry = entry or self.named(str(who))
        if entry is None:
            raise LocalError(
                f"{who} was not granted here",
                hint="members that an issuer certified are named by their peer ID",
                fault=Fault.REFUSED,
            )
        return entry

    def free_share(self, listed: Iterable[int]) -> int:
        """A share that nobody here has and that is not `listed`. Raises LocalError when all are taken."""
        taken = {entry.share for entry in self._entries.values()} | set(listed)
        free = next((share for share in range(1, RANGES) if share not in taken), None)
        if free is None:
            raise LocalError(f"a network has at most {RANGES - 1} issuers", hint="grant the hub without --issuer")
        return free

    def free_ipv4(self, network: NetworkId) -> IPv4Address | None:
        """An address of the root's own share, or None when all are taken."""
        taken = {entry.ipv4 for entry in self._entries.values()}
        return next((address for address in ipv4_range(network, 0).hosts() if address not in taken), None)


def peer_id_of(text: str) -> PeerId | None:
    """From 40 hexadecimal digits."""
    try:
        return PeerId(bytes.fromhex(text))
    except ValueError:
        return None


def _ipv4(value: int) -> IPv4Address | None:
    return IPv4Address(value) if value else None
