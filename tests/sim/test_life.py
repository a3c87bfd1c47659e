"""A simulated life, made short: who moves, sleeps and crashes is reached again soon, and nothing is parked."""

from dataclasses import replace
from itertools import pairwise

from p2pvpn.sim.life import Outage, live, too_long
from p2pvpn.sim.lifeplan import Talk, What, draw_life

PLAN = draw_life(2, peers=10, hubs=3, duration_s=300.0)


def test_nobody_is_without_an_answer_for_long_while_peers_move_sleep_and_crash():
    result = live(PLAN)
    assert result.failures == []
    assert too_long(result) == []
    assert result.counts["pings"] > 500
    assert result.counts["answers"] > 0.85 * result.counts["pings"]


def test_an_outage_can_be_drawn():
    talk = Talk("peer001", "peer003", 5.0, 20.0)
    plan = replace(draw_life(3, peers=4, hubs=2, duration_s=130.0), talks=(talk,))
    outage = Outage(talk.caller, talk.callee, talk.at_s, 3.0, True, "none", (), None, 5.0)
    result = live(plan, draw=outage)
    for word in (talk.caller, talk.callee, "hub1", "ESP"):
        assert word in result.diagram


def test_a_plan_repeats_and_ends_in_calm():
    plan = draw_life(7)
    assert plan == draw_life(7) != draw_life(8)
    assert {one.what for one in plan.happenings} >= {What.MOVE, What.SLEEP, What.CRASH, What.FLUSH}
    assert max(one.at_s + one.for_s for one in plan.happenings) < plan.duration_s - 60
    for name in plan.homes:
        mine = [one for one in plan.happenings if one.who == name]
        assert all(one.at_s + one.for_s < after.at_s for one, after in pairwise(mine))
