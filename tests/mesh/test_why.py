"""`p2pvpn why`: the answer is true, before, while and after two peers talk."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from p2pvpn.mesh.why import why

from .life import Life


def asked(life: Life) -> dict[str, Any]:
    """What a is told of b, through JSON as on the control socket."""
    answer: dict[str, Any] = json.loads(json.dumps(why(life.network(life.a), life.b.overlay)))
    return answer


def test_of_a_peer_that_nobody_talked_to_there_is_nothing_to_tell() -> None:
    life = Life(1)

    async def story() -> None:
        answer = asked(life)
        assert (answer["state"], answer["path"]) == ("idle", None)
        assert answer["because"] == "nobody sent anything"
        assert answer["pairs"] == answer["history"] == answer["advice"] == []

    life.run(story())


def test_a_direct_path_is_shown_with_what_was_tried_and_how_it_came_about() -> None:
    life = Life(1)

    async def story() -> None:
        await life.ping(life.a, life.b)
        answer = asked(life)
        assert answer["path"] == "direct"
        assert "answers" in answer["because"]
        assert answer["advice"] == []
        (used,) = [pair for pair in answer["pairs"] if pair["selected"]]
        assert used["state"] == "valid"
        assert used["answers"] >= 1
        assert used["remote"] == answer["remote"]
        assert answer["relay"]["in_use"] is False
        assert answer["relay"]["hub"] in {hub.name for hub in life.hubs}
        assert answer["candidates"]["theirs"]
        told = [one["what"] for one in answer["history"]]
        assert any(text.startswith("connected, relayed") for text in told)
        assert any(text.startswith("moved to direct") for text in told)

    life.run(story())


def test_two_random_nats_are_named_as_the_reason_and_so_is_the_remedy() -> None:
    life = Life(2, "symmetric", "symmetric")

    async def story() -> None:
        await life.ping(life.a, life.b, count=200)
        await asyncio.sleep(60)
        await life.ping(life.a, life.b)
        answer = asked(life)
        assert answer["path"] == "relayed"
        assert answer["relay"]["in_use"] is True
        assert "dependent" in answer["nat"]["mine"]["mapping"]
        assert answer["advice"]

    life.run(story())


def test_a_failure_is_told_with_its_step_and_the_history_is_bounded() -> None:
    life = Life(3)

    async def story() -> None:
        life.b.host.crash()
        for hub in life.hubs:
            life.network(hub).forget(life.b.overlay)
        for _ in range(30):
            await life.ping(life.a, life.b, count=1)
            await asyncio.sleep(5)
        answer = asked(life)
        assert answer["path"] is None
        assert answer["because"].startswith("the last attempt failed")
        assert 1 <= len(answer["history"]) <= 20
        assert "not connected" in answer["history"][-1]["what"]

    life.run(story())
