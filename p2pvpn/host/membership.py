"""Becoming and ceasing to be a member, on disk: pending keys, tokens, grants."""

from __future__ import annotations

import time
from contextlib import suppress

from p2pvpn.core.errors import Fault, LocalError, P2pvpnError, TrustError, WireError
from p2pvpn.identity.armour import Kind
from p2pvpn.identity.enrolment import JoinResult, join_request
from p2pvpn.identity.grants import Grant, Request
from p2pvpn.identity.invitations import Token
from p2pvpn.identity.keys import PeerKey
from p2pvpn.identity.profile import Profile
from p2pvpn.identity.trust import Trust

from .enrol import enrol
from .store import (
    DirectoryStore,
    NetworkDirectory,
    delete_network,
    find_network,
    list_networks,
    network_directory,
    new_store,
    state_root,
)

PENDING = "pending"
PENDING_KEY = "key.pem"


def make_request() -> str:
    """The REQUEST line of this machine, for a key that is made now unless one waits for its grant already."""
    store = DirectoryStore(state_root() / PENDING)
    key = _waiting_key(store, PENDING_KEY)
    if key is None:
        key = PeerKey.generate()
        store.write(PENDING_KEY, key.to_pem().reveal(), secret=True)
    return Request.create(key).encode()


def is_token(text: str) -> bool:
    """Whether this looks like an invitation rather than a grant."""
    return text.strip().lower().startswith(Kind.TOKEN.prefix + ":")


async def join(text: str) -> Profile:
    """Become a member by a token or a grant, and write it down. Raises P2pvpnError; nothing is changed then."""
    if is_token(text):
        return await _join_by_token(text)
    if not text.strip().lower().startswith(Kind.GRANT.prefix + ":"):
        raise WireError(
            "this is neither a token nor a grant",
            hint=f"a token begins with {Kind.TOKEN.prefix}: and a grant with {Kind.GRANT.prefix}:",
        )
    return _join_by_grant(text)


async def _join_by_token(text: str) -> Profile:
    token = Token.decode_untrusted(text)
    if token.expires < time.time():
        raise LocalError(
            f"the invitation has expired: it held until {_date(token.expires)}, and here it is {_date(time.time())}",
            hint="ask for a new one (p2pvpn invite NAME), or set the clock if it is wrong",
            fault=Fault.REFUSED,
        )
    known = _known(token.network.hex())
    if known is not None:
        load(known)  # or say that it is damaged
        raise LocalError(f"this machine is in {known.name} already", hint="p2pvpn status shows it", fault=Fault.REFUSED)
    # The key is kept until the answer is there: an answer lost on the way does not burn the token.
    waiting = DirectoryStore(state_root() / PENDING)
    name = f"join-{token.network.hex()[:16]}.pem"
    key = _waiting_key(waiting, name)
    if key is None:
        key = PeerKey.generate()
        waiting.write(name, key.to_pem().reveal(), secret=True)
    answer = await enrol(token.addresses, token.issuer, join_request(token, key))
    result = JoinResult.parse_untrusted(answer)
    result.verify(token.network, key, time.time())
    profile = Profile.from_join(key, result)
    _save(profile)
    waiting.delete(name)
    return profile


def _join_by_grant(text: str) -> Profile:
    grant = Grant.decode_untrusted(text)
    known = _known(grant.genesis.network_id.hex())
    if known is not None:
        profile = load(known)
        before = profile.member.not_before
        if profile.accept_grant(grant).not_before < before:
            raise LocalError(
                "the grant is older than the certificate in use",
                hint="ask the admin for the newest: p2pvpn regrant NAME",
                fault=Fault.REFUSED,
            )
        profile.trust.verify_chain(profile.chain, time.time())
        profile.save(known.open().write)
        return profile
    waiting = DirectoryStore(state_root() / PENDING)
    key = _waiting_key(waiting, PENDING_KEY)
    if key is None:
        raise LocalError(
            "no request of this machine waits for a grant",
            hint="print one with p2pvpn request, and have it granted",
            fault=Fault.REFUSED,
        )
    Trust(grant.genesis, grant.document).verify_chain(grant.chain, time.time())
    try:
        profile = Profile.from_grant(key, grant)
    except TrustError as problem:
        raise TrustError(
            f"the grant does not answer this machine's request: {problem}",
            hint="join on the machine that printed the request, or print a new one here: p2pvpn request",
        ) from None
    _save(profile)
    waiting.delete(PENDING_KEY)
    return profile


def _known(network_id: str) -> NetworkDirectory | None:
    return next((n for n in list_networks(state_root()) if network_id.startswith(n.id_prefix)), None)


def _save(profile: Profile) -> None:
    with new_store(network_directory(state_root(), profile.genesis.network_id, profile.name).path) as store:
        profile.save(store.write)


def load(network: NetworkDirectory) -> Profile:
    """What this machine has of a network. Raises LocalError, with a way out, when the files are damaged."""
    try:
        return Profile.load(network.open().read)
    except LocalError as problem:
        if problem.fault is not Fault.STATE or problem.hint:
            raise
        hint = f"put back a copy of {network.path}, or: p2pvpn leave --network {network.id_prefix}, and join again"
        raise LocalError(str(problem), hint=hint, fault=Fault.STATE) from None


def _waiting_key(store: DirectoryStore, name: str) -> PeerKey | None:
    pem = store.read(name)
    try:
        return None if pem is None else PeerKey.from_pem(pem)
    except P2pvpnError:
        raise LocalError(
            f"{store.path / name} is damaged",
            hint="delete it: the next request or join makes a new key",
            fault=Fault.STATE,
        ) from None


def _date(wall: float) -> str:
    with suppress(OSError, ValueError, OverflowError):
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(wall))
    return f"second {wall:.0f}"


def choose(network: str | None) -> NetworkDirectory:
    """The network of this name, or the only one. Raises LocalError."""
    return find_network(state_root(), network)


def leave(network: NetworkDirectory) -> None:
    """Delete all that this machine keeps of a network."""
    delete_network(network)
