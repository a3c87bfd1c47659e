"""The NAT grid: a covering set of its cells, each kind of place in at least one, judged by the oracle."""

import pytest

from p2pvpn.sim.grid import (
    PLACES,
    PORT_RESTRICTED,
    SPECIAL,
    SYMMETRIC,
    Cell,
    Place,
    Shared,
    Six,
    all_cells,
    run,
)
from p2pvpn.sim.oracle import Verdict

FILTERED = Place(SYMMETRIC, six=Six.FILTERED)
DIRECT = [
    Cell(Place(), Place(SYMMETRIC)),
    Cell(Place(PORT_RESTRICTED), Place("ei/apd/sequential")),
    Cell(Place("ei/ei/random"), Place("apd/apd/preserve")),
    Cell(Place("ei/ad/random"), Place("ad/apd/random")),
    Cell(Place("ei/ad/random"), Place("apd/ad/sequential")),
    Cell(Place("ad/ei/random"), Place("apd/ei/random")),
    Cell(Place(PORT_RESTRICTED, PORT_RESTRICTED), Place("ei/apd/preserve")),
    Cell(Place(PORT_RESTRICTED, SYMMETRIC), Place("ei/ad/random")),
    Cell(FILTERED, Place(SYMMETRIC, six=Six.OPEN)),
    Cell(Place(PORT_RESTRICTED), Place(PORT_RESTRICTED), Shared.LAN),
    Cell(Place(PORT_RESTRICTED, "ei/ei/random"), Place(PORT_RESTRICTED, "ei/ei/random"), Shared.CARRIER),
]
RELAYED = [
    Cell(Place(SYMMETRIC), Place(SYMMETRIC)),
    Cell(Place(SYMMETRIC), FILTERED),
    Cell(Place(PORT_RESTRICTED), Place(SYMMETRIC, six=Six.ONLY)),
    Cell(Place(PORT_RESTRICTED, SYMMETRIC), Place("apd/apd/preserve")),
    Cell(Place("apd/ei/random"), Place("apd/ei/random")),
    Cell(Place("apd/ei/random"), Place("apd/ad/sequential")),
]
GUESSED = [
    Cell(Place(PORT_RESTRICTED), Place("apd/apd/sequential")),
    Cell(Place(PORT_RESTRICTED), Place(SYMMETRIC)),
]
MAX_CHECKS = 400
"""Of both peers in 20 s; endless ones were found here, where every answer opens one more port."""
PING_ROUND_TRIPS = 6.0
"""Of the way over the relay, which is 80 ms, or 40 more for each further NAT on it."""


@pytest.mark.parametrize("cell", DIRECT, ids=str)
def test_cells_that_the_oracle_calls_direct_are_direct_at_once(cell):
    outcome = run(cell)
    assert outcome.verdict is Verdict.DIRECT
    assert outcome.is_as_promised, outcome
    assert outcome.lost == 0
    assert outcome.first_answer_s < PING_ROUND_TRIPS * 0.12
    assert outcome.direct_s < 1.0
    assert outcome.checks <= 40


@pytest.mark.parametrize("cell", RELAYED, ids=str)
def test_cells_without_a_promise_are_connected_over_a_relay(cell):
    outcome = run(cell)
    assert outcome.verdict is Verdict.RELAYED
    assert outcome.is_as_promised, outcome
    assert not outcome.direct
    assert outcome.lost == 0
    assert outcome.checks <= MAX_CHECKS


@pytest.mark.parametrize("cell", GUESSED, ids=str)
def test_ports_of_a_hard_nat_are_guessed(cell):
    outcome = run(cell)
    assert outcome.verdict in (Verdict.PREDICTED, Verdict.BIRTHDAY)
    assert outcome.direct, outcome
    assert outcome.lost == 0


def test_a_peer_without_udp_is_connected_over_tcp():
    outcome = run(Cell(Place(PORT_RESTRICTED), Place(PORT_RESTRICTED, blocks_udp=True)))
    assert outcome.verdict is Verdict.STREAM
    assert outcome.is_as_promised, outcome


def test_the_grid_has_every_pair_of_places_once():
    cells = all_cells()
    assert len(cells) == len(PLACES) * (len(PLACES) + 1) // 2 + len(SPECIAL)
    assert len({str(cell) for cell in cells}) == len(cells)


def test_the_same_seed_gives_the_same_outcome_and_its_diagram():
    cell = DIRECT[1]
    one, other = run(cell, 5, draw=True), run(cell, 5, draw=True)
    assert one == other
    for word in ("IKE_SA_INIT request", "STUN request", "ESP", "home1 router", "hub1"):
        assert word in one.diagram
