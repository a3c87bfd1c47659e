"""What turns payloads into datagrams and back for one IKE SA: in the clear first, protected once there are keys.

Every message of a protected channel that comes out of `open` is authentic. Whatever is not is None, like a fragment
whose siblings are missing: there is nothing to say about either.
"""

from __future__ import annotations

from collections.abc import Sequence

from p2pvpn.core.address import Path
from p2pvpn.core.errors import TrustError, WireError

from .codes import PayloadType
from .config import IkeSettings
from .fragments import Reassembly, split
from .keys import IkeKeys
from .message import Header, Message, build_chain, build_clear, parse_chain_untrusted, parse_clear_untrusted
from .payloads import Payload
from .protect import Opened, Protection
from .rules import check_untrusted
from .tasks.task import Received

NON_ESP_MARKER_BYTES = 4
_NEXT_PAYLOAD_AT = 16


class Channel:
    """`fragmentation` is set when the peer can put fragments together, and then so do we."""

    __slots__ = ("_former", "_pieces", "_protection", "_settings", "fragmentation")

    def __init__(self, settings: IkeSettings) -> None:
        self._settings = settings
        self._protection: Protection | None = None
        self._former: Protection | None = None
        self._pieces = {response: Reassembly(settings.message_bytes) for response in (False, True)}
        self.fragmentation = False

    @property
    def is_protected(self) -> bool:
        return self._protection is not None

    def protect(self, keys: IkeKeys, initiator: bool) -> None:
        """Everything from now on is under these keys; only repetitions are still known by the former ones."""
        self._former = self._protection
        self._protection = Protection(keys, initiator)

    def pack(self, header: Header, payloads: Sequence[Payload]) -> tuple[bytes, ...]:
        """The datagrams of a message: several when it is too large for one and the peer can put them together."""
        protection = self._protection
        if protection is None:
            return (build_clear(header, payloads),)
        first, chain = build_chain(payloads)
        room = self._settings.fragment_bytes - NON_ESP_MARKER_BYTES - protection.fragment_overhead_bytes
        pieces = split(chain, room) if self.fragmentation else []
        if len(pieces) < 2:
            return (protection.seal(header, first, chain),)
        return tuple(
            protection.seal_fragment(header, first, piece, number, len(pieces))
            for number, piece in enumerate(pieces, start=1)
        )

    def open(self, header: Header, data: bytes) -> Opened | None:
        """The plaintext of a whole protected message, or None."""
        is_fragment = data[_NEXT_PAYLOAD_AT] == PayloadType.SKF
        if self._protection is None or (is_fragment and not self.fragmentation):
            return None
        try:
            opened = self._protection.open_untrusted(data)
            if is_fragment:
                return self._pieces[header.response].add_untrusted(header.message_id, opened)
        except (WireError, TrustError):
            return None
        return opened

    def is_repeated(self, data: bytes) -> bool:
        """Whether a request that was answered before is the peer's, and the fragment that counts (RFC 7383 2.6.1)."""
        for protection in (self._protection, self._former):
            if protection is None:
                continue
            try:
                return protection.open_untrusted(data).number == 1
            except (WireError, TrustError):
                continue
        return False

    def read_untrusted(self, path: Path, header: Header, opened: Opened) -> Received:
        """The message in a plaintext, legal by the rules. Raises WireError."""
        message = Message(header, parse_chain_untrusted(opened.first, opened.plain), opened.plain, opened.first)
        check_untrusted(message)
        return Received(message, path)

    def read_clear_untrusted(self, path: Path, data: bytes) -> Received:
        """A message in the clear, legal by the rules. Raises WireError."""
        message = parse_clear_untrusted(data)
        check_untrusted(message)
        return Received(message, path, data)
