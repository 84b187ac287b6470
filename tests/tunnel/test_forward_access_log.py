"""`forward` with an access log: it finds the requests in what it passes on, and changes nothing."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from hypothesis import given, strategies as st
from rig import (
    HOST,
    RelayRig,
    connect,
    eventually,
    no_hang,
    nothing_left_behind,
    read_all,
    relay_rig,
    request,
    tunnel_entry,
)

from pioneer_tunnel import Access, AccessLog, AccessLogFormat, forward
from pioneer_tunnel.access_log import watching, writer
from pioneer_tunnel.access_log.following import VisitorLog
from pioneer_tunnel.access_log.watching import Watch
from pioneer_tunnel.tunnel.accepting import accept_visitors

OK: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
SWITCHED: Final = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"


@pytest.fixture(autouse=True)
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "BATCH_DELAY", 0.0)


async def answer(stream: trio.SocketStream) -> None:
    """A local server for HTTP, and for a protocol in which the visitor says `ping`."""
    async with stream:
        async for data in stream:
            upgraded = SWITCHED + b"frames"
            await stream.send_all(b"pong" if data == b"ping" else upgraded if b"websocket" in data else OK)


@asynccontextmanager
async def forwarding(path: Path, **options: Any) -> AsyncIterator[RelayRig]:
    """A tunnel whose relay reads nothing: the gateway logs."""
    log = AccessLog(path, AccessLogFormat.JSON)
    entry = tunnel_entry(bind_addr="127.0.0.1:0")
    with no_hang(), nothing_left_behind():
        async with (
            relay_rig(tunnels=[entry]) as rig,
            log.kept(),
            rig.tunnel() as tunnel,
            trio.open_nursery() as nursery,
        ):
            (listener,) = await nursery.start(functools.partial(trio.serve_tcp, answer, 0, host="127.0.0.1"))
            options = {"local": f"127.0.0.1:{listener.socket.getsockname()[1]}"} | options
            await tunnel.wait_connected()
            handler = functools.partial(forward, access_log=log, **options)
            nursery.start_soon(accept_visitors, tunnel, handler, nursery)
            yield rig
            nursery.cancel_scope.cancel()


async def exchange(rig: RelayRig, *sent: bytes) -> bytes:
    """Say one after another, with an answer to each; returns all answers."""
    received = b""
    async with await connect(rig.addresses.tunnels["office"]) as visitor:
        for each in sent:
            await visitor.send_all(each)
            received += await visitor.receive_some()
        await visitor.send_eof()
        return received + await read_all(visitor)


async def logged(path: Path, count: int) -> list[dict[str, Any]]:
    await eventually(lambda: len(path.read_text().splitlines()) >= count)
    lines = path.read_text().splitlines()
    assert len(lines) == count
    return [json.loads(line) for line in lines]


def asks(path: str, *lines: str) -> bytes:
    return request(*lines).replace(b"GET /", f"GET {path}".encode(), 1)


WAYS: Final = [{}, {"forwarded_headers": "set"}, {"access": Access(allow=["127.0.0.0/8"], bearer_tokens=None)}]


@pytest.mark.parametrize("options", WAYS, ids=["unread", "rewritten", "admitted"])
async def test_each_request_has_a_line(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "access.log"
    async with forwarding(path, **options) as rig:
        assert await exchange(rig, asks("/a?s3cret"), asks("/b", "Cookie: s3cret")) == 2 * OK
        lines = await logged(path, 2)
    shown = [(line["method"], line["path"], line["status"], line["sent_bytes"], line["host"]) for line in lines]
    assert shown == [("GET", "/a", 200, 2, HOST), ("GET", "/b", 200, 2, HOST)]
    assert {line["address"] for line in lines} == {"127.0.0.1"}
    assert all(line["complete"] for line in lines)
    assert "s3cret" not in path.read_text()


async def test_a_line_has_the_request_id_that_the_server_got(tmp_path: Path) -> None:
    got: list[bytes] = []

    async def server(stream: trio.SocketStream) -> None:
        async with stream:
            async for data in stream:
                got.append(bytes(data))
                await stream.send_all(OK)

    path = tmp_path / "access.log"
    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(functools.partial(trio.serve_tcp, server, 0, host="127.0.0.1"))
        local = f"127.0.0.1:{listener.socket.getsockname()[1]}"
        async with forwarding(path, local=local, request_id="keep") as rig:
            await exchange(rig, asks("/a", "X-Request-ID: of-a-proxy"), asks("/b"), asks("/c", "X-Request-ID: a b"))
            lines = await logged(path, 3)
        nursery.cancel_scope.cancel()
    ids = [line["request_id"] for line in lines]
    assert ids[0] == "of-a-proxy"
    assert len({*ids}) == 3
    assert [f"X-Request-ID: {id_}".encode() in head for id_, head in zip(ids, got, strict=True)] == [True] * 3


async def test_another_protocol_has_a_line_for_its_stream(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    async with forwarding(path) as rig:
        assert await exchange(rig, b"ping", b"ping") == b"pongpong"
        (line,) = await logged(path, 1)
    assert (line["received_bytes"], line["sent_bytes"], line["complete"]) == (8, 8, True)
    assert "method" not in line


async def test_a_websocket_has_one_line(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    async with forwarding(path) as rig:
        await exchange(rig, asks("/ws", "Upgrade: websocket", "Connection: Upgrade"), b"ping")
        (line,) = await logged(path, 1)
    assert (line["path"], line["status"], line["sent_bytes"]) == ("/ws", 101, len(b"framespong"))


async def test_what_the_gateway_refuses_has_a_line(tmp_path: Path) -> None:
    path, tokens = tmp_path / "access.log", tmp_path / "tokens"
    tokens.write_text("0123456789abcdef0123456789abcdef\n")
    tokens.chmod(0o600)
    async with forwarding(path, access=Access(bearer_tokens=tokens)) as rig:
        assert b"401" in await exchange(rig, asks("/secret"))
        (line,) = await logged(path, 1)
    assert (line["path"], line["status"], line["complete"]) == ("/secret", 401, True)


async def test_a_local_server_that_does_not_answer(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    async with forwarding(path, local="127.0.0.1:1") as rig:
        with pytest.raises((trio.BrokenResourceError, OSError)):
            await exchange(rig, asks("/"))
        (line,) = await logged(path, 1)
    assert not line["complete"]


class Lines:
    """Stands in for the file."""

    shortened = False

    def __init__(self) -> None:
        self.entries: list[Any] = []

    def write(self, entry: Any) -> None:
        self.entries.append(entry)


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(places)]


BODY: Final = b"POST /up HTTP/1.1\r\nHost: office.test\r\nContent-Length: 4\r\n\r\nGET "
CHUNKED: Final = b"HTTP/1.1 404 Not Found\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"


@given(cuts=st.lists(st.integers(0, 1000), max_size=12), answer_cuts=st.lists(st.integers(0, 1000), max_size=12))
def test_the_pieces_do_not_matter(cuts: list[int], answer_cuts: list[int]) -> None:
    async def main() -> None:
        lines = Lines()
        watch = Watch(VisitorLog(lines, None))  # type: ignore[arg-type]  # it has what is used
        for piece in pieces_of(request() + BODY + request(), cuts):
            watch.from_visitor(piece)
        for piece in pieces_of(OK + CHUNKED + OK, answer_cuts):
            watch.to_visitor(piece)
        watch.end(in_order=True)
        seen = [(entry.method, entry.path, entry.status, entry.sent_bytes, entry.complete) for entry in lines.entries]
        assert seen == [
            (b"GET", b"/", 200, 2, True),
            (b"POST", b"/up", 404, 13, True),
            (b"GET", b"/", 200, 2, True),
        ]

    trio.run(main)


@given(st.lists(st.tuples(st.booleans(), st.binary(max_size=60) | st.sampled_from([request(), OK, BODY])), max_size=12))
def test_whatever_passes_it_never_fails(said: list[tuple[bool, bytes]]) -> None:
    async def main() -> None:
        lines = Lines()
        watch = Watch(VisitorLog(lines, None))  # type: ignore[arg-type]  # as above
        for by_visitor, data in said:
            (watch.from_visitor if by_visitor else watch.to_visitor)(data)
        watch.end(in_order=True)
        assert lines.entries
        for entry in lines.entries:
            assert entry.line(AccessLogFormat.COMMON).isprintable()

    trio.run(main)


async def test_it_keeps_little_while_it_waits_for_the_answer_to_an_upgrade() -> None:
    lines = Lines()
    watch = Watch(VisitorLog(lines, None))  # type: ignore[arg-type]  # as above
    watch.from_visitor(asks("/ws", "Upgrade: websocket", "Connection: Upgrade"))
    for _ in range(100):
        watch.from_visitor(b"x" * 16 * 1024)
    assert len(watch._held) <= watching.MOST_HELD + 16 * 1024
    watch.to_visitor(SWITCHED)
    watch.end(in_order=True)
    assert len(lines.entries) == 1


async def test_it_keeps_little_of_requests_that_get_no_answer() -> None:
    lines = Lines()
    watch = Watch(VisitorLog(lines, None))  # type: ignore[arg-type]  # as above
    assert watch.read_size <= 64 * 1024, "a call is short, however small the requests are"
    many = request() * 200
    for _ in range(50):
        watch.from_visitor(many)
    watch.to_visitor(OK)
    watch.end(in_order=True)
    assert watching.MOST_OUTSTANDING <= len(lines.entries) <= watching.MOST_OUTSTANDING + 200
