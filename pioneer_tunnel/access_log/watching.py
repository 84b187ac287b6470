"""Finds the requests in a stream that is passed on unread, for its entries. No I/O.

It looks at copies of the bytes and changes nothing. Where the bytes are no HTTP/1, or cannot be followed any further,
it stops looking. A stream in which it has not found a whole request gets the entry of a stream.
"""

from __future__ import annotations

import sys
from typing import Final, final

from .._http.bodies import BodyReader, Data
from .._http.head import RequestHead
from .._http.requests import Phase, RequestReader
from .._http.responses import ResponseFollower
from .._model.counters import UNCOUNTED
from .following import RequestLog, StreamLog, VisitorLog

__all__ = ["Watch"]

MOST_HELD: Final = 64 * 1024
"""Bytes after a request with Upgrade that are kept until its response has come."""

MOST_OUTSTANDING: Final = 1024
"""Requests without a response that are remembered. A visitor may send many more than the local server reads."""


@final
class _Requests(RequestReader):
    """Follows requests of any host."""

    def _take_head(self, head: RequestHead, received: bytes, data: Data, start: int, end: int) -> bool:  # noqa: ARG002
        self._begin_body(head)
        return True


@final
class Watch:
    """Watches one stream.

    Args:
        visitor: writes the entries.
        raw: whether it is known that the stream is not HTTP.
    """

    def __init__(self, visitor: VisitorLog, *, raw: bool = False) -> None:
        self.stream: Final = StreamLog(visitor, from_visitor=UNCOUNTED, to_visitor=UNCOUNTED)
        self._log: Final = RequestLog(visitor)
        self._responses: Final = ResponseFollower(self._log)
        self._requests: Final = _Requests(self._responses, BodyReader())
        self._held = b""
        self._found = False
        self._lost = raw

    @property
    def read_size(self) -> int:
        """The most bytes to take from the visitor at once. The bound keeps calls short: they may be many requests."""
        return sys.maxsize if self._lost else self._requests.read_size

    def from_visitor(self, data: bytes) -> None:
        """The visitor has sent `data`."""
        self.stream.from_visitor.total += len(data)
        if not self._lost:
            self._follow(data)

    def to_visitor(self, data: bytes) -> None:
        """The visitor gets `data`."""
        self.stream.to_visitor.total += len(data)
        responses, passed = self._responses, 0
        if self._lost:
            return
        while passed < len(data) and not responses.idle:
            passed = responses.feed(data, passed)
        if passed < len(data):
            self._lost = True
        elif self._held:
            self._follow(b"")

    def _follow(self, data: bytes) -> None:
        requests = self._requests
        if requests.holds and self._responses.awaits_upgrade:
            self._held += data
            self._lost = len(self._held) > MOST_HELD
            return
        data, self._held = self._held + data, b""
        requests.feed(data)
        while requests.has_more:
            requests.feed(b"")
        outstanding = self._responses.outstanding
        if requests.phase is Phase.REFUSED:
            self._lost = True
        else:
            self._found = self._found or outstanding > 0
            self._lost = outstanding > MOST_OUTSTANDING

    def end(self, *, in_order: bool) -> None:
        """The stream has ended; `in_order` if both sides ended it."""
        self._log.end(in_order=in_order and not self._lost)
        if not self._found:
            self.stream.end(in_order=in_order)
