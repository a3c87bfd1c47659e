"""What the engine looks like from outside: plain values for the control socket."""

from __future__ import annotations

from .events import Intercepted
from .network import Network
from .session import Session


def network_status(network: Network) -> dict[str, object]:
    """One network with its hubs and the peers in contact."""
    me = network.me
    hubs = network.attachments.hubs
    hub_sessions = [(hub, network.sessions.get(hub.overlay)) for hub in hubs]
    return {
        "name": network.standing.name,
        "id": me.network.hex(),
        "me": me.name,
        "role": "hub" if me.is_hub else "peer",
        "overlay": str(me.overlay),
        "ipv4": str(me.ipv4) if me.ipv4 else None,
        "document": network.standing.document.version,
        "certificate_until": me.not_after,
        "warnings": [_warning(one) for one in network.fallback.warnings.values()],
        "hubs": [
            {
                "name": hub.name,
                "overlay": str(hub.overlay),
                "state": session.state if session else "idle",
                "path": _path(session),
                "over": session.transport if session else None,
                "remote": _remote(session),
                "note": _note(session),
            }
            for hub, session in hub_sessions
        ],
        "peers": [peer_status(session) for session in network.sessions.values() if not network.is_hub(session.overlay)],
    }


def peer_status(session: Session) -> dict[str, object]:
    """One peer: how it is reached, what went over it, what failed last."""
    rtt_s = session.rtt_s
    return {
        "name": session.name,
        "overlay": str(session.overlay),
        "ipv4": str(session.member.ipv4) if session.member and session.member.ipv4 else None,
        "state": session.state,
        "path": _path(session),
        "over": session.transport,
        "rtt_ms": round(rtt_s * 1000, 2) if rtt_s is not None else None,
        "remote": _remote(session),
        "packets_in": session.usage.packets_in,
        "packets_out": session.usage.packets_out,
        "bytes_in": session.usage.bytes_in,
        "bytes_out": session.usage.bytes_out,
        "note": _note(session),
    }


def _warning(trouble: Intercepted) -> dict[str, str]:
    if trouble.portal:
        message, hint = "a captive portal stands between us and the hubs", "open a browser and log in to the network"
    else:
        message = f"something on the way answers TLS in place of {trouble.hub}"
        hint = "this network intercepts connections: try another one, or ask who runs it to let the hubs pass"
    return {"message": f"{message}: {trouble.answer}" if trouble.answer else message, "hint": hint}


def _path(session: Session | None) -> str | None:
    kind = session.path_kind if session is not None else None
    return kind.value if kind is not None else None


def _remote(session: Session | None) -> str | None:
    return session.remote if session is not None else None


def _note(session: Session | None) -> str:
    return session.last_failure if session is not None and session.current is None else ""
