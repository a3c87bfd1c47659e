"""Keeps one port mapped at one router: by PCP, or by NAT-PMP where the router speaks nothing newer.

    ASKING    a request is out, and goes again with doubling pauses      granted: HOLDING, denied: RESTING
    HOLDING   the mapping is there, until it is time to renew it          half of its life: ASKING
    RESTING   the router said no, or nothing                              after a while: ASKING, by PCP again

While a mapping that is held is renewed, it counts until it expires. A router that announces a restart (its epoch time
jumped) is asked again soon, but not more often than once a minute: announcements are not authenticated. Answers count
only from the router's own address, and those of PCP only with our nonce.
"""

from __future__ import annotations

import contextlib
from enum import Enum

from p2pvpn.core.address import Endpoint, Path
from p2pvpn.core.errors import WireError
from p2pvpn.core.output import Output, Transmit
from p2pvpn.core.ports import Entropy

from . import natpmp, pcp
from .dialogue import AskNext, Denied, Dialogue, Granted, NatPmpDialogue, OtherVersion, PcpDialogue
from .epoch import EpochClock
from .mapping import MapGained, MapLost, MapRefused, PortMapping, clamped_lifetime

MIN_REST_S, MAX_REST_S = 30.0, 1800.0
"""Between a refusal and the next request, whatever time the refusal names."""
SILENCE_REST_S = 900.0
"""The same at most when nothing was answered: from `MIN_REST_S` on, doubled each time. It may have been booting."""
MIN_RENEWAL_S = 4.0
"""Between requests to renew (RFC 6887 section 11.2.1)."""
RESTART_DELAY_S = 5.0
"""Most of the random wait after an announcement, so that not all clients ask at once (section 14.1.3)."""
RESTART_PAUSE_S = 60.0
"""Between announcements that are believed."""
CHANGE_PAUSE_S = 30.0
"""Between mappings that the router changes unasked (section 14.2): each one is news for every peer."""


class Phase(Enum):
    ASKING = "asking"
    HOLDING = "holding"
    RESTING = "resting"


class GatewayClient:
    """`local` is our endpoint as the router sees it, `gateway` the router's address. Times are monotonic seconds."""

    def __init__(self, *, local: Endpoint, gateway: str, entropy: Entropy) -> None:
        self.local = local
        self.gateway = gateway
        self.mapping: PortMapping | None = None
        self.reason = ""
        """Why there is no mapping."""
        self.has_answered = False
        """Whether the router ever said anything in either protocol."""
        self._path = Path(Endpoint(local.host, 0), Endpoint(gateway, pcp.PORT))
        self._entropy = entropy
        self._phase = Phase.RESTING
        self._dialogue: Dialogue = PcpDialogue(local, entropy)
        self._epoch = EpochClock()
        self._request = b""
        self._wait_s = 0.0
        self._tries = 0
        self._silences = 0
        self._next_at: float | None = None
        self._held_at = 0.0
        self._expires_at = 0.0
        self._restart_heard_at: float | None = None
        self._out: list[Output] = []

    @property
    def phase(self) -> Phase:
        return self._phase

    def start(self, now: float) -> list[Output]:
        """Ask, at once and from the beginning: at first, and when the network changed. A mapping that is held counts
        until it expires."""
        if self.mapping is None:
            self._dialogue = PcpDialogue(self.local, self._entropy)
        self._silences = 0
        self._ask(now)
        return self._finish()

    def close(self) -> list[Output]:
        """Take the mapping back, as far as one packet can, and say nothing more."""
        self._next_at = None
        if self.mapping is not None:
            self._out.append(Transmit(self._path, self._dialogue.give_back()))
            self.mapping = None
        return self._finish()

    def handle(self, source: Endpoint, data: bytes, now: float) -> list[Output]:
        """A datagram that came to the socket that our requests leave from."""
        if source == self._path.remote and self._next_at is not None:
            with contextlib.suppress(WireError):  # not an answer to us
                self._take(data, now)
        return self._finish()

    def announced(self, source: Endpoint, data: bytes, now: float) -> list[Output]:
        """A datagram that came to the port of announcements. Only what a router says that mapped for us counts."""
        if source.host != self.gateway or self.mapping is None or self._phase is not Phase.HOLDING:
            return []
        try:
            epoch_s = self._dialogue.news_untrusted(data)
        except WireError:
            return []
        heard_at = self._restart_heard_at
        if heard_at is not None and now - heard_at < RESTART_PAUSE_S:
            return []
        if not self._epoch.take(epoch_s, now):
            self._restart_heard_at = now
            self._next_at = now + RESTART_DELAY_S * self._share()
        return []

    def unreachable(self, now: float) -> list[Output]:
        """The router refuses the port (ICMP): no need to wait for its silence."""
        if self._phase is Phase.ASKING and self.mapping is None and not self.has_answered:
            self._rest_in_silence("the router speaks neither PCP nor NAT-PMP", now)
        return self._finish()

    def next_deadline(self) -> float | None:
        if self._next_at is None or self.mapping is None:
            return self._next_at
        return min(self._next_at, self._expires_at)

    def tick(self, now: float) -> list[Output]:
        """Do what is due."""
        if self._next_at is None:
            return []
        if self.mapping is not None and self._expires_at <= now:
            self._lose()
        if self._next_at <= now:
            if self._phase is Phase.ASKING:
                self._repeat(now)
            else:
                self._ask(now)
        return self._finish()

    def _finish(self) -> list[Output]:
        outputs, self._out = self._out, []
        return outputs

    # Requests.

    def _ask(self, now: float) -> None:
        self._phase = Phase.ASKING
        self._request = self._dialogue.ask(self.mapping.external if self.mapping is not None else None)
        self._tries = 0
        self._wait_s = self._dialogue.first_s
        self._send(now)

    def _send(self, now: float) -> None:
        self._tries += 1
        self._next_at = now + self._jittered(self._wait_s)
        if self.mapping is not None:
            self._next_at = max(self._next_at, now + MIN_RENEWAL_S)
        self._out.append(Transmit(self._path, self._request))

    def _repeat(self, now: float) -> None:
        """RFC 6887 section 8.1.1, RFC 6886 section 3.1; the next protocol when this one stays without an answer."""
        if self.mapping is None and self._tries >= self._dialogue.tries:
            if isinstance(self._dialogue, PcpDialogue) and not self.local.is_ipv6:
                self._speak_natpmp(now)
            else:
                self._rest_in_silence("the router does not answer", now)
            return
        self._wait_s = min(2.0 * self._wait_s, self._dialogue.max_s)
        self._send(now)

    def _speak_natpmp(self, now: float) -> None:
        self._dialogue = NatPmpDialogue(self.local)
        self._epoch = EpochClock()
        self._ask(now)

    def _rest(self, reason: str, wait_s: float, now: float) -> None:
        """Leave the router alone; then begin with the newest protocol."""
        self._phase = Phase.RESTING
        if self.mapping is None:
            self._dialogue = PcpDialogue(self.local, self._entropy)
        if reason != self.reason:
            self.reason = reason
            self._out.append(MapRefused(self.gateway, reason))
        self._next_at = now + min(max(wait_s, MIN_REST_S), MAX_REST_S)

    def _rest_in_silence(self, reason: str, now: float) -> None:
        self._rest(reason, min(MIN_REST_S * 2.0**self._silences, SILENCE_REST_S), now)
        self._silences += 1

    def _jittered(self, seconds: float) -> float:
        return seconds * (1.0 + self._dialogue.jitter * (2.0 * self._share() - 1.0))

    def _share(self) -> float:
        return int.from_bytes(self._entropy(2), "big") / 0xFFFF

    # Answers.

    def _take(self, data: bytes, now: float) -> None:
        step = self._dialogue.take_untrusted(data)
        if self._phase is not Phase.ASKING and not (
            isinstance(step, Granted) and now - self._held_at >= CHANGE_PAUSE_S
        ):
            return
        self.has_answered = True
        match step:
            case Granted():
                self._hold(step, now)
            case Denied(reason, wait_s):
                self._rest(reason, wait_s, now)
            case AskNext(request):
                self._request, self._tries, self._wait_s = request, 0, self._dialogue.first_s
                self._send(now)
            case OtherVersion(version):
                if version == natpmp.VERSION and not self.local.is_ipv6 and self.mapping is None:
                    self._speak_natpmp(now)
                else:
                    self._rest(f"the router speaks PCP version {version} only", MAX_REST_S, now)

    def _hold(self, granted: Granted, now: float) -> None:
        """Renewed when half of its life is over, or up to five eighths, so that not all clients ask at once."""
        self._epoch.take(granted.epoch_s, now)
        self._silences = 0
        lifetime_s = clamped_lifetime(granted.lifetime_s)
        self._phase = Phase.HOLDING
        self._held_at = now
        self._expires_at = now + lifetime_s
        self._next_at = now + lifetime_s * (0.5 + 0.125 * self._share())
        mapping = PortMapping(self._dialogue.protocol, self.gateway, self.local, granted.external)
        self.reason = "" if mapping.is_public else f"the router's outer address {granted.external.host} is not public"
        if mapping != self.mapping:
            self.mapping = mapping
            self._out.append(MapGained(mapping))

    def _lose(self) -> None:
        assert self.mapping is not None
        lost, self.mapping = self.mapping, None
        self._out.append(MapLost(lost))
