"""Where the body of an HTTP/1 message ends: after its length, or after its last chunk and the trailers. No I/O.

Requests and responses have the same bodies, so `requests` and `responses` both use `BodyReader`. It is strict: where
two readers could see the end in two places, it raises an error. For example, a chunk's size line must not contain white
space, which RFC 9112, 7.1.1 calls bad and which readers understand differently.

h11 is not used: it repairs what must be refused here, and yields contents instead of the bytes to forward.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias, final

from .head import MAX_HEADERS, TOKEN, BadRequest, read_field

__all__ = ["MAX_CHUNK_LINE", "MAX_WORK", "BodyReader", "Data", "Part"]

Data: TypeAlias = bytes | bytearray

MAX_CHUNK_LINE: Final = 1024
"""Bytes of a chunk's size line, including extensions and line end."""
MAX_TRAILERS: Final = 16 * 1024
"""Bytes of all trailers of a message."""

MAX_WORK: Final = 512
"""Work of one call of a follower's `feed`, in units of `Turn.spend`, up to one item more. 500 chunks, for example."""

_SMALL: Final = 16 * 1024
_LARGE: Final = 256 * 1024

_QUOTED: Final = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*+"'
# 15 hexadecimal digits fit a signed 64-bit integer, so no reader behind us overflows.
_CHUNK_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,15}+)(?:;%s(?:=(?:%s|%s))?+)*+\r\n" % (TOKEN, TOKEN, _QUOTED))
_NOT_IN_TRAILERS: Final = frozenset({b"host", b"content-length", b"transfer-encoding"})


class Part(enum.Enum):
    """What the next byte of a body belongs to."""

    __hash__ = object.__hash__  # that of `Enum` is a Python function

    COUNTED = "a body with a length"
    CHUNK_LINE = "the size of a chunk"
    CHUNK = "a chunk"
    CHUNK_END = "the line end after a chunk"
    TRAILERS = "the trailers after the last chunk"
    NOTHING = "nothing: the body is complete"


class _Found(enum.Enum):
    __hash__ = object.__hash__  # as above

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

    Args:
        refuses_trailer: says of a trailer's lower-case name whether it is refused, besides those that always are.

    Attributes:
        part: what the next byte belongs to.
        work: the cost of `read` since the caller set this to 0, in units of `Turn.spend`.
    """

    __slots__ = (
        "_kept",
        "_left",
        "_line",
        "_max_work",
        "_refuses_trailer",
        "_trailer_bytes",
        "_trailers",
        "part",
        "work",
    )

    def __init__(self, refuses_trailer: Callable[[bytes], bool] | None = None) -> None:
        self.part = Part.NOTHING
        self.work = 0
        self._left = 0  # bytes of the body or the chunk that are still to come
        self._line: Data = b""  # the part of an incomplete line that earlier pieces had
        self._kept = b""  # the same of the last complete line
        self._trailers = self._trailer_bytes = 0
        self._max_work = MAX_WORK
        self._refuses_trailer: Final = refuses_trailer

    @property
    def complete(self) -> bool:
        """True after a body, and before the first one."""
        return self.part is Part.NOTHING

    @property
    def read_size(self) -> int:
        """The most bytes to read at once. The bound keeps calls short, since the bytes may be many chunks."""
        return max(self._left, _SMALL if self.part in {Part.COUNTED, Part.TRAILERS} else _LARGE)

    def begin(self, content_length: int | None, *, chunked: bool) -> None:
        """Start the body of a message, as its head describes it."""
        if chunked:
            self._go(_Found.CHUNKED)
        elif content_length:
            self._left = content_length
            self._go(_Found.LENGTH)

    def read(self, data: Data, start: int, max_work: int = MAX_WORK) -> int | None:
        """Read one item of an incomplete body: some bytes, a line, or whole chunks until `work` reaches `max_work`.

        Returns:
            The position after it; None when `data` ends within a line. The part of the line is kept.

        Raises:
            BadRequest: the body is malformed.
        """
        self._max_work = max_work
        return _READERS[self.part](self, data, start)

    def take_kept(self) -> bytes:
        """Take the part of the last line that earlier pieces had; b"" if there is none, or if it was taken."""
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
        """The position after the complete chunks that begin at `start`.

        A fast path for many small chunks; reading part by part has the same result.
        """
        while self.work < self._max_work and (match := _CHUNK_LINE.match(data, start, start + MAX_CHUNK_LINE)):
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
        if name in _NOT_IN_TRAILERS or (self._refuses_trailer is not None and self._refuses_trailer(name)):
            raise BadRequest(400, "A trailer is one that has to be a header.")
        return end

    def _read_line(self, data: Data, start: int, limit: int, what: str) -> tuple[int, bytes] | None:
        """Read a line: the position after it, and the line with its end. None when `data` does not have its end.

        Args:
            limit: bytes that the line may have, including its end.
            what: the line's name in errors.
        """
        self.work += 1
        left = limit - len(self._line)
        end = data.find(b"\n", start, start + left) + 1
        if not end:
            if len(data) - start >= left:
                raise BadRequest(400, f"{what} has more than {limit} bytes.")
            self._line = self._line or bytearray()  # which grows without being copied
            self._line += data[start:]
            return None
        self._kept, self._line = bytes(self._line), b""
        line = self._kept + data[start:end]
        if not line.endswith(b"\r\n"):
            raise BadRequest(400, f"{what} ends in LF without CR.")
        return end, line

    def _go(self, found: _Found) -> None:
        self.part = _TRANSITIONS[self.part][found]


# Not in each reader: there, bound methods would be a reference cycle.
_READERS: Final[Mapping[Part, Callable[[BodyReader, Data, int], int | None]]] = {
    Part.COUNTED: BodyReader._read_counted,
    Part.CHUNK_LINE: BodyReader._read_chunk_line,
    Part.CHUNK: BodyReader._read_counted,
    Part.CHUNK_END: BodyReader._read_chunk_end,
    Part.TRAILERS: BodyReader._read_trailer,
}
