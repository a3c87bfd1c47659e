"""How we look from outside: what hubs say is compared, believed only from who was asked, and asked for again."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pvpn.core import stun
from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.output import Output, Transmit
from p2pvpn.punch.allocation import Sample, judge
from p2pvpn.punch.behaviour import Allocation, Filtering, Mapping, NatBehaviour
from p2pvpn.punch.candidates import CandidateKind
from p2pvpn.punch.proof import PROOF_BYTES
from p2pvpn.punch.reflexive import (
    MAX_SAMPLES,
    RC,
    REFRESH_S,
    STUN_PORTS,
    HubDoubted,
    ReflexiveLearned,
    ReflexiveLost,
    ReflexiveProbe,
)
from p2pvpn.sim.nat import Nat, NatKind

PORT = 4500
HERE = Endpoint("192.0.2.1", PORT)
THERE = Endpoint("203.0.113.5", 5555)
HUBS = [Endpoint("198.51.100.1", 3478), Endpoint("198.51.100.2", 3478), Endpoint("198.51.100.3", 3478)]


class TestReflexiveProbe:
    def probe(self) -> ReflexiveProbe:
        numbers = iter(range(1, 10**6))
        return ReflexiveProbe(PORT, lambda count: next(numbers).to_bytes(count, "big"))

    def known(self) -> ReflexiveProbe:
        """A probe that one hub told where it sees us."""
        probe = self.probe()
        (sent,) = probe.update(HUBS[:1], 0.0)
        self.answer(probe, sent, THERE, 0.1)
        return probe

    def answer(self, probe: ReflexiveProbe, sent: Transmit, seen: Endpoint, now: float, local: Endpoint = HERE) -> list:
        data = stun.build(stun.success(sent.data[8:20], seen))
        return probe.handle(Path(local, sent.path.remote), data, now)

    def test_what_a_hub_sees_is_learned_and_said_once(self) -> None:
        probe = self.probe()
        first, second = probe.update(HUBS[:2], 1.0)
        assert first.path == Path(Endpoint("0.0.0.0", PORT), HUBS[0])
        assert self.answer(probe, first, THERE, 1.05) == [ReflexiveLearned(HERE, HUBS[0], THERE)]
        assert self.answer(probe, second, THERE, 1.06) == [ReflexiveLearned(HERE, HUBS[1], THERE)]
        (candidate,) = probe.candidates()
        assert (candidate.kind, candidate.endpoint, candidate.base) == (CandidateKind.REFLEXIVE, THERE, HERE)
        again = probe.refresh(5.0)
        assert self.answer(probe, again[0], THERE, 5.1) == []
        elsewhere = Endpoint("203.0.113.5", 6666)
        (learned,) = self.answer(probe, again[1], elsewhere, 5.1)
        assert learned == ReflexiveLearned(HERE, HUBS[1], elsewhere, silent_s=pytest.approx(3.94))
        assert probe.seen_by() == {HUBS[0]: THERE, HUBS[1]: elsewhere}

    def test_requests_are_repeated_and_a_silent_hub_is_given_up_and_asked_again(self) -> None:
        probe = self.known()
        probe.refresh(10.0)
        times = [10.0]
        lost = None
        doubts = []
        while lost is None:
            now = probe.next_deadline()
            for output in probe.tick(now):
                if isinstance(output, ReflexiveLost):
                    lost = (now, output)
                elif isinstance(output, HubDoubted):
                    doubts.append(now)
                else:
                    times.append(now)
        assert doubts == [pytest.approx(11.5)]
        assert times == pytest.approx([10.0, 10.5, 11.5, 13.5, 17.5])
        assert len(times) == RC
        assert lost == (pytest.approx(19.5), ReflexiveLost(HUBS[0], THERE))
        assert probe.candidates() == []
        assert 19.5 + 0.9 * REFRESH_S <= probe.next_deadline() <= 19.5 + REFRESH_S + 1e-9
        assert len(probe.tick(probe.next_deadline())) == 1

    def test_it_keeps_the_mapping_open(self) -> None:
        probe = self.known()
        assert 0.9 * REFRESH_S <= probe.next_deadline() - 0.1 <= REFRESH_S + 1e-9
        (again,) = probe.tick(probe.next_deadline())
        probe.refresh_s = 100.0
        self.answer(probe, again, THERE, 30.0)
        probe.tick(30.0)
        assert probe.next_deadline() < 31.0, "the only hub's other ports"
        probe.forget()
        assert 90.0 <= probe.next_deadline() - 30.0 <= 100.0
        probe.heard(HUBS[0], 80.0)
        assert 90.0 <= probe.next_deadline() - 80.0 <= 100.0
        probe.refresh_s = 50.0
        assert len(probe.hasten(131.0)) == 1

    def test_only_the_hub_that_was_asked_is_believed(self) -> None:
        probe = self.probe()
        (sent,) = probe.update(HUBS[:1], 0.0)
        good = stun.build(stun.success(sent.data[8:20], THERE))
        assert probe.handle(Path(HERE, HUBS[1]), good, 0.1) is None
        assert probe.handle(Path(HERE, HUBS[0]), stun.build(stun.success(b"x" * 12, THERE)), 0.1) is None
        assert probe.handle(Path(HERE, HUBS[0]), b"not STUN at all, is it?", 0.1) is None
        assert probe.handle(Path(HERE, HUBS[0]), sent.data, 0.1) is None
        assert probe.handle(Path(HERE, HUBS[0]), stun.build(stun.error(sent.data[8:20], 400, "no")), 0.1) == []
        for lie in (Endpoint("127.0.0.1", 1), Endpoint("224.0.0.1", 1), Endpoint("203.0.113.1", 0), Endpoint("::5", 5)):
            assert self.answer(probe, sent, lie, 0.1) == []
        assert probe.seen_by() == {}
        assert self.answer(probe, sent, THERE, 0.1) != []
        assert probe.handle(Path(HERE, HUBS[0]), good, 0.2) is None

    def test_hubs_that_left_are_forgotten(self) -> None:
        probe = self.probe()
        (sent,) = probe.update(HUBS[:1], 0.0)
        self.answer(probe, sent, THERE, 0.1)
        assert len(probe.update(HUBS, 1.0)) == 2
        assert probe.seen_by() == {HUBS[0]: THERE}
        assert probe.update(HUBS[1:], 1.0) == []
        assert probe.seen_by() == {}

    @pytest.mark.parametrize(
        ("seen", "mapping"),
        [
            ([], Mapping.UNKNOWN),
            ([THERE], Mapping.UNKNOWN),
            ([HERE, HERE], Mapping.NONE),
            ([THERE, THERE, THERE], Mapping.ENDPOINT_INDEPENDENT),
            ([THERE, THERE, Endpoint("203.0.113.5", 5556)], Mapping.ENDPOINT_DEPENDENT),
            ([THERE, Endpoint("203.0.113.6", 5555)], Mapping.ENDPOINT_DEPENDENT),
        ],
    )
    def test_two_hubs_tell_how_our_nat_maps(self, seen: list[Endpoint], mapping: Mapping) -> None:
        probe = self.probe()
        for sent, endpoint in zip(probe.update(HUBS, 0.0), seen, strict=False):
            self.answer(probe, sent, endpoint, 0.1)
        assert probe.mapping() is mapping
        assert probe.mapping(ipv6=True) is Mapping.UNKNOWN

    def test_two_ports_of_one_hub_prove_dependence_but_not_independence(self) -> None:
        probe = self.probe()
        first, second = probe.update([HUBS[0], Endpoint(HUBS[0].host, 4500)], 0.0)
        self.answer(probe, first, THERE, 0.1)
        self.answer(probe, second, THERE, 0.1)
        assert probe.mapping() is Mapping.UNKNOWN
        first, second, *_ = probe.refresh(1.0)
        self.answer(probe, second, Endpoint("203.0.113.5", 5556), 1.1)
        assert probe.mapping() is Mapping.ADDRESS_AND_PORT_DEPENDENT

    def test_two_local_addresses_are_two_mappings(self) -> None:
        probe = self.probe()
        first, second = probe.update(HUBS[:2], 0.0)
        self.answer(probe, first, THERE, 0.1)
        self.answer(probe, second, Endpoint("203.0.113.99", 5), 0.1, local=Endpoint("192.0.2.77", PORT))
        assert probe.mapping() is Mapping.UNKNOWN
        assert len(probe.candidates()) == 2

    def test_a_hub_that_was_started_anew_is_doubted_once(self) -> None:
        probe = self.probe()
        for at, mark, doubted in ((0.0, b"1", 0), (1.0, b"1", 0), (2.0, b"2", 1), (3.0, b"2", 0)):
            sent = (probe.refresh(at) or probe.update(HUBS[:1], at))[0]
            data = stun.build(stun.success(sent.data[8:20], THERE, nonce=mark * PROOF_BYTES))
            outputs = probe.handle(Path(HERE, HUBS[0]), data, at + 0.1)
            assert sum(isinstance(output, HubDoubted) for output in outputs) == doubted

    def test_a_doubted_hub_is_given_up_however_often_all_are_asked_anew(self) -> None:
        probe = self.known()
        lost = []
        for turn in range(60):
            outputs = probe.refresh(10.0 + turn / 2)
            lost += [output for output in outputs if isinstance(output, ReflexiveLost)]
            if probe.next_deadline() < 10.4 + turn / 2:
                lost += [one for one in probe.tick(probe.next_deadline()) if isinstance(one, ReflexiveLost)]
            if turn == 0:
                for at in (10.5, 11.5):
                    probe.tick(at)
        assert lost


class World:
    """A probe behind a simulated NAT, with hubs that answer at all their ports."""

    def __init__(self, kind: str, hubs: int, seed: int = 1) -> None:
        self.nat = Nat(["203.0.113.5"], NatKind.of(kind), random.Random(seed))
        self.hubs = [Endpoint(f"198.51.100.{number}", PORT) for number in range(1, hubs + 1)]
        numbers = iter(range(1, 10**6))
        self.probe = ReflexiveProbe(PORT, lambda count: next(numbers).to_bytes(count, "big"))
        self.asked: list[Endpoint] = []

    def settle(self, now: float, outputs: list[Output]) -> float:
        while True:
            for output in outputs:
                if isinstance(output, Transmit):
                    self.deliver(output, now)
            deadline = self.probe.next_deadline()
            if deadline is None or deadline > now + 5:
                return now
            now = max(now, deadline)
            outputs = self.probe.tick(now)

    def deliver(self, sent: Transmit, now: float) -> None:
        hub = sent.path.remote
        self.asked.append(hub)
        seen = self.nat.translate_out(HERE, hub, now)
        self.probe.handle(Path(HERE, hub), stun.build(stun.success(sent.data[8:20], seen)), now + 0.02)

    def behaviour(self) -> NatBehaviour:
        self.settle(1.0, self.probe.update(self.hubs, 1.0))
        self.settle(10.0, self.probe.refresh(10.0))
        return self.probe.behaviour()


class TestBehaviour:
    @pytest.mark.parametrize(
        ("kind", "mapping", "allocation", "step"),
        [
            ("full-cone", Mapping.ENDPOINT_INDEPENDENT, Allocation.PRESERVING, 0),
            ("ei/apd/random", Mapping.ENDPOINT_INDEPENDENT, Allocation.UNKNOWN, 0),
            ("ad/apd/random", Mapping.ADDRESS_DEPENDENT, Allocation.UNKNOWN, 0),
            ("ad/apd", Mapping.ADDRESS_DEPENDENT, Allocation.PRESERVING, 0),
            ("ad/apd/sequential", Mapping.ADDRESS_DEPENDENT, Allocation.SEQUENTIAL, 1),
            ("symmetric", Mapping.ADDRESS_AND_PORT_DEPENDENT, Allocation.RANDOM, 0),
            ("apd/apd/sequential", Mapping.ADDRESS_AND_PORT_DEPENDENT, Allocation.SEQUENTIAL, 1),
            ("apd/apd/sequential+2", Mapping.ADDRESS_AND_PORT_DEPENDENT, Allocation.SEQUENTIAL, 2),
            ("apd/apd", Mapping.ADDRESS_AND_PORT_DEPENDENT, Allocation.PRESERVING, 0),
        ],
    )
    def test_two_hubs_tell_every_kind_apart(
        self, kind: str, mapping: Mapping, allocation: Allocation, step: int
    ) -> None:
        found = World(kind, 2).behaviour()
        assert (found.mapping, found.allocation, found.step) == (mapping, allocation, step)

    def test_other_ports_are_asked_only_where_that_tells_something(self) -> None:
        quiet = World("port-restricted", 2)
        quiet.behaviour()
        assert {hub.port for hub in quiet.asked} == {PORT}
        for world in (World("symmetric", 2), World("port-restricted", 1)):
            world.behaviour()
            assert {hub.port for hub in world.asked} == set(STUN_PORTS)

    def test_one_hub_shows_dependence_on_ports_and_nothing_else(self) -> None:
        assert World("symmetric", 1).behaviour().mapping is Mapping.ADDRESS_AND_PORT_DEPENDENT
        assert World("ad/apd", 1).behaviour().mapping is Mapping.UNKNOWN
        assert World("full-cone", 1).behaviour().mapping is Mapping.UNKNOWN

    def test_what_other_means_found_out_is_part_of_it_until_the_network_changes(self) -> None:
        world = World("restricted", 2)
        world.probe.note_lifetime(120.0)
        world.probe.note_sight(False, Filtering.ADDRESS_DEPENDENT, True)
        found = world.behaviour()
        assert (found.filtering, found.lifetime_s, found.hairpin) == (Filtering.ADDRESS_DEPENDENT, 120.0, True)
        assert world.probe.behaviour(ipv6=True) == NatBehaviour(lifetime_s=120.0)
        world.probe.forget()
        assert world.probe.behaviour().filtering is Filtering.UNKNOWN

    def test_mappings_of_other_sockets_count_and_are_bounded(self) -> None:
        world = World("ei/apd/sequential+4", 2)
        assert world.behaviour().allocation is Allocation.UNKNOWN
        for port in range(40000, 40003):
            outer = world.nat.translate_out(Endpoint(HERE.host, port), HUBS[0], 2.0)
            world.probe.note_sample(port, HUBS[0], outer)
        assert world.probe.behaviour().allocation is Allocation.SEQUENTIAL
        assert world.probe.behaviour().step == 4
        for port in range(1000):
            world.probe.note_sample(port, HUBS[0], Endpoint(THERE.host, 7000 + port))
        assert len(world.probe._families[False].samples) == MAX_SAMPLES


class TestAllocation:
    @pytest.mark.parametrize(
        ("outer", "allocation", "step"),
        [
            ([], Allocation.UNKNOWN, 0),
            ([PORT], Allocation.PRESERVING, 0),
            ([9000, PORT, 1], Allocation.PRESERVING, 0),
            ([9000], Allocation.UNKNOWN, 0),
            ([9000, 9001], Allocation.SEQUENTIAL, 1),
            ([9000, 20000], Allocation.UNKNOWN, 0),
            ([9000, 20000, 31000], Allocation.RANDOM, 0),
            ([9000, 9002, 9007, 9009], Allocation.SEQUENTIAL, 2),
            ([9000, 8998, 8996], Allocation.SEQUENTIAL, -2),
            ([65534, 65535, 1024, 1025], Allocation.SEQUENTIAL, 1),
            ([9000, 9001, 9002, 40000], Allocation.SEQUENTIAL, 1),
        ],
    )
    def test_a_pattern_is_seen_where_there_is_one(self, outer: list[int], allocation: Allocation, step: int) -> None:
        assert judge([Sample(PORT, port) for port in outer]) == (allocation, step)

    @given(st.lists(st.integers(1, 65535), max_size=20))
    def test_any_ports_have_a_verdict(self, outer: list[int]) -> None:
        allocation, step = judge([Sample(0, port) for port in outer])
        assert (step != 0) is (allocation is Allocation.SEQUENTIAL)
