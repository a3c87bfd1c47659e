"""`why`: how a peer is reached, and why not better."""

from __future__ import annotations

from typing import Any

import click

from .output import ask_daemon, json_option, run, show_json, show_table


@click.command()
@click.argument("peer")
@json_option
def why(peer: str, as_json: bool) -> None:
    """Tell how PEER (a name or an address) is reached, what was tried, and what would make it better."""
    answer = run(ask_daemon("why", peer=peer))
    if as_json:
        show_json(answer)
    else:
        _show(answer)


def _show(answer: dict[str, Any]) -> None:
    click.echo(f"{answer['name']}  {answer['overlay']}  in {answer['network']}")
    if answer["path"] is None:
        click.echo(f"{answer['state']}: {answer['because']}")
    else:
        rtt = "" if answer["rtt_ms"] is None else f", {answer['rtt_ms']} ms there and back"
        over = " over TCP" if answer["over"] == "tcp" else ""
        click.echo(f"{answer['path']}{over} at {answer['remote']}{rtt}, because {answer['because']}")
    relay = answer["relay"]
    if relay is not None:
        use = "in use" if relay["in_use"] else "kept at hand"
        click.echo(f"relay: {relay['at']} of {relay['hub'] or 'a hub'}, {use}")
    for whose in ("mine", "theirs"):
        nat = answer["nat"][whose]
        words = f"maps {nat['mapping']}, filters {nat['filtering']}, takes ports {nat['allocation']}"
        click.echo(f"NAT, {whose}: {words}")
    for line in answer["advice"]:
        click.echo(f"to do: {line}")
    click.echo()
    if answer["pairs"]:
        rows = [
            (
                ("> " if one["selected"] else "  ") + one["local"],
                one["remote"],
                "/".join(one["kinds"]),
                one["state"],
                one["rtt_ms"],
                f"{one['answers']}/{one['checks']}",
                _ago(one["last_answer_s"]),
                one["reason"],
            )
            for one in answer["pairs"]
        ]
        columns = ("from", "to", "kinds", "state", "rtt ms", "answered", "last", "note")
        show_table("direct paths tried", columns, rows)
    theirs = answer["candidates"]["theirs"]
    if theirs:
        click.echo("the peer names: " + ", ".join(f"{one['at']} ({one['kind']})" for one in theirs))
    if answer["history"]:
        show_table("lately", ("ago", "note"), [(_ago(one["ago_s"]), one["what"]) for one in answer["history"]])


def _ago(seconds: float | None) -> str:
    """Seconds as a person reads them."""
    if seconds is None:
        return "never"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
