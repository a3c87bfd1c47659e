"""The STUN messages of one agent: built with its credentials, opened with its peer's, and the role they claim."""

from __future__ import annotations

from p2pvpn.core import stun
from p2pvpn.core.address import Endpoint
from p2pvpn.core.errors import TrustError, WireError
from p2pvpn.core.ports import Entropy

from .candidates import CandidateKind, priority_of
from .credentials import IceCredentials

TAG_BYTES = 6
"""First bytes of every transaction ID of an agent, drawn at random; the rest is random each time. Answers are routed by
it. 48 bits are left to guess, and integrity after that."""
MAX_ROLE_SWITCHES = 4
"""One is enough between honest sides (RFC 8445 section 7.3.1.1)."""
ROLE_CONFLICT = 487


class Messages:
    """`controlling` is the role now; a conflict may switch it. `tie_breaker` has 64 random bits."""

    def __init__(self, credentials: IceCredentials, tie_breaker: int, entropy: Entropy, *, controlling: bool) -> None:
        self.controlling = controlling
        self.tag = entropy(TAG_BYTES)
        self._entropy = entropy
        self._tie_breaker = tie_breaker
        self._username_in = credentials.username_in
        self._username_out = credentials.username_out
        self._key_in = credentials.local_password.reveal()
        self._key_out = credentials.remote_password.reveal()
        self._switches = 0

    def draw_tag(self) -> None:
        self.tag = self._entropy(TAG_BYTES)

    def check(self, local: Endpoint, *, nominates: bool) -> tuple[bytes, bytes]:
        """Transaction ID and bytes of a check sent from `local` (RFC 8445 section 7.2.2)."""
        transaction = self.tag + self._entropy(stun.TRANSACTION_ID_BYTES - TAG_BYTES)
        role = "ice_controlling" if self.controlling else "ice_controlled"
        message = stun.request(
            transaction,
            username=self._username_out,
            priority=priority_of(CandidateKind.PEER_REFLEXIVE, local),
            **{role: self._tie_breaker},
            **({"use_candidate": None} if nominates else {}),
        )
        return transaction, stun.build(message, self._key_out)

    def answer(self, request: stun.Message, source: Endpoint) -> bytes:
        """The success response to a check that came from `source`."""
        return stun.build(stun.success(request.transaction_id, source), self._key_in)

    def conflict(self, request: stun.Message) -> bytes:
        """The error response to a check that claims our role."""
        return stun.build(stun.error(request.transaction_id, ROLE_CONFLICT, "Role Conflict"), self._key_in)

    def open_request(self, request: stun.Message) -> bool:
        """Whether a check nominates. Raises TrustError unless the peer sent it, WireError when it is incomplete."""
        stun.verify(request, self._key_in)
        if request.attributes.get("USERNAME") != self._username_in:
            raise TrustError("a check for another pair of usernames")
        if "PRIORITY" not in request.attributes:
            raise WireError("a check without PRIORITY")
        return "USE-CANDIDATE" in request.attributes

    def open_answer(self, answer: stun.Message) -> None:
        """Raises TrustError unless the peer sent it."""
        stun.verify(answer, self._key_out)

    def yields_to(self, request: stun.Message) -> bool:
        """RFC 8445 section 7.3.1.1: whether the check may be answered with success, after a switch of role if need be.

        Otherwise its sender has to switch.
        """
        theirs = request.attributes.get("ICE-CONTROLLING" if self.controlling else "ICE-CONTROLLED")
        if theirs is None:
            return True
        return (self._tie_breaker >= theirs) != self.controlling and self.switch_role()

    def switch_role(self) -> bool:
        """Take the other role, unless that happened too often to be honest."""
        if self._switches >= MAX_ROLE_SWITCHES:
            return False
        self._switches += 1
        self.controlling = not self.controlling
        return True
