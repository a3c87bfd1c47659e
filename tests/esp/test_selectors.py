"""Compiled selectors against the plain ones of `core`."""

from __future__ import annotations

import ipaddress

from hypothesis import given
from hypothesis import strategies as st

from p2pvpn.core.selector import Selector
from p2pvpn.esp.inner import NO_PORT
from p2pvpn.esp.selectors import PrefixTable, SelectorSet

ADDRESSES = st.one_of(
    st.integers(0, 40).map(lambda n: ipaddress.IPv4Address(0x0A000000 + n)),
    st.integers(0, 40).map(lambda n: ipaddress.IPv6Address((0xFD << 120) + n)),
)


@st.composite
def selectors(draw):
    start = draw(ADDRESSES)
    end = start + draw(st.integers(0, 5))
    ports = draw(st.sampled_from([(0, 65535), (80, 80), (1000, 2000)]))
    return Selector(start, end, draw(st.sampled_from([0, 6, 17])), *ports)


@given(st.lists(selectors(), max_size=4), ADDRESSES, st.sampled_from([1, 6, 17]), st.sampled_from([0, 80, 1500]))
def test_a_compiled_set_admits_what_some_selector_matches(chosen, address, protocol, port):
    expected = any(selector.matches(address, protocol, port) for selector in chosen)
    assert SelectorSet(chosen).admits(address.packed, protocol, port) == expected


def test_a_packet_without_ports_passes_only_where_all_ports_do():
    address = ipaddress.IPv4Address("10.0.0.1")
    assert SelectorSet([Selector(address, address, 17)]).admits(address.packed, 17, NO_PORT)
    assert not SelectorSet([Selector(address, address, 17, 80, 80)]).admits(address.packed, 17, NO_PORT)
    assert not SelectorSet([Selector(address, address, 17, 0, 65534)]).admits(address.packed, 17, NO_PORT)


@given(
    st.lists(st.tuples(ADDRESSES, st.integers(20, 128), st.integers(0, 3), st.booleans()), max_size=20),
    ADDRESSES,
)
def test_candidates_come_longest_prefix_first_and_newest_first(steps, address):
    table: PrefixTable[int] = PrefixTable()
    model: list[tuple[object, int]] = []
    for base, length, value, add in steps:
        net = ipaddress.ip_network((base, min(length, base.max_prefixlen)), strict=False)
        if (net, value) in model:
            model.remove((net, value))
        if add:
            model.insert(0, (net, value))
            table.add(net, value)
        else:
            table.discard(net, value)
    holding = [(net, value) for net, value in model if net.version == address.version and address in net]
    expected = [value for net, value in sorted(holding, key=lambda row: -row[0].prefixlen)]
    assert list(table.candidates(address.packed)) == expected
