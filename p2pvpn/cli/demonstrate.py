"""`p2pvpn demo`: the whole product on a small Internet of namespaces."""

from __future__ import annotations

import click

NAT_KINDS = ("none", "full-cone", "restricted", "port-restricted", "symmetric", "udp-blocked")


@click.command()
@click.option("--nat-a", type=click.Choice(NAT_KINDS), default="port-restricted", help="What peer a sits behind.")
@click.option("--nat-b", type=click.Choice(NAT_KINDS), default="port-restricted", help="What peer b sits behind.")
@click.option("--hubs", type=click.IntRange(2, 8), default=3, help="How many hubs.")
@click.option("--rtt", type=click.IntRange(1, 500), default=30, help="Round trip between a peer and a hub, in ms.")
@click.option(
    "--plane", type=click.Choice(["auto", "kernel", "user"]), default="auto", help="What encrypts the packets."
)
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Write the figures to this file.")
@click.pass_context
def demo(ctx: click.Context, nat_a: str, nat_b: str, hubs: int, rtt: int, plane: str, json_file: str | None) -> None:
    """Show it all, live: two machines behind NATs meet, go direct, and lose nothing on the way.

    Everything happens in namespaces of its own; nothing of it stays.
    """
    from p2pvpn.lab.demo import DemoOptions, main

    options = DemoOptions(nat_a=nat_a, nat_b=nat_b, hubs=hubs, rtt_ms=rtt, plane=plane, json_file=json_file)
    ctx.exit(main(options))
