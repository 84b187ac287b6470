"""Bytes both ways between two streams, until both have ended: the last metre on either side of a tunnel.

An end on one side becomes an end on the other, after everything before it; a break on either side becomes a reset on
both. Nothing is looked at, nothing is cut.

Neighbours: `forward` and the relay's ingress have two streams to be carried into each other; `splice` is the short way
where both are plain sockets.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Final, final

import trio

from .._net.closing import abandon, close_after_answer
from .._net.fastpath.splice import CAN_JOIN, Ending, join
from .._net.streams import ByteStream

__all__ = ["HandedOver", "pump"]

_SMALLEST_READ: Final = 4 * 1024
_LARGEST_READ: Final = 255 * 1024
_APOLOGY_TIMEOUT: Final = 5.0
_DRAIN_TIMEOUT: Final = 1.0


class HandedOver(Exception):
    """Raised by the second stream's `receive_some`: from now on it has no part in this pump, but stays open."""


async def pump(first: ByteStream, second: ByteStream, *, apology: bytes = b"") -> bool:
    """Copy both ways, half-close included, and close both streams.

    When `second` raises `HandedOver`, `first` is closed and `second` is left open. When a stream breaks, or is closed
    by somebody else, or on cancellation, both are abandoned, so that neither end takes a part for the whole. Returns
    quietly in any case, True unless they were abandoned; what comes out is `trio.Cancelled` and bugs.

    Args:
        apology: what `second` is told, before an orderly end, when `first` breaks before it has said anything.
    """
    closed = False
    spoke: set[ByteStream] = set()
    try:
        ending = None if apology else await _short_way(first, second)  # which does not look at who has spoken
        if ending is None:
            ending = await _Exchange(first, second, spoke).run()
        if ending is Ending.ENDED:
            await first.aclose()
            await second.aclose()
        elif ending is Ending.HANDED_OVER:
            with trio.move_on_after(_DRAIN_TIMEOUT):
                await first.aclose()
        elif ending is Ending.FIRST_BROKE and first not in spoke and apology:
            with trio.move_on_after(_APOLOGY_TIMEOUT), suppress(trio.BrokenResourceError):
                await second.send_all(apology)
                await close_after_answer(second)
        elif ending is not Ending.CLOSED:
            # A server that refuses a request without reading it to its end answers, and then resets. The answer goes
            # first, here and at the other end of the tunnel.
            with trio.move_on_after(_DRAIN_TIMEOUT):
                await (second if ending is Ending.FIRST_BROKE else first).wait_flushed()
        closed = ending in {Ending.CLOSED, Ending.ENDED, Ending.HANDED_OVER}
    except trio.ClosedResourceError:
        pass  # whoever has closed a stream of ours knows why
    finally:
        if not closed:
            try:
                await abandon(first)
            finally:
                await abandon(second)  # also when the first, under cancellation, ended in `trio.Cancelled`
    return closed


async def _short_way(first: ByteStream, second: ByteStream) -> Ending | None:
    """Join them; None when that cannot be, and nothing has happened."""
    one, other = first.plain_socket, second.plain_socket
    if not CAN_JOIN or one is None or other is None:
        return None
    try:
        return await join(one, other)
    except OSError:
        return None  # out of descriptors


async def _room(sink: ByteStream) -> int:
    """How much to read for `sink`, so that little waits in this process when it takes nothing."""
    while (room := sink.room) == 0:
        # No deadline: the other end may read as slowly as it likes. A dead one is found by its connection's heartbeat.
        await sink.wait_send_all_might_not_block()
    return _LARGEST_READ if room is None else room


@final
class _Exchange:
    """The long way, and what its two directions know of each other; `spoke` is told who has said something."""

    def __init__(self, first: ByteStream, second: ByteStream, spoke: set[ByteStream]) -> None:
        self._spoke: Final = spoke
        self._first: Final = first
        self._second: Final = second
        self._scope = trio.CancelScope()
        self._broken: ByteStream | None = None
        self._handed_over = False
        self._done = 0
        self._ended_by_us = False

    async def run(self) -> Ending:
        """Carry bytes until both have ended, or one has broken."""
        async with trio.open_nursery() as nursery:
            self._scope = nursery.cancel_scope
            nursery.start_soon(self._copy, self._second, self._first)
            await self._copy(self._first, self._second)
        if self._handed_over:
            return Ending.HANDED_OVER
        if self._broken is None:
            return Ending.ENDED
        return Ending.FIRST_BROKE if self._broken is self._first else Ending.SECOND_BROKE

    async def _copy(self, source: ByteStream, sink: ByteStream) -> None:
        try:
            await self._read_and_send(source, sink)
            if self._broken is None:
                await self._end(source, sink)
        except trio.BrokenResourceError:
            # `sink` takes no more. What it still sends is copied all the same: it may be the answer to a request that
            # it did not read to the end. If `sink` was reset, the other direction's receive raises.
            pass
        except trio.ClosedResourceError:
            if not self._ended_by_us:
                self._break(source)
        except HandedOver:
            self._handed_over = True
            self._scope.cancel()
        await self._stay(source)

    async def _stay(self, source: ByteStream) -> None:
        """With nothing left to carry, see whether `source` breaks while the other direction goes on.

        A visitor that has said all and left, or a link that was lost, would else be noticed only when the gateway
        has something to say.
        """
        self._done += 1
        if self._done == 2:
            self._scope.cancel()
        elif self._broken is None and await source.wait_broken():
            self._break(source)

    async def _read_and_send(self, source: ByteStream, sink: ByteStream) -> None:
        # A read buffer is made for each read: small for who says little, large for who says much.
        size = _SMALLEST_READ
        while data := await self._receive(source, min(size, await _room(sink))):
            self._spoke.add(source)
            await sink.send_pieces([bytes(data)])
            if len(data) == size:
                size = min(size * 4, _LARGEST_READ)
            elif len(data) < size // 4 and size > _SMALLEST_READ:
                size //= 4

    async def _receive(self, source: ByteStream, size: int) -> bytes | bytearray:
        try:
            return await source.receive_some(size)
        except trio.BrokenResourceError:
            self._break(source)
            return b""

    def _break(self, source: ByteStream) -> None:
        self._broken = source
        self._scope.cancel()

    async def _end(self, source: ByteStream, sink: ByteStream) -> None:
        if sink.can_half_close:
            await sink.send_eof()
            return
        # TLS knows no half-close that both ends would agree on: when the answer is complete, so is the exchange. Noted
        # first, since the other direction hears of it in the middle of the closing.
        self._ended_by_us = True
        await sink.aclose()
        await source.aclose()
