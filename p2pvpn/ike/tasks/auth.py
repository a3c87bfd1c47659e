"""IKE_AUTH (RFC 7296 sections 1.2 and 2.15): who is who, and the first Child SA.

Every reason to refuse a peer looks the same on the wire: AUTHENTICATION_FAILED, alone. A refused Child SA is another
matter: it leaves the IKE SA standing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from p2pvpn.core.errors import LocalError, TrustError, WireError
from p2pvpn.core.output import Output
from p2pvpn.core.selector import Selector
from p2pvpn.ike.auth import (
    announced_methods,
    id_payload,
    shared_key_auth,
    sign,
    signed_octets,
    verify_shared_key,
    verify_signature,
)
from p2pvpn.ike.codes import CERT_X509_SIGNATURE, AuthMethod, Exchange, Protocol
from p2pvpn.ike.config import Credential, IkeId, IkeSettings, Initiate, RemoteIdentity
from p2pvpn.ike.lease import CFG_REQUEST, Lease, attributes_untrusted, request
from p2pvpn.ike.message import Message, notifications
from p2pvpn.ike.notifies import CHILD_ERRORS, Notify, NotifyType
from p2pvpn.ike.outputs import ChildFailed, InstallChild, Redirected, SaEstablished, UseChild
from p2pvpn.ike.payloads import (
    Authentication,
    Certificate,
    CertificateRequest,
    Configuration,
    Delete,
    IdInitiator,
    IdResponder,
    Payload,
    SecurityAssociation,
)
from p2pvpn.ike.redirect import parse_redirect_untrusted
from p2pvpn.ike.states import Step

from .child import ESP_SPI_BYTES, ChildOffer, answer_offer, make_child
from .inform import Inform
from .task import Received, Refusal, Reply, Task, Verdict

if TYPE_CHECKING:
    from p2pvpn.ike.sa import IkeSa


PPK_ID_FIXED = b"\x02"
"""The kind of a PPK_ID that is just a name (RFC 8784 section 5.1)."""


class AuthRequest(Task):
    """The initiator's side."""

    exchange = Exchange.IKE_AUTH

    def __init__(self, request: Initiate) -> None:
        self._request = request
        self._offer: ChildOffer | None = None

    def tries(self, settings: IkeSettings) -> int:
        return settings.setup_tries

    def request(self, sa: IkeSa) -> list[Payload]:
        wanted = self._request
        credential = wanted.credential
        sa.credential = credential
        payloads: list[Payload] = [id_payload(credential.local_id, True), *_certificates(credential)]
        if credential.authorities:
            payloads.append(CertificateRequest(CERT_X509_SIGNATURE, b"".join(credential.authorities)))
        if wanted.remote_id is not None:
            payloads.append(id_payload(wanted.remote_id, False))
        payloads += _prove_with_ppk(sa, credential)
        if wanted.initial_contact:
            payloads += notifications([Notify(NotifyType.INITIAL_CONTACT)])
        if wanted.request_lease:
            payloads.append(request())
        if not wanted.childless:
            self._offer = ChildOffer.make(sa, wanted.local, wanted.remote, first=True, transport=wanted.transport)
            payloads += self._offer.payloads
        return payloads + _auth_notifies(credential)

    def answered(self, sa: IkeSa, received: Received, now: float) -> Verdict:
        message = received.message
        if message.first(IdResponder) is None:
            sa.end(Step.REFUSED, f"the responder says {message.error}", now)
            return Verdict.DONE
        try:
            _settle_ppk(sa, self._request.credential, message)
            sa.remote = self._authenticate(sa, message)
        except TrustError as problem:
            self._distrust(sa, str(problem), now)
            return Verdict.DONE
        other = [one for one in message.notifies if one.is_error and one.type not in CHILD_ERRORS]
        if other:
            self._distrust(sa, f"the responder says {other[0]}", now)
            return Verdict.DONE
        sa.peer.mobike = message.notify(NotifyType.MOBIKE_SUPPORTED) is not None
        failure = self._take_child(sa, message)
        given = message.first(Configuration)
        lease = None if given is None else Lease.of_untrusted(given)
        sa.emit(_established_event(sa, message, now, lease))
        gateway = message.notify(NotifyType.REDIRECT)
        if gateway is not None:
            sa.emit(Redirected(sa.id, parse_redirect_untrusted(gateway.data)[0], False))
        if failure:
            sa.emit(ChildFailed(sa.id, failure))
        sa.establish(now)
        return Verdict.DONE

    def _authenticate(self, sa: IkeSa, message: Message) -> RemoteIdentity:
        wanted = self._request
        named = message.one(IdResponder)
        identity = IkeId(named.kind, named.data)
        if wanted.remote_id is not None and identity != wanted.remote_id:
            raise TrustError(f"the responder is {identity}, not {wanted.remote_id}")
        return _verify(sa, wanted.credential, identity, message)

    def _distrust(self, sa: IkeSa, reason: str, now: float) -> None:
        """The responder believes that the SA stands, so it is told (RFC 7296 section 2.21.2)."""
        sa.end(Step.UNTRUSTED, reason, now)
        sa.requests.add_first(Inform(notifications([Notify(NotifyType.AUTHENTICATION_FAILED)]), ends=True))

    def _take_child(self, sa: IkeSa, message: Message) -> str:
        """Installs the Child SA; otherwise the reason why there is none."""
        if self._offer is None:
            return ""
        if message.first(SecurityAssociation) is None:
            return f"the responder says {message.error or 'nothing of a Child SA'}"
        assert sa.remote is not None
        try:
            terms = self._offer.accepted_untrusted(message, sa.remote.blocks)
        except (WireError, Refusal) as problem:
            spi = self._offer.spi.to_bytes(ESP_SPI_BYTES, "big")
            sa.requests.add_first(Inform([Delete(Protocol.ESP, (spi,))]))
            return str(problem)
        assert sa.handshake is not None
        child = make_child(sa, terms, sa.handshake.nonces, began=True)
        sa.children.add(child)
        sa.emit(InstallChild(sa.id, child))
        sa.emit(UseChild(sa.id, child.id))
        return ""


def answer(sa: IkeSa, received: Received, now: float) -> Reply:
    """The responder's side. Raises Refusal."""
    message = received.message
    sa.peer.methods = announced_methods(message.notify(NotifyType.SUPPORTED_AUTH_METHODS))
    try:
        credential, remote = _authenticate_initiator(sa, message)
        shared_key = message.one(Authentication).method == AuthMethod.SHARED_KEY
        proof = _prove(sa, credential, shared_key=shared_key)
    except (TrustError, LocalError) as problem:
        raise Refusal(str(problem), NotifyType.AUTHENTICATION_FAILED, fatal=True) from None
    sa.path = received.path
    sa.contact_is_initial = message.notify(NotifyType.INITIAL_CONTACT) is not None
    sa.peer.mobike = message.notify(NotifyType.MOBIKE_SUPPORTED) is not None
    payloads: list[Payload] = [id_payload(credential.local_id, False)]
    if not shared_key:
        payloads += _certificates(credential)
    payloads.append(proof)
    if sa.peer.ppk_used:
        payloads += notifications([Notify(NotifyType.PPK_IDENTITY)])
    lease, more, refused = _lease_untrusted(credential, remote, message)
    payloads += more
    if lease is not None:
        own = tuple(Selector.of_address(address) for address in lease.addresses)
        remote = replace(remote, blocks=remote.blocks + own)
    sa.credential, sa.remote = credential, remote
    then: list[Output] = [_established_event(sa, message, now, lease)]
    if refused:
        then.append(ChildFailed(sa.id, "no address for the peer"))
    elif message.first(SecurityAssociation) is not None:
        try:
            terms, described = answer_offer(sa, message, remote.blocks, first=True)
        except Refusal as refusal:
            payloads += notifications([refusal.notify])
            then.append(ChildFailed(sa.id, str(refusal)))
        else:
            payloads += described
            assert sa.handshake is not None
            child = make_child(sa, terms, sa.handshake.nonces, began=False)
            sa.children.add(child)
            sa.children.unconfirmed.add(child.id)
            sa.emit(InstallChild(sa.id, child))
            then.insert(0, UseChild(sa.id, child.id))
    payloads += _auth_notifies(credential)
    return Reply(tuple(payloads), tuple(then), Step.AUTHENTICATED)


def _lease_untrusted(
    credential: Credential, remote: RemoteIdentity, message: Message
) -> tuple[Lease | None, list[Payload], bool]:
    """What the peer asked for and gets, how it is told, and whether it has to do without a Child SA."""
    asked = message.first(Configuration)
    if asked is None or asked.kind != CFG_REQUEST or credential.lease is None:
        return None, [], False
    kinds = frozenset(kind for kind, _ in attributes_untrusted(asked))
    lease = credential.lease(remote)
    if lease is None:
        return None, notifications([Notify(NotifyType.INTERNAL_ADDRESS_FAILURE)]), True
    return lease, [lease.reply(kinds)], False


def _established_event(sa: IkeSa, message: Message, now: float, lease: Lease | None) -> SaEstablished:
    """With the notifications of the peer's IKE_AUTH message that are not for this machine."""
    assert sa.credential is not None
    assert sa.remote is not None
    told = tuple(one for one in message.notifies if one.is_for_the_engine)
    return SaEstablished(sa.id, sa.credential.network, sa.remote, sa.initiator, sa.path, told, sa.tag, now, lease)


def _authenticate_initiator(sa: IkeSa, message: Message) -> tuple[Credential, RemoteIdentity]:
    """The credential to answer with and who the initiator is. Raises TrustError: the last credential's reason."""
    named = message.one(IdInitiator)
    identity = IkeId(named.kind, named.data)
    problem = TrustError("no credential for this peer")
    plain = None if sa.handshake is None else sa.handshake.keys
    for credential in _candidates(sa, message):
        try:
            return credential, _verify(sa, credential, identity, _without_ppk(sa, credential, message))
        except TrustError as found:
            problem = found
            if plain is not None:
                sa.use_keys(plain)
    raise problem


def _candidates(sa: IkeSa, message: Message) -> Iterator[Credential]:
    """Those with the ID that the initiator wants; without one, those with an authority that it accepts, then all."""
    credentials = sa.local.credentials
    wanted = message.first(IdResponder)
    named = [one for one in credentials if wanted and one.local_id == IkeId(wanted.kind, wanted.data)]
    if named:
        yield from named
        return
    accepted = frozenset[bytes]().union(*(one.authorities for one in message.all(CertificateRequest)))
    yield from sorted(credentials, key=lambda one: not accepted.intersection(one.authorities))


def _verify(sa: IkeSa, credential: Credential, identity: IkeId, message: Message) -> RemoteIdentity:
    """The peer's identity, when its chain and its AUTH payload hold. Raises TrustError."""
    auth = message.first(Authentication)
    if auth is None:
        raise TrustError("no AUTH payload: EAP is not for us")
    handshake = sa.handshake
    assert handshake is not None
    keys = handshake.keys
    if sa.initiator:
        octets = signed_octets(
            keys.prf, handshake.answer, handshake.nonce_i, keys.pr, identity, int_auth=handshake.int_auth
        )
    else:
        octets = signed_octets(
            keys.prf, handshake.request, handshake.nonce_r, keys.pi, identity, int_auth=handshake.int_auth
        )
    if auth.method == AuthMethod.SHARED_KEY:
        if credential.psk is None or (sa.initiator and credential.certificates):
            raise TrustError("a shared secret where a certificate is wanted")
        verify_shared_key(keys.prf, credential.psk, auth, octets)
        return _identify(credential, identity, ())
    chain = tuple(one.data for one in message.all(Certificate) if one.encoding == CERT_X509_SIGNATURE)
    if not chain or not credential.certificates:
        raise TrustError("a signature without a certificate, or where a shared secret is wanted")
    remote = _identify(credential, identity, chain)
    if remote.key is None:
        raise TrustError("no key to verify with")
    verify_signature(remote.key, auth, octets)
    return remote


def _identify(credential: Credential, identity: IkeId, chain: tuple[bytes, ...]) -> RemoteIdentity:
    """By the credential. A certificate that does not parse is as bad as one that is not trusted, and looks the same."""
    try:
        return credential.verify(identity, chain)
    except WireError as problem:
        raise TrustError(str(problem)) from None


def _prove(sa: IkeSa, credential: Credential, *, shared_key: bool) -> Authentication:
    """Our AUTH payload. Raises LocalError when the credential cannot make one that the peer understands."""
    handshake = sa.handshake
    assert handshake is not None
    keys = handshake.keys
    if sa.initiator:
        message, nonce, key = handshake.request, handshake.nonce_r, keys.pi
    else:
        message, nonce, key = handshake.answer, handshake.nonce_i, keys.pr
    octets = signed_octets(keys.prf, message, nonce, key, credential.local_id, int_auth=handshake.int_auth)
    if shared_key:
        if credential.psk is None:
            raise LocalError("the credential has neither certificates nor a shared secret")
        return shared_key_auth(keys.prf, credential.psk, octets)
    return sign(credential, sa.peer.hashes, octets, sa.peer.methods)


def _prove_with_ppk(sa: IkeSa, credential: Credential) -> list[Payload]:
    """The initiator's AUTH; with a postquantum preshared key also its name and, unless it is a must, AUTH without."""
    shared_key = not credential.certificates
    plain = _prove(sa, credential, shared_key=shared_key)
    if credential.ppk is None or not sa.peer.ppk:
        return [plain]
    assert sa.handshake is not None
    keys = sa.handshake.keys
    name, secret = credential.ppk
    sa.use_keys(keys.with_ppk(secret))
    mixed = _prove(sa, credential, shared_key=shared_key)
    sa.use_keys(keys)
    told = [Notify(NotifyType.PPK_IDENTITY, PPK_ID_FIXED + name)]
    if not credential.ppk_required:
        told.append(Notify(NotifyType.NO_PPK_AUTH, plain.data))
    return [mixed, *notifications(told)]


def _settle_ppk(sa: IkeSa, credential: Credential, message: Message) -> None:
    """The responder says whether it has the key too. Raises TrustError."""
    if message.notify(NotifyType.PPK_IDENTITY) is not None and credential.ppk is not None:
        assert sa.handshake is not None
        sa.use_keys(sa.handshake.keys.with_ppk(credential.ppk[1]))
        sa.peer.ppk_used = True
    elif credential.ppk_required:
        raise TrustError("the responder does not use the postquantum preshared key")


def _without_ppk(sa: IkeSa, credential: Credential, message: Message) -> Message:
    """The initiator's message with the AUTH payload that counts, and the keys that go with it. Raises TrustError."""
    named = message.notify(NotifyType.PPK_IDENTITY)
    sa.peer.ppk_used = False
    if named is not None and credential.ppk is not None and named.data == PPK_ID_FIXED + credential.ppk[0]:
        assert sa.handshake is not None
        sa.use_keys(sa.handshake.keys.with_ppk(credential.ppk[1]))
        sa.peer.ppk_used = True
        return message
    if credential.ppk_required:
        raise TrustError("the initiator does not use the postquantum preshared key")
    other, auth = message.notify(NotifyType.NO_PPK_AUTH), message.first(Authentication)
    if named is None or other is None or auth is None:
        return message
    payloads = [Authentication(auth.method, other.data) if one is auth else one for one in message.payloads]
    return replace(message, payloads=tuple(payloads))


def _certificates(credential: Credential) -> list[Payload]:
    return [Certificate(CERT_X509_SIGNATURE, der) for der in credential.certificates]


def _auth_notifies(credential: Credential) -> list[Payload]:
    return notifications([Notify(NotifyType.MOBIKE_SUPPORTED), *credential.auth_notifies()])
