"""The acts of `p2pvpn demo`, in their order, with the figures that they find and the packets that prove them."""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from p2pvpn.identity.document import ENROL_PORT

from . import nat
from .capture import Capture
from .nat import NatKind
from .stage import Seen, Stage
from .story import Passage, Story
from .traffic import Flow, Traffic
from .wire import Class, Packet, Wire

ROOT = Path("/run/demo")
"""In the laboratory's own tmpfs."""
RATE = 200.0
"""Numbered packets a second, each way."""
FIRST_PING_S = 15.0
UPGRADE_S = 20.0
STAYS_RELAYED_S = 5.0
"""How long to look that no direct path appears where there can be none."""
AFTER_KILL_S = 5.0
FALL_BACK_S = 45.0
SETTLE_S = 2.0
RELAYED_TO_DIRECT = 3.0
"""The relayed round trip is at least this many direct ones, by the laboratory's distances."""
TIMELINE_MS = 2000.0
TIMELINE_ROWS = 24


@dataclass
class Figures:
    """The result; None where it does not apply, or was not reached."""

    hubs: int
    nat: list[str]
    plane: str | None = None
    join_s: float | None = None
    first_ping_ms: float | None = None
    path_at_first_ping: str | None = None
    direct_ms: float | None = None
    path: str | None = None
    rtt_ms: dict[str, float | None] = field(default_factory=lambda: {"relayed": None, "direct": None})
    lost_during_upgrade: int | None = None
    on_the_wire: dict[str, int] | None = None
    hub_killed: dict[str, Any] = field(default_factory=lambda: {"lost": None, "new_connection_ok": None})
    stream_tcp: int | None = None
    """Segments of IKE and ESP over TCP, each counted at every hop."""
    over: dict[str, str | None] = field(default_factory=dict)
    """What each peer's relayed path went over at the end."""

    def as_json(self) -> str:
        return json.dumps(vars(self), indent=2) + "\n"


class Demo:
    """The acts of the demo, in order; each fills in its figures, and raises Seen when it does not end as it should."""

    def __init__(self, stage: Stage, story: Story, figures: Figures) -> None:
        self.stage = stage
        self.story = story
        self.figures = figures
        self.mark = os.urandom(8)
        """In every payload that the demo's users send."""
        self.capture = Capture(stage.lab.hops, ROOT / "pcap")
        self.wire = Wire(self.capture.files, stage.keys, marker=self.mark, enrol_port=ENROL_PORT)
        self.expected = nat.direct_possible(stage.nats["a"], stage.nats["b"])
        self.overlay: dict[str, str] = {}
        self._traffic_port = 7018

    def run(self) -> None:
        self.set_up()
        self.join()
        hub = self.meet()
        self.kill_hub(hub)
        self.turn_hostile()
        self.look_at_the_wire()

    def set_up(self) -> None:
        """The admin's network, and its hubs."""
        stage, story = self.stage, self.story
        story.chapter("An admin makes a network and grants its hubs")
        story.picture(
            f"     a ── nat-a ({stage.nats['a'].value}) ──┐\n"
            f"                                  internet ── {' '.join(map(str, stage.hubs))}\n"
            f"     b ── nat-b ({stage.nats['b'].value}) ──┘"
        )
        passphrase = ROOT / "passphrase"
        passphrase.touch(0o600)
        passphrase.write_text(os.urandom(16).hex())
        secret = ("--passphrase-file", str(passphrase))
        story.command("admin", "p2pvpn network create home")
        stage.cli(stage.admin, "network", "create", "home", *secret)
        grants = []
        for hub, address in ((hub, f"192.0.2.{number}") for number, hub in enumerate(stage.hubs, start=1)):
            story.command(str(hub), "p2pvpn request")
            request = stage.line(hub, "request")
            story.command("admin", f"p2pvpn grant {_short(request)} --name {hub} --hub {address} --issuer")
            options = ("--name", str(hub), "--hub", address, "--issuer")
            grants.append(stage.line(stage.admin, "grant", request, *options, *secret))
        for hub, grant in zip(stage.hubs, grants, strict=True):
            story.command(str(hub), f"p2pvpn join {_short(grant)}")
            with story.working(f"{hub} comes up"):
                stage.cli(hub, "join", grant)
        self.figures.plane = str(stage.ask(stage.hubs[0], "status")["plane"])
        story.fact(
            f"{len(stage.hubs)} hubs are up, on the {self.figures.plane} plane; the root key never left the admin"
        )

    def join(self) -> None:
        """Both peers, by a token each."""
        stage, story = self.stage, self.story
        story.chapter("Two machines join, each with one token")
        took = []
        for name, home in stage.homes.items():
            story.command("hub1", f"p2pvpn invite {name}")
            token = str(stage.ask(stage.hubs[0], "invite", name)["token"])
            story.command(name, f"p2pvpn join {_short(token)}")
            began = time.monotonic()
            with story.working(f"{name} joins"):
                answer = stage.ask(home.peer, "join", token)
            took.append(time.monotonic() - began)
            self.overlay[name] = str(answer["overlay"])
            story.fact(f"{name} is {answer['overlay']} and {answer['ipv4']}, in {took[-1]:.2f} s")
        self.figures.join_s = round(max(took), 3)
        wanted = min(2, len(stage.hubs))
        for peer in (stage.a, stage.b):
            stage.wait(
                f"{peer} attached to {wanted} hubs",
                lambda peer=peer: len(stage.attached_hubs(peer)) >= wanted,  # type: ignore[misc]
                20.0,
                lambda peer=peer: f"attached to {sorted(stage.attached_hubs(peer))}",  # type: ignore[misc]
                peer,
            )
        story.fact(f"each is attached to {wanted} hubs at least")

    def meet(self) -> str:
        """The first ping, relayed, and the way from there to the direct path; the hub that relayed it, or nothing."""
        stage, story, figures, wire = self.stage, self.story, self.figures, self.wire
        story.chapter("The first ping ever between them")
        traffic = self._traffic(answer=True)
        pattern = self.mark + os.urandom(8)
        story.command("a", f"ping -c 1 {self.overlay['b']}")
        began = time.time()
        ping = _Background(stage, self.overlay["b"], pattern)
        stage.wait(
            "a packet for b",
            lambda: ping.has_ended() or self._is_asked_for(),
            FIRST_PING_S,
            lambda: "a's daemon has none",
            stage.a,
        )
        traffic.go()  # right behind the ping, however long that took to start; b answers when it hears the first
        with story.working("the first packet finds its way"):
            figures.first_ping_ms = ping.round_trip_ms()
        if figures.first_ping_ms is None:
            traffic.stop()
            raise Seen("the first ping to be answered", "no answer", (stage.a, stage.b))
        story.fact(f"answered after {figures.first_ping_ms:.0f} ms: found, called, authenticated, keys agreed")
        direct = self._await_path()
        time.sleep(SETTLE_S)
        flows = traffic.stop()
        wire.update()
        self._tell_timeline(began)
        first = next(wire.carrying(pattern), None)
        if first is None:
            raise Seen("the ping's packet in the capture, decrypted with the logged keys", "none", (stage.a,))
        figures.path_at_first_ping = self._way(first)
        hub = next((stage.name_of(end.host) for end in (first.destination, first.source) if self._is_hub(end.host)), "")
        story.fact(
            f"the capture shows: the first packet went {figures.path_at_first_ping} {'by ' + hub if hub else ''}"
        )
        self._check_no_earlier_contact(began, figures.path_at_first_ping)
        self._count_upgrade(flows, began, direct=direct)
        if figures.plane == "kernel":
            self._see_kernel_count(sum(len(flow.arrived_at) for flow in flows))
        return hub

    def _is_asked_for(self) -> bool:
        """Whether a's daemon has something to do with b."""
        peers = [peer for network in self.stage.status(self.stage.a)["networks"] for peer in network["peers"]]
        return any(peer["overlay"] == self.overlay["b"] for peer in peers)

    def _see_kernel_count(self, packets: int) -> None:
        """The kernel of a peer itself must have counted the users' packets, on SAs that the daemon installed."""
        said = self.stage.a.run(["ip", "-s", "xfrm", "state"]).stdout
        counts = [int(number) for number in re.findall(r"(\d+)\(packets\)\s+add", said)]
        if sum(counts) < packets:
            raise Seen(f"{packets} packets at least on the SAs of a's kernel", f"{counts}", (self.stage.a,))
        self.story.fact(f"a's kernel counted {sum(counts)} ESP packets on {len(counts)} SAs")

    def _check_no_earlier_contact(self, began: float, way: str) -> None:
        stage = self.stage
        straight = next(self.wire.between(stage.party("a"), stage.party("b")), None)
        if straight is not None and straight.at < began:
            seen = f"{straight.kind.value} on {straight.hop}, {began - straight.at:.3f} s before"
            raise Seen("no packet between the two before the first ping", seen)
        reachable = NatKind.NONE in stage.nats.values()
        if way != "relayed" and not reachable:
            raise Seen("the first ping relayed by a hub", f"it went {way}")
        if straight is not None:
            after = (straight.at - began) * 1000
            self.story.fact(f"the first packet ever straight between the two: {after:.0f} ms after the ping was typed")
        else:
            self.story.fact("no packet ever went straight between the two")

    def _count_upgrade(self, flows: tuple[Flow, Flow], began: float, *, direct: bool) -> None:
        """Losses from the connection's first packet on, times by the way that each packet took, by the capture."""
        stage, story, figures = self.stage, self.story, self.figures
        up_at = min(flows[0].arrived_at.values(), default=None)
        if up_at is None or not flows[1].arrived_at:
            raise Seen("numbered packets both ways", "none came", (stage.a, stage.b))
        waited = len([at for at in flows[0].sent_at if at < up_at])
        in_vain = len(flows[0].lost()) - len(flows[0].lost(up_at))
        story.note(f"{waited} numbered packets waited for the connection, {in_vain} in vain")
        for way in ("relayed", "direct"):
            times = [flow.latency_ms(self._numbers(flow, way, up_at)) for flow in flows]
            if None not in times:
                figures.rtt_ms[way] = round(sum(time for time in times if time is not None), 2)
        figures.path = "direct" if direct else "relayed"
        lost = _lost(flows, up_at)
        sent = sum(len(flow.sent_at) for flow in flows)
        if not direct:
            if sum(lost):
                raise Seen("no packet lost on the relayed path", f"{lost[0]} of a's, {lost[1]} of b's lost")
            story.fact(f"it stays relayed, as these NATs must; 0 of {sent} packets lost")
            return
        first = next(
            (p for f in flows for p in self.wire.carrying(f.marker) if self._way(p) == "direct"), None
        )  # fmt: skip
        if first is None:
            raise Seen("packets on the direct path in the capture", "none, though the daemons say `direct`")
        firsts = [
            next((p.at for p in self.wire.carrying(f.marker) if self._way(p) == "direct"), first.at) for f in flows
        ]
        figures.direct_ms = round((min(firsts) - began) * 1000, 1)
        figures.lost_during_upgrade = sum(lost)
        story.fact(f"the path is direct {figures.direct_ms:.0f} ms after the ping was typed")
        story.fact(f"{sum(lost)} of {sent} numbered packets lost, {sum(f.duplicates for f in flows)} twice")
        if sum(lost):
            numbers = [flow.lost(up_at)[:8] for flow in flows]
            raise Seen("0 packets lost during the upgrade", f"lost of a's {numbers[0]}, of b's {numbers[1]} ...")
        self._compare_round_trips()

    def _compare_round_trips(self) -> None:
        relayed, straight = self.figures.rtt_ms["relayed"], self.figures.rtt_ms["direct"]
        if relayed is None or straight is None:
            return
        self.story.fact(f"round trip: {relayed:.1f} ms relayed, {straight:.1f} ms direct")
        if relayed < RELAYED_TO_DIRECT * straight:
            raise Seen(f"relayed at least {RELAYED_TO_DIRECT:g} times direct", f"{relayed} ms and {straight} ms")

    def kill_hub(self, met: str) -> None:
        """SIGKILL to every process of the hub in use, under traffic; then a connection from nothing."""
        stage, story, figures = self.stage, self.story, self.figures
        name = met or stage.hubs[0].name
        hub = next(hub for hub in stage.hubs if hub.name == name)
        story.chapter(f"{name}, {'the hub they met by' if met else 'a hub'}, is killed")
        traffic = self._traffic()
        traffic.go()
        time.sleep(1.0)
        story.command(name, "kill -9")
        if hub.kill() == 0:
            raise Seen(f"a daemon on {name} to kill", "no process there", (hub,))
        with story.working("traffic goes on, or not"):
            time.sleep(AFTER_KILL_S)
            if figures.path == "relayed":
                stage.wait(
                    "another hub to carry the traffic", self._answers, FALL_BACK_S, self._paths, stage.a, stage.b
                )
        flows = traffic.stop()
        lost = sum(len(flow.lost()) for flow in flows)
        figures.hub_killed["lost"] = lost
        if figures.path == "direct" and lost:
            raise Seen("0 packets lost on the direct path", f"{lost} lost", (stage.a, stage.b))
        story.fact(f"{lost} packets lost on the {figures.path} path")
        if lost:
            story.note(f"the traffic stood still for {max(flow.longest_gap_s() for flow in flows):.1f} s")
        self._connect_anew()

    def _connect_anew(self) -> None:
        """Both drop the SA and every cache; the next packet has to come through on SAs that were never used before."""
        stage, story, figures, wire = self.stage, self.story, self.figures, self.wire
        wire.update()
        used = {packet.spi for packet in wire.carrying(self.mark)}
        for node, other in ((stage.a, "b"), (stage.b, "a")):
            story.command(str(node), f"p2pvpn forget {other}")
            stage.cli(node, "forget", other)
        pattern = self.mark + os.urandom(8)
        with story.working("a new connection, from nothing"):
            times = stage.a.ping(self.overlay["b"], wait_s=FIRST_PING_S, pattern=pattern)
        wire.update()
        spis = {packet.spi for packet in wire.carrying(pattern)}
        figures.hub_killed["new_connection_ok"] = bool(times) and not spis & used
        if not times:
            raise Seen("a new connection through the other hubs", "no answer to a ping", (stage.a, stage.b))
        if spis & used:
            raise Seen("new SAs after `p2pvpn forget`", "the ping went over the old ones", (stage.a, stage.b))
        story.fact(f"a new connection through the other hubs: answered after {times[0]:.0f} ms, on new SAs")

    def turn_hostile(self) -> None:
        """Both routers become symmetric and forget every flow; the relay has to carry the traffic."""
        stage, story, figures = self.stage, self.story, self.figures
        story.chapter("Both NATs turn hostile")
        traffic = self._traffic()
        traffic.go()
        time.sleep(1.0)
        for home in stage.homes.values():
            nat.turn_hostile(home, stage.nats[home.peer.name])
        story.note("symmetric from now on, and every flow that they knew is forgotten")

        def relayed() -> bool:
            return self._answers() and stage.path(stage.a, "b") == stage.path(stage.b, "a") == "relayed"

        with story.working("the relay takes over"):
            stage.wait("the relay to carry the traffic", relayed, FALL_BACK_S, self._paths, stage.a, stage.b)
        times = stage.a.ping(self.overlay["b"], count=10, interval_s=0.2, pattern=self.mark)
        flows = traffic.stop()
        if len(times) < 10:
            raise Seen("10 pings answered over the relay", f"{len(times)} answered", (stage.a, stage.b))
        story.fact(f"the relay carries the traffic: 10 of 10 pings, {sorted(times)[5]:.1f} ms")
        story.note(f"the traffic stood still for {max(flow.longest_gap_s() for flow in flows):.1f} s")
        figures.over = {
            str(one): stage.over(one, str(other)) for one, other in ((stage.a, stage.b), (stage.b, stage.a))
        }
        for name, over in figures.over.items():
            expected = "tcp" if stage.nats[name] is NatKind.UDP_BLOCKED else "udp"
            if over != expected:
                raise Seen(f"{name}'s side of the relay over {expected}", str(over), (stage.a, stage.b))
        if figures.rtt_ms["relayed"] is None:
            figures.rtt_ms["relayed"] = round(sorted(times)[5], 2)
            self._compare_round_trips()

    def look_at_the_wire(self) -> None:
        """What all of it was, at every hop."""
        story, wire = self.story, self.wire
        story.chapter("What was on the wire")
        self.capture.stop()
        wire.finish()
        totals = wire.totals()
        story.totals(wire.by_hop(), totals)
        unexpected = totals.pop(Class.UNEXPECTED.value)
        self.figures.stream_tcp = totals.pop(Class.STREAM_TCP.value)
        self.figures.on_the_wire = totals
        if wire.clear:
            hop, at = wire.clear[0]
            raise Seen(
                "the users' payload readable at no hop", f"readable {len(wire.clear)} times, first on {hop} at {at}"
            )
        if not wire.sealed:
            raise Seen("the users' payload inside of ESP", "it is nowhere: the search does not work")
        story.fact(
            f"the users' payload: inside of {wire.sealed} ESP packets, readable in none of {len(wire.packets)} packets"
        )
        if totals["other_udp"] or unexpected:
            odd = [f"{p.kind.value} {p.source} > {p.destination} on {p.hop}" for p in wire.unsorted()[:10]]
            raise Seen("nothing but ESP, IKE, STUN, enrolment, ARP and ICMP", "; ".join(odd))

    # Tools of the acts.

    def _traffic(self, *, answer: bool = False) -> Traffic:
        self._traffic_port += 1
        ends = ((self.stage.a, self.overlay["a"]), (self.stage.b, self.overlay["b"]))
        return Traffic(ends, ROOT, rate=RATE, port=self._traffic_port, mark=self.mark, answer=answer)

    def _await_path(self) -> bool:
        """Wait for the direct path, where there must be one; whether it is there."""
        stage = self.stage

        def direct() -> bool:
            return stage.path(stage.a, "b") == stage.path(stage.b, "a") == "direct"

        with self.story.working("they look for a direct path"):
            if self.expected is True:
                stage.wait("the direct path", direct, UPGRADE_S, self._paths, stage.a, stage.b)
                return True
            deadline = time.monotonic() + (STAYS_RELAYED_S if self.expected is False else UPGRADE_S)
            while time.monotonic() < deadline and not (self.expected is None and direct()):
                time.sleep(0.25)
        found = direct()
        if self.expected is False and found:
            raise Seen("these NATs to leave no direct path", self._paths())
        return found

    def _answers(self) -> bool:
        return bool(self.stage.a.ping(self.overlay["b"], wait_s=1.0, pattern=self.mark))

    def _paths(self) -> str:
        return f"a says {self.stage.path(self.stage.a, 'b')}, b says {self.stage.path(self.stage.b, 'a')}"

    def _is_hub(self, host: str) -> bool:
        return self.stage.name_of(host).startswith("hub")

    def _way(self, packet: Packet) -> str:
        return "relayed" if self._is_hub(packet.source.host) or self._is_hub(packet.destination.host) else "direct"

    def _numbers(self, flow: Flow, way: str, since: float) -> set[int]:
        """Numbers that were sent since then and left by that way, by the capture's first sight of each."""
        ways: dict[int, str] = {}
        for packet in self.wire.carrying(flow.marker):
            at = packet.inner.index(flow.marker) + len(flow.marker)
            ways.setdefault(int.from_bytes(packet.inner[at : at + 4], "big"), self._way(packet))
        return {number for number, its in ways.items() if its == way and flow.sent_at[number] >= since}

    def _tell_timeline(self, began: float) -> None:
        """The first moments at the two routers' outer links; runs of the same kind in one row."""
        passages: list[Passage] = []
        hops = {f"{home.router}-internet" for home in self.stage.homes.values()}
        for packet in self.wire.packets:
            at_ms = (packet.at - began) * 1000
            if packet.hop not in hops or not 0 <= at_ms < TIMELINE_MS:
                continue
            ends = self.stage.name_of(packet.source.host), self.stage.name_of(packet.destination.host)
            last = passages[-1] if passages else None
            if last is not None and (last.kind, last.source, last.destination) == (packet.kind.value, *ends):
                passages[-1] = Passage(last.at_ms, last.kind, *ends, last.count + 1)
            else:
                passages.append(Passage(at_ms, packet.kind.value, *ends, 1))
        self.story.timeline("on the wire, as the two meet", passages[:TIMELINE_ROWS])


class _Background:
    """A single ping that is on its way."""

    def __init__(self, stage: Stage, target: str, pattern: bytes) -> None:
        argv = ["ping", "-n", "-c", "1", "-W", str(FIRST_PING_S), "-p", pattern.hex(), target]
        self._output = (ROOT / "first-ping").open("w+")
        self._process = stage.a.popen(argv, stdout=self._output, stderr=self._output)

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def round_trip_ms(self) -> float | None:
        """Wait for the answer; None when there was none."""
        self._process.wait(FIRST_PING_S + 10)
        self._output.seek(0)
        words = self._output.read().split()
        self._output.close()
        return next((float(word[5:]) for word in words if word.startswith("time=")), None)


def _lost(flows: tuple[Flow, Flow], since: float) -> tuple[int, int]:
    return len(flows[0].lost(since)), len(flows[1].lost(since))


def _short(text: str) -> str:
    return text if len(text) < 24 else f"{text[:12]}...{text[-6:]}"
