"""`p2pvpn why PEER`: how the peer is reached, why so, what was tried, and what would make it better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address

from p2pvpn.punch.behaviour import Mapping, NatBehaviour
from p2pvpn.punch.candidates import Candidate
from p2pvpn.punch.pair import PairReport, PairState
from p2pvpn.punch.traversal import Part, part

from .live import LiveSa, PathKind
from .network import Network
from .session import Session

PORT = "UDP 4500"


@dataclass(frozen=True, slots=True)
class View:
    """What there is to judge by."""

    session: Session
    sa: LiveSa | None
    pairs: Sequence[PairReport]
    mine: NatBehaviour
    theirs: NatBehaviour

    @property
    def kind(self) -> PathKind | None:
        return self.session.path_kind


def why(network: Network, overlay: IPv6Address) -> dict[str, object]:
    """Plain values for the control socket. Times are in milliseconds, or seconds ago."""
    session = network.session(overlay)
    sa = session.current
    agent = sa.agent if sa is not None else None
    view = View(session, sa, agent.report() if agent else (), network.nat(), session.paths.hard_nat.theirs)
    now = network.now
    return {
        "name": session.name,
        "overlay": str(overlay),
        "network": network.standing.name,
        "state": session.state,
        "path": view.kind.value if view.kind else None,
        "over": session.transport,
        "remote": session.remote,
        "rtt_ms": _ms(session.rtt_s),
        "up_s": None if sa is None else round(now - sa.established_at, 1),
        "because": because(view),
        "relay": _relay(network, sa),
        "nat": {"mine": _nat(view.mine), "theirs": _nat(view.theirs)},
        "candidates": {
            "mine": [_candidate(one) for one in (agent.checks.local if agent else ())],
            "theirs": [_candidate(one) for one in (agent.checks.remote if agent else ())],
        },
        "pairs": [_pair(one, now) for one in view.pairs],
        "history": [
            {"at": one.at, "ago_s": round(network.wall() - one.at, 1), "what": one.text}
            for one in network.history.of(session.name, str(overlay))
        ],
        "advice": advice(view),
    }


def because(view: View) -> str:
    """Why the path is what it is, in a sentence."""
    session, sa = view.session, view.sa
    if sa is None:
        if session.state == "connecting":
            return "an attempt is under way"
        return f"the last attempt failed: {session.last_failure}" if session.last_failure else "nobody sent anything"
    if session.with_hub:
        return "one of the two is a hub, which is reachable as it is"
    valid = [one for one in view.pairs if one.state is PairState.VALID]
    if view.kind is not PathKind.RELAYED:
        better = "the only pair" if len(valid) < 2 else f"the best of {len(valid)} pairs"
        return f"it is {better} that answers, of {len(view.pairs)} tried"
    if valid:
        return "a direct path answers, and the move to it is on its way"
    if any(one.state in (PairState.WAITING, PairState.CHECKING) for one in view.pairs):
        return f"direct paths are being tried: {len(view.pairs)} pairs"
    if not view.pairs:
        return "there is no pair of addresses to try: the two have no address family in common, or hide theirs"
    return f"none of {len(view.pairs)} direct pairs answers"


def advice(view: View) -> list[str]:
    """What would make it better; nothing when it is as good as it gets."""
    session = view.session
    if session.transport == "tcp":
        return [f"UDP does not pass: have the firewall let {PORT} out, and relayed UDP ports 20000-29999 to the hubs"]
    if view.sa is None:
        return _of_failure(session.last_failure)
    if view.kind is not PathKind.RELAYED or session.with_hub:
        return []
    match part(view.mine, view.theirs):
        case Part.RELAYED:
            return [
                "both NATs take another port for every destination, and no guess finds it: "
                f"enable UPnP or PCP on either router, or forward {PORT} to a machine and declare it",
                "IPv6 at both ends would do as well",
            ]
        case Part.OPEN | Part.PROBE | Part.MEET:
            return ["ports are being guessed, which takes some tries; UPnP or PCP on the router would spare that"]
    if Mapping.UNKNOWN in (view.mine.mapping, view.theirs.mapping):
        return [
            "the NAT of one side is not known yet: a second hub that answers would tell; p2pvpn netcheck shows ours"
        ]
    return [f"a firewall at one end drops what comes unasked even after a packet left: let {PORT} in and out there"]


def _of_failure(failure: str) -> list[str]:
    if "no hub is attached" in failure or "no hub answered" in failure:
        return ["this machine has no tunnel to any hub: p2pvpn status and p2pvpn netcheck say more"]
    if "does not let" in failure:
        return ["the network document forbids the two to talk: an admin may change the topology or the groups"]
    if "no hub knows" in failure or "not attached" in failure:
        return ["the peer is not attached to any hub: is it switched on and online? p2pvpn status there says more"]
    return []


def _relay(network: Network, sa: LiveSa | None) -> dict[str, object] | None:
    """The relay at hand, and whose it is."""
    relay = sa.relay if sa is not None else None
    if relay is None or sa is None:
        return None
    hubs = network.attachments.hubs
    hosts = {
        hub.name: session.current.path.remote.host
        for hub in hubs
        if (session := network.sessions.get(hub.overlay)) and session.current is not None
    }
    name = next((name for name, host in hosts.items() if host == relay.endpoint.host), None)
    return {"at": str(relay.endpoint), "hub": name, "rtt_ms": _ms(relay.rtt_s), "in_use": sa.relayed}


def _pair(one: PairReport, now: float) -> dict[str, object]:
    return {
        "local": str(one.path.local),
        "remote": str(one.path.remote),
        "kinds": [one.local_kind.name.lower(), one.remote_kind.name.lower()],
        "state": one.state.value,
        "selected": one.selected,
        "rtt_ms": _ms(one.rtt_s),
        "checks": one.checks_sent,
        "answers": one.answers,
        "last_answer_s": None if one.last_answer_at is None else round(now - one.last_answer_at, 1),
        "last_check_in_s": None if one.last_check_in_at is None else round(now - one.last_check_in_at, 1),
        "seen_as": None if one.mapped is None else str(one.mapped),
        "reason": one.reason,
    }


def _candidate(one: Candidate) -> dict[str, str]:
    return {"kind": one.kind.name.lower(), "at": str(one.endpoint)}


def _nat(nat: NatBehaviour) -> dict[str, object]:
    return {
        "mapping": nat.mapping.value,
        "filtering": nat.filtering.value,
        "allocation": nat.allocation.value,
        "lifetime_s": nat.lifetime_s,
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 2)
