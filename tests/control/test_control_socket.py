"""The control socket: who may serve it and speak to it, what a killed process leaves, and what a bad client may do."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, NoReturn

import pytest
import trio
from rig import HANG

from pioneer_tunnel import RpcError, StorageError
from pioneer_tunnel._control import AlreadyServedError, connect, credentials, hold, serve_control, server
from pioneer_tunnel._control.folder import SOCKET_NAME
from pioneer_tunnel._control.lines import LONGEST_LINE

NOBODY: Final = 65534
as_root: Final = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can be somebody else")


async def handle(method: str, params: Any) -> dict[str, Any]:
    match method:
        case "refuse":
            raise RpcError(-32602, "this is refused")
        case "break":
            raise KeyError("an unforeseen thing")
        case "files":
            raise StorageError("a file is gone")
    return {"method": method, "params": params}


@asynccontextmanager
async def serving(folder: Path, **options: Any) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        with hold(folder):

            async def serve(*, task_status: trio.TaskStatus[None]) -> NoReturn:
                await serve_control(folder, handle, task_status=task_status, **options)

            await nursery.start(serve)
            yield
            nursery.cancel_scope.cancel()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runtime"


async def test_a_method_is_called_and_the_socket_goes_with_its_server(folder: Path) -> None:
    async with serving(folder), connect(folder) as client:
        assert client is not None
        assert await client.call("one", {"a": 1}) == {"method": "one", "params": {"a": 1}}
        assert await client.call("two") == {"method": "two", "params": {}}
        assert stat.S_IMODE((folder / SOCKET_NAME).stat().st_mode) == 0o600
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not (folder / SOCKET_NAME).exists()
    async with connect(folder) as client:
        assert client is None


async def test_errors_are_told_and_do_not_end_the_connection(folder: Path) -> None:
    async with serving(folder), connect(folder) as client:
        assert client is not None
        for method, code, text in (
            ("refuse", -32602, "this is refused"),
            ("break", -32603, "an unforeseen failure, see the log: KeyError"),
            ("files", -32603, "a file is gone"),
        ):
            with pytest.raises(RpcError, match=text) as raised:
                await client.call(method)
            assert raised.value.code == code
        assert await client.call("more")


async def test_nobody_serves(folder: Path) -> None:
    async with connect(folder) as client:
        assert client is None  # no folder
    folder.mkdir(0o700)
    async with connect(folder) as client:
        assert client is None  # no socket


async def test_a_long_path_has_a_socket_too(folder: Path) -> None:
    deep = folder.parent.joinpath(*["a-folder-with-a-long-name"] * 8)
    deep.parent.mkdir(parents=True)
    async with serving(deep), connect(deep) as client:
        assert client is not None
        assert await client.call("m")


async def test_two_at_once_are_refused(folder: Path) -> None:
    async with serving(folder):
        with pytest.raises(AlreadyServedError, match="another process already runs"), hold(folder):
            pass
        async with connect(folder) as client:  # the first one goes on
            assert client is not None
            assert await client.call("m")
    with hold(folder):
        pass


SERVER: Final = """
import sys, trio
from pathlib import Path
from pioneer_tunnel._control import hold, serve_control
async def handle(method, params): return {"from": "child"}
async def main():
    with hold(Path(sys.argv[1])):
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_control, Path(sys.argv[1]), handle)
            print("ready", flush=True)
trio.run(main)
"""


async def test_what_a_killed_process_leaves_is_replaced(folder: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", SERVER, folder], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        with pytest.raises(AlreadyServedError), hold(folder):
            pass
        async with connect(folder) as client:
            assert client is not None
            assert await client.call("m") == {"from": "child"}
            child.send_signal(signal.SIGKILL)
            child.wait(HANG)
            with pytest.raises(StorageError, match="has ended"):
                await client.call("m")
    assert (folder / SOCKET_NAME).exists()
    async with connect(folder) as client:
        assert client is None
    async with serving(folder), connect(folder) as client:
        assert client is not None
        assert await client.call("m")


async def test_a_folder_that_others_may_enter_is_refused(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(StorageError, match="chmod 700"), hold(folder):
        pass
    with pytest.raises(StorageError, match="chmod 700"):
        async with connect(folder):
            pass


CONNECT: Final = """
import os, socket
os.setuid(65534)
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect("control.sock")
    print(connection.makefile().readline())
"""


@as_root
async def test_another_user_is_refused_by_his_credentials(folder: Path) -> None:
    async with serving(folder):
        folder.chmod(0o711)  # even where the folder and the mode do not keep others out
        (folder / SOCKET_NAME).chmod(0o666)
        answer = await trio.run_process([sys.executable, "-S", "-c", CONNECT], cwd=folder, capture_stdout=True)
        folder.chmod(0o700)
    assert json.loads(answer.stdout)["error"]["message"] == f"it is of user {NOBODY}, and this process is of user 0"


LISTEN: Final = """
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind("control.sock")
os.setuid(65534)
listener.listen()
print("ready", flush=True)
connection, _ = listener.accept()
print(connection.recv(100), flush=True)
"""


@as_root
async def test_nothing_is_sent_to_a_server_of_another_user(folder: Path) -> None:
    folder.mkdir(0o700)
    with subprocess.Popen([sys.executable, "-S", "-c", LISTEN], cwd=folder, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        with pytest.raises(StorageError, match=f"is of user 0, and user {NOBODY} serves it; nothing was sent"):
            async with connect(folder):
                pass
        assert child.stdout.read() == b"b''\n"


@asynccontextmanager
async def raw(folder: Path) -> AsyncIterator[trio.SocketStream]:
    async with await trio.open_unix_socket(f"{folder}/{SOCKET_NAME}") as stream:
        yield stream


async def answers(stream: trio.SocketStream, sent: bytes) -> list[Any]:
    await stream.send_all(sent)
    with trio.move_on_after(HANG):
        await stream.send_eof()
        received = b"".join([data async for data in stream])
    return [json.loads(line) for line in received.splitlines()]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"hello", -32700),
        (b'{"jsonrpc": "2.0", "method": "m", "id": 1, "id": 2}', -32700),
        (b'{"jsonrpc": "2.0", "method": "m", "params": NaN, "id": 1}', -32700),
        (b"\xff", -32700),
        (b"[" * 100_000, -32700),
        (b"[]", -32600),
        (b'{"method": "m", "id": 1}', -32600),
        (b'{"jsonrpc": "2.0", "method": 1, "id": 1}', -32600),
        (b'{"jsonrpc": "2.0", "method": "m", "id": true}', -32600),
    ],
)
async def test_what_is_no_request_gets_an_error_and_the_next_one_an_answer(
    folder: Path, line: bytes, code: int
) -> None:
    async with serving(folder), raw(folder) as stream:
        refused, answered = await answers(stream, line + b'\n{"jsonrpc": "2.0", "method": "m", "id": 7}\n')
    assert refused["error"]["code"] == code
    assert answered == {"jsonrpc": "2.0", "id": 7, "result": {"method": "m", "params": None}}


async def test_a_notification_from_a_client_gets_no_answer(folder: Path) -> None:
    async with serving(folder), raw(folder) as stream:
        sent = b'{"jsonrpc": "2.0", "method": "m"}\n{"jsonrpc": "2.0", "method": "refuse"}\n'
        assert await answers(stream, sent) == []


async def test_a_line_without_end_is_refused(folder: Path) -> None:
    async with serving(folder), raw(folder) as stream:
        (refused,) = await answers(stream, b"x" * (LONGEST_LINE + 70_000))
    assert refused["error"]["message"] == f"a line of more than {LONGEST_LINE} bytes"


async def test_clients_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MOST_CLIENTS", 1)
    async with serving(folder):
        async with connect(folder) as first:
            assert first is not None
            assert await first.call("m")
            async with raw(folder) as second:
                (refused,) = await answers(second, b"")
                assert refused["error"]["message"] == "there are 1 already"
            assert await first.call("m")
        await until_answered(folder)  # the server may not yet have seen the first one leave


async def until_answered(folder: Path) -> None:
    with trio.fail_after(HANG):
        while True:
            async with connect(folder) as client:
                assert client is not None
                with suppress(RpcError):
                    assert await client.call("m")
                    return


async def test_notifications_come_between_answers(folder: Path) -> None:
    sent, notifications = trio.open_memory_channel[dict[str, Any]](10)
    async with serving(folder, notify=lambda: notifications), connect(folder) as client:
        assert client is not None
        await sent.send({"method": "changed", "params": {"n": 1}})
        await sent.send({"method": "changed", "params": {"n": 2}})
        assert await client.call("m")
        assert [(await client.notification())["params"]["n"] for _ in range(2)] == [1, 2]
        sent.close()


async def test_a_client_that_takes_nothing_is_dropped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SEND_TIMEOUT", 0.1)
    request = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "m", "params": "x" * 200_000}).encode() + b"\n"
    async with serving(folder):
        async with raw(folder) as greedy:
            with pytest.raises(trio.BrokenResourceError):
                await greedy.send_all(request * 1000)
        async with connect(folder) as client:
            assert client is not None
            assert await client.call("m")


async def test_without_unix_sockets_the_error_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "AF_UNIX")
    with pytest.raises(StorageError, match="Python has none on this system"):
        async with connect(folder):
            pass
    with pytest.raises(StorageError, match="Python has none on this system"):
        await serve_control(folder, handle)


async def test_the_kernel_says_who_connects() -> None:
    left, right = trio.socket.socketpair()
    with left, right:
        assert credentials.user_of_peer(left) == os.geteuid()
