"""`_http.requests`: where each request ends, one result for the same bytes, and nothing forwarded beyond it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Final

import attrs
import pytest
import trio
import trio.testing
from fuzzing import fuzzed
from heads import singly
from hypothesis import example, given, strategies as st

from pioneer_tunnel._http import bodies, requests as requests_module
from pioneer_tunnel._http.bodies import BodyReader
from pioneer_tunnel._http.head import MAX_HEAD, HeadReader, RequestHead
from pioneer_tunnel._http.requests import Phase, RequestFollower
from pioneer_tunnel._http.responses import ResponseFollower
from pioneer_tunnel._model.errors import LocalProtocolError
from pioneer_tunnel._net.adopted import adopt
from pioneer_tunnel.exchange.pump import pump
from pioneer_tunnel.exchange.task_leg import leg_of
from pioneer_tunnel.relay.visitors.followed_leg import FollowedLeg
from pioneer_tunnel.relay.visitors.turns import Turn, Turns

FIRST: Final = b"GET /first HTTP/1.1\r\nHost: a.test\r\n\r\n"
SECOND: Final = b"GET /again HTTP/1.1\r\nHost: a.test\r\n\r\n"
UPGRADE: Final = b"GET /ws HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
POST: Final = b"POST / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 3\r\n\r\n"
NEXT: Final = b"PUT /next HTTP/1.1\r\nhOST: A.test.:80\r\nContent-Length: 3\r\n\r\nabc"
CHUNKED: Final = b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n"
OTHER: Final = b"GET /other HTTP/1.1\r\nHost: b.test\r\n\r\n"
SWITCHING: Final = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\n\r\n"


def head_of(data: bytes) -> RequestHead:
    head = HeadReader().feed(data)
    assert head is not None
    return head


def following(first: bytes, responses: ResponseFollower | None = None) -> RequestFollower:
    return RequestFollower(head_of(first), responses or ResponseFollower())


@attrs.frozen
class Verdict:
    """The result for a visitor's bytes after the first head."""

    forwarded: bytes
    phase: Phase
    status: int | None
    next_request: bytes | None


def feed_all(follower: RequestFollower, data: bytes) -> bytes:
    """Feed `data`, in as many turns as it takes."""
    forwarded = b"".join(follower.feed(data))
    while follower.has_more:
        forwarded += b"".join(follower.feed(b""))
    return forwarded


def followed(first: bytes, pieces: Iterable[bytes], *, ended: bool = False) -> Verdict:
    follower = following(first)
    forwarded = b""
    for piece in pieces:
        if follower.is_over:
            break
        forwarded += feed_all(follower, piece)
    if ended:
        follower.end()
    next_request = None if follower.next_request is None else follower.next_request[1]
    return Verdict(forwarded, follower.phase, follower.refusal and follower.refusal.status, next_request)


def chunk(data: bytes, extension: bytes = b"") -> bytes:
    return b"%x%s\r\n%s\r\n" % (len(data), extension, data)


def in_every_way(first: bytes, data: bytes) -> Verdict:
    """The verdict on `data`, which is the same whole, in single bytes and cut in two anywhere."""
    whole = followed(first, [data])
    assert (data + b"!").startswith(whole.forwarded)
    same = attrs.evolve(whole, next_request=whole.next_request and NEXT)
    step = max(1, len(data) // 100)
    for pieces in itertools.chain([singly(data)], ([data[:at], data[at:]] for at in range(0, len(data), step))):
        found = followed(first, pieces)
        # How much of the next request was read already depends on the pieces, of course.
        assert attrs.evolve(found, next_request=found.next_request and NEXT) == same
    return whole


# What passes

RIGHT: Final = {
    "nothing": b"",
    "requests without a body": FIRST * 3,
    "a body with a length": NEXT + NEXT,
    "an empty body": FIRST.replace(b"\r\n\r\n", b"\r\nContent-Length: 0\r\n\r\n") * 2,
    "chunks": CHUNKED + chunk(b"abc") + chunk(b"x" * 300) + b"0\r\n\r\n" + FIRST,
    "upper-case sizes and zeros": CHUNKED + b"00A\r\n0123456789\r\n000\r\n\r\n" + FIRST,
    "extensions": CHUNKED + chunk(b"abc", b';a;b=c;d="e \\" f"') + b"0;last\r\n\r\n" + FIRST,
    "trailers": CHUNKED + b"0\r\nExpires: 0\r\nX-Sum:  1 \r\n\r\n" + FIRST,
    "absolute targets": b"GET http://A.test:80/x HTTP/1.1\r\nHost: a.test:\r\n\r\n" + NEXT,
    "targets not ASCII": b"GET /caf\xc3\xa9?\x80\xff HTTP/1.1\r\nHost: a.test\r\n\r\n" + NEXT,
    "an empty line between": NEXT + b"\r\n" + NEXT,
    "the same head again": (POST + b"abc") * 3,
    "a head that ends like the one before": SECOND * 2 + b"GET /3 HTTP/1.1\r\nX: " + SECOND,
    "a head that begins like the one before": (SECOND[:-2] + b"X: y\r\n\r\n") + SECOND + SECOND[:-2] + b"X: y\r\n\r\n",
    "lines that look like a head within a body": CHUNKED + chunk(OTHER) + b"0\r\n\r\n" + NEXT[:-3] + b"GET",
    "HTTP/1.0 and close": FIRST.replace(b"1.1", b"1.0")
    + FIRST.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    + FIRST,
}


@pytest.mark.parametrize("data", RIGHT.values(), ids=RIGHT.keys())
def test_requests_for_the_first_host_pass_whole(data: bytes) -> None:
    assert in_every_way(FIRST, data) == Verdict(data, Phase.HEAD, None, None)


def test_the_first_request_has_a_body_as_well() -> None:
    assert in_every_way(NEXT[:-3], b"abc" + FIRST) == Verdict(b"abc" + FIRST, Phase.HEAD, None, None)
    body = chunk(b"abc") + b"0\r\n\r\n"
    assert in_every_way(CHUNKED, body + FIRST) == Verdict(body + FIRST, Phase.HEAD, None, None)


def test_a_large_body_passes_without_being_copied() -> None:
    follower = following(CHUNKED)
    assert [bytes(piece) for piece in follower.feed(b"100000\r\n")] == [b"100000\r\n"]
    assert follower.read_size == 0x100000
    part = bytes(200_000)
    (passed,) = follower.feed(part)
    assert passed is part
    *_, last = follower.feed(bytes(0x100000 - 200_000) + b"\r\n5")
    assert isinstance(last, memoryview)
    assert follower.phase is Phase.BODY


# What is refused, and how far what came before it goes

WRONG: Final[dict[str, tuple[bytes, bytes, int]]] = {
    "a host that is none": (NEXT, FIRST.replace(b"a.test", b".a.test"), 400),
    "two Hosts": (b"", FIRST.replace(b"\r\n\r\n", b"\r\nHost: a.test\r\n\r\n"), 400),
    "no Host": (b"", b"GET / HTTP/1.1\r\n\r\n", 400),
    "an absolute target of another host": (NEXT, b"GET http://b.test/ HTTP/1.1\r\nHost: a.test\r\n\r\n", 400),
    "bare LF": (b"", b"GET / HTTP/1.1\nHost: a.test\n\n", 400),
    "NUL": (b"", b"GET / HTTP/1.1\r\nHost: a.test\r\nX: \0\r\n\r\n", 400),
    "a folded header": (b"", b"GET / HTTP/1.1\r\nHost: a.test\r\nX: y\r\n z\r\n\r\n", 400),
    "both framings": (
        b"",
        CHUNKED.replace(b"\r\n\r\n", b"\r\nContent-Length: 3\r\n\r\n"),
        400,
    ),
    "two lengths": (b"", NEXT[:-7] + b"\r\nContent-Length: 3\r\n\r\n", 400),
    "no head at all": (NEXT, b"\x81\x05hello", 400),
    "two empty lines": (NEXT, b"\r\n\r\n", 400),
    "a head over 64 KiB": (b"", b"GET / HTTP/1.1\r\n" + (b"X: %s\r\n" % (b"x" * 1000)) * 66, 431),
    "a chunk without a size": (CHUNKED, b"\r\n", 400),
    "a size that is no number": (CHUNKED, b"5g\r\n", 400),
    "a negative size": (CHUNKED, b"-5\r\n", 400),
    "a size with a prefix": (CHUNKED, b"0x5\r\n", 400),
    "a size of 16 digits": (CHUNKED, b"0000000000000005\r\n", 400),
    "white space before a size": (CHUNKED, b" 5\r\n", 400),
    "white space after a size": (CHUNKED, b"5 \r\n", 400),
    "white space before an extension": (CHUNKED, b"5 ;a\r\n", 400),
    "an extension without a name": (CHUNKED, b"5;\r\n", 400),
    "an extension that is not closed": (CHUNKED, b'5;a="b\r\n', 400),
    "a bare LF after a size": (CHUNKED, b"5\n", 400),
    "a bare CR in an extension": (CHUNKED, b"5;a\rb\r\n", 400),
    "a NUL in an extension": (CHUNKED, b"5;a\0\r\n", 400),
    "an extension that is too long": (CHUNKED, b"5;" + b"a" * bodies.MAX_CHUNK_LINE + b"\r\n", 400),
    "a chunk that is too long": (CHUNKED + b"3\r\nabc", b"d\r\n", 400),
    "a bare LF after a chunk": (CHUNKED + b"3\r\nabc", b"\n0\r\n\r\n", 400),
    "a chunk that ends in CR": (CHUNKED + b"3\r\nabc", b"\r0\r\n\r\n", 400),
    "a trailer that is none": (CHUNKED + b"0\r\n", b"no colon\r\n", 400),
    "a folded trailer": (CHUNKED + b"0\r\nX: y\r\n", b" z\r\n", 400),
    "a trailer with LF": (CHUNKED + b"0\r\n", b"X: y\n", 400),
    "a length in the trailers": (CHUNKED + b"0\r\n", b"Content-Length: 5\r\n\r\n", 400),
    "a Host in the trailers": (CHUNKED + b"0\r\nX: y\r\n", b"Host: b.test\r\n\r\n", 400),
    "too many trailers": (CHUNKED + b"0\r\n" + b"X: y\r\n" * 128, b"X: y\r\n", 400),
    "trailers that are too long": (
        CHUNKED + b"0\r\n" + b"X: %s\r\n" % (b"y" * 9000),
        b"X: %s\r\n" % (b"y" * 9000),
        400,
    ),
}


@pytest.mark.parametrize(("before", "wrong", "status"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_not_forwarded(before: bytes, wrong: bytes, status: int) -> None:
    assert in_every_way(FIRST, before + wrong + NEXT) == Verdict(before, Phase.REFUSED, status, None)


def test_nothing_is_forwarded_after_a_refusal() -> None:
    follower = following(FIRST)
    assert follower.feed(b"GET / HTTP/1.1\r\n\r\n") == []
    assert follower.feed(FIRST) == []
    assert follower.is_over


def test_an_end_in_the_middle_of_a_head_is_refused_and_elsewhere_is_an_end() -> None:
    assert followed(FIRST, [NEXT, b"GET / HT"], ended=True) == Verdict(NEXT, Phase.REFUSED, 400, None)
    for rest in (b"", b"\r\n", NEXT[:-1], CHUNKED + b"5"):
        verdict = followed(FIRST, [NEXT + rest], ended=True)
        assert verdict.status is None
        assert (NEXT + rest).startswith(verdict.forwarded)


@pytest.mark.parametrize("start", [b"G", b"\r\nG", b"GET / HTTP/1.1\r\nHost: a.test\r\n\r"])
def test_a_head_that_has_begun_is_told_from_silence(start: bytes) -> None:
    for silence in (b"", b"\r", b"\r\n", NEXT, NEXT[:-1]):
        follower = following(FIRST)
        follower.feed(silence)
        assert not follower.head_begun
    follower = following(FIRST)
    follower.feed(NEXT + start)
    assert follower.head_begun
    follower.give_up(10)
    assert follower.refusal is not None
    assert (follower.refusal.status, follower.feed(b"ET / ")) == (408, [])


# What needs a stream of its own


NEEDY: Final = {
    "another host": OTHER,
    "another host, with a body": NEXT.replace(b"A.test.", b"b.test"),
    "another host, with Upgrade": UPGRADE.replace(b"a.test", b"b.test"),
    "an absolute target of another host": b"GET http://b.test/ HTTP/1.1\r\nHost: b.test\r\n\r\n",
    "Upgrade": UPGRADE,
}


@pytest.mark.parametrize("needy", NEEDY.values(), ids=NEEDY.keys())
@pytest.mark.parametrize("before", [b"", NEXT, CHUNKED + b"1\r\nx\r\n0\r\n\r\n", b"\r\n"])
def test_it_is_the_next_request_and_nothing_of_it_is_forwarded(before: bytes, needy: bytes) -> None:
    verdict = in_every_way(FIRST, before + needy)
    empty_line = b"\r\n" if before == b"\r\n" else b""
    assert verdict == Verdict(before.removeprefix(empty_line), Phase.NEXT, None, empty_line + needy)
    at = len(before) + 9
    data = before + needy + b"and more"
    assert followed(FIRST, [data[:at], data[at:]]).next_request == empty_line + needy + b"and more"
    follower = following(FIRST)
    follower.feed(needy)
    assert follower.next_request == (head_of(needy), needy)
    with pytest.raises(LocalProtocolError):
        follower.feed(b"more")


@pytest.mark.parametrize("response", [b"HTTP/1.1 200 OK\r\n\r\nto the end", b"no response"])
def test_no_request_is_forwarded_after_a_response_that_only_the_gateway_ends(response: bytes) -> None:
    responses = ResponseFollower()
    follower = following(POST, responses)
    responses.feed(response)
    assert b"".join(follower.feed(b"abc" + FIRST)) == b"abc"
    assert follower.next_request == (head_of(FIRST), FIRST)


# Upgrade


def answered(response: bytes, first: bytes = UPGRADE) -> RequestFollower:
    responses = ResponseFollower()
    follower = following(first, responses)
    awaited = responses.awaits_upgrade
    responses.feed(response)
    assert (awaited, responses.awaits_upgrade) == (True, False)
    return follower


def test_what_follows_an_upgrade_is_held_until_the_response() -> None:
    responses = ResponseFollower()
    follower = following(UPGRADE, responses)
    assert follower.feed(b"\x81\x05") == []
    assert follower.holds
    with pytest.raises(LocalProtocolError):
        follower.feed(b"hello")
    responses.feed(SWITCHING)
    assert b"".join(follower.feed(b"")) == b"\x81\x05"
    assert b"".join(follower.feed(OTHER)) == OTHER
    assert follower.phase is Phase.OPAQUE


@pytest.mark.parametrize("status", [b"200 OK", b"204", b"426 Upgrade Required", b"500 \xff", b"304 "])
def test_an_upgrade_that_is_declined_goes_on_being_followed(status: bytes) -> None:
    responses = ResponseFollower()
    follower = following(UPGRADE, responses)
    follower.feed(NEXT + OTHER)
    responses.feed(b"HTTP/1.1 %s\r\nContent-Length: 0\r\n\r\n" % status)
    assert b"".join(follower.feed(b"")) == NEXT
    assert follower.next_request == (head_of(OTHER), OTHER)


@pytest.mark.parametrize("response", [b"\x81\x05hello\n", b"HTTP/1.1 101\n\r\n\r\n", b"HTTP/2 101 OK\r\n\r\n"])
def test_a_response_that_cannot_be_followed_switches_nothing(response: bytes) -> None:
    follower = answered(response)
    assert b"".join(follower.feed(FIRST)) == b""
    assert follower.next_request is not None


def test_the_body_of_a_request_with_upgrade_passes_and_what_follows_is_held() -> None:
    first = CHUNKED.replace(b"\r\n\r\n", b"\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n")
    responses = ResponseFollower()
    follower = following(first, responses)
    body = chunk(b"hello") + b"0\r\n\r\n"
    assert b"".join(follower.feed(body + b"PRI * HTTP/2.0")) == body
    assert follower.holds
    responses.feed(SWITCHING)
    assert b"".join(follower.feed(b"")) == b"PRI * HTTP/2.0"
    # A response that comes before the body is complete counts as well.
    follower = answered(SWITCHING, first)
    assert follower.phase is Phase.BODY
    assert b"".join(follower.feed(body + b"PRI")) == body + b"PRI"
    follower = answered(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\n\r\n", first)
    assert b"".join(follower.feed(body + NEXT)) == body + NEXT
    assert follower.phase is Phase.HEAD


@pytest.mark.parametrize(
    "first", [UPGRADE.replace(b"1.1", b"1.0"), UPGRADE.replace(b"Connection: Upgrade", b"Connection: close")]
)
def test_what_may_not_be_answered_with_101_is_no_upgrade(first: bytes) -> None:
    responses = ResponseFollower()
    follower = following(first, responses)
    assert not responses.awaits_upgrade
    assert b"".join(follower.feed(NEXT)) == NEXT


# Any bytes, in any pieces

TOKENS: Final = st.sampled_from([b"a", b"X-Y", b"sum"])
BODIES: Final = st.one_of(
    st.just(b"\r\n"),
    st.binary(max_size=300).map(lambda body: b"Content-Length: %d\r\n\r\n%s" % (len(body), body)),
    st.builds(
        lambda chunks, extensions, trailers: (
            b"Transfer-Encoding: gzip, chunked\r\n\r\n"
            + b"".join(
                chunk(data, extension) for data, extension in zip(chunks, itertools.cycle(extensions), strict=False)
            )
            + b"0\r\n"
            + b"".join(b"%s: %s\r\n" % (name, name) for name in trailers)
            + b"\r\n"
        ),
        st.lists(st.binary(min_size=1, max_size=100), max_size=5),
        st.lists(st.sampled_from([b"", b";a", b';b="c;\\"d"', b";e=f;g"]), min_size=1, max_size=3),
        st.lists(TOKENS, max_size=3),
    ),
)
HEADS: Final = st.builds(
    lambda empty, method, host, close: empty + method + b" / HTTP/1.1\r\nhost:" + host + b"\r\n" + close,
    st.sampled_from([b"", b"\r\n"]),
    st.sampled_from([b"GET", b"PUT", b"HEAD"]),
    st.sampled_from([b"a.test", b" A.TEST. \t", b"a.test:8080"]),
    st.sampled_from([b"", b"Connection: close\r\n"]),
)
REQUESTS: Final = st.builds(bytes.__add__, HEADS, BODIES)


def cut(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    position = 0
    for size in itertools.cycle(sizes):
        if position >= len(data):
            return
        yield data[position : position + size]
        position += size


SIZES: Final = st.lists(st.integers(1, 400), min_size=1, max_size=8)


@fuzzed()
@given(st.lists(REQUESTS, max_size=6), SIZES)
def test_valid_requests_pass_whole_in_any_pieces(requests: list[bytes], sizes: list[int]) -> None:
    data = b"".join(requests)
    assert followed(FIRST, cut(data, sizes)) == Verdict(data, Phase.HEAD, None, None)


@fuzzed()
@given(
    st.lists(st.one_of(REQUESTS, st.sampled_from([wrong for _, wrong, _ in WRONG.values()]), st.binary(max_size=20))),
    SIZES,
    st.data(),
)
@example([CHUNKED, b"3\r\nabc", b"\r"], [1], None)
def test_any_bytes_get_one_verdict_and_a_prefix_is_forwarded(
    parts: list[bytes], sizes: list[int], data: st.DataObject | None
) -> None:
    said = bytearray(b"".join(parts))
    if data is not None and said:
        said[data.draw(st.integers(0, len(said) - 1))] = data.draw(st.integers(0, 255))
    whole = followed(FIRST, [bytes(said)])
    assert followed(FIRST, cut(bytes(said), sizes)) == whole
    assert said.startswith(whole.forwarded)


@fuzzed()
@given(st.binary(max_size=200), SIZES, st.booleans())
def test_after_a_101_any_bytes_pass(said: bytes, sizes: list[int], early: bool) -> None:
    responses = ResponseFollower()
    follower = following(UPGRADE, responses)
    forwarded = b""
    if early:
        responses.feed(SWITCHING)
    for piece in cut(said, sizes):
        if follower.holds:
            responses.feed(SWITCHING)
            forwarded += b"".join(follower.feed(b""))
        forwarded += b"".join(follower.feed(piece))
    if follower.holds:
        responses.feed(SWITCHING)
        forwarded += b"".join(follower.feed(b""))
    assert forwarded == said


# What it costs


def test_many_small_requests_take_time_in_proportion_to_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that gets all bytes for each request would copy all of them for each request."""
    given_to_readers = 0

    class Counting:
        def __init__(self) -> None:
            self._reader = HeadReader()

        @property
        def received(self) -> bytes:
            return self._reader.received

        def feed(self, data: memoryview) -> RequestHead | None:
            nonlocal given_to_readers
            given_to_readers += len(data)
            return self._reader.feed(data)

    monkeypatch.setattr(requests_module, "HeadReader", Counting)
    data = (FIRST + SECOND).replace(b"1.1", b"1.0") * 500  # not plain ones, which no reader gets
    follower = following(FIRST)
    assert feed_all(follower, data) == data
    assert given_to_readers == len(data)


def test_a_line_that_comes_byte_by_byte_is_not_copied_for_each() -> None:
    reader = BodyReader()
    reader.begin(None, chunked=True)
    assert reader.read(b"0\r\n", 0) == 3
    lines = set()
    for byte in singly(b"X: ".ljust(16_000, b"y")):
        assert reader.read(byte, 0) is None
        lines.add(id(reader._line))
    assert len(lines) == 1
    assert reader.read(b"\r\n\r\n", 0) == 2
    assert reader.take_kept() == b"X: ".ljust(16_000, b"y")


HEADERS: Final = b"X: y\r\n" * 100 + b"\r\n"


@pytest.mark.parametrize(
    ("first", "item", "next_item", "most"),
    [
        (FIRST, FIRST, SECOND, 65),
        (FIRST, FIRST.replace(b"1.1", b"1.0"), SECOND.replace(b"1.1", b"1.0"), 33),
        (FIRST, FIRST[:-2] + HEADERS, SECOND[:-2] + HEADERS, 9),
        (CHUNKED, b"1\r\nx\r\n", b"1\r\ny\r\n", 600),
        (CHUNKED, b"1;a=b\r\nx\r\n", b"1;a=c\r\nx\r\n", 600),
        (CHUNKED, b"0\r\n\r\n" + CHUNKED, b"0\r\n\r\n" + CHUNKED.replace(b"POST", b"PUTS"), 33),
        (CHUNKED, b"0\r\n" + HEADERS + CHUNKED, b"0\r\n" + HEADERS + CHUNKED, 5),
    ],
    ids=["plain requests", "requests", "many headers", "chunks", "extended chunks", "empty bodies", "trailers"],
)
def test_a_turn_is_bounded_by_the_items_that_it_finds(first: bytes, item: bytes, next_item: bytes, most: int) -> None:
    """One read may have 40,000 chunks. Processing them in one call would delay all others."""
    follower = following(first)
    fed, data, forwarded = 0, (item + next_item) * 1000, b""
    turn = b"".join(follower.feed(data))
    while turn:
        fed += 1
        forwarded += turn
        assert len(turn) <= most * len(item)
        assert follower.work <= 600
        turn = b"".join(follower.feed(b"")) if follower.has_more else b""
    assert forwarded == data
    assert fed >= 2000 // most


def test_a_large_chunk_or_body_is_one_item() -> None:
    follower = following(CHUNKED)
    follower.feed(chunk(bytes(200_000)) + b"4000000\r\n")
    assert (follower.has_more, follower.work < 10) == (False, True)
    assert [len(piece) for piece in follower.feed(bytes(250_000))] == [250_000]


def test_nothing_new_is_taken_while_there_is_more_to_look_at() -> None:
    follower = following(FIRST)
    follower.feed(FIRST * 100)
    assert follower.has_more
    with pytest.raises(LocalProtocolError):
        follower.feed(FIRST)


async def test_a_flood_of_one_tenant_does_not_hold_up_another(mock_clock: trio.testing.MockClock) -> None:
    """Each of 200 connections sends 20,000 chunks at once; another tenant's visitor sends one request."""
    turns, order = Turns(), list[str]()

    async def visit(tenant: str, first: bytes, said: bytes) -> None:
        (ours, theirs), (gateway, far) = trio.testing.memory_stream_pair(), trio.testing.memory_stream_pair()
        visitor = adopt(ours)
        followed = FollowedLeg(leg_of(visitor), head_of(first), b"", Turn(turns, tenant, tenant), head_timeout=10)
        async with theirs, far, trio.open_nursery() as nursery:
            nursery.start_soon(lambda: pump(adopt(gateway), visitor, second_leg=followed))
            await theirs.send_all(said)
            left = len(said)
            while left:
                left -= len(await far.receive_some())
                order.append(tenant)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for _ in range(200):
            nursery.start_soon(visit, "flood", CHUNKED, b"1\r\nx\r\n" * 20_000)
        while len(order) < 50:
            await trio.lowlevel.checkpoint()
        before = len(order)
        nursery.start_soon(visit, "victim", FIRST, FIRST)
        while order.count("victim") == 0:
            await trio.lowlevel.checkpoint()
        assert order.index("victim") - before < 20
        nursery.cancel_scope.cancel()


def test_what_is_asked_for_at_once_is_small_where_requests_may_be() -> None:
    follower = following(FIRST)
    assert follower.read_size <= MAX_HEAD // 4
    follower.feed(b"PUT / HTTP/1.1\r\nHost: a.test\r\nContent-Length: 1000000\r\n\r\n")
    assert follower.read_size == 1_000_000
    follower.feed(bytes(999_999))
    assert follower.read_size <= MAX_HEAD
