"""`status`, `peers`, `ping`, `forget`, `events`: what the daemon knows and does."""

from __future__ import annotations

import json
from typing import Any

import click

from .output import ask_daemon, daemon, json_option, run, show_json, show_table


@click.command()
@json_option
def status(as_json: bool) -> None:
    """Networks, hubs and peers of this machine, and how each is reached."""
    answer = run(ask_daemon("status"))
    if as_json:
        show_json(answer)
        return
    click.echo(
        f"p2pvpn {answer['version']}, UDP port {answer['port']}, {answer['plane']} plane, up {answer['up_s']:.0f} s"
    )
    for line in _port_mapping_lines(answer["port_mapping"]):
        click.echo(line)
    if answer.get("key_log"):
        click.echo(f"KEYS ARE LOGGED to {answer['key_log']}: who reads it reads the traffic")
    for problem in answer["problems"]:
        click.echo(f"error: network {problem['network']}: {problem['message']}", err=True)
        click.echo(f"  {problem['hint']}", err=True)
    if not answer["networks"] and not answer["problems"]:
        click.echo("this machine is in no network; p2pvpn join TOKEN brings it into one")
    for network in answer["networks"]:
        click.echo()
        click.echo(f"{network['name']}  {network['overlay']}  {network['ipv4'] or ''}  as {network['me']}")
        for warning in network["warnings"]:
            click.echo(f"warning: {warning['message']}\n  {warning['hint']}")
        show_table(
            "hubs", ("name", "state", "address"), [(h["name"], h["state"], h["remote"]) for h in network["hubs"]]
        )
        _peer_table(network["peers"])


def _port_mapping_lines(port_mapping: dict[str, Any]) -> list[str]:
    """What the owner declared and what routers do; nothing where there is nothing to say."""
    lines = [f"declared: {endpoint}" for endpoint in port_mapping["declared"]]
    for router in port_mapping["routers"]:
        if router["external"] is not None:
            note = "" if router["told"] else f" ({router['reason'] or 'not usable from outside'})"
            lines.append(f"router {router['gateway']} maps {router['external']} by {router['protocol']}{note}")
    return lines


@click.command()
@json_option
def peers(as_json: bool) -> None:
    """Peers in contact: path, round trip, traffic."""
    answer = run(ask_daemon("status"))
    rows = [peer for network in answer["networks"] for peer in network["peers"]]
    if as_json:
        show_json(rows)
    else:
        _peer_table(rows)


def _peer_table(rows: list[dict[str, Any]]) -> None:
    if not rows:
        click.echo("no peer in contact; p2pvpn ping NAME finds one")
        return
    show_table(
        "peers",
        ("name", "path", "rtt ms", "address", "reached at", "in", "out", "note"),
        [
            (
                p["name"],
                _way(p),
                p["rtt_ms"],
                p["ipv4"] or p["overlay"],
                p["remote"],
                _size(p["bytes_in"]),
                _size(p["bytes_out"]),
                p["note"],
            )
            for p in rows
        ],
    )


def _way(peer: dict[str, Any]) -> str:
    """How a peer is reached, or why not."""
    if not peer["path"]:
        return str(peer["state"])
    return f"{peer['path']} over TCP" if peer["over"] == "tcp" else str(peer["path"])


def _size(count: int) -> str:
    """Bytes as a person reads them."""
    size, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


@click.command()
@click.argument("peer")
@click.option("--count", "-c", type=click.IntRange(1, 1000), default=3, help="How many echoes.")
@click.option("--interval", "-i", type=click.FloatRange(0.01, 60), default=1.0, help="Seconds between them.")
@click.option("--timeout", "-W", type=click.FloatRange(0.1, 60), default=10.0, help="Seconds to wait for each.")
@json_option
@click.pass_context
def ping(ctx: click.Context, peer: str, count: int, interval: float, timeout: float, as_json: bool) -> None:
    """Reach PEER (a name or an overlay address) and tell the path each answer took."""
    results = run(_ping(peer, count, interval, timeout, quiet=as_json))
    if as_json:
        show_json(results)
    ctx.exit(0 if any(result["rtt_ms"] is not None for result in results) else 1)


async def _ping(peer: str, count: int, interval: float, timeout: float, *, quiet: bool) -> list[dict[str, Any]]:
    import asyncio

    target = await ask_daemon("resolve", peer=peer)
    if not quiet:
        click.echo(f"{target['name']} is {target['overlay']}")
    results = []
    for number in range(1, count + 1):
        if number > 1:
            await asyncio.sleep(interval)
        answer = await ask_daemon("ping", overlay=target["overlay"], number=number, timeout_s=timeout)
        results.append(answer)
        if quiet:
            continue
        if answer["rtt_ms"] is None:
            click.echo(f"{number}: no answer in {timeout:g} s{': ' + answer['note'] if answer['note'] else ''}")
        else:
            click.echo(f"{number}: {answer['rtt_ms']:.1f} ms, {answer['path']} by {answer['remote']}")
    return results


@click.command()
@click.argument("peer")
def forget(peer: str) -> None:
    """Close the tunnel to PEER and drop all that was cached about it; the next packet starts from nothing."""
    answer = run(ask_daemon("forget", peer=peer))
    click.echo(f"{answer['name']} is forgotten")


@click.command()
def events() -> None:
    """Print what happens, as it happens, one JSON object a line."""

    async def follow() -> None:
        async with daemon() as client:
            async for event in client.events():
                click.echo(json.dumps(event))

    run(follow())
