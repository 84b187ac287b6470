"""`_http.plain`: what is recognised at one look is understood as the general way understands it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Final

import attrs
import pytest
from fuzzing import fuzzed
from hypothesis import example, given, strategies as st

from pioneer_tunnel._http import responses as responses_module
from pioneer_tunnel._http.head import MAX_HEADERS, HeadReader, RequestHead
from pioneer_tunnel._http.plain import PLAIN_REQUEST, PLAIN_RESPONSE
from pioneer_tunnel._http.requests import Phase, RequestFollower
from pioneer_tunnel._http.responses import ResponseFollower, ResponsePhase

BROWSER: Final = (
    b"GET /api/items?page=3 HTTP/1.1\r\nHost: a.test\r\nConnection: keep-alive\r\nUser-Agent: Mozilla/5.0 (X11)\r\n"
    b"Accept: text/html,*/*;q=0.8\r\nAccept-Encoding: gzip, br\r\nCookie: session=abc; theme=dark\r\n\r\n"
)
RPC: Final = b"POST /rpc HTTP/1.1\r\nHost: a.test\r\nContent-Type: text/json\r\nContent-Length: 7\r\n\r\n[1,2,3]"
CHUNKED: Final = b"HTTP/1.1 200 OK\r\nServer: x\r\ntransfer-encoding: Chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
SERVED: Final = b"HTTP/1.1 200 OK\r\nServer: x\r\nDate: now\r\nContent-Length: 5\r\nETag: y\r\n\r\nhello"


def test_what_browsers_and_servers_send_is_plain() -> None:
    assert all(PLAIN_REQUEST.match(data) for data in (BROWSER, RPC))
    assert all(PLAIN_RESPONSE.match(data) for data in (SERVED, CHUNKED))


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

LINES: Final = [
    *(b"", b"Accept: */*\r\n", b"X:\r\n", b"Cookie: \t a=b\xff \r\n", b"Connection: Upgrade\r\n", b"Upgrade: x\r\n"),
    *(b"Connection: upgrade\r\nUpgrade: x\r\n", b"Host: a.test\r\n", b"host:A.test \t\r\n", b"Host : b.test\r\n"),
    *(b"Host: b.test\r\n", b"Hostile: b.test\r\n", b"Content-Length: 0\r\n", b"content-length:\t3 \r\n"),
    *(b"Content-Length: +3\r\n", b"Content-Length: 3, 3\r\n", b"Content-Length : 3\r\n", b"Content-Length: 99\r\n"),
    *(b"Content-Length: 1234567890123456789\r\n", b"Content-Length: \xb9\r\n", b"Content-Lengthy: 3\r\n"),
    *(b"Transfer-Encoding: chunked\r\n", b"transfer-encoding:\tCHUNKED \r\n", b"Transfer-Encoding: chunked, gzip\r\n"),
    *(
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"transfer-encoding: gzip\r\n",
        b"TRANSFER-ENCODING:\r\n",
        b" folded\r\n",
    ),
    *(b"X\x00: y\r\n", b"a b: c\r\n", b"X: \x0b\r\n", b"X: y\n", b"X: y\r", b"no colon\r\n", b"\r\n"),
]
FIRST_LINES: Final = [
    *(b"GET / HTTP/1.1\r\n", b"POST /x?y HTTP/1.1\r\n", b"HEAD / HTTP/1.1\r\n", b"CONNECT / HTTP/1.1\r\n"),
    *(b"HEADS / HTTP/1.1\r\n", b"head / HTTP/1.1\r\n", b"GET / HTTP/1.0\r\n", b"GET / HTTP/2.0\r\n"),
    *(b"OPTIONS * HTTP/1.1\r\n", b"GET http://a.test/ HTTP/1.1\r\n", b"GET http://b.test/ HTTP/1.1\r\n"),
    *(b"GET  / HTTP/1.1\r\n", b"GET /\xc3\xa9 HTTP/1.1\r\n", b"GET / HTTP/1.1 \r\n", b"\r\nGET / HTTP/1.1\r\n"),
    *(b"G@T / HTTP/1.1\r\n", b"GET / HTTP/1.1\n", b"GET /\x7f HTTP/1.1\r\n", b"GET a HTTP/1.1\r\n"),
]
STATUS_LINES: Final = [
    *(b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 404\r\n", b"HTTP/1.1 500 \r\n", b"HTTP/1.0 200 OK\r\n", b"HTTP/1.1 204 X\r\n"),
    *(b"HTTP/1.1 304\r\n", b"HTTP/1.1 100 Continue\r\n", b"HTTP/1.1 101 X\r\n", b"HTTP/1.1  200 OK\r\n"),
    *(b"HTTP/1.1 2000 OK\r\n", b"HTTP/2.0 200 OK\r\n", b"HTTP/1.1 999 X\r\n", b"HTTP/1.1 200 O\rK\r\n"),
    *(b"\r\nHTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 \x00\r\n", b"HTTP/1.1 200 OK\n", b"HTTP/1.1 099 X\r\n"),
]
HOST: Final = b"Host: a.test\r\n"
LENGTHS: Final = [b"", b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n"]


def unusual(first_lines: list[bytes], *others: bytes) -> Iterator[bytes]:
    """Messages with a body of three bytes: each first line, and in the first of them each line in each place."""
    for first, length in itertools.product(first_lines, LENGTHS):
        body = b"3\r\nabc\r\n0\r\n\r\n" if b"chunked" in length else b"abc"
        lines = [first, *others, length]
        for line in LINES if first is first_lines[0] else [b""]:
            for place in range(1, len(lines) + 1):
                yield b"".join([*lines[:place], line, *lines[place:], b"\r\n", body])


UNUSUAL_REQUESTS: Final = [*unusual(FIRST_LINES, HOST), *unusual(FIRST_LINES)]
UNUSUAL_RESPONSES: Final = [*unusual(STATUS_LINES)]


def messages(heads: list[bytes]) -> st.SearchStrategy[bytes]:
    made = st.lists(st.sampled_from(heads), min_size=1, max_size=4).map(b"".join)
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
    head_begun: bool
    answers: int


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
    refusal, outstanding = follower.refusal, responses.outstanding
    answers, said = 0, SERVED * 5
    while answers < len(said) and not responses.idle:
        answers = responses.feed(said, answers)
    return Requests(
        forwarded,
        follower.phase,
        refusal and refusal.status,
        refusal is not None and refusal.omit_body,
        follower.next_request and follower.next_request[1],
        outstanding,
        follower.head_begun,
        answers,
    )


def test_all_unusual_requests_are_followed_alike() -> None:
    for data in UNUSUAL_REQUESTS:
        whole = requested([data + BROWSER], answered=b"", plainly=True)
        assert whole == requested([data + BROWSER], answered=b"", plainly=False), data


@fuzzed(400)
@given(
    messages(UNUSUAL_REQUESTS),
    st.integers(1, 400),
    st.sampled_from([b"", SERVED, SERVED[:-2], b"HTTP/1.1 200 OK\r\n\r\n"]),
)
@example(BROWSER * 3, 400, b"")
@example(RPC * 3, 90, b"")
def test_requests_are_followed_alike(data: bytes, size: int, answered: bytes) -> None:
    pieces = cut(data, size)
    assert requested(pieces, answered=answered, plainly=True) == requested(pieces, answered=answered, plainly=False)


@attrs.define
class Told:
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


@contextmanager
def no_plain_responses() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(responses_module, "PLAIN_RESPONSE", re.compile(rb"(?!)"))
        yield


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


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
def test_all_unusual_responses_are_followed_alike(method: bytes) -> None:
    pieces = [[data + SERVED] for data in UNUSUAL_RESPONSES]
    plainly = [responded(piece, [method, b"GET"]) for piece in pieces]
    with no_plain_responses():
        for piece, expected in zip(pieces, plainly, strict=True):
            assert responded(piece, [method, b"GET"]) == expected, piece


@fuzzed(400)
@given(messages(UNUSUAL_RESPONSES), st.integers(1, 400), st.lists(st.sampled_from([b"GET", b"HEAD"]), max_size=4))
@example(SERVED + CHUNKED + SERVED, 400, [b"GET", b"GET", b"GET"])
@example(SERVED * 3, 70, [b"GET", b"HEAD", b"GET"])
def test_responses_are_followed_alike(data: bytes, size: int, methods: list[bytes]) -> None:
    pieces = cut(data, size)
    plainly = responded(pieces, methods)
    with no_plain_responses():
        assert responded(pieces, methods) == plainly


def test_no_pattern_tries_twice() -> None:
    """Every repetition is possessive, so that matching takes time in proportion to the bytes."""
    for pattern in (PLAIN_REQUEST, PLAIN_RESPONSE):
        without_classes = re.sub(rb"\[.*?\]", b"c", re.sub(rb"\\.", b"e", pattern.pattern))
        assert not re.search(rb"[*+]|\{[0-9,]+\}", re.sub(rb"(?:[*+?]|\{[0-9,]+\})\+", b"", without_classes))
