"""The Trio side of a yamux session: a reader task, a writer task, and a clock task.

Theory of operation. `YamuxConnection.run` owns the link.

- What the link receives is fed to the session, and streams that have events are woken or called back. Where the link
  can be watched, the event loop calls back for it (`_on_readable`); otherwise a task reads it. Neither waits for the
  writer.
- All others queue frames in the session. What callbacks have queued is sent at the end of their turn, as far as the
  link takes it at once (`_flush`). The writer task sends what is left, and what tasks have queued. While it is at work,
  nothing else sends on the link.
- The clock task sends pings, detects a dead peer, and resets streams that were not accepted, or did not end, in time.

`run` never returns. It raises the reason why the session ended. Then every stream that has not ended is broken.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, Final, NoReturn, final

import attrs
import trio

from .._model.errors import RemoteProtocolError, fresh_copy
from .._model.exception_groups import leaves
from .._model.log_fields import about
from .._model.session_limits import Limits
from .._model.stats import SessionStats
from .._net.delivery import LONGEST_PAUSE, Movement
from .._net.fastpath.event_loop import Reactor, Stay
from .._net.fastpath.timers import Timer
from .._net.link import Link
from .._net.log_limiter import LogLimiter
from .._net.streams import Bytes
from .._net.turn import Turn
from .events import Event, GoAwayReceived, OpenAllowed, PongReceived, StreamOpened, StreamReadable, StreamWritable
from .flow import SendBudget
from .frames import Buffer, GoAwayCode
from .heartbeat import Heartbeat
from .pacing import LARGEST_BATCH, Pacing
from .session import Role, Session
from .stream import YamuxStream
from .stream_state import Stream

__all__ = ["YamuxConnection"]

GOODBYE_TIMEOUT: Final = 1.0
"""Seconds that the end of a session may take: to finish the current write, and to send the go-away."""

STALL_TIMEOUT: Final = 30.0
"""Seconds that a write may make no progress. Must exceed `MEASURE_INTERVAL`, the clock task's longest sleep."""

STALL_LOOK: Final = 1.0
"""Seconds until the clock task looks again whether the peer takes bytes, while some wait for it."""

ACKNOWLEDGE_WITHIN: Final = 0.1
"""Seconds until a stream that was accepted and has sent nothing is acknowledged by a frame of its own."""

MOST_HELD_BACK: Final = 64
"""Acceptances after which those that have not left are sent at once: a peer may wait for them when 256 are missing."""

BULK_PAUSE: Final = 1.0
"""Seconds without a full batch after which the next one starts bulk data again."""

MEASURE_INTERVAL: Final = 10.0
"""Seconds between pings that measure the round trip, which windows need to grow."""

_log_limiter: Final = LogLimiter(logging.getLogger("pioneer_tunnel.yamux.connection"))

# The reader processes received data in portions of this size, as large as a message of a well-behaved peer. After so
# many seconds it lets other tasks run.
_PORTION: Final = 64 * 1024
_TURN_SECONDS: Final = 0.005
_SHORT: Final = 4 * 1024
"""A portion that needs no look at the clock."""
_TURN: Final = 256 * 1024
"""Bytes that are taken from the link before others have their turn, if the link calls back."""

_FLUSHES: Final = 4
"""Batches that are sent at the end of a turn before other tasks run."""

WAKES_PER_TURN: Final = 32
"""Streams that are delivered or woken before other tasks run. Each one starts or resumes a handler."""


def _ignore(seconds: float) -> None:
    """The default for `on_round_trip`."""


@final
class YamuxConnection:
    """One yamux session over `link`.

    Args:
        link: the bytes below; closed when `run` ends.
        role: the client opens streams with odd ids, the server with even ids.
        heartbeat: seconds of silence after which the peer is pinged; after twice as many seconds it is dead. See
            `Heartbeat` for what prolongs that.
        limits: the limits of the session; the default is `Limits()`.
        on_stream: called for each stream that the peer opens, after the data that arrived together with it was
            processed. When it raises, `trio.WouldBlock` for example, the stream is reset. Without it, all streams of
            the peer are reset.
        on_round_trip: called with each measured round trip, in seconds.
        on_first_bytes: awaited once, when the peer's first bytes have arrived and before they are processed. An
            exception of it ends the session.
        on_doubt: called with the seconds of silence when the path is in doubt, once for each silence. Returns True if
            the link restores itself; then a failed check does not end the session. With `on_doubt`, pings follow
            traffic (see `Heartbeat`).
        goodbye: seconds that the end may take, once `run` is cancelled or the session is over.
        process_sending: the send budget that all sessions of the process share; None when only the session's counts.

    Attributes:
        session: the protocol.
        failure: why the connection ended; None while it has not.
        stuck: whether it ended while the path seemed to drop large packets, see `Delivery`.
        failed_check: whether it ended because a check has failed, or by `give_up`.
        watchers: the streams on which a task waits in `wait_broken`, and those with a leg.
    """

    __slots__ = (
        "_acknowledging",
        "_answer_waiters",
        "_asked_at",
        "_bulk_at",
        "_clock",
        "_ending",
        "_events",
        "_flush_failure",
        "_given_up",
        "_gone",
        "_goodbye",
        "_heard_at",
        "_heartbeat",
        "_held_back",
        "_idle_writer",
        "_interval",
        "_link",
        "_mid_send",
        "_on_doubt",
        "_on_first_bytes",
        "_on_round_trip",
        "_on_stream",
        "_open_waiters",
        "_pacing",
        "_presses",
        "_receive_failure",
        "_sending",
        "_stay",
        "_traffic_at_rest",
        "_unprocessed",
        "_unsent",
        "_writer_idle",
        "failed_check",
        "failure",
        "session",
        "stuck",
        "turn",
        "watchers",
    )

    def __init__(
        self,
        link: Link,
        role: Role,
        *,
        heartbeat: float,
        limits: Limits | None = None,
        on_stream: Callable[[YamuxStream], None] | None = None,
        on_round_trip: Callable[[float], None] = _ignore,
        on_first_bytes: Callable[[], Awaitable[None]] | None = None,
        on_doubt: Callable[[float], bool] | None = None,
        goodbye: float = GOODBYE_TIMEOUT,
        process_sending: SendBudget | None = None,
    ) -> None:
        limits = limits or Limits()
        if on_stream is None:
            limits = attrs.evolve(limits, unaccepted=0)
        self.session: Final = Session(role, limits, process_sending=process_sending)
        self.failure: Exception | None = None
        self.stuck: bool = False
        self.failed_check: bool = False
        self.watchers: Final[set[Stream]] = set()
        self._link: Final = link
        link.bind(on_interrupted=self.session.forget_pings, budget=self.session.sending)
        self._interval: Final = heartbeat
        self._heartbeat = Heartbeat(heartbeat, follows_traffic=on_doubt is not None)
        self._on_stream: Final = on_stream
        self._on_round_trip: Final = on_round_trip
        self._on_first_bytes = on_first_bytes
        self._on_doubt: Final = on_doubt
        self._goodbye: Final = goodbye
        self._heard_at = link.last_received
        self._clock = trio.lowlevel.ParkingLot()
        self._given_up = -math.inf, ""
        self._traffic_at_rest: int | None = None  # while the clock task waits for traffic as well
        self._events: Final[deque[Event]] = deque()
        self._writer_idle = False
        self._idle_writer = trio.lowlevel.ParkingLot()
        self._open_waiters = trio.lowlevel.ParkingLot()
        self._answer_waiters = trio.lowlevel.ParkingLot()
        self._asked_at: float | None = None  # when `answers` sent a ping that has no answer yet
        self._gone: trio.Event | None = None  # set when no stream is left, while somebody waits for that
        self._sending: Final = trio.CancelScope(shield=True)
        self._mid_send = False
        self._unsent: list[Buffer] = []
        self._flush_failure: Exception | None = None
        self._ending = False
        self.turn: Final = Turn.current()
        self._unprocessed: Final[deque[Bytes]] = deque()  # was received
        self._stay: Stay | None = None  # while the event loop calls back for the link
        self._acknowledging: Timer | None = None  # at the same time
        self._held_back = 0  # acceptances since the last `_send_acknowledgements`
        self._receive_failure: Exception | None = None
        self._pacing: Final = Pacing()
        self._presses = False  # whether the last batch was full
        self._bulk_at = -math.inf

    async def run(self) -> NoReturn:
        """Run the session until it ends.

        Raises:
            RemoteProtocolError: the peer violated the protocol, or sent a go-away with an error code.
            trio.BrokenResourceError: the link ended or stalled, or the peer is silent. The message says which.
            trio.Cancelled: it was cancelled. Before that, it sends a go-away, for at most `goodbye` seconds.
        """
        try:
            async with trio.open_nursery(strict_exception_groups=True) as nursery:
                nursery.start_soon(self._receive)
                nursery.start_soon(self._send)
                nursery.start_soon(self._keep_time)
        except BaseExceptionGroup as group:
            delivery = self._link.delivery()
            self.stuck = delivery is not None and delivery.stuck
            ending, others = group.split((RemoteProtocolError, trio.BrokenResourceError, trio.ClosedResourceError))
            await self._fail_in_turns(_reason(ending))
            if others is not None:
                raise others from None  # a cancellation, an interrupt or a bug
        except trio.Cancelled:
            await self._fail_in_turns(_reason(None))
            raise
        finally:
            await self._say_goodbye()
        assert self.failure is not None
        raise fresh_copy(self.failure)

    async def open_stream(self, *, announce: bool = True) -> YamuxStream:
        """Open a stream. Waits while 256 of them are unacknowledged. The caller sets the deadline.

        Args:
            announce: send its SYN now. With False it is sent with the stream's first data, or with the session's next
                frames.

        Raises:
            trio.BrokenResourceError: the connection is gone, or the session opens no more streams.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            try:
                stream = self.open_stream_nowait()
            except trio.WouldBlock:
                await self._open_waiters.park()
            else:
                if announce:
                    self.wake_writer()
                return stream

    def open_stream_nowait(self) -> YamuxStream:
        """Open a stream, without announcing it.

        Raises:
            trio.WouldBlock: 256 streams are unacknowledged.
            trio.BrokenResourceError: as `open_stream`.
        """
        if self.failure is not None:
            raise trio.BrokenResourceError(f"the connection is gone: {self.failure}") from self.failure
        session = self.session
        if session.may_open:
            return YamuxStream(self, session.open_stream(self.turn.now()))
        if session.openings_over:
            raise trio.BrokenResourceError("the session takes no more streams")
        raise trio.WouldBlock

    def refuse_streams(self) -> None:
        """Send a go-away: open streams continue, and neither end opens more."""
        self.session.go_away(GoAwayCode.NORMAL)
        self._open_waiters.unpark_all()
        self.wake_writer()

    async def streams_gone(self) -> None:
        """Wait until no stream is left. The caller sets the deadline."""
        while self.failure is None and self.session.live_streams:
            self._gone = self._gone or trio.Event()
            await self._gone.wait()

    async def answers(self, within: float) -> bool:
        """Ping the peer and wait for any byte of it. False when none has arrived after `within` seconds.

        Calls share a ping that is not answered yet. Then `within` counts from when that ping was sent.
        """
        if self.failure is not None:
            return False
        asked_at = self._asked_at
        if asked_at is None or (not self._answer_waiters and self._link.last_received > asked_at):
            self._asked_at = asked_at = trio.current_time()
            self.session.ping(asked_at)
            self.wake_writer()
        with trio.move_on_at(asked_at + within):
            await self._answer_waiters.park()
            return self.failure is None
        # The link may have received bytes that did not reach us: a part of a large message, or a WebSocket control
        # frame.
        return self._link.last_received > asked_at

    @property
    def silence(self) -> float:
        """Seconds since the last byte of the session came. Bytes that only close the connection do not count."""
        return trio.current_time() - self._heard_at

    def stats(self, **known: Any) -> SessionStats:
        """The numbers now. `known` are fields that others know."""
        session = self.session
        round_trip = session.round_trips.shortest
        return SessionStats(
            suspended=self._link.suspended,
            round_trip_ms=None if round_trip is None else round(round_trip * 1000, 3),
            streams_open=session.streams_open,
            unread_bytes=session.unread,
            unread_limit_bytes=session.limits.unread,
            unsent_bytes=session.sending.held,
            unsent_limit_bytes=session.limits.unsent,
            **known,
        )

    @property
    def in_doubt(self) -> bool:
        """Whether the session has ended or opens no more streams, or a ping is unanswered for too long."""
        return self.failure is not None or self.session.openings_over or self.turn.now() >= self._heartbeat.doubt_at

    def check(self) -> None:
        """Ping the peer now. Without a sign of life within 2 seconds the path is in doubt, and soon the session ends.

        See `Heartbeat`, and `on_doubt`. Does not wait.
        """
        self._heartbeat.check()
        self._clock.unpark_all()

    def give_up(self, why: str) -> None:
        """Like a check that has failed, for a caller who knows that nothing can come any more. Does not wait.

        Args:
            why: for the error.
        """
        self._given_up = trio.current_time(), why
        self._clock.unpark_all()

    def fail(self, failure: Exception) -> None:
        """Break every stream, when `run` will not be called."""
        for _ in self._fail(failure):
            pass

    async def _fail_in_turns(self, failure: Exception) -> None:
        with trio.CancelScope(shield=True):
            for _ in self._fail(failure):
                await trio.lowlevel.checkpoint()

    def _fail(self, failure: Exception) -> Iterator[None]:
        """Break every stream. Yields where other tasks should run, because each woken stream resumes a handler."""
        self.failure = fresh_copy(failure)
        self.session.sending.close()
        for waiting in (self._open_waiters, self._answer_waiters):
            waiting.unpark_all()
        if self._gone is not None:
            self._gone.set()
        for stream in self.session.live_streams:
            stream.count_end()
        for number, stream in enumerate({*self.session.live_streams, *self.watchers}, start=1):
            owner = stream.owner
            if owner is not None:
                owner.on_readable()
                owner.on_writable()
            if not number % WAKES_PER_TURN:
                yield

    # For streams

    def wake_writer(self) -> None:
        """Send what the session has, if anything: at the end of the turn, or else by the writer."""
        if self.turn.running:
            self.turn.at_end(self._flush)
        elif self._writer_idle and self.session.has_work:
            self._start_writer()

    def acknowledge(self, stream: Stream) -> None:
        """Accept a stream that the peer opened. Most streams answer soon, and the first frame says that, too."""
        timer = self._acknowledging
        self.session.acknowledge(stream, hold=True)
        self._held_back += 1
        if timer is None or self._held_back >= MOST_HELD_BACK:
            self._send_acknowledgements()
        elif timer.deadline == math.inf:
            timer.move(self.turn.now() + ACKNOWLEDGE_WITHIN)

    def _send_acknowledgements(self) -> None:
        self._held_back = 0
        self.session.release_acknowledgements()
        # In a turn, so that it leaves at the end of it, and takes no step of the writer.
        self.turn.run(self.wake_writer)

    def _start_writer(self) -> None:
        self._writer_idle = False
        self._idle_writer.unpark()

    def _flush(self) -> None:
        """Send what the session has, as far as the link takes it at once. The writer sends the rest."""
        if not self._writer_idle or self._ending:
            return
        try:
            if self._send_at_once():
                return
        except Exception as error:  # noqa: BLE001  # the writer raises it
            self._flush_failure = error
        self._start_writer()

    def _send_at_once(self) -> bool:
        """Returns False if something is left."""
        session = self.session
        for _ in range(_FLUSHES):
            if self._presses and not self._link.has_room:
                break
            batch = self._next_batch()
            if batch:
                self._mid_send = True
                sent = self._link.send_nowait(batch)
                if not sent:
                    self._unsent = batch if sent is None else []
                    return False
                self._mid_send = False
            if not session.has_work:
                return True
            self._dispatch()
        return False

    def _next_batch(self) -> list[Buffer]:
        """Take what to send next."""
        link, size = self._link, self._pacing.batch
        if self._presses and size < LARGEST_BATCH:
            # What leaves at once delays nothing. In small batches it would leave more slowly than it could.
            size = min(size + link.window_left, LARGEST_BATCH)
        batch = self.session.data_to_send(size, self._pacing.turn)
        if self._gone is not None:
            self._tell_if_gone()  # the last stream may have ended with what was just taken
        if self._traffic_at_rest is not None:
            self._note_traffic()
        self._presses = self.session.taken >= self._pacing.batch
        if self._presses:
            now = self.turn.now()
            if now > self._bulk_at + BULK_PAUSE:
                link.expect_bulk()
            self._bulk_at = now
        return batch

    # The tasks

    async def _receive(self) -> NoReturn:
        if self._on_first_bytes is not None:
            self._keep(await self._link.receive())
            await self._on_first_bytes()
        with Reactor.current().stay() as stay:
            if self._link.watch(self._on_readable):
                self._stay = stay
                self._acknowledging = stay.reactor.timer(self._send_acknowledgements)
                stay.reactor.queue(self._on_readable)  # something may have come already
                try:
                    await stay.wait()
                finally:
                    self._link.unwatch()
                    self._acknowledging.close()
                assert self._receive_failure is not None
                raise self._receive_failure
        while True:
            while self._unprocessed or self._events:
                if self.turn.run(self._process):
                    await trio.lowlevel.checkpoint()
            self._keep(await self._link.receive())

    def _on_readable(self) -> int:
        """The event loop calls this when the link has something. Returns how many bytes were taken, for its turns."""
        assert self._stay is not None
        if self._ending or self._receive_failure is not None:
            return 0  # it was queued before the end
        taken, link, drained = 0, self._link, False
        try:
            while not ((self._unprocessed or self._events) and self._process()) and taken < _TURN:
                chunks = None if drained else link.receive_nowait()
                if chunks is None:
                    return taken
                drained = link.drained
                if not chunks:
                    break
                taken += self._keep(chunks)
            self._stay.reactor.queue(self._on_readable)
        except Exception as error:  # noqa: BLE001  # the receiving task raises it
            self._receive_failure = error
            self._stay.end()
        return taken

    def _keep(self, chunks: Sequence[Bytes]) -> int:
        """Keep what was received until `_process` has its turn; returns the size."""
        if not chunks:
            raise trio.BrokenResourceError("the other end closed the connection")
        if self._asked_at is not None:
            self._asked_at = None
            self._answer_waiters.unpark_all()
        total = 0
        for chunk in chunks:
            size = len(chunk)
            total += size
            if size <= _PORTION:
                self._unprocessed.append(chunk)
            else:
                view = memoryview(chunk)
                self._unprocessed.extend(view[start : start + _PORTION] for start in range(0, size, _PORTION))
        return total

    def _process(self) -> bool:
        """Process what was received, for one turn at most; True if some is left."""
        unprocessed = self._unprocessed
        now, late = self.turn.now(), False
        if unprocessed:
            self._heard_at = now
        if self._events and self._dispatch():
            return True
        try:
            while unprocessed and not late:
                portion = unprocessed.popleft()
                self.session.receive_data(portion, now)
                # Let other tasks run in between: a message may hold thousands of frames.
                late = (bool(unprocessed) or len(portion) > _SHORT) and trio.current_time() - now > _TURN_SECONDS
            if self._traffic_at_rest is not None:
                self._note_traffic()
            # Once for all portions: what has come for a stream in several messages is then one read.
            more = self._dispatch() or late
        finally:
            self.session.keep_unread()  # the link uses its buffer again
        if self.session.has_work:
            self.turn.at_end(self._flush)
        return more

    async def _send(self) -> None:
        session, pacing = self.session, self._pacing
        # Shielded, so that a cancellation does not cut a frame. `_keep_time` ends this task, and sets a deadline.
        self._link.limit_unsent(pacing.unsent)
        with self._sending:
            while True:
                if self._flush_failure is not None:
                    raise self._flush_failure
                started = trio.current_time()
                if self._mid_send:  # `_flush` has left it, or a rest of it in the link
                    await self._link.send(self._unsent)
                    self._mid_send, self._unsent = False, []
                if self._ending:
                    return
                if session.has_work:
                    await self._link.wait_room()
                batch = self._next_batch()
                self._mid_send = bool(batch)  # frames were taken and not sent: after this, a go-away must not be sent
                while self.turn.run(self._dispatch):
                    await trio.lowlevel.checkpoint()
                if not batch:
                    if not session.has_work:
                        # No deadline: it waits until there is something to send. The clock task watches the peer.
                        self._writer_idle = True
                        try:
                            await self._idle_writer.park()
                        finally:
                            self._writer_idle = False
                    continue
                amount = session.taken
                await self._link.send(batch)
                self._mid_send = False
                if pacing.sent(amount, trio.current_time() - started):
                    self._link.limit_unsent(pacing.unsent)

    async def _keep_time(self) -> NoReturn:
        link, movement, pinged, measured = self._link, Movement(), -math.inf, -1
        since = link.usable_since
        link.outlast(max(2 * self._interval, LONGEST_PAUSE) + STALL_TIMEOUT)
        in_doubt = restoring = False
        try:
            while True:
                now, delivery, traffic = trio.current_time(), link.delivery(), self.session.traffic
                if link.usable_since != since:  # it is suspended, or has another connection
                    since = link.usable_since
                    self._heartbeat = Heartbeat(self._interval, follows_traffic=self._on_doubt is not None)
                    movement = Movement()
                    in_doubt = restoring = False
                heartbeat, heard_at = self._heartbeat, max(link.last_received, since)
                silent = heartbeat.look(now, heard_at, delivery, traffic)
                if now >= heartbeat.dead_at:
                    link.lose_connection(trio.BrokenResourceError(f"no byte came for {heartbeat.patience:g} seconds"))
                    continue
                sending_since = link.sending_since
                if sending_since is not None and now >= sending_since + STALL_TIMEOUT:
                    link.lose_connection(
                        trio.BrokenResourceError(f"the other end took no byte for {STALL_TIMEOUT:g} seconds")
                    )
                    continue
                given_up_at, why = self._given_up
                failed = given_up_at > heard_at
                if now >= heartbeat.check_fails_at:
                    failed, why = True, "the other end did not answer a check"
                was_in_doubt, in_doubt = in_doubt, failed or now >= heartbeat.doubt_at
                if in_doubt and not was_in_doubt:
                    restoring = self._on_doubt is not None and self._on_doubt(now - link.last_received)
                if failed and not restoring:
                    self.failed_check = True
                    raise trio.BrokenResourceError(why)
                measure = now >= pinged + MEASURE_INTERVAL and traffic != measured and not link.suspended
                if silent or measure:
                    self.session.ping(now)
                    pinged, measured = now, traffic
                movement.look(now, heard_at, delivery)
                overdue = self.session.reset_overdue(now, movement, since=since)
                while self._dispatch():  # the writer may be waiting for the link
                    await trio.lowlevel.checkpoint()
                self.wake_writer()
                looks = [heartbeat.next_look, heartbeat.doubt_at, heartbeat.check_fails_at, heartbeat.dead_at]
                looks.append(now + MEASURE_INTERVAL)
                if sending_since is not None:
                    looks += [sending_since + STALL_TIMEOUT, now + STALL_LOOK]
                if overdue is not None:
                    looks.append(overdue)
                self._traffic_at_rest = traffic if heartbeat.awaits_traffic else None
                with trio.move_on_at(min(look for look in looks if look > now)):
                    await self._clock.park()
        finally:
            self._ending = True
            # Nothing can be sent while the link is suspended.
            self._sending.deadline = trio.current_time() + (0 if link.suspended else self._goodbye)
            self._start_writer()

    def _note_traffic(self) -> None:
        """Wake the clock task, which waits for traffic, if there is some."""
        if self.session.traffic != self._traffic_at_rest:
            self._traffic_at_rest = None
            self._clock.unpark_all()

    # Shared by the tasks

    def _dispatch(self) -> bool:
        """Process the session's events, at most `WAKES_PER_TURN` wake-ups; True when some are left."""
        events = self._events
        events += self.session.events()
        if not events:
            return False
        opened: list[YamuxStream] = []
        wakes = 0
        while events and wakes < WAKES_PER_TURN:
            event = events.popleft()
            match event:
                case StreamReadable(stream):
                    if stream.owner is not None:
                        stream.owner.on_readable()
                        wakes += 1
                case StreamWritable(stream):
                    if stream.owner is not None:
                        stream.owner.on_writable()
                        wakes += 1
                case StreamOpened(stream):
                    if stream.was_reset:
                        self.session.reset(stream)  # it was opened and reset at once: drop its data
                    else:
                        opened.append(YamuxStream(self, stream))
                        wakes += 1
                case OpenAllowed():
                    if self._open_waiters:
                        self._open_waiters.unpark()
                case PongReceived(round_trip):
                    self._on_round_trip(round_trip)
                case GoAwayReceived():
                    self._receive_go_away(event)
        for delivered in opened:
            # Last, so that a stream is delivered with the data that arrived together with it.
            try:
                assert self._on_stream is not None
                self._on_stream(delivered)
            except trio.WouldBlock:
                delivered.reset()
            except Exception as error:  # noqa: BLE001  # an error about one stream must not end the others
                line = "a stream could not be handed on; it is reset"
                fields = about("unforeseen", reason=type(error).__name__)
                _log_limiter.log("unforeseen", line, level=logging.ERROR, error=error, about=fields)
                delivered.reset()
        if self._gone is not None:
            self._tell_if_gone()
        return bool(events)

    def _tell_if_gone(self) -> None:
        if self._gone is not None and not self.session.live_streams:
            self._gone.set()
            self._gone = None

    def _receive_go_away(self, event: GoAwayReceived) -> None:
        self._open_waiters.unpark_all()
        if event.code != GoAwayCode.NORMAL:
            raise RemoteProtocolError(f"the other end went away with code {event.code}")

    async def _say_goodbye(self) -> None:
        """Send a go-away, unless the link is gone or a batch was cut; then close the link."""
        if isinstance(self.failure, RemoteProtocolError):
            self._link.blame()
        if not (self._mid_send or isinstance(self.failure, trio.BrokenResourceError)):
            with (
                trio.CancelScope(deadline=self._sending.deadline, shield=True),
                contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError),
            ):
                self.session.go_away(GoAwayCode.NORMAL)
                await self._link.send(self.session.data_to_send(LARGEST_BATCH))
                await self._link.aclose()
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(self._link)


def _reason(ending: BaseExceptionGroup[Exception] | None) -> Exception:
    """Why the session ended. A protocol error comes first: when the link breaks as well, that is its consequence."""
    reasons = [] if ending is None else [error for error in leaves(ending) if isinstance(error, Exception)]
    reasons.sort(key=lambda reason: not isinstance(reason, RemoteProtocolError))
    return reasons[0] if reasons else trio.ClosedResourceError("it was closed at this end")
