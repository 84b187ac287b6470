"""`_http.responses`: where each response ends, in any pieces, and what is not followed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Final

import attrs
import h11
import pytest
import trio
import trio.testing
from fuzzing import fuzzed
from heads import singly
from hypothesis import example, given, strategies as st

from pioneer_tunnel._http import bodies, responses as responses_module
from pioneer_tunnel._http.bodies import MAX_WORK
from pioneer_tunnel._http.head import MAX_HEAD, HeadReader, RequestHead
from pioneer_tunnel._http.responses import ResponseFollower, ResponsePhase
from pioneer_tunnel._net.adopted import adopt
from pioneer_tunnel.exchange.pump import pump
from pioneer_tunnel.exchange.task_leg import leg_of
from pioneer_tunnel.relay.visitors.followed_leg import FollowedLeg
from pioneer_tunnel.relay.visitors.turns import Turn, Turns

UPGRADE: Final = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
OK: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED: Final = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
HINTS: Final = b"HTTP/1.1 103 Early Hints\r\nLink: </HTTP/1.1 101 >\r\nX: HTTP/1.1 101 OK\r\n\r\n"
SWITCHING: Final = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


def asked(method: bytes, *, upgrade: bool = False) -> RequestHead:
    head = HeadReader().feed(method + b" / HTTP/1.1\r\nHost: a.test\r\n" + UPGRADE * upgrade + b"\r\n")
    assert head is not None
    return head


GET: Final = asked(b"GET")
HEAD: Final = asked(b"HEAD")
WEBSOCKET: Final = asked(b"GET", upgrade=True)


@attrs.frozen
class Verdict:
    """The result for a gateway's bytes."""

    passed: int
    phase: ResponsePhase
    outstanding: int


def feed(follower: ResponseFollower, data: bytes) -> int:
    """Feed all of it, over as many calls as it takes; returns how much of it may pass."""
    passed = follower.feed(data)
    while passed < len(data) and not follower.idle:
        before, passed = passed, follower.feed(data, passed)
        assert passed > before
    return passed


def followed(requests: Iterable[RequestHead], pieces: Iterable[bytes]) -> Verdict:
    follower = ResponseFollower()
    for request in requests:
        follower.expect(request)
    passed = 0
    for piece in pieces:
        amount = feed(follower, piece)
        passed += amount
        if amount < len(piece):
            break
    return Verdict(passed, follower.phase, follower.outstanding)


def in_every_way(requests: list[RequestHead], data: bytes) -> Verdict:
    """The verdict on `data`, which is the same whole, in single bytes and cut in two anywhere."""
    whole = followed(requests, [data])
    step = max(1, len(data) // 100)
    for pieces in itertools.chain([singly(data)], ([data[:at], data[at:]] for at in range(0, len(data), step))):
        assert followed(requests, pieces) == whole
    return whole


# Where a response ends

ENDED: Final[dict[str, tuple[list[RequestHead], bytes]]] = {
    "a length": ([GET], OK),
    "no body": ([GET], b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
    "a length with zeros": ([GET], b"HTTP/1.1 200 OK\r\ncontent-length: \t002 \r\n\r\nok"),
    "chunks": ([GET], CHUNKED + b"2\r\nok\r\n0A;x=y\r\n0123456789\r\n0\r\n\r\n"),
    "trailers": ([GET], CHUNKED + b"2\r\nok\r\n0\r\nExpires: 0\r\nX-Sum: 1\r\n\r\n"),
    "no reason": ([GET], b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok"),
    "HTTP/1.0": ([GET], OK.replace(b"1.1", b"1.0")),
    "HEAD": ([HEAD], b"HTTP/1.1 200 OK\r\nContent-Length: 200\r\n\r\n"),
    "HEAD, chunked": ([HEAD], CHUNKED),
    "HEAD without a length": ([HEAD], b"HTTP/1.1 404 Not Found\r\n\r\n"),
    "204": ([GET], b"HTTP/1.1 204 No Content\r\n\r\n"),
    "204 with a length of 0": ([GET], b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n"),
    "304": ([GET], b"HTTP/1.1 304 Not Modified\r\nContent-Length: 200\r\n\r\n"),
    "interim responses": ([GET], CONTINUE + HINTS * 3 + OK),
    "an interim response to HEAD": ([HEAD], CONTINUE + CHUNKED),
    "an Upgrade that is declined": ([WEBSOCKET], CONTINUE + OK),
    "several requests": ([GET, HEAD, GET, GET], OK + CHUNKED + CONTINUE + CHUNKED + b"0\r\n\r\n" + OK),
    "the same head again": ([GET, HEAD, GET, GET], OK + OK[:-2] + CONTINUE + CONTINUE + OK + OK),
    "a head that ends like the one before": ([GET, GET], OK + b"HTTP/1.1 304 Not Modified\r\nX: " + OK[:-2]),
    "an early response": ([asked(b"POST")], b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\n\r\n"),
    "a body that looks like a response": ([GET], CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(OK), OK)),
    "odd headers": (
        [GET],
        b"HTTP/1.1 299 \xe9\r\nx-content-length: 9\r\nX:\r\nX: \t\xff\r\nContent-Length:2\r\n\r\nok",
    ),
}


@pytest.mark.parametrize(("requests", "data"), ENDED.values(), ids=ENDED.keys())
def test_the_end_is_found_and_what_comes_after_it_does_not_pass(requests: list[RequestHead], data: bytes) -> None:
    assert in_every_way(requests, data) == Verdict(len(data), ResponsePhase.HEAD, 0)
    assert in_every_way(requests, data + OK) == Verdict(len(data), ResponsePhase.HEAD, 0)
    assert in_every_way([*requests, GET], data + OK).outstanding == 0
    assert in_every_way([*requests, GET], data).outstanding == 1
    for cut in range(len(data)):
        follower = ResponseFollower()
        for request in requests:
            follower.expect(request)
        assert feed(follower, data[:cut]) == cut
        assert not follower.idle


def test_nothing_passes_that_was_not_asked_for() -> None:
    assert ResponseFollower().idle
    assert followed([], [OK]) == Verdict(0, ResponsePhase.HEAD, 0)
    assert followed([GET], [OK, OK]) == Verdict(len(OK), ResponsePhase.HEAD, 0)


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nX: y\r\n\r\n", b"HTTP/1.0 500\r\n\r\n"])
def test_a_body_without_a_length_lasts_until_the_gateways_end(head: bytes) -> None:
    data = head + OK + CHUNKED
    assert in_every_way([GET], data) == Verdict(len(data), ResponsePhase.LAST_BODY, 0)


def test_after_a_101_that_was_asked_for_anything_passes() -> None:
    data = CONTINUE + HINTS + SWITCHING + b"\x81\x05hello" + OK
    assert in_every_way([WEBSOCKET], data) == Verdict(len(data), ResponsePhase.SWITCHED, 0)
    follower = ResponseFollower()
    follower.expect(WEBSOCKET)
    for piece in (CONTINUE, HINTS, SWITCHING[:-1]):
        follower.feed(piece)
        assert follower.awaits_upgrade
    follower.feed(SWITCHING[-1:])
    assert not follower.awaits_upgrade


# What is not followed

AMBIGUOUS: Final[dict[str, tuple[RequestHead, bytes]]] = {
    "both framings": (GET, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "two lengths": (GET, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok"),
    "the same length twice": (GET, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok"),
    "a list of lengths": (GET, b"HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nok"),
    "a signed length": (GET, b"HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\nok"),
    "an empty length": (GET, b"HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\nok"),
    "another coding": (GET, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nok"),
    "chunked, not last": (GET, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, gzip\r\n\r\nok"),
    "two codings": (GET, CHUNKED[:-2] + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "HTTP/1.0 with chunks": (GET, CHUNKED.replace(b"1.1", b"1.0") + b"0\r\n\r\n"),
    "bare LF": (GET, b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok\r\n\r\n"),
    "bare LF only": (GET, b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok"),
    "bare LF after a header": (GET, b"HTTP/1.1 200 OK\r\nX: y\nContent-Length: 2\r\n\r\nok"),
    "bare CR in a header": (GET, b"HTTP/1.1 200 OK\r\nX: y\rContent-Length: 2\r\n\r\nok"),
    "NUL": (GET, b"HTTP/1.1 200 OK\r\nX: \0\r\nContent-Length: 2\r\n\r\nok"),
    "a folded header": (GET, b"HTTP/1.1 200 OK\r\nX: y\r\n Content-Length: 9\r\nContent-Length: 2\r\n\r\nok"),
    "white space before a colon": (GET, b"HTTP/1.1 200 OK\r\nContent-Length : 2\r\n\r\nok"),
    "a header without a name": (GET, b"HTTP/1.1 200 OK\r\n: 2\r\nContent-Length: 2\r\n\r\nok"),
    "a header without a colon": (GET, b"HTTP/1.1 200 OK\r\nX\r\nContent-Length: 2\r\n\r\nok"),
    "no version": (GET, b"HTTP/1.1200 OK\r\n\r\n"),
    "HTTP/2": (GET, b"HTTP/2 200 OK\r\n\r\n"),
    "no status": (GET, b"HTTP/1.1 OK\r\n\r\n"),
    "four digits": (GET, b"HTTP/1.1 1010\r\n\r\n"),
    "a status of 0": (GET, b"HTTP/1.1 099 \r\n\r\n"),
    "a reason without a space": (GET, b"HTTP/1.1 200OK\r\n\r\n"),
    "an empty line first": (GET, b"\r\n" + OK),
    "no response at all": (GET, b"\x81\x05hello"),
    "a request": (GET, b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n"),
    "a long head": (GET, b"HTTP/1.1 200 OK\r\n" + b"X: %s\r\n" % (b"x" * 1000) * 66 + b"\r\n"),
    "a long head that does not end": (GET, b"HTTP/1.1 200 OK\r\nX: " + b"x" * MAX_HEAD),
    "an interim response with a length": (GET, CONTINUE[:-2] + b"Content-Length: 0\r\n\r\n"),
    "an interim response with chunks": (GET, CONTINUE[:-2] + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "an interim response of HTTP/1.0": (GET, CONTINUE.replace(b"1.1", b"1.0")),
    "a 204 with a length": (GET, b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\nok"),
    "a 204 with chunks": (GET, CHUNKED.replace(b"200", b"204") + b"0\r\n\r\n"),
    "a 101 that was not asked for": (GET, SWITCHING),
    "a chunk without a size": (GET, CHUNKED + b"\r\n"),
    "white space after a size": (GET, CHUNKED + b"5 \r\nhello\r\n0\r\n\r\n"),
    "a size with a prefix": (GET, CHUNKED + b"0x5\r\nhello\r\n"),
    "a bare LF after a size": (GET, CHUNKED + b"5\nhello\r\n"),
    "a chunk that is too long": (GET, CHUNKED + b"3\r\nhello\r\n"),
    "a line that is too long": (GET, CHUNKED + b"5;" + b"x" * bodies.MAX_CHUNK_LINE),
    "a folded trailer": (GET, CHUNKED + b"0\r\nX: y\r\n z\r\n\r\n"),
    "a length in the trailers": (GET, CHUNKED + b"0\r\nContent-Length: 5\r\n\r\n"),
}


@pytest.mark.parametrize(("request_", "data"), AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
def test_what_two_readers_could_understand_in_two_ways_is_not_followed(request_: RequestHead, data: bytes) -> None:
    """It passes whole, with all that comes after it, and no other response is ever expected."""
    assert in_every_way([request_], data).phase is ResponsePhase.UNKNOWN
    assert in_every_way([request_], data + OK) == Verdict(len(data + OK), ResponsePhase.UNKNOWN, 0)
    assert followed([request_, GET, HEAD], [data + OK * 3]) == Verdict(len(data + OK * 3), ResponsePhase.UNKNOWN, 0)


def test_a_response_that_cannot_be_followed_declines_an_upgrade() -> None:
    follower = ResponseFollower()
    follower.expect(WEBSOCKET)
    follower.feed(b"\x81")
    assert not follower.awaits_upgrade
    assert follower.is_last
    assert not follower.idle


@pytest.mark.parametrize("size", [MAX_HEAD - 1, MAX_HEAD, MAX_HEAD + 1, MAX_HEAD + 3])
def test_the_head_has_a_bound_that_is_the_same_in_all_pieces(size: int) -> None:
    data = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX: "
    data += b"x" * (size - len(data) - 4) + b"\r\n\r\n"
    phase = ResponsePhase.HEAD if size <= MAX_HEAD else ResponsePhase.UNKNOWN
    for at in (size - 4, size - 3, size - 2, size - 1, size):
        assert followed([GET], [data[:at], data[at:]]).phase is phase


# Any responses, in any pieces

STATUSES: Final = st.sampled_from([200, 201, 206, 302, 404, 500])
FIELDS: Final = st.lists(st.sampled_from([b"Server: x", b"X-Y:", b"Set-Cookie: a=b\xff", b"Date: \t now "]), max_size=3)


@st.composite
def exchanges(draw: st.DrawFn) -> tuple[RequestHead, bytes]:
    """A request and its response, whose end can be found."""
    request = draw(st.sampled_from([GET, HEAD, asked(b"POST"), WEBSOCKET]))
    status, fields, body = draw(STATUSES), draw(FIELDS), b""
    interim = b"".join(draw(st.lists(st.sampled_from([CONTINUE, HINTS]), max_size=2)))
    match draw(st.sampled_from(["length", "chunks", "none"])):
        case "length":
            body = draw(st.binary(max_size=200))
            fields.append(b"Content-Length: %d" % len(body))
        case "chunks":
            extensions = draw(st.sampled_from([b"", b";a", b';b="c d"']))
            parts = draw(st.lists(st.binary(min_size=1, max_size=60), max_size=6))
            body = b"".join(b"%x%s\r\n%s\r\n" % (len(part), extensions, part) for part in parts)
            body += b"0\r\n" + draw(st.sampled_from([b"", b"X: y\r\n"])) + b"\r\n"
            fields.append(b"Transfer-Encoding: chunked")
        case "none":
            status = draw(st.sampled_from([204, 304]))
    head = b"\r\n".join([b"HTTP/1.1 %d Reason" % status, *draw(st.permutations(fields)), b"", b""])
    return request, interim + head + (b"" if request.omit_body else body)


def cut(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    position = 0
    for size in itertools.cycle(sizes):
        if position >= len(data):
            return
        yield data[position : position + size]
        position += size


SIZES: Final = st.lists(st.integers(1, 300), min_size=1, max_size=8)


def read_by_h11(request: RequestHead, data: bytes) -> int:
    """The length of the response to `request` at the start of `data`, as h11 reads it."""
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
    connection.send(
        h11.Request(method=request.method, target="/", headers=[(b"Host", b"a.test"), *upgrade_of(request)])
    )
    connection.send(h11.EndOfMessage())
    connection.receive_data(data)
    while not isinstance(event := connection.next_event(), h11.EndOfMessage):
        assert event is not h11.NEED_DATA
    return len(data) - len(connection.trailing_data[0])


def upgrade_of(request: RequestHead) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in request.headers if name in {b"upgrade", b"connection"}]


@fuzzed()
@given(st.lists(exchanges(), max_size=5), SIZES, st.binary(min_size=1, max_size=20))
def test_responses_pass_whole_in_any_pieces_and_nothing_after_them(
    made: list[tuple[RequestHead, bytes]], sizes: list[int], tail: bytes
) -> None:
    requests, data = [request for request, _ in made], b"".join(response for _, response in made)
    assert followed(requests, cut(data + tail, sizes)) == Verdict(len(data), ResponsePhase.HEAD, 0)
    assert followed(requests, singly(data + tail)) == Verdict(len(data), ResponsePhase.HEAD, 0)


@fuzzed()
@given(exchanges(), st.binary(max_size=20))
def test_a_response_ends_where_h11_sees_its_end(made: tuple[RequestHead, bytes], tail: bytes) -> None:
    request, response = made
    assert followed([request], [response + tail]).passed == read_by_h11(request, response + tail)


@fuzzed()
@given(
    st.lists(st.one_of(exchanges(), st.sampled_from(sorted(AMBIGUOUS.values(), key=lambda pair: pair[1]))), max_size=4),
    SIZES,
    st.data(),
)
@example([(GET, CHUNKED), (GET, b"\r")], [1], None)
def test_any_bytes_get_one_verdict(
    made: list[tuple[RequestHead, bytes]], sizes: list[int], data: st.DataObject | None
) -> None:
    requests, said = [request for request, _ in made], bytearray(b"".join(response for _, response in made))
    if data is not None and said:
        said[data.draw(st.integers(0, len(said) - 1))] = data.draw(st.integers(0, 255))
    whole = followed(requests, [bytes(said)])
    assert followed(requests, cut(bytes(said), sizes)) == whole
    assert followed(requests, singly(bytes(said))) == whole
    if whole.phase is not ResponsePhase.HEAD:
        assert whole.passed == len(said)


# What it costs


@pytest.mark.parametrize(
    "data", [CONTINUE * 20_000, CHUNKED + b"1\r\nx\r\n" * 60_000, CHUNKED + b"1;a\r\nx\r\n" * 40_000]
)
def test_no_call_takes_long_whatever_comes(data: bytes) -> None:
    """It processes a bounded number of items, and leaves the rest for the next call."""
    follower = ResponseFollower()
    follower.expect(GET)
    calls, passed = 0, 0
    while passed < len(data):
        passed = follower.feed(data, passed)
        calls += 1
        assert follower.work <= MAX_WORK + 10
    assert calls >= len(data) / 17 / MAX_WORK


async def test_a_flood_of_one_gateway_does_not_hold_up_another(mock_clock: trio.testing.MockClock) -> None:
    """Each of its 200 streams sends 20,000 chunks at once; another tenant's gateway sends one response."""
    turns, order = Turns(), list[str]()

    async def answer(tenant: str, said: bytes) -> None:
        (ours, theirs), (gateway, far) = trio.testing.memory_stream_pair(), trio.testing.memory_stream_pair()
        visitor = adopt(ours)
        followed = FollowedLeg(leg_of(visitor), GET, b"", Turn(turns, tenant, tenant), head_timeout=10)
        async with theirs, far, trio.open_nursery() as nursery:
            nursery.start_soon(lambda: pump(adopt(gateway), visitor, second_leg=followed))
            await far.send_all(said)
            received = 0
            while received < len(said):
                received += len(await theirs.receive_some())
            order.append(tenant)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for _ in range(200):
            nursery.start_soon(answer, "flood", CHUNKED + b"1\r\nx\r\n" * 20_000)
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        nursery.start_soon(answer, "victim", OK)
        while not order:
            await trio.lowlevel.checkpoint()
        assert order == ["victim"]
        nursery.cancel_scope.cancel()


def test_a_large_body_takes_one_call() -> None:
    follower = ResponseFollower()
    follower.expect(GET)
    data = b"HTTP/1.1 200 OK\r\nContent-Length: 10000000\r\n\r\n" + bytes(1_000_000)
    assert follower.feed(data) == len(data)
    assert follower.feed(data) == len(data)


def test_no_pattern_tries_twice() -> None:
    """Every repetition without a bound is possessive, so that matching takes time in proportion to the bytes."""
    for module in (responses_module, bodies):
        for pattern in [value for value in vars(module).values() if isinstance(value, re.Pattern)]:
            without_escapes = re.sub(rb"\\.", b"e", pattern.pattern)
            without_classes = re.sub(rb"\[.*?\]", b"c", without_escapes)
            assert not re.search(rb"[*+]", re.sub(rb"[*+?}]\+", b"", without_classes)), pattern
