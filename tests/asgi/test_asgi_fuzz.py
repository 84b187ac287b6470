"""The ASGI server reads the same requests however the bytes are cut, and nothing that comes makes it fail."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

import h11
import trio
import trio.testing
from fuzzing import fuzzed
from hypothesis import example, given, strategies as st
from wsproto.connection import Connection, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, Ping, TextMessage

from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel.asgi.interface import Disconnected, Receive, Scope, Send
from pioneer_tunnel.asgi.on_trio import HOST
from pioneer_tunnel.asgi.options import Options
from pioneer_tunnel.asgi.scope import Visitor
from pioneer_tunnel.asgi.worker import open_worker

VISITOR: Final = Visitor(Address("192.0.2.1", 1), None, "https")


class CutWire:
    """A visitor who sends given pieces and then EOF, and what it gets."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = [piece for piece in pieces if piece]
        self.answers = b""
        self.closed = False
        self.was_reset = False

    async def receive(self, seconds: float | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        return self._pieces.pop(0) if self._pieces else b""

    def interrupt(self) -> None:
        pass

    async def send(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.answers += data

    async def close(self, *, drain: bool) -> None:
        self.closed = True

    def reset(self) -> None:
        self.was_reset = not self.closed


class StuckWire(CutWire):
    """A visitor who takes the answer to its opening, and nothing after it."""

    async def receive(self, seconds: float | None = None) -> bytes:
        return await super().receive() if self._pieces else await trio.sleep_forever()

    async def send(self, data: bytes) -> None:
        if self.answers:
            await trio.sleep_forever()
        await super().send(data)


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def served(app: Any, pieces: Sequence[bytes], kind: type[CutWire] = CutWire) -> CutWire:
    """What a visitor gets who sends `pieces`. The server itself never fails."""
    wire = kind(pieces)

    async def main() -> None:
        async with open_worker(app, "off", HOST, Options(max_message_bytes=1000)) as worker:
            await worker.serve(wire, VISITOR)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert wire.closed or wire.was_reset
    return wire


class Recorder:
    """Answers each request with its body, each message of a WebSocket with itself, and notes both."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["scheme"] in ("https", "wss")
        if scope["type"] == "websocket":
            await self._websocket(receive, send)
            return
        body, message = b"", await receive()
        while message["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                self.seen.append((scope["method"], scope["path"], body))
                await send({"type": "http.response.start", "status": 200})
                await send({"type": "http.response.body", "body": body})
                return
            message = await receive()
        self.seen.append("cut off")

    async def _websocket(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            said = message.get("text", message.get("bytes"))
            self.seen.append(said)
            with suppress(Disconnected):  # the visitor may have gone; what it said before counts all the same
                await send({**message, "type": "websocket.send"})
        self.seen.append(message["code"])


def encoded(requests: Sequence[tuple[bytes, bool]]) -> bytes:
    """Requests with these bodies; those marked are chunked."""
    data = b""
    for body, chunked in requests:
        if chunked:
            data += b"POST /%d HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" % len(body)
            data += b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (body[:3], body[3:]) if piece)
            data += b"0\r\n\r\n"
        else:
            data += b"POST /%d HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % (len(body), len(body)) + body
    return data


places = st.lists(st.integers(0, 10_000), max_size=12)


@fuzzed(60)
@given(st.lists(st.tuples(st.binary(max_size=20), st.booleans()), min_size=1, max_size=5), places)
def test_requests_are_the_same_however_they_are_cut(requests: list[tuple[bytes, bool]], where: list[int]) -> None:
    app = Recorder()
    wire = served(app, cut(encoded(requests), where))
    assert app.seen == [("POST", f"/{len(body)}", body) for body, _ in requests]
    assert wire.closed
    client = h11.Connection(h11.CLIENT)
    rest = wire.answers
    for body, _ in requests:
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method="GET", target="/", headers=[("host", "h")]))
        client.send(h11.EndOfMessage())
        client.receive_data(rest)
        got = b""
        while not isinstance(event := client.next_event(), h11.EndOfMessage):
            got += bytes(event.data) if isinstance(event, h11.Data) else b""
        assert got == body
        rest = client.trailing_data[0]
    assert rest == b""


@fuzzed(60)
@given(st.lists(st.tuples(st.binary(max_size=20), st.booleans()), min_size=1, max_size=3), st.data())
def test_requests_that_are_cut_off_are_never_taken_for_whole(
    requests: list[tuple[bytes, bool]], data: st.DataObject
) -> None:
    whole = encoded(requests)
    end = data.draw(st.integers(0, len(whole) - 1))
    app = Recorder()
    served(app, [whole[:end]])
    complete = [seen for seen in app.seen if seen != "cut off"]
    assert complete == [("POST", f"/{len(body)}", body) for body, _ in requests][: len(complete)]
    assert len(complete) < len(requests)


@fuzzed(80)
@given(
    st.lists(
        st.binary(max_size=30)
        | st.sampled_from(
            [
                b"GET / HTTP/1.1\r\nHost: h\r\n",
                b"\r\n",
                b"Transfer-Encoding: chunked\r\n",
                b"Content-Length: 5\r\n",
                b"Upgrade: websocket\r\nConnection: upgrade\r\n",
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
                b"5\r\nhello\r\n",
                b"0\r\n\r\n",
                b"\x81\x82\0\0\0\0hi",
                b"\x88\x80\0\0\0\0",
                b"Expect: 100-continue\r\n",
            ]
        ),
        max_size=12,
    )
)
@example([b"GET / HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n\0"])
def test_nothing_that_comes_makes_the_server_fail(pieces: list[bytes]) -> None:
    served(Recorder(), pieces)


messages = st.lists(
    st.text(max_size=20).map(lambda text: TextMessage(data=text))
    | st.binary(max_size=300).map(lambda data: BytesMessage(data=data))
    | st.binary(max_size=20).map(lambda data: Ping(payload=data)),
    max_size=8,
)
OPENING: Final = (
    b"GET / HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


@fuzzed(60)
@given(messages, st.sampled_from([None, 1000, 4000]), places)
def test_messages_are_the_same_however_they_are_cut(events: list[Any], code: int | None, where: list[int]) -> None:
    client = Connection(ConnectionType.CLIENT)
    data = b"".join(bytes(client.send(event)) for event in events)
    if code is not None:
        data += bytes(client.send(CloseConnection(code=code)))
    app = Recorder()
    wire = served(app, cut(OPENING + data, where))
    assert wire.answers.startswith(b"HTTP/1.1 101 ")
    assert app.seen == [*(event.data for event in events if not isinstance(event, Ping)), code or 1006]


def test_a_visitor_who_does_not_take_the_closing_of_a_websocket_is_reset() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})

    wire = served(app, [OPENING], StuckWire)
    assert wire.was_reset
