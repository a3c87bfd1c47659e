"""The NAT machine against the requirements of RFC 4787."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pvpn.core.address import Endpoint
from p2pvpn.sim.nat import KINDS, Firewall, Nat, NatKind, Ports, Rule

PUBLIC = "198.51.100.1"
INSIDE = Endpoint("192.168.1.2", 4500)
HUB = Endpoint("192.0.2.1", 4500)
HUB_OTHER_PORT = Endpoint("192.0.2.1", 3478)
STRANGER = Endpoint("203.0.113.9", 4500)

RULES = list(Rule)


def nat_of(kind, public=(PUBLIC,), seed=1):
    return Nat(public, kind if isinstance(kind, NatKind) else NatKind.of(kind), random.Random(seed))


@pytest.mark.parametrize(
    ("mapping", "same_for_port", "same_for_host"),
    [(Rule.EI, True, True), (Rule.AD, True, False), (Rule.APD, False, False)],
)
def test_the_mapping_rule_says_which_remotes_share_a_mapping(mapping, same_for_port, same_for_host):
    nat = nat_of(NatKind(mapping, Rule.APD, Ports.RANDOM))
    first = nat.translate_out(INSIDE, HUB, 0)
    assert nat.translate_out(INSIDE, HUB, 1) == first
    assert (nat.translate_out(INSIDE, HUB_OTHER_PORT, 1) == first) is same_for_port
    assert (nat.translate_out(INSIDE, STRANGER, 1) == first) is same_for_host


@pytest.mark.parametrize("mapping", RULES)
@pytest.mark.parametrize(
    ("filtering", "lets_port_in", "lets_host_in"),
    [(Rule.EI, True, True), (Rule.AD, True, False), (Rule.APD, False, False)],
)
def test_the_filtering_rule_says_who_may_send_in(mapping, filtering, lets_port_in, lets_host_in):
    nat = nat_of(NatKind(mapping, filtering))
    external = nat.translate_out(INSIDE, HUB, 0)
    assert nat.translate_in(HUB, external, 1) == INSIDE
    assert (nat.translate_in(HUB_OTHER_PORT, external, 1) == INSIDE) is lets_port_in
    assert (nat.translate_in(STRANGER, external, 1) == INSIDE) is lets_host_in


def test_the_named_kinds_are_those_of_rfc_3489():
    assert {name: (kind.mapping.value, kind.filtering.value) for name, kind in KINDS.items()} == {
        "full-cone": ("ei", "ei"),
        "restricted": ("ei", "ad"),
        "port-restricted": ("ei", "apd"),
        "symmetric": ("apd", "apd"),
    }


def test_a_kind_is_read_from_its_name_or_its_rules():
    assert NatKind.of("symmetric") is KINDS["symmetric"]
    assert NatKind.of("ad/apd/sequential") == NatKind(Rule.AD, Rule.APD, Ports.SEQUENTIAL)
    assert NatKind.of("ei/ad/no-hairpin") == NatKind(Rule.EI, Rule.AD, hairpin=False)
    assert not NatKind.of("full-cone/no-hairpin").hairpin
    assert NatKind.of("symmetric/sequential+2/30s") == NatKind(
        Rule.APD, Rule.APD, Ports.SEQUENTIAL, timeout_s=30.0, step=2
    )
    for text in ("apd/ad/random/no-hairpin", "ei/ei/preserve/45s", "ad/apd/sequential+4/others=2.5/30s/no-hairpin"):
        assert str(NatKind.of(text)) == text
    for wrong in ("", "cone", "ei", "ei/ei/even", "ei/ei/random/more", "symmetric/sequential+x", "full-cone/xs"):
        with pytest.raises(ValueError):
            NatKind.of(wrong)


def test_preserved_ports_are_kept_and_a_second_host_gets_another():
    nat = nat_of("port-restricted")
    assert nat.translate_out(INSIDE, HUB, 0) == Endpoint(PUBLIC, 4500)
    other = nat.translate_out(Endpoint("192.168.1.3", 4500), HUB, 0)
    assert other.host == PUBLIC
    assert other.port != 4500


def test_sequential_ports_follow_each_other():
    nat = nat_of("apd/apd/sequential")
    ports = [nat.translate_out(INSIDE, Endpoint("192.0.2.1", port), 0).port for port in range(1, 6)]
    assert [later - earlier for earlier, later in pairwise(ports)] == [1] * 4


def test_other_hosts_take_ports_of_a_sequential_allocator_as_time_goes_by():
    nat = nat_of("apd/apd/sequential+2/others=10")
    at = [nat.translate_out(INSIDE, Endpoint("192.0.2.1", port), now).port for port, now in ((1, 0), (2, 0), (3, 10))]
    assert (at[1] - at[0]) == 2
    assert 2 * 60 < at[2] - at[1] < 2 * 140
    assert (at[2] - at[1]) % 2 == 0


def test_random_ports_do_not_follow_each_other():
    nat = nat_of("symmetric")
    ports = [nat.translate_out(INSIDE, Endpoint("192.0.2.1", port), 0).port for port in range(1, 60)]
    assert len(set(ports)) == len(ports)
    assert all(1024 <= port <= 65535 for port in ports)
    assert not any(later - earlier == 1 for earlier, later in pairwise(ports))


def test_a_binding_lives_its_timeout_and_packets_out_refresh_it():
    nat = nat_of(NatKind(Rule.EI, Rule.APD, timeout_s=120))
    external = nat.translate_out(INSIDE, HUB, 0)
    assert nat.translate_in(HUB, external, 119.9) == INSIDE
    nat.translate_out(INSIDE, HUB, 119.9)
    assert nat.translate_in(HUB, external, 239.8) == INSIDE
    assert nat.translate_in(HUB, external, 239.9) is None


def test_packets_in_refresh_only_where_the_kind_says_so():
    for inbound_refresh in (False, True):
        nat = nat_of(NatKind(Rule.EI, Rule.APD, timeout_s=120, inbound_refresh=inbound_refresh))
        external = nat.translate_out(INSIDE, HUB, 0)
        assert nat.translate_in(HUB, external, 100) == INSIDE
        assert (nat.translate_in(HUB, external, 200) == INSIDE) is inbound_refresh


def test_a_permit_times_out_by_itself_while_the_mapping_lives():
    nat = nat_of(NatKind(Rule.EI, Rule.APD, timeout_s=120))
    external = nat.translate_out(INSIDE, HUB, 0)
    nat.translate_out(INSIDE, STRANGER, 100)
    assert nat.translate_in(HUB, external, 130) is None
    assert nat.translate_in(STRANGER, external, 130) == INSIDE


def test_a_mapping_that_timed_out_may_get_another_port_and_frees_its_own():
    nat = nat_of("ei/apd/random")
    first = nat.translate_out(INSIDE, HUB, 0)
    assert nat.external_of(INSIDE, HUB, 1) == first
    assert nat.external_of(INSIDE, HUB, 1000) is None
    assert nat.translate_out(INSIDE, HUB, 1000) != first
    assert len(nat) == 1


def test_an_early_packet_from_outside_changes_nothing():
    nat = nat_of("port-restricted")
    external = nat.translate_out(INSIDE, HUB, 0)
    assert nat.translate_in(STRANGER, external, 1) is None
    assert nat.translate_out(INSIDE, STRANGER, 2) == external
    assert nat.translate_in(STRANGER, external, 3) == INSIDE


def test_hairpin_shows_the_external_source_and_obeys_the_filter():
    nat = nat_of("port-restricted")
    one, other = INSIDE, Endpoint("192.168.1.3", 4501)
    ends = [nat.translate_out(host, HUB, 0) for host in (one, other)]
    assert nat.translate_hairpin(one, ends[1], 1) is None
    assert nat.translate_hairpin(other, ends[0], 2) == (ends[1], one)
    assert nat.translate_hairpin(one, ends[1], 3) == (ends[0], other)
    assert nat_of("full-cone/no-hairpin").translate_hairpin(one, Endpoint(PUBLIC, 4501), 1) is None


def test_flush_forgets_everything():
    nat = nat_of("full-cone")
    external = nat.translate_out(INSIDE, HUB, 0)
    nat.flush()
    assert len(nat) == 0
    assert nat.translate_in(HUB, external, 1) is None


def test_a_full_table_forgets_the_least_recently_used():
    nat = nat_of(NatKind(Rule.EI, Rule.EI, table=2))
    hosts = [Endpoint(f"192.168.1.{number}", number) for number in (2, 3, 4)]
    ends = [nat.translate_out(host, HUB, at) for at, host in enumerate(hosts[:2])]
    nat.translate_out(hosts[0], HUB, 5)
    nat.translate_out(hosts[2], HUB, 6)
    assert len(nat) == 2
    assert nat.translate_in(HUB, ends[0], 7) == hosts[0]
    assert nat.translate_in(HUB, ends[1], 7) is None


def test_when_every_port_is_taken_packets_are_lost(monkeypatch):
    monkeypatch.setattr("p2pvpn.sim.nat.FIRST_PORT", 65530)
    nat = nat_of("ei/ei/random")
    ends = [nat.translate_out(Endpoint(f"10.0.0.{number}", 1), HUB, 0) for number in range(1, 9)]
    assert len(set(ends[:6])) == 6
    assert ends[6:] == [None, None]


def test_a_host_keeps_its_public_address_among_several():
    public = [f"198.51.100.{number}" for number in range(1, 9)]
    nat = nat_of("symmetric", public)
    for inside in ("10.0.0.1", "10.0.0.2", "10.0.0.3"):
        hosts = {nat.translate_out(Endpoint(inside, port), HUB, 0).host for port in range(1000, 1040)}
        assert len(hosts) == 1


def test_a_nat_needs_a_public_address():
    with pytest.raises(ValueError):
        nat_of("symmetric", ())


endpoints = st.builds(Endpoint, st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.0.3"]), st.integers(1, 4))
remotes = st.builds(Endpoint, st.sampled_from(["192.0.2.1", "192.0.2.2"]), st.integers(1, 3))
kinds = st.builds(
    NatKind,
    st.sampled_from(RULES),
    st.sampled_from(RULES),
    st.sampled_from(list(Ports)),
    timeout_s=st.sampled_from([5.0, 50.0]),
    inbound_refresh=st.booleans(),
    table=st.sampled_from([3, 1000]),
)


@settings(max_examples=150, deadline=None)
@given(kinds, st.lists(st.tuples(endpoints, remotes, st.floats(0, 10)), max_size=60), st.integers(0, 9))
def test_a_mapping_is_never_shared_and_answers_always_come_back(kind, packets, seed):
    nat = nat_of(kind, (PUBLIC, "198.51.100.2"), seed)
    owner, now = {}, 0.0
    for source, remote, pause in packets:
        now += pause
        external = nat.translate_out(source, remote, now)
        assert nat.translate_in(remote, external, now) == source
        key = (source, kind.mapping.part(remote))
        for other, end in list(owner.items()):
            if end == external and other != key:
                # the former owner must have lost it
                assert nat.external_of(other[0], _remote_for(other[1], kind.mapping), now) != external
                del owner[other]
        owner[key] = external
        assert len(nat) <= kind.table


def _remote_for(part, rule):
    if rule is Rule.EI:
        return HUB
    return Endpoint(part, 1) if rule is Rule.AD else part


@settings(max_examples=150, deadline=None)
@given(kinds, st.lists(st.tuples(endpoints, remotes), max_size=40), endpoints, remotes)
def test_filtering_follows_its_truth_table(kind, packets, source, remote):
    kind = NatKind(kind.mapping, kind.filtering, kind.ports)
    nat = nat_of(kind)
    for packet in packets:
        nat.translate_out(*packet, 0.0)
    external = nat.external_of(source, remote, 0.0)
    if external is None:
        return
    through = [to for of, to in packets if of == source and kind.mapping.part(to) == kind.mapping.part(remote)]
    for other in (HUB, HUB_OTHER_PORT, STRANGER, *through):
        want = {
            Rule.EI: True,
            Rule.AD: other.host in {to.host for to in through},
            Rule.APD: other in through,
        }[kind.filtering]
        assert (nat.translate_in(other, external, 0.0) == source) is want


@pytest.mark.parametrize(
    ("filtering", "lets_port_in", "lets_host_in"),
    [(Rule.EI, True, True), (Rule.AD, True, False), (Rule.APD, False, False)],
)
def test_a_firewall_filters_without_translating(filtering, lets_port_in, lets_host_in):
    inside, remote = Endpoint("2001:db8:1::2", 4500), Endpoint("2001:db8:2::2", 4500)
    firewall = Firewall(filtering, timeout_s=60)
    assert not firewall.admits(remote, inside, 0)
    firewall.pass_out(inside, remote, 0)
    assert firewall.admits(remote, inside, 59)
    assert not firewall.admits(remote, inside, 60)
    assert firewall.admits(remote._replace(port=1), inside, 59) is lets_port_in
    assert firewall.admits(Endpoint("2001:db8:3::2", 4500), inside, 59) is lets_host_in
    firewall.flush()
    assert not firewall.admits(remote, inside, 1)
