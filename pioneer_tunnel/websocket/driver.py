"""What a WebSocket does without waiting: what every byte passes between a stream and the user's messages.

`connection` has the tasks, which call this as well: they read into `free` and send what `take_unsent` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, final

import trio

from .._model.errors import fresh_copy
from .._net.link import Bytes
from .._net.streams import ByteStream, Nowait
from .binary_frames import ApplyMask, BinaryFrames, encode
from .frame_meter import FrameMeter
from .framing import Framing
from .messages import Message, messages_of

__all__ = ["Driver", "bytes_in"]

_READ_SIZE: Final = 256 * 1024
_FIRST_READ: Final = 4 * 1024
"""Bytes of the first reads, and of all reads from a peer that is not trusted yet."""


@final
class Driver:
    """The buffers of a WebSocket, and what moves bytes through them.

    Args:
        stream: the stream below.
        framing: makes and parses the frames.
        meter: counts what the peer sends.
        on_replies: called when frames are queued that no task is about to send.

    Attributes:
        drained: see `Link.drained`.
        ended: whether the connection has ended.
        unparsed: what was read and not parsed.
        flushing: whether a task sends. It sets this, and nothing else sends meanwhile.
    """

    def __init__(
        self, stream: ByteStream, framing: Framing, meter: FrameMeter, *, on_replies: Callable[[], object]
    ) -> None:
        self.drained: bool = False
        self.ended: bool = False
        self.flushing: bool = False
        self._stream: Final = stream
        self._framing: Final = framing
        self._meter: Final = meter
        self._on_replies: Final = on_replies
        self._mask: Final[ApplyMask | None] = framing.apply_mask if framing.is_client else None
        self._buffer = memoryview(bytearray(_FIRST_READ))
        self.unparsed: memoryview = self._buffer[:0]
        self._begun = self._buffer[:0]  # of a message, whose rest comes with the next read
        self._is_full = False  # whether the last read has filled the buffer, so that more has come
        self._unsent: list[Bytes] = []
        self._frames: BinaryFrames | None = None  # once the opening is over and the peer is trusted
        self._watched: Nowait | None = None  # what reads and writes without waiting

    def watch(self, on_readable: Callable[[], object]) -> bool:
        """See `Link.watch`. To be called when the opening is over."""
        self._watched = self._stream.watch(on_readable)
        return self._watched is not None

    def unwatch(self) -> None:
        """See `Link.unwatch`."""
        if self._watched is not None:
            self._watched.unwatch()

    # What leaves

    def offer_text(self, text: str) -> bool:
        """Queue a text message, to be sent soon.

        False, and it is not sent, if others still wait or the WebSocket is closed.
        """
        framing = self._framing
        if framing.writes or self._unsent or not framing.is_open:
            return False
        framing.send_text(text)
        self._on_replies()  # unless the next send takes it first
        return True

    def send_nowait(self, chunks: Sequence[Bytes]) -> bool | None:
        """Like `WebSocket.send_binary`, as far as that is possible without waiting.

        Returns:
            False if a rest waits: then call `send_binary` next, which sends it first. None if that is not possible
            now, and it has taken nothing.

        Raises:
            As `WebSocket.send`.
        """
        if self.flushing or self._watched is None:
            return None
        self.queue(chunks)
        self._unsent = self._watched.send_nowait(self._unsent)
        return not self._unsent

    def queue(self, chunks: Sequence[Bytes]) -> None:
        """Queue `chunks` in binary messages of at most 64 KiB.

        Raises:
            As `WebSocket.send`.
        """
        framing = self._framing
        if not framing.is_open:
            self._raise_if_not_open()
        if framing.writes:
            self._take_writes()
        for message, size in messages_of(chunks):
            self._unsent += encode(message, size, self._mask)

    def queue_messages(self, messages: Sequence[bytes | str]) -> None:
        """Queue each message as it is.

        Raises:
            As `WebSocket.send`.
        """
        self._raise_if_not_open()
        for message in messages:
            if isinstance(message, str):
                self._framing.send_text(message)
            self._take_writes()
            if not isinstance(message, str):
                self._unsent += encode([message], len(message), self._mask)

    def take_unsent(self) -> list[Bytes]:
        """Take what is queued."""
        self._take_writes()
        unsent, self._unsent = self._unsent, []
        return unsent

    def _raise_if_not_open(self) -> None:
        if not self._framing.is_open:
            raise fresh_copy(self._framing.closed or trio.BrokenResourceError("the WebSocket is closed"))

    def _take_writes(self) -> None:
        self._unsent += self._framing.writes
        self._framing.writes = []

    # What comes

    def receive_nowait(self) -> list[Message] | None:
        """Like `WebSocket.receive`, but it never waits: None when nothing has come. After `watch` only.

        Empty when what came is no message, or not a whole one, or when others should have their turn: call again.
        """
        framing = self._framing
        if not framing.received:
            if framing.closed is not None:
                raise fresh_copy(framing.closed)
            if self.ended:
                self.raise_if_ended()
            if not self.unparsed:
                assert self._watched is not None
                amount = self._watched.receive_into_nowait(self.free() if self._begun else self._buffer)
                if amount is None:
                    return None
                self.drained = self._watched.drained
                self.keep(amount)
            self.parse()
        messages, framing.received = framing.received, []
        return messages

    def raise_if_ended(self) -> None:
        if self.ended:
            raise trio.BrokenResourceError("the connection ended without a close frame")

    def free(self) -> memoryview:
        """The part of the buffer to read into."""
        size = len(self._begun)
        self._buffer[:size] = self._begun
        self._begun = self._buffer[:size]
        return self._buffer[size:]

    def keep(self, amount: int) -> None:
        """Keep what was read. The buffer grows when a trusted peer fills it."""
        buffer = self._buffer
        if self._begun:
            amount = amount and len(self._begun) + amount  # an incomplete message at EOF is lost
            self._begun = buffer[:0]
        self.unparsed = buffer[:amount]
        self._is_full = amount == len(buffer)
        if self._is_full and amount < _READ_SIZE and self._meter.trusted:
            self._buffer = memoryview(bytearray(min(4 * amount, _READ_SIZE)))

    def parse(self) -> None:
        """Parse what was read, or as many frames of it as a turn may have."""
        data, framing = self.unparsed, self._framing
        if not data:
            self.ended = True
            framing.receive_eof()
        elif self._frames is not None:
            used, pieces = self._frames.split(data, more=self._is_full)
            rest = data[used:]
            if self._frames.incomplete:
                self.unparsed, self._begun = rest[:0], rest
            else:
                self.unparsed = rest
            for binary, piece in pieces:
                if not binary:
                    framing.receive(piece)
                elif framing.closed is None:
                    framing.received.append(piece)
            if self._frames.failure is not None:
                framing.fail(*self._frames.failure)
        else:
            amount = self._meter.admit(data)
            self.unparsed = data[amount:]
            framing.receive(data[:amount])
            if self._meter.trusted and self._meter.between_frames and not framing.inside_message:
                self._frames = BinaryFrames(None if framing.is_client else framing.apply_mask)
        if framing.writes:
            self._on_replies()
        if self.unparsed or framing.closed is not None:
            self.drained = False


def bytes_in(messages: Sequence[Message], on_text: Callable[[str], object]) -> list[Bytes]:
    """The binary ones of `messages`. The others go to `on_text`."""
    received: list[Bytes] = []
    for message in messages:
        match message:
            case str():
                on_text(message)
            case _:
                received.append(message)
    return received
