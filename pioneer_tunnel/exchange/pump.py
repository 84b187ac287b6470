"""Copies bytes both ways between two streams until both have ended: the last hop at either end of a tunnel.

EOF on one side becomes EOF on the other, after all data before it. A break on either side becomes a reset on both.
Bytes are neither inspected nor changed.
"""

from __future__ import annotations

from collections.abc import Callable
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
    """Raised by the second stream's `receive_some` to leave the pump without being closed."""


async def pump(first: ByteStream, second: ByteStream, *, apology: bytes | Callable[[], bytes] = b"") -> bool:
    """Copy both ways, half-close included, and close both streams.

    If `second` raises `HandedOver`, `first` is closed and `second` stays open. If a stream breaks, or another task
    closes one, or on cancellation, both are reset, so that no truncated stream looks complete.

    Args:
        apology: sent to `second`, which is then closed in order, if `first` breaks before it has sent anything. A
            function is called then.

    Returns:
        True unless both were reset. Raises only `trio.Cancelled` and what a bug raises.
    """
    closed = False
    spoke: set[ByteStream] = set()
    try:
        ending = None if apology else await _join_sockets(first, second)  # which does not note who has sent
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
                await second.send_all(apology() if callable(apology) else apology)
                await close_after_answer(second)
        elif ending is not Ending.CLOSED:
            # A server that refuses a request without reading all of it sends an answer and then resets. Flush the
            # answer before the reset, which would overtake it.
            with trio.move_on_after(_DRAIN_TIMEOUT):
                await (second if ending is Ending.FIRST_BROKE else first).wait_flushed()
        closed = ending in {Ending.CLOSED, Ending.ENDED, Ending.HANDED_OVER}
    except trio.ClosedResourceError:
        pass  # another task closed one of the streams
    finally:
        if not closed:
            try:
                await abandon(first)
            finally:
                await abandon(second)  # also if the first call raised
    return closed


async def _join_sockets(first: ByteStream, second: ByteStream) -> Ending | None:
    """Take the fast path; None if it is not available, and nothing was moved."""
    one, other = first.plain_socket, second.plain_socket
    if not CAN_JOIN or one is None or other is None:
        return None
    try:
        return await join(one, other)
    except OSError:
        return None  # out of descriptors


async def _room(sink: ByteStream) -> int:
    """How many bytes to read for `sink`, so that few wait in this process while it takes nothing."""
    while (room := sink.room) == 0:
        # No deadline: the peer may read as slowly as it likes. The heartbeat of its connection detects a dead one.
        await sink.wait_send_all_might_not_block()
    return _LARGEST_READ if room is None else room


@final
class _Exchange:
    """Two copying tasks and the state that they share. Streams that have sent data are added to `spoke`."""

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
        """Copy until both have sent EOF, or one has broken."""
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
        await self._wait_broken(source)

    async def _wait_broken(self, source: ByteStream) -> None:
        """After EOF of `source`, notice if it breaks while the other direction goes on.

        Otherwise a visitor that sent EOF and then left, or a lost link, would be noticed only when the gateway sends.
        """
        self._done += 1
        if self._done == 2:
            self._scope.cancel()
        elif self._broken is None and await source.wait_broken():
            self._break(source)

    async def _read_and_send(self, source: ByteStream, sink: ByteStream) -> None:
        # Each read allocates its buffer: small for a stream that sends little, large for one that sends much.
        size = _SMALLEST_READ
        while data := await self._receive(source, wanted := min(size, await _room(sink))):
            self._spoke.add(source)
            await sink.send_pieces([bytes(data)])
            if len(data) == wanted:
                size = min(size * 4, _LARGEST_READ)
            elif len(data) < wanted // 4 and size > _SMALLEST_READ:
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
        # Without half-close the exchange is over when the answer is complete. The flag is set first, since the other
        # direction gets `ClosedResourceError` during the close.
        self._ended_by_us = True
        await sink.aclose()
        await source.aclose()
