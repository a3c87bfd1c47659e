"""Keys of an IKE SA and of its Child SAs (RFC 7296 sections 2.13, 2.14 and 2.17).

    SKEYSEED = prf(Ni | Nr, g^ir)
    SK_d | SK_ei | SK_er | SK_pi | SK_pr = prf+(SKEYSEED, Ni | Nr | SPIi | SPIr)
    KEYMAT   = prf+(SK_d, Ni | Nr)                      initiator to responder first

The ciphers are authenticated ones, so there are no SK_a (RFC 5282 section 7).
"""

from __future__ import annotations

from dataclasses import dataclass

from p2pvpn.core.child import EspSuite
from p2pvpn.core.secret import Secret
from p2pvpn.crypto.prf import Prf

_EXPORTER = b"p2pvpn exporter"
"""Keeps exported secrets apart from KEYMAT, which comes from SK_d too."""


@dataclass(frozen=True, slots=True)
class IkeKeys:
    """SK_d, SK_ei, SK_er, SK_pi, SK_pr under the negotiated PRF and cipher."""

    prf: Prf
    cipher: EspSuite
    d: Secret
    ei: Secret
    er: Secret
    pi: Secret
    pr: Secret

    def child(self, cipher: EspSuite, nonce_i: bytes, nonce_r: bytes) -> tuple[Secret, Secret]:
        """Keying material of a Child SA: initiator to responder, and back."""
        size = cipher.keymat_bytes
        keymat = self.prf.plus(self.d.reveal(), nonce_i + nonce_r, 2 * size)
        return Secret(keymat[:size]), Secret(keymat[size:])

    def export(self, label: bytes, length: int) -> Secret:
        """A secret for another purpose, the same at both ends: prf+(prf(SK_d, "p2pvpn exporter"), label)."""
        root = self.prf(self.d.reveal(), _EXPORTER)
        return Secret(self.prf.plus(root, label, length))


def skeyseed(prf: Prf, nonce_i: bytes, nonce_r: bytes, shared: Secret) -> Secret:
    """Of a new IKE SA. The PRFs are HMACs, which take the nonces whole (RFC 7296 section 2.14)."""
    return Secret(prf(nonce_i + nonce_r, shared.reveal()))


def expand(prf: Prf, cipher: EspSuite, seed: Secret, nonces: tuple[bytes, bytes], spis: tuple[bytes, bytes]) -> IkeKeys:
    """All SK_ keys from SKEYSEED; nonces and SPIs are the initiator's and the responder's."""
    sizes = (prf.size, cipher.keymat_bytes, cipher.keymat_bytes, prf.size, prf.size)
    stream = prf.plus(seed.reveal(), b"".join(nonces + spis), sum(sizes))
    parts = []
    for size in sizes:
        parts.append(Secret(stream[:size]))
        stream = stream[size:]
    return IkeKeys(prf, cipher, *parts)
