"""Where the body of an HTTP/1 message ends: after its length, or after its last chunk and the trailers. No I/O.

Requests and responses have the same bodies, so `framing` and `responses` both use `BodyReader`. It is strict: where two
readers could see the end in two places, it raises an error. The line of a chunk holds no white space, which RFC 9112,
7.1.1 calls bad, and which readers understand in different ways.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias, final

from .head import MAX_HEADERS, BadRequest, read_field

__all__ = ["MAX_CHUNK_LINE", "MAX_TRAILERS", "MAX_WORK", "BodyReader", "Data", "Part"]

Data: TypeAlias = bytes | bytearray

MAX_CHUNK_LINE: Final = 1024
"""Bytes of the line that begins a chunk, with its extensions and its end."""
MAX_TRAILERS: Final = 16 * 1024
"""Bytes of all trailers of a message together."""

MAX_WORK: Final = 512
"""What one call of a follower's `feed` may cost in units of `Turn.spend`, give or take one item: 500 chunks, say."""

_SMALL: Final = 16 * 1024
_LARGE: Final = 256 * 1024

_TOKEN: Final = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]++"
_QUOTED: Final = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*+"'
# 15 digits: every such size fits a signed 64-bit integer, so that no reader behind us wraps around.
_CHUNK_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,15}+)(?:;%s(?:=(?:%s|%s))?+)*+\r\n" % (_TOKEN, _TOKEN, _QUOTED))
_NOT_IN_TRAILERS: Final = frozenset({b"host", b"content-length", b"transfer-encoding"})


class Part(enum.Enum):
    """What the next byte of a body belongs to."""

    COUNTED = "a body with a length"
    CHUNK_LINE = "the size of a chunk"
    CHUNK = "a chunk"
    CHUNK_END = "the line end after a chunk"
    TRAILERS = "the trailers after the last chunk"
    NOTHING = "nothing: the body is complete"


class _Found(enum.Enum):
    LENGTH = "a head with a Content-Length"
    CHUNKED = "a head with chunks"
    SIZE = "a chunk's size"
    LAST = "the size of the last chunk, which is 0"
    FILLED = "all bytes of a body or of a chunk"
    LINE_END = "the line end after a chunk"
    EMPTY_LINE = "the empty line after the trailers"


_TRANSITIONS: Final[Mapping[Part, Mapping[_Found, Part]]] = {
    Part.NOTHING: {_Found.LENGTH: Part.COUNTED, _Found.CHUNKED: Part.CHUNK_LINE},
    Part.COUNTED: {_Found.FILLED: Part.NOTHING},
    Part.CHUNK_LINE: {_Found.SIZE: Part.CHUNK, _Found.LAST: Part.TRAILERS},
    Part.CHUNK: {_Found.FILLED: Part.CHUNK_END},
    Part.CHUNK_END: {_Found.LINE_END: Part.CHUNK_LINE},
    Part.TRAILERS: {_Found.EMPTY_LINE: Part.NOTHING},
}


@final
class BodyReader:
    """Reads the bodies of one direction of a connection, one after the other.

    Attributes:
        part: what the next byte belongs to.
        work: what the calls of `read` have cost since this was set to 0, in units of `Turn.spend`.
    """

    def __init__(self) -> None:
        self.part = Part.NOTHING
        self.work = 0
        self._left = 0  # bytes of the body or the chunk that are still to come
        self._line: Final = bytearray()  # the part of a line that earlier pieces held
        self._kept = b""  # the same, of a line that is whole
        self._trailers = self._trailer_bytes = 0
        self._most = MAX_WORK
        self._readers: Final[Mapping[Part, Callable[[Data, int], int | None]]] = {
            Part.COUNTED: self._read_counted,
            Part.CHUNK_LINE: self._read_chunk_line,
            Part.CHUNK: self._read_counted,
            Part.CHUNK_END: self._read_chunk_end,
            Part.TRAILERS: self._read_trailer,
        }

    @property
    def complete(self) -> bool:
        """True when the body has ended, and before the first one."""
        return self.part is Part.NOTHING

    @property
    def read_size(self) -> int:
        """How many bytes to read at the most, so that few calls take long: they may be many chunks."""
        return max(self._left, _SMALL if self.part in {Part.COUNTED, Part.TRAILERS} else _LARGE)

    def begin(self, content_length: int | None, *, chunked: bool) -> None:
        """A head was read, which says this of the body."""
        if chunked:
            self._go(_Found.CHUNKED)
        elif content_length:
            self._left = content_length
            self._go(_Found.LENGTH)

    def read(self, data: Data, start: int, most: int = MAX_WORK) -> int | None:
        """Read one item of a body that is not complete: some bytes, a line, or whole chunks until `work` is `most`.

        Returns the position after it. None: `data` ends in the middle of a line, which is kept.

        Raises:
            BadRequest: the body is malformed.
        """
        self._most = most
        return self._readers[self.part](data, start)

    def take_kept(self) -> bytes:
        """What earlier pieces held of the line that was read last; b"" when it was taken already."""
        kept, self._kept = self._kept, b""
        return kept

    def _read_counted(self, data: Data, start: int) -> int:
        amount = min(self._left, len(data) - start)
        self._left -= amount
        if not self._left:
            self._go(_Found.FILLED)
        return start + amount

    def _read_chunk_line(self, data: Data, start: int) -> int | None:
        end = start if self._line else self._skip_whole_chunks(data, start)
        if end > start:
            return end
        found = self._read_line(data, start, MAX_CHUNK_LINE, "The line of a chunk")
        if found is None:
            return None
        end, line = found
        match = _CHUNK_LINE.fullmatch(line)
        if match is None:
            raise BadRequest(400, "The line of a chunk is not a size with extensions.")
        self._left = int(match[1], 16)
        if not self._left:
            self._trailers = self._trailer_bytes = 0
        self._go(_Found.SIZE if self._left else _Found.LAST)
        return end

    def _skip_whole_chunks(self, data: Data, start: int) -> int:
        """The position after the chunks, from `start` on, that are there with their line and their end.

        Reading part by part finds the same, but a body may consist of many small chunks.
        """
        while self.work < self._most and (match := _CHUNK_LINE.match(data, start, start + MAX_CHUNK_LINE)):
            self.work += 1
            size = int(match[1], 16)
            end = match.end() + size
            if not size or data[end : end + 2] != b"\r\n":
                break
            start = end + 2
        return start

    def _read_chunk_end(self, data: Data, start: int) -> int | None:
        found = self._read_line(data, start, 2, "The line end after a chunk")
        if found is None:
            return None
        end, line = found
        if line != b"\r\n":
            raise BadRequest(400, "A chunk is longer than its size.")
        self._go(_Found.LINE_END)
        return end

    def _read_trailer(self, data: Data, start: int) -> int | None:
        found = self._read_line(data, start, MAX_TRAILERS - self._trailer_bytes, "A trailer")
        if found is None:
            return None
        end, line = found
        if line == b"\r\n":
            self._go(_Found.EMPTY_LINE)
            return end
        self._trailers += 1
        self._trailer_bytes += len(line)
        if self._trailers > MAX_HEADERS:
            raise BadRequest(400, "There are too many trailers.")
        name, _ = read_field(line, 0, len(line) - 2)
        if name in _NOT_IN_TRAILERS:
            raise BadRequest(400, "A trailer is one that has to be a header.")
        return end

    def _read_line(self, data: Data, start: int, limit: int, what: str) -> tuple[int, bytes] | None:
        """The position after the line in `data`, and the line with its end; None when its end has not come.

        Args:
            limit: the bytes that the line may have, its end counted.
            what: names it in errors.
        """
        self.work += 1
        room = limit - len(self._line)
        end = data.find(b"\n", start, start + room) + 1
        if not end:
            if len(data) - start >= room:
                raise BadRequest(400, f"{what} has more than {limit} bytes.")
            self._line.extend(memoryview(data)[start:])
            return None
        self._kept = bytes(self._line)
        self._line.clear()
        line = self._kept + data[start:end]
        if not line.endswith(b"\r\n"):
            raise BadRequest(400, f"{what} ends in LF without CR.")
        return end, line

    def _go(self, found: _Found) -> None:
        self.part = _TRANSITIONS[self.part][found]
