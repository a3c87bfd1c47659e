"""The engine's constants on one screen, each with its reason. All times are in seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tuning:
    """How patient, how eager, how thrifty the engine is."""

    hubs_wanted: int = 2
    """Tunnels to hubs that a peer keeps up: one may die at any time without anybody becoming unreachable."""
    hub_dial_timeout_s: float = 8.0
    """After this a hub that does not answer is left to the back-off."""
    retry_first_s: float = 0.5
    retry_max_s: float = 30.0
    """Every failure is tried again, with doubling pauses; a change of the network starts over at the first."""
    stream_after_s: float = 1.0
    """How long a hub may stay silent over UDP before it is tried over TCP besides: a round trip by satellite takes
    0.6 s, and 2 s are all that a person in a network that blocks UDP should wait."""
    stream_retry_s: float = 3.0
    """Between attempts of one dial: somebody may log in to the captive portal meanwhile."""
    stream_linger_s: float = 3.0
    """A stream that nothing uses any more is closed after this: more than any packet in it stays in flight."""
    relay_silence_s: float = 600.0
    """Relay ports of a hub that stayed silent, while the hub itself answers, are not tried over UDP for so long."""
    direct_dial_timeout_s: float = 1.0
    """How long a published address may stay silent before the call through a hub begins."""
    relay_dial_timeout_s: float = 2.5
    """How long a called peer may take to begin IKE over the relay before it is called through another hub."""
    connect_timeout_s: float = 15.0
    """An attempt that took longer is over; packets that waited are gone by then."""
    relay_bind_timeout_s: float = 3.0
    relay_confirm_timeout_s: float = 1.0
    """A relay that worked and does not answer for this long is given up for another one."""
    call_timeout_s: float = 4.0
    hard_nats: bool = True
    """Whether endpoint-dependent NATs are passed by prediction and guesses, at most 100 packets a second."""
    idle_s: float = 300.0
    """A peer without traffic for this long is taken down; its next packet brings it up again."""
    liveness_s: float = 15.0
    """A relayed peer, or a fellow hub, that was silent for so long is asked whether it lives (RFC 7296 section 2.4)."""
    hub_liveness_s: float = 400.0
    """The same between a hub and a peer. The peer's STUN requests notice a hub that is gone or was started anew, and
    its publications show both ends that the SA lives; this is for what both miss."""
    sa_life_s: float = 3600.0
    """An SA is replaced by a fresh one before it is this old."""
    sa_replace_fraction: float = 0.8
    old_sa_linger_s: float = 3.0
    """A replaced SA keeps receiving for this long: more than any packet stays in flight."""
    glare_window_s: float = 10.0
    """Two SAs that both ends began within this time are one connection; later ones replace."""
    locator_life_s: float = 600.0
    locator_refresh_s: float = 240.0
    """Less than half of a locator's life, so that one that failed altogether does no harm; failures are tried again."""
    name_refresh_s: float = 1500.0
    """The same for names and IPv4 addresses, whose records live for an hour."""
    overlay_mtu: int = 1280
    """Inner bytes: the least that IPv6 allows (RFC 8200 section 5); 1365 with ESP, UDP and IPv6 around it, which
    tunnels, PPPoE and mobile networks carry: nothing waits for path MTU discovery, which firewalls break."""
    sequence_limit: int = 3_000_000_000
    """Of 2^32 ESP sequence numbers without ESN; the SA is replaced when so many are used."""
    loss_suspect_s: float = 0.1
    """Traffic goes out and nothing comes back for this long, or twice the round trip: the path is verified at once."""
    asleep_s: float = 20.0
    """After so long a sleep tunnels to hubs are made anew without asking: hubs count on a word every few seconds."""
    forgotten_s: float = 5.0
    """After so long a sleep a peer that sent us something has given us up: the next packet begins a new SA."""
    watch_s: float = 0.05
    """Between looks at the counters of SAs with traffic; each is one message to the plane."""
    inspect_s: float = 1.0
    """The same for all SAs."""
