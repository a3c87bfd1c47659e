"""What OpenSSL makes of our certificates, and we of its: nothing here was written by us but the certificates."""

from __future__ import annotations

import subprocess
from ipaddress import ip_address
from pathlib import Path

import pytest

from p2pvpn.core.selector import Selector
from p2pvpn.identity import blocks
from p2pvpn.identity.certificates import MEMBERSHIP_OID, parse_untrusted
from p2pvpn.identity.keys import PeerKey

from .world import WALL, World, join, make_world, pem

pytestmark = pytest.mark.stranger


def openssl(*arguments: str | Path, stdin: bytes = b"") -> str:
    done = subprocess.run(["openssl", *map(str, arguments)], input=stdin, capture_output=True, timeout=20, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@pytest.fixture
def world() -> World:
    return make_world()


def test_openssl_verifies_the_chains(world: World, tmp_path: Path) -> None:
    leaf, issuer = join(world.issuer(), "laptop", PeerKey.generate()).chain
    root = tmp_path / "root.pem"
    root.write_bytes(pem(world.admin.genesis.root_certificate))
    (tmp_path / "issuer.pem").write_bytes(pem(issuer))
    for name, der, more in (
        ("member", leaf, ["-untrusted", tmp_path / "issuer.pem"]),
        ("hub", world.hub.chain[0], []),
        ("gateway", world.gateway.chain[0], []),
    ):
        path = tmp_path / f"{name}.pem"
        path.write_bytes(pem(der))
        for purpose in ("sslserver", "sslclient"):
            output = openssl(
                "verify", "-x509_strict", "-purpose", purpose, "-attime", str(int(WALL)), "-CAfile", root, *more, path
            )
            assert output.strip().endswith("OK")


def test_openssl_reads_what_a_leaf_says(world: World) -> None:
    text = openssl("x509", "-noout", "-text", stdin=pem(world.gateway.chain[0]))
    member = world.trust.verify_chain(world.gateway.chain, WALL)
    for said in (
        "DNS:office",
        "ipsec Internet Key Exchange",
        "TLS Web Server Authentication",
        "TLS Web Client Authentication",
        "192.168.7.0/24",
        "2001:db8:7::/48",
        f"{member.ipv4}",
        "CA:FALSE",
        "Digital Signature",
        MEMBERSHIP_OID.dotted_string,
        ":".join(f"{byte:02X}" for byte in member.peer_id),
        "ecdsa-with-SHA256",
    ):
        assert said in text, said
    assert text.count("critical") == 2, "key usage and basic constraints only"


def test_openssl_reads_what_an_issuer_says(world: World) -> None:
    text = openssl("x509", "-noout", "-text", stdin=pem(world.hub.issuer_certificate))
    for said in ("CA:TRUE, pathlen:0", "Certificate Sign, CRL Sign", "/22", "hub-one issuer"):
        assert said in text, said


def test_openssl_parses_the_extensions_of_ours_as_asn1(world: World) -> None:
    der = blocks.encode([Selector.of_network("10.5.0.0/23"), Selector.of_network("fd00::/48")])
    text = openssl("asn1parse", "-inform", "DER", stdin=der)
    assert text.count("SEQUENCE") == 5
    assert text.count("BIT STRING") == 2
    text = openssl("asn1parse", "-inform", "DER", stdin=world.hub.chain[0])
    assert MEMBERSHIP_OID.dotted_string in text
    assert "sbgp-ipAddrBlock" in text


@pytest.mark.parametrize(
    ("config", "selectors"),
    [
        ("IPv4:10.5.0.4/32,IPv4:10.5.2.0/23", [("10.5.0.4", "10.5.0.4"), ("10.5.2.0", "10.5.3.255")]),
        ("IPv4:10.5.0.0-10.5.9.255", [("10.5.0.0", "10.5.9.255")]),
        ("IPv4:0.0.0.0/0,IPv6:::/0", [("0.0.0.0", "255.255.255.255"), ("::", "f" + "fff:f" * 7 + "fff")]),
        (
            "IPv6:fd00:1::/48,IPv6:fd00:7::1-fd00:7::ff,IPv4:192.0.2.7/32",
            [
                ("192.0.2.7", "192.0.2.7"),
                ("fd00:1::", "fd00:1:0:ffff:ffff:ffff:ffff:ffff"),
                ("fd00:7::1", "fd00:7::ff"),
            ],
        ),
    ],
)
def test_openssl_encodes_the_same_addresses_in_the_same_bytes(
    tmp_path: Path, config: str, selectors: list[tuple[str, str]]
) -> None:
    key, file, out = tmp_path / "key.pem", tmp_path / "config", tmp_path / "cert.der"
    openssl("ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", key)
    file.write_text(
        f"[req]\ndistinguished_name=n\nx509_extensions=e\nprompt=no\n[n]\nCN=x\n[e]\nsbgp-ipAddrBlock={config}\n"
    )
    openssl("req", "-x509", "-new", "-key", key, "-config", file, "-outform", "DER", "-out", out, "-sha256")
    expected = tuple(Selector(ip_address(low), ip_address(high)) for low, high in selectors)
    certificate = parse_untrusted(out.read_bytes())
    assert certificate.blocks == expected
    assert blocks.encode(expected) in out.read_bytes()
