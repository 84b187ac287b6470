"""Every example runs, for real: processes, sockets, a relay."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Final, NoReturn, final

import pytest
import trio
from example_programs import Program, running as run_program
from rig import HOST, KEY, connect, free_port, in_background, no_hang, read_all, read_exactly, relay_rig, tunnel_entry
from trio_websocket import (
    ConnectionClosed,
    ConnectionRejected,
    WebSocketConnection,
    wrap_client_stream,
    wrap_server_stream,
)

from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel._model.keys import new_relay_key
from pioneer_tunnel._wire.proxy_v2 import ProxyHeader
from pioneer_tunnel.relay import RelayAddresses
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.forward import forward

pytestmark = pytest.mark.slow

EXAMPLES: Final = Path(__file__).parent.parent / "examples"
ENVIRONMENT: Final = os.environ | {"PYTHONUNBUFFERED": "1"}


def command(example: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, str(EXAMPLES / example), *map(str, arguments)]


def running(example: str, *arguments: str | Path) -> AbstractAsyncContextManager[Program]:
    return run_program(EXAMPLES / example, *arguments)


@asynccontextmanager
async def relay() -> AsyncIterator[RelayAddresses]:
    """A relay that gateways find by its address, with a tunnel whose visitors have a port of their own."""
    control = f"127.0.0.1:{free_port()}"
    entry = tunnel_entry(bind_addr="127.0.0.1:0")
    async with relay_rig(control_addr=control, public_names=[control], tunnels=[entry]) as rig:
        yield rig.addresses


def test_every_example_is_run_here() -> None:
    here = Path(__file__).read_text()
    assert all(f'"{example.name}"' in here for example in EXAMPLES.glob("*.py"))


async def test_the_custom_server_says_back_what_visitors_say(tmp_path: Path) -> None:
    key_file = tmp_path / "relay-key.txt"
    key_file.write_text(f"{KEY.reveal()}\n")
    async with relay() as addresses:
        async with running("custom_server.py", f"ws://{addresses.control}", key_file) as server:
            assert await server.says("visitors come in at ") == "http://office.test"
            async with await connect(addresses.tunnels["office"]) as visitor:
                await visitor.send_all(b"is anybody there?")
                assert await read_exactly(visitor, 17) == b"is anybody there?"
                await visitor.send_eof()
                assert await read_all(visitor) == b""
                await server.says(f"a visitor from {Address(*visitor.socket.getsockname())}")
        assert KEY.reveal() not in server.said


async def test_the_custom_server_says_in_a_line_why_it_cannot_serve(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(new_relay_key().reveal())
    async with relay() as addresses:
        with no_hang():
            done = await trio.run_process(
                command("custom_server.py", f"ws://{addresses.control}", tmp_path / "key"),
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
    assert done.returncode == 1
    assert done.stderr.decode().count("\n") == 1
    assert b"key" in done.stderr


SECRET: Final = KEY.reveal()
WRONG_ARGUMENTS: Final = [
    ["custom_server.py", "relay", "nofile"],
    ["custom_server.py", "ws://127.0.0.1:9", SECRET],
    ["custom_server.py", "ws://127.0.0.1:9", "empty"],
    ["custom_server.py", "ws://127.0.0.1:9", "binary"],
    ["custom_server.py", "ws://127.0.0.1:9", "."],
    ["custom_server.py", SECRET, "token"],
    ["custom_server.py"],
    ["embedded_gateway.py", "/nonexistent"],
    ["embedded_gateway.py", "."],
    ["embedded_gateway.py", ".", "x"],
    ["embedded_gateway.py", ".", "65536"],
    ["embedded_gateway.py", SECRET],
    ["embedded_gateway.py", ".", SECRET],
    ["embedded_gateway.py"],
    ["gateway_with_settings/settings_gateway.py", "."],
    ["gateway_with_settings/settings_gateway.py", SECRET],
    ["small_gateway.py", SECRET],
    ["small_gateway.py", "65536"],
    ["remote_access_client.py", "--token-file", "nofile", "ws://127.0.0.1:9", "status"],
    ["remote_access_client.py", "--token-file", SECRET, "ws://127.0.0.1:9", "status"],
    ["remote_access_client.py", "--token-file", "binary", "ws://127.0.0.1:9", "status"],
    ["remote_access_client.py", "--token-file", "token", SECRET, "status"],
    ["remote_access_client.py", "--token-file", "token", "ws://127.0.0.1:9x", "status"],
    ["remote_access_client.py", "--token-file", "token", f"ws://{SECRET}@127.0.0.1:9", "status"],
    ["remote_access_client.py", "--token-file", "token", "ws://127.0.0.1:9", "status"],
    ["remote_access_client.py", "--token-file", "token", "ws://127.0.0.1:9", "key", SECRET],
    ["remote_access_client.py", "--token-file", "token", "ws://127.0.0.1:9", SECRET],
    ["remote_access_client.py", "--token-file", "token", "ws://127.0.0.1:9", "status", "x", SECRET],
]


@pytest.mark.parametrize("arguments", WRONG_ARGUMENTS, ids=" ".join)
async def test_wrong_arguments_are_explained_in_a_line_without_a_key(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a token")
    (tmp_path / "empty").write_text("")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    with no_hang():
        done = await trio.run_process(
            command(*arguments), capture_stdout=True, capture_stderr=True, check=False, cwd=tmp_path
        )
    said = done.stderr.decode()
    assert done.returncode in {1, 2}
    assert said.startswith("usage: ") or said.count("\n") == 1, said
    assert "Traceback" not in said
    assert SECRET not in said + done.stdout.decode()


async def test_the_small_gateway_asks_for_its_token() -> None:
    header = ProxyHeader(visitor=Address("192.0.2.1", 4711), local=Address("192.0.2.2", 443)).encode()
    port = free_port()
    async with running("small_gateway.py", str(port)) as gateway:
        token = await gateway.says("the token is ")
        for authorization, status in (("", b"401"), (f"Authorization: Bearer {token}\r\n", b"200")):
            async with await listening(port) as visitor:
                request = f"GET /hello HTTP/1.1\r\nHost: gateway.test\r\n{authorization}\r\n"
                await visitor.send_all(header + request.encode())
                assert (await read_all(visitor)).split()[1] == status
        await gateway.says("192.0.2.1:4711 asks for /hello")


BAD_REQUESTS: Final = {
    "no HTTP": (b"\0\1\2\r\n\r\n", b""),
    "two tokens": (b"GET / HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {}\r\nAuthorization: x\r\n\r\n", b"401"),
    "the same token twice": (
        b"GET / HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {}\r\nauthorization: Bearer {}\r\n\r\n",
        b"401",
    ),
    "half a WebSocket": (
        b"GET /echo HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {}\r\nUpgrade: websocket\r\n\r\n",
        b"400",
    ),
    **{
        f"a download of {size!r}": (
            b"GET /download?n=%b HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {}\r\n\r\n" % size,
            b"400",
        )
        for size in (b"x", b"-1", b"", b"1_0", b"9" * 5000, b"9999999999")
    },
}


async def test_no_request_ends_the_small_gateway() -> None:
    header = ProxyHeader(visitor=Address("192.0.2.1", 4711), local=Address("192.0.2.2", 443)).encode()
    port = free_port()
    async with running("small_gateway.py", str(port)) as gateway:
        token = (await gateway.says("the token is ")).encode()
        for asked, status in BAD_REQUESTS.values():
            async with await listening(port) as visitor:
                await visitor.send_all(header + asked.replace(b"{}", token))
                answer = await read_all(visitor)
                assert answer.split()[1:2] == ([status] if status else []), asked
        async with await listening(port) as visitor:
            asked = b"GET /download?n=70000 HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer %b\r\n\r\n" % token
            await visitor.send_all(header + asked)
            assert len((await read_all(visitor)).partition(b"\r\n\r\n")[2]) == 70_000
        assert gateway.process.returncode is None


async def test_a_visitor_cannot_forge_where_it_comes_from() -> None:
    """Neither by X-Forwarded-For nor by a PROXY header of its own, through a tunnel that passes anything."""
    forged = ProxyHeader(visitor=Address("127.0.0.1", 1), local=Address("127.0.0.1", 2)).encode()
    claims = "X-Forwarded-For: 127.0.0.1\r\nX-Real-IP: 127.0.0.1\r\nForwarded: for=127.0.0.1;proto=https\r\n"
    asked = f"GET /hello HTTP/1.1\r\nHost: {HOST}\r\n{claims}\r\n".encode()
    port = free_port()

    async def to_the_gateway(stream: TunnelStream) -> None:
        await forward(stream, Address("127.0.0.1", port), proxy_protocol="v2")

    async with (
        running("small_gateway.py", str(port)) as gateway,
        relay_rig(tunnels=[tunnel_entry(bind_addr="127.0.0.1:0")]) as rig,
        rig.tunnel() as tunnel,
        await listening(port),
        in_background(lambda: trio.serve_listeners(to_the_gateway, [tunnel])),
    ):
        await tunnel.wait_connected()
        for prefix, says in (
            (b"", "{} asks for /hello"),
            (forged, "a connection came to nothing: RemoteProtocolError"),
        ):
            async with await connect(rig.addresses.tunnels["office"]) as visitor:
                await visitor.send_all(prefix + asked)
                assert not (await read_all(visitor)).startswith(b"HTTP/1.1 200")
                await gateway.says(says.format(Address(*visitor.socket.getsockname())))
    assert "127.0.0.1:1 " not in gateway.said


async def listening(port: int) -> trio.SocketStream:
    """Connect as soon as somebody listens."""
    with no_hang():
        while True:
            try:
                return await connect(Address("127.0.0.1", port))
            except OSError:
                await trio.sleep(0.02)


async def test_the_tests_of_a_gateway_pass_without_our_settings_of_pytest(tmp_path: Path) -> None:
    profile = "settings.register_profile('few', max_examples=8)\nsettings.load_profile('few')\n"
    (tmp_path / "few_examples.py").write_text(f"from hypothesis import settings\n{profile}")
    example = str(EXAMPLES / "test_my_gateway.py")
    with no_hang():
        done = await trio.run_process(
            [sys.executable, "-m", "pytest", "-c", os.devnull, "-p", "no:cacheprovider", "-p", "few_examples", example],
            capture_stdout=True,
            stderr=subprocess.STDOUT,
            check=False,
            env=ENVIRONMENT | {"PYTHONPATH": str(tmp_path)},
            cwd=tmp_path,
        )
    assert "3 passed" in done.stdout.decode(), done.stdout.decode()


@final
class Client:
    """examples/remote_access_client.py at one of the gateway's addresses."""

    def __init__(self, folder: Path, url: str) -> None:
        self._arguments = ["--token-file", str(folder / "token"), url]
        self.said = ""

    async def __call__(self, *arguments: str | Path, stdin: str = "", fails: bool = False) -> str:
        with no_hang():
            done = await trio.run_process(
                command("remote_access_client.py", *self._arguments, *arguments),
                capture_stdout=True,
                stderr=subprocess.STDOUT,
                stdin=stdin.encode(),
                check=False,
            )
        said = done.stdout.decode()
        self.said += said
        assert (done.returncode != 0) == fails, said
        return said


async def test_the_remote_access_client_says_in_a_line_that_nobody_listens(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a token")
    said = await Client(tmp_path, f"ws://127.0.0.1:{free_port()}")("status", fails=True)
    assert said.startswith("no gateway answers at ws://127.0.0.1:")
    assert said.count("\n") == 1


@asynccontextmanager
async def json_rpc(port: int, *headers: tuple[bytes, bytes]) -> AsyncIterator[WebSocketConnection]:
    async with (
        await connect(Address("127.0.0.1", port)) as stream,
        trio.open_nursery() as nursery,
    ):
        yield await wrap_client_stream(nursery, stream, "127.0.0.1", "/", extra_headers=[*headers])
        nursery.cancel_scope.cancel()


def no_constant(name: str) -> NoReturn:
    raise AssertionError(f"{name} is no JSON")


NO_JSON: Final[list[str | bytes]] = [
    "[" * 60_000,
    '{"a":' * 10_000,
    "nonsense",
    b"{}",
    '{"jsonrpc":"2.0","id":NaN,"method":"settings/get"}',
    '{"jsonrpc":"2.0","id":-Infinity,"method":"settings/get"}',
    '{"jsonrpc":"2.0","id":1,"id":2,"method":"settings/get"}',
    '{"jsonrpc":"2.0","id":1,"method":"settings/get","params":{"a":1,"a":1}}',
    f'{{"jsonrpc":"2.0","id":{"9" * 5000},"method":"settings/get"}}',
]
NO_REQUEST: Final[list[str | bytes]] = [
    "[]",
    "3",
    '{"id":1,"method":"settings/get"}',
    '{"jsonrpc":"2.0","id":1}',
    '{"jsonrpc":"2.0","id":1,"method":[]}',
    *(f'{{"jsonrpc":"2.0","id":{number},"method":"settings/get"}}' for number in ("1e999", "1.5", "true", "[1]", "{}")),
]


async def test_no_message_of_a_client_ends_the_embedded_gateway(tmp_path: Path) -> None:
    (tmp_path / "gateway.toml").write_text("[gateway.remote_access]\n")
    async with running("embedded_gateway.py", tmp_path) as gateway:
        port = int((await gateway.says("listening at ")).rpartition(":")[2])
        token = (b"Authorization", f"Bearer {await gateway.says('the bearer token ')}".encode())
        with no_hang():
            for headers in ([], [token, token], [token, (b"authorization", b"Bearer x")]):
                with pytest.raises(ExceptionGroup) as refused:
                    async with json_rpc(port, *headers):
                        pytest.fail("it was let in")
                assert refused.group_contains(ConnectionRejected)
            async with json_rpc(port, token) as quiet, json_rpc(port, token) as client:
                for message, code in [*((text, -32700) for text in NO_JSON), *((text, -32600) for text in NO_REQUEST)]:
                    await client.send_message(message)
                    answer = json.loads(await client.get_message(), parse_constant=no_constant)
                    assert (answer["id"], answer["error"]["code"]) == (None, code), message[:100]
                for number in ("1", '"one"', "null"):
                    await client.send_message(f'{{"jsonrpc":"2.0","id":{number},"method":"settings/get"}}')
                    answer = json.loads(await client.get_message())
                    assert answer["id"] == json.loads(number)
                    assert "result" in answer
                await quiet.send_message('{"jsonrpc":"2.0","id":7,"method":"settings/get"}')
                assert json.loads(await quiet.get_message())["id"] == 7


@pytest.mark.parametrize("said", ["[" * 60_000, "[]", "{}", '{"id":1,"result":[]}', '{"id":1,"error":3}', b"{"])
async def test_the_remote_access_client_says_in_a_line_that_it_does_not_understand(
    tmp_path: Path, said: str | bytes
) -> None:
    (tmp_path / "token").write_text("a token")

    async def answer(stream: trio.SocketStream) -> None:
        async with stream, trio.open_nursery() as nursery:
            websocket = await (await wrap_server_stream(nursery, stream)).accept()
            await websocket.get_message()
            await websocket.send_message(said)
            with suppress(ConnectionClosed):
                await websocket.get_message()
            nursery.cancel_scope.cancel()

    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    url = f"ws://127.0.0.1:{listener.socket.getsockname()[1]}"
    async with in_background(lambda: trio.serve_listeners(answer, [listener])):
        told = await Client(tmp_path, url)("status", fails=True)
    assert told.startswith("the gateway says what is not understood")
    assert told.count("\n") == 1


@pytest.mark.parametrize("forwarded", [False, True], ids=["in process", "forwarded"])
async def test_the_embedded_gateway_is_switched_from_near_and_far(tmp_path: Path, forwarded: bool) -> None:
    """Also through the tunnel that is switched off by it, or whose key is changed: the reply arrives."""
    wrong_key = new_relay_key()
    (tmp_path / "wrong-key").write_text(wrong_key.reveal())
    async with relay() as addresses:
        (tmp_path / "gateway.toml").write_text(
            "\n".join(
                [
                    "[gateway.remote_access]",
                    f'relay_addr = "ws://{addresses.control}"',
                    f'local_addr = "127.0.0.1:{free_port()}"',
                    "apply_grace_ms = 500",
                    'proxy_protocol = "v2"' if forwarded else "",
                ]
            )
        )
        async with running("embedded_gateway.py", tmp_path) as gateway:
            near = Client(tmp_path, await gateway.says("listening at "))
            token = await gateway.says("the bearer token ")
            far = Client(tmp_path, f"ws://{addresses.tunnels['office']}")

            assert "enabled: False, key: False" in await near("status")
            await gateway.says("a client from this host")
            assert "enabled: True, key: False" in await near("on")
            assert "missing_key" in await near("watch", "failed")
            assert "refuses" in await near("key", stdin=" \n", fails=True)
            assert "enabled: True, key: True" in await near("key", stdin=f"{KEY.reveal()}\n")
            assert "connected: http://office.test" in await near("watch", "connected")

            assert "connected: http://office.test" in await far("status")
            await gateway.says("forwarded by the tunnel" if forwarded else "through the tunnel")

            assert "enabled: True, key: True" in await far("key", tmp_path / "wrong-key")
            assert "tunnel_auth_failed" in await near("watch", "failed")
            await near("key", stdin=KEY.reveal())
            assert "connected" in await near("watch", "connected")

            assert "enabled: False, key: True" in await far("off")
            assert "disabled" in await near("watch", "disabled")
            assert "key: False" in await near("forget-key")

            (tmp_path / "token").write_text("a wrong one")
            assert "is the token right?" in await near("status", fails=True)
    (tmp_path / "wrong-key").unlink()
    shown = [gateway.said, near.said, far.said]
    shown += [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(key.reveal() in text for key in (KEY, wrong_key) for text in shown)
    assert token not in near.said + far.said
