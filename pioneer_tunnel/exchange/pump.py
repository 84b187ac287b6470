"""Carries one visitor: an exchange between two streams, and their end.

EOF on one side becomes EOF on the other, after all data before it. A break on either side becomes a reset on both.
Bytes are neither inspected nor changed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Final

import trio

from .._net.closing import abandon, close_after_answer
from .._net.fastpath.event_loop import Reactor
from .._net.leg import Leg
from .._net.streams import ByteStream
from .._net.turn import Turn
from .exchange import Ending, Exchange, HandedOver
from .task_leg import leg_of

__all__ = ["HandedOver", "pump"]

_APOLOGY_TIMEOUT: Final = 5.0
_DRAIN_TIMEOUT: Final = 1.0


async def pump(
    first: ByteStream,
    second: ByteStream,
    *,
    second_leg: Leg | None = None,
    preface: bytes = b"",
    apology: bytes | Callable[[], bytes] = b"",
) -> bool:
    """Copy both ways, half-close included, and close both streams.

    If `second_leg` raises `HandedOver`, `first` is closed and `second` stays open. If a stream breaks, or another task
    closes one, or on cancellation, both are reset, so that no truncated stream looks complete.

    Args:
        second_leg: what to use for `second` in the exchange; by default `second` itself.
        preface: sent to `first` before anything else.
        apology: sent to `second`, which is then closed in order, if `first` breaks before it has sent anything. A
            function is called then.

    Returns:
        True unless both were reset. Raises only `trio.Cancelled` and what a bug raises.
    """
    closed = False
    try:
        exchange = await _run(first, second, second_leg, preface)
        ending = exchange.ending
        if ending is Ending.ENDED:
            await first.aclose()
            await second.aclose()
        elif ending is Ending.HANDED_OVER:
            with trio.move_on_after(_DRAIN_TIMEOUT):
                await first.aclose()
        elif ending is Ending.FIRST_BROKE and not exchange.first_spoke and apology:
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


async def _run(first: ByteStream, second: ByteStream, second_leg: Leg | None, preface: bytes) -> Exchange:
    """Run an exchange to its end."""
    await trio.lowlevel.checkpoint_if_cancelled()
    reactor = Reactor.current()
    with reactor.stay() as stay:
        one, other = leg_of(first), second_leg or leg_of(second)
        other.prefix = preface + other.prefix
        exchange = Exchange(one, other, on_end=stay.end, soon=reactor.queue)
        try:
            Turn.current().run(exchange.begin)
            tasks = (*one.tasks, *other.tasks)
            if not tasks:
                await stay.wait()
            else:
                async with trio.open_nursery() as nursery:
                    for task in tasks:
                        nursery.start_soon(task)
                    await stay.wait()
                    nursery.cancel_scope.cancel()
        finally:
            exchange.end(Ending.STOPPED)
    if exchange.error is not None:
        raise exchange.error
    return exchange
