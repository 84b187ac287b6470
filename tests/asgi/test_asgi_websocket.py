"""WebSockets of the ASGI server, through a real tunnel, on Trio and on asyncio."""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final, final

import pytest
import trio
from asgi_rig import FACES, Answer, Browser, Face, Served, head, in_thread, no_lifespan, respond, serving, until
from rig import read_all
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, Pong, TextMessage
from wsproto.frame_protocol import CloseReason

from pioneer_tunnel.asgi.interface import Receive, Scope, Send

MIB: Final = 1024 * 1024
KEY: Final = "dGhlIHNhbXBsZSBub25jZQ=="
OPENING: Final = (
    "Connection: keep-alive, Upgrade",
    "Upgrade: WebSocket",
    "Sec-WebSocket-Version: 13",
    f"Sec-WebSocket-Key: {KEY}",
)

pytestmark = pytest.mark.parametrize("face", FACES)


@final
class Socket:
    """A visitor with a WebSocket."""

    def __init__(self, stream: trio.SocketStream, received: bytes) -> None:
        self.stream: Final = stream
        self.protocol: Final = Connection(ConnectionType.CLIENT, trailing_data=received)

    async def send(self, event: Any) -> None:
        await self.stream.send_all(bytes(self.protocol.send(event)))

    async def hear(self) -> Any:
        """The next event; None at EOF."""
        while True:
            for event in self.protocol.events():
                return event
            data = await self.stream.receive_some(64 * 1024)
            if not data:
                return None
            self.protocol.receive_data(bytes(data))

    async def hear_message(self) -> str | bytes:
        """The next message, whole."""
        parts: list[Any] = []
        while True:
            event = await self.hear()
            assert isinstance(event, TextMessage | BytesMessage), event
            parts.append(event.data)
            if event.message_finished:
                return "".join(parts) if isinstance(event, TextMessage) else b"".join(parts)

    async def close(self, code: int = 1000) -> None:
        """Close, and wait for the answer and EOF."""
        await self.send(CloseConnection(code=code))
        assert await self.hear() == CloseConnection(code=code, reason="")
        assert await self.stream.receive_some(1) == b""


async def knock(stream: trio.SocketStream, *lines: str, opening: tuple[str, ...] = OPENING) -> bytes:
    """Ask for a WebSocket; returns the head of the answer, and what came with it."""
    await stream.send_all(head("GET", "/ws?a=b", *opening, *lines))
    received = b""
    while b"\r\n\r\n" not in received:
        data = await stream.receive_some(64 * 1024)
        assert data, received
        received += data
    return received


@asynccontextmanager
async def opened(served: Served, *lines: str) -> AsyncIterator[Socket]:
    async with await served.visit() as stream:
        answer, _, rest = (await knock(stream, *lines)).partition(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 101 "), answer
        assert b"\r\nsec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" in answer  # as RFC 6455 has it for this key
        yield Socket(stream, rest)


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Accepts, and sends back each message until the visitor goes."""
    await no_lifespan(scope)
    assert (await receive())["type"] == "websocket.connect"
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({**message, "type": "websocket.send"})


async def test_the_scope_tells_the_request_and_the_visitor(face: Face) -> None:
    scopes: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        scopes.append(scope)
        await send({"type": "websocket.accept", "subprotocol": "two", "headers": [(b"x-a", b"b")]})

    async with serving(app, face) as served, await served.visit() as stream:
        answer = await knock(stream, "Sec-WebSocket-Protocol: one, two", "Sec-WebSocket-Protocol: three")
        assert b"sec-websocket-protocol: two\r\n" in answer
        assert b"x-a: b\r\n" in answer
        client = list(stream.socket.getsockname())
    (scope,) = scopes
    assert (scope["type"], scope["scheme"], scope["path"], scope["query_string"]) == ("websocket", "ws", "/ws", b"a=b")
    assert scope["subprotocols"] == ["one", "two", "three"]
    assert scope["client"] == client


async def test_messages_pass_both_ways_whole_in_fragments_and_large(face: Face) -> None:
    async with serving(echo, face) as served, opened(served) as socket:
        for text in ("hello", "", "ÿ" * 200_000):
            await socket.send(TextMessage(data=text))
            assert await socket.hear_message() == text
        for data in (b"hello", b""):
            await socket.send(BytesMessage(data=data))
            assert await socket.hear_message() == data
        async with trio.open_nursery() as nursery:
            nursery.start_soon(socket.send, BytesMessage(data=bytes(4 * MIB)))
            assert await socket.hear_message() == bytes(4 * MIB)
        for part in "frag":
            await socket.send(TextMessage(data=part, message_finished=False))
        await socket.send(Ping(payload=b"between"))
        await socket.send(TextMessage(data="ment"))
        assert await socket.hear() == Pong(payload=b"between")
        assert await socket.hear_message() == "fragment"
        await socket.close()


async def test_what_comes_before_it_is_accepted_is_kept(face: Face) -> None:
    go = threading.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        await until(go)
        await echo(scope, receive, send)

    async with serving(app, face) as served, await served.visit() as stream:
        early = bytes(Connection(ConnectionType.CLIENT).send(TextMessage(data="early")))
        await stream.send_all(head("GET", "/", *OPENING) + early)
        go.set()
        received = b""
        while not received.endswith(b"early"):
            received += await stream.receive_some(1000)


async def test_a_ping_is_answered_while_the_application_is_busy(face: Face) -> None:
    go = threading.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        await send({"type": "websocket.accept"})
        await until(go)

    async with serving(app, face) as served, opened(served) as socket:
        for payload in (b"", b"1"):
            await socket.send(Ping(payload=payload))
            assert await socket.hear() == Pong(payload=payload)
        go.set()
        assert await socket.hear() == CloseConnection(code=1000, reason="")


@pytest.mark.parametrize("code", [1000, 1001, 3000, 4999, 1005])
async def test_the_application_hears_how_the_visitor_closes(face: Face, code: int) -> None:
    heard: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        await receive()
        await send({"type": "websocket.accept"})
        heard.append(await receive())
        heard.append(await receive())
        try:
            await send({"type": "websocket.send", "text": "late"})
        except OSError:
            heard.append("OSError")

    async with serving(app, face) as served, opened(served) as socket:
        reason = None if code == 1005 else "bye"
        await socket.send(CloseConnection(code=CloseReason(code) if code == 1005 else code, reason=reason))
        answer = await socket.hear()
        assert (answer.code, answer.reason or None) == (code, reason)
        assert await socket.stream.receive_some(1) == b""
    message = {"type": "websocket.disconnect", "code": code, "reason": reason or ""}
    assert heard == [message, message, "OSError"]


async def test_the_visitor_hears_how_the_application_closes(face: Face) -> None:
    heard: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.close", "code": 4321, "reason": "enough"})
        heard.append(await receive())

    async with serving(app, face) as served, opened(served) as socket:
        assert await socket.hear() == CloseConnection(code=4321, reason="enough")
        await socket.send(CloseConnection(code=4321))
        assert await socket.stream.receive_some(1) == b""
    assert heard == [{"type": "websocket.disconnect", "code": 4321, "reason": "enough"}]


async def test_a_visitor_that_does_not_answer_the_closing_is_reset(face: Face) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        await send({"type": "websocket.accept"})

    async with serving(app, face, close_timeout=0.05) as served, opened(served) as socket:
        assert await socket.hear() == CloseConnection(code=1000, reason="")
        with pytest.raises(trio.BrokenResourceError):
            await read_all(socket.stream)


@pytest.mark.parametrize("reset", [False, True], ids=["eof", "reset"])
async def test_a_visitor_that_vanishes_is_heard_of_with_code_1006(face: Face, reset: bool) -> None:
    heard: list[Any] = []
    over = threading.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        await receive()
        await send({"type": "websocket.accept"})
        heard.append((await receive())["code"])
        over.set()

    async with serving(app, face) as served:
        async with opened(served) as socket:
            if reset:
                socket.stream.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")
        await in_thread(over)
    assert heard == [1006]


async def test_a_rejection_is_a_403(face: Face) -> None:
    heard: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        await receive()
        await send({"type": "websocket.close", "code": 1000})
        heard.append((await receive())["type"])

    async with serving(app, face) as served, await served.visit() as stream:
        answer = await Browser(stream).ask("GET", "/", *OPENING)
        assert (answer.status, answer.body) == (403, b"")
        assert await stream.receive_some(1) == b""
    assert heard == ["websocket.disconnect"]


async def test_a_rejection_may_have_an_answer_of_its_own(face: Face) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        assert "websocket.http.response" in scope["extensions"]
        start = {"type": "websocket.http.response.start", "status": 401, "headers": [(b"www-authenticate", b"Bearer")]}
        await send(start)
        await send({"type": "websocket.http.response.body", "body": b"who ", "more_body": True})
        await send({"type": "websocket.http.response.body", "body": b"are you?"})

    async with serving(app, face) as served, await served.visit() as stream:
        answer: Answer = await Browser(stream).ask("GET", "/", *OPENING)
        assert (answer.status, answer.body) == (401, b"who are you?")
        assert answer.headers[b"www-authenticate"] == b"Bearer"


async def test_an_application_that_fails_is_heard_of(face: Face, caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        match scope["path"]:
            case "/raises":
                raise KeyError("why")
            case "/returns":
                return
            case "/half-denied":
                await send({"type": "websocket.http.response.start", "status": 401})
                await send({"type": "websocket.http.response.body", "body": b"part", "more_body": True})
            case "/ws":
                await send({"type": "websocket.accept"})
                raise KeyError("why")

    async with serving(app, face) as served:
        for target in ("/raises", "/returns"):
            async with await served.visit() as stream:
                assert (await Browser(stream).ask("GET", target, *OPENING)).status == 500
        async with await served.visit() as stream:
            await stream.send_all(head("GET", "/half-denied", *OPENING))
            with pytest.raises(trio.BrokenResourceError):
                await read_all(stream)
        async with opened(served) as socket:
            assert await socket.hear() == CloseConnection(code=1011, reason="")
            await socket.send(CloseConnection(code=1011))
            assert await socket.stream.receive_some(1) == b""
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 3


async def test_an_application_that_sends_what_it_cannot_gets_an_error(face: Face) -> None:
    errors: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        for kind in ("websocket.send", "http.response.start", "websocket.nonsense"):
            try:
                await send({"type": kind})
            except RuntimeError as error:
                errors.append(str(error))
        await send({"type": "websocket.accept"})
        try:
            await send({"type": "websocket.accept"})
        except RuntimeError as error:
            errors.append(str(error))

    async with serving(app, face) as served, opened(served) as socket:
        assert await socket.hear() == CloseConnection(code=1000, reason="")
    assert [error.split("'")[1] for error in errors] == [
        "websocket.send",
        "http.response.start",
        "websocket.nonsense",
        "websocket.accept",
    ]


FRAMES: Final = {
    "a frame without mask": (b"\x81\x02hi", 1002),
    "a reserved bit": (b"\xc1\x80\0\0\0\0", 1002),
    "an unknown opcode": (b"\x83\x80\0\0\0\0", 1002),
    "a continuation of nothing": (b"\x80\x80\0\0\0\0", 1002),
    "a ping that is too long": (b"\x89\xfe\0\x7e\0\0\0\0", 1002),
    "text that is not UTF-8": (b"\x81\x82\0\0\0\0\xff\xff", 1007),
    "a close code that is not allowed": (b"\x88\x82\0\0\0\0\x03\xed", 1002),
    "a message that is too large": (b"\x82\xff\0\0\0\0\0\1\0\0\0\0\0\0" + bytes(65536), 1009),
    "too many fragments": ((b"\x02" + b"\x00" * 0) + b"\x80\0\0\0\0" + (b"\0\x81\0\0\0\0a") * 1001, 1009),
}


async def test_what_is_no_frame_closes_with_a_code_that_says_so(face: Face) -> None:
    heard: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        await receive()
        await send({"type": "websocket.accept"})
        heard.append((await receive())["code"])

    async with serving(app, face, max_message_bytes=1000) as served:
        for name, (frames, code) in FRAMES.items():
            async with opened(served) as socket:
                await socket.stream.send_all(frames)
                closing = await socket.hear()
                assert isinstance(closing, CloseConnection), name
                assert closing.code == code, name
                assert await socket.stream.receive_some(1) == b"", name
    assert heard == [code for _, code in FRAMES.values()]


HANDSHAKES: Final = {
    "another version": ((*OPENING[:2], "Sec-WebSocket-Version: 8", OPENING[3]), 426),
    "no version": ((*OPENING[:2], OPENING[3]), 426),
    "no key": (OPENING[:3], 400),
    "a short key": ((*OPENING[:3], "Sec-WebSocket-Key: c2hvcnQ="), 400),
    "a key that is not base64": ((*OPENING[:3], "Sec-WebSocket-Key: ?GhlIHNhbXBsZSBub25jZQ=="), 400),
    "a body": ((*OPENING, "Content-Length: 1"), 400),
    "chunks": ((*OPENING, "Transfer-Encoding: chunked"), 400),
}


async def test_an_opening_that_is_wrong_is_refused(face: Face) -> None:
    reached: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        reached.append(scope["type"])
        await respond(send)

    async with serving(app, face) as served:
        for name, (opening, status) in HANDSHAKES.items():
            async with await served.visit() as stream:
                answer = await knock(stream, opening=opening)
                assert answer.startswith(f"HTTP/1.1 {status} ".encode()), name
                assert (status != 426) or b"sec-websocket-version: 13" in answer
        for request in (head("POST", "/", *OPENING), b"GET / HTTP/1.0\r\n" + "\r\n".join([*OPENING, "", ""]).encode()):
            async with await served.visit() as stream:
                await stream.send_all(request)
                assert (await read_all(stream)).startswith(b"HTTP/1.1 400 ")
        assert reached == []
        async with await served.visit() as stream:  # another upgrade than to a WebSocket is not taken up
            answer = await knock(stream, opening=("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c"))
            assert answer.startswith(b"HTTP/1.1 200 ")
    assert reached == ["http"]


async def test_a_visitor_sends_no_faster_than_the_application_receives(face: Face) -> None:
    go, done = threading.Event(), threading.Event()
    sizes: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        await receive()
        await send({"type": "websocket.accept"})
        await until(go)
        sizes.extend([len((await receive())["bytes"]) for _ in range(32)])

    async with serving(app, face) as served, opened(served) as socket, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def upload() -> None:
            for _ in range(32):
                await socket.send(BytesMessage(data=bytes(MIB)))
            done.set()

        with trio.move_on_after(0.3):  # the longer, the surer; it holds at any length
            await in_thread(done)
        assert not done.is_set()
        go.set()
        assert await socket.hear() == CloseConnection(code=1000, reason="")
    assert sizes == [MIB] * 32


async def test_a_graceful_stop_closes_with_code_1012(face: Face) -> None:
    heard: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        await receive()
        await send({"type": "websocket.accept"})
        heard.append((await receive())["code"])

    async with serving(app, face) as served, opened(served) as socket:
        served.stop()
        assert await socket.hear() == CloseConnection(code=1012, reason="")
        await socket.send(CloseConnection(code=1012))
        assert await socket.stream.receive_some(1) == b""
        await in_thread(served.ended)
        assert served.errors == []
    assert heard == [1012]
