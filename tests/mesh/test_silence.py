"""When counters make a path suspicious."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from p2pvpn.mesh.ports import SaUsage
from p2pvpn.mesh.silence import MAX_PATIENCE_S, Doubt, Silence

PATIENCE_S = 0.3
START = 1000.0


def doubts(sent: Iterable[float], received: Iterable[float], until_s: float, rtt_s: float | None = None) -> list[tuple]:
    """Looks every 0.1 s at an SA with packets at these times; when which doubt arose."""
    sent, received = sorted(sent), sorted(received)
    silence = Silence(PATIENCE_S, START)
    found = []
    for step in range(int(until_s * 10) + 1):
        now_s = step / 10
        out, came = [at for at in sent if at <= now_s], [at for at in received if at <= now_s]
        usage = SaUsage(
            packets_in=len(came),
            packets_out=len(out),
            last_in_at=START + came[-1] if came else 0.0,
            last_out_at=START + out[-1] if out else 0.0,
        )
        doubt = silence.look(usage, rtt_s, START + now_s)
        if doubt is not None:
            found.append((now_s, doubt))
    return found


def every(interval_s: float, first_s: float, last_s: float) -> list[float]:
    return [first_s + n * interval_s for n in range(int((last_s - first_s) / interval_s) + 1)]


def test_a_dialogue_raises_no_doubt() -> None:
    assert doubts(every(0.02, 0.0, 5.0), every(0.02, 0.05, 5.05), 5.0) == []
    assert doubts(every(1.0, 0.0, 10.0), every(1.0, 0.05, 10.05), 10.0) == []


def test_unanswered_packets_are_suspicious_after_the_patience() -> None:
    (first, *_) = doubts(every(0.02, 0.0, 5.0), [0.01, 1.0, 2.0], 2.6)
    assert first[1] is Doubt.UNANSWERED
    assert 0.3 <= first[0] <= 0.5


def test_a_long_round_trip_is_waited_for_twice() -> None:
    assert doubts(every(0.02, 0.0, 1.1), [], 1.1, rtt_s=0.6) == []
    assert doubts(every(0.02, 0.0, 2.0), [], 1.5, rtt_s=0.6) != []


def test_one_packet_may_want_no_answer() -> None:
    assert doubts([0.5], [], 10.0) == []


def test_a_steady_flow_that_stops_is_doubted_once() -> None:
    found = doubts([], every(0.02, 0.0, 2.0), 20.0)
    assert [doubt for _, doubt in found] == [Doubt.STOPPED]
    assert 2.2 <= found[0][0] <= 2.5


def test_a_few_packets_that_came_are_no_flow() -> None:
    assert doubts([], [0.0, 1.0, 2.0, 3.5, 5.0], 20.0) == []


def test_a_stream_that_nobody_answers_is_checked_less_and_less() -> None:
    found = doubts(every(0.02, 0.0, 60.0), [], 60.0)
    assert len(found) < 60 / MAX_PATIENCE_S + 8
    assert max(later[0] - earlier[0] for earlier, later in pairwise(found)) <= MAX_PATIENCE_S + 0.3


def test_an_answer_makes_patience_short_again() -> None:
    found = doubts(every(0.02, 0.0, 12.0), [10.0], 12.0)
    assert any(10.2 <= at <= 10.6 for at, _ in found)
