"""A link that outlives its WebSocket: when one is lost, another one carries on where both ends have left off.

    open         a carrier (a WebSocket) takes what is sent, and brings what is received
    paused       the other end was told, or will be, how far this end is: the carrier is not used meanwhile
    suspended    there is no carrier. What waits to be sent waits on, and the tail stays
    ended        closed, or without a carrier for too long

The owner finds a carrier: a gateway dials, a relay is dialled. `pause` returns the counters for the other end; `attach`
takes the carrier and the other end's counters, sends again what the other end lacks, and gives the old carrier up. So
an old carrier may carry on until a new one has proved itself.

The link's user has one task that sends. While it is in `send`, no other task sends bytes, except `attach`, before it
lets the sender go on. Reports of received bytes are texts, which may stand between any two messages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final, NoReturn, final

import attrs
import trio

from .._model.addresses import Address
from .._model.callbacks import nothing
from .._model.errors import fresh_copy
from .._net.delivery import Delivery
from .._net.fastpath.event_loop import Reactor
from .._net.link import Budget, Bytes, Link
from .._wire.resumption import Counters, received_in, received_text
from ..websocket import WebSocketClosed, WebSocketLink
from .tail import LEAST_REPORT, Tail

__all__ = ["Carrier", "Loss", "ResumableLink"]

REPORT_DELAY: Final = 0.1
"""Seconds until what was received is reported, if it is less than a quarter of the peer's tail."""

_LOOK_EVERY: Final = 256 * 1024
"""Bytes that are sent between two looks whether the tail is full."""

_LOOK_WHILE_SHORT: Final = 64 * 1024
"""The same while memory is short."""

_BATCH: Final = 256 * 1024
"""Bytes that are sent again at once."""

_FOR_GOOD: Final = frozenset({1000, 1001, 1002, 1003, 1007, 1008, 1009})
"""Close codes with which a peer ends the session, and those from 4000. A proxy that gives up uses others, or none."""


@final
@attrs.frozen(eq=False)
class Carrier:
    """A WebSocket that carries the link, for the task that keeps it open.

    Attributes:
        link: the bytes and texts of the WebSocket.
        gone: set when the link has no more use for it. Then close it.
    """

    link: WebSocketLink
    gone: trio.Event = attrs.field(factory=trio.Event)


@final
@attrs.frozen
class Loss:
    """A carrier was lost.

    Attributes:
        reason: how.
        stuck: whether the path seemed to drop large packets, see `Delivery`.
        silence: seconds in which nothing had come.
        ended: whether it was ended by the other end, or by something on the way. False if this end gave it up, since
            nothing came.
    """

    reason: Exception
    stuck: bool
    silence: float
    ended: bool


@final
class ResumableLink(Link):
    """See the module.

    Args:
        carrier: the first one.
        tail: the counters.
        timeout: seconds without a carrier after which the link has ended.
        on_text: called with each text that is no report. `receive` raises what it raises.
        on_lost: called when the carrier is lost. Must not raise.

    `run` has to run while the link is used.

    Attributes:
        on_text, on_lost: see the arguments.
        resumes: how often it went on over another carrier.
        on_doubt: called when the path is in doubt; None if this end cannot look for another carrier.
        close_code, close_reason: what `aclose` sends.
    """

    __slots__ = (
        "_budget",
        "_carrier",
        "_changed",
        "_charged",
        "_due",
        "_failure",
        "_full_since",
        "_in",
        "_is_due",
        "_last_received",
        "_look_at",
        "_notice_at",
        "_on_interrupted",
        "_on_readable",
        "_out",
        "_outlast",
        "_paused",
        "_reading",
        "_replaying",
        "_tail",
        "_timeout",
        "_unsent_limit",
        "_usable_since",
        "close_code",
        "close_reason",
        "drained",
        "on_doubt",
        "on_lost",
        "on_text",
        "resumes",
    )

    def __init__(
        self,
        carrier: Carrier,
        tail: Tail,
        *,
        timeout: float,
        on_text: Callable[[str], object] = nothing,
        on_lost: Callable[[Loss], None] = nothing,
    ) -> None:
        self.on_text = on_text
        self.on_lost = on_lost
        self.on_doubt: Callable[[], None] | None = None
        self.drained: bool = False
        self.resumes: int = 0
        self.close_code: int = 1000
        self.close_reason: str = ""
        self._carrier: Carrier | None = carrier
        # For each batch that is sent or received, attributes are compared and not methods called.
        self._in: WebSocketLink | None = carrier.link  # while bytes may be received
        self._out: WebSocketLink | None = carrier.link  # while bytes may be sent, unless the tail is full
        self._look_at = 0  # how much was sent when to look next whether it is full
        self._notice_at = LEAST_REPORT  # how much was received when to report next, or to wake `run`
        self._charged = 0  # bytes of the tail that count in the budget
        self._tail: Final = tail
        self._timeout: Final = timeout
        self._on_interrupted: Callable[[], object] = nothing
        self._budget: Budget | None = None
        self._paused = False
        self._replaying = False
        self._failure: Exception | None = None
        self._usable_since = -math.inf
        self._last_received = -math.inf  # of earlier carriers
        self._full_since: float | None = None  # when the sender began to wait for a report, or got the last one
        self._on_readable: Callable[[], object] | None = None
        self._reading = trio.CancelScope()
        self._changed: Final = trio.lowlevel.ParkingLot()
        self._due = trio.Event()  # for `run`: a report, or the timeout
        self._is_due = False
        self._outlast: float | None = None
        self._unsent_limit: int | None = None
        carrier.link.on_text = self._take_text

    # What the owner does

    @property
    def carrier(self) -> Carrier | None:
        """The current one."""
        return self._carrier

    @property
    def peer(self) -> Address | None:
        """See `WebSocketLink.peer`; None while there is no carrier."""
        return None if self._carrier is None else self._carrier.link.peer

    @property
    def counters(self) -> Counters:
        """How far this end is."""
        return self._tail.counters

    @property
    def ends_at(self) -> float:
        """When it ends, if it is suspended and no carrier comes."""
        return self._usable_since + self._timeout

    @property
    def ended(self) -> bool:
        return self._failure is not None

    async def run(self) -> NoReturn:
        """Report what was received, and end the link when it is suspended for too long."""
        while True:
            # No deadline: an idle link has nothing to report.
            await self._due.wait()
            if self.suspended:
                with trio.move_on_at(self.ends_at):
                    await self.restored()
                    continue
                self.end(trio.BrokenResourceError(f"the link was not restored within {self._timeout:g} seconds"))
                await trio.sleep_forever()  # no deadline: the user of the link ends now, and then this
            await trio.sleep(REPORT_DELAY)
            if self._report():
                self._due, self._is_due = trio.Event(), False
                self._notice_at = self._tail.reported + LEAST_REPORT

    def pause(self) -> Counters:
        """Use the current carrier no more, for now; returns the counters for the other end.

        Bytes that are being sent on it are among those counted.
        """
        self._paused, self._in, self._out = True, None, None
        self._reading.cancel()
        return self._tail.counters

    def go_on(self) -> None:
        """Use the carrier again, since no other one came. Does nothing if one did."""
        if self._paused:
            self._paused = False
            self._wake()

    async def restored(self) -> None:
        """Wait until it is not suspended, or was not for a moment. The caller sets the deadline."""
        since = self._usable_since
        while self.suspended and self._usable_since == since:
            await self._changed.park()

    def check(self, peer: Counters) -> None:
        """See `Tail.check`."""
        self._tail.check(peer)

    async def attach(self, carrier: Carrier, peer: Counters) -> None:
        """Go on over `carrier`, with a peer that is at `peer`. Returns when all that it lacks is sent again.

        If cancelled, the carrier is lost.

        Raises:
            RemoteProtocolError: the counters do not fit. Nothing has changed.
            trio.BrokenResourceError: the link has ended.
        """
        self._raise_if_ended()
        again = self._tail.resume(peer)
        self._charge()
        self.resumes += 1
        self._look_at = self._tail.sent
        self._give_up_carrier()
        carrier.link.on_text = self._take_text
        self._carrier, self._paused, self._replaying = carrier, False, True
        self._usable_since = trio.current_time()
        self._full_since = None
        if self._outlast is not None:
            carrier.link.outlast(self._outlast)
        if self._unsent_limit is not None:
            carrier.link.limit_unsent(self._unsent_limit)
        if self._on_readable is not None and not carrier.link.watch(self._on_readable):
            self._lose(carrier, trio.BrokenResourceError("the new connection cannot be watched as the old one was"))
        self._wake()
        try:
            for batch in _batches(again):
                if self._carrier is not carrier or self._failure is not None:
                    return
                await carrier.link.send(batch)
            if self._carrier is carrier:
                self._replaying = False
                self._wake()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._fail(carrier.link, error)
        finally:
            if self._replaying and self._carrier is carrier:
                self._lose(carrier, trio.BrokenResourceError("it was given up while bytes were sent again"))

    def end(self, reason: Exception) -> None:
        """End the link: tasks that send or receive get `reason`."""
        if self._failure is None:
            self._failure = reason
            self._tail.clear()
            self._charge()
            self._reading.cancel()
            self._wake()

    async def send_text(self, text: str) -> None:
        """Send a text message. It is lost if the carrier is, and nothing is sent while the link is suspended.

        While it is paused, this waits: the handshake of a resume may have said something older already.
        """
        while self._paused and self._failure is None:
            await self._changed.park()
        if self._carrier is not None:
            link = self._carrier.link
            try:
                await link.send_text(text)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self._fail(link, error)

    async def abandon(self) -> None:
        """Close the connection at once, with a reset."""
        if self._carrier is not None:
            await self._carrier.link.abandon()

    # `Link`

    @property
    def last_received(self) -> float:
        carrier = self._carrier
        return self._last_received if carrier is None else max(self._last_received, carrier.link.last_received)

    @property
    def sending_since(self) -> float | None:
        carrier = self._carrier
        if carrier is None:
            return None
        return carrier.link.sending_since if self._full_since is None else self._full_since

    @property
    def suspended(self) -> bool:
        return self._carrier is None and self._failure is None

    @property
    def usable_since(self) -> float:
        return trio.current_time() if self._carrier is None else self._usable_since

    def lose_connection(self, reason: trio.BrokenResourceError) -> None:
        self._raise_if_ended()
        if self._carrier is not None:
            self._lose(self._carrier, reason)

    def bind(self, *, on_interrupted: Callable[[], object], budget: Budget) -> None:
        self._on_interrupted, self._budget = on_interrupted, budget

    def delivery(self) -> Delivery | None:
        return None if self._carrier is None else self._carrier.link.delivery()

    def restore(self) -> bool:
        if self.on_doubt is None:
            return False
        self.on_doubt()
        return True

    @property
    def address_is_gone(self) -> bool:
        return self._carrier is not None and self._carrier.link.address_is_gone

    def outlast(self, seconds: float) -> None:
        self._outlast = seconds
        if self._carrier is not None:
            self._carrier.link.outlast(seconds)

    @property
    def window_left(self) -> int:
        return 0 if self._carrier is None else self._carrier.link.window_left

    def expect_bulk(self) -> None:
        if self._carrier is not None:
            self._carrier.link.expect_bulk()

    def limit_unsent(self, limit: int) -> None:
        self._unsent_limit = limit
        if self._carrier is not None:
            self._carrier.link.limit_unsent(limit)

    @property
    def has_room(self) -> bool:
        link = self._out
        return link is not None and (self._tail.sent < self._look_at or self._has_space()) and link.has_room

    async def wait_room(self) -> None:
        link = await self._usable()
        try:
            await link.wait_room()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._fail(link, error)

    async def send(self, chunks: Sequence[Bytes]) -> None:
        link = await self._usable()
        self._tail.keep(chunks)
        try:
            # When the carrier is given up, its owner closes it, and this raises.
            await link.send(chunks)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._fail(link, error)

    def send_nowait(self, chunks: Sequence[Bytes]) -> bool | None:
        link, tail = self._out, self._tail
        if link is None or (tail.sent >= self._look_at and not self._has_space()):
            return None
        try:
            sent = link.send_nowait(chunks)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            tail.keep(chunks)
            self._fail(link, error)
            return False
        if sent is not None:
            tail.keep(chunks)
        return sent

    async def receive(self) -> Sequence[Bytes]:
        while True:
            link = self._in
            if link is None:
                self._raise_if_ended()
                await self._changed.park()
                continue
            chunks: Sequence[Bytes] = ()
            try:
                with trio.CancelScope() as self._reading:
                    chunks = await link.receive()
                    if not chunks:
                        raise trio.BrokenResourceError("the other end closed the connection")
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self._fail(link, error)
            while chunks and self._paused and self._failure is None:
                # They came in the moment of the pause, and are not among the bytes that the other end was told of.
                await self._changed.park()
            if chunks and self._in is link:  # otherwise they come again
                if self._tail.receive(chunks) >= self._notice_at:
                    self._notice()
                return chunks

    def watch(self, on_readable: Callable[[], object]) -> bool:
        carrier = self._carrier
        if carrier is not None and not carrier.link.watch(on_readable):
            return False
        self._on_readable = on_readable
        return True

    def unwatch(self) -> None:
        self._on_readable = None
        if self._carrier is not None:
            self._carrier.link.unwatch()

    def receive_nowait(self) -> Sequence[Bytes] | None:
        link = self._in
        if link is None:
            self._raise_if_ended()
            return None
        try:
            chunks = link.receive_nowait()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._fail(link, error)
            return None
        self.drained = link.drained
        if chunks and self._tail.receive(chunks) >= self._notice_at:
            self._notice()
        return chunks

    def blame(self) -> None:
        self.close_code, self.close_reason = 1002, "a rule of the protocol was broken"

    async def aclose(self) -> None:
        self.end(trio.ClosedResourceError("the link was closed"))
        carrier = self._carrier
        if carrier is None:
            await trio.lowlevel.checkpoint()
            return
        carrier.link.close_code, carrier.link.close_reason = self.close_code, self.close_reason
        try:
            await carrier.link.aclose()
        finally:
            carrier.gone.set()

    # Inside

    def _has_space(self) -> bool:
        """Whether the tail takes more, until `_look_at`."""
        self._charge()
        short = self._budget is not None and self._budget.is_short
        if self._tail.is_full(short=short):
            return False
        self._look_at = self._tail.sent + (_LOOK_WHILE_SHORT if short else _LOOK_EVERY)
        return True

    async def _usable(self) -> WebSocketLink:
        """Wait until something can be sent."""
        while True:
            link = self._out
            if link is not None and (self._tail.sent < self._look_at or self._has_space()):
                self._full_since = None
                return link
            self._raise_if_ended()
            if link is not None and self._full_since is None:
                self._full_since = trio.current_time()
            await self._changed.park()

    def _raise_if_ended(self) -> None:
        if self._failure is not None:
            raise fresh_copy(self._failure)

    def _charge(self) -> None:
        """Let the budget know how long the tail is."""
        if self._budget is not None:
            held = self._tail.held
            self._budget.take(held - self._charged)
            self._charged = held

    def _notice(self) -> None:
        """Enough was received to report it, now or soon."""
        tail = self._tail
        if tail.received - tail.reported >= tail.report_every:
            self._report()
        elif not self._is_due:
            self._wake_run()
        self._notice_at = tail.reported + (tail.report_every if self._is_due else LEAST_REPORT)

    def _report(self) -> bool:
        """Report what was received. False if that has to be tried again, or there is no carrier."""
        tail, carrier = self._tail, self._carrier
        if carrier is None:
            return False
        if tail.received - tail.reported < LEAST_REPORT:
            return True
        if not carrier.link.offer_text(received_text(tail.received)):
            self._wake_run()
            return False
        tail.reported = tail.received
        return True

    def _take_text(self, text: str) -> None:
        total = received_in(text)
        if total is None:
            self.on_text(text)
            return
        if self._tail.acknowledge(total):
            self._charge()
            self._look_at = self._tail.sent
            if self._full_since is not None:
                self._full_since = trio.current_time()
            self._changed.unpark_all()

    def _fail(self, link: WebSocketLink, error: trio.BrokenResourceError | trio.ClosedResourceError) -> None:
        """A carrier has failed: lose it, or end the link if the peer has ended the session."""
        carrier = self._carrier
        if carrier is None or carrier.link is not link:
            return  # it was given up before
        if isinstance(error, WebSocketClosed) and (error.code in _FOR_GOOD or error.code >= 4000):
            self.end(error)
        else:
            self._lose(carrier, error, ended=True)

    def _lose(self, carrier: Carrier, reason: Exception, *, ended: bool = False) -> None:
        if carrier is not self._carrier or self._failure is not None:
            return
        delivery, silence = carrier.link.delivery(), trio.current_time() - carrier.link.last_received
        self._give_up_carrier()
        self._usable_since = trio.current_time()
        self._on_interrupted()
        self._wake_run()
        self._changed.unpark_all()
        stuck = delivery is not None and delivery.stuck
        self.on_lost(Loss(reason, stuck=stuck, silence=silence, ended=ended))

    def _give_up_carrier(self) -> None:
        carrier, self._carrier = self._carrier, None
        self._replaying, self._in, self._out = False, None, None
        if carrier is None:
            return
        self._last_received = max(self._last_received, carrier.link.last_received)
        self._reading.cancel()
        if self._on_readable is not None:
            carrier.link.unwatch()
        carrier.gone.set()

    def _wake_run(self) -> None:
        self._is_due = True
        self._due.set()

    def _wake(self) -> None:
        """The state has changed: let the tasks that wait look again."""
        usable = self._carrier is not None and not self._paused and self._failure is None
        self._in = self._carrier.link if self._carrier is not None and usable else None
        self._out = None if self._replaying else self._in
        self._changed.unpark_all()
        if self._on_readable is not None:
            Reactor.current().queue(self._call_back)

    def _call_back(self) -> int:
        if self._on_readable is not None:
            self._on_readable()
        return 0


def _batches(chunks: Sequence[Bytes]) -> list[list[Bytes]]:
    batches: list[list[Bytes]] = []
    size = _BATCH
    for chunk in chunks:
        if size >= _BATCH:
            batches.append([])
            size = 0
        batches[-1].append(chunk)
        size += len(chunk)
    return batches
