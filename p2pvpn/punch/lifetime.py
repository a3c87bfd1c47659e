"""How long a NAT keeps a silent binding: which silence to try next, and how often to send because of it.

    nothing known    try 30 s, then twice as long each time, up to 300 s
    one died         try between the longest that lived and the shortest that died, until they are 10 % apart
    found            look again now and then: the longest that lived, and every fourth time the shortest that died

Bindings are tried with sockets of their own (`mesh.natwatch`), never with the one in use. That one is refreshed a bit
before the longest silence that was seen to be harmless, so its packets come at 25 s until something is known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

FIRST_S = 30.0
"""Most NATs keep a binding for this long."""
LEAST_S = 10.0
LONGEST_S = 300.0
"""RFC 4787 REQ-5 recommends it as the default; longer ones save nothing more."""
CLOSE = 1.1
"""Bounds that are this near to each other are as good as one number."""
UNKNOWN_REFRESH_S = 25.0
"""Most NATs keep a binding for 30 s at least."""
MOST_REFRESH_S = 240.0
"""However patient the NAT: a mapping that it lost otherwise, by a restart, is noticed after this."""
MARGIN = 0.9
"""Of the longest harmless silence; the rest is for lost packets and late timers."""
LEAST_MARGIN = 0.3
LOSS_FACTOR = 0.75
"""The margin shrinks by it when a binding in use was lost although its silence was thought harmless."""
AGAIN_S = 1800.0
"""Between two looks at what was found: NATs are reconfigured, and under load they forget sooner."""
ROUND_OF_UPPER = 4


@dataclass(slots=True)
class LifetimeSearch:
    """What is known of one NAT; times in seconds."""

    lived_s: float = 0.0
    """The longest silence that did no harm."""
    died_s: float = math.inf
    """The shortest one after which the binding was gone."""
    margin: float = MARGIN
    looks: int = 0
    """At what was found already."""

    @property
    def is_found(self) -> bool:
        return self.lived_s >= LONGEST_S or self.died_s <= LEAST_S or self.died_s <= self.lived_s * CLOSE

    @property
    def lifetime_s(self) -> float | None:
        """How long a silent binding was seen to live; None while nothing is known."""
        return self.lived_s or None

    @property
    def refresh_s(self) -> float:
        """Between packets that keep a binding."""
        if self.lived_s:
            return min(self.lived_s * self.margin, MOST_REFRESH_S)
        return min(UNKNOWN_REFRESH_S, self.died_s * self.margin / 2)

    def next_silence(self) -> float:
        """What to try now."""
        if self.is_found:
            upper = self.looks % ROUND_OF_UPPER == ROUND_OF_UPPER - 1 and self.died_s < LONGEST_S
            return self.died_s if upper or not self.lived_s else self.lived_s
        if self.died_s < math.inf:
            return (self.lived_s + self.died_s) / 2
        return min(LONGEST_S, max(FIRST_S, 2 * self.lived_s))

    def pause_s(self) -> float:
        """How long to wait before the next trial."""
        return AGAIN_S if self.is_found else 0.0

    def lived(self, silence_s: float) -> None:
        """A binding was silent for so long and still let packets in."""
        self.looks += self.is_found
        self.lived_s = max(self.lived_s, silence_s)
        if self.died_s <= silence_s:
            self.died_s = math.inf

    def died(self, silence_s: float) -> None:
        """A binding was silent for so long and was gone."""
        self.looks += self.is_found
        self.died_s = min(self.died_s, silence_s)
        if self.lived_s >= silence_s:
            self.lived_s = 0.0  # the NAT is not what it was: begin anew below

    def lost(self, silence_s: float) -> None:
        """A binding in use was gone after so long: what was learned does not hold for it."""
        if LEAST_S <= silence_s <= self.lived_s:  # sooner is no time-out: the NAT was started anew
            self.margin = max(LEAST_MARGIN, self.margin * LOSS_FACTOR)
            self.lived_s, self.died_s, self.looks = 0.0, math.inf, 0

    def as_dict(self) -> dict[str, float | None]:
        """For the state store."""
        died = None if self.died_s == math.inf else self.died_s
        return {"lived_s": self.lived_s, "died_s": died, "margin": self.margin}

    @classmethod
    def of_dict(cls, value: Any) -> LifetimeSearch:
        """What `as_dict` gave; whatever does not make sense is as if nothing were known."""
        try:
            lived, died, margin = float(value["lived_s"]), value["died_s"], float(value["margin"])
            died = math.inf if died is None else float(died)
        except (KeyError, TypeError, ValueError):
            return cls()
        sane = 0.0 <= lived <= LONGEST_S and LEAST_MARGIN <= margin <= MARGIN and died > max(lived, 1.0)
        return cls(lived, died, margin) if sane else cls()
