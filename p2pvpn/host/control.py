"""The daemon's control socket: JSON, one object per line, over a Unix stream socket of mode 0660.

    client > {"id": 1, "method": "status", "params": {}}
    server > {"id": 1, "result": ...}          or {"id": 1, "error": {"message": "...", "hint": "...", "fault": 1}}
    client > {"id": 2, "method": "subscribe"}
    server > {"id": 2, "result": null}
    server > {"event": {...}}                            until the connection ends

Requests of one connection run side by side and may be answered in any order. Whoever connects must be root or the
daemon's own user (SO_PEERCRED). A line that is not a request is answered with an error; one that is too long also ends
the connection, since nobody knows where the next one starts. A reader that does not keep up is cut off.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from p2pvpn.core.errors import Fault, LocalError, P2pvpnError, RemoteError

from .store import runtime_root

MAX_REQUEST_BYTES = 65_536
"""No request of ours comes near; an invitation or a grant has a few kilobytes."""
MAX_ANSWER_BYTES = 16 * 1024 * 1024
"""What a client reads as one line: the status of some 20,000 peers."""
MAX_CLIENTS = 32
"""Connections at once: a few commands, a few watchers, a metrics exporter."""
MAX_OUTSTANDING = 16
"""Requests under way per connection."""
MAX_BACKLOG_BYTES = 1_048_576
"""Events that wait for a subscriber; one that is further behind is cut off."""
MAX_CLIENT_EVENTS = 4096
"""Events that a client keeps until they are asked for; the oldest leave first."""
SUBSCRIBE = "subscribe"

Handler = Callable[[str, dict[str, Any]], Awaitable[object]]
"""(method, params) -> result that JSON can say. Errors of ours become error answers with their hint."""

_log = logging.getLogger(__name__)


def control_path() -> Path:
    """Where the daemon of this machine listens."""
    return runtime_root() / "control.sock"


class ControlServer:
    """The daemon's end."""

    def __init__(self, path: Path, handler: Handler) -> None:
        self.path = path
        self._handler = handler
        self._server: asyncio.Server | None = None
        self._clients: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}
        self._subscribers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        """Listen. Raises LocalError when another daemon answers at the path, or the path cannot be used."""
        try:
            self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            _remove_stale(self.path)
            sock = _listening_socket(self.path)
            self._server = await asyncio.start_unix_server(self._accept, sock=sock, limit=MAX_REQUEST_BYTES)
        except OSError as problem:
            raise LocalError(
                f"cannot listen at {self.path}: {problem.strerror or problem}",
                hint="P2PVPN_RUNTIME_DIR names another place, of less than 90 characters",
                fault=Fault.NOT_ALLOWED if isinstance(problem, PermissionError) else Fault.MACHINE,
            ) from problem

    async def close(self) -> None:
        """End every connection and remove the socket."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        for writer, task in list(self._clients.items()):
            writer.transport.abort()
            task.cancel()
        await asyncio.gather(*self._clients.values(), return_exceptions=True)
        self.path.unlink(missing_ok=True)

    def publish(self, event: dict[str, Any]) -> None:
        """Tell every subscriber; never waits."""
        if not self._subscribers:
            return
        line = _line({"event": event})
        for writer in list(self._subscribers):
            self._send(writer, line)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients[writer] = task
        try:
            if not _may_connect(writer):
                self._send(writer, _error(None, "only root and the daemon's user may do this", "try again with sudo"))
            elif len(self._clients) > MAX_CLIENTS:
                self._send(writer, _error(None, "too many control connections", "close some"))
            else:
                await self._serve(reader, writer)
            with suppress(OSError):
                await writer.drain()
        except asyncio.CancelledError:
            pass  # close() ends us, and the streams of asyncio log a cancelled client as an error
        finally:
            self._subscribers.discard(writer)
            self._clients.pop(writer, None)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks: set[asyncio.Task[None]] = set()
        try:
            while True:
                try:
                    line = await reader.readuntil(b"\n")
                except (asyncio.IncompleteReadError, OSError):
                    return
                except asyncio.LimitOverrunError:
                    self._send(writer, _error(None, f"a request has {MAX_REQUEST_BYTES} bytes at most", ""))
                    return
                try:
                    number, method, params = _request_untrusted(line)
                except RemoteError as refusal:
                    self._send(writer, _error(None, str(refusal), ""))
                    continue
                if len(tasks) >= MAX_OUTSTANDING:
                    self._send(writer, _error(number, "too many requests at once", "wait for an answer"))
                    continue
                task = asyncio.create_task(self._answer(writer, number, method, params))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, writer: asyncio.StreamWriter, number: object, method: str, params: dict[str, Any]) -> None:
        try:
            if method == SUBSCRIBE:
                self._send(writer, _line({"id": number, "result": None}))
                self._subscribers.add(writer)
                return
            answer = _line({"id": number, "result": await self._handler(method, params)})
        except P2pvpnError as refusal:
            answer = _error(number, str(refusal), refusal.hint, refusal.fault)
        except Exception as bug:  # noqa: BLE001 (one bad request must not end the daemon; the log has it all)
            _log.exception("control method %r failed", method)
            answer = _error(number, f"internal error: {type(bug).__name__}", "the daemon's log says more", Fault.BUG)
        self._send(writer, answer)

    def _send(self, writer: asyncio.StreamWriter, line: bytes) -> None:
        if writer.is_closing():
            return
        writer.write(line)
        backlog = writer.transport.get_write_buffer_size()
        if backlog > MAX_BACKLOG_BYTES + (0 if writer in self._subscribers else MAX_ANSWER_BYTES):
            _log.warning("a control client does not read: %d bytes wait, it is cut off", backlog)
            self._subscribers.discard(writer)
            writer.transport.abort()


class ControlClient:
    """The command line's end. `async with await ControlClient.connect(path) as client: ...`"""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._next_id = 1
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(MAX_CLIENT_EVENTS)
        self._gone: LocalError | None = None
        self._task = asyncio.create_task(self._read())

    @classmethod
    async def connect(cls, path: Path) -> ControlClient:
        """Raises LocalError when no daemon listens there, or we may not talk to it."""
        try:
            reader, writer = await asyncio.open_unix_connection(str(path), limit=MAX_ANSWER_BYTES)
        except PermissionError:
            raise LocalError(
                f"may not talk to the daemon at {path}", hint="try again with sudo", fault=Fault.NOT_ALLOWED
            ) from None
        except OSError:
            raise LocalError(
                "p2pvpn is not up on this machine", hint="start it with: p2pvpn up", fault=Fault.NOT_RUNNING
            ) from None
        return cls(reader, writer)

    async def call(self, method: str, **params: Any) -> Any:
        """The method's result. Raises LocalError with what the daemon said."""
        if self._gone is not None:
            raise self._gone
        number, self._next_id = self._next_id, self._next_id + 1
        line = _line({"id": number, "method": method, "params": params})
        if len(line) > MAX_REQUEST_BYTES:
            raise LocalError(f"a request of {len(line)} bytes is too long for the daemon")
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            self._writer.write(line)
            with suppress(OSError):
                await self._writer.drain()
            return await answer
        finally:
            self._waiting.pop(number, None)

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """What the daemon publishes from now on. Raises LocalError when the daemon ends."""
        await self.call(SUBSCRIBE)
        while (event := await self._events.get()) is not None:
            yield event
        assert self._gone is not None
        raise self._gone

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()

    async def __aenter__(self) -> ControlClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _read(self) -> None:
        reason = "the p2pvpn daemon ended the connection"
        try:
            while True:
                message = json.loads(await self._reader.readuntil(b"\n"))
                if "event" in message:
                    self._keep(message["event"])
                elif message.get("id") is None:
                    reason = message["error"]["message"]
                elif (answer := self._waiting.get(message["id"])) is not None and not answer.done():
                    if "error" in message:
                        answer.set_exception(_told(message["error"]))
                    else:
                        answer.set_result(message["result"])
        except (asyncio.IncompleteReadError, OSError):
            pass
        except (asyncio.LimitOverrunError, ValueError, KeyError, TypeError, AttributeError):
            reason = "the p2pvpn daemon answered something that this command does not understand"
        finally:
            hint = "is it of another version, or going down? p2pvpn restart; its log says more"
            self._gone = LocalError(reason, hint=hint, fault=Fault.NOT_RUNNING)
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(self._gone)
            self._keep(None)

    def _keep(self, event: dict[str, Any] | None) -> None:
        if self._events.full():
            self._events.get_nowait()
        self._events.put_nowait(event)


def _request_untrusted(line: bytes) -> tuple[object, str, dict[str, Any]]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        raise RemoteError("not a line of JSON") from None
    if not isinstance(message, dict):
        raise RemoteError("a request is an object")
    number, method, params = message.get("id"), message.get("method"), message.get("params", {})
    if not isinstance(number, int | str) or not isinstance(method, str) or not isinstance(params, dict):
        raise RemoteError("a request has an id, a method and an object of params")
    return number, method, params


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def _error(number: object, message: str, hint: str, fault: Fault = Fault.FAILED) -> bytes:
    return _line({"id": number, "error": {"message": message, "hint": hint, "fault": fault}})


def _told(error: dict[str, Any]) -> LocalError:
    """What a daemon, perhaps of another version, said of a failure."""
    number = error.get("fault")
    fault = Fault(number) if number in list(Fault) else Fault.FAILED
    return LocalError(str(error["message"]), hint=str(error["hint"]), fault=fault)


def _may_connect(writer: asyncio.StreamWriter) -> bool:
    sock = writer.get_extra_info("socket")
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return uid in (0, os.geteuid())


def _listening_socket(path: Path) -> socket.socket:
    """Bound with mode 0660 from the first moment on."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    umask = os.umask(0o117)
    try:
        sock.bind(str(path))
    except OSError:
        sock.close()
        raise
    finally:
        os.umask(umask)
    return sock


def _remove_stale(path: Path) -> None:
    """Remove the socket of a daemon that is gone; LocalError if one answers."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise LocalError(f"{path} is not a socket", hint="move it away", fault=Fault.MACHINE)
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
    raise LocalError(
        f"a p2pvpn daemon answers at {path} already", hint="p2pvpn status, or p2pvpn down", fault=Fault.MACHINE
    )
