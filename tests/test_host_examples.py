"""The examples for frameworks run with the frameworks themselves, are visited through a tunnel, and are interrupted."""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from example_programs import GREETING, ROOT, relay, running
from rig import KEY, RelayRig, connect, eventually, free_port, no_hang, read_all
from trio_websocket import WebSocketConnection, wrap_client_stream

pytestmark = pytest.mark.slow

EXAMPLES: Final = ROOT / "examples" / "hosts"


def test_every_example_is_run_here() -> None:
    here = Path(__file__).read_text()
    assert all(f'"{example.name}"' in here for example in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(example: Path) -> None:
    code = [line for line in example.read_text().partition("from __future__")[2].splitlines()[1:] if line.strip()]
    assert 10 <= len(code) <= 40


async def greet(rig: RelayRig) -> tuple[dict[str, Any], str]:
    """What a visitor is told, and the visitor's address."""
    with no_hang():
        async with await connect(rig.addresses.tunnels["office"]) as visitor:
            await visitor.send_all(GREETING)
            answer = await read_all(visitor)
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 "), answer
            return json.loads(body[body.index(b"{") : body.rindex(b"}") + 1]), visitor.socket.getsockname()[0]


@asynccontextmanager
async def websocket(rig: RelayRig, path: str) -> AsyncIterator[WebSocketConnection]:
    with no_hang():
        async with await connect(rig.addresses.tunnels["office"]) as stream, trio.open_nursery() as nursery:
            yield await wrap_client_stream(nursery, stream, "office.test", path)
            nursery.cancel_scope.cancel()


async def direct(rig: RelayRig) -> None:
    """An application that serves the tunnel itself is told the visitor's address."""
    said, address = await greet(rig)
    assert said == {"hello": address}


async def forwarded(rig: RelayRig) -> None:
    said, _ = await greet(rig)
    assert said == {"hello": "visitor"}


async def chat(rig: RelayRig) -> None:
    async with websocket(rig, "/chat") as one, websocket(rig, "/chat") as other:
        await one.send_message("hello")
        assert [await member.get_message() for member in (one, other)] == ["hello", "hello"]


async def mcp(rig: RelayRig) -> None:
    """The client of the SDK, in its own async library's Trio backend, finds the tool and calls it."""
    params = {"name": "add", "arguments": {"a": 2, "b": 3}}
    info = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    session = ""
    for method, parameters in (("initialize", info), ("notifications/initialized", {}), ("tools/call", params)):
        request: dict[str, Any] = {"jsonrpc": "2.0", "method": method, "params": parameters}
        if not method.startswith("notifications/"):
            request["id"] = 1
        head, body = await post(rig, "/mcp", json.dumps(request), session)
        session = next((line for line in head.splitlines() if line.lower().startswith("mcp-session-id:")), session)
    assert '"text":"5"' in body.replace(" ", ""), body


async def post(rig: RelayRig, path: str, body: str, *headers: str) -> tuple[str, str]:
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: office.test",
        "Connection: close",
        "Content-Type: application/json",
        "Accept: application/json, text/event-stream",
        f"Content-Length: {len(body)}",
        *(header for header in headers if header),
    ]
    with no_hang():
        async with await connect(rig.addresses.tunnels["office"]) as visitor:
            await visitor.send_all("\r\n".join([*lines, "", body]).encode())
            head, _, answer = (await read_all(visitor)).decode().partition("\r\n\r\n")
            assert head.split()[1][0] == "2", head + answer
            return head, answer


@pytest.mark.parametrize(
    ("example", "visit"),
    [
        ("aiohttp_app.py", forwarded),
        ("django_app.py", direct),
        ("fastapi_lifespan.py", direct),
        ("fastapi_without_port.py", direct),
        ("flask_app.py", forwarded),
        ("mcp_server.py", mcp),
        ("quart_trio_app.py", direct),
        ("starlette_websocket.py", chat),
    ],
)
async def test_an_example_serves_visitors_and_ends_when_it_is_interrupted(
    example: str, visit: Callable[[RelayRig], Awaitable[None]], tmp_path: Path
) -> None:
    async with relay(tmp_path) as (url, rig):
        last: dict[str, list[str | Path]] = {
            "aiohttp_app.py": [tmp_path / "app.sock"],
            "fastapi_lifespan.py": [str(free_port())],
            "flask_app.py": [str(free_port())],
        }
        arguments = [EXAMPLES / example, url, tmp_path / "relay-key.txt", *last.get(example, [])]
        async with running(*arguments) as program:
            assert await program.says("visitors come in at ") == "http://office.test"
            if visit is forwarded:  # its server may not listen yet
                await eventually(functools.partial(is_reached, rig))
            await visit(rig)
            assert await program.interrupt() in (0, -2, 130)
    assert "Traceback" not in program.said, program.said
    assert KEY.reveal() not in program.said


async def is_reached(rig: RelayRig) -> bool:
    try:
        await greet(rig)
    except (trio.BrokenResourceError, AssertionError):
        return False
    return True


async def test_the_gateway_is_switched_by_json_rpc_near_and_far(tmp_path: Path) -> None:
    """examples/hosts/json_rpc_websocket.py"""
    example = "json_rpc_websocket.py"
    port = free_port()
    async with relay(tmp_path) as (url, rig):
        config = tmp_path / "gateway.toml"
        config.write_text(f'[gateway.remote_access]\nrelay_addr = "{url}"\n')
        async with running(EXAMPLES / example, config, str(port)) as program:
            near = functools.partial(json_rpc, port)
            update = {"update": {"remote_access": {"enabled": True, "key": KEY.reveal()}}}
            answer = await near("settings/update", update)
            assert answer["result"]["settings"]["remote_access"]["enabled"] is True
            assert "error" in await near("nonsense", {})

            async def connected() -> bool:
                status = (await near("settings/get", {}))["result"]["settings"]["remote_access"]["status"]
                return bool(status["state"] == "connected")

            await eventually(connected)
            async with websocket(rig, "/") as far:
                await far.send_message(json.dumps({"jsonrpc": "2.0", "id": 7, "method": "settings/get"}))
                assert json.loads(await far.get_message())["id"] == 7
            assert await program.interrupt() in (0, -2, 130)
    assert "Traceback" not in program.said, program.said
    assert KEY.reveal() not in program.said


async def json_rpc(port: int, method: str, params: dict[str, Any]) -> dict[str, Any]:
    with no_hang():
        while True:
            try:
                stream = await trio.open_tcp_stream("127.0.0.1", port)
                break
            except OSError:
                await trio.sleep(0.02)
        async with stream, trio.open_nursery() as nursery:
            client = await wrap_client_stream(nursery, stream, "127.0.0.1", "/")
            await client.send_message(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}))
            answer: dict[str, Any] = json.loads(await client.get_message())
            nursery.cancel_scope.cancel()
            return answer
