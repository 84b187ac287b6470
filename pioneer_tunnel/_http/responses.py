"""Where each of a gateway's responses ends, so that the relay knows when a visitor's connection is free. No I/O.

`ResponseFollower` is the counterpart of a `RequestFollower`: `expect` tells it of each request head that is forwarded,
and `feed` takes what the gateway sends. No byte is changed. Rules:

    1. Responses answer requests in order. When no request is outstanding (`idle`), nothing from the gateway passes. A
       response may begin before its request is complete.
    2. The end of a response follows from its head and its request (RFC 9112, 6.3): HEAD, 204 and 304 have no body; an
       interim response (1xx) is followed by another response; a 101 to a request with Upgrade is followed by another
       protocol. Otherwise the body has a length or chunks, or ends with the gateway's stream.
    3. A response that a proxy in front of the relay could understand differently is not followed: the rest of the
       stream passes, and `idle` stays False. Examples are a malformed head, both Content-Length and Transfer-Encoding,
       an interim response or a 204 with a length, a 101 without an Upgrade, a malformed chunk. If such a response were
       followed, the proxy could see its end earlier than the relay, and a gateway could use the rest to answer the
       proxy's next request, which is for another host.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, Protocol, final

from .._model.errors import RemoteProtocolError
from .bodies import MAX_WORK, BodyReader, Data
from .head import FIELD, MAX_HEAD, VALUE, RequestHead, read_framing
from .plain import PLAIN_RESPONSE

__all__ = ["ResponseFollower", "ResponseObserver", "ResponsePhase"]

_HEAD_COST: Final = 8  # in units of `Turn.spend`
_PLAIN_COST: Final = 2
_START: Final = b"HTTP/1."
_HEAD_END: Final = b"\r\n\r\n"
_HEAD: Final = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: %s)?+\r\n(?:%s\r\n)*+\r\n" % (VALUE, FIELD))
_BARE_LF: Final = re.compile(rb"(?<!\r)\n")
_FRAMING: Final = re.compile(rb"\r\n(content-length|transfer-encoding):([^\r]*+)", re.IGNORECASE)

_SWITCHING: Final = 101
_NO_CONTENT: Final = 204
_NOT_MODIFIED: Final = 304


class ResponsePhase(enum.Enum):
    """What the next byte from the gateway belongs to."""

    __hash__ = object.__hash__  # that of `Enum` is a Python function

    HEAD = "a head, if a request is outstanding"
    BODY = "a body whose end can be found"
    LAST_BODY = "a body that ends with the gateway's stream"
    SWITCHED = "another protocol than HTTP"
    UNKNOWN = "a response that cannot be followed"


class _Found(enum.Enum):
    __hash__ = object.__hash__  # as above

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
    """What the end of a response depends on in its request."""

    omit_body: bool
    upgrade: bool


_BY_PLAIN_REQUEST: Final = _Expected(omit_body=False, upgrade=False)


class _Head(NamedTuple):
    """What a head says of the end of its response, as it is written there."""

    version: bytes
    status: int
    lengths: list[bytes]
    codings: list[bytes]


class ResponseObserver(Protocol):
    """Gets the requests and responses of one stream, in order."""

    def expected(self, head: RequestHead) -> None:
        """A request is forwarded."""

    def answered(self, status: int) -> None:
        """The oldest request without an answer gets one, of this status. Interim responses do not count."""

    def passed(self, amount: int) -> None:
        """So many bytes of that answer follow its head."""

    def ended(self) -> None:
        """That answer is whole."""


@final
class ResponseFollower:
    """Follows the responses of one stream to a gateway. See the module.

    Args:
        observer: gets them; None for none.

    Attributes:
        phase: what the next byte belongs to.
        work: the cost of the last `feed`, in units of `Turn.spend`.
    """

    __slots__ = ("_body", "_expected", "_head", "_max_work", "_observer", "phase", "work")

    def __init__(self, observer: ResponseObserver | None = None) -> None:
        self._observer: Final = observer
        self.phase = ResponsePhase.HEAD
        self.work = 0
        self._max_work = MAX_WORK
        # Of each request without a final response. They are few, and a deque takes 1.2 KiB more.
        self._expected: Final[list[_Expected]] = []
        self._head: Final = bytearray()  # the part of an incomplete head that earlier pieces had
        self._body: Final = BodyReader()

    @property
    def observed(self) -> bool:
        """Whether an observer gets the requests and responses."""
        return self._observer is not None

    @property
    def outstanding(self) -> int:
        """Requests without a final response."""
        return len(self._expected)

    @property
    def idle(self) -> bool:
        """True when each request has its whole response."""
        return self.phase is ResponsePhase.HEAD and not self._expected

    @property
    def awaits_upgrade(self) -> bool:
        """True while the last request has Upgrade and no final response."""
        return bool(self._expected) and self._expected[-1].upgrade

    @property
    def is_last(self) -> bool:
        """True when the response ends with the gateway's stream, so that no other can follow."""
        return self.phase is ResponsePhase.LAST_BODY or self.phase is ResponsePhase.UNKNOWN

    def expect(self, head: RequestHead) -> None:
        """Expect the response to a request with this head."""
        self._expected.append(_Expected(head.omit_body, head.asks_upgrade))
        if self._observer is not None:
            self._observer.expected(head)

    def expect_plain(self) -> None:
        """Expect the response to a plain request, of which no head was made. Only without an observer."""
        self._expected.append(_BY_PLAIN_REQUEST)

    def feed(self, data: Data, start: int = 0, max_work: int = MAX_WORK) -> int:
        """Take the gateway's bytes from `data[start:]`. Returns the position up to which they may pass.

        If that is not all, either the follower is `idle` and the rest answers no request, or `work` has reached
        `max_work` and the rest is for the next call.
        """
        self.work, self._max_work = 0, max_work
        end = len(data)
        while start < end and self.work < max_work and (self._expected or self.phase is not ResponsePhase.HEAD):
            read = _READERS.get(self.phase)
            if read is None:
                if self._observer is not None:
                    self._observer.passed(end - start)
                return end
            try:
                start = read(self, data, start)
            except RemoteProtocolError:
                self.stop()
        return start

    def stop(self) -> None:
        """Follow no more: the rest of the stream passes."""
        self._go(_Found.NONSENSE)
        self._expected.clear()

    def _read_head(self, data: Data, start: int) -> int:
        kept = self._head
        if not kept and not self._expected[0].omit_body:
            plain = PLAIN_RESPONSE.match(data, start, start + MAX_HEAD)
            if plain is not None:
                return self._pass_plain(plain, data)
        begun = len(kept)
        self.work += _HEAD_COST
        end = _end_of_head(kept, data, start)
        if begun + (end or len(data)) - start > MAX_HEAD:
            raise RemoteProtocolError("the head of a response is too long")
        kept += memoryview(data)[start:end]
        if end is not None:
            head = bytes(kept)
            kept.clear()
            self._take_head(_parse(head))
            return end
        # Before the end of a head, find only what could keep that end from ever coming.
        if not _START.startswith(bytes(kept[: len(_START)])) or _BARE_LF.search(kept, begun):
            raise RemoteProtocolError("the head of a response is malformed")
        return len(data)

    def _pass_plain(self, plain: re.Match[bytes], data: Data) -> int:
        """Take the head of a plain response; and its body, if all of it has come. The general way does the same."""
        self.work += _PLAIN_COST
        del self._expected[0]
        observer, begin = self._observer, plain.end()
        length = None if plain[2] is None else int(plain[2])
        if observer is not None:
            observer.answered(int(plain[1]))
        if length is None or begin + length > len(data):
            self._body.begin(length, chunked=length is None)
            self._go(_Found.WITH_BODY)
            return begin
        if observer is not None:
            if length:
                observer.passed(length)
            observer.ended()
        return begin + length

    def _take_head(self, head: _Head) -> None:
        version, status, lengths, codings = head
        if status < 200 and status != _SWITCHING:
            if lengths or codings or version == b"1.0":
                raise RemoteProtocolError("an interim response is not a plain one")
            self._go(_Found.INTERIM)
            return
        if status == _NO_CONTENT and (codings or lengths not in ([], [b"0"])):
            raise RemoteProtocolError("a response without a body has a length")
        omit_body, upgrade = self._expected.pop(0)
        if self._observer is not None:
            self._observer.answered(status)
        if status == _SWITCHING:
            if not upgrade:
                raise RemoteProtocolError("a response is a 101 that was not asked for")
            self._go(_Found.SWITCHING)
        elif omit_body or status in {_NO_CONTENT, _NOT_MODIFIED}:
            self._go(_Found.WITHOUT_BODY)
            self._tell_end()
        else:
            content_length, chunked = read_framing(lengths, codings, version)
            self._body.begin(content_length, chunked=chunked)
            if not self._body.complete:
                self._go(_Found.WITH_BODY)
            else:
                self._go(_Found.WITHOUT_LENGTH if content_length is None else _Found.WITHOUT_BODY)
                if content_length is not None:
                    self._tell_end()

    def _read_body(self, data: Data, start: int) -> int:
        self._body.work = self.work
        end = self._body.read(data, start, self._max_work)
        self.work = self._body.work
        end = len(data) if end is None else end
        if self._observer is not None:
            self._observer.passed(end - start)
        if self._body.complete:
            self._go(_Found.END)
            self._tell_end()
        return end

    def _tell_end(self) -> None:
        if self._observer is not None:
            self._observer.ended()

    def _go(self, found: _Found) -> None:
        self.phase = _TRANSITIONS[self.phase][found]


# Not in each follower: there, bound methods would be a reference cycle.
_READERS: Final[Mapping[ResponsePhase, Callable[[ResponseFollower, Data, int], int]]] = {
    ResponsePhase.HEAD: ResponseFollower._read_head,
    ResponsePhase.BODY: ResponseFollower._read_body,
}


def _parse(head: bytes) -> _Head:
    match = _HEAD.fullmatch(head)
    if match is None:
        raise RemoteProtocolError("the head of a response is malformed")
    lengths: list[bytes] = []
    codings: list[bytes] = []
    for name, value in _FRAMING.findall(head, match.end(2)):
        (lengths if name.lower() == b"content-length" else codings).append(value.strip(b" \t"))
    return _Head(b"1." + match[1], int(match[2]), lengths, codings)


def _end_of_head(kept: bytearray, data: Data, start: int) -> int | None:
    """The position after the head that begins with `kept`; None when `data` does not have its end."""
    length = len(_HEAD_END)
    overlap = bytes(kept[1 - length :])
    found = (overlap + data[start : start + length - 1]).find(_HEAD_END)
    if found >= 0:
        return start + found + length - len(overlap)
    found = data.find(_HEAD_END, start, start + MAX_HEAD)
    return found + length if found >= 0 else None
