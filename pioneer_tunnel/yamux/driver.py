"""What drives a session without waiting: the callbacks that every byte passes between a link and the streams.

Theory of operation. The event loop, the streams and the tasks of the connection call. Nothing here waits.

- What comes: the event loop calls back for the link after `watch`. For a link that cannot be watched, a task receives,
  and calls `keep` and `process`. The session makes events of it, and `dispatch` wakes or calls back their streams.
- What leaves: all queue frames in the session and call `wake_writer`. What was queued in a turn is sent at its end, as
  far as the link takes it at once. The writer, a task, sends what is left, and what was queued outside of turns. While
  it is at work, nothing else sends on the link.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final, final

import trio

from .._model.errors import RemoteProtocolError, fresh_copy
from .._model.log_fields import about
from .._net.fastpath.stay import Stay
from .._net.fastpath.timers import Timer
from .._net.link import Link
from .._net.log_limiter import LogLimiter
from .._net.streams import Bytes
from .._net.turn import Turn
from .events import Event, GoAwayReceived, OpenAllowed, PongReceived, StreamOpened, StreamReadable, StreamWritable
from .frames import Buffer, GoAwayCode
from .pacing import LARGEST_BATCH, Pacing
from .session import Session
from .stream import YamuxStream
from .stream_state import Stream

__all__ = ["Driver"]

ACKNOWLEDGE_WITHIN: Final = 0.1
"""Seconds until a stream that was accepted and has sent nothing is acknowledged by a frame of its own."""

MOST_HELD_BACK: Final = 64
"""Acceptances after which those that have not left are sent at once: a peer may wait for them when 256 are missing."""

BULK_PAUSE: Final = 1.0
"""Seconds without a full batch after which the next one starts bulk data again."""

WAKES_PER_TURN: Final = 32
"""Streams that are delivered or woken before other tasks run. Each one starts or resumes a handler."""

# Received data is processed in portions of this size, as large as a message of a well-behaved peer. After so many
# seconds other tasks run.
_PORTION: Final = 64 * 1024
_TURN_SECONDS: Final = 0.005
_SHORT: Final = 4 * 1024
"""A portion that needs no look at the clock."""
_TURN: Final = 256 * 1024
"""Bytes that are taken from the link before others have their turn, if the link calls back."""

_FLUSHES: Final = 4
"""Batches that are sent at the end of a turn before other tasks run."""

_log_limiter: Final = LogLimiter(logging.getLogger("pioneer_tunnel.yamux.connection"))


@final
class Driver:
    """Moves what it can between `link` and the streams of `session`.

    Args:
        link: the bytes below.
        session: the protocol.
        on_stream: see `YamuxConnection`.
        on_round_trip: see `YamuxConnection`.
        on_traffic: called once there is traffic, after `await_traffic`.

    Attributes:
        session: the protocol.
        turn: the turns that callbacks run in.
        failure: why the connection ended; None while it has not.
        watchers: the streams on which a task waits in `wait_broken`, and those with a leg.
        open_waiters: the tasks that wait until a stream may be opened.
        heard_at: when the last byte of the session was processed.
        ending: whether nothing more is sent and received, see `end`.
        receive_failure: why the stay of `watch` was ended.
        send_failure: why the writer was woken, if the link failed.
        unsent: frames that were taken from the session and have not left. The writer sends them first, also if it is
            empty: then the link has a rest of them. Only if it is None may other frames be sent.
        pacing: how much is sent at once. The writer measures for it.
    """

    def __init__(
        self,
        link: Link,
        session: Session,
        *,
        on_stream: Callable[[YamuxStream], object],
        on_round_trip: Callable[[float], object],
        on_traffic: Callable[[], object],
    ) -> None:
        self.session: Final = session
        self.turn: Final = Turn.current()
        self.failure: Exception | None = None
        self.watchers: Final[set[Stream]] = set()
        self.open_waiters: Final = trio.lowlevel.ParkingLot()
        self.heard_at: float = link.last_received
        self.ending: bool = False
        self.receive_failure: Exception | None = None
        self.send_failure: Exception | None = None
        self.unsent: list[Buffer] | None = None
        self.pacing: Final = Pacing()
        self._link: Final = link
        self._on_stream: Final = on_stream
        self._on_round_trip: Final = on_round_trip
        self._on_traffic: Final = on_traffic
        # An event is set and forgotten when it happens. It is None while none is asked for.
        self._heard: trio.Event | None = None
        self._asked_at = -math.inf  # when `ask` sent its last ping
        self._gone: trio.Event | None = None
        self._traffic_at_rest: int | None = None  # the session's traffic, while more is awaited
        self._idle_writer: trio.Event | None = None
        self._unprocessed: Final[deque[Bytes]] = deque()  # was received
        self._events: Final[deque[Event]] = deque()
        self._stay: Stay | None = None  # while the event loop calls back for the link
        self._acknowledging: Timer | None = None  # at the same time
        self._held_back = 0  # acceptances since the last `_send_acknowledgements`
        self._presses = False  # whether the last batch was full
        self._bulk_at = -math.inf

    # What comes

    def watch(self, stay: Stay) -> bool:
        """Receive and process in the event loop, until `unwatch`. Ends `stay` when that fails.

        False, and nothing happens, if the link cannot do that.
        """
        if not self._link.watch(self._on_readable):
            return False
        self._stay = stay
        self._acknowledging = stay.reactor.timer(self._send_acknowledgements)
        stay.reactor.queue(self._on_readable)  # something may have come already
        return True

    def unwatch(self) -> None:
        """To be called before the stay ends."""
        assert self._acknowledging is not None
        self._link.unwatch()
        self._acknowledging.close()

    def _on_readable(self) -> int:
        """The event loop calls this when the link has something. Returns how many bytes were taken, for its turns."""
        assert self._stay is not None
        if self.ending or self.receive_failure is not None:
            return 0  # it was queued before the end
        taken, link, drained = 0, self._link, False
        try:
            while not ((self._unprocessed or self._events) and self.process()) and taken < _TURN:
                chunks = None if drained else link.receive_nowait()
                if chunks is None:
                    return taken
                drained = link.drained
                if not chunks:
                    break
                taken += self.keep(chunks)
            self._stay.reactor.queue(self._on_readable)
        except Exception as error:  # noqa: BLE001  # the receiving task raises it
            self.receive_failure = error
            self._stay.end()
        return taken

    def keep(self, chunks: Sequence[Bytes]) -> int:
        """Keep what was received until `process` has its turn; returns the size."""
        if not chunks:
            raise trio.BrokenResourceError("the other end closed the connection")
        if self._heard is not None:
            self._heard.set()
            self._heard = None
        total = 0
        for chunk in chunks:
            size = len(chunk)
            total += size
            if size <= _PORTION:
                self._unprocessed.append(chunk)
            else:
                view = memoryview(chunk)
                self._unprocessed.extend([view[start : start + _PORTION] for start in range(0, size, _PORTION)])
        return total

    def process(self) -> bool:
        """Process what was received, for one turn at most; True if some is left."""
        unprocessed = self._unprocessed
        now, late = self.turn.now(), False
        if unprocessed:
            self.heard_at = now
        if self._events and self.dispatch():
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
            more = self.dispatch() or late
        finally:
            self.session.keep_unread()  # the link uses its buffer again
        if self.session.has_work:
            self.turn.at_end(self._flush)
        return more

    def dispatch(self) -> bool:
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
                    if self.open_waiters:
                        self.open_waiters.unpark()
                case PongReceived(round_trip):
                    self._on_round_trip(round_trip)
                case GoAwayReceived(code):
                    self.open_waiters.unpark_all()
                    if code != GoAwayCode.NORMAL:
                        raise RemoteProtocolError(f"the other end went away with code {code}")
        for delivered in opened:
            # Last, so that a stream is delivered with the data that arrived together with it.
            self._deliver(delivered)
        if self._gone is not None:
            self._tell_if_gone()
        return bool(events)

    def _deliver(self, stream: YamuxStream) -> None:
        try:
            self._on_stream(stream)
        except trio.WouldBlock:
            stream.reset()
        except Exception as error:  # noqa: BLE001  # an error about one stream must not end the others
            line = "a stream could not be handed on; it is reset"
            fields = about("unforeseen", reason=type(error).__name__)
            _log_limiter.log("unforeseen", line, level=logging.ERROR, error=error, about=fields)
            stream.reset()

    def _tell_if_gone(self) -> None:
        assert self._gone is not None
        if not self.session.streams_open:
            self._gone.set()
            self._gone = None

    def _note_traffic(self) -> None:
        if self.session.traffic != self._traffic_at_rest:
            self._traffic_at_rest = None
            self._on_traffic()

    # What tasks wait for

    def ask(self) -> tuple[trio.Event, float]:
        """Ping the peer, unless a ping that others wait for is unanswered. Nothing may have failed.

        Returns:
            What is set when the next byte comes, or when the connection has ended; and when that ping was sent.
        """
        heard = self._heard
        if heard is None or (not heard.statistics().tasks_waiting and self._link.last_received > self._asked_at):
            self._heard = heard = trio.Event()
            self._asked_at = trio.current_time()
            self.session.ping(self._asked_at)
            self.wake_writer()
        return heard, self._asked_at

    def until_gone(self) -> trio.Event | None:
        """What is set when no stream is left, or when the connection has ended; None if one of them is so."""
        if self.failure is not None or not self.session.streams_open:
            return None
        self._gone = self._gone or trio.Event()
        return self._gone

    def await_traffic(self, at_rest: int | None) -> None:
        """Call `on_traffic` when the session's traffic is not `at_rest` any more. Do not if it is None."""
        self._traffic_at_rest = at_rest

    # What leaves

    def wake_writer(self) -> None:
        """Send what the session has, if anything: at the end of the turn, or else by the writer."""
        if self.turn.running:
            self.turn.at_end(self._flush)
        elif self._idle_writer is not None and self.session.has_work:
            self.start_writer()

    def start_writer(self) -> None:
        """Wake the writer if it is idle."""
        if self._idle_writer is not None:
            self._idle_writer.set()
            self._idle_writer = None

    def until_work(self) -> trio.Event:
        """For the writer, which has nothing to do: what is set when it has, or when this ends."""
        idle = trio.Event()
        if self.ending:
            idle.set()
        else:
            self._idle_writer = idle
        return idle

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

    def _flush(self) -> None:
        """Send what the session has, as far as the link takes it at once. The writer sends the rest."""
        if self._idle_writer is None or self.ending:
            return
        try:
            if self._send_at_once():
                return
        except Exception as error:  # noqa: BLE001  # the writer raises it
            self.send_failure = error
        self.start_writer()

    def _send_at_once(self) -> bool:
        """Returns False if something is left."""
        for _ in range(_FLUSHES):
            if self._presses and not self._link.has_room:
                break
            batch = self.next_batch()
            if batch:
                sent = self._link.send_nowait(batch)
                if not sent:
                    self.unsent = batch if sent is None else []
                    return False
                self.unsent = None
            if not (self.session.has_work or self._events):
                return True
            self.dispatch()
        return False

    def next_batch(self) -> list[Buffer]:
        """Take what to send next. It is `unsent` until the caller has sent it."""
        link, size = self._link, self.pacing.batch
        if self._presses and size < LARGEST_BATCH:
            # What leaves at once delays nothing. In small batches it would leave more slowly than it could.
            size = min(size + link.window_left, LARGEST_BATCH)
        batch = self.session.data_to_send(size, self.pacing.turn)
        self.unsent = batch or None
        if self._gone is not None:
            self._tell_if_gone()  # the last stream may have ended with what was just taken
        if self._traffic_at_rest is not None:
            self._note_traffic()
        self._presses = self.session.taken >= self.pacing.batch
        if self._presses:
            now = self.turn.now()
            if now > self._bulk_at + BULK_PAUSE:
                link.expect_bulk()
            self._bulk_at = now
        return batch

    # The end

    def end(self) -> None:
        """Send and receive no more. The writer finishes its write."""
        self.ending = True
        self.start_writer()

    def fail(self, failure: Exception) -> Iterator[None]:
        """Break every stream. Yields where other tasks should run, because each woken stream resumes a handler."""
        self.failure = fresh_copy(failure)
        self.session.sending.close()
        self.open_waiters.unpark_all()
        for awaited in (self._heard, self._gone):
            if awaited is not None:
                awaited.set()
        for stream in self.session.live_streams:
            stream.count_end()
        for number, stream in enumerate({*self.session.live_streams, *self.watchers}, start=1):
            owner = stream.owner
            if owner is not None:
                owner.on_readable()
                owner.on_writable()
            if not number % WAKES_PER_TURN:
                yield
