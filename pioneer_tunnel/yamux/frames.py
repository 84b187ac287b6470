"""yamux frames: twelve header bytes, and for DATA a body. Bytes in, headers and pieces of bodies out.

The specification is hashicorp/yamux `spec.md`. A header is

    version u8 = 0 │ type u8 │ flags u16 │ stream id u32 │ length u32        (big-endian)

where the length is the size of the body (DATA), a credit (WINDOW_UPDATE), an opaque value (PING) or a code (GO_AWAY).

This room knows what one frame may look like by itself. What it means in a session is `session`'s.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple, TypeAlias, final

from .._model.errors import RemoteProtocolError

__all__ = [
    "ACK",
    "Buffer",
    "FIN",
    "HEADER_SIZE",
    "RST",
    "SYN",
    "FrameDecoder",
    "FrameType",
    "GoAwayCode",
    "Header",
    "encode_header",
]

Buffer: TypeAlias = bytes | bytearray | memoryview
"""What is taken as bytes (`collections.abc.Buffer` needs Python 3.12)."""

HEADER_SIZE: Final = 12
_HEADER: Final = struct.Struct(">BBHII")

# Flags are plain integers: one is looked at for every frame.
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
    """Why an end goes away. A peer may send codes that are not listed here."""

    NORMAL = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2


_DATA: Final = FrameType.DATA
_PING: Final = FrameType.PING
_GO_AWAY: Final = FrameType.GO_AWAY


class Header(NamedTuple):
    """One header. `length` means what the frame type makes of it."""

    type: int
    flags: int
    stream_id: int
    length: int


def encode_header(frame_type: int, flags: int, stream_id: int, length: int) -> bytes:
    """The twelve bytes of a header."""
    return _HEADER.pack(0, frame_type, flags, stream_id, length)


@final
class FrameDecoder:
    """Cuts a byte stream into headers and pieces of DATA bodies, wherever the chunks that arrive begin and end.

    Nothing is buffered but an unfinished header: a body is handed on in the pieces in which it comes, so a peer that
    sends a whole window as one frame costs no more memory than one that sends many.
    """

    __slots__ = ("_partial", "body_left")

    def __init__(self) -> None:
        self._partial = b""
        self.body_left = 0
        """Bytes of the current DATA frame's body that are still to come; 0 between frames."""

    def receive_data(self, data: Buffer) -> Iterator[Header | bytes]:
        """Yield each `Header`, and after that of a DATA frame its body in pieces of `bytes`.

        A generator: what follows a header is looked at only when the caller asks for more, so a frame can be refused
        on the strength of its header alone. It has to be exhausted before the next call.

        Raises:
            RemoteProtocolError: a header that no session could accept.
        """
        view = memoryview(data)
        position, end = 0, len(view)
        while position < end:
            if self.body_left:
                piece = bytes(view[position : position + self.body_left])
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
            if header.type == _DATA:
                self.body_left = header.length
            yield header


def _decode(buffer: Buffer, offset: int) -> Header:
    version, frame_type, flags, stream_id, length = _HEADER.unpack_from(buffer, offset)
    if version != 0:
        raise RemoteProtocolError(f"yamux version {version}; this end speaks version 0")
    if frame_type > _GO_AWAY:
        raise RemoteProtocolError(f"yamux frame of unknown type {frame_type}")
    if frame_type >= _PING and stream_id != 0:
        raise RemoteProtocolError(f"yamux {FrameType(frame_type).name} on stream {stream_id}; it belongs to stream 0")
    return Header(frame_type, flags, stream_id, length)
