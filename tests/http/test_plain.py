"""`_http.plain`: what is recognised at one look is understood as the general way understands it."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Final

import attrs
import pytest
from fuzzing import fuzzed
from hypothesis import example, given, strategies as st

from pioneer_tunnel._http import responses as responses_module
from pioneer_tunnel._http.head import MAX_HEADERS, HeadReader, RequestHead
from pioneer_tunnel._http.plain import PLAIN_REQUEST, PLAIN_RESPONSE
from pioneer_tunnel._http.requests import Phase, RequestFollower
from pioneer_tunnel._http.responses import ResponseFollower, ResponseObserver, ResponsePhase

BROWSER: Final = (
    b"GET /api/items?page=3 HTTP/1.1\r\nHost: a.test\r\nConnection: keep-alive\r\nUser-Agent: Mozilla/5.0 (X11)\r\n"
    b"Accept: text/html,*/*;q=0.8\r\nAccept-Encoding: gzip, br\r\nCookie: session=abc; theme=dark\r\n\r\n"
)
RPC: Final = b"POST /rpc HTTP/1.1\r\nHost: a.test\r\nContent-Type: text/json\r\nContent-Length: 7\r\n\r\n[1,2,3]"
SERVED: Final = b"HTTP/1.1 200 OK\r\nServer: x\r\nDate: now\r\nContent-Length: 5\r\nETag: y\r\n\r\nhello"


def test_what_browsers_and_servers_send_is_plain() -> None:
    assert all(PLAIN_REQUEST.match(data) for data in (BROWSER, RPC))
    assert PLAIN_RESPONSE.match(SERVED)


def test_a_plain_request_has_no_more_headers_than_may_be() -> None:
    most = [b"X: y\r\n" * (MAX_HEADERS // 3 - 1)] * 3
    first, host, length = b"GET / HTTP/1.1\r\n", b"Host: a.test\r\n", b"Content-Length: 0\r\n"
    assert PLAIN_REQUEST.match(b"".join([first, most[0], host, most[1], length, most[2], b"\r\n"]))
    for at in range(3):
        fields = [*most]
        fields[at] += b"X: y\r\n"
        assert not PLAIN_REQUEST.match(b"".join([first, fields[0], host, fields[1], length, fields[2], b"\r\n"]))
    assert 3 * (MAX_HEADERS // 3 - 1) + 2 <= MAX_HEADERS


# Both ways, for any bytes

LINES: Final = st.sampled_from(
    [
        *(b"Accept: */*", b"X:", b"Cookie: \t a=b\xff ", b"Connection: Upgrade", b"Upgrade: websocket", b"Expect: x"),
        *(b"Host: a.test", b"host:a.test \t", b"Host: A.test", b"Host: b.test", b"Host: a.test:80", b"Host : a.test"),
        *(b"Content-Length: 3", b"content-length:\t3 ", b"Content-Length: +3", b"Content-Length: 3, 3"),
        *(b"Content-Length: 0", b"Content-Length: 99", b"Content-Length: 1234567890123456789"),
        *(b"Transfer-Encoding: chunked", b"transfer-encoding: gzip", b"Content-Length : 3", b" folded", b"X\x00: y"),
        *(b"Content-Lengthy: 3", b"Hostile: b.test", b"a b: c", b"X: \x0b", b"Content-Length: \xb9"),
    ]
)
SOME_LINES: Final = st.lists(LINES, max_size=5).map(lambda lines: b"".join(line + b"\r\n" for line in lines))
FIRST_LINES: Final = st.sampled_from(
    [
        *(b"GET / HTTP/1.1", b"POST /x?y HTTP/1.1", b"HEAD / HTTP/1.1", b"CONNECT / HTTP/1.1", b"HEADS / HTTP/1.1"),
        *(b"GET / HTTP/1.0", b"GET / HTTP/2.0", b"OPTIONS * HTTP/1.1", b"GET http://a.test/ HTTP/1.1", b"\r\nGET / X"),
        *(b"GET  / HTTP/1.1", b"GET /\xc3\xa9 HTTP/1.1", b"GET / HTTP/1.1 ", b"\r\nGET / HTTP/1.1", b"G@T / HTTP/1.1"),
    ]
)
STATUS_LINES: Final = st.sampled_from(
    [
        *(
            b"HTTP/1.1 200 OK",
            b"HTTP/1.1 404",
            b"HTTP/1.1 500 ",
            b"HTTP/1.0 200 OK",
            b"HTTP/1.1 204 X",
            b"HTTP/1.1 304",
        ),
        *(b"HTTP/1.1 100 Continue", b"HTTP/1.1 101 X", b"HTTP/1.1  200 OK", b"HTTP/1.1 2000 OK", b"HTTP/2.0 200 OK"),
        *(b"HTTP/1.1 999 X", b"HTTP/1.1 200 O\rK", b"\r\nHTTP/1.1 200 OK"),
    ]
)
HOST: Final = st.sampled_from([b"", b"Host: a.test\r\n"])
LENGTH: Final = st.sampled_from([b"", b"Content-Length: 3\r\n"])
ENDS: Final = st.sampled_from([b"\r\n", b"\r\nabc", b"\r\nab", b"\n\r\n", b""])


def messages(first_lines: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    parts = st.tuples(first_lines, st.just(b"\r\n"), HOST, SOME_LINES, LENGTH, SOME_LINES, ENDS)
    made = st.lists(parts.map(b"".join), min_size=1, max_size=4).map(b"".join)
    return st.builds(with_a_change, made, st.none() | st.tuples(st.integers(0, 400), st.integers(0, 255)))


def with_a_change(data: bytes, change: tuple[int, int] | None) -> bytes:
    if change is None:
        return data
    place, byte = change
    place %= len(data)
    return data[:place] + bytes([byte]) + data[place + 1 :]


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


def host_in_general(head: RequestHead) -> Hashable:
    """Says the same as `host_of`, but a follower does not know that."""
    return head.host


@attrs.frozen
class Requests:
    """What became of a visitor's bytes."""

    forwarded: bytes
    phase: Phase
    status: int | None
    omit_body: bool
    next_request: bytes | None
    outstanding: int
    waits: bool


def requested(pieces: list[bytes], *, answered: bytes, plainly: bool) -> Requests:
    first = HeadReader().feed(b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n")
    assert first is not None
    responses = ResponseFollower()
    follower = RequestFollower(first, responses) if plainly else RequestFollower(first, responses, host_in_general)
    responses.feed(answered)
    forwarded = b""
    for piece in pieces:
        if follower.is_over or follower.holds:
            break
        forwarded += b"".join(follower.feed(piece))
        while follower.has_more:
            forwarded += b"".join(follower.feed(b""))
    refusal = follower.refusal
    return Requests(
        forwarded,
        follower.phase,
        refusal and refusal.status,
        refusal is not None and refusal.omit_body,
        follower.next_request and follower.next_request[1],
        responses.outstanding,
        follower.head_begun,
    )


@fuzzed(400)
@given(
    messages(FIRST_LINES), st.integers(1, 400), st.sampled_from([b"", SERVED, SERVED[:-2], b"HTTP/1.1 200 OK\r\n\r\n"])
)
@example(BROWSER * 3, 400, b"")
@example(RPC * 3, 90, b"")
def test_requests_are_followed_alike(data: bytes, size: int, answered: bytes) -> None:
    pieces = cut(data, size)
    assert requested(pieces, answered=answered, plainly=True) == requested(pieces, answered=answered, plainly=False)


@attrs.define
class Told(ResponseObserver):
    """Notes what an observer is told. How a body is cut into pieces does not matter."""

    of: list[tuple[str, object]] = attrs.field(factory=list)
    amounts: dict[int, int] = attrs.field(factory=dict)  # by how much was told before

    def expected(self, head: RequestHead) -> None:
        self.of.append(("expected", head.method))

    def answered(self, status: int) -> None:
        self.of.append(("answered", status))

    def passed(self, amount: int) -> None:
        self.amounts[len(self.of)] = self.amounts.get(len(self.of), 0) + amount

    def ended(self) -> None:
        self.of.append(("ended", None))


def responded(pieces: list[bytes], methods: list[bytes]) -> tuple[int, ResponsePhase, int, Told]:
    told = Told()
    follower = ResponseFollower(told)
    for method in methods:
        head = HeadReader().feed(method + b" / HTTP/1.1\r\nHost: a.test\r\n\r\n")
        assert head is not None
        follower.expect(head)
    passed = 0
    for piece in pieces:
        at = 0
        while at < len(piece) and not follower.idle:
            at = follower.feed(piece, at)
        passed += at
        if at < len(piece):
            break
    return passed, follower.phase, follower.outstanding, told


@fuzzed(400)
@given(messages(STATUS_LINES), st.integers(1, 400), st.lists(st.sampled_from([b"GET", b"HEAD"]), max_size=4))
@example(SERVED * 3, 400, [b"GET", b"GET", b"GET"])
@example(SERVED * 3, 70, [b"GET", b"HEAD", b"GET"])
def test_responses_are_followed_alike(data: bytes, size: int, methods: list[bytes]) -> None:
    pieces = cut(data, size)
    plainly = responded(pieces, methods)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(responses_module, "PLAIN_RESPONSE", re.compile(rb"(?!)"))
        assert responded(pieces, methods) == plainly


def test_no_pattern_tries_twice() -> None:
    """Every repetition is possessive, so that matching takes time in proportion to the bytes."""
    for pattern in (PLAIN_REQUEST, PLAIN_RESPONSE):
        without_classes = re.sub(rb"\[.*?\]", b"c", re.sub(rb"\\.", b"e", pattern.pattern))
        assert not re.search(rb"[*+]|\{[0-9,]+\}", re.sub(rb"(?:[*+?]|\{[0-9,]+\})\+", b"", without_classes))
