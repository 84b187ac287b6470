"""The Trio side of a yamux session: one task that receives, one that sends, one that watches the clock.

Theory of operation. `YamuxConnection.run` owns the link. The reader takes what comes, feeds the session, and wakes
the streams concerned; it never sends, so it never waits for the writer. The writer takes what the session wants to
send and hands it to the link, the only task that does; everybody else just queues and wakes it. The clock task
sends pings, notices a dead peer, and resets what nobody accepted or took leave of in time.

`run` never returns: it raises why the session ended. Then every stream that had not ended is broken.

Neighbours: a `Link` below, `YamuxStream`s above; a transport decides what an ending means for the tunnel.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from typing import Final, NoReturn, final

import attrs
import trio

from .._model.errors import RemoteProtocolError, fresh_copy
from .._model.exception_groups import leaves
from .._net.link import Link
from .._net.log_limiter import Complaints
from .events import Event, GoAwayReceived, OpenAllowed, PongReceived, StreamOpened, StreamReadable, StreamWritable
from .flow import SendBudget
from .frames import GoAwayCode
from .session import Limits, Role, Session
from .stream import YamuxStream

__all__ = ["YamuxConnection"]

GOODBYE_TIMEOUT: Final = 1.0
"""Seconds that an ending may take: what is under way has to leave, and the goodbye after it."""

STALL_TIMEOUT: Final = 30.0
"""Seconds that a write may make no progress. It has to be longer than the clock task ever sleeps."""

MEASURE_INTERVAL: Final = 10.0
"""Seconds between pings that measure the round trip; windows grow by it."""

_complaints: Final = Complaints(logging.getLogger("pioneer_tunnel.yamux.connection"))

# A batch is what the writer hands to the link at once. What is in a batch cannot be overtaken, so on a slow path
# batches are small, and on a fast one large, so that a batch takes about this long.
_BATCH_SECONDS: Final = 0.01
_MIN_BATCH: Final = 16 * 1024
_MAX_BATCH: Final = 255 * 1024

# What is taken in at once, as much as a message of a well-behaved peer, and for how long until others have their turn.
_MOST_AT_ONCE: Final = 64 * 1024
_TURN_SECONDS: Final = 0.005

WAKES_PER_TURN: Final = 32
"""Streams that are handed on or woken before other tasks run. Each starts a handler, or lets one end."""


def _ignore_round_trip(seconds: float) -> None:
    """For whoever does not care."""


@final
class YamuxConnection:
    """One yamux session over `link`.

    Args:
        link: what carries it; closed when `run` ends.
        role: the client opens odd streams, the server even ones.
        heartbeat: seconds of silence after which the peer is pinged; after twice as many it is dead.
        limits: what the session may cost.
        on_stream: called for each stream that the peer opens, with everything that arrived together with it. It
            must not wait; when it raises `trio.WouldBlock`, the stream is reset. Without it, every stream is.
        on_round_trip: called with each measured round trip, in seconds.
        on_first_bytes: awaited once, when the peer's first bytes have come, before they are processed and answered.
            What it raises ends the session.
        goodbye: seconds that the ending may take at the most, once `run` is cancelled or the session over.
        process_sending: what all sessions of the process may hold for sending; None for no limit beside the session's.
    """

    def __init__(
        self,
        link: Link,
        role: Role,
        *,
        heartbeat: float,
        limits: Limits | None = None,
        on_stream: Callable[[YamuxStream], None] | None = None,
        on_round_trip: Callable[[float], None] = _ignore_round_trip,
        on_first_bytes: Callable[[], Awaitable[None]] | None = None,
        goodbye: float = GOODBYE_TIMEOUT,
        process_sending: SendBudget | None = None,
    ) -> None:
        limits = limits or Limits()
        if on_stream is None:
            limits = attrs.evolve(limits, unaccepted=0)
        self.session: Final = Session(role, limits, process_sending=process_sending)
        self.failure: Exception | None = None
        self.watchers: Final[set[YamuxStream]] = set()
        """Streams on which a task waits in `wait_broken`."""
        self._link: Final = link
        self._heartbeat: Final = heartbeat
        self._on_stream: Final = on_stream
        self._on_round_trip: Final = on_round_trip
        self._on_first_bytes = on_first_bytes
        self._goodbye: Final = goodbye
        self._events: Final[deque[Event]] = deque()
        self._writer_idle = trio.lowlevel.ParkingLot()
        self._openers = trio.lowlevel.ParkingLot()
        self._askers = trio.lowlevel.ParkingLot()
        self._asked_at: float | None = None  # when the question was put that has no answer yet
        self._leavers = trio.lowlevel.ParkingLot()
        self._sending: Final = trio.CancelScope(shield=True)
        self._mid_send = False
        self._ending = False
        self._batch = 64 * 1024

    async def run(self) -> NoReturn:
        """Carry the session until it ends.

        Raises:
            RemoteProtocolError: the peer broke a rule, or went away with an error.
            trio.BrokenResourceError: the link ended, stalled, or the peer fell silent. The message tells.
            trio.Cancelled: when cancelled; the peer is told goodbye, for at most `goodbye` seconds.
        """
        try:
            async with trio.open_nursery(strict_exception_groups=True) as nursery:
                nursery.start_soon(self._receive)
                nursery.start_soon(self._send)
                nursery.start_soon(self._keep_time)
        except BaseExceptionGroup as group:
            ending, others = group.split((RemoteProtocolError, trio.BrokenResourceError, trio.ClosedResourceError))
            await self._fail_in_turns(_reason(ending))
            if others is not None:
                raise others from None  # a cancellation, an interrupt, a bug: not ours to translate
        except trio.Cancelled:
            await self._fail_in_turns(_reason(None))
            raise
        finally:
            await self._say_goodbye()
        assert self.failure is not None
        raise fresh_copy(self.failure)

    async def open_stream(self) -> YamuxStream:
        """Open a stream, waiting while 256 of them are not acknowledged. The caller sets the deadline.

        Raises:
            trio.BrokenResourceError: the connection is gone, or the peer takes no more streams.
        """
        await trio.lowlevel.checkpoint()
        while True:
            if self.failure is not None:
                raise trio.BrokenResourceError(f"the connection is gone: {self.failure}") from self.failure
            if self.session.openings_over:
                raise trio.BrokenResourceError("the session takes no more streams")
            if self.session.may_open:
                stream = YamuxStream(self, self.session.open_stream(trio.current_time()))
                self.wake_writer()
                return stream
            await self._openers.park()

    def refuse_streams(self) -> None:
        """Send a go-away: the streams that are open go on, and no more are opened, by either end."""
        self.session.go_away(GoAwayCode.NORMAL)
        self._openers.unpark_all()
        self.wake_writer()

    async def streams_gone(self) -> None:
        """Wait until no stream is left. The caller sets the deadline."""
        while self.failure is None and self.session.live_streams:
            await self._leavers.park()

    async def answers(self, within: float) -> bool:
        """Ask the other end for a sign of life: False when not a byte has come after `within` seconds.

        One question serves all who ask before its answer comes: then `within` counts from that question.
        """
        if self.failure is not None:
            return False
        asked_at = self._asked_at
        if asked_at is None or (not self._askers and self._link.last_received > asked_at):
            self._asked_at = asked_at = trio.current_time()
            self.session.ping(asked_at)
            self.wake_writer()
        with trio.move_on_at(asked_at + within):
            await self._askers.park()
            return self.failure is None
        # What came was not for us yet: a part of a large message, or of the WebSocket's own.
        return self._link.last_received > asked_at

    def fail(self, failure: Exception) -> None:
        """Break every stream, now and for good, when `run` will not be called."""
        for _ in self._fail(failure):
            pass

    async def _fail_in_turns(self, failure: Exception) -> None:
        with trio.CancelScope(shield=True):
            for _ in self._fail(failure):
                await trio.lowlevel.checkpoint()

    def _fail(self, failure: Exception) -> Iterator[None]:
        """Break every stream. Yields where other tasks should run: each stream that is woken lets a handler end."""
        self.failure = fresh_copy(failure)
        self.session.sending.close()
        for waiting in (self._openers, self._askers, self._leavers):
            waiting.unpark_all()
        owners = {stream.owner for stream in self.session.live_streams} | self.watchers
        for number, owner in enumerate(owners, start=1):
            if owner is not None:
                owner.wake_readers()
                owner.wake_writers()
            if not number % WAKES_PER_TURN:
                yield

    # For streams

    def wake_writer(self) -> None:
        """The session may have something to send."""
        if self._writer_idle and self.session.has_work:
            self._writer_idle.unpark()

    # The three tasks

    async def _receive(self) -> NoReturn:
        session = self.session
        while True:
            chunks = await self._link.receive()
            if not chunks:
                raise trio.BrokenResourceError("the other end closed the connection")
            if self._on_first_bytes is not None:
                on_first_bytes, self._on_first_bytes = self._on_first_bytes, None
                await on_first_bytes()
            now = trio.current_time()
            for chunk in chunks:
                for start in range(0, len(chunk), _MOST_AT_ONCE):
                    # Whatever the peer says, others have their turn in between: thousands of frames fit a message.
                    if trio.current_time() - now > _TURN_SECONDS:
                        await trio.lowlevel.checkpoint()
                        now = trio.current_time()
                    session.receive_data(memoryview(chunk)[start : start + _MOST_AT_ONCE], now)
                    while self._dispatch():
                        self.wake_writer()
                        await trio.lowlevel.checkpoint()
                        now = trio.current_time()
            self._asked_at = None
            self._askers.unpark_all()
            self.wake_writer()
            if trio.current_time() - now > _TURN_SECONDS:
                await trio.lowlevel.checkpoint()

    async def _send(self) -> None:
        session = self.session
        # Shielded, so that ending the session does not cut a frame in two; `_keep_time` ends it, by a deadline if
        # it has to.
        with self._sending:
            while not self._ending:
                batch = session.data_to_send(self._batch)
                self._mid_send = bool(batch)  # what was taken has to leave, also when this is cut off here
                while self._dispatch():
                    await trio.lowlevel.checkpoint()
                if not batch:
                    if not session.has_work:
                        # No deadline: with nothing to say there is nothing to wait for; the clock task keeps the
                        # session.
                        await self._writer_idle.park()
                    continue
                started = trio.current_time()
                await self._link.send(batch)
                self._mid_send = False
                if trio.current_time() - started > _BATCH_SECONDS:
                    self._batch = max(self._batch // 2, _MIN_BATCH)
                elif sum(map(len, batch)) >= self._batch:  # of one that was not full, the time says nothing
                    self._batch = min(self._batch * 2, _MAX_BATCH)

    async def _keep_time(self) -> NoReturn:
        try:
            pinged = -math.inf
            while True:
                now, silent_since = trio.current_time(), self._link.last_received
                ask_at, dead_at = silent_since + self._heartbeat, silent_since + 2 * self._heartbeat
                if now >= dead_at:
                    raise trio.BrokenResourceError(f"no byte came for {2 * self._heartbeat:g} seconds")
                sending_since = self._link.sending_since
                if sending_since is not None and now >= sending_since + STALL_TIMEOUT:
                    raise trio.BrokenResourceError(f"the other end took no byte for {STALL_TIMEOUT:g} seconds")
                measure = now >= pinged + MEASURE_INTERVAL and (self.session.live_streams or pinged < 0)
                if now >= ask_at > pinged or measure:
                    self.session.ping(now)
                    pinged = now
                overdue = self.session.reset_overdue(now)
                self.wake_writer()
                looks = [ask_at, dead_at, now + MEASURE_INTERVAL]
                if sending_since is not None:
                    looks.append(sending_since + STALL_TIMEOUT)
                if overdue is not None:
                    looks.append(overdue)
                await trio.sleep_until(min(look for look in looks if look > now))
        finally:
            self._ending = True
            self._sending.deadline = trio.current_time() + self._goodbye
            self._writer_idle.unpark_all()

    # What they share

    def _dispatch(self) -> bool:
        """Do what the session's events ask for, as far as a turn reaches; True when it left some of it.

        Nothing here waits.
        """
        self._events.extend(self.session.events())
        opened: list[YamuxStream] = []
        wakes = 0
        while self._events and wakes < WAKES_PER_TURN:
            event = self._events.popleft()
            if isinstance(event, StreamReadable):
                if event.stream.owner is not None:
                    wakes += event.stream.owner.wake_readers()
            elif isinstance(event, StreamWritable):
                if event.stream.owner is not None:
                    wakes += event.stream.owner.wake_writers()
            elif isinstance(event, StreamOpened):
                if event.stream.was_reset:
                    self.session.reset(event.stream)  # it came and went in one breath: what it said is dropped
                else:
                    opened.append(YamuxStream(self, event.stream))
                    wakes += 1
            elif isinstance(event, OpenAllowed):
                self._openers.unpark()
            elif isinstance(event, PongReceived):
                self._on_round_trip(event.round_trip)
            else:
                self._receive_go_away(event)
        for stream in opened:
            # Last, so that a stream is handed on together with the data that came with it.
            try:
                assert self._on_stream is not None
                self._on_stream(stream)
            except trio.WouldBlock:
                stream.reset()
            except Exception as error:  # noqa: BLE001  # one visitor's trouble is never the trouble of all
                line = "a stream could not be handed on; it is reset"
                _complaints.tell("unforeseen", line, level=logging.ERROR, error=error)
                stream.reset()
        if self._leavers and not self.session.live_streams:
            self._leavers.unpark_all()
        return bool(self._events)

    def _receive_go_away(self, event: GoAwayReceived) -> None:
        self._openers.unpark_all()
        if event.code != GoAwayCode.NORMAL:
            raise RemoteProtocolError(f"the other end went away with code {event.code}")

    async def _say_goodbye(self) -> None:
        """Tell the peer, unless it is gone or half a batch is on the wire, and let go of the link."""
        if isinstance(self.failure, RemoteProtocolError):
            self._link.blame()
        if not (self._mid_send or isinstance(self.failure, trio.BrokenResourceError)):
            with (
                trio.CancelScope(deadline=self._sending.deadline, shield=True),
                contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError),
            ):
                self.session.go_away(GoAwayCode.NORMAL)
                await self._link.send(self.session.data_to_send(_MAX_BATCH))
                await self._link.aclose()
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(self._link)


def _reason(ending: BaseExceptionGroup[Exception] | None) -> Exception:
    """Why the session ended. A broken rule comes first: that the link then breaks is its consequence."""
    reasons = [] if ending is None else [leaf for leaf in leaves(ending) if isinstance(leaf, Exception)]
    reasons.sort(key=lambda reason: not isinstance(reason, RemoteProtocolError))
    return reasons[0] if reasons else trio.ClosedResourceError("it was closed at this end")
