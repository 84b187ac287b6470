"""yamux frames: encode headers, and cut received bytes into headers and pieces of DATA bodies.

The specification is hashicorp/yamux `spec.md`. A header has twelve bytes, big-endian:

    version u8 = 0 │ type u8 │ flags u16 │ stream id u32 │ length u32

The length is the size of the body (DATA), a credit (WINDOW_UPDATE), an opaque value (PING) or a code (GO_AWAY). Only
DATA frames have a body.

This module checks each frame by itself. `session` checks what it means in the session.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple, TypeAlias, final

from .._model.errors import RemoteProtocolError

__all__ = [
    "ACK",
    "Buffer",
    "FIN",
    "HEADER_SIZE",
    "LARGEST_BODY",
    "LARGEST_FRAME",
    "RST",
    "SYN",
    "FrameDecoder",
    "FrameType",
    "GoAwayCode",
    "Header",
    "encode_header",
]

Buffer: TypeAlias = bytes | bytearray | memoryview
"""Bytes in any form (`collections.abc.Buffer` needs Python 3.12)."""

HEADER_SIZE: Final = 12
_HEADER: Final = struct.Struct(">BBHII")

LARGEST_BODY: Final = 64 * 1024 - 256
"""Bytes of DATA in a frame that fills one message: 64 KiB, less what the headers of the layers below may take.

A stream that sends alone, or on a fast link, has larger frames, see `outbox`."""
LARGEST_FRAME: Final = HEADER_SIZE + LARGEST_BODY

# Plain integers, because every frame is tested for them, and an enum is slower.
SYN: Final = 1
ACK: Final = 2
FIN: Final = 4
RST: Final = 8


class FrameType(enum.IntEnum):
    """The second byte of a header."""

    DATA = 0
    WINDOW_UPDATE = 1
    PING = 2
    GO_AWAY = 3


class GoAwayCode(enum.IntEnum):
    """The reason of a go-away. A peer may send other codes."""

    NORMAL = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2


_DATA: Final = FrameType.DATA
_PING: Final = FrameType.PING
_GO_AWAY: Final = FrameType.GO_AWAY


_new: Final = tuple.__new__
"""Makes a `Header` without the Python function that a named tuple has for this."""


@final
class Header(NamedTuple):
    """One header. The meaning of `length` depends on the frame type."""

    type: int
    flags: int
    stream_id: int
    length: int


def encode_header(frame_type: int, flags: int, stream_id: int, length: int) -> bytes:
    """The twelve bytes of a header."""
    return _HEADER.pack(0, frame_type, flags, stream_id, length)


@final
class FrameDecoder:
    """Cuts a byte stream into headers and pieces of DATA bodies. Chunks may begin and end anywhere.

    It buffers only an incomplete header. A body is returned in the pieces in which it arrives, so one large frame costs
    no more memory than many small ones.
    """

    __slots__ = ("_partial", "body_left")

    def __init__(self) -> None:
        self._partial = b""
        self.body_left: int = 0
        """Bytes of the current DATA frame's body that have not arrived yet; 0 between frames."""

    def receive_data(self, data: Buffer) -> Iterable[Header | memoryview]:
        """Return each `Header`, and after the header of a DATA frame its body in pieces, which are views of `data`.

        Frames are decoded while the caller iterates, so that it can refuse a frame by its header before the body is
        processed. It must exhaust the result before the next call.

        Raises:
            RemoteProtocolError: a header is invalid. It may be raised while the caller iterates.
        """
        # Most of what comes is a part of one body, or one whole frame, or the beginning of one. Without an iterator
        # they take less time.
        size, left = len(data), self.body_left
        if 0 < size <= left:
            self.body_left = left - size
            return (memoryview(data),)
        if not (left or self._partial or size <= HEADER_SIZE):
            header = _decode(data, 0)
            left = header[3] + HEADER_SIZE - size
            if left >= 0 and not header[0]:
                self.body_left = left
                return header, memoryview(data)[HEADER_SIZE:]
        return self._decode_all(data)

    def _decode_all(self, data: Buffer) -> Iterator[Header | memoryview]:
        view = memoryview(data)
        position, end = 0, len(view)
        while position < end:
            if self.body_left:
                piece = view[position : position + self.body_left]
                self.body_left -= len(piece)
                position += len(piece)
                yield piece
                continue
            if self._partial or end - position < HEADER_SIZE:
                wanted = HEADER_SIZE - len(self._partial)
                self._partial += bytes(view[position : position + wanted])
                position += wanted
                if len(self._partial) < HEADER_SIZE:
                    return
                header = _decode(self._partial, 0)
                self._partial = b""
            else:
                header = _decode(view, position)
                position += HEADER_SIZE
            if not header[0]:  # DATA
                self.body_left = header[3]
            yield header


def _decode(buffer: Buffer, offset: int) -> Header:
    version, frame_type, flags, stream_id, length = _HEADER.unpack_from(buffer, offset)
    if version != 0:
        raise RemoteProtocolError(f"yamux version {version}; this end speaks version 0")
    if frame_type > _GO_AWAY:
        raise RemoteProtocolError(f"yamux frame of unknown type {frame_type}")
    if frame_type >= _PING and stream_id != 0:
        raise RemoteProtocolError(f"yamux {FrameType(frame_type).name} on stream {stream_id}; it belongs to stream 0")
    return _new(Header, (frame_type, flags, stream_id, length))
