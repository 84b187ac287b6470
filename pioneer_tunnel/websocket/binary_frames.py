"""The binary messages of a WebSocket, without a library: they are the link's bytes, and each copy and call counts.

Everything else stays with the library: the opening, text, control frames, and every frame that breaks RFC 6455. So this
module knows only the layout of a frame (RFC 6455, 5.2). No I/O.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias, final

from .._net.link import Bytes
from .frame_meter import FRAMES_PER_TURN, LONGEST_HEADER, header_size, payload_size
from .messages import MAX_BINARY

__all__ = ["ApplyMask", "BinaryFrames", "encode"]

ApplyMask: TypeAlias = Callable[[Bytes, bytes], Bytes]
"""Returns its first argument, masked or unmasked with a key of four bytes."""

_FIN: Final = 0x80
_OPCODE: Final = 0x0F
_BINARY: Final = 2
_FIRST_CONTROL: Final = 8
_WHOLE: Final = _FIN | _BINARY
_MASK_SIZE: Final = 4
_MASKED: Final = 0x80
_SIZE_16: Final = 126
_SIZE_64: Final = 127


@final
class BinaryFrames:
    """Takes binary messages out of what one end receives.

    Args:
        apply_mask: unmasks a payload; None if the peer is the server, which does not mask.

    Attributes:
        failure: the close code and the reason, when a binary message is longer than 1 MiB, or another message begins
            inside of one. What comes after that is dropped.
        incomplete: whether the last `split` has left the beginning of a message.
    """

    def __init__(self, apply_mask: ApplyMask | None) -> None:
        self.failure: tuple[int, str] | None = None
        self.incomplete: bool = False
        self._apply_mask: Final = apply_mask
        self._masked: Final = 0 if apply_mask is None else _MASKED
        self._mask = b""
        self._ours = False  # whether the current frame is one of a binary message
        self._left = 0  # bytes of the current frame that have not come yet
        self._message_size: int | None = None  # of a binary message of which more frames will come
        self._inside_other = False  # whether more frames of a message will come that the library takes
        self._partial = b""

    def split(self, data: memoryview, *, more: bool = False) -> tuple[int, list[tuple[bool, Bytes]]]:
        """Cut `data` at the borders of frames; at most 64 frames begin in what is used.

        Args:
            more: whether more has come already. Then a whole message at the end of `data` is not used, except at its
                beginning, if the rest of it is missing: in two pieces it costs twice the time above.

        Returns:
            How many bytes were used, and the pieces in order: `(True, payload)` of binary messages, a view of `data`
            if it was not masked; `(False, bytes)` for the library.
        """
        pieces: list[tuple[bool, Bytes]] = []
        position, end, frames = 0, len(data), FRAMES_PER_TURN
        self.incomplete = False
        while position < end:
            if self.failure is not None:
                return end, pieces
            if self._left:
                piece: Bytes = data[position : position + self._left]
                position += len(piece)
                self._left -= len(piece)
                pieces.append((self._ours, self._unmask(piece) if self._ours else piece))
                continue
            if not frames:
                break
            frames -= 1
            if data[position] == _WHOLE and end - position >= LONGEST_HEADER and not self._partial:
                after = self._take_whole(data, position, end, pieces)
                if after > position:
                    position = after
                    continue
                if after and more:
                    self.incomplete = True
                    break
            known = len(self._partial)
            header = self._partial + bytes(data[position : position + LONGEST_HEADER - known])
            size = header_size(header)
            if size > len(header):
                self._partial = header
                return end, pieces
            self._partial = b""
            position += size - known
            if self._begin(header[:size]):
                pieces.append((False, header[:size]))
        return position, pieces

    def _take_whole(self, data: memoryview, position: int, end: int, pieces: list[tuple[bool, Bytes]]) -> int:
        """Take a frame that is a whole message of less than 64 KiB, as most are; returns where it ends.

        Or `position` if only a part of it has come, and 0 if it is no such frame. This does what the general way does,
        with fewer calls.
        """
        size, start = data[position + 1] ^ self._masked, position + 2
        if size == _SIZE_16:
            size, start = data[start] << 8 | data[start + 1], start + 2
        elif size > _SIZE_16:
            return 0  # larger, or not masked as it should be
        if self._message_size is not None or self._inside_other:
            return 0
        payload = start + _MASK_SIZE if self._masked else start
        after = payload + size
        if after > end:
            return position
        piece: Bytes = data[payload:after]
        if self._apply_mask is not None:
            piece = self._apply_mask(piece, bytes(data[start:payload]))
        pieces.append((True, piece))
        return after

    def _begin(self, header: bytes) -> bool:
        """A frame begins. True if the library takes it."""
        opcode, size = header[0] & _OPCODE, payload_size(header)
        self._left = size
        if opcode >= _FIRST_CONTROL:
            self._ours = False
            return True
        begun = self._message_size
        if opcode and begun is not None:
            self.failure = 1002, "a message begins before the last one has ended"
            return False
        plain = not header[0] & ~(_FIN | _OPCODE) and header[1] & _MASKED == self._masked
        mine = begun is not None if not opcode else opcode == _BINARY
        self._ours = plain and mine and not self._inside_other
        if not self._ours:
            self._inside_other = not header[0] & _FIN
            return True
        size += begun or 0
        if size > MAX_BINARY:
            self.failure = 1009, f"a message of more than {MAX_BINARY} bytes"
        self._message_size = None if header[0] & _FIN else size
        self._mask = header[-_MASK_SIZE:]
        return False

    def _unmask(self, piece: Bytes) -> Bytes:
        if self._apply_mask is None:
            return piece
        clear = self._apply_mask(piece, self._mask)
        used = len(piece) % 4
        if used and self._left:
            self._mask = self._mask[used:] + self._mask[:used]
        return clear


def encode(chunks: Sequence[Bytes], size: int, apply_mask: ApplyMask | None) -> list[Bytes]:
    """One binary message of `chunks`, which have `size` bytes together: the pieces to send.

    Args:
        apply_mask: masks the payload; None on the server, which does not mask.
    """
    flag = 0 if apply_mask is None else _MASKED
    if size < _SIZE_16:
        header = bytes((_FIN | _BINARY, flag | size))
    elif size < 1 << 16:
        header = bytes((_FIN | _BINARY, flag | _SIZE_16)) + size.to_bytes(2)
    else:
        header = bytes((_FIN | _BINARY, flag | _SIZE_64)) + size.to_bytes(8)
    if apply_mask is None:
        return [header, *chunks]
    key = os.urandom(4)
    return [header + key, apply_mask(b"".join(chunks), key)]
