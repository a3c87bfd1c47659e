"""One IKE SA: its state, its keys, its two windows, its timers.

Messages come in by `receiving.receive`, time by `timing.tick`, wishes of the engine by methods. Tasks (package
`tasks`) do the work of the exchanges and change the SA through `advance`, `key`, `establish`, `end` and `emit`. Outputs
collect in one list, which the endpoint drains after every call.

A message changes something only after it was found admissible in the state, authentic (but for IKE_SA_INIT), whole, the
next in its window, and legal by the rules. Before that it is dropped without a word.
"""

from __future__ import annotations

from p2pvpn.core.address import Path
from p2pvpn.core.errors import LocalError
from p2pvpn.core.output import Event, Output, Transmit
from p2pvpn.core.secret import Secret
from p2pvpn.core.selector import Selector
from p2pvpn.core.timers import TimerTable

from .channel import Channel
from .children import Children
from .codes import Exchange
from .config import Credential, Local, RemoteIdentity
from .keylog import ESP_TABLE, IKE_TABLE, esp_lines, ike_line
from .keys import IkeKeys
from .message import Header, notifications
from .notifies import Notify
from .outputs import (
    InstallChild,
    MoveChild,
    MoveFailed,
    Refused,
    RemoveChild,
    SaClosed,
    SaFailed,
    SaMoved,
)
from .payloads import Payload
from .proposals import IkeSuite
from .states import State, Step, after
from .tasks.create import CreateChild, close_child
from .tasks.followup import Creation, Half
from .tasks.inform import Inform, Probe, delete_request
from .tasks.init import Handshake, PeerFeatures
from .tasks.mobike import Move, begin_appeal, begin_move
from .tasks.rekey import RekeyIke
from .tasks.task import Task
from .timers import Timer
from .window import Answers, Outstanding, Requests


class IkeSa:
    """One IKE SA. `id` is local and never used again; SPIs and roles are those of RFC 7296."""

    def __init__(
        self,
        local: Local,
        sa_id: int,
        path: Path,
        *,
        initiator: bool,
        spi_i: bytes,
        spi_r: bytes,
        tag: object = None,
    ) -> None:
        self.local = local
        self.id = sa_id
        self.initiator = initiator
        self.spi_i = spi_i
        self.spi_r = spi_r
        self.path = path
        self.tag = tag
        self.state = State.INIT_SENT if initiator else State.INIT_ANSWERED
        self.keys: IkeKeys | None = None
        self.handshake: Handshake | None = None
        self.peer = PeerFeatures()
        self.credential: Credential | None = None
        self.remote: RemoteIdentity | None = None
        self.suite: IkeSuite | None = None
        self.children = Children()
        self.established_at: float | None = None
        self.moving: Move | None = None
        self.dialled = initiator
        """Whether we began the first IKE SA of the family; `initiator` is about this one (RFC 4555 section 2.1)."""
        self.silent = False
        """Tells the engine nothing: a successor that is not needed (yet), or an SA that has one."""
        self.predecessor: IkeSa | None = None
        self.heir: IkeSa | None = None
        self.kin: list[IkeSa] = []
        self.creating: Creation | None = None
        self.half: Half | None = None
        self.after_answer: IkeSa | None = None
        self.contact_is_initial = False
        """The authenticated peer knows of no other SA with us."""
        self.requests = Requests(local.settings.queue_max)
        self.answers = Answers()
        self._channel = Channel(local.settings)
        self.liveness_s = local.settings.liveness_s
        """Quiet time after which the peer is probed; None for never."""
        self.heard_at = 0.0
        """When the peer last proved to be alive."""
        self._timers: TimerTable[Timer] = TimerTable()
        self._hinted: Path | None = None
        self._later: list[Task] = []
        self._doubt = ""
        self._close_reason = ""
        self._out: list[Output] = []

    # What the endpoint asks

    @property
    def local_spi(self) -> bytes:
        return self.spi_i if self.initiator else self.spi_r

    @property
    def is_half_open(self) -> bool:
        """A responder's SA that was never authenticated."""
        return not self.initiator and self.established_at is None

    @property
    def is_established(self) -> bool:
        return self.state is State.ESTABLISHED

    def drain(self) -> list[Output]:
        """The outputs since the last call."""
        out, self._out = self._out, []
        return out

    def next_deadline(self) -> float | None:
        return self._timers.next_deadline()

    def export(self, label: bytes, length: int) -> Secret:
        """Raises LocalError unless the SA is established."""
        if self.keys is None or self.established_at is None:
            raise LocalError("the SA is not established")
        return self.keys.export(label, length)

    # Beginnings

    def begin(self, task: Task, now: float) -> None:
        """The initiator's first request."""
        self.requests.add_first(task)
        self._pump(now)

    def answer_init(self, payloads: list[Payload], path: Path, now: float) -> None:
        """The responder's first answer; it is part of what AUTH signs."""
        packets = self._channel.pack(self._header(Exchange.IKE_SA_INIT, 0, response=True), payloads)
        assert self.handshake is not None
        self.handshake.answer = packets[0]
        self.answers.store(Exchange.IKE_SA_INIT, packets)
        self._channel.protect(self.handshake.keys, self.initiator)
        self._timers.set(Timer.END, now + self.local.settings.half_open_s)
        self._transmit(path, packets)

    def repeat_init(self, path: Path, now: float) -> None:
        """The same IKE_SA_INIT request came again: the same answer, as long as nothing else came."""
        half_open = self.state in (State.INIT_ANSWERED, State.MIXING_DUE)
        if half_open and self.answers.is_last(Exchange.IKE_SA_INIT, 0):
            self._transmit(path, self.answers.again(now, lambda: True))

    # Wishes of the engine

    def move(self, path: Path, now: float, *, eager: bool = False) -> None:
        """MOBIKE to another path; original initiator only. To the path in use: our NAT maps us anew, say so."""
        if self.state is not State.ESTABLISHED or not self.dialled or not self.peer.mobike:
            self.emit(MoveFailed(self.id, path, "only the original initiator of an established MOBIKE SA moves it"))
            return
        begin_move(self, path, now, eager=eager)
        self._pump(now)

    def appeal(self, path: Path, notifies: tuple[Notify, ...], now: float) -> None:
        """Ask the one who may move the SA to move it here; for the responder of an established MOBIKE SA."""
        if self.state is State.ESTABLISHED and not self.dialled and self.peer.mobike:
            begin_appeal(self, path, notifies, now)
            self._pump(now)

    def adopt(self, path: Path, now: float) -> None:
        """Use this path without asking the peer."""
        if self.state is State.ESTABLISHED and self.switch(path, now):
            self.emit(SaMoved(self.id, path))
            self._pump(now)

    def inform(self, notifies: tuple[Notify, ...], now: float) -> None:
        """Raises LocalError when the queue is full or the SA not established."""
        if self.state is not State.ESTABLISHED:
            raise LocalError("the SA is not established")
        self.requests.add(Inform(notifications(notifies)))
        self._pump(now)

    def probe(self, now: float) -> None:
        """An empty request, unless one is waiting already."""
        under_way = self.requests.outstanding
        if self.state is not State.ESTABLISHED or self.requests.has(Probe):
            return
        if under_way is None or not isinstance(under_way.task, Probe):
            self.requests.add_first(Probe())
        self._pump(now)

    def close(self, reason: str, now: float) -> None:
        """DELETE; an SA that is not established yet is forgotten."""
        if self.state is State.ESTABLISHED:
            self._close_reason = reason
            self.advance(Step.CLOSE)
            self.requests.clear_queue()
            self.requests.add_first(delete_request())
            self.moving = None
            self._timers.clear(Timer.LIVENESS)
            self._set_farewell(now)
            self._pump(now)
        elif self.established_at is None and self.state not in (State.DELETING, State.LINGERING):
            self.drop()

    def drop(self) -> None:
        """Forget the SA: no message, no event."""
        if self.state is not State.CLOSED:
            self.advance(Step.DROPPED)
            self._remove_children()
            self._timers.clear_all()

    def rekey(self, now: float) -> None:
        """A successor with fresh keys, unless one is on its way."""
        is_wanted = any(isinstance(one, RekeyIke) for one in (self.creating, *self._later))
        if self.state is State.ESTABLISHED and not is_wanted and not self.requests.has(RekeyIke):
            self.requests.add(RekeyIke())
            self._pump(now)

    def rekey_child(self, child_id: int, now: float) -> None:
        """A replacement for a Child SA."""
        child = self.children.get(child_id)
        if self.state is State.ESTABLISHED and child is not None:
            self.add_child(child.local, child.remote, now, child_id)

    def add_child(
        self, local: tuple[Selector, ...], remote: tuple[Selector, ...], now: float, replaces: int | None = None
    ) -> None:
        """One more Child SA. Raises LocalError when too many requests wait, or the SA is not established."""
        if self.state is not State.ESTABLISHED:
            raise LocalError("the SA is not established")
        self.requests.add(CreateChild(local, remote, replaces))
        self._pump(now)

    def close_child(self, child_id: int, now: float) -> None:
        """DELETE of one Child SA."""
        if self.state is State.ESTABLISHED:
            close_child(self, child_id)
            self._pump(now)

    def heard(self, now: float) -> None:
        """The peer is known to be alive: the next probe is put off, and a request under way is not given up yet."""
        self.heard_at = now
        self.put_off_probe(now)

    def put_off_probe(self, now: float) -> None:
        """Until the quiet time is over once more."""
        if self.state is State.ESTABLISHED and self.liveness_s is not None and not self.silent:
            self._timers.set(Timer.LIVENESS, now + self.liveness_s)

    # What tasks do

    def emit(self, output: Output) -> None:
        if self.silent and isinstance(output, Event):
            return
        self._out.append(output)
        sink = self.local.key_sink
        if sink is not None and isinstance(output, InstallChild):
            for line in esp_lines(output.child):
                sink(ESP_TABLE, line)

    def advance(self, step: Step) -> None:
        """By the table of states. Raises LocalError when the step cannot be."""
        self.state = after(self.state, step)

    def key(self, handshake: Handshake) -> None:
        """SK_ keys are known; everything after IKE_SA_INIT is protected by them."""
        self.keys = handshake.keys
        self.suite = handshake.suite
        self.handshake = handshake
        self._channel.fragmentation = self.peer.fragmentation
        if self.initiator:
            self._channel.protect(handshake.keys, self.initiator)
        self._timers.clear(Timer.DOUBT)
        self._log_keys(handshake.keys, last=not handshake.pending)

    def come_of_age(self, parent: IkeSa, keys: IkeKeys, suite: IkeSuite) -> None:
        """A successor: authenticated as its parent was, with keys of its own."""
        self.state = State.ESTABLISHED
        self.keys, self.suite = keys, suite
        self.peer, self.credential, self.remote = parent.peer, parent.credential, parent.remote
        self.dialled = parent.dialled
        self._channel.fragmentation = parent.peer.fragmentation
        self._channel.protect(keys, self.initiator)
        self._log_keys(keys, last=True)

    def mix(self, keys: IkeKeys) -> None:
        """One more key exchange is in the keys; everything from now on is protected by them."""
        assert self.handshake is not None
        self.keys = self.handshake.keys = keys
        self._channel.protect(keys, self.initiator)
        self._log_keys(keys, last=self.state in (State.AUTH_SENT, State.INIT_ANSWERED))

    def use_keys(self, keys: IkeKeys) -> None:
        """Others of SK_d and SK_p; what protects messages stays as it is (RFC 8784 section 3)."""
        assert self.handshake is not None
        self.keys = self.handshake.keys = keys

    def _log_keys(self, keys: IkeKeys, *, last: bool) -> None:
        """For the key log, if there is one; Wireshark takes one line for each pair of SPIs."""
        line = ike_line(self.spi_i, self.spi_r, keys) if self.local.key_sink is not None else None
        if line is not None and self.local.key_sink is not None:
            self.local.key_sink(IKE_TABLE, line if last else f"# of IKE_INTERMEDIATE: {line}")

    def later(self, task: Task, now: float) -> None:
        """Ask again after a pause that is not the same every time."""
        self._later.append(task)
        if self._timers.at(Timer.LATER) is None:
            pause_s = self.local.settings.later_s
            self._timers.set(Timer.LATER, now + pause_s * (1 + self.local.entropy(1)[0] / 256))

    def inherit_later(self, former: IkeSa, now: float) -> None:
        """What the former SA had put off."""
        for task in former._later:
            if task.passes_on:
                self.later(task, now)
        former._later.clear()

    def retire_child(self, child_id: int, now: float) -> None:
        """It was replaced: it receives a little longer."""
        for gone in self.children.retire(child_id, now + self.local.settings.child_linger_s):
            self.emit(RemoveChild(self.id, gone))
        self._watch_children()

    def _watch_children(self) -> None:
        at = self.children.next_deadline()
        if at is not None:
            self._timers.set(Timer.CHILDREN, at)

    def expire(self, now: float) -> None:
        """It has a successor, or is not needed: the peer will delete it, or it is forgotten."""
        for timer in (Timer.LIVENESS, Timer.KEEPALIVE, Timer.CHILDREN, Timer.LATER):
            self._timers.clear(timer)
        if self.state is State.ESTABLISHED:
            self._timers.set(Timer.END, now + 3 * self.local.settings.linger_s)

    def live_on(self, now: float) -> None:
        """It has taken its predecessor's place."""
        self.heard(now)
        self._set_keepalive(now)
        self._watch_children()
        self._pump(now)

    def yield_to_successor(self, now: float) -> None:
        """The peer deletes this SA: if it made a successor, that is the one; what it did not answer goes there too."""
        if isinstance(self.creating, RekeyIke):
            self.creating.dropped(self, now)
            self.creating = None
        waiting = self.requests.outstanding
        if self.heir is None or waiting is None:
            return
        if isinstance(waiting.task, Inform) and not waiting.task.ends:
            self.heir.requests.add_first(waiting.task)
            self.heir.live_on(now)

    def establish(self, now: float) -> None:
        """IKE_AUTH is complete on both sides."""
        self.advance(Step.AUTHENTICATED)
        self.established_at = now
        self.handshake = None
        self._timers.clear(Timer.END)
        self.heard(now)
        self._set_keepalive(now)

    def doubt(self, reason: str, now: float) -> None:
        """An unprotected error came: if nothing better comes within the grace time, it is believed."""
        self._doubt = reason
        if self._timers.at(Timer.DOUBT) is None:
            self._timers.set(Timer.DOUBT, now + self.local.settings.error_grace_s)

    def end(self, step: Step, reason: str, now: float) -> None:
        """The SA is over, or (UNTRUSTED) about to be; says so once."""
        established = self.established_at is not None
        was_told = self.state is State.DELETING and not established
        self.advance(step)
        self._remove_children()
        self._timers.clear_all()
        self.requests.clear_queue()
        self._later.clear()
        for one in self.kin:
            if one.predecessor is self:
                one.drop()
        if self.state is State.LINGERING:
            self.requests.outstanding = None
            self._timers.set(Timer.END, now + self.local.settings.linger_s)
        elif self.state is State.DELETING:
            self._set_farewell(now)
        if established:
            self.emit(SaClosed(self.id, self._close_reason or reason))
        elif self.initiator and not was_told:
            self.emit(SaFailed(self.id, self.tag, reason, step is Step.TIMED_OUT))
        elif not self.initiator and step in (Step.REFUSED, Step.BROKEN):
            self.emit(Refused(self.path, reason))

    # Moving

    @property
    def move_path(self) -> Path:
        """Where our requests go: the target of a move under way, else the SA's path."""
        return self.path if self.moving is None else self.moving.target

    def switch(self, path: Path, now: float) -> bool:
        """Send over this path from now on; whether that is a change."""
        self.moving = None
        changed = path != self.path
        self._hinted = None
        self.path = path
        waiting = self.requests.outstanding
        if waiting is not None and waiting.path != path:
            self.redirect(path, self.local.settings.tries, now)
        if changed:
            for child_id in self.children:
                self.emit(MoveChild(self.id, child_id, path))
            self._set_keepalive(now)
        return changed

    def redirect(self, path: Path, limit: int, now: float) -> None:
        """The request under way goes out over this path at once, with fresh tries."""
        waiting = self.requests.outstanding
        if waiting is not None:
            waiting.path, waiting.limit, waiting.sent = path, limit, 0
            self._send_outstanding(now)

    # Timers

    def _set_farewell(self, now: float) -> None:
        """The end of a DELETE, even when a request before it blocks the window."""
        settings = self.local.settings
        patience = sum(settings.retry_s * settings.retry_factor**turn for turn in range(settings.delete_tries))
        self._timers.set(Timer.END, now + 2 * patience)

    def _set_keepalive(self, now: float) -> None:
        interval = self.local.settings.nat_keepalive_s
        if interval is not None and self.peer.local_nat:
            self._timers.set(Timer.KEEPALIVE, now + interval)

    # Requests of ours

    def _pump(self, now: float) -> None:
        """Begins the next request when the window is free."""
        if self.state in (State.LINGERING, State.CLOSED):
            return
        while (task := self.requests.take()) is not None:
            if not task.wanted(self):
                continue
            if not task.ready(self, now):
                self.later(task, now)
                continue
            try:
                self._ask(task, now)
            except LocalError as problem:
                self.end(Step.DROPPED, str(problem), now)
            return

    def _ask(self, task: Task, now: float) -> None:
        message_id = self.requests.next_id
        packets = self._channel.pack(self._header(task.exchange, message_id, response=False), task.request(self))
        task.sent(packets[0])
        limit = task.tries(self.local.settings)
        if self.moving is not None and not self.moving.back:
            limit = min(limit, self.local.settings.move_tries)
        self.requests.outstanding = Outstanding(task, message_id, packets, task.path(self), limit)
        self._send_outstanding(now)

    def _send_outstanding(self, now: float) -> None:
        waiting = self.requests.outstanding
        assert waiting is not None
        waiting.sent += 1
        self._transmit(waiting.path, waiting.packets)
        self._timers.set(Timer.RETRANSMIT, now + self.requests.begin_wait(self.local.settings, now))

    def resend(self, now: float) -> None:
        """The path works from now on only: the request under way, once more."""
        waiting = self.requests.outstanding
        if waiting is not None:
            self._transmit(waiting.path, waiting.packets)
            self._timers.set(Timer.RETRANSMIT, now + self.requests.begin_wait(self.local.settings, now))

    def _header(self, exchange: int, message_id: int, *, response: bool) -> Header:
        return Header(self.spi_i, self.spi_r, exchange, self.initiator, response, message_id)

    def _transmit(self, path: Path, packets: tuple[bytes, ...]) -> None:
        for packet in packets:
            self.emit(Transmit(path, packet))

    def _remove_children(self) -> None:
        for child_id in self.children.take_all():
            self.emit(RemoveChild(self.id, child_id))
