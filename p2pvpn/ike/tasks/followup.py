"""Key exchanges of CREATE_CHILD_SA: the first one in it, additional ones in IKE_FOLLOWUP_KE (RFC 9370 section 2.2.4).

What is being made comes into being with the last exchange; until then the initiator's side is a `Creation`, and the
responder keeps a `Half`, of which there is one per IKE SA.

    request:  SK{ KEi(n), N(ADDITIONAL_KEY_EXCHANGE)(link) }
    response: SK{ KEr(n) [, N(ADDITIONAL_KEY_EXCHANGE)(next link)] }
"""

from __future__ import annotations

import hmac
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from p2pvpn.core.errors import TrustError, WireError
from p2pvpn.core.secret import Secret
from p2pvpn.crypto.kex import KexMethod, KeyExchange, generate, respond
from p2pvpn.ike.codes import Exchange
from p2pvpn.ike.message import Message, notifications
from p2pvpn.ike.notifies import Notify, NotifyType
from p2pvpn.ike.payloads import KeyExchangeData, Nonce, Payload
from p2pvpn.ike.states import State

from .task import Received, Refusal, Reply, Task, Verdict

if TYPE_CHECKING:
    from p2pvpn.ike.sa import IkeSa

LINK_BYTES = 8
NONCE_BYTES = 32
"""At least half the key size of the largest PRF (RFC 7296 section 2.10): SHA2-512 has 64."""
HALF_S = 30.0
"""How long the peer's next key exchange is waited for."""
MAX_RETRIES = 6
"""After TEMPORARY_FAILURE or for another group."""
_WORTH_ANOTHER_TRY = frozenset({NotifyType.TEMPORARY_FAILURE, NotifyType.STATE_NOT_FOUND})


Finish = Callable[[list[Secret]], Reply]


@dataclass(slots=True)
class Rival:
    """The peer replaces what we are replacing: the lower nonce of its exchange, and what it made so far."""

    low: bytes
    made: object = None


class Creation(Task):
    """A CREATE_CHILD_SA of ours with the exchanges that follow it."""

    exchange = Exchange.CREATE_CHILD_SA

    def __init__(self) -> None:
        self.rival: Rival | None = None
        self._nonces: tuple[bytes, bytes] = (b"", b"")
        self._secrets: list[Secret] = []
        self._pending: list[KexMethod] = []
        self._share: KeyExchange | None = None
        self._group: KexMethod | None = None
        self._tries = 0

    # What is particular to a Child SA or an IKE SA

    @abstractmethod
    def offer(self, sa: IkeSa) -> list[Payload]:
        """Everything of the request but nonce and key share."""

    @abstractmethod
    def groups(self, sa: IkeSa) -> tuple[KexMethod, ...]:
        """For the first key exchange, the best first."""

    @abstractmethod
    def chosen_untrusted(self, sa: IkeSa, message: Message) -> tuple[KexMethod | None, tuple[KexMethod, ...]]:
        """Takes the answer: its key exchanges. Raises WireError, Refusal."""

    @abstractmethod
    def complete(self, sa: IkeSa, now: float) -> None:
        """All secrets are there."""

    @abstractmethod
    def failed(self, sa: IkeSa, error: Notify | str, now: float) -> None:
        """The peer refuses, for good."""

    # What is the same

    def ready(self, sa: IkeSa, now: float) -> bool:
        """Not in the middle of something that the peer makes."""
        return sa.half is None or now - sa.half.at > HALF_S

    @property
    def low(self) -> bytes:
        """The lower of our exchange's nonces: the exchange with the lowest of all four loses (RFC 7296 2.8.1)."""
        return min(self._nonces)

    @property
    def loses(self) -> bool:
        return self.rival is not None and self.low < self.rival.low

    def request(self, sa: IkeSa) -> list[Payload]:
        sa.creating = self
        self.rival = None
        self._tries += 1
        self._secrets.clear()
        self._nonces = (sa.local.entropy(NONCE_BYTES), b"")
        payloads = [*self.offer(sa), Nonce(self._nonces[0])]
        if self._group is None and self.groups(sa):
            self._group = self.groups(sa)[0]
        if self._group is not None:
            self._share = generate(self._group)
            payloads.append(KeyExchangeData(self._group.transform, self._share.public))
        return payloads

    def answered(self, sa: IkeSa, received: Received, now: float) -> Verdict:
        message = received.message
        nonce = message.first(Nonce)
        if nonce is None:
            self._refused(sa, message, now)
            return Verdict.DONE
        self._nonces = (self._nonces[0], nonce.data)
        try:
            kex, additional = self.chosen_untrusted(sa, message)
            if kex is not None:
                self._secrets.append(_shared_untrusted(self._share, kex, message))
        except Refusal as problem:
            sa.creating = None
            self.failed(sa, str(problem), now)
            return Verdict.DONE
        self._pending = list(additional)
        self.proceed(sa, message, now)
        return Verdict.DONE

    def proceed(self, sa: IkeSa, message: Message, now: float) -> None:
        """An exchange is done: the next one, or the end. Whoever loses a collision does not go on."""
        if not self._pending:
            sa.creating = None
            self.complete(sa, now)
        elif self.loses:
            self._drop(sa, now)
        else:
            link = message.notify(NotifyType.ADDITIONAL_KEY_EXCHANGE)
            if link is None:
                raise WireError("no link to the next key exchange")
            sa.requests.add_first(FollowUp(self, self._pending.pop(0), link.data))

    def add_secret(self, secret: Secret) -> None:
        self._secrets.append(secret)

    def _refused(self, sa: IkeSa, message: Message, now: float) -> None:
        error = message.error
        kind = None if error is None else error.type
        if self.rival is not None:
            self._drop(sa, now)
            return
        if self._tries < MAX_RETRIES and error is not None:
            if kind == NotifyType.INVALID_KE_PAYLOAD and len(error.data) == 2:
                number = int.from_bytes(error.data, "big")
                group = next((one for one in self.groups(sa) if one.transform == number), None)
                if group is not None and group is not self._group:
                    self._group = group
                    sa.creating = None
                    sa.requests.add_first(self)
                    return
            if kind in _WORTH_ANOTHER_TRY:
                sa.creating = None
                sa.later(self, now)
                return
        sa.creating = None
        self.failed(sa, error or "an answer without a meaning", now)

    def stopped(self, sa: IkeSa, message: Message, now: float) -> None:
        """An additional exchange was refused."""
        self._refused(sa, message, now)

    def _drop(self, sa: IkeSa, now: float) -> None:
        """What the peer makes in its place will do."""
        sa.creating = None
        self.dropped(sa, now)

    def dropped(self, sa: IkeSa, now: float) -> None:
        """Ours is not wanted any more."""


class FollowUp(Task):
    """One additional exchange."""

    exchange = Exchange.IKE_FOLLOWUP_KE

    def __init__(self, owner: Creation, method: KexMethod, link: bytes) -> None:
        self.owner = owner
        self._share = generate(method)
        self._link = link

    def request(self, sa: IkeSa) -> list[Payload]:
        link = Notify(NotifyType.ADDITIONAL_KEY_EXCHANGE, self._link)
        return [KeyExchangeData(self._share.method.transform, self._share.public), *notifications([link])]

    def answered(self, sa: IkeSa, received: Received, now: float) -> Verdict:
        message = received.message
        if message.first(KeyExchangeData) is None:
            self.owner.stopped(sa, message, now)
        else:
            self.owner.add_secret(_shared_untrusted(self._share, self._share.method, message))
            self.owner.proceed(sa, message, now)
        return Verdict.DONE


@dataclass(slots=True)
class Half:
    """The responder's side between two exchanges. `finish` makes the SA and may add to the last answer."""

    link: bytes
    pending: list[KexMethod]
    secrets: list[Secret]
    finish: Finish = field(repr=False)
    at: float


def begin_half(
    sa: IkeSa,
    payloads: list[Payload],
    kexes: tuple[KexMethod, ...],
    *,
    secrets: list[Secret],
    finish: Finish,
    now: float,
) -> Reply:
    """The answer to CREATE_CHILD_SA: all that there is to do, or the first part."""
    if not kexes:
        reply = finish(secrets)
        return Reply((*payloads, *reply.payloads), reply.then, reply.step, reply.reason)
    link = sa.local.entropy(LINK_BYTES)
    sa.half = Half(link, list(kexes), secrets, finish, now)
    return Reply((*payloads, *notifications([Notify(NotifyType.ADDITIONAL_KEY_EXCHANGE, link)])))


def answer(sa: IkeSa, received: Received, now: float) -> Reply:
    """IKE_FOLLOWUP_KE of the peer."""
    message = received.message
    half, link = sa.half, message.notify(NotifyType.ADDITIONAL_KEY_EXCHANGE)
    if half is None or link is None or sa.state is State.DELETING or not hmac.compare_digest(link.data, half.link):
        raise Refusal("nothing is waiting for this key exchange", NotifyType.STATE_NOT_FOUND)
    sa.half = None
    method = half.pending.pop(0)
    public, secret = answer_share_untrusted(method, message)
    half.secrets.append(secret)
    payloads: list[Payload] = [KeyExchangeData(method.transform, public)]
    return begin_half(sa, payloads, tuple(half.pending), secrets=half.secrets, finish=half.finish, now=now)


def answer_share_untrusted(method: KexMethod, message: Message) -> tuple[bytes, Secret]:
    """Our public value and the secret. Raises WireError for a share that is none."""
    share = message.one(KeyExchangeData)
    if share.group != method.transform:
        raise WireError(f"a key share of method {share.group}, not {method.name}")
    try:
        return respond(method, share.data)
    except TrustError as problem:
        raise WireError(str(problem)) from None


def _shared_untrusted(share: KeyExchange | None, method: KexMethod, message: Message) -> Secret:
    theirs = message.one(KeyExchangeData)
    if share is None or method is not share.method or theirs.group != method.transform:
        raise WireError("a key share of a group that we did not send")
    try:
        return share.shared(theirs.data)
    except TrustError as problem:
        raise WireError(str(problem)) from None
