"""What was answered, remembered for a while, so that a request that comes again is answered without running again."""

from __future__ import annotations

from collections import OrderedDict
from ipaddress import IPv6Address

from .messages import Refusal, Result

ANSWER_KEPT_S = 15.0
"""Longer than anybody repeats a request."""
MAX_ANSWERS = 8192
"""10 MB when all are as large as they should be."""
MAX_ANSWERS_PER_PEER = 256
"""In ANSWER_KEPT_S; a peer that runs more than that is told to come back later, so that it displaces nobody's."""

Asked = tuple[IPv6Address, bytes]
"""Who asked, and the ID of the request."""


class AnswerMemory:
    """Answers by who asked what, oldest first; at most MAX_ANSWERS, the oldest leave first."""

    def __init__(self) -> None:
        self._answers: OrderedDict[Asked, tuple[float, Result | Refusal]] = OrderedDict()
        self._counts: dict[IPv6Address, int] = {}

    def __len__(self) -> int:
        return len(self._answers)

    def recall(self, asked: Asked, now: float) -> Result | Refusal | None:
        """What this very request was answered."""
        while self._answers and next(iter(self._answers.values()))[0] + ANSWER_KEPT_S <= now:
            self._drop_oldest()
        found = self._answers.get(asked)
        return found[1] if found is not None else None

    def count(self, source: IPv6Address) -> int:
        """How many answers to this source are remembered."""
        return self._counts.get(source, 0)

    def remember(self, asked: Asked, answer: Result | Refusal, now: float) -> None:
        """Keep an answer that was just given for the first time."""
        self._answers[asked] = (now, answer)
        self._counts[asked[0]] = self.count(asked[0]) + 1
        if len(self._answers) > MAX_ANSWERS:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        (source, _), _ = self._answers.popitem(last=False)
        self._counts[source] -= 1
        if not self._counts[source]:
            del self._counts[source]
