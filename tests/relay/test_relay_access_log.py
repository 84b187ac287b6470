"""The access log of a relay: a line for each request of a visitor, and for each stream that is not followed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from rig import HOST, RelayRig, ask, connect, eventually, no_hang, read_all, relay_rig, request, tunnel_entry

from pioneer_tunnel.access_log import writer
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.accepting import accept_visitors

HEAD: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
CHUNKED: Final = b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNKS: Final = b"5\r\nhello\r\n0\r\n\r\n"
SWITCHED: Final = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"


@pytest.fixture(autouse=True)
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "BATCH_DELAY", 0.0)


async def serve(stream: TunnelStream) -> None:
    """Answer by the path; `/cut` breaks off in the body, and `/away` before the answer."""
    async with stream:
        while data := await stream.receive_some():
            path = bytes(data).split(b" ")[1].partition(b"?")[0] if b" HTTP/1.1" in data else b"raw"
            if path == b"/cut":
                await stream.send_all(HEAD + b"he")
                await stream.wait_flushed()
                stream.reset()
                return
            if path == b"/away":
                stream.reset()
                return
            answers = {b"/chunked": CHUNKED + CHUNKS, b"/ws": SWITCHED + b"frames", b"raw": b"pong"}
            body = b"" if data.startswith(b"HEAD") else b"hello"
            await stream.send_all(answers.get(path, HEAD + body))


def asks(path: str, *lines: str, method: str = "GET") -> bytes:
    return request(*lines).replace(b"GET /", f"{method} {path}".encode(), 1)


async def logged(rig_log: Path, count: int) -> list[dict[str, Any]]:
    def lines() -> list[str]:
        return rig_log.read_text().splitlines() if rig_log.exists() else []

    await eventually(lambda: len(lines()) >= count)
    assert len(lines()) == count
    return [json.loads(line) for line in lines()]


@asynccontextmanager
async def serving(path: Path, **changes: Any) -> AsyncIterator[RelayRig]:
    """A relay with an access log in JSON, and its gateway."""
    offered = {"services": {"ssh": "127.0.0.1:1"}} if "tunnels" in changes else {}
    async with (
        relay_rig(access_log=str(path), access_log_format="json", **changes) as rig,
        rig.tunnel(**offered) as tunnel,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(accept_visitors, tunnel, serve, nursery)
        with no_hang():
            await tunnel.wait_connected()
            yield rig
        nursery.cancel_scope.cancel()


async def visit(rig: RelayRig, *asked: bytes) -> bytes:
    """Ask one after another on one connection."""
    answer = b""
    async with await rig.visit() as visitor:
        for each in asked:
            await visitor.send_all(each)
            answer = bytes(await visitor.receive_some())
        await visitor.send_eof()
        while await visitor.receive_some():
            pass
    return answer


async def test_each_request_of_a_connection_has_a_line(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    async with serving(path) as rig:
        first = asks("/a?token=s3cret", "X-Request-ID: 17", "Cookie: s3cret")
        await visit(rig, first, asks("/b", method="HEAD"), asks("/chunked", method="POST"))
        lines = await logged(path, 3)
    assert [(line["method"], line["path"], line["status"], line["sent_bytes"]) for line in lines] == [
        ("GET", "/a", 200, 5),
        ("HEAD", "/b", 200, 0),
        ("POST", "/chunked", 201, len(CHUNKS)),
    ]
    assert {(line["tunnel"], line["service"], line["host"], line["address"]) for line in lines} == {
        ("office", "", HOST, "127.0.0.1")
    }
    assert [line.get("request_id") for line in lines] == ["17", None, None]
    assert all(line["complete"] for line in lines)
    assert "s3cret" not in path.read_text()


async def test_requests_that_the_relay_answers_and_those_that_break_off(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    async with relay_rig(access_log=str(path), access_log_format="json") as rig:
        with no_hang():
            async with await rig.visit() as visitor:
                await ask(visitor, request(host="nobody.test"))
            await logged(path, 1)
            async with await rig.visit() as visitor:
                await ask(visitor, asks("/early"))
            await logged(path, 2)
            async with await rig.visit() as visitor:
                await ask(visitor, b"nonsense\r\n\r\n")
            await logged(path, 3)
            async with rig.tunnel() as tunnel, trio.open_nursery() as nursery:
                nursery.start_soon(accept_visitors, tunnel, serve, nursery)
                await tunnel.wait_connected()
                async with await rig.visit() as visitor:
                    await ask(visitor, asks("/away"))
                await logged(path, 4)
                async with await rig.visit() as visitor:
                    await visitor.send_all(asks("/cut"))
                    with pytest.raises(trio.BrokenResourceError):
                        await read_all(visitor)
                lines = await logged(path, 5)
                nursery.cancel_scope.cancel()
    shown = [(line.get("path"), line["status"], line["sent_bytes"], line["complete"]) for line in lines]
    assert shown == [
        ("/", 404, 0, True),
        ("/early", 503, 0, True),
        (None, 400, 0, True),
        ("/away", 502, 0, True),
        ("/cut", 200, 2, False),
    ]


async def test_a_websocket_has_one_line_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    async with serving(path) as rig:
        async with await rig.visit() as visitor:
            await visitor.send_all(asks("/ws", "Connection: Upgrade", "Upgrade: websocket"))
            received = b""
            while not received.endswith(b"frames"):
                received += await visitor.receive_some()
            assert not path.read_text()
            await visitor.send_eof()
            await visitor.receive_some()
        (line,) = await logged(path, 1)
    assert (line["path"], line["status"], line["sent_bytes"], line["complete"]) == ("/ws", 101, 6, True)


async def test_a_stream_that_is_not_followed_has_a_line(tmp_path: Path) -> None:
    services = [{"name": "web", "url": f"http://{HOST}"}, {"name": "ssh", "bind_addr": "127.0.0.1:0"}]
    path = tmp_path / "access.log"
    entry = tunnel_entry(url=None, services=services)
    async with serving(path, tunnels=[entry], access_log_addresses="short") as rig:
        async with await connect(rig.addresses.tunnels["office"]) as ssh:
            await ssh.send_all(b"ping!")
            assert await ssh.receive_some() == b"pong"
            await ssh.send_eof()
            assert await ssh.receive_some() == b""
        (line,) = await logged(path, 1)
        counted = rig.relay.stats().tunnels["office"].services["ssh"]
    assert (line["service"], line["received_bytes"], line["sent_bytes"], line["address"]) == ("ssh", 5, 4, "127.0.0.0")
    assert "method" not in line
    assert (counted.from_visitors_bytes_total, counted.to_visitors_bytes_total) == (5, 4)


async def test_after_a_rename_the_relay_goes_on_in_a_new_file(tmp_path: Path) -> None:
    path, old = tmp_path / "access.log", tmp_path / "access.log.1"
    async with relay_rig(access_log=str(path)) as rig:
        with no_hang():
            async with await rig.visit() as visitor:
                await ask(visitor, asks("/before"))
            await eventually(lambda: "/before" in path.read_text())
            path.rename(old)
            rig.relay.reopen_access_log()
            await eventually(path.exists)
            async with await rig.visit() as visitor:
                await ask(visitor, asks("/after"))
            await eventually(lambda: "/after" in path.read_text())
    assert "/after" not in old.read_text()
