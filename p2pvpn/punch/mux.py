"""Finds the agent that a STUN message on the shared socket is for.

Requests name it by the first half of their USERNAME, answers by the tag in their transaction ID; never by address,
since a peer that moved or sits behind a NAT that nobody knew comes from anywhere. There is no table of transactions:
each agent knows its own.
"""

from __future__ import annotations

from p2pvpn.core import stun
from p2pvpn.core.address import Path
from p2pvpn.core.datagram import Kind, classify
from p2pvpn.core.errors import LocalError, WireError
from p2pvpn.core.output import Output

from .agent import PunchAgent
from .messages import TAG_BYTES

MAX_AGENTS = 65536
"""Sessions of a machine."""
ERROR_OR_SUCCESS = 0x0100
"""The class bit that answers have and requests and indications have not (RFC 8489 section 5)."""
TRANSACTION_AT = 8
"""Offset of the transaction ID."""


class PunchMux:
    """The agents of a machine, by username fragment and by transaction tag."""

    def __init__(self) -> None:
        self._by_ufrag: dict[bytes, PunchAgent] = {}
        self._by_tag: dict[bytes, PunchAgent] = {}

    def __len__(self) -> int:
        return len(self._by_ufrag)

    def register(self, agent: PunchAgent) -> None:
        """Before the agent starts. Raises LocalError when its username fragment is taken or the machine is full."""
        ufrag = agent.credentials.local_ufrag.encode()
        if ufrag in self._by_ufrag:
            raise LocalError("two sessions have the same ICE username fragment")
        if len(self._by_ufrag) >= MAX_AGENTS:
            raise LocalError(f"more than {MAX_AGENTS} ICE sessions")
        while agent.tag in self._by_tag:
            agent.draw_tag()
        self._by_ufrag[ufrag] = agent
        self._by_tag[agent.tag] = agent

    def unregister(self, agent: PunchAgent) -> None:
        """The session is over; an unknown agent is ignored."""
        if self._by_tag.get(agent.tag) is agent:
            del self._by_tag[agent.tag]
            del self._by_ufrag[agent.credentials.local_ufrag.encode()]

    def route(self, path: Path, data: bytes, now: float) -> list[Output] | None:
        """What the agent answers to this datagram; None when it is no agent's, so that others may have a look."""
        agent = self.find_untrusted(data)
        if agent is None:
            return None
        try:
            message = stun.parse_untrusted(data)
        except WireError:
            return []
        return agent.handle(path, message, now)

    def find_untrusted(self, data: bytes) -> PunchAgent | None:
        """The agent that a datagram names; whether it means it is for the agent to say."""
        if classify(data) is not Kind.STUN:
            return None
        if int.from_bytes(data[:2], "big") & ERROR_OR_SUCCESS:
            return self._by_tag.get(data[TRANSACTION_AT : TRANSACTION_AT + TAG_BYTES])
        try:
            username = stun.username_untrusted(data)
        except WireError:
            return None
        return self._by_ufrag.get(username.partition(b":")[0]) if username else None
