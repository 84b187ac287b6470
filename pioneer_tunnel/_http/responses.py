"""Where each of a gateway's responses ends, so that the relay knows when a visitor's connection is free. No I/O.

`ResponseFollower` stands beside the `RequestFollower` of the same connection. It is told of each request head that is
forwarded (`expect`) and is fed what the gateway sends (`feed`). No byte is changed. It keeps to these rules:

    1. Responses answer requests in their order. When no request is outstanding (`idle`), the gateway has nothing to
       send, and nothing that it sends passes. A response may begin before its request is complete.
    2. The end of a response follows from its head and from its request, by RFC 9112, 6.3: at once for HEAD, 204 and
       304, after an interim response (1xx) comes another one, after a 101 to a request with Upgrade comes another
       protocol. Otherwise the body has a length or chunks, or ends with the gateway's stream.
    3. What a proxy in front of the relay could understand in another way is not followed: the rest of the stream
       passes, and `idle` never becomes true again. Examples are a malformed head, both Content-Length and
       Transfer-Encoding, an interim response or a 204 with a length, a 101 that was not asked for, a malformed chunk.
       If such a response were followed, a gateway could have the relay wait for an end that the proxy sees earlier,
       and then answer the proxy's next request, which is for another host.
"""

from __future__ import annotations

import enum
import re
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, final

from .._model.errors import RemoteProtocolError
from .bodies import MAX_WORK, BodyReader, Data
from .head import FIELD, MAX_HEAD, VALUE, RequestHead, read_framing, wants_upgrade

__all__ = ["ResponseFollower", "ResponsePhase"]

_HEAD_COST: Final = 8  # in units of `Turn.spend`
_START: Final = b"HTTP/1."
_HEAD_END: Final = b"\r\n\r\n"
_HEAD: Final = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: %s)?+\r\n(?:%s\r\n)*+\r\n" % (VALUE, FIELD))
_BARE_LF: Final = re.compile(rb"(?<!\r)\n")
_FRAMING: Final = re.compile(rb"\r\n(content-length|transfer-encoding):([^\r]*+)", re.IGNORECASE)

_SWITCHING: Final = 101
_NO_CONTENT: Final = 204
_NOT_MODIFIED: Final = 304


class ResponsePhase(enum.Enum):
    """What the next byte of the gateway belongs to."""

    HEAD = "a head, if a request is outstanding"
    BODY = "a body whose end can be found"
    LAST_BODY = "a body that ends with the gateway's stream"
    SWITCHED = "another protocol than HTTP"
    UNKNOWN = "what cannot be followed"


class _Found(enum.Enum):
    INTERIM = "the head of an interim response"
    WITHOUT_BODY = "the head of a response without a body"
    WITH_BODY = "a head with a length or chunks"
    WITHOUT_LENGTH = "a head with neither"
    SWITCHING = "the head of a 101"
    END = "the end of a body"
    NONSENSE = "something malformed or ambiguous"


_TRANSITIONS: Final[Mapping[ResponsePhase, Mapping[_Found, ResponsePhase]]] = {
    ResponsePhase.HEAD: {
        _Found.INTERIM: ResponsePhase.HEAD,
        _Found.WITHOUT_BODY: ResponsePhase.HEAD,
        _Found.WITH_BODY: ResponsePhase.BODY,
        _Found.WITHOUT_LENGTH: ResponsePhase.LAST_BODY,
        _Found.SWITCHING: ResponsePhase.SWITCHED,
        _Found.NONSENSE: ResponsePhase.UNKNOWN,
    },
    ResponsePhase.BODY: {_Found.END: ResponsePhase.HEAD, _Found.NONSENSE: ResponsePhase.UNKNOWN},
    ResponsePhase.LAST_BODY: {},
    ResponsePhase.SWITCHED: {},
    ResponsePhase.UNKNOWN: {},
}


class _Expected(NamedTuple):
    """What the end of a response depends on, of its request."""

    omit_body: bool
    upgrade: bool


@final
class ResponseFollower:
    """Follows the responses of one stream to a gateway. See the module.

    Attributes:
        phase: what the next byte belongs to.
        work: what the last call of `feed` has cost, in units of `Turn.spend`.
    """

    def __init__(self) -> None:
        self.phase = ResponsePhase.HEAD
        self.work = 0
        self._most = MAX_WORK
        self._expected: Final[deque[_Expected]] = deque()  # of each request that has no final response yet
        self._head: Final = bytearray()  # the part of a head that earlier pieces held
        self._body: Final = BodyReader()
        self._readers: Final[Mapping[ResponsePhase, Callable[[Data, int], int]]] = {
            ResponsePhase.HEAD: self._read_head,
            ResponsePhase.BODY: self._read_body,
        }

    @property
    def outstanding(self) -> int:
        """How many requests have no final response yet."""
        return len(self._expected)

    @property
    def idle(self) -> bool:
        """True when each request has its whole response, and no byte of another one has come."""
        return self.phase is ResponsePhase.HEAD and not self._expected

    @property
    def awaits_upgrade(self) -> bool:
        """True while the last request is one with Upgrade that has no final response."""
        return bool(self._expected) and self._expected[-1].upgrade

    @property
    def is_last(self) -> bool:
        """True when only the gateway's stream ends the response, so that no other one can come after it."""
        return self.phase is ResponsePhase.LAST_BODY or self.phase is ResponsePhase.UNKNOWN

    def expect(self, head: RequestHead) -> None:
        """A request is forwarded, of which this is the head."""
        self._expected.append(_Expected(head.omit_body, wants_upgrade(head) is not None))

    def feed(self, data: Data, start: int = 0, most: int = MAX_WORK) -> int:
        """Take what the gateway sends next, from `start` on; returns the position up to which it may pass.

        That is less than all when the follower is `idle`: the rest answers nothing. Otherwise `work` is `most`, give or
        take one item, and the rest is for the next call.
        """
        self.work, self._most = 0, most
        while start < len(data) and self.work < most and not self.idle:
            read = self._readers.get(self.phase)
            if read is None:
                return len(data)
            try:
                start = read(data, start)
            except RemoteProtocolError:
                self._go(_Found.NONSENSE)
                self._expected.clear()
        return start

    def _read_head(self, data: Data, start: int) -> int:
        kept = self._head
        begun = len(kept)
        self.work += _HEAD_COST
        end = _end_of_head(kept, data, start)
        if begun + (end or len(data)) - start > MAX_HEAD:
            raise RemoteProtocolError("the head of a response is too long")
        kept += memoryview(data)[start:end]
        if end is not None:
            head = bytes(kept)
            kept.clear()
            self._read_whole_head(head)
            return end
        # Not all that is malformed is found before the end of a head, but what may never have such an end is.
        if not _START.startswith(bytes(kept[: len(_START)])) or _BARE_LF.search(kept, begun):
            raise RemoteProtocolError("the head of a response is malformed")
        return len(data)

    def _read_whole_head(self, head: bytes) -> None:
        match = _HEAD.fullmatch(head)
        if match is None:
            raise RemoteProtocolError("the head of a response is malformed")
        status = int(match[2])
        lengths: list[bytes] = []
        codings: list[bytes] = []
        for name, value in _FRAMING.findall(head, match.end(2)):
            (lengths if name.lower() == b"content-length" else codings).append(value.strip(b" \t"))
        if status < 200 and status != _SWITCHING:
            if lengths or codings or match[1] == b"0":
                raise RemoteProtocolError("an interim response is not a plain one")
            self._go(_Found.INTERIM)
            return
        if status == _NO_CONTENT and (codings or lengths not in ([], [b"0"])):
            raise RemoteProtocolError("a response without a body has a length")
        omit_body, upgrade = self._expected.popleft()
        if status == _SWITCHING:
            if not upgrade:
                raise RemoteProtocolError("a response is a 101 that was not asked for")
            self._go(_Found.SWITCHING)
        elif omit_body or status in {_NO_CONTENT, _NOT_MODIFIED}:
            self._go(_Found.WITHOUT_BODY)
        else:
            content_length, chunked = read_framing(lengths, codings, b"1." + match[1])
            self._body.begin(content_length, chunked=chunked)
            if not self._body.complete:
                self._go(_Found.WITH_BODY)
            else:
                self._go(_Found.WITHOUT_LENGTH if content_length is None else _Found.WITHOUT_BODY)

    def _read_body(self, data: Data, start: int) -> int:
        self._body.work = self.work
        end = self._body.read(data, start, self._most)
        self.work = self._body.work
        if self._body.complete:
            self._go(_Found.END)
        return len(data) if end is None else end

    def _go(self, found: _Found) -> None:
        self.phase = _TRANSITIONS[self.phase][found]


def _end_of_head(kept: bytearray, data: Data, start: int) -> int | None:
    """The position after the head of which `kept` is the first part; None when its end has not come."""
    length = len(_HEAD_END)
    overlap = bytes(kept[1 - length :])
    found = (overlap + data[start : start + length - 1]).find(_HEAD_END)
    if found >= 0:
        return start + found + length - len(overlap)
    found = data.find(_HEAD_END, start, start + MAX_HEAD)
    return found + length if found >= 0 else None
