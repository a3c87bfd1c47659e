"""The control socket: calls, events, and clients that misbehave."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pvpn.core.errors import LocalError, RemoteError
from p2pvpn.host import control
from p2pvpn.host.control import ControlClient, ControlServer


async def handler(method, params):
    match method:
        case "add":
            return params["a"] + params["b"]
        case "refuse":
            raise LocalError("not like this", hint="like that")
        case "wait":
            await asyncio.Event().wait()
        case "large":
            return "x" * params["size"]
    raise RuntimeError(f"no method {method}")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "control.sock"


def with_server(path, story):
    """Run a coroutine function with a server that listens."""

    async def main():
        server = ControlServer(path, handler)
        await server.start()
        try:
            async with asyncio.timeout(20):
                return await story(server)
        finally:
            await server.close()

    return asyncio.run(main())


def test_calls_are_answered_side_by_side(path):
    async def story(server):
        async with await ControlClient.connect(path) as client:
            slow = asyncio.create_task(client.call("wait"))
            sums = await asyncio.gather(*(client.call("add", a=n, b=1) for n in range(10)))
            slow.cancel()
            return sums

    assert with_server(path, story) == list(range(1, 11))


def test_a_refusal_carries_message_and_hint(path):
    async def story(server):
        async with await ControlClient.connect(path) as client:
            with pytest.raises(LocalError, match="not like this") as refusal:
                await client.call("refuse")
            return refusal.value.hint

    assert with_server(path, story) == "like that"


def test_a_bug_in_the_daemon_is_an_answer_and_a_log_line(path, caplog):
    async def story(server):
        async with await ControlClient.connect(path) as client:
            with pytest.raises(LocalError, match="internal error: RuntimeError"):
                await client.call("nothing of the kind")
            return await client.call("add", a=1, b=1)

    assert with_server(path, story) == 2
    assert "nothing of the kind" in caplog.text


def test_a_large_answer_passes_and_a_large_request_is_refused_before_it_leaves(path):
    async def story(server):
        async with await ControlClient.connect(path) as client:
            assert len(await client.call("large", size=1_000_000)) == 1_000_000
            with pytest.raises(LocalError, match="too long"):
                await client.call("add", a="x" * 70_000)

    with_server(path, story)


async def subscribed(server, count):
    while len(server._subscribers) < count:  # noqa: ASYNC110 (the server has no event for this)
        await asyncio.sleep(0)


def test_events_reach_every_subscriber_and_nobody_else(path):
    async def story(server):
        async with await ControlClient.connect(path) as one, await ControlClient.connect(path) as two:
            await two.call("add", a=1, b=1)
            events = one.events()
            first = asyncio.create_task(anext(events))
            await subscribed(server, 1)
            server.publish({"kind": "peer-up", "peer": "desktop"})
            server.publish({"kind": "peer-down"})
            got = [await first, await anext(events)]
            assert two._events.empty()
            await server.close()
            with pytest.raises(LocalError, match="ended the connection"):
                await anext(events)
            with pytest.raises(LocalError):
                await two.call("add", a=1, b=1)
            return got

    assert with_server(path, story) == [{"kind": "peer-up", "peer": "desktop"}, {"kind": "peer-down"}]


async def lines_of(path, *sent: bytes):
    reader, writer = await asyncio.open_unix_connection(str(path))
    answers = []
    for line in sent:
        writer.write(line)
        answers.append(json.loads(await reader.readline()))
    return answers, reader, writer


BAD = [
    b"\n",
    b"{\n",
    b"[]\n",
    b'"x"\n',
    b"\xff\xfe\n",
    b"[" * 60_000 + b"\n",
    b'{"id":1}\n',
    b'{"id":[],"method":"add"}\n',
]
BAD += [b'{"id":1,"method":"add","params":[]}\n', b'{"id":1,"method":7}\n', b"1e999\n"]


def test_bad_lines_are_answered_with_errors_and_the_connection_lives(path):
    async def story(server):
        answers, _, writer = await lines_of(path, *BAD, b'{"id":"s","method":"add","params":{"a":2,"b":3}}\n')
        writer.close()
        return answers

    *errors, last = with_server(path, story)
    assert all(answer["id"] is None and answer["error"]["message"] for answer in errors)
    assert last == {"id": "s", "result": 5}


@settings(deadline=None)
@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["id", "method", "params"]), inner),
    ).map(lambda value: json.dumps(value).encode())
)
def test_only_remote_errors_escape_the_request_parser(line):
    try:
        _, method, params = control._request_untrusted(line)
    except RemoteError:
        return
    assert isinstance(method, str)
    assert isinstance(params, dict)


def test_a_line_without_end_ends_the_connection_and_not_the_server(path):
    async def story(server):
        answers, reader, writer = await lines_of(path, b"x" * (control.MAX_REQUEST_BYTES * 3))
        assert "bytes at most" in answers[0]["error"]["message"]
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await reader.readexactly(1)
        writer.close()
        async with await ControlClient.connect(path) as client:
            return await client.call("add", a=1, b=1)

    assert with_server(path, story) == 2


def test_too_many_requests_at_once_are_refused(path):
    async def story(server):
        async with await ControlClient.connect(path) as client:
            waiting = [asyncio.create_task(client.call("wait")) for _ in range(control.MAX_OUTSTANDING)]
            await asyncio.sleep(0)
            with pytest.raises(LocalError, match="too many requests"):
                await client.call("add", a=1, b=1)
            for task in waiting:
                task.cancel()

    with_server(path, story)


def test_too_many_clients_are_refused_with_a_word(path):
    async def story(server):
        clients = [await ControlClient.connect(path) for _ in range(control.MAX_CLIENTS)]
        for client in clients:
            await client.call("add", a=1, b=1)
        async with await ControlClient.connect(path) as one_more:
            with pytest.raises(LocalError, match="too many control connections"):
                await one_more.call("add", a=1, b=1)
        await clients.pop().close()
        for client in clients:
            await client.close()

    with_server(path, story)


def test_a_subscriber_that_does_not_read_is_cut_off_and_the_others_are_served(path):
    async def story(server):
        _, reader, writer = await lines_of(path, b'{"id":1,"method":"subscribe"}\n')
        reader._transport.pause_reading()
        async with await ControlClient.connect(path) as client:
            events = client.events()
            first = asyncio.create_task(anext(events))
            await subscribed(server, 2)
            published = 0
            while len(server._subscribers) == 2:
                server.publish({"filler": "x" * 10_000})
                published += 1
                await asyncio.sleep(0)
            await first
            writer.close()
            return published * 10_000

    assert with_server(path, story) < control.MAX_BACKLOG_BYTES * 3


def test_requests_of_a_client_that_leaves_are_cancelled(path):
    ended = asyncio.Event()

    async def slow(method, params):
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def main():
        server = ControlServer(path, slow)
        await server.start()
        _, writer = await asyncio.open_unix_connection(str(path))
        writer.write(b'{"id":1,"method":"join"}\n')
        await writer.drain()
        writer.close()
        async with asyncio.timeout(10):
            await ended.wait()
        await server.close()

    asyncio.run(main())


def test_the_socket_is_for_owner_and_group(path):
    async def story(server):
        return stat.S_IMODE(path.stat().st_mode)

    assert with_server(path, story) == 0o660
    assert not path.exists()


@pytest.mark.netns
def test_another_user_is_turned_away():
    directory = tempfile.TemporaryDirectory(prefix="p2pvpn-test-")
    path = Path(directory.name) / "control.sock"
    path.parent.chmod(0o711)

    async def story(server):
        path.chmod(0o666)
        code = (
            "import os, socket, sys\nos.setgid(65534); os.setuid(65534)\n"
            "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
            "print(s.recv(1000).decode())"
        )
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, path, stdout=subprocess.PIPE)
        out, _ = await process.communicate()
        return json.loads(out)

    with directory:
        assert "only root" in with_server(path, story)["error"]["message"]


def test_without_a_daemon_the_error_says_how_to_start_one(path):
    async def main():
        with pytest.raises(LocalError, match="not up") as refusal:
            await ControlClient.connect(path)
        return refusal.value.hint

    assert asyncio.run(main()) == "start it with: p2pvpn up"


def test_the_socket_of_a_dead_daemon_is_replaced_and_that_of_a_living_one_is_not(path):
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    async def story(server):
        with pytest.raises(LocalError, match="already"):
            await ControlServer(path, handler).start()
        async with await ControlClient.connect(path) as client:
            return await client.call("add", a=os.getpid(), b=0)

    assert with_server(path, story) == os.getpid()


def test_a_file_that_is_no_socket_is_left_alone(path):
    path.parent.mkdir()
    path.write_text("precious")

    async def main():
        with pytest.raises(LocalError, match="not a socket"):
            await ControlServer(path, handler).start()

    asyncio.run(main())
    assert path.read_text() == "precious"
