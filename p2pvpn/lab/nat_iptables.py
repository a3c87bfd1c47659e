"""The same NATs made of iptables, for kernels without nf_tables such as User-Mode Linux guests.

    port-restricted   MASQUERADE into a range of ports: one port per inside port, whatever the destination
    symmetric         MASQUERADE --random-fully
    udp-blocked       the same, and no UDP is forwarded
    full-cone         one outside port for each UDP port of the peer, fixed, open to everybody
    restricted        the same, open to those who were written to (the `recent` match)
    TCP and ICMP are masqueraded in every kind

Outside ports of these two are those inside, but for the peer's own port, which must not be the same by chance.

As with nftables, a router drops what is addressed to itself from outside, so that early packets make no mappings.
"""

from __future__ import annotations

PEER_PORT = 4500
OUTSIDE_PORT = 34500
"""Outside port of the peer's own one, in the kinds that let in whom it never wrote to."""
PORT_RANGE = "20000-29999"
PROGRAM = "iptables-legacy-restore"

_CHAINS = {
    "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
    "mangle": ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"),
}
_FILTER = [
    "-A INPUT -i wan -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
    "-A INPUT -i wan -j DROP",
    "-A FORWARD -i wan -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
    "-A FORWARD -i wan -m conntrack --ctstate DNAT -j ACCEPT",
    "-A FORWARD -i wan -j DROP",
]


def script(kind: str, inside: str, public: str, timeout_s: int) -> str:
    """Input of iptables-restore for a router with devices `lan` and `wan`; it replaces whatever stood there."""
    rules: dict[str, list[str]] = {"nat": [], "filter": [], "mangle": []}
    if kind != "none":
        rules["filter"] = _FILTER
    if kind == "udp-blocked":
        rules["filter"] = ["-A FORWARD -p udp -j DROP", *_FILTER]
    if kind in ("symmetric", "udp-blocked"):
        rules["nat"] = ["-A POSTROUTING -o wan -j MASQUERADE --random-fully"]
    elif kind == "port-restricted":
        rules["nat"] = [
            f"-A POSTROUTING -o wan -p udp -j MASQUERADE --to-ports {PORT_RANGE}",
            "-A POSTROUTING -o wan -j MASQUERADE",
        ]
    elif kind in ("full-cone", "restricted"):
        known = f"-m recent --name written --rcheck --rsource --seconds {timeout_s} " if kind == "restricted" else ""
        own, other = f"{inside}:{PEER_PORT}", f"{public}:{OUTSIDE_PORT}"
        rules["nat"] = [
            f"-A PREROUTING -i wan -p udp --dport {OUTSIDE_PORT} {known}-j DNAT --to-destination {own}",
            f"-A PREROUTING -i wan -p udp ! --dport {PEER_PORT} {known}-j DNAT --to-destination {inside}",
            f"-A POSTROUTING -o wan -p udp -s {inside} --sport {PEER_PORT} -j SNAT --to-source {other}",
            f"-A POSTROUTING -o wan -p udp -s {inside} -j SNAT --to-source {public}",
            "-A POSTROUTING -o wan -j MASQUERADE",
        ]
        if known:
            rules["mangle"] = ["-A POSTROUTING -o wan -p udp -m recent --name written --set --rdest"]
    lines = []
    for table, chains in _CHAINS.items():
        lines += [f"*{table}", *(f":{chain} ACCEPT [0:0]" for chain in chains), *rules[table], "COMMIT"]
    return "\n".join(lines) + "\n"
