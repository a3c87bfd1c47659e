"""IKE_INTERMEDIATE (RFC 9242) with additional key exchanges (RFC 9370 section 2.2.2).

    request:  SK{ KEi(n) }        response: SK{ KEr(n) }

Each secret is mixed into the keys that protect everything after its exchange. The exchanges are authenticated by AUTH
later, by a chain of values for each direction, under the keys from before each exchange:

    IntAuth_n = prf(SK_p, IntAuth_n-1 | header and Encrypted payload header | inner payloads)

with lengths as if there were no IV, padding and ICV.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from p2pvpn.core.errors import TrustError, WireError
from p2pvpn.core.secret import Secret
from p2pvpn.crypto.kex import KexMethod, KeyExchange, generate
from p2pvpn.crypto.prf import Prf
from p2pvpn.ike.codes import Exchange, PayloadType
from p2pvpn.ike.config import IkeSettings, Initiate
from p2pvpn.ike.keys import IkeKeys, expand
from p2pvpn.ike.message import GENERIC_BYTES, HEADER_BYTES, Header, build_chain
from p2pvpn.ike.payloads import KeyExchangeData, Payload
from p2pvpn.ike.states import Step

from .auth import AuthRequest
from .followup import answer_share_untrusted
from .task import Received, Reply, Task, Verdict

if TYPE_CHECKING:
    from p2pvpn.ike.sa import IkeSa


def int_auth(prf: Prf, sk_p: Secret, former: bytes, header: Header, chain: tuple[int, bytes]) -> bytes:
    """One link of the chain of values; `chain` is the type of the first inner payload, and all of them as bytes."""
    first, inner = chain
    length = GENERIC_BYTES + len(inner)
    outer = header.build(PayloadType.SK, HEADER_BYTES + length) + bytes([first, 0]) + length.to_bytes(2, "big")
    return prf(sk_p.reveal(), former + outer + inner)


def next_request(sa: IkeSa, request: Initiate) -> Task:
    """What follows a key exchange: the next one, or IKE_AUTH."""
    handshake = sa.handshake
    assert handshake is not None
    if handshake.pending:
        return MixRequest(request, handshake.pending.pop(0))
    return AuthRequest(request)


class MixRequest(Task):
    """The initiator's side of one additional key exchange."""

    exchange = Exchange.IKE_INTERMEDIATE

    def __init__(self, request: Initiate, method: KexMethod) -> None:
        self._request = request
        self._share: KeyExchange = generate(method)

    def tries(self, settings: IkeSettings) -> int:
        return settings.setup_tries

    def request(self, sa: IkeSa) -> list[Payload]:
        handshake = sa.handshake
        assert handshake is not None
        payloads: list[Payload] = [KeyExchangeData(self._share.method.transform, self._share.public)]
        header = Header(sa.spi_i, sa.spi_r, self.exchange, True, False, sa.requests.next_id)
        keys = handshake.keys
        handshake.int_auth_i = int_auth(keys.prf, keys.pi, handshake.int_auth_i, header, build_chain(payloads))
        return payloads

    def answered(self, sa: IkeSa, received: Received, now: float) -> Verdict:
        message, handshake = received.message, sa.handshake
        assert handshake is not None
        theirs = message.first(KeyExchangeData)
        if theirs is None:
            sa.end(Step.REFUSED, f"the responder says {message.error}", now)
            return Verdict.DONE
        if theirs.group != self._share.method.transform:
            raise WireError("a key share of a method that was not due")
        try:
            secret = self._share.shared(theirs.data)
        except TrustError as problem:
            raise WireError(str(problem)) from None
        keys = handshake.keys
        chain = (message.inner_first, message.inner)
        handshake.int_auth_r = int_auth(keys.prf, keys.pr, handshake.int_auth_r, message.header, chain)
        if not handshake.pending:
            sa.advance(Step.KEYED)
        sa.mix(_mixed(sa, secret))
        sa.requests.add_first(next_request(sa, self._request))
        return Verdict.DONE


def answer(sa: IkeSa, received: Received, now: float) -> Reply:
    """The responder's side; only admitted while additional key exchanges are due."""
    message, handshake = received.message, sa.handshake
    assert handshake is not None
    method = handshake.pending[0]
    public, secret = answer_share_untrusted(method, message)
    del handshake.pending[0]
    keys = handshake.keys
    chain = (message.inner_first, message.inner)
    handshake.int_auth_i = int_auth(keys.prf, keys.pi, handshake.int_auth_i, message.header, chain)
    payloads: list[Payload] = [KeyExchangeData(method.transform, public)]
    header = Header(sa.spi_i, sa.spi_r, Exchange.IKE_INTERMEDIATE, False, True, message.header.message_id)
    handshake.int_auth_r = int_auth(keys.prf, keys.pr, handshake.int_auth_r, header, build_chain(payloads))
    if not handshake.pending:
        sa.advance(Step.KEYED)
    return Reply(tuple(payloads), keys=_mixed(sa, secret))


def _mixed(sa: IkeSa, secret: Secret) -> IkeKeys:
    """The next keys: SKEYSEED(n) = prf(SK_d(n-1), SK(n) | Ni | Nr)."""
    handshake = sa.handshake
    assert handshake is not None
    handshake.rounds += 1
    keys, suite = handshake.keys, handshake.suite
    seed = keys.next_seed(*handshake.nonces, [secret])
    return expand(suite.prf, suite.cipher, seed, handshake.nonces, (sa.spi_i, sa.spi_r))
