"""An exchange: moves bytes both ways between two legs, by callbacks, until both have ended or one has broken.

The states of a direction, which is a `_Flow`:

    moving      bytes pass from the source to the sink, as far as the sink takes them
    ended       the source has sent EOF, and it was passed on; the sink may still hold some of what was sent
    refused     the sink takes no more. What it sends itself is moved all the same: it may be the answer to a request
                that it did not read to the end

The exchange is over when both directions are ended or refused and the sinks hold nothing, when a source breaks or is
closed by its owner, and when a leg hands over.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Final, final

import trio

from .._model.callbacks import nothing
from .._model.counters import UNCOUNTED, Amount
from .._net.leg import LARGEST_READ, Leg

__all__ = ["Ending", "Exchange", "HandedOver"]

_WORTH_A_PIPE: Final = 16 * 1024
_TURN: Final = 256 * 1024
"""Bytes that one direction moves before others have their turn."""


@final
class Ending(enum.Enum):
    """How an exchange ended."""

    CLOSED = enum.auto()
    """Both sent EOF, everything was passed on, and both are closed."""
    ENDED = enum.auto()
    """Both sent EOF, and at least one still has to be closed."""
    FIRST_BROKE = enum.auto()
    """Neither is closed."""
    SECOND_BROKE = enum.auto()
    """Neither is closed."""
    HANDED_OVER = enum.auto()
    """The second goes on without the first. Neither is closed."""
    STOPPED = enum.auto()
    """It was cancelled, or a leg has a bug. Neither is closed."""


class HandedOver(Exception):
    """Raised by the second leg's `receive` to leave the exchange without being closed."""


@final
class Exchange:
    """Moves bytes between two legs.

    Args:
        on_end: called once, when the exchange is over.
        soon: calls back after others had their turn; the callback returns how many bytes it moved.
        forth, back: count the bytes that are read from the first and from the second leg. Prefixes do not count.

    Attributes:
        ending: how it ended; None while it has not.
        error: the bug of a leg that ended it.
        first_spoke: whether the first leg has sent anything.
    """

    __slots__ = ("_flows", "_on_end", "ending", "error", "first_spoke", "soon")

    def __init__(
        self,
        first: Leg,
        second: Leg,
        *,
        on_end: Callable[[], None],
        soon: Callable[[Callable[[], int]], None],
        forth: Amount = UNCOUNTED,
        back: Amount = UNCOUNTED,
    ) -> None:
        self._on_end = on_end
        self.soon: Final = soon
        self.ending: Ending | None = None
        self.error: Exception | None = None
        self.first_spoke: bool = False
        self._flows: Sequence[_Flow] = (
            _Flow(self, first, second, Ending.FIRST_BROKE, forth),
            _Flow(self, second, first, Ending.SECOND_BROKE, back),
        )  # none after the end

    def begin(self) -> None:
        """Attach both legs, and move what has come. When the system has no memory for that, the exchange ends."""
        forth, back = self._flows
        first, second = forth.source, back.source
        first.on_readable = second.on_writable = forth.move
        second.on_readable = first.on_writable = back.move
        try:
            first.attach()
            second.attach()
        except (OSError, trio.ClosedResourceError, trio.BusyResourceError) as error:
            self.end(Ending.STOPPED, None if isinstance(error, OSError) else error)
            return
        forth.begin()
        back.begin()

    def advance(self) -> None:
        """End if both directions have ended."""
        if self.ending is not None:
            return
        forth, back = self._flows
        if forth.over and back.over and forth.sink.sent and back.sink.sent:
            self.end(Ending.ENDED)

    def give_up(self, source: Leg) -> None:
        """Read `source` no more."""
        for flow in self._flows:
            if flow.source is source:
                flow.over = True

    def end(self, ending: Ending, error: Exception | None = None) -> None:
        """End it. Later calls change nothing."""
        if self.ending is not None:
            return
        forth, back = self._flows
        first, second = forth.source, back.source
        self.first_spoke, self.error = forth.spoke, error
        if ending is Ending.ENDED and not (forth.refused or back.refused) and first.close() and second.close():
            ending = Ending.CLOSED
        else:
            first.detach()
            second.detach()
        self.ending = ending
        # Break reference cycles: collecting them costs each short connection some 20 us.
        on_end, self._on_end, self._flows = self._on_end, nothing, ()
        for leg in (first, second):
            leg.on_readable = leg.on_writable = nothing
        on_end()


@final
class _Flow:
    """One direction of an exchange."""

    __slots__ = ("_amount", "_broke", "_exchange", "_size", "over", "refused", "sink", "source", "spoke")

    def __init__(self, exchange: Exchange, source: Leg, sink: Leg, broke: Ending, amount: Amount) -> None:
        self._exchange: Final = exchange
        self.source: Final = source
        self.sink: Final = sink
        self._broke: Final = broke
        self._amount: Final = amount
        # Small for a leg that sends little, large for one that sends much.
        self._size = source.smallest_read
        self.over = False
        self.refused = False
        self.spoke = False

    def begin(self) -> None:
        """Move the prefix, then what has come."""
        prefix, self.source.prefix = self.source.prefix, b""
        if prefix:
            self.spoke = True
            try:
                self.sink.send(prefix)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self.refused = self.over = True
        self.move()

    def move(self) -> int:
        """Move what the source has, as far as the sink takes it, and at most one turn's worth. Returns the amount."""
        if self._exchange.ending is not None:
            return 0
        exchange, source, sink = self._exchange, self.source, self.sink
        moved = 0
        try:
            if sink.refusal is not None and not self.refused:
                self._refuse_because(sink.refusal)
            elif self.over:
                self._look_after_end()
            while not self.over and exchange.ending is None:
                if moved >= _TURN:
                    exchange.soon(self.move)
                    break
                room = sink.room or source.held
                if not room:
                    # No deadline: the peer may read as slowly as it likes. Its link's heartbeat detects a dead one.
                    break
                size = self._size
                if size == LARGEST_READ and source.moves_bulk:
                    try:
                        amount = source.move_bulk(sink)
                    except trio.BrokenResourceError:
                        self._refuse()
                        break
                    if amount:
                        moved += amount
                        self._amount.total += amount
                        self._size = LARGEST_READ if amount >= _WORTH_A_PIPE else source.smallest_read
                        continue
                wanted = min(size, room)
                data = source.receive(wanted)
                if data is None:
                    break
                amount = len(data)
                if not amount:
                    self._pass_eof_on()
                    break
                self.spoke = True
                moved += amount
                self._amount.total += amount
                try:
                    sent = sink.send(data)
                except trio.BrokenResourceError:
                    self._refuse()
                    break
                if not sent:
                    source.lend(amount)
                if amount == wanted:
                    self._size = min(size * 4, LARGEST_READ)
                else:
                    if amount < wanted // 4 and size > source.smallest_read:
                        self._size = size // 4
                    if source.drained:
                        break
        except HandedOver:
            exchange.end(Ending.HANDED_OVER)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            exchange.end(self._broke)
        except Exception as error:  # noqa: BLE001  # it ends this exchange, and no other
            exchange.end(Ending.STOPPED, error)
        return moved

    def _refuse_because(self, refusal: Exception) -> None:
        if not isinstance(refusal, trio.BrokenResourceError):
            raise refusal
        self._refuse()

    def _refuse(self) -> None:
        self.refused = True
        self._finish()

    def _pass_eof_on(self) -> None:
        if not self.sink.can_half_close:
            # Without half-close the exchange is over when the answer is complete.
            self._exchange.give_up(self.sink)
        else:
            try:
                self.sink.send_eof()
            except trio.BrokenResourceError:
                self.refused = True
        self._finish()

    def _finish(self) -> None:
        self.over = True
        self._exchange.advance()
        if self._exchange.ending is None:
            self._look_after_end()

    def _look_after_end(self) -> None:
        """When nothing more passes: notice that the source breaks, and that the sink has let go of everything."""
        if self.sink.sent:
            self.source.lend(0)
        if self.source.broken:
            self._exchange.end(self._broke)
        else:
            self._exchange.advance()
