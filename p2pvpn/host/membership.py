"""Becoming and ceasing to be a member, on disk: pending keys, tokens, grants."""

from __future__ import annotations

import shutil
import time

from p2pvpn.core.errors import LocalError
from p2pvpn.identity.armour import Kind
from p2pvpn.identity.enrolment import JoinResult, join_request
from p2pvpn.identity.grants import Grant, Request
from p2pvpn.identity.invitations import Token
from p2pvpn.identity.keys import PeerKey
from p2pvpn.identity.profile import Profile

from .enrol import enrol
from .store import DirectoryStore, NetworkDirectory, find_network, list_networks, network_directory, state_root

PENDING = "pending"
PENDING_KEY = "key.pem"


def make_request() -> str:
    """The REQUEST line of this machine, for a key that is made now unless one waits for its grant already."""
    store = DirectoryStore(state_root() / PENDING)
    pem = store.read(PENDING_KEY)
    key = PeerKey.from_pem(pem) if pem is not None else PeerKey.generate()
    if pem is None:
        store.write(PENDING_KEY, key.to_pem().reveal(), secret=True)
    return Request.create(key).encode()


def is_token(text: str) -> bool:
    """Whether this looks like an invitation rather than a grant."""
    return text.strip().lower().startswith(Kind.TOKEN.prefix + ":")


async def join(text: str) -> Profile:
    """Become a member by a token or a grant, and write it down. Raises P2pvpnError; nothing is changed then."""
    return await _join_by_token(text) if is_token(text) else _join_by_grant(text)


async def _join_by_token(text: str) -> Profile:
    token = Token.decode_untrusted(text)
    if token.expires < time.time():
        raise LocalError("the invitation has expired", hint="ask for a new one: p2pvpn invite NAME")
    if _known(token.network.hex()) is not None:
        raise LocalError("this machine is in that network already", hint="p2pvpn status shows it")
    # The key is kept until the answer is there: an answer lost on the way does not burn the token.
    waiting = DirectoryStore(state_root() / PENDING)
    name = f"join-{token.network.hex()[:16]}.pem"
    pem = waiting.read(name)
    key = PeerKey.from_pem(pem) if pem is not None else PeerKey.generate()
    if pem is None:
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
        store = known.open()
        profile = Profile.load(store.read)
        profile.accept_grant(grant)
        profile.save(store.write)
        return profile
    waiting = DirectoryStore(state_root() / PENDING)
    pem = waiting.read(PENDING_KEY)
    if pem is None:
        raise LocalError(
            "no request of this machine waits for a grant", hint="print one with p2pvpn request, and have it granted"
        )
    profile = Profile.from_grant(PeerKey.from_pem(pem), grant)
    _save(profile)
    waiting.delete(PENDING_KEY)
    return profile


def _known(network_id: str) -> NetworkDirectory | None:
    return next((n for n in list_networks(state_root()) if network_id.startswith(n.id_prefix)), None)


def _save(profile: Profile) -> None:
    profile.save(network_directory(state_root(), profile.genesis.network_id, profile.name).open().write)


def choose(network: str | None) -> NetworkDirectory:
    """The network of this name, or the only one. Raises LocalError."""
    return find_network(state_root(), network)


def leave(network: NetworkDirectory) -> None:
    """Delete all that this machine keeps of a network."""
    try:
        shutil.rmtree(network.path)
    except OSError as problem:
        raise LocalError(f"cannot delete {network.path}: {problem.strerror}") from problem
