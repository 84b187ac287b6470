"""Carries one visitor: an exchange between two streams, and their end.

EOF on one side becomes EOF on the other, after all data before it. A break on either side becomes a reset on both.
Bytes are neither inspected nor changed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, Final, final

import trio

from .._model.counters import UNCOUNTED, Amount
from .._net.closing import abandon, close_after_answer
from .._net.fastpath.event_loop import Reactor
from .._net.fastpath.stay import Stay
from .._net.leg import Leg
from .._net.streams import ByteStream
from .exchange import Ending, Exchange, HandedOver
from .task_leg import leg_of

__all__ = ["HandedOver", "Pump", "pump"]

_APOLOGY_TIMEOUT: Final = 5.0
_DRAIN_TIMEOUT: Final = 1.0
_IN_ORDER: Final = frozenset({Ending.CLOSED, Ending.ENDED, Ending.HANDED_OVER})


def pump(
    first: ByteStream,
    second: ByteStream,
    *,
    second_leg: Leg | None = None,
    preface: bytes = b"",
    apology: bytes | Callable[[], bytes] = b"",
) -> Coroutine[Any, Any, bool]:
    """Run a `Pump` from its start to its end.

    Returns:
        True unless both streams were reset. Raises only `trio.Cancelled` and what a bug raises.
    """
    return Pump(first, second, second_leg=second_leg, preface=preface, apology=apology).run()


@final
class Pump:
    """Copies both ways, half-close included, and closes both streams.

    If `second_leg` raises `HandedOver`, `first` is closed and `second` stays open. If a stream breaks, or another task
    closes one, or it is stopped or cancelled, both are reset, so that no truncated stream looks complete.

    Use `run`; or, without a task, a `Carrier`.

    Args:
        second_leg: what to use for `second` in the exchange; by default `second` itself.
        preface: sent to `first` before anything else.
        apology: sent to `second`, which is then closed in order, if `first` breaks before it has sent anything. A
            function is called then.
        forth, back: count the bytes from `first` and from `second`. The preface does not count.
    """

    __slots__ = (
        "_apology",
        "_back",
        "_exchange",
        "_first",
        "_forth",
        "_legs",
        "_preface",
        "_second",
        "_second_leg",
    )

    _exchange: Exchange

    def __init__(
        self,
        first: ByteStream,
        second: ByteStream,
        *,
        second_leg: Leg | None = None,
        preface: bytes = b"",
        apology: bytes | Callable[[], bytes] = b"",
        forth: Amount = UNCOUNTED,
        back: Amount = UNCOUNTED,
    ) -> None:
        self._first: Final = first
        self._second: Final = second
        self._apology: Final = apology
        self._preface = preface
        self._second_leg = second_leg
        self._legs: tuple[Leg, Leg] | None = None
        self._forth: Final = forth
        self._back: Final = back

    def prepare(self) -> Sequence[Callable[[], Awaitable[None]]]:
        """Make the legs. Returns the tasks that must run from `begin` until `on_end`. Needs a stay."""
        if self._legs is None:
            other = self._second_leg or leg_of(self._second)
            one = leg_of(self._first)
            self._forth.total += len(one.prefix)
            self._back.total += len(other.prefix)
            other.prefix, self._preface = self._preface + other.prefix, b""
            self._legs = one, other
        one, other = self._legs
        return (*one.tasks, *other.tasks)

    async def run(self) -> bool:
        """See `pump`."""
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            with Stay() as stay:
                tasks = self.prepare()
                self.begin(stay.end, stay.reactor)
                try:
                    if not tasks:
                        await stay.wait()
                    else:
                        async with trio.open_nursery() as nursery:
                            for task in tasks:
                                nursery.start_soon(task)
                            await stay.wait()
                            nursery.cancel_scope.cancel()
                finally:
                    self.stop()
        except BaseException:
            await self._abandon()
            raise
        return await self.finish()

    def begin(self, on_end: Callable[[], None], reactor: Reactor) -> None:
        """Begin to copy. `on_end` is called once, when that is over; then `finish` is to be called. After `prepare`."""
        assert self._legs is not None
        (one, other), self._legs = self._legs, None
        self._exchange = Exchange(one, other, on_end=on_end, soon=reactor.queue, forth=self._forth, back=self._back)
        reactor.turn.run(self._exchange.begin)

    def stop(self) -> None:
        """Copy no more; `finish` then resets both streams. Does nothing if the exchange is over."""
        self._exchange.end(Ending.STOPPED)

    @property
    def closed(self) -> bool:
        """Whether both streams are closed in order already, so that `finish` has nothing to do."""
        return self._exchange.ending is Ending.CLOSED

    @property
    def in_order(self) -> bool:
        """After its end: whether both streams ended in order, or the first one did and the second goes on."""
        return hasattr(self, "_exchange") and self._exchange.ending in _IN_ORDER

    async def finish(self) -> bool:
        """Close or reset the streams, as the end of the exchange asks for. Returns and raises as `pump`."""
        exchange = self._exchange
        ending = exchange.ending
        if ending is Ending.CLOSED:
            return True
        closed = False
        try:
            if exchange.error is not None:
                raise exchange.error
            if ending is Ending.ENDED:
                await self._first.aclose()
                await self._second.aclose()
                closed = True
            elif ending is Ending.HANDED_OVER:
                with trio.move_on_after(_DRAIN_TIMEOUT):
                    await self._first.aclose()
                closed = True
            elif ending is Ending.FIRST_BROKE and not exchange.first_spoke and self._apology:
                with trio.move_on_after(_APOLOGY_TIMEOUT), suppress(trio.BrokenResourceError):
                    await self._second.send_all(self._apology() if callable(self._apology) else self._apology)
                    await close_after_answer(self._second)
            elif ending is not Ending.STOPPED:
                # A server that refuses a request without reading all of it sends an answer and then resets. Flush the
                # answer before the reset, which would overtake it.
                with trio.move_on_after(_DRAIN_TIMEOUT):
                    await (self._second if ending is Ending.FIRST_BROKE else self._first).wait_flushed()
        except trio.ClosedResourceError:
            pass  # another task closed one of the streams
        finally:
            if not closed:
                await self._abandon()
        return closed

    async def _abandon(self) -> None:
        try:
            await abandon(self._first)
        finally:
            await abandon(self._second)  # also if the first call raised
