"""HTTP/1.1 of the ASGI server, through a real tunnel, on Trio and on asyncio: what requests and answers may be."""

from __future__ import annotations

import threading
from typing import Any, Final

import anyio
import pytest
import trio
from asgi_rig import (
    FACES,
    Browser,
    Face,
    echo,
    head,
    in_thread,
    no_lifespan,
    read_body,
    respond,
    serving,
    until,
)
from rig import HOST, eventually, read_all

from pioneer_tunnel.asgi.interface import Receive, Scope, Send

MIB: Final = 1024 * 1024

pytestmark = pytest.mark.parametrize("face", FACES)


async def test_the_scope_tells_the_request_and_the_visitor(face: Face) -> None:
    scopes: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        scopes.append(scope)
        await respond(send)

    async with serving(app, face) as served, await served.visit() as stream:
        browser = Browser(stream)
        await browser.ask("GET", "/a%20b/%C3%A9?x=%20&y", "X-Twice: 1", "x-twice: 2")
        await browser.ask("OPTIONS", "*")
        await browser.ask("GET", "http://elsewhere.test/path?query")
        await browser.ask("GET", "HTTPS://elsewhere.test")
        client = list(stream.socket.getsockname())
    first = scopes[0]
    assert first["type"] == "http"
    assert first["http_version"] == "1.1"
    assert first["method"] == "GET"
    assert first["path"] == "/a b/é"
    assert first["raw_path"] == b"/a%20b/%C3%A9"
    assert first["query_string"] == b"x=%20&y"
    assert first["headers"] == [(b"host", HOST.encode()), (b"x-twice", b"1"), (b"x-twice", b"2")]
    assert first["client"] == client
    assert first["server"][0] == "127.0.0.1"
    assert first["scheme"] == "http"
    assert [(scope["path"], scope["query_string"]) for scope in scopes[1:]] == [
        ("*", b""),
        ("/path", b"query"),
        ("/", b""),
    ]


async def test_one_connection_carries_many_requests_also_when_they_come_at_once(face: Face) -> None:
    async with serving(echo, face) as served, await served.visit() as stream:
        browser = Browser(stream)
        for body in (b"one", b"two"):
            assert (await browser.ask("POST", "/", f"Content-Length: {len(body)}", body=body)).body == body
        requests = [head("POST", "/", "Content-Length: 1") + str(n).encode() for n in range(9)]
        await stream.send_all(b"".join(requests))
        assert [(await browser.answer()).body for _ in range(9)] == [str(n).encode() for n in range(9)]


@pytest.mark.parametrize(
    "request_head",
    [
        head("GET", "/", "Connection: close"),
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    ],
    ids=["close", "1.0", "1.0 keep-alive"],
)
async def test_a_connection_that_is_not_kept_alive_ends_with_eof(face: Face, request_head: bytes) -> None:
    async with serving(echo, face) as served, await served.visit() as stream:
        await stream.send_all(request_head)
        answer = await read_all(stream)
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"connection: close\r\n" in answer.lower()


async def test_bodies_are_chunked_both_ways(face: Face) -> None:
    """Also when each byte comes on its own."""
    messages: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        more = True
        while more:
            messages.append(await receive())
            more = messages[-1]["more_body"]
            await send({"type": "http.response.body", "body": messages[-1]["body"], "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    sent = head("POST", "/", "Transfer-Encoding: chunked") + b"5\r\nhello\r\n6;ext=1\r\n there\r\n0\r\nX-Sum: 1\r\n\r\n"
    async with serving(app, face) as served, await served.visit() as stream:
        await stream.send_all(sent)
        browser = Browser(stream)
        answer = await browser.answer()
        assert (answer.body, answer.headers[b"transfer-encoding"]) == (b"hello there", b"chunked")
        for byte in sent:
            await stream.send_all(bytes([byte]))
        assert (await browser.answer()).body == b"hello there"


async def test_a_large_body_passes_both_ways(face: Face) -> None:
    body = bytes(range(256)) * 4096 * 8
    async with serving(echo, face) as served, await served.visit() as stream, trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, head("POST", "/", f"Content-Length: {len(body)}") + body)
        assert (await Browser(stream).answer()).body == body


async def test_continue_is_said_when_the_application_asks_for_the_body(face: Face) -> None:
    asks = threading.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        await until(asks)
        await respond(send, await read_body(receive))

    async with serving(app, face) as served, await served.visit() as stream:
        await stream.send_all(head("POST", "/", "Expect: 100-continue", "Content-Length: 2"))
        asks.set()
        assert await stream.receive_some(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        await stream.send_all(b"ok")
        assert (await Browser(stream).answer()).body == b"ok"


async def test_continue_is_not_said_by_an_application_that_does_not_want_the_body(face: Face) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        await respond(send, status=413)

    async with serving(app, face) as served, await served.visit() as stream:
        await stream.send_all(head("POST", "/", "Expect: 100-continue", "Content-Length: 2"))
        answer = await read_all(stream)  # whether the body follows is not known, so the connection ends
        assert answer.startswith(b"HTTP/1.1 413 ")


async def test_an_answer_before_the_end_of_the_body_arrives(face: Face) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        await respond(send, b"too much", status=413)

    async with serving(app, face) as served, await served.visit() as stream, trio.open_nursery() as nursery:
        nursery.start_soon(_send_until_broken, stream, head("POST", "/", f"Content-Length: {10**9}"))
        answer = await Browser(stream).answer()
        assert (answer.status, answer.body) == (413, b"too much")
        nursery.cancel_scope.cancel()


async def _send_until_broken(stream: trio.SocketStream, first: bytes) -> None:
    try:
        await stream.send_all(first)
        while True:
            await stream.send_all(bytes(64 * 1024))
    except trio.BrokenResourceError:
        pass


async def test_trailers_are_sent_to_those_who_take_them(face: Face) -> None:
    offered: list[bool] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        offered.append("http.response.trailers" in scope["extensions"])
        await send({"type": "http.response.start", "status": 200, "headers": [], "trailers": offered[-1]})
        await send({"type": "http.response.body", "body": b"body"})
        if offered[-1]:
            await send({"type": "http.response.trailers", "headers": [(b"x-a", b"1")], "more_trailers": True})
            await send({"type": "http.response.trailers", "headers": [(b"x-b", b"2")]})

    async with serving(app, face) as served, await served.visit() as stream:
        browser = Browser(stream)
        answer = await browser.ask("GET", "/", "TE: deflate, Trailers")
        assert (answer.body, answer.trailers) == (b"body", {b"x-a": b"1", b"x-b": b"2"})
        assert (await browser.ask()).trailers == {}
    assert offered == [True, False]


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
async def test_where_an_answer_has_no_body_none_is_sent(face: Face, method: str, status: int) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        headers = [(b"content-length", b"4")] if scope["path"] == "/length" and status != 204 else []
        await respond(send, b"body" if scope["path"] != "/after" else b"", status, headers)

    async with serving(app, face) as served, await served.visit() as stream:
        browser = Browser(stream)
        for target in ("/", "/length", "/after"):
            answer = await browser.ask(method, target)
            assert (answer.status, answer.body) == (status, b"")


async def test_an_application_hears_that_the_visitor_has_gone(face: Face) -> None:
    heard: list[Any] = []
    over = threading.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        heard.append((await receive())["type"])
        heard.append((await receive())["type"])
        heard.append((await receive())["type"])
        await send({"type": "http.response.start", "status": 200})
        try:
            while True:
                await send({"type": "http.response.body", "body": bytes(100_000), "more_body": True})
        except OSError:
            heard.append("OSError")
        over.set()

    async with serving(app, face) as served:
        stream = await served.visit()
        await stream.send_all(head("GET", "/"))
        await eventually(lambda: len(heard) == 1)
        stream.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")
        await stream.aclose()
        await in_thread(over)
    assert heard == ["http.request", "http.disconnect", "http.disconnect", "OSError"]


async def test_a_visitor_that_has_sent_eof_gets_its_answer(face: Face) -> None:
    heard: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        await read_body(receive)
        heard.append((await receive())["type"])
        await respond(send, b"for you")

    async with serving(app, face) as served, await served.visit() as stream:
        await stream.send_all(head("GET", "/"))
        await stream.send_eof()
        assert b"for you" in await read_all(stream)
    assert heard == ["http.disconnect"]


async def test_receive_ends_when_the_answer_is_complete(face: Face) -> None:
    """In another task of the application as well as after the answer."""
    heard: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        await read_body(receive)

        async def listen() -> None:
            heard.append((await receive())["type"])

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listen)
            tasks.start_soon(listen)
            await anyio.sleep(0.01)
            await respond(send, b"done")
        await listen()

    async with serving(app, face) as served, await served.visit() as stream:
        browser = Browser(stream)
        for _ in range(2):
            assert (await browser.ask()).body == b"done"
        await eventually(lambda: len(heard) == 6)
    assert set(heard) == {"http.disconnect"}


async def test_a_body_that_is_cut_off_is_a_disconnect(face: Face) -> None:
    heard: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        while not heard or heard[-1] != "http.disconnect":
            heard.append((await receive())["type"])
        await respond(send, status=400)

    async with serving(app, face) as served, await served.visit() as stream:
        await stream.send_all(head("POST", "/", "Content-Length: 9") + b"part")
        await stream.send_eof()
        await read_all(stream)
    assert heard == ["http.request", "http.disconnect"]


async def test_requests_that_come_early_are_kept_up_to_a_limit(face: Face) -> None:
    """While an application waits to hear that the visitor has gone, the visitor sends one request after the other."""
    go = threading.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        await read_body(receive)

        async def listen() -> None:
            await receive()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listen)
            await until(go)
            await respond(send, b".")
            tasks.cancel_scope.cancel()

    count = 10_000
    async with serving(app, face) as served, await served.visit() as stream, trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, head("GET", "/") * count)
        go.set()
        browser = Browser(stream)
        for _ in range(count // 100):
            assert (await browser.answer()).body == b"."
        nursery.cancel_scope.cancel()


async def test_a_visitor_sends_no_faster_than_the_application_reads(face: Face) -> None:
    asked, go, done = threading.Event(), threading.Event(), threading.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        asked.set()
        await until(go)
        await respond(send, str(len(await read_body(receive))).encode())

    async with serving(app, face) as served, await served.visit() as stream, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def upload() -> None:
            await stream.send_all(head("POST", "/", f"Content-Length: {32 * MIB}"))
            for _ in range(32):
                await stream.send_all(bytes(MIB))
            done.set()

        await in_thread(asked)
        with trio.move_on_after(0.3):  # the longer, the surer; it holds at any length
            await in_thread(done)
        assert not done.is_set()
        go.set()
        assert (await Browser(stream).answer()).body == str(32 * MIB).encode()


async def test_an_application_sends_no_faster_than_the_visitor_reads(face: Face) -> None:
    sent: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        await send({"type": "http.response.start", "status": 200})
        for n in range(32):
            await send({"type": "http.response.body", "body": bytes(MIB), "more_body": n < 31})
            sent.append(n)

    async with serving(app, face) as served, await served.visit() as stream:
        await stream.send_all(head("GET", "/"))
        await trio.sleep(0.3)  # as above
        assert len(sent) < 32
        assert len((await Browser(stream).answer()).body) == 32 * MIB


async def test_a_head_that_comes_too_slowly_gets_408(face: Face) -> None:
    async with serving(echo, face, head_timeout=0.05) as served, await served.visit() as stream:
        await stream.send_all(b"GET / HT")
        assert (await read_all(stream)).startswith(b"HTTP/1.1 408 ")


async def test_an_idle_connection_ends_with_eof(face: Face) -> None:
    async with serving(echo, face, keep_alive_timeout=1.0) as served, await served.visit() as stream:
        await stream.send_all(head("GET", "/"))
        assert (await read_all(stream)).startswith(b"HTTP/1.1 200 ")
