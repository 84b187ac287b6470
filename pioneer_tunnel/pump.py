"""Bytes both ways between two streams, until both have ended: the last metre on either side of a tunnel.

An end on one side becomes an end on the other, after everything before it; a break on either side becomes a reset on
both. Nothing is looked at, nothing is cut.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import Final, final

import trio

from .splice import SourceBroken, carry
from .streams import abandon, close_after_answer, drain, plain_socket, send_eof, send_pieces

__all__ = ["pump"]

_SMALLEST_READ: Final = 4 * 1024
_LARGEST_READ: Final = 255 * 1024
_APOLOGY_TIMEOUT: Final = 5.0
_DRAIN_TIMEOUT: Final = 1.0


async def pump(first: trio.abc.Stream, second: trio.abc.Stream, *, apology: bytes = b"") -> None:
    """Copy both ways, half-close included, and close both streams.

    When a stream breaks, or on cancellation, both are abandoned, so that neither end takes a part for the whole.
    Returns quietly in either case; what comes out is `trio.Cancelled` and bugs.

    Args:
        apology: what `second` is told, before an orderly end, when `first` breaks before it has said anything.
    """
    exchange = _Exchange()
    closed = False
    try:
        async with trio.open_nursery() as nursery:
            exchange.scope = nursery.cancel_scope
            nursery.start_soon(exchange.copy, second, first)
            await exchange.copy(first, second)
        if exchange.broken is None:
            await first.aclose()
            await second.aclose()
            closed = True
        elif exchange.broken is first and first not in exchange.spoke and apology:
            with trio.move_on_after(_APOLOGY_TIMEOUT), suppress(trio.BrokenResourceError):
                await second.send_all(apology)
                await close_after_answer(second)
        else:
            # A server that refuses a request without reading it to its end answers, and then resets. The answer goes
            # first, here and at the other end of the tunnel.
            with trio.move_on_after(_DRAIN_TIMEOUT):
                await drain(second if exchange.broken is first else first)
    finally:
        if not closed:
            try:
                await abandon(first)
            finally:
                await abandon(second)  # also when the first, under cancellation, ended in `trio.Cancelled`


@final
class _Exchange:
    """What the two directions know of each other."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.spoke: set[trio.abc.Stream] = set()
        self.was_reset: set[trio.abc.Stream] = set()
        self.broken: trio.abc.Stream | None = None
        self._done = 0

    async def copy(self, source: trio.abc.Stream, sink: trio.abc.Stream) -> None:
        from_socket, to_socket = plain_socket(source), plain_socket(sink)
        try:
            if from_socket is None or to_socket is None:
                await self._read_and_send(source, sink)
            else:
                try:
                    await carry(from_socket, to_socket, on_first=lambda: self.spoke.add(source))
                except SourceBroken:
                    self._break(source)
            if source in self.was_reset:
                self._break(source)
            if self.broken is None:
                await _end(source, sink)
        except trio.BrokenResourceError as error:
            # `sink` takes no more. What it still has to say is carried all the same: the answer to a request that
            # it did not want to read to the end. How that goes, the other direction finds out, with one exception.
            # The system tells of a reset once. When the one who sends hears of it, the one who receives is told of an
            # end, and half an answer would pass for a whole one.
            if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.ECONNRESET:
                self.was_reset.add(sink)
        except trio.ClosedResourceError:
            pass  # the other direction has ended the exchange (`_end`)
        await self._stay(source)

    async def _stay(self, source: trio.abc.Stream) -> None:
        """With nothing left to carry, see whether `source` breaks while the other direction goes on.

        A visitor that has said all and left, or a link that was lost, would else be noticed only when the gateway
        has something to say.
        """
        self._done += 1
        if self._done == 2:
            self.scope.cancel()
        elif self.broken is None and hasattr(source, "wait_broken") and await source.wait_broken():
            self._break(source)

    async def _read_and_send(self, source: trio.abc.Stream, sink: trio.abc.Stream) -> None:
        # A read buffer is made for each read: small for who says little, large for who says much.
        size = _SMALLEST_READ
        while data := await self._receive(source, size):
            self.spoke.add(source)
            await send_pieces(sink, [bytes(data)])
            if len(data) == size:
                size = min(size * 4, _LARGEST_READ)
            elif len(data) < size // 4 and size > _SMALLEST_READ:
                size //= 4

    async def _receive(self, source: trio.abc.Stream, size: int) -> bytes | bytearray:
        try:
            return await source.receive_some(size)
        except trio.BrokenResourceError:
            self._break(source)
            return b""

    def _break(self, source: trio.abc.Stream) -> None:
        self.broken = source
        self.scope.cancel()


async def _end(source: trio.abc.Stream, sink: trio.abc.Stream) -> None:
    await send_eof(sink)
    if not isinstance(sink, trio.abc.HalfCloseableStream):
        # TLS knows no half-close that both ends would agree on: when the answer is complete, so is the exchange.
        await source.aclose()
