"""TLS 1.3 over memory buffers, and the two contexts: the hub shows its certificate, clients pin the key in it.

No authority vouches for a hub's name. Its certificate is that of the network, and what counts is the peer ID of the key
in it, which the client knows beforehand. A hub in several networks has several keys: the client names the one it wants
by a server name of the form `<peer ID>.p2pvpn`.
"""

from __future__ import annotations

import functools
import os
import ssl
from collections.abc import Callable

from p2pvpn.core.errors import WireError
from p2pvpn.core.ids import PEER_ID_BYTES, PeerId
from p2pvpn.identity.certificates import parse_untrusted
from p2pvpn.identity.profile import Profile

READ_BYTES = 65_536
NAME_SUFFIX = ".p2pvpn"


def name_of(peer_id: PeerId) -> str:
    """The server name for which a hub shows this key."""
    return peer_id.hex() + NAME_SUFFIX


def peer_id_of_untrusted(name: str | None) -> PeerId:
    """The inverse of `name_of`. Raises WireError."""
    try:
        raw = bytes.fromhex((name or "").removesuffix(NAME_SUFFIX))
    except ValueError:
        raw = b""
    if len(raw) != PEER_ID_BYTES:
        raise WireError("no server name of a hub")
    return PeerId(raw)


class TlsPipe:
    """One end of a TLS connection: bytes of the wire in, bytes of the wire out, whoever carries them."""

    def __init__(self, context: ssl.SSLContext, *, server: bool, name: str | None = None) -> None:
        self._in = ssl.MemoryBIO()
        self._out = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=server, server_hostname=name)
        self.is_ready = False
        """The handshake is done."""
        self._first = b""

    def start(self) -> None:
        """The client's first words."""
        self._shake_untrusted()

    def receive_untrusted(self, data: bytes) -> bytes:
        """What these bytes of the wire hold for us. Raises WireError when TLS fails."""
        if not self._first:
            self._first = data[:16]
        self._in.write(data)
        if not self.is_ready:
            self._shake_untrusted()
            if not self.is_ready:
                return b""
        pieces = []
        try:
            while piece := self._tls.read(READ_BYTES):
                pieces.append(piece)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as problem:
            if not isinstance(problem, ssl.SSLZeroReturnError):
                raise WireError(f"TLS failed: {problem.reason or problem}") from None
        return b"".join(pieces)

    def seal(self, data: bytes) -> None:
        """Encrypt; `take` has the bytes for the wire then."""
        self._tls.write(data)

    def take(self) -> bytes:
        """What is to be sent."""
        return self._out.read()

    @property
    def answers_http(self) -> bool:
        """Whether the other side speaks HTTP instead."""
        return self._first.startswith(b"HTTP/")

    def peer_id_untrusted(self) -> PeerId:
        """The peer ID of the key that the other side proved to have. Raises WireError."""
        der = self._tls.getpeercert(binary_form=True)
        if der is None:
            raise WireError("the server showed no certificate")
        return parse_untrusted(der).peer_id

    def _shake_untrusted(self) -> None:
        try:
            self._tls.do_handshake()
            self.is_ready = True
        except ssl.SSLWantReadError:
            pass
        except (ssl.SSLError, ValueError) as problem:
            reason = getattr(problem, "reason", None)
            raise WireError(f"TLS failed: {reason or problem}") from None


@functools.cache
def client_context() -> ssl.SSLContext:
    """For who pins the key right after the handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def server_context(profile: Profile) -> ssl.SSLContext:
    """With today's certificate of the profile."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    chain = "".join(ssl.DER_cert_to_PEM_cert(der) for der in profile.chain).encode()
    # The ssl module reads keys from files only: this one is in memory and has no name that others could open.
    fd = os.memfd_create("p2pvpn-tls", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(chain + profile.key.to_pem().reveal())
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    return context


def choose_by_name(context: ssl.SSLContext, find: Callable[[PeerId], ssl.SSLContext | None]) -> None:
    """Let clients of `context` name the hub's key that they want; any other name gets that of `context`."""

    def choose(tls: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        try:
            found = find(peer_id_of_untrusted(name))
        except WireError:
            return
        if found is not None:
            tls.context = found

    context.sni_callback = choose
