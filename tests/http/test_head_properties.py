"""Request heads of all kinds: the verdict does not depend on the pieces, h11 agrees, and reading takes linear time."""

from __future__ import annotations

import itertools
import re
from typing import Any, SupportsIndex

import h11
import pytest
from fuzzing import fuzzed
from heads import read, request, singly, verdict
from hypothesis import example, given, strategies as st

from pioneer_tunnel._http import head as head_module
from pioneer_tunnel._http.head import (
    MAX_HEAD,
    MAX_HEADERS,
    MAX_LINE,
    BadRequest,
    HeadReader,
    RequestHead,
    likely_host,
)

# Requests, right and nearly right


tokens = st.text("!#$%&'*+.^_`|~09AZaz-", min_size=1, max_size=12).map(str.encode)
framing = {b"host", b"content-length", b"transfer-encoding"}
visible = st.binary(min_size=1, max_size=12).map(lambda raw: re.sub(rb"[^!-~\x80-\xff]", b"v", raw))
values = st.lists(visible, max_size=3).map(b" \t".join)
spaces = st.sampled_from([b"", b" ", b"\t", b" \t "])
targets = st.text("/abc?=&%20.~:@", max_size=20).map(lambda text: b"/" + text.encode())
hosts = st.sampled_from([b"a.example", b"A.Example.", b"b.example:8080", b"[2001:DB8::1]:1", b"203.0.113.9"])
bodies = st.sampled_from([None, b"Content-Length: 0", b"content-length:12", b"Transfer-Encoding: chunked"])


def field(name: bytes, before: bytes, value: bytes, after: bytes) -> bytes:
    return name + b":" + before + value + after


fields = st.builds(field, tokens.filter(lambda name: name.lower() not in framing), spaces, values, spaces)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    lines = draw(st.lists(fields, max_size=6))
    lines.insert(draw(st.integers(0, len(lines))), field(b"hOst", draw(spaces), draw(hosts), draw(spaces)))
    body = draw(bodies)
    version = draw(st.sampled_from([b"1.0", b"1.1"]))
    if body is not None and (b"chunked" not in body or version == b"1.1"):
        lines.insert(draw(st.integers(0, len(lines))), body)
    # h11 has a state of its own for CONNECT, which has a test of its own here.
    method = draw(tokens.filter(lambda name: name != b"CONNECT"))
    return request(*lines, first=b"%s %s HTTP/%s" % (method, draw(targets), version), host=None)


FRAGMENTS = [
    *(bytes([char]) for char in b"\r\n \t\0\x0b\x0c\x7f\x80:,;/[@1"),
    b"\r\n",
    b"\r\n\r\n",
    b"\r\n folded",
    b"HTTP/1.1",
    b"\r\nHost: b.example",
    b"\r\nContent-Length: 3",
    b"\r\nContent-Length: 03, 3",
    b"\r\nTransfer-Encoding: chunked",
    b"\r\nTransfer-Encoding: gzip, chunked",
    b"X" * 200,
]


@st.composite
def nearly_requests(draw: st.DrawFn) -> bytes:
    data = draw(requests())
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 2)))
        data = data[:start] + draw(st.sampled_from(FRAGMENTS) | st.just(b"")) + data[end:]
    return data


anything = nearly_requests() | st.binary(max_size=300)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    borders = [0, *sorted(place for place in places if place < len(data)), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(borders)]


@fuzzed()
@given(anything, st.lists(st.integers(0, 400), max_size=12))
@example(b"\r\n" + request(), [1])
@example(request(), [15])
@example(b"\r\n\n", [2])
def test_the_verdict_does_not_depend_on_the_pieces(data: bytes, places: list[int]) -> None:
    bounds = {"max_head": 300, "max_line": 150, "max_headers": 6}
    for limits in ({}, bounds):
        whole = verdict([data], **limits)
        assert verdict(cut(data, places), **limits) == whole
        assert verdict(singly(data), **limits) == whole
        # What comes after a verdict has no say in it.
        if whole is not None:
            assert verdict([data + b"\n\0more"], **limits) == whole


@pytest.mark.parametrize(
    ("received", "host"),
    [
        (request(host=b"a.example"), "a.example"),
        (request(b"Accept: */*", host=b"\tA.Example.:8080 "), "a.example"),
        (request(host=b"a.example") + b"body", "a.example"),
        (request(host=b"a.example")[:-1], None),
        (request(host=b"[2001:db8::1]"), None),
        (request(host=b"[2001:db8::1]") + request(), None),
        (b"\r\n" + request(), None),
        (request(host=None), None),
        (b"\x16\x03\x01", None),
    ],
)
def test_the_likely_host(received: bytes, host: str | None) -> None:
    assert likely_host(received) == host


@fuzzed()
@given(anything, st.integers(0, 400))
def test_the_likely_host_is_the_host_of_a_request_that_makes_sense(data: bytes, end: int) -> None:
    likely = likely_host(data[:end])
    try:
        head = HeadReader().feed(data)
    except BadRequest:
        return
    assert likely is None or head is None or likely == head.host


# h11, which reads the same language with more patience


def read_by_h11(data: bytes) -> tuple[h11.Request, int] | None:
    """The request that h11 reads and the length of its head; None when it needs more.

    Raises:
        h11.RemoteProtocolError: it is none.
    """
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
    connection.receive_data(data)
    event = connection.next_event()
    if event is h11.NEED_DATA:
        return None
    assert isinstance(event, h11.Request)
    return event, len(data) - len(connection.trailing_data[0])


def same(head: RequestHead, data: bytes) -> None:
    read = read_by_h11(data)
    assert read is not None
    request, length = read
    assert (head.method, head.target, head.version) == (request.method, request.target, request.http_version)
    # h11 puts the coding in lower case, and the headers as they were are what we forward.
    ours = [(name, value.lower() if name == b"transfer-encoding" else value) for name, value in head.headers]
    assert ours == list(request.headers)
    assert head.length == length


@fuzzed()
@given(requests(), st.binary(max_size=20))
def test_a_right_request_is_read_as_h11_reads_it(data: bytes, tail: bytes) -> None:
    head = read(data + tail)
    assert head.length == len(data)
    same(head, data + tail)


@fuzzed()
@given(anything)
def test_what_h11_refuses_is_refused(data: bytes) -> None:
    """We take nothing that h11 does not take in the same sense; two things apart, which are ours by choice.

    h11 refuses the empty line before a request, and knows no transfer coding but `chunked`. The other way round there
    is no such rule: h11 repairs much that we refuse (bare LF, folded headers, equal Content-Lengths).
    """
    found = verdict([data])
    if not isinstance(found, RequestHead):
        return
    if any(coding.lower() != b"chunked" for coding in found.values(b"transfer-encoding")):
        return
    if data.startswith(b"\r\n"):
        found = read(data[2:])
        data = data[2:]
    same(found, data)


# What it costs


class CountingBytes(bytearray):
    """A buffer that counts how many of its bytes are looked at or copied."""

    work = 0

    def find(self, sub: Any, start: Any = 0, end: Any = None, /) -> int:
        found = super().find(sub, start, end)
        self.work += (min(len(self), end) if found < 0 else found + 1) - start
        return found

    def __getitem__(self, key: Any) -> Any:
        self.work += len(range(*key.indices(len(self)))) if isinstance(key, slice) else 1
        return super().__getitem__(key)


class CountingPattern:
    """A pattern that counts the bytes that it is put to; each of ours takes time in proportion to them."""

    def __init__(self, pattern: re.Pattern[bytes]) -> None:
        self._pattern = pattern
        self.work = 0

    def fullmatch(self, data: bytearray, start: SupportsIndex, end: SupportsIndex) -> re.Match[bytes] | None:
        self.work += int(end) - int(start)
        return self._pattern.fullmatch(data, int(start), int(end))


HEADS = {
    "long lines": request(*[b"X: ".ljust(15000, b"y")] * 4),
    "many lines": request(*[b"X: ".ljust(500, b"y")] * (MAX_HEADERS - 1)),
    "a line without end": request()[:-2] + b"X:".ljust(MAX_LINE - 1),
    "a request line without end": b"GET /".ljust(MAX_LINE - 1, b"a"),
    "CRs": request()[:-2] + (b"\r" * 16000),
}


@pytest.mark.parametrize("size", [1, 7, 4096, MAX_HEAD])
@pytest.mark.parametrize("data", HEADS.values(), ids=HEADS.keys())
def test_each_byte_is_looked_at_a_fixed_number_of_times(
    data: bytes, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    patterns = [CountingPattern(head_module._REQUEST_LINE), CountingPattern(head_module._FIELD)]
    monkeypatch.setattr(head_module, "_REQUEST_LINE", patterns[0])
    monkeypatch.setattr(head_module, "_FIELD", patterns[1])
    reader = HeadReader()
    buffer = CountingBytes()
    reader._buffer = buffer
    for start in range(0, len(data), size):
        reader.feed(data[start : start + size])
    assert len(buffer) == len(data)
    work = buffer.work + sum(pattern.work for pattern in patterns)
    assert len(data) <= work <= 3 * len(data)


def test_no_pattern_tries_twice() -> None:
    """Every repetition without a bound is possessive, so that matching takes time in proportion to the bytes."""
    patterns = {name: value for name, value in vars(head_module).items() if isinstance(value, re.Pattern)}
    assert {"_REQUEST_LINE", "_FIELD", "_CODING"} <= patterns.keys()
    for name, pattern in patterns.items():
        without_escapes = re.sub(rb"\\.", b"e", pattern.pattern)
        without_classes = re.sub(rb"\[.*?\]", b"c", without_escapes)
        assert not re.search(rb"[*+]", re.sub(rb"[*+]\+", b"", without_classes)), name
