"""The keys of an SA as lines of Wireshark's tables, for whoever is to read his own traffic.

    ikev2_decryption_table: SPIi, SPIr, SK_ei, SK_er, "cipher", SK_ai, SK_ar, "integrity"
    esp_sa:                 "family","source","destination","SPI","cipher","key","integrity","key"

Nothing is written unless a sink was injected, and whoever injects it announces it. Keys of combined ciphers have their
salt at the end, as Wireshark wants it. Wireshark keeps one set of keys per pair of SPIs, so the keys that protected
IKE_INTERMEDIATE are written as a comment.
"""

from __future__ import annotations

from collections.abc import Callable

from p2pvpn.core.child import ChildSa, EspSuite
from p2pvpn.core.secret import Secret
from p2pvpn.crypto.cbc import hash_name

from .keys import IkeKeys
from .proposals import IkeCipher

KeySink = Callable[[str, str], None]
"""(name of the table, line without its end)."""
IKE_TABLE = "ikev2_decryption_table"
ESP_TABLE = "esp_sa"
_IKE_CIPHERS = {
    EspSuite.AES_GCM_16_256: "AES-GCM-256 with 16 octet ICV [RFC5282]",
    EspSuite.AES_GCM_16_128: "AES-GCM-128 with 16 octet ICV [RFC5282]",
}
_ESP_CIPHERS = {
    EspSuite.AES_GCM_16_256: "AES-GCM with 16 octet ICV [RFC4106]",
    EspSuite.AES_GCM_16_128: "AES-GCM with 16 octet ICV [RFC4106]",
}


def _cipher_name(cipher: IkeCipher) -> str | None:
    if not cipher.is_combined:
        return f"AES-CBC-{cipher.key_bits} [RFC3602]"
    return _IKE_CIPHERS.get(cipher)


def _integrity_name(cipher: IkeCipher) -> str:
    if not cipher.is_combined:
        bits = int(hash_name(cipher).removeprefix("sha"))
        return f"HMAC_SHA2_{bits}_{bits // 2} [RFC4868]"
    return "NONE [RFC4306]"


def ike_line(spi_i: bytes, spi_r: bytes, keys: IkeKeys) -> str | None:
    """For `ikev2_decryption_table`; None for a cipher that Wireshark does not decrypt in IKE."""
    name = _cipher_name(keys.cipher)
    if name is None:
        return None
    encryption = (_hex(keys.ei), _hex(keys.er), f'"{name}"')
    integrity = (_hex(keys.ai), _hex(keys.ar), f'"{_integrity_name(keys.cipher)}"')
    return ",".join((spi_i.hex(), spi_r.hex(), *encryption, *integrity))


def esp_lines(child: ChildSa) -> list[str]:
    """Two for `esp_sa`: what comes in and what goes out, whatever the addresses are (they may change).

    None for a cipher that Wireshark does not decrypt.
    """
    family = "IPv6" if child.path.remote.is_ipv6 else "IPv4"
    suite = child.suite
    name = _ESP_CIPHERS.get(suite) if suite.is_combined else "AES-CBC [RFC3602]"
    if name is None:
        return []
    integrity, lines = "NULL", []
    if not suite.is_combined:
        integrity = f"HMAC-SHA-{suite.icv_bytes * 16}-{suite.icv_bytes * 8} [RFC4868]"
    for spi, keymat in ((child.spi_in, child.key_in), (child.spi_out, child.key_out)):
        whole = keymat.reveal().hex()
        key, integrity_key = whole, ""
        if not suite.is_combined:
            at = suite.key_bits // 4
            key, integrity_key = whole[:at], "0x" + whole[at:]
        fields = (family, "*", "*", f"0x{spi:08x}", name, "0x" + key, integrity, integrity_key)
        lines.append(",".join(f'"{field}"' for field in fields))
    return lines


def _hex(secret: Secret) -> str:
    return secret.reveal().hex()
