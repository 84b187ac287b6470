"""Count the frames of a WebSocket before an engine parses them. No I/O.

An engine parses all bytes that it gets at once, and one read may hold 100,000 frames. So we ask a meter how many bytes
the engine may parse before other tasks run. The meter reads only frame headers. It skips payloads and validates
nothing.
"""

from __future__ import annotations

import re
from typing import Final, final

import attrs
import trio

__all__ = ["FRAMES_PER_TURN", "LONGEST_HEADER", "Allowance", "FrameMeter", "header_size", "payload_size"]

FRAMES_PER_TURN: Final = 64
"""Frames that an engine parses before other tasks run. One costs up to 60 µs, including a reply."""

# The end of an HTTP head as the most lenient engine accepts it. A stricter engine refuses such a head itself.
_HEAD_END: Final = re.compile(rb"\n\r?\n")
_LONGEST_END: Final = 3

_SIZE_16: Final = 126
_SIZE_64: Final = 127
_MASKED: Final = 0x80
LONGEST_HEADER: Final = 14


@final
@attrs.frozen(kw_only=True)
class Allowance:
    """What the peer may send before it is trusted.

    Attributes:
        size: bytes, including the HTTP head.
        frames: the number of frames of any kind.
    """

    size: int
    frames: int


@final
class FrameMeter:
    """Counts what one end of a WebSocket receives, beginning with the peer's HTTP head.

    Args:
        allowance: what the peer may send until `trusted` is set; None for no limit.

    Attributes:
        trusted: when True, the allowance does not apply.
    """

    def __init__(self, allowance: Allowance | None = None) -> None:
        self.trusted: bool = allowance is None
        self._size_left = 0 if allowance is None else allowance.size
        self._frames_left = 0 if allowance is None else allowance.frames
        self._head_end: bytes | None = b""  # the last bytes of the HTTP head so far; None when it has ended
        self._partial_header = b""  # the incomplete header of the current frame
        self._payload_left = 0  # bytes of the current frame that have not come yet

    def admit(self, data: bytes | bytearray | memoryview) -> int:
        """How many bytes of `data` may be parsed now. The next call must begin after them.

        The HTTP head is admitted alone. After it, at most `FRAMES_PER_TURN` frames begin in them. It is 0 only when
        `data` is empty.

        Raises:
            trio.BrokenResourceError: the peer sends more than its allowance.
        """
        end = len(data) if self.trusted else min(len(data), self._size_left)
        position = self._pass_frames(data, end) if self._head_end is None else self._pass_head(data, end)
        if data and not position:
            raise trio.BrokenResourceError("the other end has sent more than it may before it is trusted")
        self._size_left -= position
        return position

    @property
    def between_frames(self) -> bool:
        """Whether what was admitted so far ends with a whole frame, or with the HTTP head."""
        return self._head_end is None and not self._payload_left and not self._partial_header

    def _pass_head(self, data: bytes | bytearray | memoryview, end: int) -> int:
        assert self._head_end is not None
        seen = self._head_end + bytes(data[:end])
        found = _HEAD_END.search(seen)
        if found is None:
            self._head_end = seen[-(_LONGEST_END - 1) :]
            return end
        position = found.end() - len(self._head_end)
        self._head_end = None
        return position

    def _pass_frames(self, data: bytes | bytearray | memoryview, end: int) -> int:
        frames = FRAMES_PER_TURN if self.trusted else min(FRAMES_PER_TURN, self._frames_left)
        position = 0
        while position < end:
            if self._payload_left:
                step = min(self._payload_left, end - position)
                self._payload_left -= step
                position += step
                continue
            if not self._partial_header:
                if not frames:
                    break
                frames -= 1
                self._frames_left -= 1
            before = len(self._partial_header)
            header = self._partial_header + bytes(data[position : min(position + LONGEST_HEADER - before, end)])
            size = header_size(header)
            position += min(size, len(header)) - before
            if size <= len(header):
                self._partial_header, self._payload_left = b"", payload_size(header)
            else:
                self._partial_header = header
        return position


def header_size(begun: bytes) -> int:
    """The size of the header that starts with `begun`, including the mask; a lower bound while that is not known."""
    if len(begun) < 2:
        return 2
    short = begun[1] & ~_MASKED
    return 2 + (2 if short == _SIZE_16 else 8 if short == _SIZE_64 else 0) + (4 if begun[1] & _MASKED else 0)


def payload_size(header: bytes) -> int:
    short = header[1] & ~_MASKED
    if short < _SIZE_16:
        return short
    return int.from_bytes(header[2 : 4 if short == _SIZE_16 else 10])
