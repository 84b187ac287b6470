"""Counts the frames of one WebSocket before an engine parses them. No I/O.

An engine parses all that it is given in one go, and one read may bring 100,000 frames. So an engine asks a meter how
much of what came it may parse now. The meter reads frame headers alone: it skips payloads and checks nothing.
"""

from __future__ import annotations

import re
from typing import Final, final

import attrs
import trio

__all__ = ["Allowance", "FrameMeter"]

FRAMES_PER_TURN: Final = 64
"""Frames that an engine parses before other tasks run. One costs up to 60 µs, with its answer."""

# What ends an HTTP head for the most lenient of the engines. The others refuse what only this one takes.
_HEAD_END: Final = re.compile(rb"\n\r?\n")
_LONGEST_END: Final = 3

_SIZE_16: Final = 126
_SIZE_64: Final = 127
_MASKED: Final = 0x80
_LONGEST_HEADER: Final = 14


@final
@attrs.frozen(kw_only=True)
class Allowance:
    """What the other end may send until it is trusted.

    Attributes:
        size: bytes, the HTTP head included.
        frames: frames of any kind, a number.
    """

    size: int
    frames: int


@final
class FrameMeter:
    """Counts what one end of a WebSocket receives, from the first byte of its HTTP head on.

    Args:
        allowance: what the other end may send until `trusted` is set; None for no limit.

    Attributes:
        trusted: whether the allowance no longer counts.
    """

    def __init__(self, allowance: Allowance | None = None) -> None:
        self.trusted: bool = allowance is None
        self._size_left = 0 if allowance is None else allowance.size
        self._frames_left = 0 if allowance is None else allowance.frames
        self._head: bytes | None = b""  # its last bytes; None once it has ended
        self._begun = b""  # a frame's header, as far as it came
        self._skip = 0  # bytes of a frame that are still to come

    def admit(self, data: bytes | bytearray | memoryview) -> int:
        """The length of the part of `data` that may be parsed now. The next call begins behind that part.

        The part holds at most `FRAMES_PER_TURN` beginnings of frames. It is empty only when `data` is.

        Raises:
            trio.BrokenResourceError: the other end has used up its allowance, and goes on.
        """
        end = len(data) if self.trusted else min(len(data), self._size_left)
        frames = FRAMES_PER_TURN if self.trusted else min(FRAMES_PER_TURN, self._frames_left)
        position = 0 if self._head is None else self._skip_head(data, end)
        while position < end:
            if self._skip:
                step = min(self._skip, end - position)
                self._skip -= step
                position += step
                continue
            if not self._begun:
                if not frames:
                    break
                frames -= 1
                self._frames_left -= 1
            before = len(self._begun)
            header = self._begun + bytes(data[position : min(position + _LONGEST_HEADER - before, end)])
            size = _header_size(header)
            position += min(size, len(header)) - before
            if size <= len(header):
                self._begun, self._skip = b"", _payload_size(header)
            else:
                self._begun = header
        if data and not position:
            raise trio.BrokenResourceError("the other end has sent more than it may before it is trusted")
        self._size_left -= position
        return position

    def _skip_head(self, data: bytes | bytearray | memoryview, end: int) -> int:
        assert self._head is not None
        seen = self._head + bytes(data[:end])
        found = _HEAD_END.search(seen)
        if found is None:
            self._head = seen[-(_LONGEST_END - 1) :]
            return end
        position = found.end() - len(self._head)
        self._head = None
        return position


def _header_size(begun: bytes) -> int:
    """The size of the header that `begun` begins, its mask included, as far as that is known yet."""
    if len(begun) < 2:
        return 2
    short = begun[1] & ~_MASKED
    return 2 + (2 if short == _SIZE_16 else 8 if short == _SIZE_64 else 0) + (4 if begun[1] & _MASKED else 0)


def _payload_size(header: bytes) -> int:
    short = header[1] & ~_MASKED
    if short < _SIZE_16:
        return short
    return int.from_bytes(header[2 : 4 if short == _SIZE_16 else 10])
