"""The ciphers of Child SAs as the kernel names them: attributes of a state in NETLINK_XFRM."""

from __future__ import annotations

from p2pvpn.core.child import EspSuite

from .xfrm_messages import AEAD_LAYOUT, CRYPT_LAYOUT

_COMBINED = {
    EspSuite.AES_GCM_16_256: b"rfc4106(gcm(aes))",
    EspSuite.AES_GCM_16_128: b"rfc4106(gcm(aes))",
    EspSuite.CHACHA20_POLY1305: b"rfc7539esp(chacha20,poly1305)",
}
_INTEGRITY = {12: b"hmac(sha256)", 13: b"hmac(sha384)", 14: b"hmac(sha512)"}
"""By IANA transform ID (type 3)."""


def cipher_attributes(suite: EspSuite, key: bytes) -> list[tuple[str, bytes]]:
    """What a state says of its algorithms and keys; `key` is the whole keying material of a direction."""
    if suite.is_combined:
        return [("XFRMA_ALG_AEAD", _keyed(_COMBINED[suite], key, suite.icv_bytes))]
    at = suite.key_bits // 8
    crypt = CRYPT_LAYOUT.pack({"name": b"cbc(aes)", "key_bits": suite.key_bits}) + key[:at]
    return [
        ("XFRMA_ALG_AUTH_TRUNC", _keyed(_INTEGRITY[suite.integrity], key[at:], suite.icv_bytes)),
        ("XFRMA_ALG_CRYPT", crypt),
    ]


def _keyed(name: bytes, key: bytes, icv_bytes: int) -> bytes:
    return AEAD_LAYOUT.pack({"name": name, "key_bits": len(key) * 8, "icv_bits": icv_bytes * 8}) + key
