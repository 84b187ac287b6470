"""A WebSocket over a stream: reads, writes, and the buffers between them. A `Framing` makes and parses the frames.

Received pings and closes need a reply. A task sends the replies, so that the receiver never waits for the sender. It
ends when all are sent: most connections are idle, and a task that waits takes 3 KiB.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

import trio

from .._model.errors import fresh_copy
from .._model.exception_groups import lone_error_bare
from .._net.adopted import adopt
from .._net.link import Bytes
from .._net.streams import ByteStream
from .binary_frames import BinaryFrames, encode
from .frame_meter import FrameMeter
from .framing import Framing
from .messages import Message, messages_of

__all__ = ["WebSocket"]

_READ_SIZE: Final = 256 * 1024
_FIRST_READ: Final = 4 * 1024
"""Bytes of the first reads, and of all reads from a peer that is not trusted yet."""


class WebSocket(trio.abc.AsyncResource):
    """A WebSocket. One task may send and one may receive. Pings are answered without either.

    Args:
        stream: closed when `running` ends.
        framing: makes and parses the frames.
        meter: counts what the peer sends.

    Attributes:
        stream: the stream below. It has its user's bytes until the opening is over.
        subprotocol: the one that both ends agreed on; None when there is none.
        date: the `Date` header of the server's response, as it was sent; None on the server, and when there is none.
        drained: see `Link.drained`.
    """

    def __init__(self, stream: trio.abc.Stream, framing: Framing, meter: FrameMeter) -> None:
        self.stream: Final = adopt(stream)
        self.meter: Final = meter
        self.subprotocol: str | None = None
        self.date: str | None = None
        self.drained: bool = False
        self._framing: Final = framing
        self._mask: Final = framing.apply_mask if framing.is_client else None
        self._eof = False
        self._buffer = memoryview(bytearray(_FIRST_READ))
        self._unparsed = self._buffer[:0]
        self._begun = self._buffer[:0]  # of a message, whose rest comes with the next read
        self._is_full = False  # whether the last read has filled the buffer, so that more has come
        self._unsent: list[Bytes] = []
        self._frames: BinaryFrames | None = None  # once the opening is over and the peer is trusted
        self._watched: ByteStream | None = None  # what reads and writes without waiting
        self._flushing = False
        self._flushed: Final = trio.lowlevel.ParkingLot()
        self._tasks: trio.Nursery | None = None  # for a task that sends replies
        self._replying = False  # whether there is one

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Have tasks for replies. Close the stream at the end."""
        try:
            with lone_error_bare():
                async with trio.open_nursery() as nursery:
                    self._tasks = nursery
                    try:
                        yield
                    finally:
                        self._tasks = None
                    nursery.cancel_scope.cancel()
        finally:
            await trio.aclose_forcefully(self.stream)

    def trust(self) -> None:
        """Remove the limit of `Opening.allowance`: the peer has authenticated."""
        self.meter.trusted = True

    async def send(self, messages: Sequence[bytes | str]) -> None:
        """Send each message, in order, in as few writes as possible.

        Raises:
            trio.BrokenResourceError: the WebSocket is closed or broken.

        If cancelled, it may have sent a part of a frame. After that, only `aclose` is allowed.
        """
        self._raise_if_not_open()
        for message in messages:
            if isinstance(message, str):
                self._framing.send_text(message)
            self._take_writes()
            if not isinstance(message, str):
                self._unsent += encode([message], len(message), self._mask)
        await self.flush()

    def offer_text(self, text: str) -> bool:
        """Queue a text message, to be sent soon. Does not wait.

        False, and it is not sent, if others still wait or the WebSocket is closed.
        """
        framing = self._framing
        if framing.writes or self._unsent or not framing.is_open:
            return False
        framing.send_text(text)
        self._reply_soon()  # unless the next `send` takes it first
        return True

    async def send_binary(self, chunks: Sequence[Bytes]) -> None:
        """Send `chunks`, in order, in binary messages of at most 64 KiB. With no chunks, send what still waits.

        Raises:
            As `send`.
        """
        self._queue(chunks)
        await self.flush()

    def send_binary_nowait(self, chunks: Sequence[Bytes]) -> bool | None:
        """Like `send_binary`, as far as that is possible without waiting.

        Returns:
            False if a rest waits: then call `send_binary` next, which sends it first. None if that is not possible
            now, and it has taken nothing.

        Raises:
            As `send`.
        """
        if self._flushing or self._watched is None:
            return None
        self._queue(chunks)
        self._unsent = self._watched.send_nowait(self._unsent)
        return not self._unsent

    def _queue(self, chunks: Sequence[Bytes]) -> None:
        framing = self._framing
        if not framing.is_open:
            self._raise_if_not_open()
        if framing.writes:
            self._take_writes()
        for message, size in messages_of(chunks):
            self._unsent += encode(message, size, self._mask)

    def _raise_if_not_open(self) -> None:
        if not self._framing.is_open:
            raise fresh_copy(self._framing.closed or trio.BrokenResourceError("the WebSocket is closed"))

    def _take_writes(self) -> None:
        self._unsent += self._framing.writes
        self._framing.writes = []

    async def flush(self) -> None:
        """Send what is queued. One task at a time; the others wait for it."""
        while self._flushing:
            await self._flushed.park()
        self._flushing = True
        try:
            while True:
                self._take_writes()
                if not self._unsent:
                    break
                unsent, self._unsent = self._unsent, []
                await self.stream.send_pieces(unsent)
        finally:
            self._flushing = False
            self._flushed.unpark_all()

    async def receive(self) -> list[Message]:
        """Wait for messages and return those that have arrived, at least one.

        A binary message may come in pieces. A piece that is a view is valid until the next call.

        Raises:
            WebSocketClosed: the WebSocket was closed. We close it when the peer violates RFC 6455, or sends more than
                1 MiB of binary or 16 KiB of text in one message. The close code says which.
            trio.BrokenResourceError: the connection ended without a close frame; or the peer, not trusted yet, sent
                more than its allowance.
        """
        framing = self._framing
        while not framing.received:
            if framing.closed is not None:
                raise fresh_copy(framing.closed)
            await self.receive_bytes()
        messages, framing.received = framing.received, []
        return messages

    def watch(self, on_readable: Callable[[], object]) -> bool:
        """See `Link.watch`. To be called when the opening is over."""
        self._watched = self.stream.watch(on_readable)
        return self._watched is not None

    def unwatch(self) -> None:
        """See `Link.unwatch`."""
        if self._watched is not None:
            self._watched.unwatch()

    def receive_nowait(self) -> list[Message] | None:
        """Like `receive`, but it never waits: None when nothing has come. After `watch` only.

        Empty when what came is no message, or not a whole one, or when others should have their turn: call again.
        """
        framing = self._framing
        if not framing.received:
            if framing.closed is not None:
                raise fresh_copy(framing.closed)
            if self._eof:
                self._raise_if_eof()
            if not self._unparsed:
                assert self._watched is not None
                amount = self._watched.receive_into_nowait(self._free() if self._begun else self._buffer)
                if amount is None:
                    return None
                self.drained = self._watched.drained
                self._keep(amount)
            self._parse()
            if self._unparsed or framing.closed is not None:
                self.drained = False
        messages, framing.received = framing.received, []
        return messages

    async def receive_bytes(self) -> memoryview:
        """Wait for bytes, parse them, and return them; empty at the end of the connection.

        The HTTP head of the opening comes alone. When there are many small frames, the next call parses the rest, after
        other tasks have run.
        """
        self._raise_if_eof()
        if self._unparsed:
            await trio.lowlevel.checkpoint()
        else:
            self._keep(await self.stream.receive_into(self._free()))
        data = self._unparsed
        self._parse()
        return data[: len(data) - len(self._unparsed)]

    def _raise_if_eof(self) -> None:
        if self._eof:
            raise trio.BrokenResourceError("the connection ended without a close frame")

    def _free(self) -> memoryview:
        """The part of the buffer to read into."""
        size = len(self._begun)
        self._buffer[:size] = self._begun
        self._begun = self._buffer[:size]
        return self._buffer[size:]

    def _keep(self, amount: int) -> None:
        """Keep what was read. The buffer grows when a trusted peer fills it."""
        buffer = self._buffer
        if self._begun:
            amount = amount and len(self._begun) + amount  # an incomplete message at EOF is lost
            self._begun = buffer[:0]
        self._unparsed = buffer[:amount]
        self._is_full = amount == len(buffer)
        if self._is_full and amount < _READ_SIZE and self.meter.trusted:
            self._buffer = memoryview(bytearray(min(4 * amount, _READ_SIZE)))

    def _parse(self) -> None:
        """Parse what was read, or as many frames of it as a turn may have."""
        data, framing = self._unparsed, self._framing
        if not data:
            self._eof = True
            framing.receive_eof()
        elif self._frames is not None:
            used, pieces = self._frames.split(data, more=self._is_full)
            rest = data[used:]
            if self._frames.incomplete:
                self._unparsed, self._begun = rest[:0], rest
            else:
                self._unparsed = rest
            for binary, piece in pieces:
                if not binary:
                    framing.receive(piece)
                elif framing.closed is None:
                    framing.received.append(piece)
            if self._frames.failure is not None:
                framing.fail(*self._frames.failure)
        else:
            amount = self.meter.admit(data)
            self._unparsed = data[amount:]
            framing.receive(data[:amount])
            if self.meter.trusted and self.meter.between_frames and not framing.inside_message:
                self._frames = BinaryFrames(None if framing.is_client else framing.apply_mask)
        if framing.writes:
            self._reply_soon()

    def _reply_soon(self) -> None:
        if self._tasks is not None and not self._replying:
            self._replying = True
            self._tasks.start_soon(self._send_replies)

    async def _send_replies(self) -> None:
        """Send pongs, the reply to a close frame, and offered texts."""
        try:
            while self._framing.writes:
                await self.flush()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the task that receives or sends gets the error, too
        finally:
            self._replying = False

    async def close(self, code: int, reason: str = "") -> None:
        """Send a close frame, if none was sent, wait for the peer's, and close the stream.

        The caller sets the deadline. A connection that is already gone is no error. If cancelled, the stream is closed
        at once.
        """
        framing = self._framing
        try:
            if framing.is_open:
                framing.close(code, reason)
            await self.flush()
            while not self._eof and framing.closed is None:
                framing.received.clear()  # these messages are never read, and the peer may send any number of them
                await self.receive_bytes()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            await trio.aclose_forcefully(self.stream)

    async def aclose(self) -> None:
        """Close with code 1000. See `close`."""
        await self.close(1000)
