"""`netcheck`: what the network here does to us, in words."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import click

from p2pvpn.core.errors import Fault

from .output import ask_daemon, json_option, run, show_json, show_table

SIGHTS = (("mapping", "mapping"), ("filtering", "filtering"), ("ports", "allocation"), ("hairpin", "hairpin"))


@click.command()
@json_option
@click.pass_context
def netcheck(ctx: click.Context, as_json: bool) -> None:
    """Ask the hubs what this network lets through, and who can meet us directly because of it."""
    with nullcontext() if as_json else _progress():
        answer = run(ask_daemon("netcheck"))
    if as_json:
        show_json(answer)
    else:
        _show(answer)
    reached = any(hub["attached"] or hub["rtt_ms"] is not None for hub in answer["hubs"])
    ctx.exit(0 if reached else Fault.UNREACHABLE)


def _progress() -> AbstractContextManager[Any]:
    """Something that moves while the hubs are asked, where a person looks on."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status("asking the hubs")


def _show(answer: dict[str, Any]) -> None:
    for family in answer["families"]:
        click.echo(f"{family['family']}: {family['summary']}")
        if "mapping" in family:
            rows: list[tuple[str, str, str]] = []
            rows += [(label, _value(family[key]), family["means"][key]) for label, key in SIGHTS]
            rows.append(("bindings", _value(family["lifetime_s"]), family["means"]["lifetime"]))
            show_table("", ("", "found", "which means"), rows)
            show_table("", ("hub", "sees us at", "rtt ms"), [(s["hub"], s["as"], s["rtt_ms"]) for s in family["seen"]])
        click.echo()
    for line in _port_mapping(answer["port_mapping"]):
        click.echo(line)
    hubs = [
        (hub["network"], hub["name"], hub["via"] or "not attached", hub["rtt_ms"] or "no answer by UDP")
        for hub in answer["hubs"]
    ]
    show_table("hubs", ("network", "name", "tunnel", "rtt ms"), hubs)


def _value(found: object) -> str:
    if found is None:
        return "unknown"
    if isinstance(found, bool):
        return "yes" if found else "no"
    return f"{found:.0f} s" if isinstance(found, float) else str(found)


def _port_mapping(status: dict[str, Any]) -> list[str]:
    lines = [f"declared address: {endpoint}" for endpoint in status["declared"]]
    for router in status["routers"]:
        if router["external"] is None:
            lines.append(f"port mapping: router {router['gateway']}: {router['reason'] or 'none'}")
        else:
            lines.append(f"port mapping: router {router['gateway']} maps {router['external']} by {router['protocol']}")
    if not lines:
        lines.append("port mapping: no router answered" if status["enabled"] else "port mapping: switched off")
    return lines
