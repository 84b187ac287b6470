"""Reading request heads, for tests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pioneer_tunnel._http.head import (
    BadRequest,
    HeadReader,
    RequestHead,
)

Verdict = RequestHead | tuple[int, str] | None


def verdict(pieces: Iterable[bytes], **bounds: int) -> Verdict:
    """The head, the status and reason of its refusal, or None when more is needed."""
    reader = HeadReader(**bounds)
    fed = b""
    for piece in pieces:
        fed += piece
        try:
            head = reader.feed(piece)
        except BadRequest as refused:
            return refused.status, refused.reason
        assert reader.received == fed
        if head is not None:
            return head
    return None


def singly(data: bytes) -> Iterator[bytes]:
    return (data[index : index + 1] for index in range(len(data)))


def read(data: bytes) -> RequestHead:
    found = verdict([data])
    assert isinstance(found, RequestHead), found
    return found


def request(*lines: bytes, first: bytes = b"GET / HTTP/1.1", host: bytes | None = b"a.example") -> bytes:
    """A valid request, with the changes of the test."""
    hosts = [] if host is None else [b"Host: " + host]
    return b"\r\n".join([first, *hosts, *lines, b"", b""])
