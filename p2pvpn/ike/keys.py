"""Keys of an IKE SA and of its Child SAs (RFC 7296 sections 2.13, 2.14 and 2.17).

    SKEYSEED = prf(Ni | Nr, g^ir)                                         of a first IKE SA
    SKEYSEED = prf(SK_d, SK(n) | Ni | Nr)                                 after an additional exchange (RFC 9370)
    SKEYSEED = prf(SK_d, g^ir | Ni | Nr | SK(1) | ...)                    of a rekeyed one, with the old PRF
    SK_d | SK_ai | SK_ar | SK_ei | SK_er | SK_pi | SK_pr = prf+(SKEYSEED, Ni | Nr | SPIi | SPIr)
    KEYMAT   = prf+(SK_d, [g^ir |] Ni | Nr [| SK(1) | ...])               initiator to responder first

Combined ciphers have no SK_a (RFC 5282 section 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from p2pvpn.core.child import EspSuite
from p2pvpn.core.secret import Secret
from p2pvpn.crypto.prf import Prf

from .proposals import IkeCipher

_EXPORTER = b"p2pvpn exporter"
"""Keeps exported secrets apart from KEYMAT, which comes from SK_d too."""


@dataclass(frozen=True, slots=True)
class IkeKeys:
    """SK_d, SK_ai, SK_ar, SK_ei, SK_er, SK_pi, SK_pr under the negotiated PRF and cipher."""

    prf: Prf
    cipher: IkeCipher
    d: Secret
    ai: Secret
    ar: Secret
    ei: Secret
    er: Secret
    pi: Secret
    pr: Secret

    def child(
        self, cipher: EspSuite, nonce_i: bytes, nonce_r: bytes, shared: Sequence[Secret] = ()
    ) -> tuple[Secret, Secret]:
        """Keying material of a Child SA: initiator to responder, and back. `shared` are the exchanged secrets."""
        size = cipher.keymat_bytes
        keymat = self.prf.plus(self.d.reveal(), _mixed(shared, nonce_i + nonce_r), 2 * size)
        return Secret(keymat[:size]), Secret(keymat[size:])

    def export(self, label: bytes, length: int) -> Secret:
        """A secret for another purpose, the same at both ends: prf+(prf(SK_d, "p2pvpn exporter"), label)."""
        root = self.prf(self.d.reveal(), _EXPORTER)
        return Secret(self.prf.plus(root, label, length))

    def next_seed(self, nonce_i: bytes, nonce_r: bytes, shared: Sequence[Secret]) -> Secret:
        """SKEYSEED of what follows these keys: after one more key exchange, or of the rekeyed IKE SA."""
        return Secret(self.prf(self.d.reveal(), _mixed(shared, nonce_i + nonce_r)))

    def with_ppk(self, ppk: Secret) -> IkeKeys:
        """With a postquantum preshared key in what authenticates and in what derives (RFC 8784 section 3)."""

        def mix(key: Secret) -> Secret:
            return Secret(self.prf.plus(ppk.reveal(), key.reveal(), self.prf.size))

        return replace(self, d=mix(self.d), pi=mix(self.pi), pr=mix(self.pr))


def _mixed(shared: Sequence[Secret], nonces: bytes) -> bytes:
    """The first secret before the nonces, the additional ones behind them (RFC 9370 section 2.2.4)."""
    first, more = shared[:1], shared[1:]
    return b"".join(one.reveal() for one in first) + nonces + b"".join(one.reveal() for one in more)


def skeyseed(prf: Prf, nonce_i: bytes, nonce_r: bytes, shared: Secret) -> Secret:
    """Of a new IKE SA. The PRFs are HMACs, which take the nonces whole (RFC 7296 section 2.14)."""
    return Secret(prf(nonce_i + nonce_r, shared.reveal()))


def expand(
    prf: Prf, cipher: IkeCipher, seed: Secret, nonces: tuple[bytes, bytes], spis: tuple[bytes, bytes]
) -> IkeKeys:
    """All SK_ keys from SKEYSEED; nonces and SPIs are the initiator's and the responder's."""
    authentic = cipher.integrity_bytes
    secret = cipher.keymat_bytes - authentic
    sizes = (prf.size, authentic, authentic, secret, secret, prf.size, prf.size)
    stream = prf.plus(seed.reveal(), b"".join(nonces + spis), sum(sizes))
    parts = []
    for size in sizes:
        parts.append(Secret(stream[:size]))
        stream = stream[size:]
    return IkeKeys(prf, cipher, *parts)
