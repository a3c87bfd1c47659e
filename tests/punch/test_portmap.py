"""The client of one router: by PCP or NAT-PMP, for as long as it is wanted, whatever the router says."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pvpn.core.address import Endpoint
from p2pvpn.core.output import Output, Transmit
from p2pvpn.punch.portmap.client import (
    CHANGE_PAUSE_S,
    MAX_REST_S,
    MIN_REST_S,
    RESTART_DELAY_S,
    SILENCE_REST_S,
    GatewayClient,
    Phase,
)
from p2pvpn.punch.portmap.epoch import EpochClock
from p2pvpn.punch.portmap.mapping import (
    MAX_LIFETIME_S,
    MIN_LIFETIME_S,
    MapGained,
    MapLost,
    MapProtocol,
    MapRefused,
    PortMapping,
)
from p2pvpn.sim.loop import SeededEntropy
from p2pvpn.sim.portmap import Forwards, PcpServer

LOCAL = Endpoint("192.168.1.2", 4500)
GATEWAY = Endpoint("192.168.1.1", 5351)
PUBLIC = "203.0.113.7"

Router = Callable[[bytes, float], bytes | None]


class Life:
    """A client and a router that answers at once, on a clock that jumps from deadline to deadline."""

    def __init__(self, router: Router, local: Endpoint = LOCAL, gateway: Endpoint = GATEWAY) -> None:
        self.client = GatewayClient(local=local, gateway=gateway.host, entropy=SeededEntropy(1, "client"))
        self.router = router
        self.gateway = gateway
        self.now = 0.0
        self.sent: list[tuple[float, bytes]] = []
        self.events: list[Output] = []

    def feed(self, outputs: list[Output]) -> None:
        for output in outputs:
            if not isinstance(output, Transmit):
                self.events.append(output)
                continue
            assert output.path.remote == self.gateway
            self.sent.append((self.now, output.data))
            answer = self.router(output.data, self.now)
            if answer is not None:
                self.feed(self.client.handle(self.gateway, answer, self.now))

    def start(self) -> Life:
        self.feed(self.client.start(self.now))
        return self

    def run(self, until: float) -> None:
        while (at := self.client.next_deadline()) is not None and at <= until:
            self.now = max(self.now, at)
            self.feed(self.client.tick(self.now))
        self.now = until

    def hear(self, data: bytes) -> None:
        """A multicast from the router."""
        self.feed(self.client.announced(Endpoint(self.gateway.host, 5351), data, self.now))

    @property
    def external(self) -> Endpoint | None:
        return self.client.mapping.external if self.client.mapping is not None else None


def pcp_server() -> PcpServer:
    return PcpServer(Forwards(), lambda: PUBLIC, lambda external, inside: True)


def pcp_router(server: PcpServer) -> Router:
    return lambda data, now: server.handle(Endpoint(LOCAL.host, 40000), data, now)


def nat_pmp_router(lifetime_s: int = 7200, version_error: bool = True) -> Router:
    """RFC 6886, written down from its sections 3.2, 3.3 and 3.5."""

    def answer(data: bytes, now: float) -> bytes | None:
        epoch = int(now) + 1000
        if data[0] != 0:
            return struct.pack("!BBHI", 0, 128, 1, epoch) if version_error else None
        if data[1] == 0:
            return struct.pack("!BBHI4B", 0, 128, 0, epoch, 203, 0, 113, 7)
        port, suggested, wanted = struct.unpack_from("!HHI", data, 4)
        lifetime = lifetime_s if wanted else 0
        return struct.pack("!BBHIHHI", 0, 129, 0, epoch, port, suggested and 12000, lifetime)

    return answer


def silence(data: bytes, now: float) -> None:
    return None


def test_a_pcp_router_maps_at_the_first_question() -> None:
    life = Life(pcp_router(pcp_server())).start()
    mapping = PortMapping(MapProtocol.PCP, GATEWAY.host, LOCAL, Endpoint(PUBLIC, 4500))
    assert life.events == [MapGained(mapping)]
    assert mapping.is_public
    assert len(life.sent) == 1


def test_it_is_renewed_at_half_of_its_life_and_never_lost() -> None:
    life = Life(pcp_router(pcp_server())).start()
    life.run(100_000)
    assert len(life.events) == 1
    gaps = [later - earlier for (earlier, _), (later, _) in zip(life.sent, life.sent[1:], strict=False)]
    assert all(3600 <= gap <= 4500 for gap in gaps)


def test_questions_go_again_as_rfc_6887_says_while_the_router_is_silent() -> None:
    server = pcp_server()
    life = Life(lambda data, now: pcp_router(server)(data, now) if now > 8 else None).start()
    life.run(60)
    assert life.external == Endpoint(PUBLIC, 4500)
    gaps = [later - earlier for (earlier, _), (later, _) in zip(life.sent, life.sent[1:], strict=False)]
    assert [round(gap) for gap in gaps] == pytest.approx([3, 6], abs=1)


def test_a_router_that_stops_answering_loses_the_mapping_when_it_expires_and_not_before() -> None:
    server = pcp_server()
    life = Life(lambda data, now: pcp_router(server)(data, now) if now < 100 else None).start()
    life.run(7199)
    assert life.external is not None
    assert len(life.sent) < 20
    life.run(7201)
    assert isinstance(life.events[-1], MapLost)
    life.run(86_400)
    assert len(life.sent) < 20 + 86_400 / SILENCE_REST_S * 15


def test_nat_pmp_is_spoken_at_once_to_a_router_that_says_so() -> None:
    life = Life(nat_pmp_router()).start()
    assert life.external == Endpoint(PUBLIC, 12000)
    assert life.client.mapping is not None
    assert life.client.mapping.protocol is MapProtocol.NAT_PMP
    assert [len(data) for _, data in life.sent] == [60, 2, 12]
    life.run(50_000)
    assert len(life.events) == 1


def test_nat_pmp_is_tried_when_pcp_is_not_answered_at_all() -> None:
    life = Life(nat_pmp_router(version_error=False)).start()
    life.run(30)
    assert life.external == Endpoint(PUBLIC, 12000)


def test_where_nobody_answers_the_client_rests_and_asks_again() -> None:
    life = Life(silence).start()
    life.run(170)
    assert life.client.phase is Phase.RESTING
    assert life.events == [MapRefused(GATEWAY.host, "the router does not answer")]
    life.run(40_000)
    before = len(life.sent)
    life.run(40_000 + 1.3 * SILENCE_REST_S)
    round_of_both = life.sent[before:]
    assert len(round_of_both) <= 24
    assert {data[0] for _, data in round_of_both} == {0, 2}, "PCP again too"
    assert life.events[1:] == []


def test_a_port_that_is_refused_by_icmp_ends_the_wait() -> None:
    life = Life(silence).start()
    life.feed(life.client.unreachable(0.1))
    assert life.client.phase is Phase.RESTING
    assert len(life.sent) == 1


def test_ipv6_is_asked_by_pcp_only_and_opens_the_firewall_for_the_address_itself() -> None:
    local, gateway = Endpoint("2001:db8::2", 4500), Endpoint("fe80::1%eth0", 5351)

    def answer(data: bytes, now: float) -> bytes:
        assert data[8:24] == local.ip.packed
        head = struct.pack("!BBBBII12x", 2, 0x81, 0, 0, 7200, int(now))
        return head + data[24:44] + local.ip.packed

    life = Life(answer, local, gateway).start()
    assert life.external == local
    quiet = Life(silence, local, gateway).start()
    quiet.run(100)
    assert all(data[0] == 2 for _, data in quiet.sent)


def test_a_change_of_network_asks_at_once_and_keeps_what_is_held() -> None:
    life = Life(pcp_router(pcp_server())).start()
    life.now = 50
    life.start()
    assert len(life.sent) == 2
    assert len(life.events) == 1


def test_closing_gives_the_mapping_back() -> None:
    server = pcp_server()
    life = Life(pcp_router(server)).start()
    life.feed(life.client.close())
    assert server.forwards.find(LOCAL, 0.0) is None
    assert life.client.next_deadline() is None
    assert life.client.tick(1e6) == []
    life = Life(nat_pmp_router()).start()
    life.feed(life.client.close())
    assert life.sent[-1][1] == bytes.fromhex("00 01 0000 1194 0000 00000000")


def test_an_announced_restart_is_followed_by_a_question_soon_and_not_twice_a_minute() -> None:
    server = pcp_server()
    life = Life(pcp_router(server)).start()
    life.run(1000)
    server.restart(999)

    def announce() -> bytes:
        return struct.pack("!BBBBII12x", 2, 0x80, 0, 0, 0, int(life.now - 999))

    life.hear(announce())
    before = len(life.sent)
    life.run(1000 + RESTART_DELAY_S + 0.1)
    assert len(life.sent) == before + 1
    assert server.forwards.find(LOCAL, life.now) is not None
    for _ in range(50):
        life.hear(struct.pack("!BBBBII12x", 2, 0x80, 0, 0, 0, 0))
    life.run(life.now + 20)
    assert len(life.sent) == before + 1
    life.hear(announce())  # in step with our clock: nothing happened


def test_an_announcement_of_somebody_else_is_nothing() -> None:
    life = Life(pcp_router(pcp_server())).start()
    life.run(1000)
    forged = struct.pack("!BBBBII12x", 2, 0x80, 0, 0, 0, 0)
    life.feed(life.client.announced(Endpoint("192.168.1.66", 5351), forged, life.now))
    life.run(1020)
    assert len(life.sent) == 1


# A router that lies.


def lying(lifetime_s: int = 7200, host: str = PUBLIC, port: int = 4500, result: int = 0, **changes: bytes) -> Router:
    """A PCP router that answers what it likes."""

    def answer(data: bytes, now: float) -> bytes:
        address = changes.get(
            "address", bytes(10) + b"\xff\xff" + Endpoint(host, 0).ip.packed if ":" not in host else b""
        )
        head = struct.pack("!BBBBII12x", 2, 0x81, 0, result, lifetime_s, int(now))
        body = changes.get("nonce", data[24:36]) + data[36:42] + struct.pack("!H", port)
        return head + body + (address or Endpoint(host, 0).ip.packed)

    return answer


@pytest.mark.parametrize("lifetime_s", [1, 59, 2**32 - 1])
def test_absurd_lifetimes_make_neither_work_nor_sleep(lifetime_s: int) -> None:
    life = Life(lying(lifetime_s)).start()
    life.run(86_400)
    assert 2 <= len(life.sent) <= 86_400 / (MIN_LIFETIME_S / 2) + 1
    assert life.client.next_deadline() <= 86_400 + MAX_LIFETIME_S  # type: ignore[operator]


@pytest.mark.parametrize(
    ("host", "port"),
    [
        ("10.0.0.1", 4500),
        ("100.64.9.9", 4500),
        ("127.0.0.1", 4500),
        ("224.0.0.1", 4500),
        ("255.255.255.255", 4500),
        ("0.0.0.0", 4500),
        ("169.254.1.1", 4500),
        ("203.0.113.7", 0),
        ("2001:db8::1", 4500),
    ],
)
def test_an_external_address_that_nobody_could_use_is_not_public(host: str, port: int) -> None:
    life = Life(lying(host=host, port=port)).start()
    assert life.client.mapping is not None
    assert not life.client.mapping.is_public
    assert "not public" in life.client.reason


def test_answers_with_another_nonce_or_from_another_address_are_nothing() -> None:
    life = Life(lying(nonce=bytes(12))).start()
    assert life.client.mapping is None
    life = Life(silence).start()
    answer = lying()(life.sent[0][1], 0.0)
    assert answer is not None
    for source in (Endpoint("192.168.1.66", 5351), Endpoint(GATEWAY.host, 5352)):
        assert life.client.handle(source, answer, 0.1) == []
    assert life.client.handle(GATEWAY, answer, 0.1) != []


@pytest.mark.parametrize("lifetime_s", [0, 1, 2**32 - 1])
def test_a_refusal_is_heeded_for_a_reasonable_time(lifetime_s: int) -> None:
    life = Life(lying(lifetime_s, result=2)).start()
    assert life.events == [MapRefused(GATEWAY.host, "not authorized")]
    life.run(MAX_REST_S * 4)
    assert 4 <= len(life.sent) <= MAX_REST_S * 4 / MIN_REST_S + 1
    assert len(life.events) == 1, "said once"


def test_a_router_that_changes_the_mapping_all_the_time_is_heard_now_and_then() -> None:
    life = Life(lying()).start()
    request = life.sent[0][1]
    for number in range(1000):
        life.now = number * 0.1
        answer = lying(port=5000 + number)(request, life.now)
        assert answer is not None
        life.feed(life.client.handle(GATEWAY, answer, life.now))
    assert len(life.events) <= 2 + 100 / CHANGE_PAUSE_S


@given(st.lists(st.tuples(st.binary(max_size=80), st.floats(0, 500)), max_size=20))
def test_no_datagrams_break_the_client_or_make_it_busy(datagrams: list[tuple[bytes, float]]) -> None:
    life = Life(silence).start()
    for data, pause_s in datagrams:
        for prefix in (b"", bytes.fromhex("0281"), bytes.fromhex("0080")):
            life.feed(life.client.handle(GATEWAY, prefix + data, life.now))
            life.hear(prefix + data)
        life.run(life.now + pause_s)
    assert len(life.sent) <= 30 + 2 * len(datagrams) + life.now / 3


def test_an_epoch_runs_with_our_clock_or_the_router_lost_its_memory() -> None:
    clock = EpochClock()
    assert clock.take(1000, 0.0)
    assert clock.take(1100, 100.0)
    assert clock.take(1104, 106.0)
    assert not clock.take(3, 107.0)
    assert clock.take(13, 117.0)
    assert not clock.take(13, 500.0)
    assert not clock.take(2000, 501.0)
