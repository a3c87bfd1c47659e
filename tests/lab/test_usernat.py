"""The user-space NAT: every rewritten packet is whole, and in a real network it behaves as claimed, says coturn."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pvpn.core.address import Endpoint
from p2pvpn.esp.inner import checksum
from p2pvpn.lab.net import Home, Lab, running
from p2pvpn.lab.stun_check import Verdict, discover, stun_server
from p2pvpn.lab.usernat import UserNat, adjusted, kind_of, main, parser
from p2pvpn.sim import packet as ip
from p2pvpn.sim.nat import KINDS, Nat, NatKind, Ports, Rule

PUBLIC = "198.51.100.1"
WORDS = {
    Rule.EI: "Endpoint Independent",
    Rule.AD: "Address Dependent",
    Rule.APD: "Address and Port Dependent",
}


def usernat(kind: str) -> UserNat:
    return UserNat(Nat([PUBLIC], NatKind.of(kind), random.Random(1)))


def udp(source: Endpoint, destination: Endpoint, data: bytes) -> bytes:
    return ip.udp_packet(source.ip, source.port, destination.ip, destination.port, data)


hosts = st.sampled_from(["10.0.0.2", "192.168.255.254", "203.0.113.9", "255.0.0.1", "1.2.3.4"])
endpoints = st.builds(Endpoint, hosts, st.integers(0, 65535))


@given(endpoints, endpoints, st.binary(max_size=64), st.sampled_from(["full-cone", "symmetric"]))
def test_a_rewritten_packet_has_right_checksums_both_ways(
    source: Endpoint, destination: Endpoint, data: bytes, kind: str
) -> None:
    box = usernat(kind)
    sent = box.from_inside(udp(source, destination, data), 0)
    assert sent is not None
    inner = ip.parse_untrusted(sent)
    port, to, got = ip.udp_untrusted(inner)
    external = Endpoint(str(inner.source), port)
    assert (external.host, str(inner.destination), to, got) == (PUBLIC, *destination, data)
    back = box.from_outside(udp(destination, external, data), 1)
    assert back is not None
    inner = ip.parse_untrusted(back)
    assert (str(inner.destination), ip.udp_untrusted(inner)) == (source.host, (destination.port, source.port, data))


@given(st.binary(min_size=20, max_size=60), st.binary(min_size=8, max_size=8))
def test_an_adjusted_checksum_is_the_recomputed_one(data: bytes, new: bytes) -> None:
    data += bytes(len(data) % 2)
    recomputed = checksum(new + data[8:])
    assert adjusted(checksum(data), data[:8], new) % 0xFFFF == recomputed % 0xFFFF


@given(st.binary(max_size=80))
def test_no_packet_is_too_strange_to_be_dropped(packet: bytes) -> None:
    box = usernat("symmetric")
    for data in (packet, b"\x45" + packet, b"\x45\0\0\x1c\0\0\0\0\x40\x11" + packet, b"\x4f" + packet):
        box.from_inside(data, 0)
        assert box.from_outside(data, 0) is None


def test_a_packet_without_a_checksum_stays_without() -> None:
    packet = bytearray(udp(Endpoint("10.0.0.2", 1), Endpoint("192.0.2.1", 2), b"x"))
    packet[26:28] = b"\0\0"
    sent = usernat("full-cone").from_inside(bytes(packet), 0)
    assert sent is not None
    assert sent[26:28] == b"\0\0"


def test_what_cannot_be_translated_is_counted() -> None:
    box = usernat("port-restricted")
    packet = udp(Endpoint("10.0.0.2", 1), Endpoint("192.0.2.1", 2), b"x")
    tcp = packet[:9] + b"\x06" + packet[10:]
    short = ip.ip_packet(Endpoint("10.0.0.2", 1).ip, Endpoint("192.0.2.1", 2).ip, ip.UDP, b"1234")
    for strange in (tcp, short, packet[:24]):
        assert box.from_inside(strange, 0) is None
    assert box.from_outside(udp(Endpoint("192.0.2.1", 2), Endpoint(PUBLIC, 9), b"x"), 0) is None
    lengths = "an IPv4 packet whose lengths do not fit"
    assert box.counts == {"not UDP over IPv4": 1, "no whole UDP header": 1, lengths: 1, "filtered": 1}


def test_fragments_are_put_together_before_they_are_translated() -> None:
    box = usernat("full-cone")
    pieces = ip.cut(udp(Endpoint("10.0.0.2", 1), Endpoint("192.0.2.1", 2), bytes(3000)), 1400, 9)
    out = [box.from_inside(piece, 0) for piece in (pieces[2], pieces[0], pieces[1])]
    assert out[:2] == [None, None]
    assert out[2] is not None
    assert out[2][4:6] == b"\x00\x09"
    assert ip.udp_untrusted(ip.parse_untrusted(out[2])) == (1, 2, bytes(3000))


def test_a_packet_to_our_own_address_is_turned_back() -> None:
    box = usernat("full-cone")
    one, other = Endpoint("10.0.0.2", 1), Endpoint("10.0.0.3", 1)
    box.from_inside(udp(one, Endpoint("192.0.2.1", 2), b"x"), 0)
    turned = box.from_inside(udp(other, Endpoint(PUBLIC, 1), b"x"), 0)
    assert turned is not None
    inner = ip.parse_untrusted(turned)
    assert (str(inner.source), str(inner.destination)) == (PUBLIC, "10.0.0.2")


def test_the_command_line_describes_a_kind() -> None:
    def kind(*options: str) -> NatKind:
        return kind_of(parser().parse_args(["--lan", "lan", "--public", PUBLIC, *options]))

    assert kind("--kind", "symmetric") == KINDS["symmetric"]
    assert kind(
        "--mapping", "ad", "--filtering", "ei", "--port", "sequential", "--no-hairpin", "--timeout", "5"
    ) == NatKind(Rule.AD, Rule.EI, Ports.SEQUENTIAL, hairpin=False, timeout_s=5)


@contextlib.contextmanager
def box_in(home: Home, *options: str) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-m", "p2pvpn.lab.usernat", "--lan", "lan", "--public", home.public, *options]
    with running(home.router.popen(argv, stdout=subprocess.PIPE)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process


@pytest.mark.netns
@pytest.mark.stranger
def test_every_mapping_and_filter_is_what_it_claims_says_coturn(lab: Lab) -> None:
    kinds = [(mapping, filtering) for mapping in Rule for filtering in Rule]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(stun_server(lab))
        homes = []
        for number, (mapping, filtering) in enumerate(kinds, start=1):
            home = lab.home(f"h{number}", f"203.0.113.{number}", number=number)
            options = ("--mapping", mapping.value, "--filtering", filtering.value, "--port", "random")
            stack.enter_context(box_in(home, *options))
            homes.append(home)
        pool = stack.enter_context(ThreadPoolExecutor(len(homes)))
        verdicts = list(pool.map(lambda home: discover(home.peer, server), homes))
    assert verdicts == [Verdict(WORDS[mapping], WORDS[filtering]) for mapping, filtering in kinds]


def bound(lab: Lab, node: object, port: int) -> socket.socket:
    sock = node.socket()  # type: ignore[attr-defined]
    sock.bind(("0.0.0.0", port))
    sock.settimeout(5.0)
    return sock


@pytest.mark.netns
def test_large_datagrams_tcp_and_ping_pass_and_a_flush_forgets(lab: Lab) -> None:
    home = lab.home("a", PUBLIC, number=1)
    server = lab.public("s", "192.0.2.10")
    with (
        box_in(home, "--kind", "apd/apd/sequential") as process,
        bound(lab, home.peer, 4500) as inner,
        bound(lab, server, 3478) as outer,
    ):
        inner.sendto(b"first", ("192.0.2.10", 3478))
        data, before = outer.recvfrom(100)
        assert (data, before[0]) == (b"first", PUBLIC)
        outer.sendto(bytes(4000), before)  # in three fragments
        assert inner.recv(9000) == bytes(4000)
        inner.sendto(bytes(5000), ("192.0.2.10", 3478))
        assert outer.recvfrom(9000) == (bytes(5000), before)

        process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + 5
        after = before
        while after == before and time.monotonic() < deadline:
            inner.sendto(b"again", ("192.0.2.10", 3478))
            after = outer.recvfrom(100)[1]
        assert after[1] == before[1] + 1

        assert home.peer.run(["ping", "-c", "1", "-W", "5", "192.0.2.10"]).returncode == 0
        with _tcp(server) as listener, _tcp(home.peer) as client:
            listener.bind(("192.0.2.10", 8443))
            listener.listen()
            client.connect(("192.0.2.10", 8443))
            accepted, source = listener.accept()
            with accepted:
                client.sendall(b"enrol")
                assert (accepted.recv(100), source[0]) == (b"enrol", PUBLIC)


def _tcp(node: object) -> socket.socket:
    sock = node.socket(kind=socket.SOCK_STREAM)  # type: ignore[attr-defined]
    sock.settimeout(5.0)
    return sock


@pytest.mark.netns
def test_hairpin_reaches_the_neighbour_and_can_be_off(lab: Lab) -> None:
    for number, options in ((1, ()), (2, ("--no-hairpin",))):
        home = lab.home(f"h{number}", f"203.0.113.{number}", number=number)
        server = lab.public(f"s{number}", f"192.0.2.{number}")
        with (
            box_in(home, "--kind", "full-cone", *options),
            bound(lab, home.peer, 4500) as one,
            bound(lab, home.peer, 4501) as other,
            bound(lab, server, 3478) as reflector,
        ):
            one.sendto(b"who am I", (f"192.0.2.{number}", 3478))
            mapped = reflector.recvfrom(100)[1]
            assert mapped == (home.public, 4500)
            other.sendto(b"neighbour", mapped)
            one.settimeout(5.0 if number == 1 else 0.5)
            if number == 1:
                assert one.recvfrom(100) == (b"neighbour", (home.public, 4501))
            else:
                with pytest.raises(TimeoutError):
                    one.recv(100)


@pytest.mark.netns
def test_a_box_takes_its_rules_away_and_starts_again_after_a_kill(lab: Lab) -> None:
    home = lab.home("a", PUBLIC, number=1)

    def rules() -> str:
        return home.router.run(["sh", "-c", "ip rule show; nft list tables"]).stdout

    before = rules()
    with box_in(home) as process:
        assert "unat" not in before
        assert "p2pvpn_usernat" in rules()
        process.kill()
        process.wait()
    with box_in(home) as process:
        process.terminate()
        assert process.wait(10) == 0
    assert rules() == before


@pytest.mark.netns
def test_a_box_dies_with_its_parent(lab: Lab) -> None:
    home = lab.home("a", PUBLIC, number=1)
    argv = [sys.executable, "-m", "p2pvpn.lab.usernat", "--lan", "lan", "--public", PUBLIC]
    parent = f"import subprocess; subprocess.Popen({argv!r}).wait()"
    with running(home.router.popen([sys.executable, "-c", parent], stdout=subprocess.PIPE)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
        assert process.stdout.readline() == ""  # end of file: nobody holds the pipe any more


def test_a_wrong_kind_is_refused_in_words(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2pvpn.lab.usernat.die_with_parent", lambda parent: None)
    assert main(["--lan", "lan", "--public", PUBLIC, "--kind", "cone"]) == 2
    assert "is not a kind of NAT" in capsys.readouterr().err
