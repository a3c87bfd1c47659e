"""The times of a punching agent on one screen, in seconds."""

from __future__ import annotations

from dataclasses import dataclass

from p2pvpn.core.ports import Entropy


@dataclass(frozen=True, slots=True)
class PunchSettings:
    """Defaults suit the Internet; tests and simulations may shorten them."""

    check_offsets_s: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
    """When a check is sent after its start. Dense at first: a NAT opens with our own packet, so the other side's next
    one passes, and two sides that start a round trip apart must not wait RFC 8445's 500 ms for it."""
    retry_offsets_s: tuple[float, ...] = (0.0,)
    """The same for a retry of a pair that failed: one packet, as a silent address gets few."""
    answer_wait_s: float = 0.8
    """From the last packet of a check to its failure: beyond the round trip of a satellite."""
    backoff_s: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
    """Between retries of a failed pair while no path is selected; the last one repeats."""
    idle_backoff_s: float = 600.0
    """Between retries of a failed pair while another path serves: nothing but a change of network, which is told,
    makes it work."""
    settle_s: float = 0.2
    """At most so long after the first success, and at most its round trip, better paths are waited for."""
    consent_s: float = 5.0
    """Between consent checks on the selected path, randomised (RFC 7675 section 5.1)."""
    alternative_s: float = 25.0
    """Between checks of the best other paths: keeps their NAT bindings (RFC 4787: 2 min, seen: 30 s) and round
    trips fresh."""
    spare_s: float = 120.0
    """Between checks of all other paths."""
    jitter: float = 0.2
    """Periods are randomised by this share up and down (RFC 7675 section 5.1)."""
    miss_s: float = 0.3
    """A check of a working path without an answer for so long, or 1.25 round trips and 50 ms, is a miss."""
    quick_tries: int = 5
    """Checks after a miss, `miss_s` apart, before the path is lost: 1.5 s. RFC 7675 waits 30 s, which is right without
    a relay to fall back to; here each second on a dead path is a second of lost traffic."""
    verify_s: float = 0.1
    """The spacing when the path is in doubt (`verify`): five checks, so a verdict in half a second."""
    verify_tries: int = 4
    move_misses: int = 2
    """After so many misses another path is chosen if it has answered meanwhile, without waiting for the verdict."""
    gain: float = 0.1
    """A path replaces the selected one when its score is better by this share ..."""
    gain_s: float = 0.002
    """... and by this much, so that jitter moves nobody."""
    second_look_s: float = 0.1
    """A path that looks better is measured again after so long before anything moves."""
    hold_s: float = 2.0
    """A path that works is kept at least so long."""
    answer_lifetime_s: float = 5.0
    """Answers to checks older than this are ignored."""

    def jittered(self, period_s: float, entropy: Entropy) -> float:
        """The period, randomised."""
        share = int.from_bytes(entropy(2), "big") / 0xFFFF
        return period_s * (1.0 + self.jitter * (2.0 * share - 1.0))

    def pause_s(self, failures: int, *, idle: bool) -> float:
        """Until a pair is tried again that failed before so many times; `idle` while another path serves."""
        if failures < len(self.backoff_s):
            return self.backoff_s[failures]
        return self.idle_backoff_s if idle else self.backoff_s[-1]
