"""A WebSocket over a stream: the tasks that read and write. A `Framing` makes and parses the frames.

The driver has the buffers, and all that does not wait.

Received pings and closes need a reply. A task sends the replies, so that the receiver never waits for the sender. It
ends when all are sent: most connections are idle, and a task that waits takes 3 KiB.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import trio

from .._model.errors import fresh_copy
from .._model.exception_groups import lone_error_bare
from .._net.adopted import adopt
from .._net.link import Bytes
from .driver import Driver
from .frame_meter import FrameMeter
from .framing import Framing
from .messages import Message

__all__ = ["WebSocket"]


class WebSocket(trio.abc.AsyncResource):
    """A WebSocket. One task may send and one may receive. Pings are answered without either.

    Args:
        stream: closed when `running` ends.
        framing: makes and parses the frames.
        meter: counts what the peer sends.

    Attributes:
        stream: the stream below. It has its user's bytes until the opening is over.
        driver: what does not wait.
        meter: see the argument.
        subprotocol: the one that both ends agreed on; None when there is none.
        date: the `Date` header of the server's response, as it was sent; None on the server, and when there is none.
    """

    def __init__(self, stream: trio.abc.Stream, framing: Framing, meter: FrameMeter) -> None:
        self.stream: Final = adopt(stream)
        self.meter: Final = meter
        self.subprotocol: str | None = None
        self.date: str | None = None
        self.driver: Final = Driver(self.stream, framing, meter, on_replies=self._reply_soon)
        self._framing: Final = framing
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
        self.driver.queue_messages(messages)
        await self.flush()

    async def send_binary(self, chunks: Sequence[Bytes]) -> None:
        """Send `chunks`, in order, in binary messages of at most 64 KiB. With no chunks, send what still waits.

        Raises:
            As `send`.
        """
        self.driver.queue(chunks)
        await self.flush()

    async def flush(self) -> None:
        """Send what is queued. One task at a time; the others wait for it."""
        driver = self.driver
        while driver.flushing:
            await self._flushed.park()
        driver.flushing = True
        try:
            while unsent := driver.take_unsent():
                await self.stream.send_pieces(unsent)
        finally:
            driver.flushing = False
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

    async def receive_bytes(self) -> memoryview:
        """Wait for bytes, parse them, and return them; empty at the end of the connection.

        The HTTP head of the opening comes alone. When there are many small frames, the next call parses the rest, after
        other tasks have run.
        """
        driver = self.driver
        driver.raise_if_ended()
        if driver.unparsed:
            await trio.lowlevel.checkpoint()
        else:
            driver.keep(await self.stream.receive_into(driver.free()))
        data = driver.unparsed
        driver.parse()
        return data[: len(data) - len(driver.unparsed)]

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
            while not self.driver.ended and framing.closed is None:
                framing.received.clear()  # these messages are never read, and the peer may send any number of them
                await self.receive_bytes()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            await trio.aclose_forcefully(self.stream)

    async def aclose(self) -> None:
        """Close with code 1000. See `close`."""
        await self.close(1000)
