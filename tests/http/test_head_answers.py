"""What follows a request head: upgrades, and the answers to heads that are refused."""

from __future__ import annotations

import h11
import pytest
from fuzzing import fuzzed
from heads import read, request
from hypothesis import example, given, strategies as st

from pioneer_tunnel._http.head import (
    error_response,
    wants_upgrade,
)
from pioneer_tunnel._model.errors import LocalProtocolError

# Upgrades


def test_a_websocket_opening_is_seen() -> None:
    found = wants_upgrade(
        read(
            request(
                b"Upgrade: WebSocket",
                b"Connection: keep-alive, UPGRADE",
                b"Sec-WebSocket-Protocol: pioneer-tunnel.v1, Chat",
                b"Sec-WebSocket-Protocol:\tmqtt,, two words",
            )
        )
    )
    assert found is not None
    assert found.websocket
    assert found.protocols == ("websocket",)
    assert found.subprotocols == ("pioneer-tunnel.v1", "Chat", "mqtt")


@pytest.mark.parametrize(
    ("first", "lines", "protocols", "websocket"),
    [
        (b"GET / HTTP/1.1", [b"Upgrade: h2c, websocket", b"Connection: Upgrade"], ("h2c", "websocket"), True),
        (b"GET / HTTP/1.1", [b"Upgrade: TLS/1.2", b"Connection: x", b"Connection: upgrade"], ("tls/1.2",), False),
        (b"POST / HTTP/1.1", [b"Upgrade: websocket", b"Connection: upgrade"], ("websocket",), False),
        (b"GET / HTTP/1.1", [b"Upgrade: websocket2", b"Connection: upgrade"], ("websocket2",), False),
    ],
)
def test_other_upgrades(first: bytes, lines: list[bytes], protocols: tuple[str, ...], websocket: bool) -> None:
    found = wants_upgrade(read(request(*lines, first=first)))
    assert found is not None
    assert (found.protocols, found.subprotocols, found.websocket) == (protocols, (), websocket)


@pytest.mark.parametrize(
    ("first", "lines"),
    [
        (b"GET / HTTP/1.1", []),
        (b"GET / HTTP/1.1", [b"Upgrade: websocket"]),
        (b"GET / HTTP/1.1", [b"Upgrade: websocket", b"Connection: keep-alive"]),
        (b"GET / HTTP/1.1", [b"Upgrade: websocket", b"Connection: not-upgrade"]),
        (b"GET / HTTP/1.1", [b"Connection: upgrade"]),
        (b"GET / HTTP/1.1", [b"Upgrade: ,", b"Connection: upgrade"]),
        (b"GET / HTTP/1.0", [b"Upgrade: websocket", b"Connection: upgrade"]),
    ],
)
def test_no_upgrade(first: bytes, lines: list[bytes]) -> None:
    assert wants_upgrade(read(request(*lines, first=first))) is None


@pytest.mark.parametrize("name", [b"Connection", b"Upgrade", b"Sec-WebSocket-Protocol"])
def test_lists_without_end_are_not_taken_apart(name: bytes) -> None:
    """Found by an attack: a head of 64 KiB that is one such list cost 20 ms, three times over."""
    lists = [name + b": " + b"a," * 8000 + b"b"] * 3
    found = wants_upgrade(read(request(*lists, b"Upgrade: websocket", b"Connection: " + b"x," * 8000 + b"upgrade")))
    assert found is not None
    assert found.websocket
    assert len(found.protocols) <= 4 * 64
    assert len(found.subprotocols) <= 4 * 64


# Answers


def answer_of(data: bytes, method: str = "GET") -> tuple[h11.Response, bytes]:
    """The answer as a visitor's HTTP client reads it; nothing may follow it."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method=method, target="/", headers=[("Host", "a.example")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(data)
    response = connection.next_event()
    assert isinstance(response, h11.Response)
    body = b""
    while isinstance(event := connection.next_event(), h11.Data):
        body += bytes(event.data)
    assert isinstance(event, h11.EndOfMessage)
    assert connection.trailing_data == (b"", False)
    assert connection.their_state is h11.MUST_CLOSE
    return response, body


@pytest.mark.parametrize(
    ("status", "phrase"),
    [
        (400, b"Bad Request"),
        (404, b"Not Found"),
        (408, b"Request Timeout"),
        (421, b"Misdirected Request"),
        (431, b"Request Header Fields Too Large"),
        (502, b"Bad Gateway"),
        (503, b"Service Unavailable"),
        (504, b"Gateway Timeout"),
    ],
)
def test_answer(status: int, phrase: bytes) -> None:
    response, body = answer_of(error_response(status, "The gateway is not connected."))
    assert (response.status_code, response.reason) == (status, phrase)
    assert body == b"The gateway is not connected.\n"
    headers = dict(response.headers)
    assert headers[b"content-type"] == b"text/plain; charset=utf-8"
    assert headers[b"content-length"] == b"30"
    assert headers[b"cache-control"] == b"no-store"
    assert headers[b"x-content-type-options"] == b"nosniff"
    assert headers[b"connection"] == b"close"


def test_the_answer_to_head_has_no_body() -> None:
    response, body = answer_of(error_response(404, "Nobody is here.", omit_body=True), "HEAD")
    assert (dict(response.headers)[b"content-length"], body) == (b"16", b"")


@pytest.mark.parametrize("status", [200, 302, 500, 505, 999])
def test_other_answers_are_not_the_relays(status: int) -> None:
    with pytest.raises(LocalProtocolError, match=str(status)):
        error_response(status, "No.")


@fuzzed()
@given(st.text(max_size=400))
@example("a\r\nSet-Cookie: b\r\n\r\n<script>")
@example("\u202egnp.exe \x1b[2J \x00")
@example("\ud800")
def test_an_answer_says_nothing_but_a_line(text: str) -> None:
    _, body = answer_of(error_response(400, text))
    line = body.decode().removesuffix("\n")
    assert len(line) <= 300
    assert line.isprintable()
