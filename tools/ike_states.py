"""Writes docs/ike-states.md from the tables of `p2pvpn.ike.states`: `python -m tools.ike_states [--check]`."""

from __future__ import annotations

import sys
from pathlib import Path

from p2pvpn.ike.states import REQUESTS, TRANSITIONS, State

PAGE = Path(__file__).resolve().parent.parent / "docs" / "ike-states.md"
_HEAD = """\
# The states of an IKE SA

Generated from `p2pvpn/ike/states.py` by `python -m tools.ike_states`; a test checks that it is fresh.
An initiator begins in INIT_SENT, a responder in INIT_ANSWERED, the successor of a rekeyed IKE SA in ESTABLISHED.

"""


def page() -> str:
    """The whole page."""
    lines = [_HEAD + "```mermaid", "stateDiagram-v2"]
    lines += [f"    [*] --> {state.name}" for state in (State.INIT_SENT, State.INIT_ANSWERED, State.ESTABLISHED)]
    joined: dict[tuple[State, State], list[str]] = {}
    for (before, step), (after, _) in TRANSITIONS.items():
        joined.setdefault((before, after), []).append(step.name)
    lines += [f"    {before.name} --> {after.name}: {', '.join(steps)}" for (before, after), steps in joined.items()]
    lines += [
        f"    {State.CLOSED.name} --> [*]",
        "```",
        "",
        "| state | what it means | requests of the peer that it admits |",
    ]
    lines.append("|---|---|---|")
    for state in State:
        admitted = ", ".join(sorted(one.name for one in REQUESTS[state])) or "none"
        lines.append(f"| {state.name} | {state.value} | {admitted} |")
    lines += ["", "| state | step | next state | story |", "|---|---|---|---|"]
    for (before, step), (after, story) in TRANSITIONS.items():
        lines.append(f"| {before.name} | {step.name}: {step.value} | {after.name} | {story} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Writes the page, or with --check says whether it is fresh."""
    if "--check" in sys.argv[1:]:
        return 0 if PAGE.read_text() == page() else 1
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
