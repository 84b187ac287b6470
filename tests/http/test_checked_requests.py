"""Requests that are checked one by one: what passes is what was allowed, whatever comes and in whatever pieces."""

from __future__ import annotations

import itertools
from collections.abc import Hashable

from hypothesis import given, strategies as st
from rig import request

from pioneer_tunnel._http.forwarded import HeaderRules
from pioneer_tunnel._http.head import HeadReader, RequestHead
from pioneer_tunnel._http.removing import without_headers
from pioneer_tunnel._http.requests import Phase, RequestFollower, RequestReader
from pioneer_tunnel._http.responses import ResponseFollower
from pioneer_tunnel._http.rewriting import RequestRewriter

REMOVES = frozenset({b"authorization"})
ALLOWED = "Authorization: yes"

bodies = st.sampled_from([b"", b"abc", request(ALLOWED), request()])
requests = st.tuples(st.sampled_from([(ALLOWED,), ("authorization:yes",), (), ("Authorization: no",)]), bodies)


def allows(head: RequestHead) -> bool:
    return head.values(b"authorization") == [b"yes"]


def stream_of(head: RequestHead) -> Hashable:
    return head.host if allows(head) else object()


def written(lines: tuple[str, ...], body: bytes) -> bytes:
    return request(*lines, "X-A: b", f"Content-Length: {len(body)}") + body


def passed_on(reader: RequestReader, data: bytes, cuts: list[int]) -> bytes:
    """What the reader lets pass of `data`, which comes in pieces."""
    passed = bytearray()
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    for start, end in itertools.pairwise(places):
        if reader.is_over:
            break
        pieces = reader.feed(data[start:end])
        passed += b"".join(map(bytes, pieces))
        while reader.has_more:
            passed += b"".join(map(bytes, reader.feed(b"")))
    return bytes(passed)


@given(sent=st.lists(requests, min_size=1, max_size=6), cuts=st.lists(st.integers(0, 10_000), max_size=20))
def test_nothing_passes_from_the_first_request_that_is_not_allowed(
    sent: list[tuple[tuple[str, ...], bytes]], cuts: list[int]
) -> None:
    first = written((ALLOWED,), b"")
    head = HeadReader().feed(first)
    assert head is not None
    expected, refused = b"", False
    for lines, body in sent:
        refused = refused or "yes" not in "".join(lines)
        expected += b"" if refused else written((), body)
    data = b"".join(written(lines, body) for lines, body in sent)
    rules = HeaderRules(set_forwarded=False, removed=REMOVES)
    readers: list[RequestReader] = [
        RequestFollower(head, ResponseFollower(), stream_of, REMOVES),
        RequestRewriter(rules, ResponseFollower(), allows),
    ]
    for reader in readers:
        assert passed_on(reader, data, cuts) == expected
        assert (reader.phase is Phase.NEXT) is refused
        if refused:
            assert reader.next_request is not None
            assert not allows(reader.next_request[0])


@given(lines=st.lists(st.sampled_from(["Authorization: a", "AUTHORIZATION:b", "X-Authorization: c", "A: d", "A: d"])))
def test_only_the_named_headers_are_removed(lines: list[str]) -> None:
    received = request(*lines)
    head = HeadReader().feed(received)
    assert head is not None
    kept = [line for line in lines if not line.lower().startswith("authorization")]
    for before in (b"", b"\r\n"):
        with_empty_line = HeadReader().feed(before + received)
        assert with_empty_line is not None
        changed = without_headers(with_empty_line, before + received + b"body", REMOVES)
        assert changed.removeprefix(b"\r\n") == request(*kept)
