"""IKE_SA_INIT (RFC 7296 sections 1.2, 2.6 and 2.7): agreeing on algorithms and keys.

Nothing in this exchange is authenticated, so nothing in it ends an attempt: an initiator that gets an error goes on
waiting for a true answer, and a responder keeps no state for what it refuses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.errors import TrustError, WireError
from p2pvpn.crypto.kex import KexMethod, KeyExchange, generate, respond
from p2pvpn.ike.auth import announced_methods, hash_notify, methods_notify, peer_hashes
from p2pvpn.ike.codes import CERT_X509_SIGNATURE, Exchange
from p2pvpn.ike.config import IkeSettings, Initiate, Local
from p2pvpn.ike.cookies import MAX_COOKIE_BYTES
from p2pvpn.ike.keys import IkeKeys, expand, skeyseed
from p2pvpn.ike.message import NO_SPI, Message, notifications
from p2pvpn.ike.nat import HASH_BYTES, detection_notifies, local_nat, remote_nat
from p2pvpn.ike.notifies import Notify, NotifyType
from p2pvpn.ike.outputs import Redirected
from p2pvpn.ike.payloads import CertificateRequest, KeyExchangeData, Nonce, Payload, SecurityAssociation
from p2pvpn.ike.proposals import Allowed, IkeSuite, Proposal, choose_ike, chosen_ike_untrusted, offers_ike
from p2pvpn.ike.redirect import MAX_REDIRECTS, parse_redirect_untrusted, redirect_notify, redirected_from
from p2pvpn.ike.states import Step

from .intermediate import next_request
from .task import Received, Refusal, Task, Verdict

if TYPE_CHECKING:
    from p2pvpn.ike.sa import IkeSa

NONCE_BYTES = 32
"""At least half the key size of the largest PRF (RFC 7296 section 2.10): SHA2-512 has 64."""
MAX_COOKIES = 4
"""Cookies taken in one attempt; a responder that rotates its secret asks twice."""
MAX_CERTREQ_HASHES = 16
"""Keeps the answer to IKE_SA_INIT below three times the request."""


@dataclass(slots=True)
class Handshake:
    """What IKE_AUTH needs of the exchanges before; dropped when the SA is established.

    `pending` are additional key exchanges; `rounds` of them are done, and authenticated by `int_auth_i` and
    `int_auth_r` (RFC 9242 section 3.3.2).
    """

    keys: IkeKeys
    suite: IkeSuite
    nonce_i: bytes
    nonce_r: bytes
    request: bytes
    answer: bytes
    pending: list[KexMethod]
    int_auth_i: bytes = b""
    int_auth_r: bytes = b""
    rounds: int = 0

    @property
    def nonces(self) -> tuple[bytes, bytes]:
        return self.nonce_i, self.nonce_r

    @property
    def int_auth(self) -> bytes:
        """IntAuth, which ends with the message ID of IKE_AUTH; empty when there was no exchange in between."""
        if not self.rounds:
            return b""
        return self.int_auth_i + self.int_auth_r + (self.rounds + 1).to_bytes(4, "big")


@dataclass(slots=True)
class PeerFeatures:
    """What the peer announced, and what NAT detection found."""

    fragmentation: bool = False
    mobike: bool = False
    childless: bool = False
    intermediate: bool = False
    ppk: bool = False
    ppk_used: bool = False
    redirect: bool = False
    methods: frozenset[bytes] = frozenset()
    """AlgorithmIdentifiers that the peer verifies, as far as it told (RFC 9593)."""
    hashes: frozenset[int] = frozenset()
    authorities: frozenset[bytes] = frozenset()
    local_nat: bool = False
    remote_nat: bool = False

    @classmethod
    def of(cls, message: Message, spi_i: bytes, spi_r: bytes, received: Received) -> PeerFeatures:
        """From an IKE_SA_INIT message; the SPIs are those of its header."""
        asked = message.all(CertificateRequest)
        return cls(
            fragmentation=message.notify(NotifyType.IKEV2_FRAGMENTATION_SUPPORTED) is not None,
            childless=message.notify(NotifyType.CHILDLESS_IKEV2_SUPPORTED) is not None,
            intermediate=_knows_intermediate(message),
            ppk=message.notify(NotifyType.USE_PPK) is not None,
            redirect=message.notify(NotifyType.REDIRECT_SUPPORTED) is not None,
            methods=announced_methods(message.notify(NotifyType.SUPPORTED_AUTH_METHODS)),
            hashes=peer_hashes(message.notify(NotifyType.SIGNATURE_HASH_ALGORITHMS)),
            authorities=frozenset[bytes]().union(*(one.authorities for one in asked)),
            local_nat=bool(local_nat(message, spi_i, spi_r, received.path)),
            remote_nat=bool(remote_nat(message, spi_i, spi_r, received.path)),
        )


class InitRequest(Task):
    """The initiator's side. Keeps one key share per group tried, since the answer may be to any of them."""

    exchange = Exchange.IKE_SA_INIT

    def __init__(self, local: Local, request: Initiate) -> None:
        settings = local.settings
        self._request = request
        self._nonce = local.entropy(NONCE_BYTES)
        self._fake = local.entropy(HASH_BYTES) if settings.fake_nat else None
        self._offers = offers_ike(
            settings.ciphers,
            settings.prfs,
            settings.kexes,
            settings.additional_kexes,
            required=settings.additional_required,
        )
        self._group = settings.kexes[0]
        self._shares: dict[KexMethod, KeyExchange] = {}
        self._packets: dict[KexMethod, bytes] = {}
        self._cookie = b""
        self._cookies = 0
        self._came_from: list[Endpoint] = []

    def tries(self, settings: IkeSettings) -> int:
        return settings.setup_tries

    def request(self, sa: IkeSa) -> list[Payload]:
        share = self._shares.get(self._group)
        if share is None:
            share = self._shares[self._group] = generate(self._group)
        cookie = [Notify(NotifyType.COOKIE, self._cookie)] if self._cookie else []
        return [
            *notifications(cookie),
            SecurityAssociation(self._offers),
            KeyExchangeData(self._group.transform, share.public),
            Nonce(self._nonce),
            *notifications(detection_notifies(sa.spi_i, NO_SPI, self._request.path, self._fake)),
            *notifications(_features(sa.local.settings)),
            *notifications([Notify(NotifyType.REDIRECT_SUPPORTED)] if not self._came_from else []),
            *notifications([redirected_from(one) for one in self._came_from[-1:]]),
            *notifications([Notify(NotifyType.USE_PPK)] if self._request.credential.ppk else []),
        ]

    def sent(self, packet: bytes) -> None:
        self._packets[self._group] = packet

    def answered(self, sa: IkeSa, received: Received, now: float) -> Verdict:
        message = received.message
        try:
            if message.first(SecurityAssociation) is None:
                return self._notified(sa, message, now)
            return self._keyed(sa, received, now)
        except (WireError, TrustError):
            return Verdict.IGNORED

    def _notified(self, sa: IkeSa, message: Message, now: float) -> Verdict:
        cookie = message.notify(NotifyType.COOKIE)
        if cookie is not None:
            if not 1 <= len(cookie.data) <= MAX_COOKIE_BYTES or self._cookies == MAX_COOKIES:
                return Verdict.IGNORED
            self._cookie = cookie.data
            self._cookies += 1
            return self._again(sa)
        wrong_group = message.notify(NotifyType.INVALID_KE_PAYLOAD)
        if wrong_group is not None and len(wrong_group.data) == 2:
            group = _group_of(int.from_bytes(wrong_group.data, "big"), sa.local.settings.kexes)
            if group is not None and group not in self._shares:
                self._group = group
                return self._again(sa)
        redirect = message.notify(NotifyType.REDIRECT)
        if redirect is not None:
            return self._redirected_untrusted(sa, redirect)
        if message.error is not None:
            sa.doubt(str(message.error), now)
        return Verdict.IGNORED

    def _redirected_untrusted(self, sa: IkeSa, notify: Notify) -> Verdict:
        """Begins anew elsewhere. Whoever knows our nonce may say so; it is AUTH that counts (RFC 5685 section 9)."""
        gateway, nonce = parse_redirect_untrusted(notify.data)
        if nonce != self._nonce or len(self._came_from) == MAX_REDIRECTS:
            return Verdict.IGNORED
        self._came_from.append(sa.path.remote)
        sa.path = sa.path._replace(remote=Endpoint.of(str(gateway), sa.path.remote.port))
        self._request = replace(self._request, path=sa.path)
        self._nonce = sa.local.entropy(NONCE_BYTES)
        self._shares.clear()
        self._packets.clear()
        self._cookie, self._cookies = b"", 0
        sa.emit(Redirected(sa.id, gateway, True))
        return self._again(sa)

    def _again(self, sa: IkeSa) -> Verdict:
        sa.advance(Step.RETRY)
        return Verdict.AGAIN

    def _keyed(self, sa: IkeSa, received: Received, now: float) -> Verdict:
        message = received.message
        header = message.header
        if header.spi_r == NO_SPI:
            raise WireError("the responder's SPI is zero")
        their_share = message.one(KeyExchangeData)
        nonce_r = message.one(Nonce).data
        group = _group_of(their_share.group, tuple(self._shares))
        if group is None:
            raise WireError("a key share of a group that we did not send")
        answer = message.one(SecurityAssociation).proposals
        _, suite = chosen_ike_untrusted(answer, self._offers)
        if suite.kex is not group or (suite.additional and not _knows_intermediate(message)):
            raise WireError("the answer contradicts itself")
        shared = self._shares[group].shared(their_share.data)
        sa.spi_r = header.spi_r
        seed = skeyseed(suite.prf, self._nonce, nonce_r, shared)
        keys = expand(suite.prf, suite.cipher, seed, (self._nonce, nonce_r), (sa.spi_i, sa.spi_r))
        sa.peer = PeerFeatures.of(message, sa.spi_i, sa.spi_r, received)
        additional = list(suite.additional)
        sa.key(Handshake(keys, suite, self._nonce, nonce_r, self._packets[group], received.raw, additional))
        sa.advance(Step.MIX if additional else Step.KEYED)
        if self._request.childless and not sa.peer.childless:
            sa.end(Step.DROPPED, "the responder makes no IKE SA without a Child SA", now)
            return Verdict.DONE
        if self._request.credential.ppk_required and not sa.peer.ppk:
            sa.end(Step.DROPPED, "the responder has no postquantum preshared key", now)
            return Verdict.DONE
        sa.requests.add_first(next_request(sa, self._request))
        return Verdict.DONE


@dataclass(frozen=True, slots=True)
class InitChoice:
    """A responder's decision on an IKE_SA_INIT request that it will answer."""

    proposal: Proposal
    suite: IkeSuite
    nonce_i: bytes
    their_share: bytes


def choose_untrusted(settings: IkeSettings, message: Message, path: Path) -> InitChoice:
    """What to answer. Raises Refusal: NO_PROPOSAL_CHOSEN, REDIRECT, or INVALID_KE_PAYLOAD with the group we want."""
    share = message.one(KeyExchangeData)
    proposals = message.one(SecurityAssociation).proposals
    gateway = None
    if settings.redirect is not None and message.notify(NotifyType.REDIRECT_SUPPORTED) is not None:
        gateway = settings.redirect(path)
    if gateway is not None:
        notify = redirect_notify(gateway, message.one(Nonce).data)
        raise Refusal("another gateway has more room", NotifyType.REDIRECT, notify.data)
    additional = settings.known_additional if _knows_intermediate(message) else ()
    allowed = Allowed(settings.all_ciphers, settings.prfs, settings.kexes, additional, sent_group=share.group)
    found = choose_ike(proposals, allowed)
    if found is None or (settings.additional_required and not found[2].additional):
        raise Refusal("no proposal that we can accept", NotifyType.NO_PROPOSAL_CHOSEN)
    _, proposal, suite = found
    if suite.kex.transform != share.group:
        group = suite.kex.transform.to_bytes(2, "big")
        raise Refusal("a key share of another group", NotifyType.INVALID_KE_PAYLOAD, group)
    if len(share.data) != suite.kex.public_bytes:
        raise Refusal("a key share of the wrong length", NotifyType.INVALID_SYNTAX)
    return InitChoice(proposal, suite, message.one(Nonce).data, share.data)


def answer(sa: IkeSa, received: Received, choice: InitChoice) -> list[Payload]:
    """The payloads of the responder's answer; the SA has its keys then. Raises TrustError for a bad key share."""
    local = sa.local
    public, shared = respond(choice.suite.kex, choice.their_share)
    nonce_r = local.entropy(NONCE_BYTES)
    suite = choice.suite
    seed = skeyseed(suite.prf, choice.nonce_i, nonce_r, shared)
    keys = expand(suite.prf, suite.cipher, seed, (choice.nonce_i, nonce_r), (sa.spi_i, sa.spi_r))
    sa.peer = PeerFeatures.of(received.message, sa.spi_i, NO_SPI, received)
    sa.key(Handshake(keys, suite, choice.nonce_i, nonce_r, received.raw, b"", list(suite.additional)))
    if suite.additional:
        sa.advance(Step.MIX)
    fake = local.entropy(HASH_BYTES) if local.settings.fake_nat else None
    return [
        SecurityAssociation((choice.proposal,)),
        KeyExchangeData(suite.kex.transform, public),
        Nonce(nonce_r),
        *notifications(detection_notifies(sa.spi_i, sa.spi_r, received.path, fake)),
        *_certificate_requests(local),
        *notifications(_features(local.settings, sa.peer)),
        *notifications([Notify(NotifyType.CHILDLESS_IKEV2_SUPPORTED), methods_notify()]),
        *notifications(
            [Notify(NotifyType.USE_PPK)] if sa.peer.ppk and any(one.ppk for one in local.credentials) else []
        ),
    ]


def _features(settings: IkeSettings, peer: PeerFeatures | None = None) -> list[Notify]:
    """What we announce; some only to a `peer` that did so before."""
    notifies = [Notify(NotifyType.IKEV2_FRAGMENTATION_SUPPORTED), hash_notify()]
    if settings.additional_kexes and (peer is None or peer.intermediate):
        notifies.append(Notify(NotifyType.INTERMEDIATE_EXCHANGE_SUPPORTED))
    return notifies


def _knows_intermediate(message: Message) -> bool:
    return message.notify(NotifyType.INTERMEDIATE_EXCHANGE_SUPPORTED) is not None


def _certificate_requests(local: Local) -> list[Payload]:
    if not local.settings.request_certificates:
        return []
    hashes = dict.fromkeys(one for credential in local.credentials for one in credential.authorities)
    if not hashes:
        return []
    return [CertificateRequest(CERT_X509_SIGNATURE, b"".join(list(hashes)[:MAX_CERTREQ_HASHES]))]


def _group_of(number: int, groups: tuple[KexMethod, ...]) -> KexMethod | None:
    return next((one for one in groups if one.transform == number), None)
