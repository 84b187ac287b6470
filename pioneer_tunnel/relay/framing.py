"""Where each of a visitor's requests ends, so that no later one goes to a tunnel that it does not name. No I/O.

A visitor's connection belongs to the tenant of its first head. A proxy in front of the relay may keep connections and
send another tenant's request on one, so `RequestFollower` follows the requests through everything a visitor says, and
tells which of it may be forwarded: slices of what came, in the order that it came, never written anew. Whoever makes
one has read the first head, has found a gateway for it, and forwards it. Then:

    feed      what the visitor says; returns what may be forwarded now. Of many small items only a part is looked at:
              while `has_more`, `feed(b"")` goes on, and takes nothing new
    end       the visitor has ended
    answer    what the gateway says, as long as `awaits_answer`; after it, `feed(b"")` returns what was held

What it keeps to:

    1. A head is forwarded when all of it was read, is right, and names the host of the first; the same parsed host that
       chose the gateway (`RequestHead.host`). Another host is a 421; what `head` refuses, it refuses here as well.
    2. A body is as long as its Content-Length says, or goes from chunk to chunk. The line of a chunk, its end and each
       trailer are forwarded when all of it was read; a malformed one is a 400. In a chunk's line stands no white space,
       which RFC 9112, 7.1.1 calls bad, and which readers understand in different ways.
    3. What is refused is forwarded to its last good byte, and from then on nothing is.
    4. A request with Upgrade may be the last that is HTTP. What comes after it is held until the gateway's answer is
       there: after a 101 the rest, both ways, is opaque; after any other final answer, and after one that cannot be
       read, requests go on being followed. An interim answer (100, 103) decides nothing.
    5. Answers are looked at for nothing else, so nobody knows here when one ends. An answer to an Upgrade can be told
       from an answer to something earlier only where nothing is earlier: so a later request with Upgrade has to start
       afresh, on a stream of its own to the same gateway, when everything before it is answered (`afresh`).
    6. `Connection: close` and HTTP/1.0 change nothing. Whether a gateway reads on after such a request is its own
       business; should it, it reads no request that was not followed.

The verdict depends on the bytes alone, not on the pieces that they come in. Nothing is kept but a head, a line, what is
held for an answer, and what starts afresh: one piece each at the most, beyond their bounds.

Neighbours: `head` reads heads; `followed_stream` has the sockets, and the deadlines.
"""

from __future__ import annotations

import enum
import re
import sys
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias, final

from ..errors import LocalProtocolError, RemoteProtocolError
from .head import MAX_HEAD, MAX_HEADERS, MAX_LINE, BadRequest, HeadReader, RequestHead, read_field, wants_upgrade

__all__ = ["Phase", "Piece", "RequestFollower"]

Data: TypeAlias = bytes | bytearray
Piece: TypeAlias = bytes | bytearray | memoryview

MAX_CHUNK_LINE: Final = 1024
"""Bytes of the line that begins a chunk, with its extensions and its end."""
MAX_TRAILERS: Final = 16 * 1024
"""Bytes of all trailers of a request together."""

_WORK: Final = 512
"""What a call of `feed` may cost in units of `Turn.spend`, give or take one item: some 30 heads, or 500 chunks."""
_HEAD_COST: Final = 16

_SMALL: Final = 16 * 1024
_LARGE: Final = 256 * 1024

_TOKEN: Final = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]++"
_QUOTED: Final = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*+"'
# 15 digits: every such size fits a signed 64-bit integer, so that no reader behind us wraps around.
_CHUNK_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,15}+)(?:;%s(?:=(?:%s|%s))?+)*+\r\n" % (_TOKEN, _TOKEN, _QUOTED))
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.[01] ([1-9][0-9][0-9])(?: [^\x00-\x08\x0a-\x1f\x7f]*+)?+\r\n")
_NOT_IN_TRAILERS: Final = frozenset({b"host", b"content-length", b"transfer-encoding"})
_HEAD_END: Final = b"\r\n\r\n"
_SWITCHING: Final = 101
_UNREADABLE: Final = 0


class Phase(enum.Enum):
    """What the next byte of the visitor belongs to."""

    HEAD = "a head, or nothing yet"
    BODY = "a body with a length"
    CHUNK_LINE = "the size of a chunk"
    CHUNK = "a chunk"
    CHUNK_END = "the line end after a chunk"
    TRAILERS = "the trailers after the last chunk"
    HELD = "what the answer to an Upgrade decides"
    OPAQUE = "another protocol than HTTP"
    AFRESH = "a request that needs a stream of its own"
    REFUSED = "nothing that is forwarded"


class _Found(enum.Enum):
    """What can be found, or decided."""

    LENGTH = "a head with a Content-Length"
    CHUNKED = "a head with chunks"
    UPGRADE = "a later head with Upgrade"
    SIZE = "a chunk's size"
    LAST = "the size of the last chunk, which is none"
    FILLED = "all of a chunk"
    LINE_END = "the line end after a chunk"
    END = "the end of a request"
    END_PENDING = "the end of one whose Upgrade is not answered"
    END_SWITCHED = "the end of one that was answered with 101"
    SWITCHED = "the answer 101"
    DECLINED = "another final answer"


_ENDS: Final = {
    _Found.END: Phase.HEAD,
    _Found.END_PENDING: Phase.HELD,
    _Found.END_SWITCHED: Phase.OPAQUE,
}
# A refusal may follow on any phase, and nothing follows on it.
_TRANSITIONS: Final[Mapping[Phase, Mapping[_Found, Phase]]] = {
    Phase.HEAD: {
        _Found.LENGTH: Phase.BODY,
        _Found.CHUNKED: Phase.CHUNK_LINE,
        _Found.UPGRADE: Phase.AFRESH,
        **_ENDS,
    },
    Phase.BODY: _ENDS,
    Phase.CHUNK_LINE: {_Found.SIZE: Phase.CHUNK, _Found.LAST: Phase.TRAILERS},
    Phase.CHUNK: {_Found.FILLED: Phase.CHUNK_END},
    Phase.CHUNK_END: {_Found.LINE_END: Phase.CHUNK_LINE},
    Phase.TRAILERS: _ENDS,
    Phase.HELD: {_Found.SWITCHED: Phase.OPAQUE, _Found.DECLINED: Phase.HEAD},
    Phase.OPAQUE: {},
    Phase.AFRESH: {},
    Phase.REFUSED: {},
}


@final
class RequestFollower:
    """Follows the requests of one visitor's connection. See the module.

    Args:
        head: the first; it is forwarded by whoever read it.

    Attributes:
        phase: what the next byte belongs to.
        refusal: what to answer when everything before it is answered, once the phase is `REFUSED`.
        heads: how many were found that may be forwarded, the first one counted.
        refused_at_head: True when that was for a request's head, so that nothing of that request was forwarded.
        afresh: what to start a stream of its own with, once the phase is `AFRESH`: the head, and all bytes from there.
        work: what the last call of `feed` has cost, in units of `Turn.spend`.
    """

    def __init__(self, head: RequestHead) -> None:
        self.phase = Phase.HEAD
        self.refusal: BadRequest | None = None
        self.refused_at_head = False
        self.heads = 0
        self.afresh: tuple[RequestHead, bytes] | None = None
        self._host: Final = head.host
        self._end = _Found.END if wants_upgrade(head) is None else _Found.END_PENDING
        self._answers: Final = _AnswerReader()
        self._heads = HeadReader()
        self._of_head = 0  # bytes of the next head that are with its reader
        self._lines: Final = _LineReader()
        self._omit_body = False  # in the response to the request whose body is read
        self._left = 0  # bytes of the body or the chunk that are still to come
        self._trailers = self._trailer_bytes = 0
        self._kept = b""  # what came in earlier pieces of the head or line that is whole now
        self._held = b""
        self._rest: tuple[Data, int] | None = None  # what was not looked at yet begins there
        self.work = 0
        self._readers: Final[Mapping[Phase, Callable[[Data, int], int | None]]] = {
            Phase.HEAD: self._read_head,
            Phase.BODY: self._read_body,
            Phase.CHUNK_LINE: self._read_chunk_line,
            Phase.CHUNK: self._read_chunk,
            Phase.CHUNK_END: self._read_chunk_end,
            Phase.TRAILERS: self._read_trailer,
        }
        self._begin_body(head)

    @property
    def is_over(self) -> bool:
        """True when nothing more will be forwarded, whatever comes."""
        return self.phase is Phase.REFUSED or self.phase is Phase.AFRESH

    @property
    def head_begun(self) -> bool:
        """True while a part of a head is there. The empty line that may stand before one is none."""
        return self._of_head > 2 or (self._of_head > 0 and self._heads.received not in {b"\r", b"\r\n"})

    @property
    def awaits_answer(self) -> bool:
        """True while what the gateway says has to be given to `answer`."""
        return self._end is _Found.END_PENDING

    @property
    def holds(self) -> bool:
        """True while it has bytes that wait for the answer, and takes no more."""
        return self.phase is Phase.HELD and bool(self._held)

    @property
    def has_more(self) -> bool:
        """True while there is something left of what it was fed that it has not looked at."""
        return self._rest is not None

    @property
    def appetite(self) -> int:
        """How many bytes to feed at the most, so that no call takes long: they may be many requests, or many chunks."""
        match self.phase:
            case Phase.OPAQUE:
                return sys.maxsize
            case Phase.BODY:
                return max(self._left, _SMALL)
            case Phase.CHUNK_LINE | Phase.CHUNK | Phase.CHUNK_END:
                return max(self._left, _LARGE)
        return _SMALL

    def feed(self, data: Data) -> list[Piece]:
        """Take what the visitor said next; returns what may be forwarded now.

        That is no copy of `data`, but views of it. A refusal is not raised: see `refusal`.

        Raises:
            LocalProtocolError: it holds bytes until the answer comes, has something to start afresh with, or, unless
                `data` is empty, has more to look at.
        """
        if self.holds or self.afresh is not None or (data and self.has_more):
            raise LocalProtocolError("the follower has to get rid of what came before this first")
        start = 0
        if self._rest is not None:
            (data, start), self._rest = self._rest, None
        elif self._held:
            data, self._held = self._held + data, b""
        self._kept = b""
        self.work = 0
        passed = start
        try:
            while passed < len(data) and (read := self._readers.get(self.phase)) is not None:
                if self.work >= _WORK:
                    self._rest = data, passed
                    break
                settled = read(data, passed)
                if settled is None:
                    break
                passed = settled
        except BadRequest as refusal:
            if self.phase is not Phase.HEAD:
                refusal.omit_body = self._omit_body
            self._refuse(refusal)
        if self.phase is Phase.OPAQUE:
            passed = len(data)
        elif self.phase is Phase.HELD:
            self._held = bytes(memoryview(data)[passed:])
        if passed == start:
            return []
        settled_part = data if passed - start == len(data) else memoryview(data)[start:passed]
        return [self._kept, settled_part] if self._kept else [settled_part]

    def end(self) -> None:
        """The visitor says no more. In the middle of a head it is refused; the rest is the gateway's to judge."""
        if self.head_begun and not self.is_over:
            refusal = BadRequest(400, "The request ended before its head did.", omit_body=self._heads.omit_body)
            self._refuse(refusal)

    def give_up(self, seconds: float) -> None:
        """A head that has begun is not whole after `seconds`."""
        reason = f"No whole request head came within {seconds:g} seconds."
        self._refuse(BadRequest(408, reason, omit_body=self._heads.omit_body))

    def answer(self, data: Piece) -> bool:
        """Look at what the gateway says next, while `awaits_answer`; True once that decides what was held.

        It goes to the visitor in any case.
        """
        try:
            status = self._answers.feed(bytes(data))
        except RemoteProtocolError:
            status = _UNREADABLE
        if status is None:
            return False
        switched = status == _SWITCHING
        self._end = _Found.END_SWITCHED if switched else _Found.END
        if self.phase is Phase.HELD:
            self._go(_Found.SWITCHED if switched else _Found.DECLINED)
        return True

    # What each phase reads: from `start`, up to the position that is returned, which may then be forwarded. None: what
    # there is was kept, and the rest of it has to come first.

    def _read_head(self, data: Data, start: int) -> int | None:
        # The reader keeps what it is given, and there may be many heads in `data`: so not much more than this one.
        end = data.find(_HEAD_END, start)
        before, piece = self._of_head, memoryview(data)[start : len(data) if end < 0 else end + len(_HEAD_END)]
        head = self._heads.feed(piece)
        self.work += 1
        if head is None:  # so `piece` was all there is
            self._of_head += len(piece)
            return None
        self.work += _HEAD_COST + len(head.headers) // 2
        if head.host != self._host:
            raise BadRequest(
                421, "This connection belongs to another host. Open a new one for this.", omit_body=head.omit_body
            )
        kept = self._heads.received[:before]
        self._heads, self._of_head = HeadReader(), 0
        if wants_upgrade(head) is not None:
            self._go(_Found.UPGRADE)
            self.afresh = head, kept + bytes(memoryview(data)[start:])
            return None
        self._kept += kept
        self._begin_body(head)
        return start + head.length - before

    def _begin_body(self, head: RequestHead) -> None:
        self.heads += 1
        self._omit_body = head.omit_body
        if head.chunked:
            self._go(_Found.CHUNKED)
        elif head.content_length:
            self._left = head.content_length
            self._go(_Found.LENGTH)
        else:
            self._go(self._end)

    def _read_body(self, data: Data, start: int) -> int:
        return self._read_counted(data, start, self._end)

    def _read_chunk(self, data: Data, start: int) -> int:
        return self._read_counted(data, start, _Found.FILLED)

    def _read_counted(self, data: Data, start: int, found: _Found) -> int:
        amount = min(self._left, len(data) - start)
        self._left -= amount
        if not self._left:
            self._go(found)
        return start + amount

    def _read_chunk_line(self, data: Data, start: int) -> int | None:
        end = start if self._lines.begun else self._skip_whole_chunks(data, start)
        if end > start:
            return end
        end_of_line = self._read_line(data, start, MAX_CHUNK_LINE, "The line of a chunk")
        if end_of_line is None:
            return None
        match = _CHUNK_LINE.fullmatch(self._lines.line)
        if match is None:
            raise BadRequest(400, "The line of a chunk is not a size with extensions.")
        self._left = int(match[1], 16)
        if not self._left:
            self._trailers = self._trailer_bytes = 0
        self._go(_Found.SIZE if self._left else _Found.LAST)
        return end_of_line

    def _skip_whole_chunks(self, data: Data, start: int) -> int:
        """The position after all chunks, from `start` on, that are there with their line and their end.

        The long way would find the same of each of them; but a body may consist of many small ones.
        """
        while self.work < _WORK and (match := _CHUNK_LINE.match(data, start, start + MAX_CHUNK_LINE)):
            self.work += 1
            size = int(match[1], 16)
            end = match.end() + size
            if not size or data[end : end + 2] != b"\r\n":
                break
            start = end + 2
        return start

    def _read_chunk_end(self, data: Data, start: int) -> int | None:
        end = self._read_line(data, start, 2, "The line end after a chunk")
        if end is not None:
            if self._lines.line != b"\r\n":
                raise BadRequest(400, "A chunk is longer than its size.")
            self._go(_Found.LINE_END)
        return end

    def _read_trailer(self, data: Data, start: int) -> int | None:
        end = self._read_line(data, start, MAX_TRAILERS - self._trailer_bytes, "A trailer")
        if end is None:
            return None
        line = self._lines.line
        if line == b"\r\n":
            self._go(self._end)
            return end
        self._trailers += 1
        self._trailer_bytes += len(line)
        if self._trailers > MAX_HEADERS:
            raise BadRequest(400, "There are too many trailers.")
        name, _ = read_field(line, 0, len(line) - 2)
        if name in _NOT_IN_TRAILERS:
            raise BadRequest(400, "A trailer is one that has to be a header.")
        return end

    def _read_line(self, data: Data, start: int, limit: int, what: str) -> int | None:
        self.work += 1
        try:
            end = self._lines.read(data, start, limit, what)
        except RemoteProtocolError as error:
            raise BadRequest(400, str(error)) from None
        if end is not None:
            self._kept += self._lines.kept
        return end

    def _go(self, found: _Found) -> None:
        self.phase = _TRANSITIONS[self.phase][found]

    def _refuse(self, refusal: BadRequest) -> None:
        self.refusal = refusal
        self.refused_at_head = self.phase is Phase.HEAD
        self.phase = Phase.REFUSED
        self._held = b""


@final
class _LineReader:
    """Puts lines together from pieces.

    Attributes:
        line: the last whole one, with its end.
        kept: what of it had come with earlier pieces.
    """

    def __init__(self) -> None:
        self.line = self.kept = b""
        self._begun: Final = bytearray()

    @property
    def begun(self) -> bool:
        """True while there is a part of a line."""
        return bool(self._begun)

    def read(self, data: Data, start: int, limit: int, what: str) -> int | None:
        """The position after the line in `data`; None when it has no end yet, and what there is was kept.

        Args:
            limit: the bytes that it may have, its end counted.
            what: names it in errors.

        Raises:
            RemoteProtocolError: it is longer than `limit` bytes, or ends in LF alone.
        """
        room = limit - len(self._begun)
        end = data.find(b"\n", start, start + room) + 1
        if not end:
            if len(data) - start >= room:
                raise RemoteProtocolError(f"{what} has more than {limit} bytes.")
            self._begun.extend(memoryview(data)[start:])
            return None
        self.kept = bytes(self._begun)
        self._begun.clear()
        self.line = self.kept + data[start:end]
        if not self.line.endswith(b"\r\n"):
            raise RemoteProtocolError(f"{what} ends in LF without CR.")
        return end


@final
class _AnswerReader:
    """Finds the status of the first final answer among what a gateway says."""

    def __init__(self) -> None:
        self._lines: Final = _LineReader()
        self._size = 0  # of the head so far; 0 while its first line is awaited

    def feed(self, data: bytes) -> int | None:
        """The status, once it is there: 101, or 200 and more.

        Raises:
            RemoteProtocolError: this is no answer.
        """
        position = 0
        while position < len(data):
            end = self._lines.read(data, position, min(MAX_LINE, MAX_HEAD - self._size), "A line of an answer")
            if end is None:
                return None
            position, line = end, self._lines.line
            if not self._size:
                match = _STATUS_LINE.fullmatch(line)
                if match is None:
                    raise RemoteProtocolError("An answer does not begin with a status line.")
                status = int(match[1])
                if status == _SWITCHING or status >= 200:
                    return status
            # What an interim answer says is between the gateway and the visitor; it ends with an empty line.
            self._size = 0 if line == b"\r\n" else self._size + len(line)
        return None
