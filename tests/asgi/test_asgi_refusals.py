"""What the ASGI server refuses: what is no HTTP, or what another server may take for another request."""

from __future__ import annotations

from typing import Final

import pytest
from asgi_rig import (
    FACES,
    Browser,
    Face,
    head,
    no_lifespan,
    respond,
    serving,
)
from rig import read_all

from pioneer_tunnel.asgi.interface import Receive, Scope, Send

pytestmark = pytest.mark.parametrize("face", FACES)


REFUSED: Final = {
    "no HTTP": (b"\x16\x03\x01\x02\x00\r\n\r\n", 400),
    "another version": (b"GET / HTTP/2.0\r\nHost: h\r\n\r\n", 505),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    "a space before the colon": (b"GET / HTTP/1.1\r\nHost : h\r\n\r\n", 400),
    "a space in a name": (b"GET / HTTP/1.1\r\nHost: h\r\nA b: c\r\n\r\n", 400),
    "a NUL in a value": (b"GET / HTTP/1.1\r\nHost: h\r\nA: b\0c\r\n\r\n", 400),
    "a bare CR": (b"GET / HTTP/1.1\r\nHost: h\r\nA: b\rC: d\r\n\r\n", 400),
    "a line folded before the first": (b"GET / HTTP/1.1\r\n Host: h\r\n\r\n", 400),
    "length and chunks": (
        b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nX",
        400,
    ),
    "chunks and length": (
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n5c\r\nGPOST",
        400,
    ),
    "chunks in 1.0": (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "two lengths": (b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
    "two lengths in a line": (b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1, 2\r\n\r\nab", 400),
    "a length with a sign": (b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: +1\r\n\r\na", 400),
    "a negative length": (b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: -1\r\n\r\n", 400),
    "a length in hex": (b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 0x1\r\n\r\na", 400),
    "another encoding": (b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
    "an encoding that looks like chunked": (b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: xchunked\r\n\r\n", 501),
    "two encodings": (
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n",
        501,
    ),
    "a vertical tab before chunked": (
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: \x0bchunked\r\n\r\n",
        400,
    ),
    "CONNECT": (b"CONNECT h:80 HTTP/1.1\r\nHost: h\r\n\r\n", 501),
    "a head that is too large": (b"GET / HTTP/1.1\r\nHost: h\r\nA: " + bytes(70_000).replace(b"\0", b"x"), 431),
    "a target that is too large": (b"GET /" + bytes(70_000).replace(b"\0", b"x"), 431),
}


async def test_what_is_no_request_is_refused_and_the_connection_ends(face: Face) -> None:
    reached: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        reached.append(scope["path"])
        await respond(send)

    async with serving(app, face) as served:
        for name, (request, status) in REFUSED.items():
            async with await served.visit() as stream:
                await stream.send_all(request)
                answers = await read_all(stream)
                assert answers.startswith(f"HTTP/1.1 {status} ".encode()), (name, answers)
                assert answers.count(b"HTTP/1.1") == 1, name
        assert reached == []
        async with await served.visit() as stream:
            assert (await Browser(stream).ask()).status == 200


BAD_BODIES: Final = {
    "a size that is no number": b"x\r\n",
    "a size with a sign": b"+1\r\na\r\n0\r\n\r\n",
    "a size that is too large": b"f" * 30 + b"\r\n",
    "a chunk longer than its size": b"1\r\nab\r\n0\r\n\r\n",
    "a chunk without CRLF": b"1\r\naXX0\r\n\r\n",
    "a bare LF for a terminator of a chunk": b"1\r\na\n\n0\r\n\r\n",
}


async def test_a_body_that_is_malformed_is_refused(face: Face) -> None:
    heard: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        message = await receive()
        while message["type"] == "http.request" and message["more_body"]:
            message = await receive()
        heard.append(message["type"])
        if scope["path"] == "/answers":
            await respond(send)

    async with serving(app, face) as served:
        for name, body in BAD_BODIES.items():
            for target in ("/", "/answers"):
                async with await served.visit() as stream:
                    await stream.send_all(head("POST", target, "Transfer-Encoding: chunked") + body)
                    answers = await read_all(stream)
                    assert answers.startswith(b"HTTP/1.1 400 "), (name, answers)
                    assert answers.count(b"HTTP/1.1") == 1, name
    assert set(heard) == {"http.disconnect"}


async def test_what_may_come_in_more_than_one_way_is_read_as_one_request(face: Face) -> None:
    """Nothing of a body is taken for the next request."""
    paths: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await no_lifespan(scope)
        paths.append(scope["path"])
        await respond(send)

    smuggled = head("GET", "/smuggled")
    async with serving(app, face) as served, await served.visit() as stream:
        browser = Browser(stream)
        await browser.ask("POST", "/one", f"Content-Length: {len(smuggled)}", body=smuggled)
        chunk = f"{len(smuggled):x}\r\n".encode() + smuggled + b"\r\n0\r\n\r\n"
        await browser.ask("POST", "/two", "Transfer-Encoding: Chunked", body=chunk)
        await browser.ask("GET", "/three")
    assert paths == ["/one", "/two", "/three"]
